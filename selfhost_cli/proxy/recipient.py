"""Who the front passes an answer on to: the client that asked, or everyone who asks the same at the same time."""

from __future__ import annotations

from typing import Protocol

from aiohttp import web
from multidict import CIMultiDict


class Recipient(Protocol):
    """Gets one answer: its head once, after which it is `begun`, then its body as it comes."""

    @property
    def begun(self) -> bool: ...

    async def begin(self, status: int, reason: str | None, headers: CIMultiDict[str], length: int | None) -> None: ...

    async def write(self, data: bytes) -> None: ...

    def tear(self) -> None:
        """The answer is broken, and that can be shown in no other way than by breaking off."""
        ...


class Asker:
    """The client of one request."""

    def __init__(self, http: web.Request, note: str = "") -> None:
        """`note`: what the answer's x-selfhost-cache says, if anything."""
        self._http = http
        self._note = note
        self.begun = False
        self.response = web.StreamResponse()

    async def begin(self, status: int, reason: str | None, headers: CIMultiDict[str], length: int | None) -> None:
        self.begun = True
        self.response = web.StreamResponse(status=status, reason=reason, headers=headers)
        if self._note:
            self.response.headers["x-selfhost-cache"] = self._note
        self.response.content_length = length
        await self.response.prepare(self._http)

    async def write(self, data: bytes) -> None:
        await self.response.write(data)

    def tear(self) -> None:
        if self._http.transport:
            self._http.transport.abort()
