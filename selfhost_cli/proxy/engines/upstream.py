"""What the adapters share: requests that can be cancelled, an engine's refusals in our words, and the prefill."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import aiohttp

from selfhost_cli.proxy.codec import decode, encode
from selfhost_cli.proxy.contract import Json, Request
from selfhost_cli.proxy.engines import AnswerEvent, Prompt, Text, Thinking
from selfhost_cli.proxy.errors import EngineBroke, EngineDown, EngineLoading, ProxyError, invalid, reason_of, too_long
from selfhost_cli.proxy.web import upload

QUICK = aiohttp.ClientTimeout(total=30, connect=5)
PATIENT = aiohttp.ClientTimeout(total=None, connect=5)
READ_AHEAD = 2**14
"""Bytes; twice that and what one more read brings is kept of an answer whose client reads slowly."""
EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
PASSING = (408, 425, 429, 502, 503, 504, 529)
LOADING = re.compile("loading model", re.IGNORECASE)
"""What llama.cpp's server says while it does."""
REFUSAL_S = 10.0
LONGEST_REFUSAL = 2**16
# some echo the request in what they say of it, and no prompt may get into a log
LONGEST_REASON = 500

# How llama.cpp, vLLM (three generations), SGLang, OpenAI and Cerebras word it
LIMITS = re.compile(r"(?:context length (?:is|of|is only) |context length \(|context size \(|while limit is )(\d+)")
PROMPTS = [
    re.compile(pattern)
    for pattern in (
        r"\((\d+) in the messages",
        r"(\d+) input tokens",
        r"(\d+) tokens from the input",
        r"(?:request|input) \((\d+) tokens",
        r"resulted in (\d+) tokens",
        r"Current length is (\d+)",
        r"requested (\d+) tokens",
    )
]


