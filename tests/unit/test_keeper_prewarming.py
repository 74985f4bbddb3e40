"""What the keeper has boxes read ahead: what it heard, each box once, and again when it has heard something else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from selfhost_cli import config
from selfhost_cli.keeper.prewarming import Prewarming
from selfhost_cli.prefix import Store
from selfhost_cli.proxy.front import Upstream
from tests.proxy.kit import asynchronous, eventually, serving
from tests.unit.test_prefix import AGENT, FIRST


class Box:
    """Takes wishes, unless it is `busy`."""

    def __init__(self) -> None:
        self.wishes: list[tuple[str, Any]] = []
        self.busy = False
        self.asked = 0
        self.looked = 0
        self.has: set[str] = set()

    async def take(self, http: web.Request) -> web.Response:
        self.asked += 1
        if self.busy:
            assert http.transport
            http.transport.abort()
        assert http.headers["authorization"] == "Bearer box-token"
        self.wishes.append((http.query["name"], await http.json()))
        self.has.add(http.query["name"])
        return web.json_response({}, status=202)

    async def health(self, http: web.Request) -> web.Response:
        self.looked += 1
        return web.json_response({"prefix": {"state": "warm" if self.has else "none"}}, status=503)


@asynccontextmanager
async def box() -> AsyncIterator[tuple[Box, Upstream]]:
    made, app = Box(), web.Application(client_max_size=2**24)
    app.router.add_post("/selfhost/prefix", made.take)
    app.router.add_get("/health", made.health)
    async with serving(app) as url:
        yield made, Upstream(url, "box-token", "rental-1")


def prewarming(home: Path, look_every: float = 60, **settings: str) -> Prewarming:
    env = {"SELFHOST_HOME": str(home), "SELFHOST_MARKET_URL": "http://127.0.0.1:9"}
    made = config.load("test", env=env | settings)
    made.paths.make()
    return Prewarming(made, look_every)


def body(system: str = "You are careful.") -> bytes:
    return json.dumps(FIRST | {"system": system}, separators=(",", ":")).encode()


def known(home: Path) -> dict[str, Any]:
    return dict(Store(config.paths("test", {"SELFHOST_HOME": str(home)}).prefixes).all())


@asynchronous
async def test_a_box_gets_what_was_heard_once_and_what_is_new(tmp_path: Path) -> None:
    keeper = prewarming(tmp_path)
    async with box() as (stranger, upstream):
        keeper.heard(AGENT, body())
        await eventually(lambda: "cli" in known(tmp_path))

        def ticked(count: int) -> bool:
            keeper.tick([upstream])
            return len(stranger.wishes) == count

        await eventually(lambda: ticked(1))
        for _ in range(3):
            keeper.tick([upstream])
        keeper.ahead_of("/home/me/project", "tiny", 32_768)
        await eventually(lambda: ticked(2))
        keeper.heard(AGENT, body("You are quick."))
        await eventually(lambda: ticked(3))
        for _ in range(3):
            keeper.tick([upstream])
        keeper.tick([Upstream(upstream.url.replace("127.0.0.1", "localhost"), "box-token", "rental-1")])
        await eventually(lambda: len(stranger.wishes) == 4)  # over its new tunnel
    keeper.stop()
    (name, first), (_, second), (_, third), _ = stranger.wishes
    assert name == "cli"
    assert "/home/me" not in json.dumps(first)
    assert "/home/me" in json.dumps(second)
    assert third["system"] == "You are quick."


@asynchronous
async def test_a_directory_told_while_a_prompt_is_being_kept_counts_as_well(tmp_path: Path) -> None:
    keeper = prewarming(tmp_path)
    async with box() as (stranger, upstream):
        keeper.heard(AGENT, body())
        await eventually(lambda: "cli" in known(tmp_path))
        keeper.stop()
        keeper = prewarming(tmp_path)
        keeper.heard(AGENT, body("You are quick."))
        await asyncio.sleep(0)  # it is at it
        keeper.ahead_of("/home/me/project", "tiny", 32_768)

        def sent(count: int) -> bool:
            keeper.tick([upstream])
            return len(stranger.wishes) == count

        await eventually(lambda: sent(2))  # for the directory, and for the prompt
    keeper.stop()


@asynchronous
async def test_a_box_that_breaks_off_is_asked_again(tmp_path: Path) -> None:
    keeper = prewarming(tmp_path)
    async with box() as (stranger, upstream):
        keeper.heard(AGENT, body())
        await eventually(lambda: "cli" in known(tmp_path))
        stranger.busy = True

        def ticked() -> bool:
            keeper.tick([upstream])
            return stranger.asked > 1

        await eventually(ticked)
        stranger.busy = False
        await eventually(lambda: ticked() and bool(stranger.wishes))
    keeper.stop()


@asynchronous
async def test_a_box_whose_proxy_started_anew_gets_it_again_over_the_same_tunnel(tmp_path: Path) -> None:
    keeper = prewarming(tmp_path, look_every=0)
    async with box() as (stranger, upstream):
        keeper.heard(AGENT, body())
        await eventually(lambda: "cli" in known(tmp_path))

        def ticked(holds: Callable[[], bool]) -> bool:
            keeper.tick([upstream])
            return holds()

        await eventually(lambda: ticked(lambda: bool(stranger.has)))
        sent, looked = len(stranger.wishes), stranger.looked
        await eventually(lambda: ticked(lambda: stranger.looked > looked + 3))
        assert len(stranger.wishes) <= sent + 1, "a look may have crossed the first one, and no other"
        stranger.has.clear()
        await eventually(lambda: ticked(lambda: bool(stranger.has)))
    keeper.stop()


@asynchronous
async def test_switched_off_nothing_is_kept_and_nothing_sent(tmp_path: Path) -> None:
    keeper = prewarming(tmp_path, SELFHOST_PREWARM="off")
    async with box() as (stranger, upstream):
        keeper.heard(AGENT, body())
        keeper.ahead_of("/", "tiny", 32_768)
        keeper.tick([upstream])
        await asyncio.sleep(0.01)
    keeper.stop()
    assert known(tmp_path) == {}
    assert not stranger.asked
