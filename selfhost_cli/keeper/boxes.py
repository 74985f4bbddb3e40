"""Several rented boxes: on which of them a conversation stays is vllm-router's word.

The router is asked, nothing goes through it: 0.1.17 leaves out a request's headers and query on the way of
/v1/messages, and whoever is on this machine may add workers to it. So it never sees a prompt or a token. It is asked
where a session belongs, and its workers are doors of ours that answer with a box's label; an answer that names no box
that we reach is none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from selfhost_cli.keeper.wire import Wire, free_port
from selfhost_cli.proxy.front import MAX_HEALTH, Upstream
from selfhost_cli.proxy.web import runner

PATIENCE_S = 5.0
"""So long a conversation waits for its box to be reached again, before it moves: reading it anew takes as long."""
PASSED_OVER_S = 10.0
"""So long a box gets nothing new that a request came to nothing at."""
LOOK_S = 0.1
ASK = aiohttp.ClientTimeout(total=2.0)
HEALTH = aiohttp.ClientTimeout(total=4.0)
ACTIVE_S = 600.0
"""A conversation that was heard of within it counts as one of its box's."""
MOST = 10_000
"""Conversations that are held."""

log = logging.getLogger("selfhost.keeper")


@dataclass
class _Door:
    """The router's worker for one box. `known`: at the router's that listens on this port, None while at none."""

    site: web.TCPSite
    url: str
    since: float
    """When it was last seen to be reached."""
    known: int | None = None