class Upstream:
    """`base_url` is asked at every call, because a restarted engine may have another port; it raises EngineDown.

    Make it inside a running event loop. `key` goes out as a bearer token, and nowhere else.
    """

    def __init__(self, name: str, model: str, base_url: Callable[[], str], key: str = "") -> None:
        self.name = name
        self._model = model
        self._base_url = base_url
        # Not as a session's own headers: these would be told a proxy on the way, too.
        self._headers = {"content-type": "application/json"} | (self._credentials(key) if key else {})
        self._kept, self._fresh = _session(), _session(force_close=True)

    def _credentials(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}

    async def save(self, name: str, tokens: int) -> bool:
        return False

    async def restore(self, name: str) -> bool:
        return False

    async def close(self) -> None:
        await self._kept.close()
        await self._fresh.close()

    async def _refused(self, response: aiohttp.ClientResponse) -> ProxyError:
        """What a status that is not 200 means."""
        return (await refusal(response)).error()

    async def _ask(self, path: str, body: Json | None = None, timeout: aiohttp.ClientTimeout = QUICK) -> Json:
        """The JSON object that it answers, {} for anything else that is JSON."""
        async with self._request(path, body, timeout) as response:
            if response.status != 200:
                raise await self._refused(response)
            try:
                data = await response.json(content_type=None)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise self._down(error) from error
        return data if isinstance(data, dict) else {}

    async def _number(self, path: str, body: Json, key: str) -> int | None:
        """A count that the engine answers with under that key; None when it has no such path."""
        async with self._request(path, body, QUICK) as response:
            if response.status in (404, 405):
                return None
            if response.status != 200:
                raise await self._refused(response)
            try:
                return int((await response.json(content_type=None))[key])
            except (aiohttp.ClientError, OSError) as error:
                raise self._down(error) from error
            except (KeyError, TypeError, ValueError) as error:
                raise EngineBroke(f"{self.name} counts in a way that makes no sense") from error

    @asynccontextmanager
    async def _request(
        self, path: str, body: Json | None, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """GET, or POST when there is a body."""
        data = None if body is None else encode(body)
        url = self._base_url() + path
        try:
            try:
                response = await _sent(self._kept, url, data, timeout, self._headers)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # llama.cpp closes the connection after a stream although it promised to keep it (b11549); it has seen
                # nothing of what was sent behind that
                response = await _sent(self._fresh, url, data, timeout, self._headers)
        except (aiohttp.ClientError, OSError) as error:
            raise self._down(error) from error
        try:
            yield response
        finally:
            # not release(): an answer that nobody reads any more must stop being generated now
            response.close()

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Around an answer that comes: what goes wrong with it is the engine's."""
        try:
            yield
        except (aiohttp.ClientError, OSError) as error:
            raise EngineBroke(f"{self.name} broke off: {reason_of(error)}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineBroke(f"{self.name} sent an event of an unknown shape") from error

    def _down(self, error: Exception) -> EngineDown:
        return EngineDown(f"{self.name} does not answer: {reason_of(error)}")


def _session(*, force_close: bool = False) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, force_close=force_close)
    return aiohttp.ClientSession(connector=connector, read_bufsize=READ_AHEAD)


async def _sent(
    session: aiohttp.ClientSession,
    url: str,
    data: bytes | None,
    timeout: aiohttp.ClientTimeout,
    headers: Mapping[str, str],
) -> aiohttp.ClientResponse:
    return await session.request(
        "GET" if data is None else "POST",
        url,
        data=upload(data),
        headers=headers,
        timeout=timeout,
        allow_redirects=False,  # neither the key nor a prompt goes to a host that nobody named
        proxy=way_out(url),
    )


def way_out(url: str) -> str | None:
    """The proxy of the environment, for what it cannot read: it is asked for a tunnel to a server that speaks TLS."""
    if not url.startswith("https:"):
        return None  # an engine of this machine, or of a network that somebody trusts
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    return None if proxy_bypass(urlsplit(url).netloc) else getproxies().get("https")


@dataclass(frozen=True)
class Refusal:
    """An engine's error. `prompt` and `limit` in tokens, 0 where it tells none; `kinds`: its type and its code."""

    status: int
    message: str
    kinds: frozenset[str] = frozenset()
    prompt: int = 0
    limit: int = 0
    retry_after: int | None = None

    @property
    def about_length(self) -> bool:
        return bool(self.limit) or bool(self.kinds & {"exceed_context_size_error", "context_length_exceeded"})

    def error(self, otherwise: type[EngineDown] | type[EngineBroke] = EngineDown) -> ProxyError:
        """In our words: `otherwise` for what may pass, 400 for the rest, because its 500 comes again at every retry."""
        error = self._error(otherwise)
        error.origin = self.status
        return error

    def _error(self, otherwise: type[EngineDown] | type[EngineBroke]) -> ProxyError:
        reason = f"the engine says: {self.message}"
        if self.about_length:
            return self._too_long(reason)
        if self.status in (401, 403):
            # not its own words, which may quote the key; not its 401 either, which would speak of the client's token
            return ProxyError(403, "permission_error", f"the engine refuses our API key ({self.status})", final=True)
        if self.status == 413:
            return ProxyError(413, "request_too_large", self.message)
        passing = self.status in PASSING or self.kinds & {"unavailable_error", "overloaded_error"}
        if not passing or "insufficient_quota" in self.kinds:
            return invalid(reason)
        if otherwise is EngineDown and LOADING.search(self.message):
            otherwise = EngineLoading
        if issubclass(otherwise, EngineDown) and self.retry_after is not None:
            return otherwise(reason, self.retry_after)
        return otherwise(reason)

    def _too_long(self, reason: str) -> ProxyError:
        if not (self.prompt and self.limit):
            return invalid(f"prompt is too long: {reason}")
        if self.prompt < self.limit:
            return invalid(f"input length and `max_tokens` exceed context limit of {self.limit}: {reason}")
        return too_long(self.prompt, self.limit)


async def refusal(response: aiohttp.ClientResponse) -> Refusal:
    """What a status that is not 200 says."""
    raw = await refusal_body(response)
    try:
        data = decode(raw)
    except ValueError:
        data = raw.decode("utf-8", "replace").strip()
    retry_after = response.headers.get("retry-after", "")
    return explained(response.status, data, int(retry_after) if retry_after.isdecimal() else None)


async def refusal_body(response: aiohttp.ClientResponse) -> bytes:
    """In however many pieces it comes; what there is of it when it breaks off, stalls, or goes on and on."""
    raw = b""
    with suppress(aiohttp.ClientError, OSError):
        async with asyncio.timeout(REFUSAL_S):
            while len(raw) < LONGEST_REFUSAL and (piece := await response.content.readany()):
                raw += piece
    return raw


def explained(status: int, data: Any, retry_after: int | None = None) -> Refusal:
    """An error body of any dialect: OpenAI's, vLLM's and Cerebras's flat ones, FastAPI's, mere text."""
    error = data.get("error", data) if isinstance(data, dict) else data
    error = error if isinstance(error, dict) else {"message": error}
    message = str(error.get("message") or error.get("detail") or f"status {status}")
    return Refusal(
        status,
        message[:LONGEST_REASON],
        frozenset(str(error[key]) for key in ("type", "code") if error.get(key)),
        prompt=number(error, "n_prompt_tokens") or _first(PROMPTS, message),
        limit=number(error, "n_ctx") or _first([LIMITS], message),
        retry_after=retry_after,
    )


def template_arguments(request: Request) -> Json:
    """What servers that render a chat template hand to it. Those of llama.cpp think only when told so here (b11549)."""
    # an answer that was begun for it is past its thoughts
    thinking = False if request.prefill else request.thinking
    effort = EFFORTS.get(request.effort)
    arguments = {"enable_thinking": thinking, "reasoning_effort": effort}
    return {name: value for name, value in arguments.items() if value is not None}


def number(data: Json, key: str) -> int:
    value = data.get(key)
    return value if isinstance(value, int) else 0


def _first(patterns: list[re.Pattern[str]], text: str) -> int:
    return next((int(match[1]) for pattern in patterns if (match := pattern.search(text))), 0)


def joined(events: Iterable[AnswerEvent]) -> Iterator[AnswerEvent]:
    """Text that came in one go, in one piece: every piece costs us and the client as much as all of it."""
    said = ""
    try:
        for event in events:
            if isinstance(event, Text):
                said += event.text
                continue
            if said:
                yield Text(said)
                said = ""
            yield event
    except Exception:
        if said:
            yield Text(said)
        raise
    if said:
        yield Text(said)


class Prefill:
    """Takes the prefilled beginning off the answer, which llama.cpp repeats."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._seen = 0

    def without(self, events: Iterable[AnswerEvent]) -> Iterable[AnswerEvent]:
        return chain.from_iterable(map(self._without, events)) if self._text else events

    def _without(self, event: AnswerEvent) -> list[AnswerEvent]:
        rest = self._text[self._seen :]
        if not rest or isinstance(event, Prompt | Thinking):
            return [event]
        if not isinstance(event, Text):
            # an answer that ends here, or goes on with a call, was no repetition
            return [*self._given_back(), event]
        if rest.startswith(event.text):
            self._seen += len(event.text)
            return []
        if event.text.startswith(rest):
            self._seen = len(self._text)
            return [Text(event.text[len(rest) :])]
        return [*self._given_back(), event]

    def _given_back(self) -> list[AnswerEvent]:
        swallowed, self._text = self._text[: self._seen], ""
        return [Text(swallowed)] if swallowed else []
