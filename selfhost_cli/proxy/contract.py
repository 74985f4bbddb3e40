"""What a client may send, made canonical: the one shape that engines get to see.

Lenient as Claude Code needs it: unknown fields, blocks and roles are no errors, they are left out with a note.
Canonical as prefix caches need it: what varies from call to call without meaning (metadata, cache_control, attribution,
string or block content) is gone, and the prompt of the next turn extends that of this one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from selfhost_cli.proxy.codec import decode
from selfhost_cli.proxy.errors import invalid

Json = dict[str, Any]
Role = Literal["user", "assistant"]
MAX_TOKENS = 4096
MAX_NOTES = 20
MAX_DEPTH = 64
"""Of what passes through as it is, so that nobody who walks or writes it meets Python's limit for recursion."""
ATTRIBUTION = "x-anthropic-billing-header:"
EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max")
THINKING = {"enabled": True, "adaptive": True, "disabled": False}
FIELDS = {
    *("messages", "system", "tools", "tool_choice", "max_tokens", "stream", "thinking", "output_config"),
    *("output_format", "temperature", "top_p", "top_k", "stop_sequences"),
    *("model", "metadata", "cache_control", "context_management"),
}
"""The last line: what Claude Code always sends and no engine of ours has a use for, so that it draws no note."""


