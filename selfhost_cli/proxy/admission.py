"""Who may generate: as many as the engine has slots, the rest in a queue of bounded length.

First come, first served; but what Claude Code asks for by the way (a title, a classification: class `auxiliary`) has a
line of its own, which moves only while nobody stands in the main one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from selfhost_cli.proxy.errors import overloaded

QUEUE = 32
Line = deque[asyncio.Future[None]]


class Admission:
    def __init__(self, slots: int = 1, queue: int = QUEUE) -> None:
        self._slots = slots
        self._free = slots
        self._room = slots + queue
        self._inside = 0
        self._main: Line = deque()
        self._auxiliary: Line = deque()

    @property
    def slots(self) -> int:
        return self._slots

    def resize(self, slots: int) -> None:
        """From now on. Who has a slot already keeps it."""
        more = slots - self._slots
        self._slots, self._free, self._room = slots, self._free + more, self._room + more
        while self._free > 0 and self.waiting:
            self._free -= 1
            self._pass_on()

    @property
    def running(self) -> int:
        """How many hold a slot."""
        return self._slots - self._free

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        return len(self._main) + len(self._auxiliary)

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
    async def turn(self, *, auxiliary: bool = False) -> AsyncIterator[None]:
        """Wait for a slot, and hold it."""
        await self._take(self._auxiliary if auxiliary else self._main)
        try:
            yield
        finally:
            self._pass_on()

    async def _take(self, line: Line) -> None:
        if self._free > 0:  # then nobody waits: a slot that is given back goes straight to the next in line
            self._free -= 1
            return
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.append(called)
        try:
            await called
        except asyncio.CancelledError:
            if called in line:
                line.remove(called)
            elif not called.cancelled():  # called and cancelled in the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        if self._free < 0:  # there are fewer than there were
            self._free += 1
            return
        for line in (self._main, self._auxiliary):
            while line:
                called = line.popleft()
                if not called.done():  # else cancelled, and about to leave
                    called.set_result(None)
                    return
        self._free += 1
