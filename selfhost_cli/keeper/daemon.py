"""The keeper's loop: read the ledger every second, hold links, host the front, end what nobody will use."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from aiohttp import web

from selfhost_cli import __version__, attach, config, lifecycle
from selfhost_cli.config import Settings
from selfhost_cli.errors import SelfhostError
from selfhost_cli.keeper import wiring
from selfhost_cli.keeper.links import Line, Link
from selfhost_cli.ledger import Ledger, Usage
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Endpoint, Event, Rental, State
from selfhost_cli.proxy import front

TICK_S = 1.0
STUCK_ENDING_S = 60.0
UNREACHABLE_S = 10.0
RETRY_S = 20.0
IDLE_EXIT_S = 3.0
PORTS = 50

log = logging.getLogger("selfhost.keeper")


def run(profile: str) -> None:
    """Run the keeper of a profile until nothing needs it. Returns at once when there is one already."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # its own account of what links already tell
    try:
        settings = config.load(profile)
        lock = ProcessLock(settings.paths.keeper_lock)
        if not lock.acquire():
            return
        with lock:
            asyncio.run(_Keeper(settings).live())
    except SelfhostError as error:
        log.error("%s %s", error.message, error.remedy)
        sys.exit(error.exit_code)


class _Keeper:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ledger = Ledger(settings.paths.ledger)
        self._up = ProcessLock(settings.paths.up_lock)
        self._links: dict[str, Link] = {}
        self._rentals: list[Rental] = []
        self._since: dict[tuple[str, str], float] = {}
        self._tried: dict[str, float] = {}
        self._stop = asyncio.Event()
        # One worker: whatever ends boxes does so one after the other, with a ledger of its own thread.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ending")

    async def live(self) -> None:
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._stop.set)
        self._read()
        runner = web.AppRunner(self._front(), access_log=None, handler_cancellation=True)
        await runner.setup()
        listener = _listen(_candidates(self._settings))
        await web.SockSite(runner, listener).start()
        port = listener.getsockname()[1]
        self._announce(port)
        log.info("keeper %s of profile %s on port %s", __version__, self._settings.profile, port)
        try:
            await self._loop()
        finally:
            self._settings.paths.keeper_file.unlink(missing_ok=True)
            for link in self._links.values():
                link.stop()
            await runner.cleanup()
            self._worker.shutdown(wait=False, cancel_futures=True)
            log.info("keeper ends")

    async def _loop(self) -> None:
        idle_since = time.monotonic()
        while not self._stop.is_set():
            self._tick()
            if self._up.holder() is not None or any(self._needs_us(rental) for rental in self._rentals):
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > IDLE_EXIT_S:
                return
            try:
                await asyncio.wait_for(self._stop.wait(), TICK_S)
            except TimeoutError:
                pass

    def _tick(self) -> None:
        try:
            self._read()
            self._relink()
            self._end_what_nobody_uses()
        except SelfhostError as error:
            log.error("%s", error.message)

    def _read(self) -> None:
        if not self._settings.paths.ledger.exists():
            self._rentals = []  # lost; that there is none is what `down` must see, so none is made
            return
        if not self._ledger.current():
            log.warning("the ledger was moved away or replaced; opening the one that is there now")
            self._ledger.close()
            self._ledger = Ledger(self._settings.paths.ledger)
        self._rentals = self._ledger.live()

    def _relink(self) -> None:
        """One link per rental that ssh reaches, none for those that are to end, a new one once the proxy has a port."""
        wanted = {rental.label: rental for rental in self._rentals if rental.state in (State.INSTALLING, State.READY)}
        for label, link in list(self._links.items()):
            rental = wanted.get(label)
            if rental is None or rental.proxy_port != link.rental.proxy_port or not link.is_alive():
                self._links.pop(label).stop()
        for label, rental in wanted.items():
            if label not in self._links:
                self._links[label] = Link(rental, self._open_line, self._endpoints)
                self._links[label].start()

    def _open_line(self, rental: Rental, endpoint: Endpoint) -> Line:
        return wiring.open_line(self._settings, rental, endpoint)

    def _endpoints(self, rental: Rental) -> Sequence[Endpoint]:
        """Where the market says the box is now; called from a link's thread."""
        try:
            box = wiring.provider(self._settings).get(rental.instance_id or 0)
        except SelfhostError as error:
            log.warning("box %s: %s", rental.instance_id, error.message)
            return ()
        return box.endpoints if box else ()

    def _end_what_nobody_uses(self) -> None:
        up_gone = self._up.holder() is None
        minutes = self._settings.boot_timeout + self._settings.install_timeout + self._settings.orphan
        for rental in self._rentals:
            unready = rental.state in (State.CREATING, State.BOOTING, State.INSTALLING)
            if self._lasts(rental, "orphaned", unready and up_gone, self._settings.orphan * 60):
                self._later(rental, self._end_orphan)
            elif self._lasts(rental, "unready", unready, minutes * 60):
                self._later(rental, _end_stuck)
            elif self._lasts(rental, "ending", rental.state is State.ENDING, STUCK_ENDING_S):
                self._later(rental, _finish)
            elif rental.state is State.READY and self._unreachable(rental):
                self._later(rental, _settle)

    def _end_orphan(self, books: lifecycle.Books, rental: Rental) -> None:
        """Asked once more, because loading the SDK took a moment in which a new `up` may have taken over."""
        if self._up.holder() is None:
            _end(books, rental, "its `selfhost up` is gone")

    def _unreachable(self, rental: Rental) -> bool:
        link = self._links.get(rental.label)
        down_since = link.down_since if link else None
        return down_since is not None and time.monotonic() - down_since > UNREACHABLE_S

    def _needs_us(self, rental: Rental) -> bool:
        link = self._links.get(rental.label)
        return (link is not None and link.down_since is None) or not outlived(rental, time.time())

    def _lasts(self, rental: Rental, what: str, holds: bool, seconds: float) -> bool:
        """Whether something has held for so long without a break."""
        key = (rental.label, what)
        if not holds:
            self._since.pop(key, None)
            return False
        return time.monotonic() - self._since.setdefault(key, time.monotonic()) > seconds

    def _later(self, rental: Rental, work: Callable[[lifecycle.Books, Rental], object]) -> None:
        if time.monotonic() - self._tried.get(rental.label, float("-inf")) < RETRY_S:
            return
        self._tried[rental.label] = time.monotonic()
        self._worker.submit(self._work, work, rental)

    def _work(self, work: Callable[[lifecycle.Books, Rental], object], rental: Rental) -> None:
        try:
            with closing(Ledger(self._settings.paths.ledger)) as ledger:
                work(wiring.books(self._settings, ledger, _log_event), rental)
        except SelfhostError as error:
            log.error("%s %s", error.message, error.remedy)
        except Exception:
            log.exception("ending %s", rental)  # a bug of ours must not end the keeper: it tries again

    def _front(self) -> web.Application:
        return front.build_front(
            token=attach.front_token(self._settings.paths),
            upstream=self._upstream,
            status=self._status,
            on_usage=self._on_usage,
            control={"state": self._control_state, "watch": self._control_watch},
        )

    def _upstream(self) -> front.Upstream | front.Away:
        for rental in self._rentals:
            link = self._links.get(rental.label)
            if link and link.state == "up" and link.port:
                return front.Upstream(f"http://127.0.0.1:{link.port}", rental.box_token, rental.label)
        if not self._rentals:
            return front.Away("gone", "no box is rented: run `selfhost up`", 15)
        rental = self._rentals[-1]
        link = self._links.get(rental.label)
        state, reason = (link.state, link.reason) if link else (str(rental.state), "the box is not ready yet")
        return front.Away(state, reason, 5)

    def _on_usage(self, usage: front.Usage) -> None:
        try:
            self._ledger.add_usage(
                usage.rental, usage.cls, Usage(1, usage.input_tokens, usage.cache_read, usage.output_tokens)
            )
        except SelfhostError as error:
            log.error("%s", error.message)

    def _status(self) -> dict[str, object]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "rentals": [
                {
                    "label": rental.label,
                    "instance_id": rental.instance_id,
                    "rental": rental.state,
                    "state": link.state if (link := self._links.get(rental.label)) else "waiting for box",
                    "reason": link.reason if link else "",
                }
                for rental in self._rentals
            ],
        }

    async def _control_state(self, _: dict[str, object]) -> dict[str, object]:
        return self._status()

    async def _control_watch(self, _: dict[str, object]) -> dict[str, object]:
        """Read the ledger now, and tell what is watched: asked by `up` before it pays."""
        self._read()
        self._relink()
        return self._status()

    def _announce(self, port: int) -> None:
        path = self._settings.paths.keeper_file
        draft = path.with_suffix(".new")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"pid": os.getpid(), "port": port, "version": __version__}, file)
        draft.replace(path)


