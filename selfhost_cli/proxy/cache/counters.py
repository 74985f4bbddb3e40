"""What the cache did: hits, misses and bypasses, and what the hits have saved, by rental and by class of request."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

from selfhost_cli.proxy.cache.database import Database

VERSION = 1
SCHEMA = f"""
CREATE TABLE counts (
    label TEXT NOT NULL, class TEXT NOT NULL,
    hits INTEGER NOT NULL, misses INTEGER NOT NULL, bypasses INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, gpu_seconds REAL NOT NULL,
    PRIMARY KEY (label, class)
) STRICT, WITHOUT ROWID;
CREATE TABLE notes (name TEXT PRIMARY KEY, count INTEGER NOT NULL) STRICT, WITHOUT ROWID;
PRAGMA user_version = {VERSION};
"""
WRITE_S = 5.0
"""So long are counts kept in memory before they are written down; a process that is killed loses these."""

Outcome = Literal["hit", "miss", "bypass"]
Key = tuple[str, str]
"""A rental's label ("": there was none) and a class of request."""


@dataclass(frozen=True)
class Count:
    """Tokens and seconds of a GPU are those that hits have saved."""

    hits: int = 0
    misses: int = 0
    bypasses: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    gpu_seconds: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.hits + other.hits,
            self.misses + other.misses,
            self.bypasses + other.bypasses,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.gpu_seconds + other.gpu_seconds,
        )

    @property
    def ratio(self) -> float | None:
        """Of hits among what could have been one; None before there was any."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


class Counters:
    """Counted in memory and written in batches: counting costs no disk. They survive restarts.

    Nothing raises for a file that cannot be used: `trouble` says why, and counts wait in memory until it can be.
    """

    def __init__(self, path: Path, *, write_every: float = WRITE_S) -> None:
        self._file = Database(path, SCHEMA, VERSION)
        self._new: dict[Key, Count] = {}
        self._notes: Counter[str] = Counter()
        self._write_every = write_every
        self._writing: asyncio.TimerHandle | None = None
        self._at_the_file = asyncio.Lock()

    @property
    def trouble(self) -> str:
        """Of the last attempt to write or read."""
        return f"the cache's counters {self._file.path}: {self._file.trouble}" if self._file.trouble else ""

    def count(
        self,
        outcome: Outcome,
        label: str,
        cls: str,
        *,
        input_tokens: int = 0,
        output_tokens: int = 0,
        gpu_seconds: float = 0.0,
    ) -> None:
        """One request; the rest is what a hit has saved. In the event loop."""
        one = {
            "hit": Count(1, 0, 0, input_tokens, output_tokens, gpu_seconds),
            "miss": Count(misses=1),
            "bypass": Count(bypasses=1),
        }[outcome]
        self._new[label, cls] = self._new.get((label, cls), Count()) + one
        self._write_soon()

    def note(self, name: str) -> None:
        """One more of what is no request's outcome."""
        self._notes[name] += 1
        self._write_soon()

    async def flush(self) -> bool:
        """Write what was counted. Whether it was written."""
        async with self._at_the_file:
            return await self._flush()

    async def _flush(self) -> bool:
        new, self._new = self._new, {}
        notes, self._notes = self._notes, Counter()
        if await self._file.do(lambda db: _add(db, new, notes), False):
            return True
        for key, count in new.items():
            self._new[key] = self._new.get(key, Count()) + count
        self._notes += notes
        if self._new or self._notes:
            self._write_soon()
        return False

    async def totals(self) -> dict[Key, Count]:
        """Since the file began, with what is not written yet; empty when it cannot be read."""
        nothing: dict[Key, Count] = {}
        async with self._at_the_file:  # else another flush may have some of them on its way
            await self._flush()
            totals = await self._file.ask(_read, nothing)
        for key, count in self._new.items():
            totals[key] = totals.get(key, Count()) + count
        return totals

    async def noted(self) -> dict[str, int]:
        """How often what was noted, as `totals` has it."""
        nothing: dict[str, int] = {}
        async with self._at_the_file:
            await self._flush()
            return dict(self._notes + Counter(await self._file.ask(_read_notes, nothing)))

    async def close(self) -> None:
        await self.flush()
        if self._writing:
            self._writing.cancel()
        await self._file.close()

    def _write_soon(self) -> None:
        if not self._writing:
            self._writing = asyncio.get_running_loop().call_later(self._write_every, self._write)

    def _write(self) -> None:
        self._writing = None
        self._flushing = asyncio.ensure_future(self.flush())


def metrics(totals: Mapping[Key, Count]) -> bytes:
    """In Prometheus' format, by class of request; a rental's label would be a new series for every box."""
    classes: dict[str, Count] = {}
    for (_, cls), count in totals.items():
        classes[cls] = classes.get(cls, Count()) + count
    told = {
        "requests": ("Requests, by how they were answered", ("hits", "misses", "bypasses")),
        "saved_tokens": ("Tokens of answers that were not generated again", ("input_tokens", "output_tokens")),
        "saved_gpu_seconds": ("Seconds these answers had once taken", ("gpu_seconds",)),
    }
    lines = []
    for name, (help, parts) in told.items():
        lines += [f"# HELP selfhost_cache_{name}_total {help}", f"# TYPE selfhost_cache_{name}_total counter"]
        for cls, count in sorted(classes.items()):
            for part in parts:
                lines.append(f'selfhost_cache_{name}_total{{class="{cls}",kind="{part}"}} {getattr(count, part)}')
    return "".join(f"{line}\n" for line in lines).encode()


def total(counts: Iterable[Count]) -> Count:
    return sum(counts, Count())


_NAMES = [field.name for field in fields(Count)]
_UPSERT = (
    f"INSERT INTO counts (label, class, {', '.join(_NAMES)}) VALUES (?, ?{', ?' * len(_NAMES)})"
    f" ON CONFLICT (label, class) DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in _NAMES)}"
)


def _add(db: sqlite3.Connection, counts: dict[Key, Count], notes: dict[str, int]) -> bool:
    db.executemany(_UPSERT, [(*key, *astuple(count)) for key, count in counts.items()])
    upsert = "INSERT INTO notes VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET count = count + excluded.count"
    db.executemany(upsert, list(notes.items()))
    return True


def _read_notes(db: sqlite3.Connection) -> dict[str, int]:
    return dict(db.execute("SELECT name, count FROM notes"))


def _read(db: sqlite3.Connection) -> dict[Key, Count]:
    rows = db.execute(f"SELECT label, class, {', '.join(_NAMES)} FROM counts")
    return {(label, cls): Count(*numbers) for label, cls, *numbers in rows}
