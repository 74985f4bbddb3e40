"""Several boxes: the real router says where a conversation stays, and the front takes it there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from selfhost_cli.keeper import boxes as module
from selfhost_cli.keeper import router
from selfhost_cli.keeper.boxes import Boxes
from selfhost_cli.keeper.wire import free_port
from selfhost_cli.proxy import front as front_module
from selfhost_cli.proxy.front import BOX, Away, Upstream, Usage, build_front
from tests.proxy.kit import HELLO, asynchronous, eventually, serving

pytestmark = pytest.mark.timeout(30)

FRONT = "front-token"
ASKED = {"max_tokens": 16, "stream": True, "messages": [{"role": "user", "content": "hi"}]}


@dataclass
class Box:
    """Stands where a tunnel ends: answers each message in one stream, when it is not `dead`."""

    name: str
    url: str = ""
    dead: bool = False
    mute: bool = False
    """It takes requests and breaks off before it says anything."""
    seen: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    @property
    def upstream(self) -> Upstream:
        return Upstream(self.url, f"token-of-{self.name}", self.name)

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/messages", self._message)
        return app

    async def _health(self, http: web.Request) -> web.Response:
        return web.json_response({"status": "healthy", "model": self.name})

    async def _message(self, http: web.Request) -> web.StreamResponse:
        self.bodies.append(await http.read())
        self.seen.append({key.lower(): value for key, value in http.headers.items()} | {"query": http.query_string})
        if self.dead or self.mute:
            assert http.transport
            http.transport.abort()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(http)
        for event in HELLO:
            await response.write(event)
        return response


@dataclass
class House:
    """A front before as many boxes, as the keeper has it."""

    all: list[Box]
    boxes: Boxes
    url: str = ""
    used: list[Usage] = field(default_factory=list)

    @property
    def ready(self) -> list[str]:
        return [box.name for box in self.all]

    def reached(self) -> list[Upstream]:
        return [box.upstream for box in self.all if not box.dead]

    def first(self) -> Upstream | Away:
        return next(iter(self.reached()), Away("reconnecting", "all are away", 5))

    async def settled(self, chosen: int) -> None:
        """Until the router chooses between so many."""

        async def look() -> bool:
            await self.boxes.tick(self.ready)
            return self.boxes.choices == chosen

        for _ in range(400):
            if await look():
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the router does not know the boxes")

    async def ask(self, session: str, agent: str = "") -> str:
        """The name of the box that answered."""
        headers = {"authorization": f"Bearer {FRONT}", "x-claude-code-request-class": "main"}
        headers |= {"x-claude-code-session-id": session} if session else {}
        headers |= {"x-claude-code-agent-id": agent} if agent else {}
        url = f"{self.url}/v1/messages?beta=true"
        async with aiohttp.ClientSession() as client, client.post(url, json=ASKED, headers=headers) as answer:
            text = await answer.text()
            assert "message_stop" in text, text
            return answer.headers[BOX]


@asynccontextmanager
async def house(count: int, words: Callable[[int, int], list[str]] | None = router.words) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        all = [Box(f"box-{number}") for number in range(count)]
        for box in all:
            box.url = await stack.enter_async_context(serving(box.application()))
        made = House(all, Boxes(lambda: made.reached(), words))
        stack.push_async_callback(made.boxes.stop)
        app = build_front(FRONT, made.first, dict, made.used.append, {}, assign=made.boxes.assign)
        made.url = await stack.enter_async_context(serving(app))
        yield made


@asynchronous
async def test_a_conversation_stays_on_its_box_and_new_ones_are_spread() -> None:
    async with house(3) as home:
        await home.settled(3)
        first = {f"s{number}": await home.ask(f"s{number}") for number in range(12)}
        again = {session: await home.ask(session) for session in first}
        assert again == first
        assert set(Counter(first.values()).values()) == {4}
        assert home.boxes.sessions() == Counter(first.values())


@asynchronous
async def test_what_a_request_says_reaches_the_box_whole_and_with_its_own_token() -> None:
    """Through the router it would not: it leaves out headers and query."""
    async with house(2) as home:
        await home.settled(2)
        name = await home.ask("one")
        box = next(box for box in home.all if box.name == name)
        assert box.seen[0]["authorization"] == f"Bearer token-of-{name}"
        assert box.seen[0]["x-claude-code-request-class"] == "main"
        assert box.seen[0]["query"] == "beta=true"
        assert json.loads(box.bodies[0]) == ASKED
        assert [one.rental for one in home.used] == [name]


@asynchronous
async def test_a_subagent_is_a_conversation_of_its_own() -> None:
    async with house(2) as home:
        await home.settled(2)
        assert {await home.ask("one"), await home.ask("one", "agent")} == {"box-0", "box-1"}
        assert await home.ask("one", "agent") == await home.ask("one", "agent")


@asynchronous
async def test_requests_without_a_conversation_are_spread() -> None:
    async with house(2) as home:
        await home.settled(2)
        assert Counter([await home.ask("") for _ in range(6)]) == {"box-0": 3, "box-1": 3}
        assert not home.boxes.sessions()


@asynchronous
async def test_the_conversations_of_a_dead_box_move_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.3)
    async with house(3) as home:
        await home.settled(3)
        before = {f"s{number}": await home.ask(f"s{number}") for number in range(9)}
        home.all[0].dead = True
        asked = [asyncio.create_task(home.ask(session)) for session in before]
        await home.settled(2)
        after = dict(zip(before, await asyncio.gather(*asked), strict=True))
        assert all(after[session] == box for session, box in before.items() if box != "box-0")
        assert "box-0" not in after.values()
        assert {session: await home.ask(session) for session in before} == after


@asynchronous
async def test_a_box_that_is_back_at_once_keeps_its_conversations() -> None:
    async with house(2) as home:
        await home.settled(2)
        before = {f"s{number}": await home.ask(f"s{number}") for number in range(6)}
        home.all[0].dead = True
        waiting = [asyncio.create_task(home.ask(session)) for session in before]
        await eventually(lambda: sum(task.done() for task in waiting) == 3)
        await home.boxes.tick(home.ready)
        home.all[0].dead = False
        assert dict(zip(before, await asyncio.gather(*waiting), strict=True)) == before


@asynchronous
async def test_what_came_to_nothing_at_one_box_is_asked_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tunnel is there, and no answer comes of it; nothing was told to the client yet."""
    monkeypatch.setattr(front_module, "SETTLED_S", 0.2)
    async with house(2) as home:
        await home.settled(2)
        name = await home.ask("one")
        broken = next(box for box in home.all if box.name == name)
        broken.mute = True
        assert await home.ask("one") != name
        broken.mute = False
        assert await home.ask("one") != name, "its prefix is elsewhere by now"


