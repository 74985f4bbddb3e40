"""When the keeper ends a box, and how: decided on a clock that tests replace, without threads or sockets."""

from __future__ import annotations

import logging
from collections.abc import Callable

from selfhost_cli import lifecycle
from selfhost_cli.config import Settings
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Rental, State
from selfhost_cli.wait import SYSTEM, Clock

STUCK_ENDING_S = 60.0
UNREACHABLE_S = 10.0
RETRY_S = 20.0

Work = Callable[[lifecycle.Books, Rental], object]

log = logging.getLogger("selfhost.keeper")


class Deadlines:
    """How long each rental has been in a state in which it must not stay. Asked every second, and forgets nothing."""

    def __init__(self, settings: Settings, clock: Clock = SYSTEM) -> None:
        self._settings = settings
        self._clock = clock
        self._up = ProcessLock(settings.paths.up_lock)
        self._since: dict[tuple[str, str], float] = {}
        self._tried: dict[str, float] = {}

    def due(self, rental: Rental, down_since: float | None = None) -> Work | None:
        """What to do about a rental now, if anything; at most once in RETRY_S.

        `down_since`: the clock's monotonic time since when its box is out of reach, None when it is not.
        """
        work = self._overdue(rental, down_since)
        now = self._clock.monotonic()
        if work is None or now - self._tried.get(rental.label, float("-inf")) < RETRY_S:
            return None
        self._tried[rental.label] = now
        return work

    def _overdue(self, rental: Rental, down_since: float | None) -> Work | None:
        minutes = self._settings.boot_timeout + self._settings.install_timeout + self._settings.orphan
        unready = rental.state in (State.CREATING, State.BOOTING, State.INSTALLING)
        if self._lasts(rental, "orphaned", unready and self._up.holder() is None, self._settings.orphan * 60):
            return self._end_orphan
        if self._lasts(rental, "unready", unready, minutes * 60):
            return _end_stuck
        if self._lasts(rental, "ending", rental.state is State.ENDING, STUCK_ENDING_S):
            return lifecycle.finish
        if rental.state is State.READY and down_since is not None:
            return _settle if self._clock.monotonic() - down_since > UNREACHABLE_S else None
        return None

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


def outlived(rental: Rental, now: float) -> bool:
    """Whether the box's own watchdog must have ended it by its hard cap an hour ago.

    When the market does not answer either, a keeper can do no more for it; the next command starts another one.
    """
    return now - (rental.sent_at or rental.created_at) > rental.caps.max_s + 3600


def _end(books: lifecycle.Books, rental: Rental, reason: str) -> None:
    log.warning("ending %s: %s", rental, reason)
    # advance, not end: whoever moved the rental on meanwhile knows better
    lifecycle.finish(books, books.ledger.advance(rental, State.ENDING, reason=reason))


def _end_stuck(books: lifecycle.Books, rental: Rental) -> None:
    _end(books, rental, "it did not get ready in time")


def _settle(books: lifecycle.Books, rental: Rental) -> None:
    if lifecycle.settle(books, rental):
        log.warning("%s has ended by itself", rental)
