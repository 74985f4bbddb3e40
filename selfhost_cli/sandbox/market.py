"""The market's process: `python -m selfhost_cli.sandbox.market --state DIR`.

Binds a free loopback port, writes DIR/market.json (0600: url, pid, control_token, mirror, registry, api_key), and
ends by itself when nothing is rented and nobody asked for a while. SIGTERM destroys every box first; a market that is
killed takes its boxes' supervisors along (they get SIGTERM), and what even those left is swept by the next one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from selfhost_cli.errors import SelfhostError, UsageError
from selfhost_cli.sandbox import image, processes
from selfhost_cli.sandbox.api import Api
from selfhost_cli.sandbox.catalogue import Catalogue
from selfhost_cli.sandbox.control import Control, RequestLog
from selfhost_cli.sandbox.faults import Faults
from selfhost_cli.sandbox.instances import Instances, Settings
from selfhost_cli.sandbox.mirror import FOLDERS, Mirror
from selfhost_cli.sandbox.registry import Registry
from selfhost_cli.sandbox.timeline import Timeline

API_KEY_VARIABLE = "SELFHOST_SANDBOX_API_KEY"


@dataclass(frozen=True)
class Options:
    """How one market runs."""

    state: Path
    cache: Path | None = None
    idle_exit_s: float = 60.0
    seed: int = 1
    api_key: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    settings: Settings = field(default_factory=Settings)


class Market:
    """Everything one market consists of, around one aiohttp application."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.time) -> None:
        self.options = options
        self.control_token = secrets.token_urlsafe(32)
        self.boxes = options.state / "boxes"
        self.ending = asyncio.Event()
        self.last_request = time.monotonic()
        timeline = Timeline(clock)
        faults, catalogue = Faults(timeline), Catalogue(options.seed, timeline())
        self.instances = Instances(self.boxes, catalogue, faults, options.settings, timeline, os.getpid())
        self.requests = RequestLog(timeline)
        mirror = Mirror(options.cache, self.instances)
        api = Api(
            api_key=options.api_key,
            catalogue=catalogue,
            instances=self.instances,
            faults=faults,
            clock=timeline,
        )
        control = Control(
            token=self.control_token,
            instances=self.instances,
            faults=faults,
            settings=options.settings,
            mirror=mirror,
            requests=self.requests,
            clock=timeline,
            shutdown=self.ending.set,
        )
        self.app = web.Application(middlewares=[self._noted])
        self.app.cleanup_ctx.append(self._crediting)
        self.app.add_routes([*api.routes(), *control.routes(), *Registry(options.cache).routes()])
        self.app.router.add_get(f"/mirror/{{folder:{FOLDERS}}}/", mirror.index)
        self.app.router.add_get(f"/mirror/{{folder:{FOLDERS}}}/{{name}}", mirror.file)

    @web.middleware
    async def _noted(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.last_request = time.monotonic()
        note = await self.requests.note(request) if request.path.startswith("/api/") else {}
        try:
            response = await handler(request)
            # None stays where the client gets no answer.
            if request.transport is not None and not request.transport.is_closing():
                note["status"] = response.status
        except web.HTTPException as error:
            note["status"] = error.status
            raise
        finally:
            self.last_request = time.monotonic()
        return response

    async def _crediting(self, app: web.Application) -> AsyncIterator[None]:
        watch = asyncio.create_task(self.instances.watch_credit())
        yield
        watch.cancel()

    async def run(self) -> None:
        """Serve until idle, SIGTERM, SIGINT or the control endpoint's shutdown; then destroy every box."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.ending.set)
        runner = web.AppRunner(self.app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        self._announce(f"http://127.0.0.1:{port}")
        try:
            await self._until_over()
        finally:
            await self.instances.close()
            (self.options.state / "market.json").unlink(missing_ok=True)
            await runner.cleanup()

    def _announce(self, url: str) -> None:
        facts = {
            "url": url,
            "pid": os.getpid(),
            "control_token": self.control_token,
            "mirror": f"{url}/mirror",
            "registry": url,
            "api_key": self.options.api_key,
        }
        image.write(self.options.state / "market.json", json.dumps(facts, indent=1) + "\n", 0o600)

    async def _until_over(self) -> None:
        pause = min(1.0, self.options.idle_exit_s / 4)
        while True:
            try:
                await asyncio.wait_for(self.ending.wait(), pause)
                return
            except TimeoutError:
                pass
            if self.instances.busy:
                self.last_request = time.monotonic()
            elif time.monotonic() - self.last_request > self.options.idle_exit_s:
                return


def main(arguments: list[str]) -> int:
    """Run one market. Raises UsageError when another one has the state directory, NotSetUp when boxes cannot run."""
    options = _options(arguments)
    options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = processes.hold(options.state / "market.lock")
    if lock is None:
        raise UsageError(f"a market runs in {options.state} already", "use it: its address is in market.json")
    (options.state / "market.json").unlink(missing_ok=True)
    boxes = options.state / "boxes"
    image.check(boxes)
    processes.sweep(boxes)
    asyncio.run(_run(options))
    return 0


async def _run(options: Options) -> None:
    await Market(options).run()


def _options(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog="selfhost_cli.sandbox.market", description="The sandbox's market.")
    parser.add_argument("--state", type=Path, required=True, help="directory for market.json and the boxes")
    parser.add_argument("--cache", type=Path, help="directory that mirror and registry serve")
    parser.add_argument("--idle-exit", type=float, default=60.0, metavar="S", help="end after S seconds of nothing")
    parser.add_argument("--fast", action="store_true", help="boot stages of 50 ms")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same offers")
    parser.add_argument("--credit", type=float, default=25.0, metavar="$", help="what the account has")
    parser.add_argument("--api-key", help=f"the account's key (default: ${API_KEY_VARIABLE}, else a random one)")
    parser.add_argument(
        "--ollama", type=Path, metavar="PATH", help="a program that the boxes' image brings as `ollama`"
    )
    parser.add_argument("--die-with", type=int, metavar="PID", help="end when this process, our parent, has ended")
    given = parser.parse_args(arguments)
    if given.die_with:
        processes.die_with_parent(given.die_with)
    settings = Settings(credit=given.credit, ollama=str(given.ollama.absolute()) if given.ollama else "")
    if given.fast:
        settings.stages = dict.fromkeys(settings.stages, 0.05)
    key = given.api_key or os.environ.get(API_KEY_VARIABLE) or secrets.token_hex(32)
    return Options(
        state=given.state.resolve(),
        cache=given.cache.resolve() if given.cache else None,
        idle_exit_s=given.idle_exit,
        seed=given.seed,
        api_key=key,
        settings=settings,
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SelfhostError as error:
        sys.stderr.write(f"{error.message}\n{error.remedy}\n")
        sys.exit(error.exit_code)
