"""The local database of rentals, events and usage: what we own, and what we owe.

SQLite with `synchronous=FULL`: once a method returns, the row survives a crash. Every transition is one short
`BEGIN IMMEDIATE` transaction, a lock that the kernel frees with the process, and names the states it may start from:
who comes too late gets `Superseded` and must stop. `ENDING` is refused to nobody: `down` always wins.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from selfhost_cli.errors import MayBeBilling, SelfhostError, Superseded
from selfhost_cli.model import Caps, Charges, Endpoint, Heard, Rental, State

SCHEMA = """
CREATE TABLE rentals (
    label TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    record TEXT NOT NULL
) STRICT;
CREATE TABLE events (
    at REAL NOT NULL, label TEXT NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL
) STRICT;
CREATE TABLE usage (
    at REAL NOT NULL, label TEXT NOT NULL, class TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
    prompt_s REAL NOT NULL DEFAULT 0.0
) STRICT;
CREATE INDEX usage_label ON usage (label);
CREATE INDEX events_label ON events (label);
PRAGMA user_version = 2;
"""
VERSION = 2
SINCE_1 = "ALTER TABLE usage ADD COLUMN prompt_s REAL NOT NULL DEFAULT 0.0"
READ = 256
"""Tokens of a prompt that have to be new for its seconds to tell how fast the engine reads."""


class LedgerBroken(MayBeBilling):
    """The ledger cannot be read or written; what it would have told may still be billed."""


@dataclass(frozen=True)
class Usage:
    """Tokens that went through a box. Reading `read_tokens` of the prompts took its engine `read_s` seconds."""

    requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    read_tokens: int = 0
    read_s: float = 0.0

    @property
    def spared_s(self) -> float | None:
        """Seconds that the reused tokens would have taken at that rate; None where it was never seen."""
        return self.cached_tokens * self.read_s / self.read_tokens if self.read_tokens else None


class Ledger:
    """One profile's ledger. Cheap to open; safe to use from several processes, one object per thread.

    Every method raises LedgerBroken when the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = ""
        try:
            _create(path)
            self._db = sqlite3.connect(path, timeout=10.0, isolation_level=None)
            opened = os.stat(path)
            self._identity = (opened.st_dev, opened.st_ino)
            self._db.execute("PRAGMA synchronous = FULL")
            self._check_version()
        except (OSError, sqlite3.Error) as error:
            raise _broken(path, error) from error

    @classmethod
    def in_memory(cls, broken: str) -> Ledger:
        """An empty stand-in for a ledger that cannot be used, for `down`; `broken` says why."""
        ledger = cls.__new__(cls)
        ledger.path, ledger.broken, ledger._identity = Path(":memory:"), broken, (0, 0)
        ledger._db = sqlite3.connect(":memory:", isolation_level=None)
        ledger._db.executescript(SCHEMA)
        return ledger

    def close(self) -> None:
        self._db.close()

    def current(self) -> bool:
        """Whether the path still is the file that was opened: people move a ledger away, or lose it."""
        try:
            now = os.stat(self.path)
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == self._identity

    def check(self) -> None:
        """Prove that it is whole and can be written, before money depends on it. Raises LedgerBroken."""
        with self._transaction() as db:
            answer = db.execute("PRAGMA quick_check").fetchone()[0]
            db.execute("UPDATE rentals SET state = state")
        if answer != "ok":
            raise _broken(self.path, answer)

    def vouches(self) -> bool:
        """Whether it knows all that this installation ever rented. A new one in the place of a lost one does not."""
        query = "SELECT EXISTS (SELECT 1 FROM rentals) OR EXISTS (SELECT 1 FROM events WHERE kind = 'complete')"
        return bool(self._rows(query)[0][0])

    def vouch(self) -> None:
        """Record that the market was asked, for longer than its list can lag, and has nothing that is not in here."""
        if not self.vouches():
            with self._transaction() as db:
                self._note(db, "", "complete", "")

    def intend(self, rental: Rental) -> None:
        """Commit the intent, before the paid call. Raises Superseded while another one is neither ready nor ended."""
        with self._transaction() as db:
            over = (State.ENDED, State.READY)
            other = db.execute("SELECT label FROM rentals WHERE state NOT IN (?, ?)", over).fetchone()
            if other:
                raise Superseded(f"rental {other[0]} is not finished", "Run `selfhost status`.")
            db.execute(
                "INSERT INTO rentals VALUES (?, ?, ?, ?)",
                (rental.label, rental.state, rental.created_at, _encode(rental)),
            )
            self._note(db, rental.label, "state", rental.state)

    def live(self) -> list[Rental]:
        """Every rental that may cost money, oldest first."""
        return self._select("WHERE state != 'ended' ORDER BY created_at")

    def all(self) -> list[Rental]:
        return self._select("ORDER BY created_at")

    def get(self, label: str) -> Rental | None:
        found = self._select("WHERE label = ?", label)
        return found[0] if found else None

    def advance(self, rental: Rental, to: State, *, unmoved: bool = False, **changes: Any) -> Rental:
        """Move a rental on from the state the caller knows it in. Raises Superseded when it is elsewhere by now.

        `unmoved`: also when its caps are not those the caller knows.
        """
        with self._transaction() as db:
            current = self._current(db, rental.label)
            if current.state is not rental.state:
                raise Superseded(
                    f"rental {rental.label} is {current.state} by now", "Another selfhost command took it over."
                )
            if unmoved and current.caps != rental.caps:
                raise Superseded(f"the caps of rental {rental.label} were moved", "`selfhost status` tells them.")
            return self._write(db, replace(current, state=to, **changes))

    def note(self, rental: Rental, **changes: Any) -> Rental:
        """Record facts without moving on; the same rule as `advance`."""
        return self.advance(rental, rental.state, **changes)

    def end(self, label: str, reason: str, *, blameless: bool = False) -> Rental:
        """Record that a rental is to end, from whatever state it is in. The first reason stays."""
        with self._transaction() as db:
            current = self._current(db, label)
            if current.state in (State.ENDING, State.ENDED):
                return current
            return self._write(
                db, replace(current, state=State.ENDING, reason=reason, blameless=blameless or current.blameless)
            )

    def ended(self, label: str, at: float, reason: str = "", *, seen: float | None = None) -> Rental:
        """Record that it is proven gone, or, with the reason, that it never was. The first reason stays.

        `seen`: when the market still said that it ran.
        """
        with self._transaction() as db:
            current = self._current(db, label)
            gone = replace(current, state=State.ENDED, ended_at=current.ended_at or at, reason=current.reason or reason)
            gone = replace(gone, seen_at=current.seen_at or seen)
            return self._write(db, gone)

    def amend(self, label: str, **facts: Any) -> Rental:
        """Record what is true in any state: what was heard of the box, what it was billed. Raises Superseded."""
        with self._transaction() as db:
            return self._write(db, replace(self._current(db, label), **facts))

    def tell(self, label: str, kind: str, text: str) -> None:
        """Record what happened to a rental, for people."""
        with self._transaction() as db:
            self._note(db, label, kind, text)

    def events(self, label: str) -> list[tuple[float, str, str]]:
        """(time, kind, text) of every transition, with its reason."""
        return self._rows("SELECT at, kind, text FROM events WHERE label = ? ORDER BY rowid", label)

    def add_usage(self, label: str, kind: str, usage: Usage, prompt_s: float = 0.0) -> None:
        """Of one request; the engine read what was new of its prompt in `prompt_s` seconds, 0 where it did not say."""
        row = (label, kind, usage.input_tokens, usage.cached_tokens, usage.output_tokens, prompt_s)
        with self._transaction() as db:
            db.execute("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?)", (time.time(), *row))

    def usage(self, label: str, *, since: float = 0.0) -> Usage:
        return self.usages(since=since).get(label, Usage())

    def usages(self, *, since: float = 0.0, until: float = float("inf")) -> dict[str, Usage]:
        """Of each rental and each backend that was used between two times, by label."""
        timed = f"prompt_s > 0 AND input_tokens - cached_tokens >= {READ}"
        rows = self._rows(
            "SELECT label, count(*), sum(input_tokens), sum(cached_tokens), sum(output_tokens),"
            f" sum(iif({timed}, input_tokens - cached_tokens, 0)), total(iif({timed}, prompt_s, 0))"
            " FROM usage WHERE at >= ? AND at < ? GROUP BY label",
            since,
            until,
        )
        return {label: Usage(*sums) for label, *sums in rows}

    def _check_version(self) -> None:
        version = self._rows("PRAGMA user_version")[0][0]
        if version == 1:
            with self._transaction() as db:
                if db.execute("PRAGMA user_version").fetchone()[0] == 1:  # else another process was faster
                    db.execute(SINCE_1)
                    db.execute(f"PRAGMA user_version = {VERSION}")
        elif version != VERSION:
            raise LedgerBroken(
                f"{self.path} was written by another version of selfhost (schema {version}, ours is {VERSION})",
                "Use that version, or end every box with `selfhost down` and move the file away.",
            )

    def _select(self, where: str, *values: object) -> list[Rental]:
        return [self._read(row[0]) for row in self._rows(f"SELECT record FROM rentals {where}", *values)]

    def _read(self, record: str) -> Rental:
        try:
            return _decode(record)
        except (ValueError, TypeError, KeyError) as error:
            raise _broken(self.path, f"a record in it makes no sense: {error}") from error

    def _rows(self, query: str, *values: object) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise _broken(self.path, error) from error

    def _current(self, db: sqlite3.Connection, label: str) -> Rental:
        row = db.execute("SELECT record FROM rentals WHERE label = ?", (label,)).fetchone()
        if row is None:
            raise Superseded(f"rental {label} is not in the ledger any more")
        return self._read(row[0])

    def _write(self, db: sqlite3.Connection, rental: Rental) -> Rental:
        before = db.execute("SELECT state FROM rentals WHERE label = ?", (rental.label,)).fetchone()[0]
        db.execute(
            "UPDATE rentals SET state = ?, record = ? WHERE label = ?", (rental.state, _encode(rental), rental.label)
        )
        if before != rental.state:
            self._note(db, rental.label, "state", f"{rental.state} {rental.reason}".strip())
        return rental

    @staticmethod
    def _note(db: sqlite3.Connection, label: str, kind: str, text: str) -> None:
        db.execute("INSERT INTO events VALUES (?, ?, ?, ?)", (time.time(), label, kind, text))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except BaseException as error:
            # A signal may come between any two of these lines, and a full disk with the last.
            with suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise _broken(self.path, error) from error
            raise


