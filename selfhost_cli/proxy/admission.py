"""Who may generate: as many as the engine has slots, the rest in a queue of bounded length, first come first served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from selfhost_cli.proxy.errors import overloaded

QUEUE = 32


class Admission:
    def __init__(self, slots: int = 1, queue: int = QUEUE) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._room = slots + queue
        self._inside = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue; raises ProxyError 529 when it is full."""
        if self._inside >= self._room:
            raise overloaded(f"{self._inside} requests are waiting already", retry_after=5)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a slot, and hold it."""
        async with self._slots:
            yield
