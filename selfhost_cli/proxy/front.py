"""The front: the laptop's side. Owns the local port, proves itself, relays to the box, and answers while it is away."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from selfhost_cli.proxy import sse
from selfhost_cli.proxy.answer import PROMPT_MS
from selfhost_cli.proxy.cache.cache import Cache
from selfhost_cli.proxy.cache.key import Served
from selfhost_cli.proxy.codec import decode, tokens
from selfhost_cli.proxy.contract import Json, load
from selfhost_cli.proxy.errors import (
    API_ERROR,
    OVERLOADED,
    ProxyError,
    error_object,
    invalid,
    not_found,
    overloaded,
    reason_of,
)
from selfhost_cli.proxy.recipient import Asker, Recipient
from selfhost_cli.proxy.web import (
    MAIN,
    PING_EVERY,
    PUBLIC,
    application,
    is_probe,
    read_body,
    request_class,
    trace,
    upload,
)

PROVE = "/selfhost/prove"
BACKEND = "x-selfhost-backend"
"""In every answer: who gave it."""
BOX = "x-selfhost-box"
"""And under which label the ledger has it: a rented box, say."""
RETRY_AFTER = 5
ELSEWHERE = frozenset({402, 403, 429, 500, 502, 503, 504, 529})
"""Refusals that say nothing about the request: another backend may take it."""
BACK_S, SETTLED_S, LOOK_S = 15.0, 2.0, 0.1
"""How long a request that had come to nothing waits for a new connection to the box, unless the old one stays."""
WHO_S = 2.0
"""Within it a box has to say what it serves, or the cache keeps out of it."""
NOT_SAID_S = 10.0
"""So long is a box that did not say so left alone."""
HEAD_S = 60.0
"""So long may the second try's head take; of a stream it comes at once."""
SILENT_S = 6 * PING_EVERY
"""So long may a stream say nothing: the box's proxy pings in every silence, so that one hangs."""
PATIENT = aiohttp.ClientTimeout(total=None, connect=10)
QUICK = aiohttp.ClientTimeout(total=10)
MAX_JSON = MAX_EVENT = 4 * 2**20
MAX_HEALTH = 64 * 2**10
"""Bytes that are held of what a stranger's machine says."""
NOT_RELAYED = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te"),
        *("trailer", "transfer-encoding", "upgrade", "host", "content-length", "expect", "accept-encoding"),
        *("authorization", "x-api-key", "date", "server"),
    }
)


@dataclass(frozen=True)
class Upstream:
    """Where a request goes: `url` without a path, the token there, the label of its costs, and the backend's name."""

    url: str
    token: str = field(repr=False)
    rental: str
    backend: str = "vast"
    changing: bool = False
    """It is being brought to another model: which one answers is not known."""


@dataclass(frozen=True)
class Away:
    """Why it can go nowhere now. `state` in a word or two, `retry_after` in seconds."""

    state: str
    reason: str
    retry_after: int = RETRY_AFTER


@dataclass(frozen=True)
class Usage:
    """What one answer cost. `input_tokens` is the whole prompt, of which `cache_read` were reused; the rest took the
    engine `prompt_s` seconds, 0 where that is not known."""

    rental: str
    cls: str
    input_tokens: int
    output_tokens: int
    cache_read: int
    prompt_s: float = 0.0


Control = Callable[[Json], Awaitable[Json]]
Failed = Callable[["Upstream", str], bool]
"""Where a request went and why nothing came of it; whether another backend may serve it instead."""
Assign = Callable[["Upstream", str, "Upstream | None"], Awaitable["Upstream"]]
"""What serves, a conversation ("" for none), and where it just came to nothing, if so; to which box it goes."""
Heard = Callable[[str, bytes], None]
"""A user agent, and the body of a request that Claude Code made for itself, before it is answered."""
Result = TypeVar("Result")


async def _alone(target: Upstream, session: str, avoid: Upstream | None) -> Upstream:
    """Where there is one box."""
    return target


def build_front(
    token: str,
    upstream: Callable[[], Upstream | Away],
    status: Callable[[], Json],
    on_usage: Callable[[Usage], None],
    control: Mapping[str, Control],
    cache: Cache | None = None,
    on_main: Heard = lambda agent, body: None,
    on_failed: Failed = lambda target, why: False,
    assign: Assign = _alone,
) -> web.Application:
    """The application. Host it with `web.runner`, so that a client that is gone cancels what it asked for.

    `upstream` is asked at every request. `control` is served as `POST /selfhost/<name>`: a JSON object in and out; to
    refuse, it raises `errors.ProxyError`.
    """
    return _Front(token, upstream, status, on_usage, control, cache, on_main, on_failed, assign).application()


