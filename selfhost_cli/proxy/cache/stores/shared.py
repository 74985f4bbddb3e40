"""The store of a team, or of one's own laptops: a Redis, or a cluster of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from redis.crc import key_slot
from redis.exceptions import MovedError, ResponseError

from selfhost_cli.proxy.cache.stores import Size, StoreDown
from selfhost_cli.proxy.cache.stores.address import Address
from selfhost_cli.proxy.cache.stores.link import Answer, Lost, Node, Word

LEASE = ":lease"
"""Behind the name of what is leased: an ACL that allows the one name allows the other."""
TAKE = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
LEAVE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
SLOTS = 2**14
AT_ONCE = 500
"""Keys that are asked for in one go when all are gone through."""
MOST_ON_THE_WAY = 32 * 2**20
"""Bytes that may wait to be kept on a slow line; more is not kept."""
TIMEOUT_S, PATIENCE_S = 0.05, 5.0
BACKOFF_S = (0.25, 30.0)
REDISCOVER_S = 60.0

log = logging.getLogger("selfhost.proxy")
Place = tuple[str, int]


class SharedStore:
    """A request waits for it for `timeout` seconds at most; who finds it slow or dead is the last one to wait.

    From then on it costs nothing, until it was seen well in the background. `patience`: seconds for connecting, with
    TLS and AUTH, there. What is kept is on its way when `put` returns; on a slow line it arrives later.
    """

    def __init__(
        self,
        address: Address,
        *,
        timeout: float = TIMEOUT_S,
        patience: float = PATIENCE_S,
        backoff: tuple[float, float] = BACKOFF_S,
    ) -> None:
        self._address = address
        self._timeout, self._patience, self._backoff = timeout, patience, backoff
        self._nodes: dict[Place, Node] = {}
        self._slots: list[Node | None] = []
        """Of a cluster: who has it, by slot."""
        self._refusals: dict[str, str] = {}
        self._on_the_way = 0
        self._changed = asyncio.Event()
        self._known = asyncio.Event()
        self._undiscovered = "it is not connected yet"
        self._discovering: asyncio.Task[None] | None = None

    @property
    def trouble(self) -> str:
        nodes = self._primaries()
        broken = [f"Redis at {node.address}: {node.trouble}" for node in nodes if not node.well]
        if self._address.cluster and self._undiscovered:
            broken.append(f"Redis cluster at {self._address}: {self._undiscovered}")
        if not nodes and not broken:
            broken.append(f"Redis at {self._address}: it is not connected yet")
        refused = [f"Redis at {self._address} refuses {command}: {why}" for command, why in self._refusals.items()]
        return next(iter(broken + refused), "")

    async def start(self) -> None:
        self._node((self._address.host, self._address.port))
        if self._address.cluster:
            self._discovering = asyncio.create_task(self._discover())

    async def close(self) -> None:
        if self._discovering:
            self._discovering.cancel()
            await asyncio.gather(self._discovering, return_exceptions=True)
        await asyncio.gather(*(node.close() for node in self._nodes.values()))
        self._nodes.clear()

    async def get(self, name: str) -> bytes | None:
        answer = await self._ask(name, "GET", name)
        return answer if isinstance(answer, bytes) else None

    async def put(self, name: str, sealed: bytes, ttl: float) -> None:
        node = self._of(name)
        if not node or self._on_the_way + len(sealed) > MOST_ON_THE_WAY:
            return
        sent = node.send("SET", name, sealed, "PX", max(1, round(ttl * 1000)))
        if sent is None:
            return
        self._on_the_way += len(sealed)

        def arrived(future: asyncio.Future[Answer]) -> None:
            self._on_the_way -= len(sealed)
            self._judged("SET", future.result(), name)

        sent.add_done_callback(arrived)
        await asyncio.wait([sent], timeout=self._timeout)

    async def delete(self, name: str) -> bool:
        return await self._ask(name, "DEL", name) == 1

    async def take(self, name: str, owner: str, seconds: float) -> bool:
        lease = name + LEASE
        answer = await self._ask(lease, "EVAL", TAKE, 1, lease, owner, max(1, round(seconds * 1000)))
        return answer != 0

    async def leave(self, name: str, owner: str) -> None:
        lease = name + LEASE
        await self._ask(lease, "EVAL", LEAVE, 1, lease, owner)

    async def names(self, prefix: str) -> AsyncIterator[str]:
        for node in await self._reached():
            async for batch in self._scan(node, prefix):
                for name in batch:
                    yield name

    async def size(self, prefix: str) -> Size:
        """`evictions` are those of the whole Redis, whoever's they were."""
        sizes: dict[str, int] = {}
        evictions: int | None = 0
        for node in await self._reached():
            async for batch in self._scan(node, prefix):
                asked = [self._sent(node, "STRLEN", name) for name in batch]
                for name, bytes_ in zip(batch, await asyncio.gather(*asked), strict=True):
                    if found := self._certain(node, bytes_, int):  # else it has gone since
                        sizes[name] = found
            evicted = _evicted(await self._sent(node, "INFO", "stats"))
            evictions = None if evictions is None or evicted is None else evictions + evicted
        return Size(len(sizes), sum(sizes.values()), evictions)

    # --- one question ---

    async def _ask(self, key: str, command: str, *words: Word) -> Answer:
        node = self._of(key)
        if not node:
            return Lost("nobody has it")
        answer = await node.call(command, *words)
        if isinstance(answer, Lost):
            self._changed.set()
        return self._judged(command, answer, key)

    def _judged(self, command: str, answer: Answer, key: str) -> Answer:
        """Remembers what is refused, for as long as it is; and where a key has gone to in a cluster."""
        if isinstance(answer, MovedError) and self._slots:
            # its new place is asked next time: to follow now would be a second wait
            self._slots[key_slot(key.encode())] = self._nodes.get((answer.host, answer.port))
            self._changed.set()
        elif isinstance(answer, ResponseError):
            if self._refusals.get(command) != str(answer):
                log.warning("Redis at %s refuses %s: %s", self._address, command, answer)
            self._refusals[command] = str(answer)
        elif self._refusals and not isinstance(answer, Lost):
            self._refusals.pop(command, None)
        return answer

    def _of(self, key: str) -> Node | None:
        if not self._address.cluster:
            return next(iter(self._nodes.values()), None)
        return self._slots[key_slot(key.encode())] if self._slots else None

    # --- all of it ---

    async def _reached(self) -> list[Node]:
        """Everyone that has something. Raises StoreDown when one of them cannot be reached."""
        try:
            async with asyncio.timeout(2 * self._patience):
                if self._address.cluster:
                    await self._known.wait()
                for node in self._primaries():
                    await node.tried.wait()
        except TimeoutError:
            pass
        nodes = self._primaries()
        if not nodes or not all(node.well for node in nodes) or None in self._slots:
            raise StoreDown(self.trouble or f"Redis cluster at {self._address}: a part of it has no server")
        return nodes

    async def _scan(self, node: Node, prefix: str) -> AsyncIterator[list[str]]:
        pattern = "".join(f"\\{char}" if char in "*?[]\\" else char for char in prefix) + "*"
        cursor: bytes = b"0"
        while True:
            found = await self._sent(node, "SCAN", cursor, "MATCH", pattern, "COUNT", AT_ONCE)
            cursor, names = self._certain(node, found, list)
            decoded = (name.decode("utf-8", "replace") for name in names)
            yield [name for name in decoded if not name.endswith(LEASE)]
            if cursor == b"0":
                return

    async def _sent(self, node: Node, *words: Word) -> Answer:
        sent = node.send(*words)
        return Lost(node.trouble) if sent is None else await sent

    def _certain(self, node: Node, answer: Answer, kind: type[Any]) -> Any:
        if isinstance(answer, kind):
            return answer
        why = answer.why if isinstance(answer, Lost) else str(answer)
        raise StoreDown(f"Redis at {node.address}: {why}")

    # --- a cluster ---

    def _primaries(self) -> list[Node]:
        if not self._address.cluster:
            return list(self._nodes.values())
        return list(dict.fromkeys(node for node in self._slots if node))

    def _node(self, place: Place) -> Node:
        if place not in self._nodes:
            address = replace(self._address, host=place[0], port=place[1])
            self._nodes[place] = Node(address, self._timeout, self._patience, self._backoff)
        return self._nodes[place]

    async def _discover(self) -> None:
        """Who has which slots; again when one of them is gone, when one says that it has moved, and every minute."""
        while True:
            self._changed.clear()
            for node in self._nodes.values():
                await node.tried.wait()
            answers = [(node, await self._sent(node, "CLUSTER", "SLOTS")) for node in self._nodes.values() if node.well]
            table = next(((node, answer) for node, answer in answers if isinstance(answer, list)), None)
            if table:
                self._undiscovered = ""
                await self._settle(*table)
            elif answers:
                _, answer = answers[0]
                self._undiscovered = answer.why if isinstance(answer, Lost) else str(answer)
            else:
                self._undiscovered = next(iter(self._nodes.values())).trouble
            self._known.set()
            try:
                async with asyncio.timeout(REDISCOVER_S if self._steady() else self._backoff[0]):
                    await self._changed.wait()
                await asyncio.sleep(self._backoff[0])  # requests may say it many times a second
            except TimeoutError:
                pass

    def _steady(self) -> bool:
        return bool(self._slots) and None not in self._slots and all(node.well for node in self._primaries())

    async def _settle(self, told: Node, table: list[Any]) -> None:
        slots: list[Node | None] = [None] * SLOTS
        for first, last, (host, port, *_), *_ in table:
            # an empty host: the one that was asked
            place = (host.decode() if host else told.address.host, int(port))
            slots[first : last + 1] = [self._node(place)] * (last + 1 - first)
        self._slots = slots
        kept = {id(node) for node in [self._node((self._address.host, self._address.port)), *self._primaries()]}
        for place in [place for place, node in self._nodes.items() if id(node) not in kept]:
            await self._nodes.pop(place).close()
        for node in self._primaries():
            await node.tried.wait()


def _evicted(answer: Answer) -> int | None:
    """What INFO says; None where it is not allowed."""
    lines = answer.decode().splitlines() if isinstance(answer, bytes) else []
    return next((int(line.partition(":")[2]) for line in lines if line.startswith("evicted_keys:")), None)
