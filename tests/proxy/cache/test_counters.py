"""What the cache did is counted without touching the disk, and is not forgotten."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from selfhost_cli.proxy.cache import database
from selfhost_cli.proxy.cache.counters import Count, Counters, total
from tests.proxy.kit import asynchronous, eventually

HIT = {"input_tokens": 100, "output_tokens": 20, "gpu_seconds": 1.5}


@asynccontextmanager
async def opened(path: Path, write_every: float = 600) -> AsyncIterator[Counters]:
    counters = Counters(path, write_every=write_every)
    try:
        yield counters
    finally:
        await counters.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "counters.db"


@asynchronous
async def test_all_is_counted_by_rental_and_class_and_survives_a_restart(path: Path) -> None:
    async with opened(path) as counters:
        counters.count("hit", "label-1", "main", **HIT)
        counters.count("hit", "label-1", "main", **HIT)
        counters.count("miss", "label-1", "main")
        counters.count("bypass", "label-1", "compaction")
        counters.count("hit", "label-2", "main", **HIT)
    assert path.stat().st_mode & 0o777 == 0o600
    async with opened(path) as counters:
        counters.count("miss", "", "other")
        totals = await counters.totals()
    assert totals == {
        ("label-1", "main"): Count(2, 1, 0, 200, 40, 3.0),
        ("label-1", "compaction"): Count(bypasses=1),
        ("label-2", "main"): Count(1, 0, 0, 100, 20, 1.5),
        ("", "other"): Count(misses=1),
    }
    assert total(totals.values()) == Count(3, 2, 1, 300, 60, 4.5)
    assert total(totals.values()).ratio == 0.6
    assert Count(bypasses=3).ratio is None


@asynchronous
async def test_notes_add_up_over_restarts(path: Path) -> None:
    for _ in range(2):
        async with opened(path) as counters:
            counters.note("served")
            counters.note("served")
            counters.note("vetoed.number")
            await counters.flush()
            counters.note("asked")
    async with opened(path) as counters:
        assert await counters.noted() == {"served": 4, "vetoed.number": 2, "asked": 2}
        assert await counters.totals() == {}


@asynchronous
async def test_counting_writes_nothing_until_many_are_written_at_once(path: Path) -> None:
    async with opened(path) as counters:
        for _ in range(1000):
            counters.count("hit", "label", "main", **HIT)
            await asyncio.sleep(0)
        assert not path.exists()
    async with opened(path, 0.05) as counters:
        assert _hits(path) == 1000
        for hits in (1001, 1002):
            counters.count("hit", "label", "main", **HIT)
            await eventually(lambda wanted=hits: _hits(path) == wanted)  # type: ignore[misc]


def _hits(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT coalesce(sum(hits), 0) FROM counts").fetchone()[0])


@asynchronous
async def test_two_processes_add_to_the_same_counts(path: Path) -> None:
    async with opened(path) as one, opened(path) as other:
        one.count("hit", "label", "main", **HIT)
        other.count("hit", "label", "main", **HIT)
        assert await one.flush()
        assert (await other.totals())["label", "main"].hits == 2


@asynchronous
async def test_counts_wait_for_a_file_that_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOCKED_S", 0.05)
    async with opened(path, 0.05) as counters:
        counters.count("hit", "label", "main", **HIT)
        assert await counters.flush()
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            counters.count("hit", "label", "main", **HIT)
            assert not await counters.flush()
            assert "locked" in counters.trouble
            assert (await counters.totals())["label", "main"].hits == 2
            other.execute("ROLLBACK")
        await eventually(lambda: _hits(path) == 2)
        assert (await counters.totals())["label", "main"].hits == 2
        assert not counters.trouble


@asynchronous
async def test_a_folder_that_is_not_there_is_trouble_and_no_more(tmp_path: Path) -> None:
    async with opened(tmp_path / "nowhere" / "counters.db") as counters:
        counters.count("hit", "label", "main", **HIT)
        assert await counters.totals() == {("label", "main"): Count(1, 0, 0, 100, 20, 1.5)}
        assert "counters.db" in counters.trouble
