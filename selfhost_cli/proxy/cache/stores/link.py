"""Connections to a Redis that are made and watched in the background, and its circuit breaker.

A request only ever uses what is connected already. Many share a connection: commands go out as they come, answers
come in the same order. So nobody waits for a free one, and a client that goes away breaks nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import deque
from typing import Any, TypeAlias

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import MovedError, RedisError, ResponseError

from selfhost_cli.proxy.cache.stores.address import Address

Word: TypeAlias = str | bytes | int
PROBE = "selfhost:probe"
"""A name that is asked for to see whether all is well. Nothing is ever kept under it."""
BULK_S = 30.0
"""So long may take what no request waits for."""
PING_S = 15.0
"""An unused connection is tried so often: better it than a request finds that it is dead."""
STEADY_S = 60.0
"""What was well for so long begins with the shortest wait again."""
PASSES = 4

log = logging.getLogger("selfhost.proxy")


class Lost:
    """In the place of an answer: there is none, and why."""

    def __init__(self, why: str) -> None:
        self.why = why


Answer: TypeAlias = bytes | int | list[Any] | ResponseError | Lost | None


class Link:
    """One connection. It ends, with all that waits for an answer, when one does not come within `deadline` seconds."""

    def __init__(self, connection: AbstractConnection, deadline: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._deadline = deadline
        self._unsent: list[tuple[list[bytes], asyncio.Future[Answer]]] = []
        self._waiting: deque[tuple[asyncio.Future[Answer], float]] = deque()
        self._heard = 0
        self._watching: asyncio.Handle | None = None
        self._wake = asyncio.Event()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self._tasks = [self._loop.create_task(self._write()), self._loop.create_task(self._read())]

    def send(self, *words: Word) -> asyncio.Future[Answer]:
        """A command; its future has a result in every case, and may be cancelled."""
        answer: asyncio.Future[Answer] = self._loop.create_future()
        if self.lost.done():
            answer.set_result(Lost(self.lost.result()))
            return answer
        self._unsent.append((self._connection.pack_command(*words), answer))
        self._wake.set()
        return answer

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._unsent

    def end(self, why: str) -> None:
        if self.lost.done():
            return
        why = why or "the connection was lost"
        self.lost.set_result(why)
        if self._watching:
            self._watching.cancel()
        for task in self._tasks:
            task.cancel()
        for answer in [answer for answer, _ in self._waiting] + [answer for _, answer in self._unsent]:
            if not answer.done():
                answer.set_result(Lost(why))

    async def close(self) -> None:
        self.end("it was closed")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connection.disconnect(nowait=True)

    async def _write(self) -> None:
        """What comes in the same moment leaves in one piece."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                unsent, self._unsent = self._unsent, []
                now = self._loop.time()
                self._waiting.extend((answer, now) for _, answer in unsent)
                if not self._watching:
                    self._watching = self._loop.call_later(self._deadline, self._watch)
                words = b"".join(word for packed, _ in unsent for word in packed)
                await self._connection.send_packed_command(words, check_health=False)
        except (RedisError, OSError) as error:
            self.end(str(error))

    async def _read(self) -> None:
        try:
            while True:
                answer = await self._response()
                waiting, _ = self._waiting.popleft()
                self._heard += 1
                if not waiting.done():
                    waiting.set_result(answer)
        except (RedisError, OSError, IndexError) as error:
            self.end("it said what it was not asked" if isinstance(error, IndexError) else str(error))

    async def _response(self) -> Answer:
        try:
            found: Answer = await self._connection.read_response(disable_decoding=True)
        except ResponseError as refusal:
            return refusal
        return found

    def _watch(self, quiet: int = 0, heard: int = -1) -> None:
        """Ends it when the oldest command is too old.

        When the loop was busy for as long, what came meanwhile is read first: that is not Redis's slowness.
        """
        self._watching = None
        if not self._waiting:
            return
        left = self._waiting[0][1] + self._deadline - self._loop.time()
        if left > 0:
            self._watching = self._loop.call_later(left, self._watch)
            return
        quiet = quiet + 1 if heard == self._heard else 0
        if quiet < PASSES:
            self._watching = self._loop.call_soon(self._watch, quiet, self._heard)
        else:
            self.end(f"it did not answer within {self._deadline * 1000:.0f} ms")


