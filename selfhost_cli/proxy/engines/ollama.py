"""Ollama through its own `/api/chat`, which can be told not to cut a prompt that does not fit; read from 0.34.0.

Every request carries the options of the load: another `num_ctx` or `shift` makes Ollama load the model again.
What its chat gets wrong is done by its renderer and raw generation, apart: it does not continue every template's
prefill, and its parsers of calls swallow what they do not know or cannot read.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import aiohttp

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
from selfhost_cli.proxy.engines.upstream import PATIENT, Upstream, joined, number, refusal_body
from selfhost_cli.proxy.errors import EngineBroke, EngineDown, EngineLoading, ProxyError, invalid, reason_of, too_long

KEEP: Json = {"truncate": False, "shift": False, "keep_alive": -1}
EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "max"}
SWALLOWED = 8
"""Tokens that were generated and not delivered: fewer may have been markup, a call is never so short."""
PASSING = re.compile(
    r"unexpectedly stopped|no longer running|not responding|connection (refused|reset)|health resp|timed out"
    r"|no slots available|unexpected server status|while running the model|error reading|killed"
)
"""In a 500: the same request may work once Ollama has started its llama-server again."""
GARBLED = re.compile(r"XML syntax|unmarshal|pars(e|ing)|invalid tool call", re.IGNORECASE)
"""In a 500: the model wrote a call, and Ollama could not read it."""
TOO_LONG = re.compile(r"(exceeds|longer than) the context length")
"""Of versions that give no numbers."""
CALL_CUT = "[The model reached its limit of tokens inside a tool call, which was not made.]"
REPEATED = "\n\n[The engine stopped the model here, because it only repeated itself.]"


@dataclass(frozen=True)
class _Loaded:
    """What is loaded. `generic`: its calls are found by Ollama's one parser for all templates."""

    context: int
    capabilities: tuple[str, ...] | None
    stops: tuple[str, ...]
    generic: bool

    @property
    def blind(self) -> bool:
        return self.capabilities is not None and "vision" not in self.capabilities

    @property
    def thinks(self) -> bool:
        return "thinking" in (self.capabilities or ())


