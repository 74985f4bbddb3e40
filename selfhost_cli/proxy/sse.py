"""Server-sent events: reading an upstream's, writing ours."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from typing import Any, NamedTuple

PING = b'event: ping\ndata: {"type": "ping"}\n\n'


class Event(NamedTuple):
    """`name` is "message" when the stream gave none."""

    name: str
    data: str


class Parser:
    """Chunks in, whole events out, wherever the chunks are cut. Comments are swallowed."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[Event]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            event = self._line(line.removesuffix(b"\r").decode("utf-8", "replace"))
            if event:
                yield event

    def _line(self, line: str) -> Event | None:
        if not line:
            event = Event(self._name or "message", "\n".join(self._data)) if self._data else None
            self._name, self._data = "", []
            return event
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        return None


async def events(chunks: AsyncIterable[bytes]) -> AsyncIterator[Event]:
    parser = Parser()
    async for chunk in chunks:
        for event in parser.feed(chunk):
            yield event


def encode(event: dict[str, Any]) -> bytes:
    """One Anthropic event, named by its own type."""
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
