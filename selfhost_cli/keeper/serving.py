"""The chosen backends: each that is no rented box gets an engine side of its own, on a loopback port."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from selfhost_cli import __version__, backends
from selfhost_cli.backends import Backend, Kind, keys, machines
from selfhost_cli.backends.machines import Machine
from selfhost_cli.config import Settings
from selfhost_cli.errors import SelfhostError
from selfhost_cli.keeper.wire import Wire
from selfhost_cli.proxy.engines import Engine
from selfhost_cli.proxy.engines.anthropic import AnthropicAPI
from selfhost_cli.proxy.engines.llamacpp import LlamaCppEngine
from selfhost_cli.proxy.engines.named import Named
from selfhost_cli.proxy.engines.ollama import OllamaEngine
from selfhost_cli.proxy.engines.openai import OpenAIEngine
from selfhost_cli.proxy.errors import ProxyError
from selfhost_cli.proxy.front import Away, Upstream
from selfhost_cli.proxy.rundir import RunDir
from selfhost_cli.proxy.server import Settings as ServerSettings
from selfhost_cli.proxy.server import build_server
from selfhost_cli.proxy.web import runner

HEAD_S = 20.0
"""So long may the status of an answer wait for a service's first word: what it refuses, it refuses at once."""
LOOK_S = 0.5
"""Between two looks whether the last answer is over that was begun before another backend was chosen."""
AGAIN_S = 15.0
"""So long is a backend passed over that could not be had, where there is another one."""

log = logging.getLogger("selfhost.keeper")


@dataclass
class _Host:
    """`backend` as it was when it began. `down_since`: when it was found away; `why`, in words."""

    backend: Backend
    key: str = field(repr=False)
    token: str = field(repr=False)
    engine: Engine
    app: web.AppRunner
    port: int = 0
    running: int = 0

    @web.middleware
    async def count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.running += 1
        try:
            return await handler(request)
        finally:
            self.running -= 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class _Reached:
    """A machine of one's own, as it was when its tunnel began."""

    backend: Backend
    machine: Machine
    wire: Wire