class OllamaEngine(Upstream):
    """Healthy while the model is loaded. `facts`: version, digest, capabilities, parameters,
    quantization, size, size_vram."""

    def __init__(self, name: str, model: str, base_url: Callable[[], str]) -> None:
        super().__init__(name, model, base_url)
        self._loaded: dict[str, _Loaded] = {}
        self._shown: tuple[str, Json] | None = None

    async def health(self) -> Health:
        return (await self._look())[1]

    async def _look(self) -> tuple[_Loaded, Health]:
        base = self._base_url()
        running = (await self._ask("/api/ps")).get("models") or []
        loaded = next((entry for entry in running if _same(entry.get("name"), self._model)), None)
        if loaded is None:
            raise EngineLoading(f"{self._model} is not loaded yet")
        context = loaded.get("context_length")
        if not isinstance(context, int):
            raise EngineDown(f"{self.name} does not tell its context")
        shown = await self._show(str(loaded.get("digest")))
        model = _model(context, shown)
        self._loaded = {base: model}
        details: Any = shown.get("details") or {}
        facts = {
            "version": (await self._ask("/api/version")).get("version"),
            "digest": loaded.get("digest"),
            "size": loaded.get("size"),
            "size_vram": loaded.get("size_vram"),
            "capabilities": shown.get("capabilities"),
            "parameters": details.get("parameter_size"),
            "quantization": details.get("quantization_level"),
        }
        return model, Health(context, facts={name: value for name, value in facts.items() if value is not None})

    async def context(self) -> int:
        return (await self._current()).context

    async def count(self, request: Request) -> int | None:
        """Nothing of Ollama's counts without generating."""
        return None

    def forms(self, request: Request) -> bool:
        return not (request.tools or request.deferred)  # its grammar would leave no room for a call

    async def messages(self, request: Request) -> AsyncGenerator[AnswerEvent]:
        model = await self._current()
        chat = _chat(self._model, model, request)
        if model.blind and any("images" in message for message in chat["messages"]):
            raise invalid(f"{self._model} cannot see images")
        path, body = "/api/chat", chat
        if request.prefill and (prompt := await self._rendered(chat)) is not None:
            path, body = "/api/generate", _raw(chat, prompt + request.prefill, request.max_tokens)
        answer = _Answer(request, model)
        async with aclosing(self._told(path, body, answer)) as events:
            async for event in events:
                yield event
        if answer.lost and (prompt := await self._rendered(chat)) is not None:
            # Once more from where it was lost, and nothing reads it before us: what no parser knows is told as text.
            rest = _raw(chat, prompt + answer.resume(), max(1, request.max_tokens - answer.pieces))
            async with aclosing(self._told("/api/generate", rest, answer)) as events:
                async for event in events:
                    yield event
        if answer.endless:
            answer.prompt = await self._length(chat)
        for event in answer.finish():
            yield event

    async def _told(self, path: str, body: Json, answer: _Answer) -> AsyncGenerator[AnswerEvent]:
        async with self._request(path, body, PATIENT) as response:
            if response.status != 200:
                answer.fail(response.status, await _error(response))
                return
            try:
                async for lines in _lines(response.content.iter_any()):
                    for event in joined(event for line in lines for event in answer.tell(_record(line))):
                        yield event
            except (aiohttp.ClientError, OSError) as error:
                raise answer.broken(f"{self.name} broke off: {reason_of(error)}") from error
            except (KeyError, TypeError, AttributeError) as error:
                raise EngineBroke(f"{self.name} sent a record of an unknown shape") from error

    async def _rendered(self, chat: Json) -> str | None:
        """The prompt up to where the answer begins, a prefill not included; None when it cannot be had.

        The field that asks for it is no official one: a version that does not know it generates a token instead.
        """
        messages = chat["messages"]
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not messages or any("images" in message for message in messages):
            return None
        asked = chat | {"messages": messages, "stream": False, "_debug_render_only": True} | _budget(chat, 1)
        said = (await self._ask("/api/chat", asked, PATIENT)).get("_debug_info")  # it may have to load the model first
        text = said.get("rendered_template") if isinstance(said, dict) else None
        return text if isinstance(text, str) else None

    async def _length(self, chat: Json) -> Prompt | None:
        """Of a prompt that was just read, so that it is cached and costs little; None when it cannot be had."""
        try:
            return _prompt(await self._ask("/api/chat", chat | {"stream": False} | _budget(chat, 1)))
        except ProxyError:
            return None

    async def _current(self) -> _Loaded:
        known = self._loaded.get(self._base_url())
        return known if known is not None else (await self._look())[0]

    async def _show(self, digest: str) -> Json:
        """What the model is; asked once, because it takes Ollama longer than all the rest."""
        if self._shown is None or self._shown[0] != digest:
            self._shown = (digest, await self._ask("/api/show", {"model": self._model}))
        return self._shown[1]

    async def _refused(self, response: aiohttp.ClientResponse) -> ProxyError:
        return _mapped(response.status, await _error(response), EngineDown)


