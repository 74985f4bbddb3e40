"""What a request meets before any box: an answer that is kept, somebody who asks the same already, or the way on."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Protocol

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
        name = self._prefix + key.digest(request, serves)
        anew = wanted == "no-cache"
        question = key.question(request, serves) if self._similar and request_class(http) in (AUXILIARY, ASK) else None
        while True:
            if not anew and (found := await self.find(name)):
                return self._again(http, request, found, HIT)
            if not anew and question and (found := await self._find_similar(question)):
                return self._again(http, request, found, SIMILAR)
            flight = self._flights.get(name)
            if flight is None:
                return await self._lead(http, name, request, anew, ask, question)
            if flight.streamed and request.stream:
                return await self._follow(http, name, flight)
            with self._listening(name, flight):
                await flight.ended()
            if flight.entry:
                return self._again(http, request, flight.entry, TOGETHER)
            if flight.streamed is request.stream:
                return await self._follow(http, name, flight)

    async def metrics(self) -> bytes:
        return metrics(await self._counters.totals())

    async def find(self, name: str) -> Entry | None:
        """What is kept under a name, opens, and is not too old: who can write to the store can put an old one back."""
        sealed = await self._store.get(name)
        plain = self._seal.open(sealed, name, entries.LARGEST) if sealed else None
        found = entries.unpack(plain) if plain else None
        return found if found and time.time() < found.at + self._rules.lifetime(found.cls) else None

    async def _find_similar(self, question: Question) -> Entry | None:
        assert self._similar
        near = await self._similar.find(*question)
        if near is None:
            return None
        found = await self.find(near.key)
        if found is None:
            await self._similar.forget(near.key)
        return found

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

    def _again(self, http: web.Request, request: Request, found: Entry, note: str) -> web.StreamResponse:
        trace().cls, trace().outcome = request_class(http), HIT
        trace().input_tokens, trace().output_tokens = found.input_tokens, found.output_tokens
        self._saved(http, found)
        headers = {NOTE: note, "request-id": trace().id}
        if request.stream:
            return web.Response(body=found.stream(), headers=EVENTS | headers)
        return web.Response(body=found.whole(), content_type="application/json", headers=headers)

    async def _follow(self, http: web.Request, name: str, flight: Flight) -> web.StreamResponse:
        """Hear what somebody else asked for, from its beginning on and as it comes."""
        trace().cls, trace().outcome = request_class(http), "followed"
        with self._listening(name, flight):
            response = await flight.tell(http, TOGETHER)
        if flight.entry:
            self._saved(http, flight.entry)
        return response

    def _saved(self, http: web.Request, entry: Entry) -> None:
        self._counters.count(
            HIT,
            self._rental(),
            request_class(http),
            input_tokens=entry.input_tokens,
            output_tokens=entry.output_tokens,
            gpu_seconds=entry.seconds,
        )

    async def _lead(
        self, http: web.Request, name: str, request: Request, anew: bool, ask: Ask, question: Question | None
    ) -> web.StreamResponse:
        """Ask, for everyone who comes meanwhile too. It goes on without this client as long as another one listens."""
        self._counters.count(MISS, self._rental(), request_class(http))
        flight = self._flights[name] = Flight(request.stream)
        flight.task = asyncio.create_task(self._fly(name, flight, request_class(http), anew, ask, question))
        self._tasks.add(flight.task)
        flight.task.add_done_callback(self._tasks.discard)
        with self._listening(name, flight):
            return await flight.tell(http, f"{BYPASS};no-cache" if anew else MISS, first=True)

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
        if self._flights.get(name) is flight:
            del self._flights[name]

    async def _fly(self, name: str, flight: Flight, cls: str, anew: bool, ask: Ask, question: Question | None) -> None:
        failure = None
        try:
            found = None if anew else await self._turn(name, flight)
            if found:
                await self._pass_on(found, flight)
            else:
                began = time.monotonic()
                async with self._leased(name):
                    await ask(flight)
                    await self._keep(name, flight, cls, time.monotonic() - began)
                if question and self._similar and flight.entry:
                    await self._similar.learn(*question, name)
        except ProxyError as error:
            failure = error
        except Exception:
            log.exception("id=%s a bug of ours", trace().id)
            failure = ProxyError(500, API_ERROR, "the proxy failed; its log says why")
        finally:
            self._land(name, flight)
            flight.end(failure)

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
            if found := await self.find(name):
                return found
        return None

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

    async def _keep(self, name: str, flight: Flight, cls: str, seconds: float) -> None:
        """What of it is worth keeping. To read it costs more than all the rest, and is done aside."""
        if not flight.whole or self._store.trouble:
            return
        now = time.time()
        read = partial(entries.read, flight.body(), streamed=flight.streamed, cls=cls, at=now, seconds=seconds)
        entry = await asyncio.to_thread(read)
        if isinstance(entry, str):
            log.info("id=%s not kept: %s", trace().id, entry)
            return
        flight.entry = entry
        plain = entry.pack()
        if len(plain) <= entries.LARGEST:
            await self._store.put(name, self._seal.shut(plain, name), self._rules.lifetime(cls))
