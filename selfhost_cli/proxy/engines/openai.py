"""Engines behind OpenAI's `/v1/chat/completions`: llama.cpp's server, vLLM, SGLang, and APIs that are sold.

What llama.cpp answers was read from b11549; the others are as their documentation and their users' reports say.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

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
    Refusal,
    Upstream,
    explained,
    joined,
    number,
    refusal,
    template_arguments,
)
from selfhost_cli.proxy.errors import EngineBroke, EngineDown, invalid

CHAT = "/v1/chat/completions"
BROKEN = ("error", "abort", "cancelled")


@dataclass(frozen=True)
class Dialect:
    """Where servers of this API differ.

    `template`: it renders one that takes arguments, and knows top_k; others may refuse fields that they do not know.
    `grammar`: one of the listed tools holds a call in form, so that none of another tool can be written.
    `thoughts`: the field of the assistant's messages for what it thought, "" where there is no agreed one.
    `counter`: the path that counts a prompt, and the key of its answer. `stopped`: what makes it tell which stop
    sequence it met. `resume`: what makes it continue a last message that is the assistant's. `repeats`: such an answer
    begins with that message again.
    """

    name: str
    template: bool = True
    grammar: bool = False
    thoughts: str = ""
    counter: tuple[str, str] | None = None
    stopped: Json = field(default_factory=dict)
    resume: Json = field(default_factory=dict)
    repeats: bool = False


# an API that knows nothing of resuming may repeat the beginning or not
PLAIN = Dialect("openai", template=False, repeats=True)
LLAMACPP = Dialect(
    "llamacpp",
    grammar=True,
    thoughts="reasoning_content",
    counter=(f"{CHAT}/input_tokens", "input_tokens"),
    # of all that it could tell; it comes with the last chunk alone
    stopped={"verbose": True, "response_fields": ["stopping_word"]},
    repeats=True,
)
RESUME = {"continue_final_message": True, "add_generation_prompt": False}
VLLM = Dialect("vllm", counter=("/tokenize", "count"), resume=RESUME)
SGLANG = Dialect("sglang", resume={"continue_final_message": True})
DIALECTS = {dialect.name: dialect for dialect in (PLAIN, LLAMACPP, VLLM, SGLANG)}


class OpenAIEngine(Upstream):
    """`context` is used where the engine does not tell its own; `extra` are fields for every request.

    `dialect` is what /v1/models says of its owner, when it is not given: behind a gateway that may be another's name.
    """

    def __init__(
        self,
        name: str,
        model: str,
        base_url: Callable[[], str],
        key: str = "",
        *,
        context: int = 0,
        dialect: Dialect | None = None,
        extra: Json | None = None,
    ) -> None:
        super().__init__(name, model, base_url, key)
        self._untold_context = context
        self._given = dialect
        self._extra = extra or {}
        self._met: tuple[str, int, Dialect] | None = None

    async def health(self) -> Health:
        base = self._base_url()
        entry = self._listed(await self._ask("/v1/models"))
        dialect = self._given or DIALECTS.get(str(entry.get("owned_by")), PLAIN)
        slots = 1
        if dialect == LLAMACPP:
            # not only for what it tells: its list of models answers while the model is still being loaded
            props = await self._ask("/props")
            entry = props.get("default_generation_settings") or {}
            slots = max(1, number(props, "total_slots"))
        keys = ("n_ctx", "max_model_len", "context_length", "context_window")
        context = next((told for key in keys if (told := number(entry, key))), self._untold_context)
        if not context:
            raise EngineDown(f"{self.name} does not tell its context; it has to be set")
        self._met = base, context, dialect
        return Health(context, slots, {"server": dialect.name})

    async def context(self) -> int:
        return (await self._known())[0]

    async def count(self, request: Request) -> int | None:
        _, dialect = await self._known()
        if dialect.counter is None:
            return None
        path, key = dialect.counter
        return await self._number(path, self._body(request, dialect), key)

    def forms(self, request: Request) -> bool:
        # with tools, llama.cpp lets its grammar for calls go before the schema; deferred ones it would forbid
        return not (request.tools or request.deferred)

    async def messages(self, request: Request) -> AsyncGenerator[AnswerEvent]:
        _, dialect = await self._known()
        body = self._body(request, dialect) | {"stream": True, "stream_options": {"include_usage": True}}
        prefill = Prefill(request.prefill if dialect.repeats else "")
        async with self._accepted(body) as response:
            reading = _Reading(request.sampling.get("stop_sequences", []))
            with self._blamed():
                async for chunk in response.content.iter_any():
                    for event in prefill.without(joined(reading.feed(chunk))):
                        yield event
                    if reading.over:
                        break
            for event in prefill.without(reading.end()):
                yield event

    def _listed(self, models: Json) -> Json:
        """Our model in the list. One that serves a single model may have another name for it."""
        entries = [entry for entry in models.get("data") or [] if isinstance(entry, dict)]
        ours = [entry for entry in entries if entry.get("id") == self._model] or (entries if len(entries) == 1 else [])
        if not ours:
            raise EngineDown(f"{self.name} does not serve {self._model}")
        return ours[0]

    async def _known(self) -> tuple[int, Dialect]:
        if self._met is None or self._met[0] != self._base_url():
            await self.health()
        assert self._met
        return self._met[1:]

    @asynccontextmanager
    async def _accepted(self, body: Json) -> AsyncIterator[aiohttp.ClientResponse]:
        """A stream that has begun. Asks a second time when that may help, which nobody has noticed yet."""
        for again in (False, True):
            async with self._request(CHAT, body, PATIENT) as response:
                if response.status == 200:
                    yield response
                    return
                refused = await refusal(response)
            if again or not _worth_repeating(refused):
                raise refused.error()
            if refused.about_length:
                body = body | {"max_tokens": refused.limit - refused.prompt}

    def _body(self, request: Request, dialect: Dialect) -> Json:
        messages = list(_conversation(request, dialect))
        body: Json = {"model": self._model, "messages": messages, "max_tokens": request.max_tokens}
        for ours, theirs in {"temperature": "temperature", "top_p": "top_p", "stop_sequences": "stop"}.items():
            if ours in request.sampling:
                body[theirs] = request.sampling[ours]
        if "stop" in body:
            body |= dialect.stopped
        if request.tools:
            body["tools"] = [_tool(tool) for tool in request.tools]
            body["tool_choice"] = _choice(request, dialect)
        if request.schema is not None:
            schema = {"name": "answer", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if dialect.template:
            body |= _template_fields(request)
        if request.prefill:
            body |= dialect.resume
        return body | self._extra


def _worth_repeating(refused: Refusal) -> bool:
    """Once, for a prompt that fits without all of max_tokens, and for a 500, which may be the engine's bad moment."""
    if refused.about_length:
        # vLLM and SGLang refuse what llama.cpp and Ollama just end with the reason "length"
        return 0 < refused.prompt < refused.limit
    return refused.status == 500