class _Answer:
    """One answer, from Ollama's records to our events: as they come in `tell`, what is left in `finish`."""

    def __init__(self, request: Request, model: _Loaded) -> None:
        self.prompt: Prompt | None = None
        self.pieces = 0
        """Records that held something; with text, Ollama sends one for each token."""
        self._request = request
        self._model = model
        self._heard = False
        self._called = False
        self._garbled = False
        self._end: Json | None = None
        self._resumed: int | None = None
        self._said: list[str] = []
        """Text that was told, or in a forced call is still to be."""

    def tell(self, record: Json) -> Iterator[AnswerEvent]:
        if "error" in record:
            self.fail(500, record["error"])
            return
        self._heard = True
        message = record.get("message")
        message = message if isinstance(message, dict) else {"content": record.get("response")}
        thinking, text, calls = message.get("thinking"), message.get("content"), message.get("tool_calls") or []
        self.pieces += bool(thinking or text or calls)
        if thinking:
            yield Thinking(thinking)
        if text:
            self._said.append(text)
            if not self._request.force_tool:
                yield Text(text)
        for call in calls:
            self._called = True
            yield ToolCall(str(call["function"]["name"]))
            yield ToolInput(json.dumps(call["function"].get("arguments") or {}, ensure_ascii=False))
        if record.get("done"):
            self._end = record

    def fail(self, status: int, said: object) -> None:
        """Raises what it means, unless the answer can go on from here."""
        if status >= 500 and self._resumable and GARBLED.search(str(said)):
            self._garbled = True
            return
        if TOO_LONG.search(str(said)):
            raise too_long(self._model.context + 1, self._model.context)
        raise _mapped(status, said, EngineBroke if self.pieces else EngineDown)

    def broken(self, message: str) -> ProxyError:
        return EngineBroke(message) if self.pieces else EngineDown(message)

    @property
    def lost(self) -> bool:
        """Tokens were generated that were not delivered: a call that Ollama did not understand, and what followed.

        A false alarm is cheap: behind a complete answer the model says nothing more.
        """
        if self._garbled:
            return True
        if self._end is None or not self._resumable or _reason(self._end) != "end_turn":
            return False
        # parsers of one model put several tokens into a record
        comparable = self._model.generic or not self.pieces
        # and a character outside of ASCII may have taken several
        told = self.pieces + sum(byte > 127 for text in self._said for byte in text.encode("utf-8", "replace"))
        return comparable and number(self._end, "eval_count") - told > SWALLOWED

    @property
    def _resumable(self) -> bool:
        """Raw generation knows no tool choice, form or stop of the answer, and would show the tags around thoughts."""
        asked = self._request
        forced = asked.force_tool or asked.prefill or asked.schema is not None or "stop_sequences" in asked.sampling
        return bool(asked.tools) and not (forced or asked.thinking or self._called or self._resumed is not None)

    def resume(self) -> str:
        """From here on records are of a raw generation; what its prompt has to end with."""
        self.prompt = _prompt(self._end) if self._end else None
        self._resumed, self._garbled, self._end = self.pieces, False, None
        return "".join(self._said)

    @property
    def endless(self) -> bool:
        """The stream came to its end, the answer did not: Ollama's way to stop a model that repeats itself."""
        return self._end is None and not self._garbled

    def finish(self) -> Iterator[AnswerEvent]:
        if self._garbled:
            raise self.broken("the engine could not read the call that the model wrote")
        if not self._heard:
            raise self.broken("the engine ended the answer before it began")
        if self._request.force_tool and not self._called:
            yield from self._forced()
        if self._end is None:
            yield self.prompt or Prompt(0)
            if self._called:
                yield Done("tool_use", self.pieces, cut=True)
            else:
                # After an error or max_tokens, Claude Code would ask for more of it; so it reads why, and the turn ends
                yield Done("end_turn", self.pieces, cut=True, notice=REPEATED)
            return
        reason = _reason(self._end)
        yield self.prompt or self._prompt()
        tokens = (self._resumed or 0) + number(self._end, "eval_count")
        stops = self._request.sampling.get("stop_sequences") or []
        if self._called:
            yield Done("tool_use", tokens)
        elif stops and reason == "end_turn" and not self.pieces:
            # Ollama does not tell one from the other; but only a stop sequence can end an answer before it began
            yield Done("stop_sequence", tokens, stops[0] if len(stops) == 1 else None)
        elif self._request.tools and reason == "max_tokens" and not self.pieces and tokens > SWALLOWED:
            # Its beginning is lost. An error, and Claude Code would have all of it generated a second time
            yield Done("end_turn", tokens, cut=True, notice=CALL_CUT)
        else:
            yield Done(reason, tokens)

    def _prompt(self) -> Prompt:
        counted = _prompt(self._end or {})
        total = counted.total - (self._resumed or 0)
        return Prompt(total, min(counted.cached, total))

    def _forced(self) -> Iterator[AnswerEvent]:
        """The call, from the JSON that it was made to write; the text as it is when it was cut off."""
        text = "".join(self._said)
        try:
            call = json.loads(text)
            name, given = call["name"], call["arguments"]
        except (ValueError, KeyError, TypeError):
            yield Text(text)
            return
        self._called = True
        yield ToolCall(str(name))
        yield ToolInput(json.dumps(given, ensure_ascii=False))


