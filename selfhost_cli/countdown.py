"""When a box will end by itself, as far as this side can know. Pure: caps and what was measured -> what comes first."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from selfhost_cli.model import Heard, Rental

SOON_S = 600.0
"""From here on people are warned."""

LATE_S = 60.0
"""Its watchdog looks every few seconds, and the market may take a while to destroy a box."""

Why = Literal["idle", "hours", "dollars", "lease"]

EXTENDED_BY: Mapping[Why, str] = {
    "idle": "`selfhost extend --idle +30`",
    "hours": "`selfhost extend --hours +2`",
    "dollars": "`selfhost extend --max-spend +2`",
}
"""The lease only by a keeper that reaches the box."""


@dataclass(frozen=True)
class Measured:
    """What the watchdog on a box measured: seconds up, without a renewed lease and without a request; dollars spent,
    traffic included; bytes received and sent. `verdict`: why it is ending the box, "" while it is not."""

    up_s: float
    lease_s: float
    idle_s: float
    dollars: float
    verdict: str = ""
    down_bytes: int = 0
    up_bytes: int = 0


@dataclass(frozen=True)
class Countdown:
    """One of the deaths of a box: when it comes (`at`, and `seconds` from now), unless something moves it."""

    why: Why
    at: float
    seconds: float


def parse(line: str) -> Measured | None:
    """The watchdog's own line, run/watch on the box, and its run/verdict behind it, if there is one.

    A stranger's machine wrote it, so None for what makes no sense.
    """
    traffic, *words = line.split(None, 5) or [""]
    measured, counted = _measured(words[:4], *words[4:]), re.match("([0-9]{1,18})/([0-9]{1,18})/", traffic)
    if measured and counted:
        return replace(measured, down_bytes=int(counted[1]), up_bytes=int(counted[2]))
    return measured


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


def projected(rental: Rental, heard: Heard, *, now: float, away: bool = False) -> tuple[Countdown, ...]:
    """What will end the box, soonest first, going by what was heard of it last. `away`: nobody renews its lease now."""
    measured = Measured(heard.up_s, 0.0, heard.idle_s, heard.dollars)
    ends = countdowns(rental, measured, now=heard.at, away_s=0.0 if away else None)
    return tuple(replace(one, seconds=one.at - now) for one in ends)


def outstayed(rental: Rental, ends: Sequence[Countdown]) -> str:
    """The hard cap that should have ended the box more than LATE_S ago, "" when none should have."""
    late = [one for one in ends if one.why in ("hours", "dollars") and one.seconds < -LATE_S]
    return _reason(rental, late[0].why) if late else ""


def warning(rental: Rental, ends: Sequence[Countdown], *, within: float = SOON_S) -> str:
    """What to tell people about the first of these, and what moves it; "" when there is more time than `within`."""
    if not ends or ends[0].seconds > within:
        return ""
    first, reason = ends[0], _reason(rental, ends[0].why)
    if first.seconds < -LATE_S:
        return f"{rental} should have ended by itself: {reason}. `selfhost down` ends it."
    moves = {"lease": "the keeper does, once it reaches the box", "idle": f"a request does, or {EXTENDED_BY['idle']}"}
    moved = moves.get(first.why) or f"{EXTENDED_BY[first.why]} does"
    return f"{rental} ends by itself {in_words(first.seconds)} ({_clock(first)}): {reason}. To move that: {moved}."


def in_short(rental: Rental, ends: Sequence[Countdown]) -> str:
    """The same for a line that may be cut off, and that says nothing wrong when it is read again later."""
    if not warning(rental, ends):
        return ""
    first, reason = ends[0], _reason(rental, ends[0].why)
    if first.seconds < -LATE_S:
        return f"the box should have ended: {reason}; `selfhost down` ends it"
    moved = f"; {EXTENDED_BY[first.why]} moves it" if first.why in EXTENDED_BY else ""
    return f"the box ends at {_clock(first)}: {reason}{moved}"


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


def _clock(one: Countdown) -> str:
    return time.strftime("%H:%M", time.localtime(one.at))


def _reason(rental: Rental, why: Why) -> str:
    caps = rental.caps
    return {
        "idle": f"{caps.idle_s / 60:.4g} min without a request",
        "hours": f"its {caps.max_s / 3600:.4g} h are over",
        "dollars": f"its ${caps.max_dollars:g} are spent",
        "lease": f"{caps.lease_s / 60:.4g} min without this machine",
    }[why]


def _measured(values: Sequence[object], verdict: str = "") -> Measured | None:
    try:
        up_s, lease_s, idle_s, dollars = (float(value) for value in values)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    if not all(math.isfinite(value) and value >= 0 for value in (up_s, idle_s, dollars)):
        return None
    return Measured(up_s, lease_s, idle_s, dollars, verdict.strip().rpartition("\n")[2])