def outlived(rental: Rental, now: float) -> bool:
    """Whether the box's own watchdog must have ended it by its hard cap an hour ago.

    When the market does not answer either, a keeper can do no more for it; the next command starts another one.
    """
    return now - (rental.sent_at or rental.created_at) > rental.caps.max_s + 3600


def _end(books: lifecycle.Books, rental: Rental, reason: str) -> None:
    log.warning("ending %s: %s", rental, reason)
    # advance, not end: whoever moved the rental on meanwhile knows better
    lifecycle.finish(books, books.ledger.advance(rental, State.ENDING, reason=reason))


def _end_stuck(books: lifecycle.Books, rental: Rental) -> None:
    _end(books, rental, "it did not get ready in time")


def _finish(books: lifecycle.Books, rental: Rental) -> None:
    lifecycle.finish(books, rental)


def _settle(books: lifecycle.Books, rental: Rental) -> None:
    if lifecycle.settle(books, rental):
        log.warning("%s has ended by itself", rental)


def _log_event(event: Event) -> None:
    log.info("%s %s %s", event.stage, event.status, event.text)


def _candidates(settings: Settings) -> list[int]:
    """Ports to try: the one that running Claude Codes know, then the configured one and those after it."""
    ports = list(range(settings.port, min(settings.port + PORTS, 65_536)))
    try:
        ports.insert(0, int(json.loads(settings.paths.keeper_file.read_text())["port"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no keeper before us, or one that ended properly
    return ports


def _listen(ports: Sequence[int]) -> socket.socket:
    for port in ports:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(128)
        except OSError:
            listener.close()
            continue
        return listener
    raise SelfhostError(f"no free local port among {ports[0]} to {ports[-1]}", "Choose another with --port.")
