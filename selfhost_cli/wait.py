"""The one way in which commands wait: a deadline, three answers, a clock that tests replace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from selfhost_cli.errors import SelfhostError

T = TypeVar("T")


class Clock(Protocol):
    """Time as the product sees it."""

    def time(self) -> float:
        """Unix seconds, for records."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump, for deadlines."""
        ...

    def since_boot(self) -> float:
        """Seconds that never jump, and go on while the machine sleeps."""
        ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def since_boot(self) -> float:
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))  # on macOS the latter does

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


SYSTEM: Clock = SystemClock()


@dataclass(frozen=True)
class Pending:
    """A probe's "not yet", with what it saw."""

    why: str


class TimedOut(SelfhostError):
    """The deadline passed; the message says what was awaited, how long, and the last thing seen."""


def until(probe: Callable[[], T | Pending], *, what: str, seconds: float, every: float, clock: Clock = SYSTEM) -> T:
    """Call `probe` every `every` seconds until it answers something other than Pending.

    What the probe raises ends the wait: pending and failed are different answers. Raises TimedOut.
    """
    deadline = clock.monotonic() + seconds
    while True:
        answer = probe()
        if not isinstance(answer, Pending):
            return answer
        remaining = deadline - clock.monotonic()
        if remaining <= 0:
            raise TimedOut(f"{what}: not within {seconds:.0f} s; last seen: {answer.why}")
        clock.sleep(min(every, remaining))