class Boxes:
    """Make and use it inside the event loop. `reached`: those that a tunnel leads to now.

    `words`: the router's program, for its port and that of its metrics; None where it is not installed.
    """

    def __init__(
        self,
        reached: Callable[[], Iterable[Upstream]],
        words: Callable[[int, int], Sequence[str]] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reached = reached
        self._words = words
        self._clock = clock
        self._router: Wire | None = None
        self._doors: dict[str, _Door] = {}
        self._labels: dict[int, str] = {}
        self._passed_over: dict[str, float] = {}
        self._sessions: dict[str, tuple[str, float]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._app: web.AppRunner | None = None
        self._changing = asyncio.Lock()

    async def tick(self, ready: Collection[str]) -> None:
        """`ready`: the labels of all boxes that serve, reached or not. With one of them there is nothing to choose."""
        if len(ready) > 1 and self._router is None and (words := self._words):
            self._router = Wire("the router of sessions", lambda port: words(port, free_port()))
        async with self._changing:
            for label in self._doors.keys() - set(ready):
                await self._close(label)
            for label in ready if self._router else ():
                await self._update(label)

    async def assign(self, first: Upstream, session: str, avoid: Upstream | None = None) -> Upstream:
        """The box of a conversation, "" for a request that is none's; `first` where there is nothing to choose.

        `avoid`: one at which this request came to nothing. Waits for a box that was lost a moment ago.
        """
        if avoid and avoid.rental in self._doors:
            log.warning("the box of %s is passed over for %.0f s", avoid.rental, PASSED_OVER_S)
            self._passed_over[avoid.rental] = self._clock()
            async with self._changing:
                await self._update(avoid.rental)
        if self.choices < 2:
            return self._only(first)
        key = session or uuid.uuid4().hex
        began = self._clock()
        while label := await self._ask(key):
            if box := self._box(label):
                if session:
                    self._remember(session, label)
                return box
            if self._clock() - began > PATIENCE_S:
                break
            await asyncio.sleep(LOOK_S)
        before = self._box(self._sessions.get(session, ("", 0.0))[0])
        return before or self._only(first)

    def sessions(self) -> Counter[str]:
        """How many conversations each box has, by its label."""
        now = self._clock()
        return Counter(label for label, seen in self._sessions.values() if now - seen < ACTIVE_S)

    async def healths(self) -> dict[str, object]:
        """What each that is reached says of itself, by its label; "status" is "away" where it says nothing."""
        reached = list(self._reached())
        told = await asyncio.gather(*(self._health(box) for box in reached))
        return {box.rental: health for box, health in zip(reached, told, strict=True)}

    async def stop(self) -> None:
        if self._router:
            await self._router.stop()
        if self._app:
            await self._app.cleanup()
        if self._session:
            await self._session.close()

    @property
    def choices(self) -> int:
        """Between how many boxes the router chooses."""
        return sum(1 for door in self._doors.values() if door.known is not None)

    def _only(self, first: Upstream) -> Upstream:
        good = (box for box in self._reached() if not self._is_passed_over(box.rental))
        return next(good, first) if self._is_passed_over(first.rental) else first

    def _is_passed_over(self, label: str) -> bool:
        return self._clock() - self._passed_over.get(label, float("-inf")) < PASSED_OVER_S

    def _box(self, label: str) -> Upstream | None:
        return next((box for box in self._reached() if box.rental == label), None)

    def _remember(self, session: str, label: str) -> None:
        self._sessions.pop(session, None)
        self._sessions[session] = label, self._clock()
        while len(self._sessions) > MOST:
            del self._sessions[next(iter(self._sessions))]

    async def _ask(self, session: str) -> str:
        """The label of a box, "" when the router does not say."""
        if self._router is None or (port := self._router.port) is None:
            return ""
        try:
            url = f"http://127.0.0.1:{port}/v1/messages"
            async with self._http().post(url, json={}, headers={"x-session-id": session}, timeout=ASK) as answer:
                told = await answer.json(content_type=None) if answer.status == 200 else {}
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return ""
        label = told.get("box") if isinstance(told, dict) else None
        return label if isinstance(label, str) and label in self._doors else ""

    async def _update(self, label: str) -> None:
        """The door of a box, and whether the router has it to choose from."""
        now = self._clock()
        if label not in self._doors:
            if not self._box(label):
                return
            self._doors[label] = await self._open(label)
        door, port = self._doors[label], self._router.port if self._router else None
        if door.known != port:
            door.known = None  # another router, which knows nothing
        if self._box(label):
            door.since = now
        wanted = port if not self._is_passed_over(label) and now - door.since < PATIENCE_S else None
        if wanted and door.known is None and await self._tell(port, "add_worker", door):
            door.known = port
        elif wanted is None and door.known is not None and await self._tell(port, "remove_worker", door):
            door.known = None

    async def _tell(self, port: int | None, what: str, door: _Door) -> bool:
        if port is None:
            return False
        try:
            url = f"http://127.0.0.1:{port}/{what}"
            async with self._http().post(url, params={"url": door.url}, timeout=ASK) as answer:
                done = answer.status == 200 or b"already exists" in await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log.info("the router of sessions: %s: %s", what, str(error) or type(error).__name__)
            return False
        return done

    async def _open(self, label: str) -> _Door:
        if self._app is None:
            doors = web.Application()
            doors.router.add_route("*", "/{path:.*}", self._knock)
            self._app = runner(doors)
            await self._app.setup()
        known = {address[1] for address in self._app.addresses}
        site = web.TCPSite(self._app, "127.0.0.1", 0)
        await site.start()
        (port,) = {address[1] for address in self._app.addresses} - known
        self._labels[port] = label
        return _Door(site, f"http://127.0.0.1:{port}", self._clock())

    async def _close(self, label: str) -> None:
        door = self._doors.pop(label)
        if door.known is not None:
            await self._tell(door.known, "remove_worker", door)
        self._labels = {port: other for port, other in self._labels.items() if other != label}
        await door.site.stop()

    async def _knock(self, http: web.Request) -> web.Response:
        """Which door it is; and that it is there, wherever the router looks: 0.1.17 adds no worker without /health."""
        return web.json_response({"box": self._labels.get(http.get_extra_info("sockname")[1], "")})

    async def _health(self, box: Upstream) -> dict[str, object]:
        headers = {"authorization": f"Bearer {box.token}", "x-selfhost-probe": "1"}
        try:
            async with self._http().get(f"{box.url}/health", headers=headers, timeout=HEALTH) as answer:
                told = await answer.content.read(MAX_HEALTH)
                said = json.loads(told)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            return {"status": "away", "reason": str(error) or type(error).__name__}
        return said if isinstance(said, dict) else {"status": "away", "reason": "it says what is no object"}

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        return self._session