@asynchronous
async def test_a_box_that_ends_is_forgotten_and_one_that_comes_is_used() -> None:
    async with house(3) as home:
        all = home.all
        home.all = all[:2]
        await home.settled(2)
        assert {await home.ask(f"a{number}") for number in range(4)} == {"box-0", "box-1"}
        home.all = all
        await home.settled(3)
        assert "box-2" in {await home.ask(f"b{number}") for number in range(4)}
        home.all = all[2:]
        await home.settled(1)
        assert {await home.ask(f"a{number}") for number in range(4)} == {"box-2"}


@asynchronous
async def test_a_router_that_ended_is_started_again_and_conversations_stay_meanwhile() -> None:
    async with house(2) as home:
        await home.settled(2)
        before = {f"s{number}": await home.ask(f"s{number}") for number in range(4)}
        wire = home.boxes._router
        assert wire
        assert wire._process
        [child] = Path(f"/proc/{wire._process.pid}/task/{wire._process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        await eventually(lambda: wire.port is None)
        assert {session: await home.ask(session) for session in before} == before
        await eventually(lambda: wire.port is not None, 20)
        await home.settled(2)
        assert await home.ask("s0") in ("box-0", "box-1")


@asynchronous
async def test_without_the_router_the_first_box_serves() -> None:
    async with house(2, None) as home:
        await home.boxes.tick(home.ready)
        assert {await home.ask(f"s{number}") for number in range(4)} == {"box-0"}


@asynchronous
async def test_an_answer_of_the_router_that_names_no_box_of_ours_is_none() -> None:
    """Whoever is on this machine can add a worker to it."""

    def elsewhere(http: web.Request) -> web.Response:
        return web.json_response({"box": "http://attacker"})

    async with house(2) as home:
        await home.settled(2)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", _handler(elsewhere))
        async with serving(app) as url:
            wire = home.boxes._router
            assert wire
            port, home.boxes._router = wire.port, None
            async with aiohttp.ClientSession() as client:
                for box in list(home.boxes._doors.values()):
                    await client.post(f"http://127.0.0.1:{port}/remove_worker", params={"url": box.url})
                await client.post(f"http://127.0.0.1:{port}/add_worker", params={"url": url})
            home.boxes._router = wire
            assert await home.ask("one") in ("box-0", "box-1")


def _handler(answer: Callable[[web.Request], web.Response]) -> Any:
    async def handle(http: web.Request) -> web.Response:
        return answer(http)

    return handle


@asynchronous
async def test_each_box_says_how_it_is() -> None:
    async with house(3) as home:
        home.all[1].dead = True
        assert await home.boxes.healths() == {
            "box-0": {"status": "healthy", "model": "box-0"},
            "box-2": {"status": "healthy", "model": "box-2"},
        }
        gone = Upstream("http://127.0.0.1:9", "t", "box-9")
        alone = Boxes(lambda: [gone], None)
        told = await alone.healths()
        await alone.stop()
        assert told["box-9"]["status"] == "away"  # type: ignore[index]


@asynchronous
async def test_the_router_ends_with_whoever_started_it_and_is_told_no_key() -> None:
    """Killed, that one cannot end it: the end of its stdin has to."""
    port = free_port()
    env = dict(os.environ) | {"SELFHOST_API_KEY": "a-key"}
    words = router.words(port, free_port())
    process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        await eventually(lambda: _listens(port), 30)
        assert process.stdin
        [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert b"a-key" not in Path(f"/proc/{child}/environ").read_bytes()
        process.stdin.close()
        await eventually(lambda: not _listens(port))
        assert process.wait(5) is not None
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0
