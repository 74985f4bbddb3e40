"""What a client may send, made canonical: the one shape that engines get to see.

Lenient as Claude Code needs it: unknown fields, blocks and roles are no errors. Canonical as prefix caches need it:
what varies from call to call without meaning (metadata, cache_control, attribution, string or block content) is gone,
and the prompt of the next turn extends that of this one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from selfhost_cli.proxy.errors import invalid

Json = dict[str, Any]
MAX_TOKENS = 4096
ATTRIBUTION = "x-anthropic-billing-header:"


@dataclass(frozen=True)
class Request:
    """A canonical `POST /v1/messages`.

    `messages` alternate between user and assistant, their content is a list of blocks (text, image, thinking, tool_use,
    tool_result with text content), tool results first. `sampling` holds temperature, top_p, top_k and stop_sequences
    as far as they were given. `force_tool`: the answer has to be a call.
    """

    messages: list[Json]
    system: str = ""
    tools: list[Json] = field(default_factory=list)
    force_tool: bool = False
    max_tokens: int = MAX_TOKENS
    sampling: Json = field(default_factory=dict)
    stream: bool = False

    @property
    def prefill(self) -> str:
        """What the answer has to begin with: the text of a last message that is the assistant's."""
        last = self.messages[-1]
        if last["role"] != "assistant":
            return ""
        return "".join(block["text"] for block in last["content"] if block["type"] == "text")


def parse(body: bytes) -> Request:
    """Raises ProxyError (400, says which field) for what no engine could answer."""
    data = load(body)
    choice = data.get("tool_choice")
    choice = choice if isinstance(choice, dict) else {}
    return Request(
        messages=_messages(data.get("messages")),
        system=_system(data.get("system")),
        tools=_tools(data.get("tools"), choice),
        force_tool=choice.get("type") in ("any", "tool"),
        max_tokens=_positive(data.get("max_tokens")) or MAX_TOKENS,
        sampling=_sampling(data),
        stream=data.get("stream") is True,
    )


def load(body: bytes) -> Json:
    """A JSON object, or a ProxyError (400)."""
    try:
        data = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise invalid("the body is not a JSON object")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _messages(messages: Any) -> list[Json]:
    if not isinstance(messages, list) or not messages:
        raise invalid("messages: at least one message is required")
    turns: list[Json] = []
    for index, message in enumerate(messages):
        role, content = _message(f"messages.{index}", message)
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


def _message(where: str, message: Any) -> tuple[Literal["user", "assistant"], list[Json]]:
    if not isinstance(message, dict):
        raise invalid(f"{where}: Input should be an object")
    content = message.get("content")
    if not isinstance(content, str | list):
        raise invalid(f"{where}.content: Input should be a string or a list of blocks")
    blocks = list(_blocks(content))
    match message.get("role"):
        case "assistant":
            return "assistant", blocks
        case "system":
            return "user", _reminder(blocks)
        case _:
            return "user", blocks


def _reminder(blocks: Iterable[Json]) -> list[Json]:
    """A system message in the middle, where no chat template has a place for one."""
    text = "\n\n".join(block["text"] for block in blocks if block["type"] == "text")
    return [_text(f"<system-reminder>\n{text}\n</system-reminder>")] if text else []


def _blocks(content: str | list[Any]) -> Iterator[Json]:
    for block in [_text(content)] if isinstance(content, str) else content:
        match block:
            case {"type": "text", "text": str(text)} if text:
                yield _text(text)
            case {"type": "image", "source": dict(source)}:
                yield {"type": "image", "source": source}
            case {"type": "document"}:
                yield _text(_document(block))
            case {"type": "thinking", "thinking": str(thinking)} if thinking:
                yield {"type": "thinking", "thinking": thinking, "signature": ""}
            case {"type": "tool_use", "name": str(name)}:
                given = block.get("input")
                yield {
                    "type": "tool_use",
                    "id": str(block.get("id", "")),
                    "name": name,
                    "input": given if isinstance(given, dict) else {},
                }
            case {"type": "tool_result"}:
                yield {
                    "type": "tool_result",
                    "tool_use_id": str(block.get("tool_use_id", "")),
                    "content": _result(block.get("content")),
                }


def _result(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_result_part(part) for part in content) if isinstance(content, list) else ""


def _result_part(part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "tool_reference", "tool_name": str(name)}:
            return f"The tool {name} can be used now."
        case {"type": "document"}:
            return _document(part)
        case {"type": str(kind)}:
            return f"[{kind}, not shown]"
    return ""


def _document(block: Json) -> str:
    match block.get("source"):
        case {"type": "text", "data": str(text)}:
            return text
    return "[document, not shown]"


def _system(system: Any) -> str:
    blocks = _blocks(system) if isinstance(system, str | list) else []
    texts = (block["text"] for block in blocks if block["type"] == "text")
    return "\n\n".join(text for text in texts if not text.startswith(ATTRIBUTION))


def _tools(tools: Any, choice: Json) -> list[Json]:
    """Those that an engine can be told of: a server's own tools have no schema, and nobody here to run them."""
    kept = [
        {"name": name, "description": str(tool.get("description") or ""), "input_schema": schema}
        for tool in (tools if isinstance(tools, list) else [])
        if isinstance(tool, dict)
        and isinstance(name := tool.get("name"), str)
        and isinstance(schema := tool.get("input_schema"), dict)
    ]
    match choice:
        case {"type": "none"}:
            return []
        case {"type": "tool", "name": str(wanted)}:
            return [tool for tool in kept if tool["name"] == wanted] or kept
    return kept


def _sampling(data: Json) -> Json:
    sampling: Json = {key: data[key] for key in ("temperature", "top_p") if _number(data.get(key))}
    if top_k := _positive(data.get("top_k")):
        sampling["top_k"] = top_k
    stops = data.get("stop_sequences")
    stops = [stop for stop in stops if isinstance(stop, str) and stop] if isinstance(stops, list) else []
    return sampling | ({"stop_sequences": stops} if stops else {})


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _positive(value: Any) -> int:
    """The whole number, at most what fits an engine's 32 bits; 0 when it is none."""
    return min(int(value), 2**31 - 1) if _number(value) and value >= 1 else 0


def _text(text: str) -> Json:
    return {"type": "text", "text": text}
