"""How long each stage of getting ready may last: a box that misses a deadline is given up for another machine."""

from __future__ import annotations

from collections import defaultdict, deque

from selfhost_cli.config import Settings
from selfhost_cli.errors import BoxFailed
from selfhost_cli.model import Event
from selfhost_cli.wait import Clock

WINDOW_S = 180.0
"""A rate counts once it was measured for so long: install.sh is as patient with a server that is busy."""

LOADING = "start"
"""The step of install.sh that loads the model; what comes before it brings files."""


class Stages:
    """The time spent in each stage. A stage that is left and entered again goes on where it was.

    created (rented, nothing happens yet) → loading (the image) → ssh → download → load (the model) → token; each has
    a setting `<stage>_timeout` in minutes. `enter` and `observe` raise BoxFailed when the stage at hand lasts too long.
    """

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._spent: dict[str, float] = {}
        self._stage = ""
        self._since = clock.monotonic()
        self._skipped = 0.0
        self._progress: defaultdict[str, _Rate] = defaultdict(_Rate)

    def enter(self, stage: str, seen: str, *, began: float | None = None) -> None:
        """It is in this stage now; `seen` is what is told when that lasts too long.

        `began`: since that Unix time, what was skipped not counted.
        """
        now = self._clock.monotonic()
        if self._stage:
            self._spent[self._stage] += now - self._since
        if stage != self._stage:
            self._progress.clear()  # nobody looked at the download meanwhile
        self._stage, self._since = stage, now
        if stage not in self._spent:
            self._spent[stage] = max(0.0, self._clock.time() - began - self._skipped) if began else 0.0
        if self._spent[stage] > self.limit(stage):
            raise BoxFailed(
                f"the stage {stage!r} was not over within {self.limit(stage) / 60:g} minutes; last seen: {seen}",
                f"A longer {stage}_timeout waits longer.",
            )

    def skip(self) -> None:
        """The time since the last word says nothing about the machine: the market was away."""
        now = self._clock.monotonic()
        self._skipped += now - self._since
        self._since = now
        self._progress.clear()

    def limit(self, stage: str) -> float:
        """Seconds."""
        return float(getattr(self._settings, f"{stage}_timeout")) * 60

    def observe(self, event: Event) -> None:
        """Progress of install.sh: its deadline, and whether the download will make it at the rate measured so far."""
        stage = "load" if event.stage == LOADING else "download"
        self.enter(stage, f"{event.stage} {event.text}".rstrip())
        if event.status != "progress" or event.done is None or event.total is None:
            return
        now = self._clock.monotonic()
        rate = self._progress[event.stage].measured(now, event.done, event.total)
        if rate is None or event.done >= event.total:
            return
        left = (event.total - event.done) / rate if rate else float("inf")
        if self._spent[stage] + left > self.limit(stage):
            raise BoxFailed(
                f"the download is too slow: {event.stage} came at {rate / 1e6:.1f} MB/s for the last {WINDOW_S:.0f} s, "
                f"{(event.total - event.done) / 1e6:.0f} MB are left, and all must be there within "
                f"{self.limit(stage) / 60:g} minutes",
                "A longer download_timeout waits longer.",
            )


class _Rate:
    """Bytes per second over the last WINDOW_S of one download."""

    def __init__(self) -> None:
        self._total: int | None = None
        self._seen: deque[tuple[float, int]] = deque()

    def measured(self, now: float, done: int, total: int) -> float | None:
        """None until it was watched for long enough."""
        if total != self._total or (self._seen and done < self._seen[-1][1]):
            self._total = total
            self._seen.clear()
        self._seen.append((now, done))
        while len(self._seen) > 1 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()
        began, first = self._seen[0]
        return (done - first) / (now - began) if now - began >= WINDOW_S else None