# --- requests ---------------------------------------------------------------------------------------------------------


def _chat(name: str, model: _Loaded, request: Request) -> Json:
    body: Json = {"model": name, "messages": list(_messages(request, thinks=model.thinks)), "stream": True, **KEEP}
    body["options"] = {"num_ctx": model.context, "num_predict": request.max_tokens, **_sampling(model, request)}
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    if model.thinks:
        # it would think when it is not told. Neither a beginning nor a form of the answer leaves room for thoughts
        wanted = request.thinking and not (request.prefill or request.force_tool)
        body["think"] = EFFORTS.get(request.effort, True) if wanted else False
    if request.tools and request.force_tool:
        body["format"] = {"anyOf": [_call(tool) for tool in request.tools]}
    elif request.schema is not None:
        body["format"] = request.schema
    return body


def _raw(chat: Json, prompt: str, budget: int) -> Json:
    """`format` stays out: it would have to be met by what follows alone."""
    kept = {key: value for key, value in chat.items() if key not in ("messages", "tools", "format")}
    return kept | {"prompt": prompt, "raw": True} | _budget(chat, budget)


def _budget(body: Json, tokens: int) -> Json:
    return {"options": body["options"] | {"num_predict": tokens}}


def _sampling(model: _Loaded, request: Request) -> Json:
    given = dict(request.sampling)
    stops = given.pop("stop_sequences", [])
    # those of a request replace the model's own
    return given | ({"stop": [*model.stops, *stops]} if stops else {})


def _messages(request: Request, *, thinks: bool) -> Iterator[Json]:
    if request.system:
        yield {"role": "system", "content": request.system}
    names: dict[str, str] = {}
    for message in request.messages:
        if message["role"] == "assistant":
            names |= {block["id"]: block["name"] for block in message["content"] if block["type"] == "tool_use"}
            yield _assistant(message["content"], thinks=thinks)
        else:
            yield from _user(message["content"], names)


def _assistant(blocks: list[Json], *, thinks: bool) -> Json:
    said: Json = {"role": "assistant", "content": "".join(_texts(blocks))}
    thoughts = "\n".join(block["thinking"] for block in blocks if block["type"] == "thinking")
    if thoughts and thinks:
        said["thinking"] = thoughts
    calls = [block for block in blocks if block["type"] == "tool_use"]
    if calls:
        said["tool_calls"] = [
            {"id": call["id"], "function": {"index": index, "name": call["name"], "arguments": call["input"]}}
            for index, call in enumerate(calls)
        ]
    return said


def _user(blocks: list[Json], names: dict[str, str]) -> Iterator[Json]:
    images = []
    for block in blocks:
        if block["type"] == "tool_result":
            tool = block["tool_use_id"]
            content = f"[the tool failed]\n{block['content']}" if block.get("is_error") else block["content"]
            yield {"role": "tool", "content": content, "tool_name": names.get(tool, ""), "tool_call_id": tool}
            images += [image["source"]["data"] for image in block.get("images", [])]
        elif block["type"] == "image":
            images.append(block["source"]["data"])
    text = "\n\n".join(_texts(blocks))
    if text or images:
        yield {"role": "user", "content": text} | ({"images": images} if images else {})


def _texts(blocks: list[Json]) -> list[str]:
    return [block["text"] for block in blocks if block["type"] == "text"]


def _tool(tool: Json) -> Json:
    function = {"name": tool["name"], "description": tool["description"], "parameters": _parameters(tool)}
    return {"type": "function", "function": function}


