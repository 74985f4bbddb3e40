"""Engines that speak Anthropic's dialect themselves, with what they get wrong put right: llama.cpp's server, Ollama."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from selfhost_cli.proxy import sse
from selfhost_cli.proxy.contract import Json, Request
from selfhost_cli.proxy.engines import (
    AnswerEvent,
    Done,
    Health,
    Prompt,
    StopReason,
    Text,
    Thinking,
    ToolCall,
    ToolInput,
)
from selfhost_cli.proxy.errors import EngineBroke, EngineDown, ProxyError, invalid, too_long

QUICK = aiohttp.ClientTimeout(total=30, connect=5)
PATIENT = aiohttp.ClientTimeout(total=None, connect=5)
STOP_REASONS: dict[str, StopReason] = {
    "max_tokens": "max_tokens",
    "stop_sequence": "stop_sequence",
    "tool_use": "tool_use",
}


class AnthropicEngine:
    """`base_url` is asked at every call, because a restarted engine may have another port; it raises EngineDown.

    Make it inside a running event loop.
    """

    def __init__(self, name: str, model: str, base_url: Callable[[], str]) -> None:
        self.name = name
        self._model = model
        self._base_url = base_url
        self._context: dict[str, int] = {}
        # force_close: llama.cpp closes the socket after a stream although it promised to keep it alive, so that every
        # second request on a pooled connection fails (b11549)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))

    async def health(self) -> Health:
        base = self._base_url()
        props = await self._ask(base, "/props")
        try:
            context = int(props["default_generation_settings"]["n_ctx"])
            health = Health(context, int(props.get("total_slots") or 1))
        except (KeyError, TypeError, ValueError) as error:
            raise EngineDown(f"{self.name} does not tell its context") from error
        self._context = {base: health.context}
        return health

    async def context(self) -> int:
        known = self._context.get(self._base_url())
        return known if known is not None else (await self.health()).context

    async def count(self, request: Request) -> int | None:
        async with self._post("/v1/messages/count_tokens", self._body(request), QUICK) as response:
            if response.status == 404:
                return None
            if response.status != 200:
                raise await _refusal(response)
            try:
                return int((await response.json())["input_tokens"])
            except (KeyError, TypeError, ValueError) as error:
                raise EngineBroke(f"{self.name} counts in a way that makes no sense") from error

    async def messages(self, request: Request) -> AsyncGenerator[AnswerEvent]:
        body = self._body(request) | {"stream": True}
        prefill = _Prefill(request.prefill)
        async with self._post("/v1/messages", body, PATIENT) as response:
            if response.status != 200:
                raise await _refusal(response)
            try:
                async for event in _answer(sse.events(response.content.iter_any())):
                    for kept in prefill.without(event):
                        yield kept
            except (aiohttp.ClientError, OSError) as error:
                raise EngineBroke(f"{self.name} broke off: {error or type(error).__name__}") from error

    async def close(self) -> None:
        await self._session.close()

    async def _ask(self, base: str, path: str, body: Json | None = None) -> Json:
        """GET, or POST when there is a body."""
        try:
            method = "GET" if body is None else "POST"
            async with self._session.request(method, base + path, json=body, timeout=QUICK) as response:
                if response.status != 200:
                    raise await _refusal(response)
                data = await response.json()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self._down(error) from error
        return data if isinstance(data, dict) else {}

    @asynccontextmanager
    async def _post(
        self, path: str, body: Json, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        # lone surrogates are legal in JSON and in str, but not in the UTF-8 that the engine gets
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        try:
            response = await self._session.post(
                self._base_url() + path,
                data=io.BytesIO(data),  # bytes over 1 MB draw a warning
                headers={"content-type": "application/json"},
                timeout=timeout,
            )
        except (aiohttp.ClientError, OSError) as error:
            raise self._down(error) from error
        try:
            yield response
        finally:
            # not release(): an answer that nobody reads any more must stop being generated now
            response.close()

    def _down(self, error: Exception) -> EngineDown:
        return EngineDown(f"{self.name} does not answer: {error or type(error).__name__}")

    def _body(self, request: Request) -> Json:
        body: Json = {
            "model": self._model,
            "max_tokens": request.max_tokens,
            "messages": [part for message in request.messages for part in _results_apart(message)],
            **request.sampling,
        }
        if request.system:
            body["system"] = request.system
        if request.tools:
            body["tools"] = request.tools
            body["tool_choice"] = {"type": "any" if request.force_tool else "auto"}
        return body


def _results_apart(message: Json) -> list[Json]:
    """One message for tool results, one for the rest: llama.cpp puts the text of a mixed one before its results."""
    results = [block for block in message["content"] if block["type"] == "tool_result"]
    others = [block for block in message["content"] if block["type"] != "tool_result"]
    return [{"role": message["role"], "content": part} for part in (results, others) if part]


async def _answer(events: AsyncIterator[sse.Event]) -> AsyncIterator[AnswerEvent]:
    """llama.cpp's events as ours. Stops are not looked at: it sends all of them at the very end."""
    prompt = Prompt(0)
    delta: Json = {}
    tool = -1
    async for event in events:
        data = _data(event)
        match data:
            case {"type": "message_start", "message": {"usage": dict(usage)}}:
                prompt = _prompt(usage)
                yield prompt
            case {"type": "content_block_start", "index": index, "content_block": {"type": "tool_use", **block}}:
                tool = index
                yield ToolCall(str(block.get("name")))
                if block.get("input"):
                    yield ToolInput(json.dumps(block["input"]))
            case {"type": "content_block_delta", "index": index, "delta": {"partial_json": str(piece)}}:
                if index != tool:
                    raise EngineBroke("the engine mixed up two tool calls")
                yield ToolInput(piece)
            case {"type": "content_block_delta", "delta": {"text": str(text)}}:
                yield Text(text)
            case {"type": "content_block_delta", "delta": {"thinking": str(text)}}:
                yield Thinking(text)
            case {"type": "message_delta"}:
                delta = data
                if "input_tokens" in (usage := data.get("usage") or {}):
                    yield _prompt(usage)  # Ollama counts now; what it said at the start was an estimate
            case {"type": "message_stop"}:
                yield _done(delta)
                return
            case {"error": _}:
                raise _mapped(500, data, EngineBroke)
    raise EngineBroke("the engine ended the stream in the middle of the answer")


