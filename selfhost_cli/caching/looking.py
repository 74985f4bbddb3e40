"""What is kept in the cache of answers and what came of it, for `selfhost cache`; and forgetting it."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Any, TypeVar

from selfhost_cli import caching
from selfhost_cli.config import Settings
from selfhost_cli.errors import SelfhostError
from selfhost_cli.proxy.cache import entry as entries
from selfhost_cli.proxy.cache import key
from selfhost_cli.proxy.cache.counters import Count, total
from selfhost_cli.proxy.cache.entry import Entry
from selfhost_cli.proxy.cache.stores import Size, Store, StoreDown

LISTED = 50
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stats:
    """`ratio`: hits among the requests that could have been one; None before there was any. `total` and `classes`:
    see `Count`. Dollars are the GPU seconds on the boxes that were there, as far as the ledger knows these.

    `trouble`: why the store could not be asked; its figures are None then.
    """

    enabled: bool
    store: str
    scope: str
    trouble: str
    entries: int | None
    bytes: int | None
    evictions: int | None
    ratio: float | None
    saved_dollars: float
    total: Count
    classes: dict[str, Count]
    similar: dict[str, int]
    """What became of questions for which similar ones were looked for, see docs/semantic.md."""


@dataclass(frozen=True)
class Kept:
    """One answer: its hash, class of request, model, age in seconds, tokens; its blocks only when it was asked for."""

    hash: str
    cls: str
    model: str
    age_s: float
    input_tokens: int
    output_tokens: int
    seconds: float
    blocks: list[dict[str, Any]] = field(default_factory=list)


def stats(settings: Settings, env: Mapping[str, str], prices: Mapping[str, float]) -> Stats:
    """`prices`: $ per hour of the GPU, by label. Raises UsageError."""
    counts = caching.counts(settings)
    classes: dict[str, Count] = {}
    for (_, cls), one in counts.items():
        classes[cls] = classes.get(cls, Count()) + one
    trouble, size = "", Size(0, 0, 0)
    try:
        size = asyncio.run(_size(settings, env))
    except StoreDown as error:
        trouble = str(error)
    return Stats(
        enabled=settings.cache_enabled,
        store=settings.cache_store,
        scope=caching.scope(settings),
        trouble=trouble,
        entries=None if trouble else size.entries,
        bytes=None if trouble else size.bytes,
        evictions=None if trouble else size.evictions,
        ratio=total(classes.values()).ratio,
        saved_dollars=sum(one.gpu_seconds / 3600 * prices.get(label, 0.0) for (label, _), one in counts.items()),
        total=total(classes.values()),
        classes=dict(sorted(classes.items())),
        similar=dict(sorted(caching.notes(settings).items())),
    )


def flush(settings: Settings, env: Mapping[str, str], model: str) -> int:
    """Forget this scope's answers, or one model's; how many there were. Raises SelfhostError when it is not done."""
    gone = _asked(_flush(settings, env, model))
    if not model:
        _forget_questions(settings)
    return gone


def kept(settings: Settings, env: Mapping[str, str], wanted: str) -> list[Kept]:
    """The answers whose hash begins so, the newest first, LISTED at most; with their blocks unless `wanted` is "".

    Raises SelfhostError when the store cannot be asked.
    """
    return _asked(_kept(settings, env, wanted))


def _asked(work: Coroutine[Any, Any, Result]) -> Result:
    try:
        return asyncio.run(work)
    except StoreDown as error:
        raise SelfhostError(str(error), "Run it again when the store can be reached.") from error


@asynccontextmanager
async def _opened(settings: Settings, env: Mapping[str, str]) -> AsyncIterator[Store]:
    store = caching.store(settings, env)
    await store.start()
    try:
        yield store
    finally:
        await store.close()


async def _size(settings: Settings, env: Mapping[str, str]) -> Size:
    async with _opened(settings, env) as store:
        return await store.size(_prefix(settings))


def _forget_questions(settings: Settings) -> None:
    """Those of which similar ones are looked for: without their answers they are of no use, and still somebody's."""
    if settings.paths.questions.exists():
        try:
            with closing(sqlite3.connect(settings.paths.questions)) as db, db:
                db.execute("DELETE FROM questions")
        except sqlite3.Error as error:
            path = settings.paths.questions
            raise SelfhostError(f"{path}: {error}", "The answers are forgotten; delete that file, too.") from error


async def _flush(settings: Settings, env: Mapping[str, str], model: str) -> int:
    gone = 0
    async with _opened(settings, env) as store:
        async for name in store.names(_prefix(settings)):
            entry = await _entry(settings, store, name) if model else None
            if not model or (entry and entry.model == model):
                gone += await store.delete(name)
    return gone


async def _kept(settings: Settings, env: Mapping[str, str], wanted: str) -> list[Kept]:
    found, now, prefix = [], time.time(), _prefix(settings)
    async with _opened(settings, env) as store:
        async for name in store.names(prefix + wanted):
            if one := await _entry(settings, store, name):
                tokens = one.input_tokens, one.output_tokens
                blocks = one.blocks if wanted else []
                found.append(Kept(name[len(prefix) :], one.cls, one.model, now - one.at, *tokens, one.seconds, blocks))
    return nlargest(LISTED, found, key=lambda one: -one.age_s)


async def _entry(settings: Settings, store: Store, name: str) -> Entry | None:
    sealed = await store.get(name)
    plain = caching.seal(settings).open(sealed, name, entries.LARGEST) if sealed else None
    return entries.unpack(plain) if plain else None


def _prefix(settings: Settings) -> str:
    return key.prefix(caching.scope(settings))