def _call(tool: Json) -> Json:
    """The form of a call, for a grammar."""
    properties = {"name": {"const": tool["name"]}, "arguments": _parameters(tool)}
    return {"type": "object", "properties": properties, "required": ["name", "arguments"]}


def _parameters(tool: Json) -> Json:
    return {"properties": {}} | _schema(tool["input_schema"]) | {"type": "object"}


def _schema(schema: Json) -> Json:
    """What Ollama reads of a schema; anything of another type there, and it would refuse the whole request."""
    kept: Json = {}
    for key, value in schema.items():
        match key, value:
            case "type" | "description", str():
                kept[key] = value
            case "type" | "required", [*names] if all(isinstance(name, str) for name in names):
                kept[key] = value
            case "enum", list():
                kept[key] = value
            case "anyOf", [*options] if all(isinstance(option, dict) for option in options):
                kept[key] = [_schema(option) for option in options]
            case "properties", dict():
                kept[key] = {name: _schema(one) if isinstance(one, dict) else {} for name, one in value.items()}
            case "items" | "$defs", dict():
                kept[key] = value
    return kept


# --- what comes back --------------------------------------------------------------------------------------------------


def _model(context: int, shown: Json) -> _Loaded:
    capabilities = shown.get("capabilities")
    stops = re.findall(r'^stop\s+(".*")$', str(shown.get("parameters") or ""), re.MULTILINE)
    own_parser = re.search(r"^PARSER ", str(shown.get("modelfile") or ""), re.MULTILINE)
    return _Loaded(
        context,
        None if capabilities is None else tuple(capabilities),
        tuple(filter(None, map(_unquoted, stops))),
        own_parser is None,
    )


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _same(name: object, model: str) -> bool:
    """Ollama adds the tag that a name without one stands for, and does not mind case."""
    return str(name).lower() in (model.lower(), f"{model.lower()}:latest")


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """Those that came in one go. One may be a whole file that a call writes, so no limit of a reader's fits."""
    parts: list[bytes] = []
    async for chunk in chunks:
        parts.append(chunk)
        if b"\n" not in chunk:
            continue
        *ended, rest = b"".join(parts).split(b"\n")
        parts = [rest]
        yield [line for line in ended if line.strip()]
    if whole := b"".join(parts).strip():
        yield [whole]


def _record(line: bytes) -> Json:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise EngineBroke("the engine sent a line that is not JSON") from error
    return record if isinstance(record, dict) else {}


def _prompt(record: Json) -> Prompt:
    return Prompt(number(record, "prompt_eval_count"), number(record, "prompt_eval_cached_count"))


def _reason(end: Json) -> StopReason:
    return "max_tokens" if end.get("done_reason") == "length" else "end_turn"


async def _error(response: aiohttp.ClientResponse) -> object:
    try:
        data = json.loads(await refusal_body(response))
    except ValueError:
        data = {}
    return data.get("error") if isinstance(data, dict) else None


def _mapped(status: int, said: object, otherwise: type[EngineDown] | type[EngineBroke]) -> ProxyError:
    """Ollama's error in our words; llama-server's own is JSON in a string in it.

    Most of its 500s come again at every retry, and Claude Code tries them for three minutes: they are 400s here.
    """
    error = _inner(said)
    message = str(error.get("message") or f"status {status}")
    if error.get("type") == "exceed_context_size_error":
        return too_long(number(error, "n_prompt_tokens"), number(error, "n_ctx"))
    if status in (408, 429, 499, 502, 503, 504) or (status == 500 and PASSING.search(message)):
        return otherwise(f"the engine says: {message}")
    return invalid(f"the engine says: {message}")


def _inner(said: object) -> Json:
    try:
        inner = json.loads(said) if isinstance(said, str) else said
    except ValueError:
        inner = None
    inner = inner.get("error", inner) if isinstance(inner, dict) else None
    return inner if isinstance(inner, dict) else {"message": said}
