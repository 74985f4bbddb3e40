"""When the market may be asked again: every process of this user waits for its turn, so that together they keep limits.

The market counts per account and per address, not per profile, and so does the book of turns: one small file beside the
profiles, without any of the ledger's promises. Nothing in it is worth keeping, so a book that is lost, broken or locked
never stops a call: then each process keeps to the turns that it gave itself.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Lock

from selfhost_cli.errors import TooOften
from selfhost_cli.wait import SYSTEM, Clock

PATIENCE_S = 60.0
"""The longest wait of one call, be it for others or because the market asks for it."""
LONGEST_S = 600.0
"""The longest time for which nobody asks, whatever the market says: what may be billed must not wait for a day."""
SLACK_S = 0.5
"""On top of each interval: the market counts arrivals, and one call may take longer to get there than the next."""
JITTER_S = 0.5
"""On top of that, at random: two machines behind one address must not stay in step."""
EARLY_S = 0.001
"""A wait so short is none."""
BUSY_S = 1.0
"""How long to wait for a process that was stopped with the book open."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS turns (
    call TEXT PRIMARY KEY, at REAL NOT NULL, next REAL NOT NULL, quiet REAL NOT NULL
) STRICT
"""


@dataclass(frozen=True)
class Limit:
    """At least `every` seconds between two calls; `burst` of them may come at once after a pause of so many intervals.

    `penalty`: seconds of silence after a call that came too early, at least. `patience`: the longest wait for a turn.
    """

    every: float
    burst: int = 1
    penalty: float = 5.0
    patience: float = PATIENCE_S


@dataclass(frozen=True)
class _Turns:
    """Of one call of one market, in Unix seconds: when this was written, the end of the queue, no call before `quiet`.

    The queue gives each its place; `quiet` has the last word, because a call may be late, or the market want silence.
    """

    at: float
    next: float
    quiet: float

    def sound(self, now: float) -> bool:
        """Not if written in the future: the clock was set back, and nobody waits for it to catch up."""
        return self.at <= now + 1 and max(self.next, self.quiet) <= self.at + 2 * LONGEST_S


_OWN: dict[Path, dict[str, _Turns]] = {}
"""What this process knows of the turns in each book."""
_LOCK = Lock()
"""One thread at the book: closing a file drops the locks that other threads hold on it."""


class Pacer:
    """The turns at one market, in the book at `path`; without one, in this object alone.

    `pace` stretches the intervals, 0 drops them. The silence that a market asks for always holds.
    """

    def __init__(self, path: Path | None, market: str, pace: float = 1.0, *, clock: Clock = SYSTEM) -> None:
        self._path = path
        self._market = market
        self._pace = pace
        self._clock = clock
        self._own = {} if path is None else _OWN.setdefault(path, {})

    @contextmanager
    def turn(self, call: str, limit: Limit) -> Iterator[None]:
        """Wait for a turn, and make the call inside. Raises TooOften when it is too far away, see `wait`."""
        self.wait(call, limit)
        began = self._clock.monotonic()
        try:
            yield
        finally:
            if limit.burst == 1 and self._clock.monotonic() - began > SLACK_S / 2:
                # It may have reached the market late, which counts from then: by now at the latest.
                self.hold(call, (limit.every + SLACK_S) * self._pace)

    def wait(self, call: str, limit: Limit) -> None:
        """Sleep until it is our turn. Raises TooOften when that is longer than `patience`."""
        least = limit.every + SLACK_S
        every = (least + JITTER_S * random.random()) * self._pace
        ahead = (limit.burst - 1) * (least + JITTER_S) * self._pace
        left, pause, queued = limit.patience, 0.0, False

        def take(turns: _Turns, now: float) -> _Turns:
            """Go, if nobody is before us; else queue up, once: who has a place keeps it, however late it gets."""
            nonlocal pause
            start = turns.quiet if queued else max(turns.next - ahead, turns.quiet)
            pause = max(0.0, start - now)
            if pause < EARLY_S:
                pause = 0.0
                quiet = turns.quiet if limit.burst > 1 else now + every
                return _Turns(now, max(turns.next, now + every) if queued else max(turns.next, now) + every, quiet)
            if queued or pause > left:
                return turns
            return _Turns(now, max(turns.next, start) + every, turns.quiet)

        while True:
            self._change(call, take)
            if pause > left:
                raise TooOften(
                    f"the market may not be asked for this ({call}) for another {pause:.0f} s: its rate limit",
                    "Try again after that.",
                    seconds=pause,
                )
            if not pause:
                return
            queued = True
            self._clock.sleep(pause)
            left -= pause

    def hold(self, call: str, seconds: float) -> None:
        """Let nobody make this call for so long, those included who wait for their turn already."""

        def silence(turns: _Turns, now: float) -> _Turns:
            quiet = max(turns.quiet, now + min(seconds, LONGEST_S))
            # Who comes now queues up behind those who were to go meanwhile.
            return _Turns(now, quiet + max(0.0, turns.next - max(turns.quiet, now)), quiet)

        self._change(call, silence)

    def _change(self, call: str, change: Callable[[_Turns, float], _Turns]) -> _Turns:
        name = f"{self._market} {call}"
        with _LOCK:
            try:
                turns = self._change_book(name, change)
            except (sqlite3.Error, OSError):
                turns = self._changed(self._own.get(name), change)
            self._own[name] = turns
        return turns

    def _change_book(self, name: str, change: Callable[[_Turns, float], _Turns]) -> _Turns:
        """In one short transaction, that nobody sleeps in. Raises sqlite3.Error or OSError."""
        if self._path is None:
            raise FileNotFoundError("there is no book")
        self._path.touch(mode=0o600)
        try:
            with closing(sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)) as db:
                db.execute("PRAGMA synchronous = OFF")
                db.execute("BEGIN IMMEDIATE")
                db.execute(SCHEMA)
                row = db.execute("SELECT at, next, quiet FROM turns WHERE call = ?", (name,)).fetchone()
                turns = self._changed(_Turns(*row) if row else self._own.get(name), change)
                db.execute("DELETE FROM turns WHERE at < ?", (turns.at - 2 * LONGEST_S,))  # markets that are no more
                db.execute("INSERT OR REPLACE INTO turns VALUES (?, ?, ?, ?)", (name, *astuple(turns)))
                db.execute("COMMIT")
        except sqlite3.OperationalError:
            raise  # locked, read-only, a full disk: it may do again the next time
        except sqlite3.DatabaseError:
            self._path.unlink(missing_ok=True)
            raise
        return turns

    def _changed(self, turns: _Turns | None, change: Callable[[_Turns, float], _Turns]) -> _Turns:
        now = self._clock.time()
        return change(turns if turns and turns.sound(now) else _Turns(now, now, now), now)
