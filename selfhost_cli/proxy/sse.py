"""Server-sent events: reading an upstream's, writing ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from selfhost_cli.proxy import codec

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
        lines, ended, rest = (self._rest + chunk).rpartition(b"\n")
        self._rest = rest
        if ended:
            for line in lines.decode("utf-8", "replace").split("\n"):
                if event := self._line(line.removesuffix("\r")):
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


def encode(event: dict[str, Any]) -> bytes:
    """One Anthropic event, named by its own type."""
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), codec.encode(event))
