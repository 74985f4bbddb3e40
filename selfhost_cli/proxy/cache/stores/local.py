"""The store of one laptop: a SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from selfhost_cli.proxy.cache.database import Database
from selfhost_cli.proxy.cache.stores import Size, StoreDown

VERSION = 1
SCHEMA = f"""
CREATE TABLE entries (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL, used REAL NOT NULL, expires REAL NOT NULL
) STRICT;
CREATE INDEX entries_used ON entries (used);
CREATE INDEX entries_expires ON entries (expires);
CREATE TABLE answers (id INTEGER PRIMARY KEY, sealed BLOB NOT NULL) STRICT;
CREATE TRIGGER answers_go AFTER DELETE ON entries BEGIN DELETE FROM answers WHERE id = old.id; END;
CREATE TABLE leases (name TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) STRICT;
CREATE TABLE evictions (count INTEGER NOT NULL) STRICT;
INSERT INTO evictions VALUES (0);
PRAGMA user_version = {VERSION};
"""
REFRESH_S = 30.0
"""So long may a hit wait until it is written down as the entry's last use."""
ROW_BYTES = 2**14
"""More than an entry needs beside its answer."""
FREE_PAGES = 64
"""So many unused pages may a file keep; more are given back to the disk."""


class LocalStore:
    """Keeps the file within `max_bytes` (its log of at most some MB beside it): what was not used for longest goes.

    A hit is read in the event loop, from memory as a rule, and costs no write. Everything else is a thread's.
    """

    def __init__(
        self, path: Path, max_bytes: int, *, now: Callable[[], float] = time.time, refresh_every: float = REFRESH_S
    ) -> None:
        self._file = Database(path, SCHEMA, VERSION)
        self._max_bytes = max_bytes
        self._now = now
        self._refresh_every = refresh_every
        self._used: dict[str, float] = {}
        self._refreshing: asyncio.TimerHandle | None = None

    @property
    def trouble(self) -> str:
        return f"the cache's file {self._file.path}: {self._file.trouble}" if self._file.trouble else ""

    async def start(self) -> None:
        self._file.do(lambda db: None, None)

    async def close(self) -> None:
        if self._refreshing:
            self._refreshing.cancel()
        await self._refresh()
        await self._file.close()

    async def get(self, name: str) -> bytes | None:
        if not self._file.reader:
            return None
        now = self._now()
        query = "SELECT sealed FROM entries JOIN answers USING (id) WHERE name = ? AND expires > ?"
        try:
            found = self._file.reader.execute(query, (name, now)).fetchall()
        except sqlite3.Error as error:
            self._file.failed(error)
            return None
        if not found:
            return None
        self._used[name] = now
        if not self._refreshing:
            self._refreshing = asyncio.get_running_loop().call_later(self._refresh_every, self._refresh)
        return bytes(found[0][0])

    async def put(self, name: str, sealed: bytes, ttl: float) -> None:
        if len(sealed) > self._max_bytes // 2:  # everything else would have to go for it
            return
        now = self._now()
        used, self._used = self._used, {}

        def keep(db: sqlite3.Connection) -> None:
            _refresh(db, used)
            db.execute("DELETE FROM entries WHERE name = ? OR expires <= ?", (name, now))
            _make_room(db, self._max_bytes - len(sealed) - ROW_BYTES)
            values = (name, len(sealed), now, now + ttl)
            [(number,)] = db.execute(
                "INSERT INTO entries (name, bytes, used, expires) VALUES (?, ?, ?, ?) RETURNING id", values
            ).fetchall()
            db.execute("INSERT INTO answers VALUES (?, ?)", (number, sealed))
            _give_back(db)

        await self._file.do(keep, None)

    async def delete(self, name: str) -> bool:
        query, values = "DELETE FROM entries WHERE name = ? RETURNING expires > ?", (name, self._now())

        def remove(db: sqlite3.Connection) -> bool:
            gone = db.execute(query, values).fetchall()
            _give_back(db)
            return gone == [(1,)]

        return await self._file.do(remove, False)

    async def names(self, prefix: str) -> AsyncIterator[str]:
        query = "SELECT name FROM entries WHERE name >= ? AND name < ? AND expires > ?"
        for (name,) in await self._rows(query, prefix, prefix + "\U0010ffff", self._now()):
            yield name

    async def size(self, prefix: str) -> Size:
        query = (
            "SELECT count(*), coalesce(sum(bytes), 0), (SELECT count FROM evictions) FROM entries"
            " WHERE name >= ? AND name < ? AND expires > ?"
        )
        [(entries, total, evictions)] = await self._rows(query, prefix, prefix + "\U0010ffff", self._now())
        return Size(entries, total, evictions)

    async def take(self, name: str, owner: str, seconds: float) -> bool:
        now = self._now()

        def lease(db: sqlite3.Connection) -> bool:
            db.execute("DELETE FROM leases WHERE until <= ?", (now,))
            taken = db.execute(
                "INSERT INTO leases VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET until = excluded.until"
                " WHERE owner = excluded.owner RETURNING 1",
                (name, owner, now + seconds),
            )
            return bool(taken.fetchall())

        return await self._file.do(lease, True)

    async def leave(self, name: str, owner: str) -> None:
        query = "DELETE FROM leases WHERE name = ? AND owner = ?"
        await self._file.do(lambda db: db.execute(query, (name, owner)), None)

    async def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        rows = await self._file.ask(lambda db: db.execute(query, values).fetchall(), None)
        if rows is None:
            raise StoreDown(self.trouble)
        return rows

    def _refresh(self) -> asyncio.Future[None]:
        used, self._used, self._refreshing = self._used, {}, None
        return self._file.do(lambda db: _refresh(db, used), None)


def _refresh(db: sqlite3.Connection, used: dict[str, float]) -> None:
    db.executemany("UPDATE entries SET used = ? WHERE name = ?", [(at, name) for name, at in used.items()])


def _make_room(db: sqlite3.Connection, max_bytes: int) -> None:
    gone = 0
    while _bytes_in_use(db) > max_bytes:
        query = "DELETE FROM entries WHERE id = (SELECT id FROM entries ORDER BY used, id LIMIT 1)"
        if not db.execute(query).rowcount:
            break
        gone += 1
    db.execute("UPDATE evictions SET count = count + ?", (gone,))


def _bytes_in_use(db: sqlite3.Connection) -> int:
    """What the disk has to hold of it; costs no look at the entries."""
    pages, free, size = (
        int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _give_back(db: sqlite3.Connection) -> None:
    free = int(db.execute("PRAGMA freelist_count").fetchone()[0])
    for _ in range(free - FREE_PAGES):
        db.execute("PRAGMA incremental_vacuum(1)")  # Python takes one step of it, and that is one page
