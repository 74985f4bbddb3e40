"""The grammar of an answer: engine events in, Anthropic's events out, one block open at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Literal

from selfhost_cli.proxy.contract import Json
from selfhost_cli.proxy.engines import AnswerEvent, Done, Prompt, Text, Thinking, ToolCall, ToolInput
from selfhost_cli.proxy.errors import EmptyAnswer, EngineBroke, ProxyError, new_id

BlockKind = Literal["text", "thinking", "tool_use"]
DOUBT = "selfhost_doubt"
"""In the usage of an answer that nobody should keep: why, in a word. Clients overlook what they do not know there."""

PROMPT_MS = "selfhost_prompt_ms"
"""There as well: how long the engine read the prompt, until it said the first thing."""


class Narrator:
    """Tells one answer. `message_start` comes with the first thing that is really said, not before.

    Ids are made here, because Claude Code merges messages whose ids are equal.
    """

    def __init__(self, model: str) -> None:
        self.prompt = Prompt(0)
        self.output_tokens = 0
        self.started = False
        self.finished = False
        self.prompt_ms = 0
        self.doubt = ""
        """Why this answer is not worth keeping."""
        self._model = model
        self._index = -1
        self._open: BlockKind | None = None
        self._blank = ""
        self._bare_call = False

    def tell(self, event: AnswerEvent) -> Iterator[Json]:
        """What to send for it. Raises EngineBroke and EmptyAnswer."""
        match event:
            case Prompt():
                self.prompt = event
            case Text(text):
                yield from self._text(text)
            case Thinking(text) if text:
                if self._open != "thinking":
                    yield from self._begin("thinking", {"thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case ToolCall(name):
                self._blank = ""
                yield from self._begin("tool_use", {"id": new_id("toolu"), "name": name, "input": {}})
                self._bare_call = True
            case ToolInput(piece) if piece:
                if self._open != "tool_use":
                    raise EngineBroke("the engine went on with a tool call that had ended")
                self._bare_call = False
                yield self._delta({"type": "input_json_delta", "partial_json": piece})
            case Done():
                yield from self._end(event)

    def usage(self) -> Json:
        """In Anthropic's terms: input_tokens are those that were not read from the cache."""
        return {
            "input_tokens": self.prompt.total - self.prompt.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self.prompt.cached,
            "output_tokens": self.output_tokens,
        }

    def _text(self, text: str) -> Iterator[Json]:
        if self._open != "text":
            # a block of nothing but blanks would count as an empty answer
            self._blank += text
            if not self._blank.strip():
                return
            text, self._blank = self._blank, ""
            yield from self._begin("text", {"text": ""})
        if text:
            yield self._delta({"type": "text_delta", "text": text})

    def _begin(self, kind: BlockKind, block: Json) -> Iterator[Json]:
        if not self.started:
            yield self._message_start()
        yield from self._close()
        self._index += 1
        self._open = kind
        yield {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **block}}

    def _close(self) -> Iterator[Json]:
        if self._open is None:
            return
        if self._bare_call:
            self._bare_call = False
            yield self._delta({"type": "input_json_delta", "partial_json": "{}"})
        yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _end(self, done: Done) -> Iterator[Json]:
        self.output_tokens = done.output_tokens
        if done.notice and done.reason != "tool_use":
            yield from self._text(done.notice)
        if not self.started:
            if done.reason != "stop_sequence":
                raise EmptyAnswer(done.output_tokens)
            yield self._message_start()
        yield from self._close()
        delta = {"stop_reason": done.reason, "stop_sequence": done.stop_sequence}
        doubt = "cut" if done.cut else self.doubt
        ours = {name: value for name, value in ((DOUBT, doubt), (PROMPT_MS, self.prompt_ms)) if value}
        yield {"type": "message_delta", "delta": delta, "usage": self.usage() | ours}
        self.finished = True
        yield {"type": "message_stop"}

    def _message_start(self) -> Json:
        self.started = True
        return {
            "type": "message_start",
            "message": {
                "id": new_id("msg"),
                "type": "message",
                "role": "assistant",
                "model": self._model,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": self.usage(),
            },
        }

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def collect(events: Iterable[Json]) -> Json:
    """The message that Anthropic's events tell of, for clients that did not ask for a stream.

    A call that was cut off in its input is left out; an error when nothing else is there.
    """
    message: Json = {}
    pieces: list[list[str]] = []
    for event in events:
        match event:
            case {"type": "message_start", "message": dict(start)}:
                message = start
            case {"type": "content_block_start", "content_block": dict(block)}:
                message["content"].append(dict(block))
                pieces.append([])
            case {"type": "content_block_delta", "delta": {"type": _, "signature": _}}:
                pass
            case {"type": "content_block_delta", "delta": dict(delta)}:
                pieces[-1].append(next((value for key, value in delta.items() if key != "type"), ""))
            case {"type": "message_delta", "delta": dict(delta), "usage": dict(usage)}:
                message |= delta | {"usage": usage}
    blocks = [_whole(block, "".join(part)) for block, part in zip(message["content"], pieces, strict=True)]
    message["content"] = [block for block in blocks if block]
    if blocks and not message["content"]:
        raise ProxyError(400, "api_error", "the tool call was cut off before its input was complete", final=True)
    return message


def _whole(block: Json, said: str) -> Json | None:
    if block["type"] != "tool_use":
        return block | {block["type"]: said}
    try:
        given = json.loads(said)
    except ValueError:
        return None
    return block | {"input": given} if isinstance(given, dict) else None
