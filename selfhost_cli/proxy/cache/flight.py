"""One question on its way to the engine, and everyone who asks it meanwhile."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from aiohttp import web
from multidict import CIMultiDict

from selfhost_cli.proxy import sse
from selfhost_cli.proxy.cache.entry import Entry
from selfhost_cli.proxy.errors import EngineBroke, ProxyError, new_id
from selfhost_cli.proxy.web import trace

MOST = 32 * 2**20
"""Bytes of an answer that are held for those who are yet to read them: more than any context has tokens."""
_ID = re.compile(rb'"id":"(msg|toolu)_[0-9a-f]{24}"')
"""As our own proxy writes them, so that another one has the same length."""


@dataclass(frozen=True)
class Head:
    status: int
    reason: str | None
    headers: CIMultiDict[str]
    length: int | None


class Flight:
    """A recipient that remembers all it got, so that who comes later hears it from the beginning.

    `over`: nothing more comes of it. `landed`: and it is known what could be made of it, the `entry`. `listeners`: how
    many wait for it; `followers`: the classes of the requests that joined it.
    """

    def __init__(self, streamed: bool) -> None:
        self.streamed = streamed
        self.entry: Entry | None = None
        self.over = False
        self.landed = asyncio.Event()
        self.listeners = 0
        self.followers: list[str] = []
        self.task: asyncio.Task[None] | None = None
        self._head: Head | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._torn = False
        self._failure: ProxyError | None = None
        self._moved = asyncio.Event()

    @property
    def begun(self) -> bool:
        return self._head is not None

    @property
    def whole(self) -> bool:
        """It is an answer, as far as can be told without reading it."""
        return self._head is not None and self._head.status == 200 and not self._torn

    def body(self) -> bytes:
        return b"".join(self._chunks)

    async def begin(self, status: int, reason: str | None, headers: CIMultiDict[str], length: int | None) -> None:
        self._head = Head(status, reason, headers, length)
        self._wake()

    async def write(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > MOST:
            raise ConnectionError(f"an answer of more than {MOST // 2**20} MB")
        self._chunks.append(data)
        self._wake()

    def tear(self) -> None:
        self._torn = True
        self._wake()

    def end(self, failure: ProxyError | None) -> None:
        """`failure`: why nothing came of it, or nothing more. Only the first time counts."""
        if self.over:
            return
        if failure and self._head:
            if self.streamed:
                self._chunks.append(sse.encode(failure.body(trace().id)))
            else:
                self._torn = True
        self._failure, self.over = failure, True
        self._wake()

    async def tell(self, http: web.Request, note: str, *, first: bool = False) -> web.StreamResponse:
        """All of it to one client, under ids of its own unless it is the `first`. Raises the failure if there is no
        more than that."""
        response, at, names = None, 0, dict[bytes, bytes]()
        while True:
            moved = self._moved
            if self._head and not response:
                response = _response(self._head, note)
                await response.prepare(http)
            elif response and at < len(self._chunks):
                data, at = b"".join(self._chunks[at:]), len(self._chunks)
                await response.write(data if first else _renamed(data, names, self.streamed))
            elif response and self._torn:
                if http.transport:
                    http.transport.abort()
                return response
            elif not self.over:
                await moved.wait()
            elif response:
                return response
            else:
                raise self._failure or EngineBroke("nothing came of it")

    def _wake(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()


def _response(head: Head, note: str) -> web.StreamResponse:
    response = web.StreamResponse(status=head.status, reason=head.reason, headers=head.headers)
    response.headers["x-selfhost-cache"] = note
    response.content_length = head.length
    return response


def _renamed(data: bytes, names: dict[bytes, bytes], streamed: bool) -> bytes:
    """With other ids. In a stream no text can hold such a thing: a quote in a text is never bare. In a whole message
    what a tool is called with might, so only the first one is another."""

    def other(found: re.Match[bytes]) -> bytes:
        return names.setdefault(found[0], b'"id":"%b"' % new_id(found[1].decode()).encode())

    if streamed:
        return _ID.sub(other, data)
    return data if names else _ID.sub(other, data, count=1)
