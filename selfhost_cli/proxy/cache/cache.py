"""What a request meets before any box: an answer that is kept, somebody who asks the same already, or the way on."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from aiohttp import hdrs, web
from multidict import CIMultiDict

from selfhost_cli.proxy import contract, sse
from selfhost_cli.proxy.cache import entry as entries
from selfhost_cli.proxy.cache import key
from selfhost_cli.proxy.cache.counters import Counters, Outcome, metrics
from selfhost_cli.proxy.cache.entry import Entry
from selfhost_cli.proxy.cache.flight import Flight
from selfhost_cli.proxy.cache.key import Served
from selfhost_cli.proxy.cache.rules import Rules, wish
from selfhost_cli.proxy.cache.seal import Seal
from selfhost_cli.proxy.cache.stores import Store
from selfhost_cli.proxy.contract import Request
from selfhost_cli.proxy.errors import API_ERROR, ProxyError
from selfhost_cli.proxy.recipient import Asker, Recipient
from selfhost_cli.proxy.web import ASK, AUXILIARY, PING_EVERY, request_class, trace

LEASE_S = 15.0
"""So long is it somebody's to ask who says nothing more: a dead laptop keeps nobody waiting for longer."""
TURN_S = 900.0
"""So long do others wait for a laptop that says it still asks."""
LOOK_S = 0.2
HIT: Outcome = "hit"
MISS: Outcome = "miss"
BYPASS: Outcome = "bypass"
SIMILAR = f"{HIT};similar"
TOGETHER = f"{HIT};asked at the same time"
NOTE = "x-selfhost-cache"
EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}

Ask = Callable[[Recipient], Awaitable[None]]
"""Sends the request on its way, and what comes of it to a recipient. Raises ProxyError when nothing does."""

log = logging.getLogger("selfhost.cache")


class Near(Protocol):
    """A question that was answered before. `key`: the name under which its answer is kept."""

    @property
    def key(self) -> str: ...


class Similar(Protocol):
    """Finds a question that was put in other words before, by a scope for all but its text. Never raises."""

    async def start(self) -> None: ...
    async def find(self, scope: str, text: str) -> Near | None: ...
    async def learn(self, scope: str, text: str, key: str) -> None: ...
    async def forget(self, key: str) -> None: ...
    async def close(self) -> None: ...


Question = tuple[str, str]


@dataclass(frozen=True)
class _Asked:
    """A request on its way. `serves`: what its name was made of; `served`: what would answer now."""

    name: str
    cls: str
    streamed: bool
    anew: bool
    question: Question | None
    serves: Served
    served: Callable[[], Awaitable[Served | None]]
    ask: Ask


