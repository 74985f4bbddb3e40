"""The questions that were answered, and which of them are near to a new one: exact search in a bounded number.

They survive restarts in a file of their own, where each is sealed with its vector: what developers ask is theirs, and a
vector tells nearly as much as its text.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from selfhost_cli.proxy.cache.database import Database
from selfhost_cli.proxy.cache.seal import Seal
from selfhost_cli.proxy.cache.semantic.embed import Vector
from selfhost_cli.proxy.codec import decode, encode

CAPACITY = 2048
"""Questions; 3 MB of vectors with 384 numbers each, and searched in well under a millisecond."""
LARGEST = 2**18
"""Bytes of one, opened."""
VERSION = 1
SCHEMA = f"""
CREATE TABLE questions (id TEXT NOT NULL UNIQUE, sealed BLOB NOT NULL);
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True)
class Known:
    """A question that was answered. `key`: under which the exact cache keeps the answer."""

    scope: str
    text: str
    key: str


@dataclass(frozen=True)
class Near:
    known: Known
    similarity: float


@dataclass
class _Slot:
    known: Known
    id: str
    """In the file. Random: a hash of the question would tell it to whoever guesses it."""


class Index:
    """Of one embedder's vectors, by its name. Without a path they are kept in memory alone.

    A file that cannot be used costs what is in it, and nothing else: `trouble` says why.
    """

    def __init__(self, embedder: str, path: Path | None = None, seal: Seal | None = None, size: int = CAPACITY) -> None:
        """Raises ValueError for a path without a seal."""
        if path and not seal:
            raise ValueError("questions are kept in a file sealed, or not at all")
        self._embedder = embedder
        self._seal = seal
        self._file = Database(path, SCHEMA, VERSION) if path else None
        self._size = size
        self._slots: list[_Slot] = []
        self._scopes = np.zeros(size, dtype=np.int64)
        self._vectors = np.zeros((size, 0), dtype=np.float32)
        self._used: OrderedDict[tuple[str, str], int] = OrderedDict()
        """Which slot a question is in; the one that was not asked for longest comes first."""

    @property
    def trouble(self) -> str:
        trouble = self._file.trouble if self._file else ""
        return f"the semantic cache's {self._file.path}: {trouble}" if self._file and trouble else ""

    def __len__(self) -> int:
        return len(self._used)

    async def start(self) -> None:
        """Read what is in the file."""
        if self._file:
            nothing: list[tuple[Known, str, Vector]] = []
            for known, id, vector in await self._file.ask(self._read, nothing):
                self._put(_Slot(known, id), vector)

    async def close(self) -> None:
        if self._file:
            await self._file.close()

    def near(self, scope: str, vector: Vector, least: float, most: int) -> list[Near]:
        """What is at least that similar, the most similar first."""
        rows = np.flatnonzero(self._scopes[: len(self._slots)] == _number(scope))
        if not len(rows) or len(vector) != self._vectors.shape[1]:
            return []
        similar = self._vectors[rows] @ vector
        best = np.argsort(-similar, kind="stable")[:most]
        found = [Near(self._slots[int(rows[i])].known, float(similar[i])) for i in best if similar[i] >= least]
        return [one for one in found if one.known.scope == scope]

    def use(self, known: Known) -> None:
        """It was asked for again: others have to go before it."""
        if (known.scope, known.text) in self._used:
            self._used.move_to_end((known.scope, known.text))

    async def learn(self, known: Known, vector: Vector) -> None:
        """In the place of what was known of the same question; the one not asked for longest goes when it is full."""
        slot = _Slot(known, secrets.token_hex(16))
        gone = self._put(slot, vector)
        if self._file:
            sealed = self._shut(slot, vector)
            await self._file.ask(partial(_write, id=slot.id, sealed=sealed, gone=gone), None)

    async def forget(self, key: str) -> None:
        """The answer under that key is no more."""
        for question, number in list(self._used.items()):
            if self._slots[number].known.key == key:
                del self._used[question]
                self._scopes[number] = 0
                if self._file:
                    await self._file.ask(partial(_write, id="", sealed=b"", gone=[self._slots[number].id]), None)

    def _put(self, slot: _Slot, vector: Vector) -> list[str]:
        """The ids of those that had to go."""
        if len(vector) != self._vectors.shape[1]:
            if self._used:
                return [slot.id]  # an embedder that changed its mind
            self._vectors = np.zeros((self._size, len(vector)), dtype=np.float32)
        question = (slot.known.scope, slot.known.text)
        number, gone = self._place(question)
        self._slots[number : number + 1] = [slot]
        self._scopes[number] = _number(slot.known.scope)
        self._vectors[number] = vector
        self._used[question] = number
        self._used.move_to_end(question)
        return gone

    def _place(self, question: tuple[str, str]) -> tuple[int, list[str]]:
        if question in self._used:
            number = self._used[question]
        elif len(self._slots) < self._size:
            return len(self._slots), []
        else:
            taken = set(self._used.values())
            free = [number for number in range(self._size) if number not in taken]
            number = free[0] if free else self._used.popitem(last=False)[1]
        return number, [self._slots[number].id]

    def _shut(self, slot: _Slot, vector: Vector) -> bytes:
        assert self._seal
        head = encode([self._embedder, slot.known.scope, slot.known.text, slot.known.key])
        return self._seal.shut(head + b"\n" + vector.astype("<f4").tobytes(), _sealed_as(slot.id))

    def _read(self, db: sqlite3.Connection) -> list[tuple[Known, str, Vector]]:
        """In the file's thread. What does not open, or is another embedder's, goes."""
        assert self._seal
        found: list[tuple[Known, str, Vector]] = []
        gone: list[str] = []
        for id, sealed in db.execute("SELECT id, sealed FROM questions ORDER BY rowid DESC"):
            plain = self._seal.open(sealed, _sealed_as(id), LARGEST)
            head, _, numbers = (plain or b"[]").partition(b"\n")
            embedder, *rest = decode(head) or [""]
            if embedder != self._embedder or len(found) == self._size:
                gone.append(id)
            else:
                found.append((Known(*rest), id, np.frombuffer(numbers, dtype="<f4").astype(np.float32)))
        _write(db, "", b"", gone)
        return found[::-1]


def _sealed_as(id: str) -> str:
    return f"question:{VERSION}:{id}"


def _number(scope: str) -> int:
    """Of a scope, for the search; 0 is nobody's. Two may share one, so the scope itself is looked at, too."""
    return int.from_bytes(hashlib.sha256(scope.encode()).digest()[:7], "big") + 1


def _write(db: sqlite3.Connection, id: str, sealed: bytes, gone: list[str]) -> None:
    db.executemany("DELETE FROM questions WHERE id = ?", [(one,) for one in gone])
    if id:
        db.execute("INSERT INTO questions (id, sealed) VALUES (?, ?)", (id, sealed))