class Serving:
    """Make and use it inside the event loop. `vast`: where a rented box is; `spent`: dollars of one since a time.

    `forward`: the program that brings a port of the machine at a destination to one of this.
    """

    def __init__(
        self,
        settings: Settings,
        vast: Callable[[], Upstream | Away],
        spent: Callable[[Backend, float], float],
        env: Mapping[str, str],
        forward: Callable[[str, int, int], Sequence[str]],
    ) -> None:
        self._settings = settings
        self._vast = vast
        self._spent = spent
        self._env = env
        self._forward = forward
        self._given: dict[str, str] = {}
        """Keys that a command brought along: those of its environment are not in ours."""
        self._hosts: dict[str, _Host] = {}
        self._reached: dict[str, _Reached] = {}
        self._trouble: dict[str, str] = {}
        self._chain: list[Backend] = [backends.get(settings.paths, backends.VAST)]
        self._problem = ""
        self._passed_over: dict[str, tuple[float, str]] = {}
        self._last = ""
        self._ending: dict[asyncio.Task[None], _Host | Wire] = {}

    @property
    def needs_us(self) -> bool:
        """Something serves that is no rented box."""
        return any(one.kind is not Kind.VAST for one in self._chain)

    def give(self, name: str, key: str) -> None:
        self._given[name] = key

    async def tick(self) -> None:
        """Read what is chosen now, and host it. What is chosen no more ends with its last request."""
        try:
            self._chain = backends.serving(self._settings.paths)
            self._problem = ""
        except SelfhostError as error:
            if error.message != self._problem:
                log.error("%s", error.message)
            self._problem = error.message
            return
        self._reach({one.name: one for one in self._chain if one.kind is Kind.SSH})
        wanted = {one.name: one for one in self._chain if one.kind not in (Kind.VAST, Kind.SSH)}
        for name in list(self._hosts):
            host = self._hosts[name]
            if wanted.get(name) != host.backend or self._key(host.backend) not in ("", host.key):
                self._retire(self._hosts.pop(name))
        for name, backend in wanted.items():
            if name not in self._hosts:
                await self._host(backend)

    def _reach(self, wanted: Mapping[str, Backend]) -> None:
        """The tunnels to machines of one's own: what changed gets another; the old one ends with its last answer."""
        for name, one in list(self._reached.items()):
            if wanted.get(name) != one.backend or machines.recall(self._settings.paths, name) != one.machine:
                del self._reached[name]
                self._end(one.wire.retire(), one.wire)
        for name, backend in wanted.items():
            machine = machines.recall(self._settings.paths, name)
            if machine is None or not machine.port:
                self._trouble[name] = f"{name} is not installed: run `selfhost up --ssh {backend.url}`"
            elif name not in self._reached:
                self._trouble.pop(name, None)
                words = functools.partial(self._words, backend, machine)
                self._reached[name] = _Reached(backend, machine, Wire(f"the tunnel to {name}", words))

    def _words(self, backend: Backend, machine: Machine, port: int) -> Sequence[str]:
        return self._forward(backend.url, port, machine.port)

    async def _host(self, backend: Backend) -> None:
        try:
            key = self._key(backend, must=True)
            self._hosts[backend.name] = await host(self._settings, backend, key)
            self._trouble.pop(backend.name, None)
            log.info("backend %s: %s at %s", backend.name, backend.model, backend.url)
        except Exception as error:  # a bug of ours, too: the keeper also renews the lease of a rented box
            ours = isinstance(error, SelfhostError | OSError)
            why = error.message if isinstance(error, SelfhostError) else str(error) or type(error).__name__
            if self._trouble.get(backend.name) != why:
                log.error("%s", why, exc_info=not ours)
            self._trouble[backend.name] = why

    def _key(self, backend: Backend, *, must: bool = False) -> str:
        if given := self._given.get(backend.name):
            return given
        if backend.key == "keyring" and not must:
            return ""  # whoever puts another one there says so; asking each second may take as long
        try:
            return keys.read(self._settings.paths, backend.name, backend.key, self._env)
        except SelfhostError:
            if must:
                raise
            return ""

    def upstream(self) -> Upstream | Away:
        """The first that can serve now."""
        found: Upstream | Away | None = None
        for backend in self._chain:
            target = self._target(backend)
            if isinstance(target, Upstream):
                self._say(backend.name)
                return target
            found = found or target
        return found or Away("gone", "no backend is chosen: run `selfhost use vast`", 15)

    def _target(self, backend: Backend) -> Upstream | Away:
        if backend.kind is Kind.VAST:
            return self._vast()
        name = backend.name
        if backend.per_day is not None and (spent := self._spent(backend, midnight())) >= backend.per_day:
            told = f"backend {name} has cost ${spent:.2f} today, of ${backend.per_day:.2f} that it may"
            return Away("capped", f"{told}: `selfhost backends add {name} --per-day` moves that", 60)
        if why := self._trouble.get(name):
            return Away("not set up", why, 15)
        if name not in self._hosts and name not in self._reached:
            return Away("starting", f"backend {name} is being started", 1)
        if len(self._chain) > 1 and name in self._passed_over:
            since, why = self._passed_over[name]
            if time.monotonic() - since < AGAIN_S:
                return Away("away", why)
        if backend.kind is Kind.SSH:
            reached = self._reached[name]
            if reached.wire.port is None:
                return reached.wire.away
            return Upstream(f"http://127.0.0.1:{reached.wire.port}", reached.machine.token, backend.label, name)
        one = self._hosts[name]
        return Upstream(one.url, one.token, backend.label, backend.name)

    def machines(self) -> list[Upstream]:
        """Those of one's own that are reached: what runs there is ours, and reads ahead what it is told."""
        found = (self._target(one.backend) for one in self._reached.values())
        return [one for one in found if isinstance(one, Upstream)]

    def failed(self, target: Upstream, why: str) -> bool:
        """A service could not be had: where there is another one, that is asked for a while.

        A rented box that answers is there, whatever it says.
        """
        names = [one.name for one in self._chain]
        if target.backend == backends.VAST or target.backend not in names[:-1]:
            return False
        log.warning("backend %s is passed over for %.0f s: %s", target.backend, AGAIN_S, why)
        self._passed_over[target.backend] = time.monotonic(), why
        return True

    def _say(self, name: str) -> None:
        if name != self._last:
            if self._last:
                log.info("backend %s serves now, after %s", name, self._last)
            self._last = name

    def told(self) -> dict[str, object]:
        """For `status`: which serve, first to last, and what keeps one from it."""
        rows = []
        for backend in self._chain:
            target = self._target(backend)
            away = target if isinstance(target, Away) else None
            rows.append(
                {
                    "name": backend.name,
                    "kind": str(backend.kind),
                    "model": backend.model,
                    "state": away.state if away else "up",
                    "reason": away.reason if away else "",
                }
            )
        return {"chain": rows, "serving": self._last, "problem": self._problem}

    async def contexts(self) -> dict[str, int]:
        """In tokens, of those that are no rented box. Raises ProxyError when one does not say."""
        known = {name: one.backend.context for name, one in self._reached.items()}
        return known | {name: await one.engine.context() for name, one in self._hosts.items()}

    def _retire(self, one: _Host) -> None:
        async def end() -> None:
            while one.running:
                await asyncio.sleep(LOOK_S)
            await one.app.cleanup()

        self._end(end(), one)

    def _end(self, ending: Coroutine[Any, Any, None], one: _Host | Wire) -> None:
        task = asyncio.create_task(ending)
        self._ending[task] = one
        task.add_done_callback(self._ending.pop)

    async def stop(self) -> None:
        """At once: who asked loses it, as with the front itself."""
        for task in self._ending:
            task.cancel()
        left = [*self._hosts.values(), *(one.wire for one in self._reached.values()), *self._ending.values()]
        ends = (one.stop() if isinstance(one, Wire) else one.app.cleanup() for one in left)
        await asyncio.gather(*ends, return_exceptions=True)


