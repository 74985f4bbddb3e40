"""The file of answers: its owner's alone, within its bounds, and never a reason for a request to fail."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.proxy.cache import database
from selfhost_cli.proxy.cache.stores import StoreDown
from selfhost_cli.proxy.cache.stores.local import LocalStore
from tests.proxy.kit import asynchronous, eventually

MB = 2**20
NAME = "selfhost:1:mine:aaaa"


@asynccontextmanager
async def opened(path: Path, max_bytes: int = 64 * MB, **settings: Any) -> AsyncIterator[LocalStore]:
    store = LocalStore(path, max_bytes, **settings)
    await store.start()
    try:
        yield store
    finally:
        await store.close()


async def fill(store: LocalStore, count: int, size: int = 10_000) -> list[str]:
    names = [f"selfhost:1:mine:{number:04}" for number in range(count)]
    for name in names:
        await store.put(name, random.randbytes(size), 600)
    return names


async def held(store: LocalStore) -> set[str]:
    return {name async for name in store.names("selfhost:")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@asynchronous
async def test_its_files_are_its_owners_alone_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        async with opened(path) as store:
            await fill(store, 3)
            assert {(file.name, file.stat().st_mode & 0o777) for file in path.parent.iterdir()} == {
                ("cache.db", 0o600),
                ("cache.db-wal", 0o600),
                ("cache.db-shm", 0o600),
            }
    finally:
        os.umask(before)


@asynchronous
async def test_the_file_stays_within_its_bound_and_what_was_not_used_for_longest_goes(path: Path) -> None:
    clock = iter(range(10**6))
    async with opened(path, MB, now=lambda: next(clock) / 1000) as store:
        for number, name in enumerate(await fill(store, 60)):
            assert bool(await store.get(name)) == (name in await held(store)), number
        favourite = "selfhost:1:mine:0001"
        for number in range(300):
            assert await store.get(favourite), number
            await store.put(f"selfhost:1:other:{number:04}", random.randbytes(10_000), 600)
        size = await store.size("selfhost:")
        others = {name for name in await held(store) if ":other:" in name}
        assert others == {f"selfhost:1:other:{number:04}" for number in range(300 - len(others), 300)}
        assert size.evictions == 360 - size.entries
        assert 50 < size.entries < 105
    assert path.stat().st_size <= MB


@asynchronous
async def test_a_hit_writes_nothing_until_many_are_written_at_once(path: Path) -> None:
    with closing(sqlite3.connect(":memory:")) as watcher:
        async with opened(path, refresh_every=600) as store:
            names = await fill(store, 20)
            watcher.execute("ATTACH ? AS file", (str(path),))

            def version() -> int:
                return int(watcher.execute("PRAGMA file.data_version").fetchone()[0])

            before = version()
            for name in names:
                assert await store.get(name)
                await asyncio.sleep(0)
            assert (await store.size("selfhost:")).entries == 20  # whatever was to be written before is
            assert version() == before
        assert version() != before


@asynchronous
async def test_hits_are_written_down_while_it_runs(path: Path) -> None:
    async with opened(path, refresh_every=0.05, now=iter(range(100)).__next__) as store:
        [name] = await fill(store, 1)
        assert await store.get(name)
        with closing(sqlite3.connect(path)) as watcher:
            await eventually(lambda: watcher.execute("SELECT used FROM entries").fetchone() == (1.0,))


@asynchronous
async def test_the_last_use_is_known_after_a_restart(path: Path) -> None:
    async with opened(path, MB) as store:
        first, *_ = await fill(store, 50)
        assert await store.get(first)
    async with opened(path, MB) as store:
        for number in range(80):
            await store.put(f"selfhost:1:other:{number}", random.randbytes(10_000), 600)
        kept = {name for name in await held(store) if ":mine:" in name}
        assert first in kept
        assert len(kept) < 20


@asynchronous
async def test_one_answer_may_not_drive_out_all_others(path: Path) -> None:
    async with opened(path, MB) as store:
        names = await fill(store, 10)
        await store.put(NAME, bytes(MB), 600)
        assert await held(store) == set(names)


@asynchronous
async def test_what_is_flushed_is_given_back_to_the_disk(path: Path) -> None:
    async with opened(path) as store:
        names = await fill(store, 300, 20_000)
        for name in names:
            assert await store.delete(name)
    assert path.stat().st_size < MB


WRITER = """
import asyncio, sys
from pathlib import Path
from selfhost_cli.proxy.cache.stores.local import LocalStore