def _template_fields(request: Request) -> Json:
    arguments = template_arguments(request)
    # the effort twice: gpt-oss has no template in vLLM, and is told by the field alone
    fields = {
        "top_k": request.sampling.get("top_k"),
        "reasoning_effort": arguments.get("reasoning_effort"),
        "chat_template_kwargs": arguments or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _tool(tool: Json) -> Json:
    function = {"name": tool["name"], "description": tool["description"], "parameters": tool["input_schema"]}
    return {"type": "function", "function": function}


def _choice(request: Request, dialect: Dialect) -> str | Json:
    if not request.force_tool:
        # the list is rendered all the same, and calls are found in the text
        return "none" if dialect.grammar and request.deferred else "auto"
    if len(request.tools) > 1:
        return "required"
    return {"type": "function", "function": {"name": request.tools[0]["name"]}}


# --- the conversation ---


def _conversation(request: Request, dialect: Dialect) -> Iterator[Json]:
    if request.system:
        yield {"role": "system", "content": request.system}
    for message in request.messages:
        if message["role"] == "assistant":
            yield _said(message["content"], dialect)
        else:
            yield from _given(message["content"])


def _said(blocks: list[Json], dialect: Dialect) -> Json:
    """No null: some templates stumble over it."""
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": json.dumps(block["input"], ensure_ascii=False)},
        }
        for block in blocks
        if block["type"] == "tool_use"
    ]
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    said: Json = {"role": "assistant", "content": text}
    thoughts = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
    if thoughts and dialect.thoughts:
        said[dialect.thoughts] = thoughts
    return said | ({"tool_calls": calls} if calls else {})


def _given(blocks: list[Json]) -> Iterator[Json]:
    """Tool results first, as the API wants them; they have no place for images, so those follow as the user's."""
    results = [block for block in blocks if block["type"] == "tool_result"]
    for result in results:
        failed = "The tool failed:\n" if result.get("is_error") else ""
        yield {"role": "tool", "tool_call_id": result["tool_use_id"], "content": failed + result["content"]}
    images = [image for result in results for image in result.get("images", ())]
    shown = [{"type": "text", "text": "The images that the tools returned:"}, *images] if images else []
    if parts := [*shown, *(block for block in blocks if block["type"] in ("text", "image"))]:
        yield {"role": "user", "content": _content(parts)}