class Cache:
    """The answers of one scope. `rental`: the label of the box that is there now, for the counting."""

    def __init__(
        self,
        store: Store,
        seal: Seal,
        scope: str,
        rules: Rules,
        counters: Counters,
        rental: Callable[[], str],
        similar: Similar | None = None,
    ) -> None:
        self._store = store
        self._seal = seal
        self._prefix = key.prefix(scope)
        self._rules = rules
        self._counters = counters
        self._rental = rental
        self._similar = similar
        self._flights: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._owner = secrets.token_hex(8)

    async def start(self) -> None:
        await self._store.start()
        if self._similar:
            await self._similar.start()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._similar:
            await self._similar.close()
        await self._store.close()
        await self._counters.close()

    async def answer(
        self, http: web.Request, body: bytes, served: Callable[[], Awaitable[Served | None]], ask: Ask
    ) -> web.StreamResponse:
        """The response to a `POST /v1/messages`. Raises ProxyError."""
        request, against = self._readable(body)
        wanted = wish(http.headers.get(hdrs.CACHE_CONTROL, ""))
        if wanted == "no-store":
            against = wanted
        serves = None if against else await served()
        if request is None or serves is None:
            return await self._past(http, against or "not known what is served", ask)
        cls = request_class(http)
        asked = _Asked(
            name=self._prefix + key.digest(request, serves),
            cls=cls,
            streamed=request.stream,
            anew=wanted == "no-cache",
            question=key.question(request, serves) if self._similar and cls in (AUXILIARY, ASK) else None,
            serves=serves,
            served=served,
            ask=ask,
        )
        while True:
            if found := await self._known(asked):
                return self._again(asked, *found)
            flight = self._flights.get(asked.name)
            if flight is None:
                return await self._lead(http, asked)
            in_time = not flight.over
            if in_time and flight.streamed and asked.streamed:
                return await self._follow(http, asked, flight)
            with self._listening(asked.name, flight):
                await flight.landed.wait()
            if flight.entry:
                return self._again(asked, flight.entry, TOGETHER)
            if in_time and flight.streamed is asked.streamed:
                return await self._follow(http, asked, flight)

    async def metrics(self) -> bytes:
        return metrics(await self._counters.totals())

    async def find(self, name: str) -> Entry | None:
        """What is kept under a name, opens, and is not too old: who can write to the store can put an old one back."""
        sealed = await self._store.get(name)
        plain = self._seal.open(sealed, name, entries.LARGEST) if sealed else None
        found = entries.unpack(plain) if plain else None
        return found if found and time.time() < found.at + self._rules.lifetime(found.cls) else None

    async def _known(self, asked: _Asked) -> tuple[Entry, str] | None:
        """What is kept of the same, or of a similar question, and what the answer says of that."""
        if asked.anew:
            return None
        if found := await self.find(asked.name):
            return found, HIT
        near = await self._similar.find(*asked.question) if self._similar and asked.question else None
        if not near or not self._similar:
            return None
        if found := await self.find(near.key):
            return found, SIMILAR
        await self._similar.forget(near.key)
        return None

    def _readable(self, body: bytes) -> tuple[Request | None, str]:
        """The request, and why the cache keeps out of it."""
        try:
            request = contract.parse(body)
        except ProxyError:
            return None, "not a request"  # whoever answers says what is wrong with it
        return request, self._rules.against(request)

    async def _past(self, http: web.Request, reason: str, ask: Ask) -> web.StreamResponse:
        self._counters.count(BYPASS, self._rental(), request_class(http))
        asker = Asker(http, f"{BYPASS};{reason}")
        await ask(asker)
        return asker.response

    def _again(self, asked: _Asked, found: Entry, note: str) -> web.StreamResponse:
        trace().cls, trace().outcome = asked.cls, HIT
        trace().input_tokens, trace().output_tokens = found.input_tokens, found.output_tokens
        self._count(asked.cls, found)
        headers = {NOTE: note, "request-id": trace().id}
        if asked.streamed:
            return web.Response(body=found.stream(), headers=EVENTS | headers)
        return web.Response(body=found.whole(), content_type="application/json", headers=headers)

    async def _lead(self, http: web.Request, asked: _Asked) -> web.StreamResponse:
        """Ask, for everyone who comes meanwhile too. It goes on without this client as long as another one listens."""
        self._count(asked.cls, None)
        flight = self._flights[asked.name] = Flight(asked.streamed)
        flight.task = asyncio.create_task(self._fly(asked, flight))
        self._tasks.add(flight.task)
        flight.task.add_done_callback(self._tasks.discard)
        with self._listening(asked.name, flight):
            return await flight.tell(http, f"{BYPASS};no-cache" if asked.anew else MISS, first=True)

    async def _follow(self, http: web.Request, asked: _Asked, flight: Flight) -> web.StreamResponse:
        """Hear what somebody else asked for, from its beginning on and as it comes."""
        trace().cls, trace().outcome = asked.cls, "followed"
        if flight.landed.is_set():
            self._count(asked.cls, flight.entry)
        else:
            flight.followers.append(asked.cls)
        with self._listening(asked.name, flight):
            return await flight.tell(http, TOGETHER)

    def _count(self, cls: str, saved: Entry | None) -> None:
        if saved is None:
            self._counters.count(MISS, self._rental(), cls)
            return
        self._counters.count(
            HIT,
            self._rental(),
            cls,
            input_tokens=saved.input_tokens,
            output_tokens=saved.output_tokens,
            gpu_seconds=saved.seconds,
        )

    @contextmanager
    def _listening(self, name: str, flight: Flight) -> Iterator[None]:
        """What nobody listens to any more must stop being generated."""
        flight.listeners += 1
        try:
            yield
        finally:
            flight.listeners -= 1
            if not flight.listeners and not flight.over and flight.task:
                self._land(name, flight)
                flight.task.cancel()

    def _land(self, name: str, flight: Flight) -> None:
        """Nobody joins it from here on, and what came of it is known."""
        if self._flights.get(name) is flight:
            del self._flights[name]
        while flight.followers:
            self._count(flight.followers.pop(), flight.entry)
        flight.landed.set()

    async def _fly(self, asked: _Asked, flight: Flight) -> None:
        failure = None
        try:
            found = None if asked.anew else await self._turn(asked.name, flight)
            if found:
                await self._store.leave(asked.name, self._owner)  # or a third laptop would wait for its end
                await self._pass_on(found, flight)
            else:
                began = time.monotonic()
                async with self._leased(asked.name):
                    await asked.ask(flight)
                    flight.end(None)  # who listens need not wait for what follows
                    await self._keep(asked, flight, time.monotonic() - began)
        except ProxyError as error:
            failure = error
        except Exception:
            log.exception("id=%s a bug of ours", trace().id)
            failure = ProxyError(500, API_ERROR, "the proxy failed; its log says why")
        finally:
            flight.end(failure)
            self._land(asked.name, flight)

    async def _turn(self, name: str, flight: Flight) -> Entry | None:
        """Ours to ask; or what came of it when another laptop did. Streams hear meanwhile that somebody is there."""
        clock = asyncio.get_running_loop().time
        began = told = clock()
        while not await self._store.take(name, self._owner, LEASE_S) and clock() - began < TURN_S:
            if flight.streamed and clock() - told > PING_EVERY:
                told = clock()
                if not flight.begun:
                    await flight.begin(200, None, CIMultiDict(EVENTS), None)
                await flight.write(sse.PING)
            await asyncio.sleep(LOOK_S)
        # also when it was ours at once: another one may have kept it after we looked
        return await self.find(name)

    @asynccontextmanager
    async def _leased(self, name: str) -> AsyncIterator[None]:
        renewing = asyncio.create_task(self._renew(name))
        try:
            yield
        finally:
            renewing.cancel()
            await self._store.leave(name, self._owner)

    async def _renew(self, name: str) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            await self._store.take(name, self._owner, LEASE_S)

    async def _pass_on(self, found: Entry, flight: Flight) -> None:
        flight.entry = found
        if flight.streamed:
            if not flight.begun:
                await flight.begin(200, None, CIMultiDict(EVENTS), None)
            await flight.write(found.stream())
        else:
            whole = found.whole()
            await flight.begin(200, None, CIMultiDict({"content-type": "application/json"}), len(whole))
            await flight.write(whole)

    async def _keep(self, asked: _Asked, flight: Flight, seconds: float) -> None:
        """What of it is worth keeping; nobody's answer depends on it. To read it costs the most, and is done aside."""
        if not flight.whole:
            return
        try:
            if await asked.served() != asked.serves:
                log.info("id=%s not kept: another box answered than was asked", trace().id)
                return
            now = time.time()
            how: dict[str, Any] = {"streamed": flight.streamed, "cls": asked.cls, "at": now, "seconds": seconds}
            entry = await asyncio.to_thread(partial(entries.read, flight.body(), **how))
            if isinstance(entry, str):
                log.info("id=%s not kept: %s", trace().id, entry)
                return
            flight.entry = entry
            if self._store.trouble:
                return
            sealed = self._seal.shut(entry.pack(), asked.name)
            await self._store.put(asked.name, sealed, self._rules.lifetime(asked.cls))
            if asked.question and self._similar:
                await self._similar.learn(*asked.question, asked.name)
        except Exception:
            log.exception("id=%s not kept: a bug of ours", trace().id)