async def main():
    store = LocalStore(Path(sys.argv[1]), 2**24)
    await store.start()
    for number in range(10**6):
        await store.put(f"selfhost:1:mine:{number}", b"%d" % number * 1000, 600)
        print(number, flush=True)

asyncio.run(main())
"""


@asynchronous
async def test_what_was_kept_survives_a_kill_in_the_middle_of_writing(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        lines = iter(writer.stdout)
        last = [int(next(lines)) for _ in range(50)][-1]
        writer.send_signal(signal.SIGKILL)
    async with opened(path) as store:
        names = await held(store)
        assert {f"selfhost:1:mine:{number}" for number in range(last + 1)} <= names
        for number in range(last + 1):
            assert await store.get(f"selfhost:1:mine:{number}") == b"%d" % number * 1000
        await store.put(NAME, b"more", 600)
        assert await store.get(NAME) == b"more"
        assert not store.trouble


@asynchronous
async def test_another_process_may_flush_while_this_one_writes(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        try:
            assert next(iter(writer.stdout))
            async with opened(path) as store:
                gone = 0
                async with asyncio.timeout(20):
                    while gone < 100:
                        for name in await held(store):
                            gone += await store.delete(name)
                assert not store.trouble
        finally:
            writer.kill()


@pytest.mark.parametrize("content", [b"", b"this is no database\n" * 500, b"SQLite format 3\0" + bytes(4080)])
@asynchronous
async def test_a_file_that_is_no_cache_is_put_aside_and_begun_anew(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    async with opened(path) as store:
        await store.put(NAME, b"answer", 600)
        assert await store.get(NAME) == b"answer"
        assert not store.trouble
    assert path.with_name("cache.db.unreadable").read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o600


@asynchronous
async def test_the_file_of_another_version_is_put_aside(path: Path) -> None:
    async with opened(path) as store:
        await fill(store, 3)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    async with opened(path) as store:
        assert await held(store) == set()
        assert not store.trouble


@asynchronous
async def test_a_file_that_is_damaged_later_is_put_aside_too(path: Path) -> None:
    async with opened(path) as store:
        names = await fill(store, 400)
    with path.open("r+b") as file:  # all but what is read at the opening
        file.seek(3 * 4096)
        file.write(random.randbytes(path.stat().st_size - 3 * 4096))
    async with opened(path) as store:

        async def begun_anew() -> None:
            while not path.with_name("cache.db.unreadable").exists() or store.trouble:
                for name in names:
                    await store.get(name)
                await store.put(NAME, b"answer", 600)

        await asyncio.wait_for(begun_anew(), 20)
        await store.put(NAME, b"answer", 600)
        assert await store.get(NAME) == b"answer"


@asynchronous
async def test_a_file_that_is_removed_is_begun_anew(path: Path) -> None:
    async with opened(path) as store:
        await fill(store, 3)
        path.unlink()  # and not its log, as people do
        await store.put(NAME, b"answer", 600)
        assert await held(store) == {NAME}
        assert await store.get(NAME) == b"answer"
    async with opened(path) as store:
        assert await held(store) == {NAME}


@asynchronous
async def test_a_full_disk_keeps_nothing_more_and_the_rest_is_served(path: Path) -> None:
    async with opened(path) as store:
        [first] = await fill(store, 1)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limit[1]))
        try:
            await store.put(NAME, random.randbytes(200_000), 600)
            assert str(path) in store.trouble
            assert await store.get(NAME) is None
            assert await store.get(first)
            assert await store.take(NAME, "me", 60) is True
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        await store.put(NAME, b"answer", 600)
        assert await store.get(NAME) == b"answer"
        assert not store.trouble


@asynchronous
async def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with opened(tmp_path / "file" / "cache.db") as store:
        await store.put(NAME, b"answer", 600)
        assert await store.get(NAME) is None
        assert "Not a directory" in store.trouble
        with pytest.raises(StoreDown, match=r"cache\.db"):
            await store.size("selfhost:")


@asynchronous
async def test_a_file_that_another_process_holds_is_trouble_and_no_more(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCKED_S", 0.05)
    async with opened(path) as store:
        [name] = await fill(store, 1)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await store.put(NAME, b"answer", 600)
            assert "locked" in store.trouble
            assert await store.get(name)
            with suppress(sqlite3.Error):
                other.execute("ROLLBACK")
        await store.put(NAME, b"answer", 600)
        assert await store.get(NAME) == b"answer"
        assert not store.trouble
