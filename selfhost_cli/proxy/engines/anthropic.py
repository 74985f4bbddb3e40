"""Engines that speak Anthropic's dialect themselves, with what they get wrong put right: llama.cpp's server, and APIs
that are sold."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator

from selfhost_cli.proxy import sse
from selfhost_cli.proxy.codec import decode
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
from selfhost_cli.proxy.engines.upstream import (
    PATIENT,
    Prefill,
    Upstream,
    explained,
    joined,
    number,
    refusal,
    template_arguments,
)
from selfhost_cli.proxy.errors import EngineBroke, EngineDown

STOP_REASONS: dict[str, StopReason] = {
    "max_tokens": "max_tokens",
    "stop_sequence": "stop_sequence",
    "tool_use": "tool_use",
}
# Claude's own least; below it there is no budget that both fits max_tokens and is allowed
LEAST_THINKING = 1024


class AnthropicEngine(Upstream):
    def __init__(self, name: str, model: str, base_url: Callable[[], str], key: str = "") -> None:
        super().__init__(name, model, base_url, key)
        self._context: dict[str, int] = {}

    async def health(self) -> Health:
        base = self._base_url()
        props = await self._ask("/props")
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
        return await self._number("/v1/messages/count_tokens", self._body(request), "input_tokens")

    def forms(self, request: Request) -> bool:
        return False  # llama.cpp and Ollama take output_config.format for nothing

    async def messages(self, request: Request) -> AsyncGenerator[AnswerEvent]:
        body = self._body(request) | {"stream": True}
        prefill = Prefill(request.prefill)
        async with self._request("/v1/messages", body, PATIENT) as response:
            if response.status != 200:
                raise (await refusal(response)).error()
            reading = _Reading()
            with self._blamed():
                async for chunk in response.content.iter_any():
                    for event in prefill.without(joined(reading.feed(chunk))):
                        yield event
                    if reading.over:
                        return
        raise EngineBroke("the engine ended the stream in the middle of the answer")

    def _body(self, request: Request) -> Json:
        body: Json = {
            "model": self._model,
            "max_tokens": request.max_tokens,
            "messages": [part for message in request.messages for part in _results_apart(message)],
            **request.sampling,
            **_thinking(request),
            **_output(request),
        }
        if request.system:
            body["system"] = request.system
        if request.tools:
            body["tools"] = request.tools
            body["tool_choice"] = {"type": "any" if request.force_tool else "auto"}
        return body


class AnthropicAPI(AnthropicEngine):
    """What is sold in that dialect, Anthropic's own first. `context` in tokens: there it is told by nobody.

    As its documentation has it; never tried with a paid account.
    """

    VERSION = "2023-06-01"

    def __init__(self, name: str, model: str, base_url: Callable[[], str], key: str, *, context: int) -> None:
        super().__init__(name, model, base_url, key)
        self._told_context = context

    def _credentials(self, key: str) -> dict[str, str]:
        return {"x-api-key": key, "anthropic-version": self.VERSION}

    async def health(self) -> Health:
        await self._ask("/v1/models?limit=1")
        if not self._told_context:
            raise EngineDown(f"{self.name} does not tell its context; it has to be set")
        return Health(self._told_context)

    async def context(self) -> int:
        return self._told_context or (await self.health()).context

    def _body(self, request: Request) -> Json:
        """Without what only engines of one's own know, and with the places up to which it may keep what it has read."""
        body = super()._body(request)
        for ours in ("chat_template_kwargs", "output_config"):
            body.pop(ours, None)
        if request.system:
            body["system"] = [{"type": "text", "text": request.system, "cache_control": KEPT}]
        messages = [{**one, "content": _unsigned_left_out(one["content"])} for one in body["messages"]]
        body["messages"] = [one for one in messages if one["content"]]
        *others, last = body["messages"][-1]["content"]
        body["messages"][-1] |= {"content": [*others, {**last, "cache_control": KEPT}]}
        return body


KEPT: Json = {"type": "ephemeral"}


