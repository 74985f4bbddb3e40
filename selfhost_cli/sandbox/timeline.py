"""The market's time: the system's, until a test moves it ahead or stops it, so that no test waits for minutes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Timeline:
    """A clock (call it for Unix seconds) whose `sleep` ends as soon as its own time has come, however that came."""

    def __init__(self, base: Callable[[], float] = time.time) -> None:
        self._base = base
        self._ahead = 0.0
        self._stopped_at: float | None = None
        self._moved = asyncio.Event()

    def __call__(self) -> float:
        return (self._base() if self._stopped_at is None else self._stopped_at) + self._ahead

    @property
    def stopped(self) -> bool:
        return self._stopped_at is not None

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass now. Raises ValueError for a step back."""
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"the market's time moves ahead only, not by {seconds} s")
        self._ahead += seconds
        self._wake()

    def stop(self, stopped: bool) -> None:
        """Stopped, it moves by `advance` only; otherwise it runs on from where it is."""
        now, base = self(), self._base()
        self._stopped_at = base if stopped else None
        self._ahead = now - base
        self._wake()

    async def sleep(self, seconds: float) -> None:
        until = self() + seconds
        while (left := until - self()) > 0:
            try:
                await asyncio.wait_for(self._moved.wait(), None if self.stopped else left)
            except TimeoutError:
                pass

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()
