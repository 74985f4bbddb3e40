"""A front with a cache, before a proxy with a stub of an engine: all of it as it is shipped, but for the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from selfhost_cli.proxy.cache.cache import Cache, Similar
from selfhost_cli.proxy.cache.counters import Counters
from selfhost_cli.proxy.cache.rules import Rules
from selfhost_cli.proxy.cache.seal import Seal
from selfhost_cli.proxy.cache.stores import Store
from selfhost_cli.proxy.cache.stores.local import LocalStore
from selfhost_cli.proxy.front import Away, Upstream, build_front
from tests.proxy.kit import HI, TOKEN, LlamaStub, eventually, proxied, serving, streamed

FRONT = "front-token"
AUTH = {"authorization": f"Bearer {FRONT}"}
KEY = bytes(range(32))
SCOPE = "testscope"


@dataclass
class Laptop:
    """A client of a front that is up."""

    url: str
    session: aiohttp.ClientSession
    counters: Counters
    cache: Cache
    target: Upstream | Away

    def ask(self, body: Mapping[str, Any] = HI, **headers: str) -> Any:
        return self.session.post(self.url + "/v1/messages", json=body, headers=AUTH | headers)

    async def answer(self, body: Mapping[str, Any] = HI, **headers: str) -> tuple[str, Any]:
        """What the cache said, and the message or the events; of an answer that is kept when it is."""
        note, told = await self.hear(body, **headers)
        await self.settled()
        return note, told

    async def hear(self, body: Mapping[str, Any] = HI, **headers: str) -> tuple[str, Any]:
        async with self.ask(body, **headers) as response:
            note = response.headers.get("x-selfhost-cache", "")
            if response.content_type == "text/event-stream":
                told: Any = [event async for event in streamed(response.content.iter_any())]
            else:
                told = await response.json()
        return note, told

    async def settled(self) -> None:
        """What was answered is kept by now: that may be a moment after its client has it."""
        await eventually(lambda: not self.cache._tasks)


@asynccontextmanager
async def laptop(
    target: Upstream | Away,
    store: Store,
    *,
    key: bytes = KEY,
    scope: str = SCOPE,
    rules: Rules | None = None,
    similar: Similar | None = None,
) -> AsyncIterator[Laptop]:
    with TemporaryDirectory() as folder:
        counters = Counters(Path(folder) / "counters")
        cache = Cache(store, Seal(key), scope, rules or Rules(), counters, lambda: "rental-1", similar)
        made: list[Laptop] = []
        app = build_front(FRONT, lambda: made[0].target, dict, lambda usage: None, {}, cache)
        async with serving(app) as url, aiohttp.ClientSession() as session:
            made.append(Laptop(url, session, counters, cache, target))
            yield made[0]


@asynccontextmanager
async def boxed(stub: LlamaStub, run: Path, *, digest: str = "d1", **kept: Any) -> AsyncIterator[Laptop]:
    """One laptop with one box, and a store in a file beside it."""
    async with AsyncExitStack() as stack:
        box = await stack.enter_async_context(proxied(stub, run, digest=digest))
        store = LocalStore(run / "answers.sqlite3", 2**24)
        yield await stack.enter_async_context(laptop(Upstream(box.url, TOKEN, "rental-1"), store, **kept))
