"""What every store does: one file, one Redis, a cluster of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from selfhost_cli.proxy.cache.stores import Size, Store, StoreDown
from selfhost_cli.proxy.cache.stores.address import Address, parse
from selfhost_cli.proxy.cache.stores.local import LocalStore
from selfhost_cli.proxy.cache.stores.shared import SharedStore
from tests.proxy.cache.redis_server import free_ports
from tests.proxy.kit import asynchronous

Make = Callable[[], Store]
A, B = "selfhost:1:mine:aaaa", "selfhost:1:mine:bbbb"
EVERY_BYTE = bytes(range(256)) * 20


def shared(address: Address) -> SharedStore:
    """With a deadline for a busy machine: these tests are about what it does, not how fast."""
    return SharedStore(address, timeout=5, backoff=(0.01, 0.05))


@pytest.fixture(params=["file", "redis", "cluster"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """A store at a place that is the same for one test."""
    match request.param:
        case "file":
            return lambda: LocalStore(tmp_path / "cache.db", 2**24)
        case "redis":
            address = parse(request.getfixturevalue("redis").url)
            return lambda: shared(address)
    cluster = parse(request.getfixturevalue("cluster")[0].url, cluster=True)
    return lambda: shared(cluster)


@pytest.fixture(params=["file", "redis", "cluster"])
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    nobody = Address(port=free_ports(1)[0])
    match request.param:
        case "file":
            return lambda: LocalStore(tmp_path / "no folder" / "cache.db", 2**24)
        case "redis":
            return lambda: shared(nobody)
    return lambda: shared(replace(nobody, cluster=True))


@asynccontextmanager
async def opened(store: Store) -> AsyncIterator[Store]:
    await store.start()
    try:
        await until(lambda: is_well(store))
        yield store
    finally:
        await store.close()


async def is_well(store: Store) -> bool:
    return not store.trouble


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.005)


@asynchronous
async def test_what_was_put_comes_back_byte_for_byte_and_nothing_else(make: Make) -> None:
    async with opened(make()) as store:
        assert await store.get(A) is None
        await store.put(A, EVERY_BYTE, 60)
        assert await store.get(A) == EVERY_BYTE
        assert await store.get(B) is None
        await store.put(A, b"later", 60)
        assert await store.get(A) == b"later"


@asynchronous
async def test_it_is_there_for_another_one_at_the_same_place_and_after_a_restart(make: Make) -> None:
    async with opened(make()) as one, opened(make()) as other:
        await one.put(A, b"answer", 60)
        assert await other.get(A) == b"answer"
    async with opened(make()) as later:
        assert await later.get(A) == b"answer"


@asynchronous
async def test_what_is_too_old_is_not_there(make: Make) -> None:
    async with opened(make()) as store:
        await store.put(A, b"short", 0.05)
        await store.put(B, b"long", 60)

        async def gone() -> bool:
            return await store.get(A) is None

        await until(gone)
        assert await store.delete(A) is False
        assert [name async for name in store.names("selfhost:")] == [B]
        assert (await store.size("selfhost:")).entries == 1


@asynchronous
async def test_deleting_tells_whether_it_was_there(make: Make) -> None:
    async with opened(make()) as store:
        await store.put(A, b"answer", 60)
        assert await store.delete(A) is True
        assert await store.get(A) is None
        assert await store.delete(A) is False


@asynchronous
async def test_the_names_and_the_size_are_those_of_a_prefix_without_leases(make: Make) -> None:
    names = [f"selfhost:1:mine:{number:04}" for number in range(1200)]
    async with opened(make()) as store:
        await asyncio.gather(*(store.put(name, b"12345", 60) for name in names))
        for other in ("selfhost:1:min", "selfhost:1:miner:1", "selfhost:2:mine:1"):
            await store.put(other, b"other", 60)
        assert await store.take(names[0], "me", 60)
        assert sorted([name async for name in store.names("selfhost:1:mine:")]) == names
        assert await store.size("selfhost:1:mine:") == Size(1200, 6000, 0)
        assert await store.size("selfhost:3:") == Size(0, 0, 0)


@asynchronous
async def test_a_prefix_is_taken_by_its_letters(make: Make) -> None:
    async with opened(make()) as store:
        for name in ("self*:[a]?", "selfhost:a", "self*:a"):
            await store.put(name, b"x", 60)
        assert [name async for name in store.names("self*:[a]?")] == ["self*:[a]?"]


@asynchronous
async def test_only_one_of_many_gets_the_lease(make: Make) -> None:
    async with opened(make()) as one, opened(make()) as other:
        stores = [one, other] * 10
        got = await asyncio.gather(*(store.take(A, f"owner {n}", 60) for n, store in enumerate(stores)))
        assert sorted(got) == [False] * 19 + [True]
        assert await other.take(B, "somebody", 60)


@asynchronous
async def test_a_lease_is_given_back_by_its_owner_alone(make: Make) -> None:
    async with opened(make()) as one, opened(make()) as other:
        assert await one.take(A, "me", 60)
        await other.leave(A, "you")
        assert not await other.take(A, "you", 60)
        await one.leave(A, "me")
        assert await other.take(A, "you", 60)
        assert not await one.take(A, "me", 60)


@asynchronous
async def test_a_lease_ends_by_itself_unless_its_owner_takes_it_again(make: Make) -> None:
    async with opened(make()) as other:
        async with opened(make()) as dead:
            assert await dead.take(A, "dead", 0.2)
            assert await dead.take(B, "dead", 0.2)
            assert await dead.take(B, "dead", 600)
        await until(lambda: other.take(A, "heir", 60))
        assert not await other.take(B, "heir", 60)


@asynchronous
async def test_what_is_closed_has_nothing_and_keeps_nothing(make: Make) -> None:
    async with opened(make()) as store:
        await store.put(A, b"answer", 60)
    await store.put(B, b"answer", 60)
    assert await store.get(A) is None
    assert await store.take(A, "me", 60) is True
    await store.leave(A, "me")
    with pytest.raises(StoreDown):
        await store.size("selfhost:")


@asynchronous
async def test_in_trouble_nothing_is_there_nobody_waits_and_a_person_is_told(broken: Make) -> None:
    store = broken()
    await store.start()
    try:
        for _ in range(2):
            await store.put(A, b"answer", 60)
            assert await store.get(A) is None
            assert await store.take(A, "me", 60) is True
            await store.leave(A, "me")
            assert await store.delete(A) is False
            with pytest.raises(StoreDown):
                await store.size("selfhost:")
            with pytest.raises(StoreDown) as told:
                _ = [name async for name in store.names("selfhost:")]
        assert store.trouble
        assert str(told.value)
    finally:
        await store.close()