@dataclass(frozen=True)
class Request:
    """A canonical `POST /v1/messages`.

    `messages` alternate between user and assistant, their content is a list of blocks with exactly these keys:

    - user: first tool_result {type, tool_use_id, content: str}, with is_error (only True) and images (image blocks)
      only where there are any; text; image {type, source: {type: "base64", media_type, data}}
    - assistant: text; thinking (signature always ""); tool_use {type, id, name, input: object}

    `tools` are {name, description, input_schema}. `deferred` are those, by name, that the client keeps back until the
    model has looked for them: they stay out of the rendered list, which begins every prompt, and are described in the
    text of the tool_result that refers to them. A call to one is as good as a call to one of `tools`.

    `sampling` holds temperature, top_p, top_k and stop_sequences as far as they were given and make sense.
    `force_tool`: the answer has to be a call. `thinking`: None when the client does not say. `effort`: one of EFFORTS,
    or "". `schema`: the JSON schema that the answer's text has to fit. `notes`: what was left out, without its text.
    """

    messages: list[Json]
    system: str = ""
    tools: list[Json] = field(default_factory=list)
    force_tool: bool = False
    max_tokens: int = MAX_TOKENS
    sampling: Json = field(default_factory=dict)
    stream: bool = False
    thinking: bool | None = None
    effort: str = ""
    schema: Json | None = None
    deferred: dict[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def prefill(self) -> str:
        """What the answer has to begin with: the text of a last message that is the assistant's."""
        last = self.messages[-1]
        if last["role"] != "assistant":
            return ""
        return "".join(block["text"] for block in last["content"] if block["type"] == "text")


def parse(body: bytes) -> Request:
    """Raises ProxyError (400, says which field) for what no engine could answer."""
    return _Reader().request(load(body))


def load(body: bytes) -> Json:
    """A JSON object, or a ProxyError (400)."""
    try:
        data = decode(body)
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise invalid("the body is not a JSON object")
    return data


class _Reader:
    """Reads one body. Learns on the way: the deferred tools, which of them were described, what was left out."""

    def __init__(self) -> None:
        self._deferred: dict[str, Json] = {}
        self._described: set[str] = set()
        self._notes: dict[str, None] = {}

    def request(self, data: Json) -> Request:
        for name in data:
            if name not in FIELDS:
                self._note(f"field {_word(name)}")
        tools = self._tools(data.get("tools"))  # first, because messages refer to them
        messages = self._messages(data.get("messages"))
        tools, force = self._chosen(tools, data.get("tool_choice"))
        output = _object(data.get("output_config"))
        return Request(
            messages=messages,
            system=self._system(data.get("system")),
            tools=tools,
            force_tool=force,
            max_tokens=_positive(data.get("max_tokens")) or MAX_TOKENS,
            sampling=self._sampling(data),
            stream=data.get("stream") is True,
            thinking=self._thinking(data.get("thinking")),
            effort=self._effort(output.get("effort")),
            schema=self._schema(output.get("format") or data.get("output_format")),
            deferred=self._deferred,
            notes=tuple(self._notes),
        )

    def _note(self, what: str) -> None:
        if len(self._notes) < MAX_NOTES:
            self._notes[what] = None

    # --- messages ---

    def _messages(self, messages: Any) -> list[Json]:
        if not isinstance(messages, list) or not messages:
            raise invalid("messages: at least one message is required")
        turns: list[Json] = []
        for index, message in _system_first(messages):
            role, content = self._message(f"messages.{index}", message)
            if not content:
                continue
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += content
            else:
                turns.append({"role": role, "content": content})
        if not turns:
            raise invalid("messages: there is nothing in them")
        for turn in turns:
            # the API's own order, which a folded system message in front of the results would break
            turn["content"].sort(key=lambda block: block["type"] != "tool_result")
        return turns

    def _message(self, where: str, message: Any) -> tuple[Role, list[Json]]:
        if not isinstance(message, dict):
            raise invalid(f"{where}: Input should be an object")
        content = message.get("content")
        if not isinstance(content, str | list):
            raise invalid(f"{where}.content: Input should be a string or a list of blocks")
        match message.get("role"):
            case "assistant":
                return "assistant", list(self._blocks(f"{where}.content", "assistant", content))
            case "system":
                return "user", self._reminder(content)
            case "user":
                pass
            case role:
                self._note(f"role {_word(role)}")
        return "user", list(self._blocks(f"{where}.content", "user", content))

    def _reminder(self, content: str | list[Any]) -> list[Json]:
        """A system message in the middle, where no chat template has a place for one."""
        text = "\n\n".join(self._texts(content))
        return [_text(f"<system-reminder>\n{text}\n</system-reminder>")] if text else []

    def _blocks(self, where: str, role: Role, content: str | list[Any]) -> Iterator[Json]:
        for index, block in enumerate([_text(content)] if isinstance(content, str) else content):
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "text" or (role == "user" and kind != "tool_result"):
                yield from self._shown(block)
            elif kind == "tool_result" and role == "user":
                yield self._result(block)
            elif kind == "tool_use" and _string(block.get("name")):
                yield {
                    "type": "tool_use",
                    "id": _string(block.get("id")),
                    "name": block["name"],
                    "input": _passed(f"{where}.{index}.input", _object(block.get("input"))),
                }
            elif kind == "thinking" and _string(block.get("thinking")):
                yield {"type": "thinking", "thinking": block["thinking"], "signature": ""}
            else:
                self._left_out(block)

    def _result(self, block: Json) -> Json:
        content = block.get("content")
        parts = [_text(content)] if isinstance(content, str) else content if isinstance(content, list) else []
        shown = [one for part in parts for one in self._shown(part, in_words=True)]
        result: Json = {
            "type": "tool_result",
            "tool_use_id": _string(block.get("tool_use_id")),
            "content": "\n".join(one["text"] for one in shown if one["type"] == "text"),
        }
        if block.get("is_error") is True:
            result["is_error"] = True
        if images := [one for one in shown if one["type"] == "image"]:
            result["images"] = images
        return result

    def _shown(self, block: Any, *, in_words: bool = False) -> Iterator[Json]:
        """Something to read or to see, as text and image blocks; `in_words`: so is what cannot be shown."""
        match block:
            case {"type": "text", "text": str(text)}:
                if text:
                    yield _text(text)
            case {"type": "image", "source": {"type": "base64", "media_type": str(media), "data": str(data)}} if data:
                yield {"type": "image", "source": {"type": "base64", "media_type": media, "data": data}}
            case {"type": "document", "source": {"type": "text", "data": str(text)}}:
                yield _titled(block, text)
            case {"type": "document", "source": {"type": "content", "content": str() | list() as content}}:
                yield _titled(block, "\n".join(self._texts(content)))
            case {"type": "tool_reference", "tool_name": str(name)}:
                yield _text(self._reference(name))
            case {"type": "image" | "document" as kind}:
                self._left_out(block)
                yield _text(f"[{kind}, not shown]")
            case {"type": str(kind)} if in_words:
                self._left_out(block)
                yield _text(f"[{kind}, not shown]")
            case _:
                self._left_out(block)

    def _texts(self, content: str | list[Any]) -> Iterator[str]:
        """What is text in it, and not empty."""
        for block in [_text(content)] if isinstance(content, str) else content:
            match block:
                case {"type": "text", "text": str(text)}:
                    if text:
                        yield text
                case _:
                    self._left_out(block)

    def _reference(self, name: str) -> str:
        """A deferred tool is described where it is first referred to: the prompt up to there stays what it was."""
        tool = self._deferred.get(name)
        if tool is None or name in self._described:
            return f"The tool {name} can be used now."
        self._described.add(name)
        definition = {"name": name, "description": tool["description"], "parameters": tool["input_schema"]}
        return (
            f"The tool {name} can be used now, and is called exactly like the tools that were given at the start."
            f" Its definition:\n{json.dumps(definition, ensure_ascii=False)}"
        )

    def _left_out(self, block: Any) -> None:
        self._note(f"block {_word(block.get('type') if isinstance(block, dict) else None)}")

    def _system(self, system: Any) -> str:
        texts = self._texts(system) if isinstance(system, str | list) else iter(())
        return "\n\n".join(rest for text in texts if (rest := _unattributed(text)))

    # --- tools ---

    def _tools(self, tools: Any) -> list[Json]:
        """Those that an engine can be told of: a server's own tools have no schema, and nobody here to run them."""
        kept: list[Json] = []
        seen: set[str] = set()
        for index, tool in enumerate(tools if isinstance(tools, list) else []):
            match tool:
                case {"name": str(name), "input_schema": dict(schema)} if name and name not in seen:
                    seen.add(name)
                    # an engine's grammar takes a schema without a type for "any JSON"
                    typed = _passed(f"tools.{index}.input_schema", schema if "type" in schema else _OBJECT | schema)
                    known = {"name": name, "description": _string(tool.get("description")), "input_schema": typed}
                    if tool.get("defer_loading") is True:
                        self._deferred[name] = known
                    else:
                        kept.append(known)
                case _:
                    self._note(f"tool {_word(_object(tool).get('name'))}")
        return kept

    def _chosen(self, tools: list[Json], choice: Any) -> tuple[list[Json], bool]:
        match choice:
            case {"type": "none"}:
                self._deferred = {}
                return [], False
            case {"type": "any"}:
                return tools, bool(tools)
            case {"type": "tool", "name": str(name)}:
                wanted = [tool for tool in (*tools, *self._deferred.values()) if tool["name"] == name]
                if not wanted:
                    self._note("tool_choice of a tool that is not there")
                return wanted or tools, bool(wanted or tools)
            case None | {"type": "auto"}:
                pass
            case _:
                self._note("tool_choice")
        return tools, False

    # --- how to answer ---

    def _sampling(self, data: Json) -> Json:
        """What an engine would refuse is left out rather than be the end of the conversation."""
        temperature, top_p, top_k = (data.get(key) for key in ("temperature", "top_p", "top_k"))
        sampling: Json = {}
        if _number(temperature) and 0 <= temperature <= 2:
            sampling["temperature"] = temperature
        if _number(top_p) and 0 < top_p <= 1:
            sampling["top_p"] = top_p
        if _positive(top_k):
            sampling["top_k"] = _positive(top_k)
        stops = data.get("stop_sequences")
        if stops := [stop for stop in stops if isinstance(stop, str) and stop] if isinstance(stops, list) else []:
            sampling["stop_sequences"] = stops
        for key in ("temperature", "top_p", "top_k"):
            if data.get(key) is not None and key not in sampling:
                self._note(f"value of {key}")
        return sampling

    def _thinking(self, thinking: Any) -> bool | None:
        kind = _object(thinking).get("type")
        if isinstance(kind, str) and kind in THINKING:
            return THINKING[kind]
        if thinking is not None:
            self._note("value of thinking")
        return None

    def _effort(self, effort: Any) -> str:
        if effort is None or effort in EFFORTS:
            return effort or ""
        self._note("value of effort")
        return ""

    def _schema(self, wanted: Any) -> Json | None:
        match wanted:
            case {"type": "json_schema", "schema": dict(schema)}:
                return _passed("output_config.format.schema", schema)
            case None:
                return None
        self._note("value of output_config.format")
        return None


_OBJECT: Json = {"type": "object"}
_NESTS = (dict, list)


def _system_first(messages: list[Any]) -> list[tuple[int, Any]]:
    """Numbered; the system messages right behind the first user message go before it.

    There Claude Code tells of the directory, the agents and the day: the same for every conversation, while what the
    user says is not.
    """
    numbered = list(enumerate(messages))
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if "user" not in roles:
        return numbered
    first = roles.index("user")
    end = first + 1
    while end < len(roles) and roles[end] == "system":
        end += 1
    return [*numbered[:first], *numbered[first + 1 : end], numbered[first], *numbered[end:]]


def _unattributed(text: str) -> str:
    """The line that differs between conversations, at the very start of the prompt."""
    return text.partition("\n")[2].lstrip("\n") if text.startswith(ATTRIBUTION) else text


def _titled(document: Json, text: str) -> Json:
    lines = [_string(document.get("title")), _string(document.get("context")), text]
    return _text("\n".join(line for line in lines if line) or "[document, empty]")


def _passed(where: str, value: Json) -> Json:
    """What goes to the engine as it is. Level by level: going down into it is what could not be survived."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inside = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [inner for inners in inside for inner in inners if isinstance(inner, _NESTS)]
        if not level:
            return value
    raise invalid(f"{where}: Input is nested more than {MAX_DEPTH} levels deep")


def _number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> int:
    """The whole number, at most what fits an engine's 32 bits; 0 when it is none."""
    return min(int(value), 2**31 - 1) if _number(value) and value >= 1 else 0


def _object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _word(name: Any) -> str:
    """A name for a note: logs get nothing that could be a text of somebody's."""
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) else "of an odd name"


def _text(text: str) -> Json:
    return {"type": "text", "text": text}
