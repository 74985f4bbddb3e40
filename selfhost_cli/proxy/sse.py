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
        if not ended:
            return
        for line in (lines + ended).decode("utf-8", "replace").replace("\r\n", "\n").split("\n")[:-1]:
            if not line:
                name, data = self._name, self._data
                self._name, self._data = "", []
                if data:
                    yield Event(name or "message", "\n".join(data))
                continue
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "data":
                self._data.append(value)
            elif field == "event":
                self._name = value


def encode(event: dict[str, Any]) -> bytes:
    """One Anthropic event, named by its own type."""
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), codec.encode(event))