def _data(event: sse.Event) -> Json:
    try:
        data = json.loads(event.data)
    except ValueError as error:
        raise EngineBroke("the engine sent an event that is not JSON") from error
    return data if isinstance(data, dict) else {}


def _prompt(usage: Json) -> Prompt:
    """llama.cpp's input_tokens, like Anthropic's, are those that were not cached."""
    cached = _count(usage, "cache_read_input_tokens")
    return Prompt(_count(usage, "input_tokens") + _count(usage, "cache_creation_input_tokens") + cached, cached)


def _done(message_delta: Json) -> Done:
    delta = message_delta.get("delta") or {}
    sequence = delta.get("stop_sequence")
    reason: StopReason = "stop_sequence" if sequence else STOP_REASONS.get(str(delta.get("stop_reason")), "end_turn")
    return Done(reason, _count(message_delta.get("usage") or {}, "output_tokens"), sequence)


def _count(usage: Json, key: str) -> int:
    value = usage.get(key)
    return value if isinstance(value, int) else 0


async def _refusal(response: aiohttp.ClientResponse) -> ProxyError:
    try:
        data = json.loads(await response.content.read(65536))
    except (ValueError, aiohttp.ClientError, OSError):
        data = {}
    return _mapped(response.status, data, EngineDown)


def _mapped(status: int, data: Any, otherwise: type[EngineDown] | type[EngineBroke]) -> ProxyError:
    """An engine's error in our words. Its 500 comes again at every retry, so it is a 400 with its reason."""
    error = data.get("error") if isinstance(data, dict) else None
    error = error if isinstance(error, dict) else {"message": error or f"status {status}"}
    message, kind = str(error.get("message")), error.get("type")
    if kind == "exceed_context_size_error":
        return too_long(_count(error, "n_prompt_tokens"), _count(error, "n_ctx"))
    if status == 413:
        return ProxyError(413, "request_too_large", message)
    if kind in ("unavailable_error", "overloaded_error") or status in (408, 425, 429, 502, 503, 504, 529):
        return otherwise(f"the engine says: {message}")
    return invalid(f"the engine says: {message}")


class _Prefill:
    """Takes the prefilled beginning off the answer, which llama.cpp repeats."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._seen = 0

    def without(self, event: AnswerEvent) -> list[AnswerEvent]:
        rest = self._text[self._seen :]
        if not rest or not isinstance(event, Text):
            return [event]
        if rest.startswith(event.text):
            self._seen += len(event.text)
            return []
        swallowed, self._seen = self._text[: self._seen], len(self._text)
        if event.text.startswith(rest):
            return [Text(event.text[len(rest) :])]
        return [Text(swallowed + event.text)]
