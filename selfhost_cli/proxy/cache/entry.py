"""One kept answer: read from what a box sent, written down, and told again as if it were generated now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from selfhost_cli.proxy import sse
from selfhost_cli.proxy.answer import DOUBT, PROMPT_MS, collect
from selfhost_cli.proxy.codec import decode, encode, tokens
from selfhost_cli.proxy.contract import Json
from selfhost_cli.proxy.errors import ProxyError, new_id

LARGEST = 4 * 2**20
"""Bytes of an answer that is kept, before it is packed."""
MOST_READ = 2 * LARGEST
"""Bytes of events that are looked through for one."""
PIECE = 512
"""Characters of a text that is told in one go: smaller ones would cost the most of a hit."""
WHOLE = frozenset({"end_turn", "tool_use", "stop_sequence"})
"""Why an answer ended that came to its own end."""
IDS = {"tool_use": "toolu"}
DELTAS = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
FIELDS = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}


@dataclass(frozen=True)
class Entry:
    """`blocks` are Anthropic's content blocks without ids. `at`: when it was kept, in seconds since 1970; `seconds`:
    how long the engine took, waiting included."""

    blocks: list[Json]
    stop_reason: str
    stop_sequence: str | None
    usage: Json
    model: str
    cls: str
    at: float
    seconds: float

    def pack(self) -> bytes:
        return encode(asdict(self))

    @property
    def input_tokens(self) -> int:
        counted = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        return sum(tokens(self.usage.get(name)) for name in counted)

    @property
    def output_tokens(self) -> int:
        return tokens(self.usage.get("output_tokens"))

    def message(self) -> Json:
        """As the whole answer of a request that does not stream."""
        return {
            "id": new_id("msg"),
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [_named(block) for block in self.blocks],
            "stop_reason": self.stop_reason,
            "stop_sequence": self.stop_sequence,
            "usage": self.usage,
        }

    def events(self) -> Iterator[Json]:
        """As a stream's events, by the grammar of `answer.Narrator`; texts are cut anew."""
        begun: Json = {"content": [], "stop_reason": None, "stop_sequence": None}
        usage = self.usage | {"output_tokens": 0}
        yield {"type": "message_start", "message": self.message() | begun | {"usage": usage}}
        for index, block in enumerate(self.blocks):
            kind = block["type"]
            said = encode(block["input"]).decode() if kind == "tool_use" else block[kind]
            empty: Json = {"input": {}} if kind == "tool_use" else {kind: ""}
            yield {"type": "content_block_start", "index": index, "content_block": _named(block) | empty}
            for start in range(0, len(said), PIECE):
                delta = {"type": DELTAS[kind], FIELDS[kind]: said[start : start + PIECE]}
                yield {"type": "content_block_delta", "index": index, "delta": delta}
            yield {"type": "content_block_stop", "index": index}
        delta = {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}
        yield {"type": "message_delta", "delta": delta, "usage": self.usage}
        yield {"type": "message_stop"}

    def whole(self) -> bytes:
        return encode(self.message())

    def stream(self) -> bytes:
        return b"".join(map(sse.encode, self.events()))


def unpack(data: bytes) -> Entry | None:
    """None for what is no entry of ours."""
    try:
        told = decode(data)
        return Entry(**{one.name: told[one.name] for one in fields(Entry)})
    except (ValueError, KeyError, TypeError):
        return None


def read(answer: bytes, *, streamed: bool, cls: str, at: float, seconds: float) -> Entry | str:
    """The entry that a box's whole answer makes, else why it must not be kept."""
    if len(answer) > MOST_READ:
        return "it is too large"
    try:
        message = collect(_events(answer)) if streamed else decode(answer)
        return _entry(message, cls, at, seconds)
    except ProxyError as error:
        return error.message
    except Exception:  # a stranger's bytes; whatever is wrong with them, they are not kept
        return "it has not the form of an answer"


def _entry(message: Any, cls: str, at: float, seconds: float) -> Entry | str:
    if message["stop_reason"] not in WHOLE:
        return f"it ended with {message['stop_reason']!s:.40}"
    usage = dict(message["usage"])
    usage.pop(PROMPT_MS, None)
    if doubt := usage.pop(DOUBT, ""):
        return f"{doubt!s:.40}"
    blocks = [_plain(block) for block in message["content"]]
    if not blocks:
        return "it is empty"
    model, reason = str(message["model"]), message["stop_reason"]
    entry = Entry(blocks, reason, message["stop_sequence"], usage, model, cls, at, seconds)
    packed = entry.pack()
    if len(packed) > LARGEST:
        return "it is too large"
    # numbers that JSON has no words for, or orjson no room
    return entry if unpack(packed) == entry else "it cannot be written down as it is"


def _plain(block: Json) -> Json:
    match block:
        case {"type": "text", "text": str(text)} if text:
            return {"type": "text", "text": text}
        case {"type": "thinking", "thinking": str(text)} if text:
            return {"type": "thinking", "thinking": text, "signature": ""}
        case {"type": "tool_use", "name": str(name), "input": dict(given)}:
            return {"type": "tool_use", "name": name, "input": given}
    raise ValueError(block.get("type"))


def _named(block: Json) -> Json:
    """With an id of its own, where the kind has one."""
    kind = block["type"]
    return {"type": kind, "id": new_id(IDS[kind]), **block} if kind in IDS else block


def _events(answer: bytes) -> Iterable[Json]:
    """Raises ValueError for an error in it, and when it does not end as answers do."""
    last = ""
    for event in sse.Parser().feed(answer):
        if event.name == "ping":
            continue
        if event.name == "error":
            raise ValueError("an error is in it")
        last = event.name
        yield decode(event.data)
    if last != "message_stop":
        raise ValueError("it has no end")