def _content(parts: list[Json]) -> str | list[Json]:
    if all(part["type"] == "text" for part in parts):
        return "\n\n".join(part["text"] for part in parts)
    return [part if part["type"] == "text" else _image(part["source"]) for part in parts]


def _image(source: Json) -> Json:
    return {"type": "image_url", "image_url": {"url": f"data:{source['media_type']};base64,{source['data']}"}}


# --- the answer ---


def _data(event: sse.Event) -> Json:
    try:
        data = decode(event.data)
    except ValueError as error:
        raise EngineBroke("the engine sent an event that is not JSON") from error
    if not isinstance(data, dict):
        raise EngineBroke("the engine sent an event that is no object")
    if data.get("error") or data.get("object") == "error":
        body = data["error"] if isinstance(data.get("error"), dict) else data
        status = number(body, "code")
        raise explained(status if 400 <= status < 600 else 500, data).error(EngineBroke)
    return data


class _Reading:
    """What the chunks of one stream have told so far. `stops`: what the client wants to hear of, if it ended there."""

    def __init__(self, stops: list[str]) -> None:
        self.over = False
        self._parser = sse.Parser()
        self._stops = stops
        self._usage: Json = {}
        self._finish = ""
        self._stopped_by: str | None = None
        self._open: tuple[int, str] | None = None

    def feed(self, chunk: bytes) -> Iterator[AnswerEvent]:
        for event in self._parser.feed(chunk):
            self.over = self.over or event.data.strip() == "[DONE]"
            if not self.over:
                yield from self._chunk(_data(event))

    def _chunk(self, chunk: Json) -> Iterator[AnswerEvent]:
        if isinstance(usage := chunk.get("usage"), dict):
            self._usage = usage
        for choice in (chunk.get("choices") or [])[:1]:
            yield from self._delta(choice.get("delta") or {})
            if finish := choice.get("finish_reason"):
                self._finish = str(finish)
                # vLLM's, SGLang's, llama.cpp's; the number of a token, when it was the end of the turn
                verbose = chunk.get("__verbose") or {}
                stopped_by = choice.get("stop_reason") or choice.get("matched_stop") or verbose.get("stopping_word")
                self._stopped_by = stopped_by if stopped_by in self._stops else None

    def end(self) -> Iterator[AnswerEvent]:
        if not self._finish:
            raise EngineBroke("the engine ended the stream in the middle of the answer")
        if self._finish in BROKEN:
            raise EngineBroke(f"the engine gave up in the middle of the answer ({self._finish})")
        if self._finish == "content_filter":
            raise invalid("the engine's content filter stopped the answer")
        if self._usage:
            details = self._usage.get("prompt_tokens_details") or {}
            yield Prompt(number(self._usage, "prompt_tokens"), number(details, "cached_tokens"))
        yield Done(self._reason(), number(self._usage, "completion_tokens"), self._stopped_by)

    def _reason(self) -> StopReason:
        if self._finish == "length":
            return "max_tokens"
        if self._stopped_by:
            return "stop_sequence"
        # not by finish_reason: vLLM says "stop" after a call that was required
        return "tool_use" if self._open else "end_turn"

    def _delta(self, delta: Json) -> Iterator[AnswerEvent]:
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            yield Thinking(str(thought))
        if text := delta.get("content") or delta.get("refusal"):
            yield Text(str(text))
        for call in delta.get("tool_calls") or []:
            yield from self._call(call)

    def _call(self, call: Json) -> Iterator[AnswerEvent]:
        function = call.get("function") or {}
        if self._begins(call):
            if not function.get("name"):
                raise EngineBroke("the engine mixed up two tool calls")
            self._open = number(call, "index"), str(call.get("id") or "")
            yield ToolCall(str(function["name"]))
        if arguments := function.get("arguments"):
            yield ToolInput(arguments if isinstance(arguments, str) else json.dumps(arguments))

    def _begins(self, call: Json) -> bool:
        """By index; by id, where all have the index 0; by its name, where it has neither."""
        if self._open is None:
            return True
        index, known = self._open
        if (own := call.get("id")) and known and own != known:
            return True
        if not isinstance(call.get("index"), int):
            return not own and bool((call.get("function") or {}).get("name"))
        return bool(call["index"] != index)
