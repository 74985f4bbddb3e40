"""What goes over the wire between the real Claude Code and us, counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Wire:
    """Between a client and a server on loopback: passes every byte on, and keeps it."""

    def __init__(self, url: str) -> None:
        self._to = url.rpartition(":")[2]
        self._sent: list[bytearray] = []
        self._heard: list[bytearray] = []

    @property
    def requests(self) -> int:
        return sum(sent.count(b"POST /v1/messages") for sent in self._sent)

    @property
    def pings(self) -> list[int]:
        """Of every connection."""
        return [heard.count(b"event: ping\n") for heard in self._heard]

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self._serve, "127.0.0.1") as server:
            yield "http://{}:{}".format(*server.sockets[0].getsockname())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", int(self._to))
        self._sent.append(bytearray())
        self._heard.append(bytearray())
        await asyncio.gather(_pass(reader, ours, self._sent[-1]), _pass(theirs, writer, self._heard[-1]))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: bytearray) -> None:
    try:
        while piece := await reader.read(65536):
            seen += piece
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()