def proof(token: str, nonce: str, port: int) -> str:
    """What only a listener that knows the token, on this very port, can answer to a nonce (hex)."""
    message = f"selfhost-prove\n{nonce}\n{port}".encode()
    return hmac.new(token.encode(), message, hashlib.sha256).hexdigest()


class _Front:
    def __init__(
        self,
        token: str,
        upstream: Callable[[], Upstream | Away],
        status: Callable[[], Json],
        on_usage: Callable[[Usage], None],
        control: Mapping[str, Control],
        cache: Cache | None,
        on_main: Heard,
        on_failed: Failed,
        assign: Assign,
    ) -> None:
        self._token = token
        self._upstream = upstream
        self._status = status
        self._on_usage = on_usage
        self._control = control
        self._cache = cache
        self._on_main = on_main
        self._on_failed = on_failed
        self._assign = assign
        self._known: tuple[Upstream, Served | None, float] | None = None
        self._last: Served | None = None
        self._asking = asyncio.Lock()

    def application(self) -> web.Application:
        app = application(self._token, PUBLIC | {PROVE})
        app.router.add_get("/", self._hello)
        app.router.add_get("/api/hello", self._hello)
        app.router.add_get("/health", self._health)
        app.router.add_post(PROVE, self._prove)
        app.router.add_get("/selfhost/metrics", self._metrics)
        app.router.add_route("*", "/selfhost/{name:.*}", self._command)
        app.router.add_route("*", "/{path:.*}", self._relay)
        app.cleanup_ctx.append(self._sessions)
        if self._cache:
            app.cleanup_ctx.append(self._cached)
        return app

    async def _sessions(self, app: web.Application) -> AsyncIterator[None]:
        kept = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        single = aiohttp.TCPConnector(limit=0, force_close=True)
        async with _session(kept) as self._kept, _session(single) as self._fresh:
            yield

    async def _cached(self, app: web.Application) -> AsyncIterator[None]:
        assert self._cache
        await self._cache.start()
        yield
        await self._cache.close()

    async def _hello(self, http: web.Request) -> web.Response:
        return web.json_response({"selfhost": "front"})

    async def _prove(self, http: web.Request) -> web.Response:
        nonce = load(await read_body(http)).get("nonce")
        if not isinstance(nonce, str) or not re.fullmatch(r"[0-9a-f]{16,128}", nonce):
            raise invalid("nonce: 16 to 128 hexadecimal digits")
        port = http.get_extra_info("sockname")[1]
        return web.json_response({"proof": proof(self._token, nonce, port)})

    async def _metrics(self, http: web.Request) -> web.Response:
        """The cache's; those of the box are its own."""
        page = await self._cache.metrics() if self._cache else b""
        return web.Response(body=page, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _command(self, http: web.Request) -> web.Response:
        run = self._control.get(http.match_info["name"])
        if run is None or http.method != hdrs.METH_POST:
            raise not_found(f"{http.method} {http.path}")
        return web.json_response(await run(load(await read_body(http) or b"{}")))

    async def _health(self, http: web.Request) -> web.Response:
        """Always 200: it is the front that answers. `status` is the box's."""
        box = await self._box_health()
        up = box.get("status") == "healthy"
        body = {"status": "healthy" if up else "degraded", "keeper": self._status(), "box": box}
        return web.json_response(body)

    async def _box_health(self) -> Json:
        target = self._upstream()
        if isinstance(target, Away):
            return {"status": "away", "state": target.state, "reason": target.reason}
        try:
            headers = {"authorization": f"Bearer {target.token}"}
            async with self._fresh.get(f"{target.url}/health", headers=headers, timeout=QUICK) as response:
                box = decode(await _at_most(MAX_HEALTH, response))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return {"status": "away", "state": "connected", "reason": reason_of(error)}
        if not isinstance(box, dict) or "status" not in box:
            return {"status": "away", "state": "connected", "reason": f"the box answers {response.status}"}
        return box

    async def _served(self) -> Served | None:
        """What would answer now; while no box does, what did last. None: it does not say so, and is asked again later.

        Whoever asks meanwhile waits for the same answer.
        """
        clock = asyncio.get_running_loop().time
        async with self._asking:
            target = self._upstream()
            if isinstance(target, Away):
                return self._last
            if target.changing:
                self._known = None
                return None
            if self._known and self._known[0] == target:
                _, served, asked = self._known
                if served or clock() - asked < NOT_SAID_S:
                    return served
            try:
                async with asyncio.timeout(WHO_S):
                    served = _identity(await self._box_health())
            except TimeoutError:
                served = None
            self._known, self._last = (target, served, clock()), served or self._last
            return served

    async def _relay(self, http: web.Request) -> web.StreamResponse:
        body = await read_body(http)
        if not http.raw_path.startswith("/"):
            raise not_found(http.raw_path)
        if _metered(http) and request_class(http) == MAIN:
            self._on_main(http.headers.get(hdrs.USER_AGENT, ""), body)
        if self._cache and _metered(http) and not is_probe(http):
            return await self._cache.answer(http, body, self._served, partial(self._pass, http, body))
        asker = Asker(http)
        await self._pass(http, body, asker)
        return asker.response

    async def _pass(self, http: web.Request, body: bytes, recipient: Recipient) -> None:
        """The request to the box, and its answer to whoever is to get it. Raises ProxyError when there is none."""
        target = await self._target(http)
        if isinstance(target, Away):
            trace().outcome = "away"
            raise overloaded(f"the box is {target.state}: {target.reason}", target.retry_after)
        metered = _metered(http)
        answer, target = await self._ask(http, body, target, wait=metered)
        if metered and answer.status in ELSEWHERE and not recipient.begun:
            answer, target = await self._elsewhere(http, body, answer, target)
        if recipient.begun and answer.status != 200:
            raise await _refusal(answer)  # its status would come too late
        trace().cls = request_class(http) if metered else "other"
        meter = _Meter(streaming=answer.content_type == "text/event-stream") if metered else None
        relayed = _Relayed(recipient, meter, target)
        try:
            broken = await relayed.run(answer)
            if broken:
                answer.close()
                again = await relayed.pinging(self._again(http, body, target))
                if isinstance(again, str):
                    broken = again or broken
                else:
                    answer, target = again
                    broken = await relayed.run(answer)
            if broken:
                await relayed.fail(broken)
        finally:
            # not release(): what the client no longer reads must stop being generated
            answer.close()
            self._account(meter, target, http)

    async def _elsewhere(
        self, http: web.Request, body: bytes, answer: aiohttp.ClientResponse, target: Upstream
    ) -> tuple[aiohttp.ClientResponse, Upstream]:
        """What the next backend says, where there is one: of this one's refusal nobody has heard yet."""
        while self._on_failed(target, f"it answers {answer.status}"):
            other = self._upstream()
            if isinstance(other, Away) or other.backend == target.backend:
                break
            answer.close()
            answer, target = await self._ask(http, body, other, wait=False)
            if answer.status not in ELSEWHERE:
                break
        return answer, target

    async def _ask(
        self, http: web.Request, body: bytes, target: Upstream, *, wait: bool
    ) -> tuple[aiohttp.ClientResponse, Upstream]:
        """The answer's head. Nothing was produced for the client before it, so more tries do no harm: on a connection
        of its own, and with `wait` on the next connection to the box."""
        try:
            try:
                return await _send(self._kept, http, body, target), target
            except (aiohttp.ClientConnectionError, OSError):
                pass  # kept for too long, perhaps
            try:
                return await _send(self._fresh, http, body, target), target
            except (aiohttp.ClientConnectionError, OSError):
                back = await self._back(http, target) if wait else None
                if not back:
                    raise
                return await _send(self._fresh, http, body, back), back
        except (aiohttp.ClientError, OSError) as error:
            trace().outcome = "unreachable"
            message = f"the box of {target.rental} is connected but does not answer: {reason_of(error)}"
            raise overloaded(message, RETRY_AFTER) from error

    async def _again(
        self, http: web.Request, body: bytes, broken: Upstream
    ) -> tuple[aiohttp.ClientResponse, Upstream] | str:
        """The head of the second try on the next connection; else why there is none, "" when that did not come."""
        back = await self._back(http, broken)
        if back is None:
            return ""
        try:
            async with asyncio.timeout(HEAD_S):
                return await _send(self._fresh, http, body, back), back
        except (aiohttp.ClientError, OSError) as error:
            return reason_of(error)

    async def _target(self, http: web.Request, avoid: Upstream | None = None) -> Upstream | Away:
        """Where a request goes; not to `avoid`, if there is another box."""
        target = self._upstream()
        return target if isinstance(target, Away) else await self._assign(target, _conversation(http), avoid)

    async def _back(self, http: web.Request, broken: Upstream) -> Upstream | None:
        """The next connection after one that broke; None when it does not come in time, or the old one was kept."""
        began = asyncio.get_running_loop().time()
        while (waited := asyncio.get_running_loop().time() - began) < BACK_S:
            target = await self._target(http)
            if isinstance(target, Upstream):
                if target.url != broken.url:
                    return target
                if waited > SETTLED_S:
                    other = await self._target(http, broken)
                    return other if isinstance(other, Upstream) and other.url != broken.url else None
            await asyncio.sleep(LOOK_S)
        return None

    def _account(self, meter: _Meter | None, target: Upstream, http: web.Request) -> None:
        usage = meter.usage() if meter else None
        if not usage:
            return
        cached = tokens(usage.get("cache_read_input_tokens"))
        total = tokens(usage.get("input_tokens")) + tokens(usage.get("cache_creation_input_tokens")) + cached
        output = tokens(usage.get("output_tokens"))
        trace().input_tokens, trace().cached_tokens, trace().output_tokens = total, cached, output
        prompt_s = tokens(usage.get(PROMPT_MS)) / 1000
        self._on_usage(Usage(target.rental, request_class(http), total, output, cached, prompt_s))


class _Relayed:
    """One answer on its way from the box to the client, as it comes; a second one where the first came to nothing."""

    def __init__(self, recipient: Recipient, meter: _Meter | None, target: Upstream) -> None:
        self._recipient = recipient
        self._meter = meter
        self._target = target

    async def run(self, answer: aiohttp.ClientResponse) -> str:
        """Why it broke off before anything but pings had come of it, else ""."""
        if not self._recipient.begun:
            await self._begin(answer)
        elif answer.status != 200:
            return f"it answers {answer.status} now"
        reason = await self._pass_on(answer)
        if reason and self._meter and self._meter.streaming and not self._meter.started:
            self._meter.forget()
            return reason
        if reason:
            await self.fail(reason)
        return ""

    async def pinging(self, work: Awaitable[Result]) -> Result:
        """What comes of it; until then the client hears that somebody is there."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([task], timeout=PING_EVERY))[0]:
                await self._recipient.write(sse.PING)
            return task.result()
        finally:
            task.cancel()

    async def _begin(self, answer: aiohttp.ClientResponse) -> None:
        kept = [(key, value) for key, value in answer.headers.items() if key.lower() not in NOT_RELAYED]
        kept += [(BACKEND, self._target.backend), (BOX, self._target.rental)]
        await self._recipient.begin(answer.status, answer.reason, CIMultiDict(kept), answer.content_length)

    async def _pass_on(self, answer: aiohttp.ClientResponse) -> str:
        """Why it broke off, "" when it is whole."""
        chunks = aiter(answer.content.iter_any())
        patience = SILENT_S if self._meter and self._meter.streaming else None
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(None) as silence:
                while True:
                    if patience:
                        silence.reschedule(clock() + patience)
                    try:
                        chunk = await anext(chunks)
                    except StopAsyncIteration:
                        unfinished = self._meter and self._meter.unfinished
                        return "the stream ended in the middle of the answer" if unfinished else ""
                    except (aiohttp.ClientError, OSError) as error:
                        return reason_of(error)
                    silence.reschedule(None)  # how long the client takes is its own affair
                    trace().mark("first")
                    if whole := self._meter.read(chunk) if self._meter else chunk:
                        await self._recipient.write(whole)
                    elif self._meter and self._meter.held > MAX_EVENT:
                        return f"an event of more than {MAX_EVENT // 2**20} MB"
        except TimeoutError:
            return f"nothing came for {SILENT_S:.0f} s"

    async def fail(self, reason: str) -> None:
        """Never a clean end on a broken answer: an error event where there are events, else a torn connection."""
        trace().outcome = "broken"
        if not (self._meter and self._meter.streaming):
            self._recipient.tear()
            return
        kind = API_ERROR if self._meter.started else OVERLOADED
        event = error_object(kind, f"the connection to the box broke: {reason}", trace().id)
        await self._recipient.write(sse.encode(event))


_TELLING = re.compile(rb"^event: ?(message_|error)", re.MULTILINE)
"""Most events of a long answer are none of these, and need not be taken apart."""


class _Meter:
    """Reads along: usage, and whether a stream has come to its end."""

    def __init__(self, *, streaming: bool) -> None:
        self.streaming = streaming
        self.started = False
        self._ended = False
        self._held = b""
        self._usage: Json = {}
        self._json = bytearray()

    @property
    def unfinished(self) -> bool:
        return self.streaming and not self._ended

    @property
    def held(self) -> int:
        """Bytes of an event that is not whole yet."""
        return len(self._held)

    def read(self, chunk: bytes) -> bytes:
        """What can be passed on now: of events only whole ones, or an error could not follow a broken one."""
        if not self.streaming:
            if len(self._json) < MAX_JSON:
                self._json += chunk
            return chunk
        held = self._held + chunk
        end = max(held.rfind(b"\n\n") + 2, held.rfind(b"\n\r\n") + 3)
        cut = end if end > 2 else 0
        whole, self._held = held[:cut], held[cut:]
        if _TELLING.search(whole):
            self._note(whole)
        return whole

    def _note(self, events: bytes) -> None:
        for event in sse.Parser().feed(events):
            match event.name:
                case "message_start":
                    self.started = True
                case "message_delta":
                    self._usage = _usage(event.data)
                case "message_stop" | "error":
                    self._ended = True

    def forget(self) -> None:
        """Another answer comes in the place of one of which nothing had come."""
        self._held = b""

    def usage(self) -> Json:
        return self._usage if self.streaming else _usage(bytes(self._json))


def _metered(http: web.Request) -> bool:
    return http.method == hdrs.METH_POST and http.path == "/v1/messages"


def _identity(health: Json) -> Served | None:
    parts = [health.get(name) for name in ("engine", "model", "digest", "version")]
    return Served(*map(str, parts)) if all(isinstance(part, str) and part for part in parts) else None


def _session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    # the bytes pass as they are: a compressed answer could not be read along, so none is asked for
    return aiohttp.ClientSession(
        connector=connector,
        timeout=PATIENT,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=[hdrs.USER_AGENT, hdrs.CONTENT_TYPE],
    )


async def _send(
    session: aiohttp.ClientSession, http: web.Request, body: bytes, target: Upstream
) -> aiohttp.ClientResponse:
    url = URL(target.url + http.raw_path, encoded=True)
    return await session.request(
        http.method, url, data=upload(body), headers=_headers(http, target), allow_redirects=False
    )


def _headers(http: web.Request, target: Upstream) -> CIMultiDict[str]:
    """The client's, without what concerns only this hop and without the front's token."""
    named = {name.strip().lower() for name in http.headers.get("connection", "").split(",")}
    named.add("content-encoding")  # the body that was read is no longer compressed
    headers = CIMultiDict((key, value) for key, value in http.headers.items() if key.lower() not in NOT_RELAYED | named)
    headers["authorization"] = f"Bearer {target.token}"
    headers["accept-encoding"] = "identity"
    return headers


def _conversation(http: web.Request) -> str:
    """What prompts of one conversation have in common; a subagent's is another one, with another prompt."""
    session = http.headers.get("x-claude-code-session-id") or http.headers.get("x-session-id") or ""
    agent = http.headers.get("x-claude-code-agent-id", "")
    return f"{session}:{agent}" if session and agent else session


def _usage(data: str | bytes) -> Json:
    try:
        message: Any = decode(data)
    except ValueError:
        return {}
    usage = message.get("usage") if isinstance(message, dict) else None
    return usage if isinstance(usage, dict) else {}


async def _refusal(answer: aiohttp.ClientResponse) -> ProxyError:
    """What the box says instead of an answer, as an error that can still be told."""
    try:
        async with asyncio.timeout(HEAD_S):
            error = decode(await _at_most(MAX_HEALTH, answer))["error"]
        return ProxyError(answer.status, str(error["type"]), str(error["message"]))
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
        return overloaded(f"the box answers {answer.status}", RETRY_AFTER)
    finally:
        answer.close()


async def _at_most(limit: int, response: aiohttp.ClientResponse) -> bytes:
    """The whole body. Raises ValueError when there is more of it."""
    try:
        await response.content.readexactly(limit + 1)
    except asyncio.IncompleteReadError as error:
        return error.partial
    raise ValueError(f"it says more than {limit} bytes")
