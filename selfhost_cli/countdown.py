"""When a box will end by itself, as far as this side can know. Pure: caps and what was measured -> what comes first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from selfhost_cli.model import Rental

SOON_S = 600.0
"""From here on people are warned."""

LATE_S = 60.0
"""Its watchdog looks every few seconds, and the market may take a while to destroy a box."""

Why = Literal["idle", "hours", "dollars", "lease"]


@dataclass(frozen=True)
class Measured:
    """What the watchdog on a box measured: seconds up, without a renewed lease and without a request; dollars spent,
    traffic included. `verdict`: why it is ending the box, "" while it is not."""

    up_s: float
    lease_s: float
    idle_s: float
    dollars: float
    verdict: str = ""


@dataclass(frozen=True)
class Countdown:
    """One of the deaths of a box: when it comes (`at`, and `seconds` from now), unless something moves it."""

    why: Why
    at: float
    seconds: float


def parse(line: str) -> Measured | None:
    """The watchdog's own line, run/watch on the box; a stranger's machine wrote it, so None for what makes no sense."""
    _, *words = line.split(None, 5) or [""]
    return _measured(words[:4], *words[4:])


def read(told: Mapping[str, object]) -> Measured | None:
    """The same from the `watchdog` of a box's /health."""
    return _measured([told.get(name) for name in ("up_s", "lease_s", "idle_s", "dollars")])


def countdowns(
    rental: Rental, measured: Measured | None, *, now: float, away_s: float | None = None
) -> tuple[Countdown, ...]:
    """What will end the box, soonest first.

    Without measurements the caps are counted from when it ran, at its price without traffic, and idleness is unknown.
    `away_s`: for how long its lease has not been renewed; None when it is being renewed, or when that is unknown.
    """
    caps = rental.caps
    up_s = now - (rental.running_at or rental.sent_at or rental.created_at)
    dollars = up_s / 3600 * rental.dph_total
    left: dict[Why, float] = {}
    if measured:
        up_s, dollars = measured.up_s, measured.dollars
        if rental.ready_at is not None:
            left["idle"] = caps.idle_s - measured.idle_s
    left["hours"] = caps.max_s - up_s
    if rental.dph_total > 0:
        left["dollars"] = (caps.max_dollars - dollars) / rental.dph_total * 3600
    if away_s is not None:
        left["lease"] = caps.lease_s - away_s
    return tuple(
        Countdown(why, now + seconds, seconds) for why, seconds in sorted(left.items(), key=lambda item: item[1])
    )


def warning(rental: Rental, ends: Sequence[Countdown], *, within: float = SOON_S) -> str:
    """What to tell people about the first of these, and what moves it; "" when there is more time than `within`."""
    if not ends or ends[0].seconds > within:
        return ""
    first, caps = ends[0], rental.caps
    reason, moves = {
        "idle": (f"{caps.idle_s / 60:.4g} min without a request", "a request does, or `selfhost extend --idle +30`"),
        "hours": (f"its {caps.max_s / 3600:.4g} h are over", "`selfhost extend --hours +2` does"),
        "dollars": (f"its ${caps.max_dollars:g} are spent", "`selfhost extend --max-spend +2` does"),
        "lease": (f"{caps.lease_s / 60:.4g} min without this machine", "the keeper does, once it reaches the box"),
    }[first.why]
    if first.seconds < -LATE_S:
        return f"{rental} should have ended by itself: {reason}. `selfhost down` ends it."
    return f"{rental} ends by itself {in_words(first.seconds)}: {reason}. To move that: {moves}."


def in_words(seconds: float) -> str:
    """Such as "in 12 min"."""
    if seconds < 60:
        return "in less than a minute"
    return f"in {seconds / 60:.0f} min" if seconds < 5400 else f"in {seconds / 3600:.1f} h"


class Warnings:
    """What was said already: each warning is said once, and again only after its death had moved away."""

    def __init__(self) -> None:
        self._said: set[tuple[str, Why]] = set()

    def due(self, rental: Rental, ends: Iterable[Countdown]) -> list[str]:
        """What is to be said now."""
        texts = []
        for one in ends:
            key, text = (rental.label, one.why), warning(rental, [one])
            if text and key not in self._said:
                texts.append(text)
            (self._said.add if text else self._said.discard)(key)
        return texts


def _measured(values: Sequence[object], verdict: str = "") -> Measured | None:
    try:
        up_s, lease_s, idle_s, dollars = (float(value) for value in values)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    if not all(math.isfinite(value) and value >= 0 for value in (up_s, idle_s, dollars)):
        return None
    return Measured(up_s, lease_s, idle_s, dollars, verdict.strip())