def _unsigned_left_out(content: list[Json]) -> list[Json]:
    """Thoughts of another engine have no signature of this one's, which it would refuse."""
    return [block for block in content if block["type"] != "thinking"]


def _thinking(request: Request) -> Json:
    """In the API's own words, for as much as max_tokens leaves room for: how much the client wanted is not kept.

    And in those of llama.cpp, which heeds the template's arguments only.
    """
    arguments = template_arguments(request)
    fields: Json = {"chat_template_kwargs": arguments} if arguments else {}
    if request.thinking is False:
        fields["thinking"] = {"type": "disabled"}
    elif request.thinking and not request.prefill and request.max_tokens > LEAST_THINKING:
        fields["thinking"] = {"type": "enabled", "budget_tokens": request.max_tokens - 1}
    return fields


def _output(request: Request) -> Json:
    return {"output_config": {"effort": request.effort}} if request.effort else {}


def _results_apart(message: Json) -> list[Json]:
    """One message for tool results, one for the rest: llama.cpp puts the text of a mixed one before its results."""
    results = [_result(block) for block in message["content"] if block["type"] == "tool_result"]
    others = [block for block in message["content"] if block["type"] != "tool_result"]
    return [{"role": message["role"], "content": part} for part in (results, others) if part]


def _result(block: Json) -> Json:
    """A canonical result in the API's own shape, where images are part of the content."""
    images = block.get("images")
    if not images:
        return block
    text = [{"type": "text", "text": block["content"]}] if block["content"] else []
    return {key: value for key, value in block.items() if key != "images"} | {"content": [*text, *images]}


class _Reading:
    """llama.cpp's events as ours. Stops are not looked at: it sends all of them at the very end."""

    def __init__(self) -> None:
        self.over = False
        self._parser = sse.Parser()
        self._delta: Json = {}
        self._tool = -1

    def feed(self, chunk: bytes) -> Iterator[AnswerEvent]:
        for event in self._parser.feed(chunk):
            yield from self._event(_data(event))

    def _event(self, data: Json) -> Iterator[AnswerEvent]:
        match data:
            case {"type": "content_block_delta", "delta": {"text": str(text)}}:
                yield Text(text)
            case {"type": "content_block_delta", "delta": {"thinking": str(text)}}:
                yield Thinking(text)
            case {"type": "content_block_delta", "index": index, "delta": {"partial_json": str(piece)}}:
                if index != self._tool:
                    raise EngineBroke("the engine mixed up two tool calls")
                yield ToolInput(piece)
            case {"type": "content_block_start", "index": index, "content_block": {"type": "tool_use", **block}}:
                self._tool = index
                yield ToolCall(str(block.get("name")))
                if block.get("input"):
                    yield ToolInput(json.dumps(block["input"]))
            case {"type": "message_start", "message": {"usage": dict(usage)}}:
                yield _prompt(usage)
            case {"type": "message_delta"}:
                self._delta = data
                if "input_tokens" in (usage := data.get("usage") or {}):
                    yield _prompt(usage)  # Ollama counts now; what it said at the start was an estimate
            case {"type": "message_stop"}:
                self.over = True
                yield _done(self._delta)
            case {"error": _}:
                raise explained(500, data).error(EngineBroke)


def _data(event: sse.Event) -> Json:
    try:
        data = decode(event.data)
    except ValueError as error:
        raise EngineBroke("the engine sent an event that is not JSON") from error
    return data if isinstance(data, dict) else {}


def _prompt(usage: Json) -> Prompt:
    """llama.cpp's input_tokens, like Anthropic's, are those that were not cached."""
    cached = number(usage, "cache_read_input_tokens")
    return Prompt(number(usage, "input_tokens") + number(usage, "cache_creation_input_tokens") + cached, cached)


def _done(message_delta: Json) -> Done:
    delta = message_delta.get("delta") or {}
    sequence = delta.get("stop_sequence")
    reason: StopReason = "stop_sequence" if sequence else STOP_REASONS.get(str(delta.get("stop_reason")), "end_turn")
    return Done(reason, number(message_delta.get("usage") or {}, "output_tokens"), sequence)