class Node:
    """One Redis: a link for what requests wait for, one for what takes its time, and the breaker of both.

    The first failure or slowness ends both. From then on nothing waits for it (`trouble` says why), until it was seen
    well in the background: connected within `patience` seconds, and a question answered as fast as requests need it.
    The waits between two tries grow from `backoff[0]` to `backoff[1]` seconds.
    """

    def __init__(self, address: Address, timeout: float, patience: float, backoff: tuple[float, float]) -> None:
        self.address = address
        self._trouble = "it is not connected yet"
        self.tried = asyncio.Event()
        """Set when it is known for the first time whether it can be reached."""
        self._timeout, self._patience, self._backoff = timeout, patience, backoff
        self._quick: Link | None = None
        self._bulk: Link | None = None
        self._links: list[Link] = []
        self._keeping = asyncio.get_running_loop().create_task(self._keep())

    @property
    def trouble(self) -> str:
        return self._quick.lost.result() if self._quick and self._quick.lost.done() else self._trouble

    @property
    def well(self) -> bool:
        return not self.trouble

    async def call(self, *words: Word) -> Answer:
        """Within the deadline of requests, or at once."""
        return await self._quick.send(*words) if self._quick else Lost(self.trouble)

    def send(self, *words: Word) -> asyncio.Future[Answer] | None:
        """What takes its time; None when in trouble."""
        return self._bulk.send(*words) if self._bulk and self.well else None

    async def close(self) -> None:
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)

    async def _keep(self) -> None:
        wait, longest = self._backoff
        loop = asyncio.get_running_loop()
        try:
            while True:
                began = loop.time()
                self._tell(await self._connected())
                await self._disconnect()
                if loop.time() - began > STEADY_S:
                    wait = self._backoff[0]
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # laptops of a team do not come all at once
                wait = min(2 * wait, longest)
        finally:
            await self._disconnect()

    async def _connected(self) -> str:
        """Connects and stays so for as long as it can. What ended it."""
        try:
            async with asyncio.timeout(self._patience):
                for deadline in (self._timeout, BULK_S):
                    self._links.append(await self._open(deadline))
            if trouble := await self._probe(self._links[0]):
                return trouble
            self._quick, self._bulk = self._links
            self._tell("")
            return await self._lost(self._links)
        except TimeoutError:
            return f"it could not be connected to within {self._patience:g} s{self._hint()}"
        except (RedisError, OSError, ValueError) as error:
            return str(error) or type(error).__name__

    async def _disconnect(self) -> None:
        self._quick = self._bulk = None
        links, self._links = self._links, []
        for link in links:
            await link.close()

    async def _open(self, deadline: float) -> Link:
        connection = _connection(self.address)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return Link(connection, deadline)

    async def _probe(self, link: Link) -> str:
        answer = await link.send("GET", PROBE)
        match answer:
            case Lost():
                return answer.why
            case MovedError():
                return "" if self.address.cluster else "it is a cluster: set redis_cluster to on"
            case ResponseError():
                return str(answer)
        return ""

    async def _lost(self, links: list[Link]) -> str:
        """When one of them is; until then they are tried while nobody uses them."""
        while True:
            done, _ = await asyncio.wait({link.lost for link in links}, timeout=PING_S, return_when="FIRST_COMPLETED")
            if done:
                return done.pop().result()
            for link in links:
                if link.idle:
                    link.send("PING")

    def _tell(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.log(logging.WARNING if trouble else logging.INFO, "Redis at %s: %s", self.address, trouble or "is well")
        self._trouble = trouble
        self.tried.set()

    def _hint(self) -> str:
        return " (does it speak TLS? redis_tls = off does without)" if self.address.tls else ""


def _connection(address: Address) -> AbstractConnection:
    options: dict[str, Any] = {
        "username": address.user or None,
        "password": address.password or None,
        "db": address.db,
        "protocol": 2,
        "socket_timeout": None,  # Link watches the answers
        "socket_connect_timeout": None,
    }
    if address.socket:
        return UnixDomainSocketConnection(path=address.socket, **options)
    options |= {"host": address.host, "port": address.port, "socket_keepalive": True}
    if not address.tls:
        return Connection(**options)
    if address.ca and not os.path.isfile(address.ca):
        raise ValueError(f"there is no file of certificates at {address.ca}")
    return SSLConnection(
        ssl_cert_reqs="required" if address.verify else "none",
        ssl_check_hostname=address.verify,
        ssl_ca_certs=address.ca or None,
        **options,
    )