def midnight() -> float:
    """When this day began, here."""
    return datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0).timestamp()


async def host(settings: Settings, backend: Backend, key: str) -> _Host:
    """The engine side for one backend, listening. Raises OSError."""
    place = settings.paths.state / "backends" / backend.name
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    token = secrets.token_urlsafe(32)
    served = ServerSettings(token, backend.model, __version__, backend.url, slots=backend.slots, head_s=HEAD_S)
    engine = Named(backend.name, _engine(backend, key))
    app = build_server(served, engine, RunDir(place))
    made = _Host(backend, key, token, engine, runner(app))
    app.middlewares.append(made.count)
    await made.app.setup()
    await web.TCPSite(made.app, "127.0.0.1", 0).start()
    made.port = made.app.addresses[0][1]
    return made


def _engine(backend: Backend, key: str) -> Engine:
    def url() -> str:
        return backend.url

    if backend.kind is Kind.ANTHROPIC:
        return AnthropicAPI(backend.name, backend.model, url, key, context=backend.context)
    if backend.kind is Kind.LOCAL and backend.engine == "ollama":
        return OllamaEngine(backend.name, backend.model, url)
    if backend.kind is Kind.LOCAL and backend.engine == "llamacpp":
        return LlamaCppEngine(backend.name, backend.model, url)
    return OpenAIEngine(
        backend.name, backend.model, url, key, context=backend.context, extra=dict(backend.fields) or None
    )


async def probe(backend: Backend, key: str) -> dict[str, object]:
    """What it serves, and how long one token takes. Raises ProxyError."""
    from selfhost_cli.proxy import contract
    from selfhost_cli.proxy.engines import Done

    engine = Named(backend.name, _engine(backend, key))
    try:
        began = time.monotonic()
        health = await engine.health()
        looked = time.monotonic() - began
        asked = b'{"max_tokens": 8, "stream": true, "messages": [{"role": "user", "content": "Say OK."}]}'
        began, tokens = time.monotonic(), 0
        async for event in engine.messages(contract.parse(asked)):
            if isinstance(event, Done):
                tokens = event.output_tokens
        if not tokens:
            raise ProxyError(502, "api_error", f"backend {backend.name} answered without a token")
        answered = time.monotonic() - began
        return {
            "context": health.context,
            "slots": health.slots,
            "look_s": looked,
            "answer_s": answered,
            "tokens": tokens,
        }
    finally:
        await engine.close()