def _create(path: Path) -> None:
    """A ledger without rows, in write-ahead mode and its owner's alone, unless there is one.

    It appears whole or not at all: two processes that switch one file to write-ahead mode at the same moment do not
    wait for each other, one gets "database is locked". One that is there is not even opened here: closing any
    descriptor of it drops the locks that SQLite holds in this process, and another one then takes the log away.
    """
    if path.exists():
        return
    from tempfile import TemporaryDirectory  # only here: this module is on the way of every `selfhost claude`

    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        with closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.executescript(SCHEMA)
        draft.chmod(0o600)
        with suppress(FileExistsError):  # somebody else was faster
            os.link(draft, path)


def _broken(path: Path, why: object) -> SelfhostError:
    return LedgerBroken(
        f"the ledger {path} cannot be used: {why}",
        "`selfhost down` asks the market itself and works without it. Then move the file away and start again.",
    )


def _encode(rental: Rental) -> str:
    return json.dumps(asdict(rental))


def _decode(text: str) -> Rental:
    raw: Mapping[str, Any] = json.loads(text)
    known = {f.name for f in fields(Rental)}
    values = {name: value for name, value in raw.items() if name in known}
    values["state"] = State(values["state"])
    values["caps"] = Caps(**values["caps"])
    values["endpoint"] = Endpoint(*values["endpoint"]) if values.get("endpoint") else None
    values["heard"] = Heard(**values["heard"]) if values.get("heard") else None
    values["charges"] = Charges(**values["charges"]) if values.get("charges") else None
    return Rental(**values)
