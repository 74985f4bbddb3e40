"""Time that passes only when somebody sleeps."""

from __future__ import annotations


class FakeClock:
    """`wait.Clock`; `sleeps` tells how long everybody slept, `set_by` how far somebody set the wall clock ahead."""

    def __init__(self, start: float = 1_795_000_000.0) -> None:
        self.now = start
        self.set_by = 0.0
        self.sleeps: list[float] = []

    def time(self) -> float:
        return self.now + self.set_by

    def monotonic(self) -> float:
        return self.now

    def since_boot(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds
