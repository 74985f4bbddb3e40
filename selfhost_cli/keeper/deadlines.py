"""When the keeper ends a box, and how: decided on a clock that tests replace, without threads or sockets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from selfhost_cli import countdown, lifecycle
from selfhost_cli.config import Settings
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Heard, Rental, State
from selfhost_cli.wait import SYSTEM, Clock

UNREADY = (State.CREATING, State.BOOTING, State.INSTALLING)
STUCK_ENDING_S = 60.0
UNREACHABLE_S = 10.0
RETRY_S = 20.0
VERDICT_S = 60.0
"""So long a box may go on after its own watchdog said that it has to end."""
SILENT_S = 60.0
"""So long a watchdog may say nothing new: it looks every few seconds, the market's answer may keep it for twenty."""
LAST_TRIES_S = 300.0
REASON = 120
"""Characters of what a stranger's machine said, at most."""

Work = Callable[[lifecycle.Books, Rental], object]

log = logging.getLogger("selfhost.keeper")


@dataclass(frozen=True)
class Watch:
    """What is known of a box. `down_since`: monotonic time since when it is out of reach, None when it is not.

    `heard`: the last figures of its watchdog; `verdict`: why that one is ending it, "" while it is not.
    """

    down_since: float | None = None
    heard: Heard | None = None
    verdict: str = ""


class Deadlines:
    """How long each rental has been in a state in which it must not stay. Asked every second, and forgets nothing."""

    def __init__(self, settings: Settings, clock: Clock = SYSTEM) -> None:
        self._settings = settings
        self._clock = clock
        self._booted = clock.time() - clock.since_boot()
        self._up = ProcessLock(settings.paths.up_lock)
        self._since: dict[tuple[str, str], float] = {}
        self._figures: dict[str, Heard] = {}
        self._tried: dict[str, float] = {}

    def due(self, rental: Rental, watch: Watch | None = None) -> Work | None:
        """What to do about a rental now, if anything; at most once in RETRY_S."""
        work = self._overdue(rental, watch or Watch())
        now = self._clock.monotonic()
        if work is None or now - self._tried.get(rental.label, float("-inf")) < RETRY_S:
            return None
        self._tried[rental.label] = now
        return work

    def orphaned(self, rental: Rental) -> bool:
        """Whether nobody will ever use it: its `up` is gone for good, and it was not ready."""
        unready = rental.state in UNREADY and self._up.holder() is None
        return self._lasts(rental, "orphaned", unready, self._settings.orphan * 60)

    def _overdue(self, rental: Rental, watch: Watch) -> Work | None:
        minutes = self._settings.ready_timeout + self._settings.orphan
        if self.orphaned(rental):
            return self._end_orphan
        if self._lasts(rental, "unready", rental.state in UNREADY, minutes * 60):
            return _end_stuck
        if self._lasts(rental, "ending", rental.state is State.ENDING, STUCK_ENDING_S):
            return lifecycle.finish
        if rental.state is not State.READY:
            return None
        if reason := self._outstayed(rental, watch):
            return _End(reason)
        down_since = watch.down_since
        return _settle if down_since is not None and self._clock.monotonic() - down_since > UNREACHABLE_S else None

    def _outstayed(self, rental: Rental, watch: Watch) -> str:
        """Why a box has to end that its own watchdog did not get ended, "" when there is no reason.

        Hard caps count only where nobody watches: a watchdog at work knows best what was extended.
        """
        if self._lasts(rental, "verdict", bool(watch.verdict), VERDICT_S):
            return f"its watchdog could not end it: {watch.verdict[:REASON]}"
        now, last = self._now(), self._last_figures(rental, watch)
        watched = last is not None and now - last.at <= SILENT_S
        if not self._lasts(rental, "unwatched", not watched, SILENT_S):
            return ""
        ends = countdown.countdowns(rental, None, now=now)
        if last:  # it knew of the traffic, and may have died long before its figures were read
            ends += countdown.projected(rental, last, now=now)
        return countdown.outstayed(rental, ends)

    def _last_figures(self, rental: Rental, watch: Watch) -> Heard | None:
        """The newest of them, as of when they were first seen: a dead watchdog's file can be read for ever."""
        new, known = watch.heard or rental.heard, self._figures.get(rental.label)
        if new and (known is None or new.up_s != known.up_s):
            age = max(0.0, self._clock.time() - new.at)
            self._figures[rental.label] = known = replace(new, at=self._now() - age)
        return known

    def _now(self) -> float:
        """Unix time by a clock that nobody sets: a box must not end, nor go on, because somebody set ours."""
        return self._booted + self._clock.since_boot()

    def _lasts(self, rental: Rental, what: str, holds: bool, seconds: float) -> bool:
        """Whether something has held for so long without a break."""
        key = (rental.label, what)
        if not holds:
            self._since.pop(key, None)
            return False
        now = self._clock.monotonic()
        return now - self._since.setdefault(key, now) > seconds

    def _end_orphan(self, books: lifecycle.Books, rental: Rental) -> None:
        """Asked once more, because loading the SDK took a moment in which a new `up` may have taken over."""
        if self._up.holder() is None:
            _end(books, rental, "its `selfhost up` is gone")


@dataclass(frozen=True)
class _End:
    """Work: end a box that was ready."""

    reason: str

    def __call__(self, books: lifecycle.Books, rental: Rental) -> None:
        _end(books, rental, self.reason)


def outlived(rental: Rental, now: float) -> bool:
    """Whether the box's own watchdog must have ended it by its hard cap an hour ago.

    When the market does not answer either, a keeper can do no more for it; the next command starts another one.
    """
    return now - (rental.sent_at or rental.created_at) > rental.caps.max_s + 3600


def _end(books: lifecycle.Books, rental: Rental, reason: str, *, blameless: bool = True) -> None:
    log.warning("ending %s: %s", rental, reason)
    # advance, not end: whoever moved the rental on meanwhile, or its caps, knows better
    ending = books.ledger.advance(rental, State.ENDING, unmoved=True, reason=reason, blameless=blameless)
    lifecycle.finish(books, ending)


def _end_stuck(books: lifecycle.Books, rental: Rental) -> None:
    _end(books, rental, "it did not get ready in time", blameless=False)


def _settle(books: lifecycle.Books, rental: Rental) -> None:
    if lifecycle.settle(books, rental):
        log.warning("%s has ended by itself", rental)
