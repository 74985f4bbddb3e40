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
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial

from aiohttp import web

from selfhost_cli import __version__, attach, backends, config, countdown, invoice
from selfhost_cli.backends import Backend
from selfhost_cli.config import Settings
from selfhost_cli.errors import SelfhostError, plain
from selfhost_cli.keeper import router, wiring
from selfhost_cli.keeper.boxes import Boxes
from selfhost_cli.keeper.deadlines import LAST_TRIES_S, Deadlines, Watch, Work, outlived
from selfhost_cli.keeper.links import Line, Link, LinkState
from selfhost_cli.keeper.log import Log
from selfhost_cli.keeper.notice import Notice
from selfhost_cli.keeper.prewarming import Prewarming
from selfhost_cli.keeper.scaling import Scaling
from selfhost_cli.keeper.serving import Serving, probe
from selfhost_cli.ledger import Ledger, Usage
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Endpoint, Event, Rental, State
from selfhost_cli.proxy import front
from selfhost_cli.proxy.errors import ProxyError
from selfhost_cli.proxy.web import runner as hosted

TICK_S = 1.0
IDLE_EXIT_S = 3.0
PORTS = 50
BACKLOG = 512
"""Connections that may wait to be taken: of more at once, some come a second late."""
REASONS = 8
"""Of one state of a link, so many are noted at most: what a box says may be in them."""

log = logging.getLogger("selfhost.keeper")


def run(profile: str) -> None:
    """Run the keeper of a profile until nothing needs it. Returns at once when there is one already."""
    handler = Log()
    handler.setFormatter(Plain("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # its own account of what links already tell
    try:
        settings = config.load(profile)
        lock = ProcessLock(settings.paths.keeper_lock)
        if not lock.acquire():
            return
        with lock:
            handler.bound(settings.paths.keeper_log)
            asyncio.run(_Keeper(settings).live())
    except SelfhostError as error:
        log.error("%s %s", error.message, error.remedy)
        sys.exit(error.exit_code)


class Plain(logging.Formatter):
    """The log is read on a terminal, and tells what boxes and the market said."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


class _Keeper:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ledger = Ledger(settings.paths.ledger)
        self._up = ProcessLock(settings.paths.up_lock)
        self._links: dict[str, Link] = {}
        self._rentals: list[Rental] = []
        self._told: dict[str, tuple[LinkState, frozenset[str]]] = {}
        self._deadlines = Deadlines(settings)
        self._warnings = countdown.Warnings()
        self._notice = Notice(settings.paths, settings.profile)
        self._prewarming = Prewarming(settings)
        self._serving_now = Serving(settings, self._box, self._spent, os.environ, partial(wiring.forward, settings))
        self._boxes = Boxes(self._reached, router.words if router.there() else None)
        self._scaling = Scaling(settings, self._boxes.healths, self._spent_on_boxes, os.environ)
        self._probing = 0
        self._began = time.monotonic()
        self._stop = asyncio.Event()
        # One worker: whatever ends boxes does so one after the other, with a ledger of its own thread.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ending")
        self._at_work: dict[str, Future[None]] = {}

    async def live(self) -> None:
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._stop.set)
        self._read()
        runner = hosted(self._front())
        await runner.setup()
        listener = _listen(_candidates(self._settings))
        await web.SockSite(runner, listener, backlog=BACKLOG).start()
        port = listener.getsockname()[1]
        self._announce(port)
        log.info("keeper %s of profile %s on port %s", __version__, self._settings.profile, port)
        try:
            await self._loop()
        finally:
            self._settings.paths.keeper_file.unlink(missing_ok=True)
            self._notice.tell("")
            self._prewarming.stop()
            self._scaling.stop()
            for link in self._links.values():
                link.stop()
            await self._serving_now.stop()
            await self._boxes.stop()
            await runner.cleanup()
            self._worker.shutdown(wait=False, cancel_futures=True)
            log.info("keeper ends")

    async def _loop(self) -> None:
        idle_since = time.monotonic()
        while not self._stop.is_set():
            self._tick()
            await self._serving_now.tick()
            await self._spread()
            if self._needed():
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > IDLE_EXIT_S:
                return
            try:
                await asyncio.wait_for(self._stop.wait(), TICK_S)
            except TimeoutError:
                pass

    async def _spread(self) -> None:
        try:
            await self._boxes.tick([rental.label for rental in self._rentals if rental.state is State.READY])
        except Exception:
            log.exception("spreading conversations over boxes")  # the keeper also renews their leases

    def _needed(self) -> bool:
        if self._up.holder() is not None or self._serving_now.needs_us or self._probing:
            return True
        return any(self._needs_us(rental) for rental in self._rentals)

    def _tick(self) -> None:
        try:
            self._read()
            self._note_traffic()
            self._relink()
            self._note_links()
            self._prewarming.tick([*self._reached(), *self._serving_now.machines()])
            self._scaling.tick(self._rentals)
            self._end_what_nobody_uses()
            self._warn()
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
        """One link per rental that ssh reaches, none for those that are to end, a new one once what it needs is new."""
        wanted = {rental.label: rental for rental in self._rentals if self._is_worth_a_link(rental)}
        for label, link in list(self._links.items()):
            rental = wanted.get(label)
            if rental is None or _way(rental) != _way(link.rental) or not link.is_alive():
                over = LinkState.REPLACED if rental is None and wanted else LinkState.STOPPED
                self._links.pop(label).stop(over)
                self._tell(label, over)
        for label, rental in wanted.items():
            if label not in self._links:
                self._links[label] = Link(rental, self._open_line, self._endpoints)
                self._links[label].start()

    def _note_links(self) -> None:
        """Each link's states, in the ledger, with the reasons that it had."""
        for label, link in self._links.items():
            self._tell(label, link.state, link.reason)

    def _tell(self, label: str, state: LinkState, reason: str = "") -> None:
        before, reasons = self._told.get(label, (None, frozenset()))
        if before is not state:
            reasons = frozenset()
        if reason not in reasons and len(reasons) < REASONS:
            self._told[label] = state, reasons | {reason}
            try:
                self._ledger.tell(label, "link", f"{state} {reason}".rstrip())
            except SelfhostError as error:  # what is only told must not keep anybody from looking after boxes
                log.error("%s", error.message)

    def _is_worth_a_link(self, rental: Rental) -> bool:
        """A link renews the lease: a box that is to end must not live on it, should we fail to end it."""
        return rental.state is State.READY or (
            rental.state is State.INSTALLING and not self._deadlines.orphaned(rental)
        )

    def _open_line(self, rental: Rental, endpoint: Endpoint, sock: socket.socket) -> Line:
        return wiring.open_line(self._settings, rental, endpoint, sock)

    def _endpoints(self, rental: Rental) -> Sequence[Endpoint] | None:
        """Where the market says the box is now, None when it says that there is none; called from a link's thread."""
        try:
            box = wiring.provider(self._settings).get(rental.instance_id or 0)
        except SelfhostError as error:
            log.warning("box %s: %s", rental.instance_id, error.message)
            return ()
        return box.endpoints if box else None

    def _end_what_nobody_uses(self) -> None:
        for rental in self._rentals:
            link = self._links.get(rental.label)
            watch = Watch(link.down_since, link.last, link.heard.verdict if link.heard else "") if link else None
            work, before = self._deadlines.due(rental, watch), self._at_work.get(rental.label)
            if work and (before is None or before.done()):  # else what is due later would wait behind stale questions
                self._at_work[rental.label] = self._worker.submit(self._work, work, rental)

    def _warn(self) -> None:
        """Before a cap or idleness ends a box: in the log, as in `status`, and where Claude Code shows it."""
        told = []
        for rental in self._rentals:
            link = self._links.get(rental.label)
            heard = (link.last if link else None) or rental.heard
            if heard and rental.state is State.READY:
                away = link is None or link.down_since is not None
                ends = countdown.projected(rental, heard, now=time.time(), away=away)
                told.append(countdown.in_short(rental, ends))
                for text in self._warnings.due(rental, ends):
                    log.warning("%s", text)
        self._notice.tell("; ".join(filter(None, told)))

    def _note_traffic(self) -> None:
        """What the boxes' watchdogs counted, in the ledger: `down` bills it when the market has no figures yet."""
        for rental in self._rentals:
            link = self._links.get(rental.label)
            heard = link.last if link else None
            if link and heard and invoice.worth_noting(rental, heard, lost=link.down_since is not None):
                try:
                    self._ledger.amend(rental.label, heard=heard)
                except SelfhostError as error:  # a worse estimate, and no reason to look after boxes less
                    log.error("%s", error.message)

    def _needs_us(self, rental: Rental) -> bool:
        link = self._links.get(rental.label)
        if link is not None and link.down_since is None:
            return True
        return not outlived(rental, time.time()) or time.monotonic() - self._began < LAST_TRIES_S

    def _work(self, work: Work, rental: Rental) -> None:
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
            upstream=self._serving_now.upstream,
            status=self._status,
            on_usage=self._on_usage,
            control={
                "state": self._control_state,
                "watch": self._control_watch,
                "prewarm": self._control_prewarm,
                "use": self._control_use,
                "contexts": self._control_contexts,
                "boxes": self._control_boxes,
                "test": self._control_test,
            },
            cache=wiring.cache(self._settings, self._serving),
            on_main=self._prewarming.heard,
            on_failed=self._serving_now.failed,
            assign=self._assign,
        )

    async def _assign(self, target: front.Upstream, session: str, avoid: front.Upstream | None) -> front.Upstream:
        return await self._boxes.assign(target, session, avoid) if target.backend == backends.VAST else target

    def _serving(self) -> str:
        """The label of the box that answers, or did until it was lost."""
        target = self._serving_now.upstream()
        if isinstance(target, front.Upstream):
            return target.rental
        return self._rentals[-1].label if self._rentals else ""

    def _reached(self) -> Iterator[front.Upstream]:
        """The proxies of the boxes that a tunnel leads to."""
        for rental in self._rentals:
            link = self._links.get(rental.label)
            if link and link.port:
                url = f"http://127.0.0.1:{link.port}"
                yield front.Upstream(url, rental.box_token, rental.label, changing=rental.changing)

    def _box(self) -> front.Upstream | front.Away:
        if reached := next(self._reached(), None):
            return reached
        if not self._rentals:
            return front.Away("gone", "no box is rented: run `selfhost up`", 15)
        rental = self._rentals[-1]
        link = self._links.get(rental.label)
        state, reason = (link.state, link.reason) if link else (str(rental.state), "the box is not ready yet")
        return front.Away(state, reason, 5 if rental.state is State.READY else 60)

    def _spent(self, backend: Backend, since: float) -> float:
        """Dollars, by the ledger; all of them when that cannot be read: a cap that is not known is reached."""
        try:
            used = self._ledger.usage(backend.label, since=since)
        except SelfhostError:
            return float("inf")
        return backend.price(used.input_tokens - used.cached_tokens, used.cached_tokens, used.output_tokens)

    def _spent_on_boxes(self, since: float) -> float:
        """Dollars, of rentals that began since and have ended; all of them when the ledger cannot be read."""
        try:
            over = [one for one in self._ledger.all() if one.created_at >= since and one.state is State.ENDED]
        except SelfhostError:
            return float("inf")
        now = time.time()
        return sum(invoice.invoice(one, Usage(), now=now).most for one in over if one.instance_id)

    def _on_usage(self, usage: front.Usage) -> None:
        try:
            tokens = Usage(1, usage.input_tokens, usage.cache_read, usage.output_tokens)
            self._ledger.add_usage(usage.rental, usage.cls, tokens, usage.prompt_s)
        except SelfhostError as error:
            log.error("%s", error.message)

    def _status(self) -> dict[str, object]:
        sessions = self._boxes.sessions()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "backends": self._serving_now.told(),
            "rentals": [
                {
                    "label": rental.label,
                    "instance_id": rental.instance_id,
                    "rental": rental.state,
                    "state": link.state if (link := self._links.get(rental.label)) else "waiting for box",
                    "reason": link.reason if link else "",
                    "sessions": sessions[rental.label],
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

    async def _control_prewarm(self, told: dict[str, object]) -> dict[str, object]:
        """`directory`, where a session is about to begin, and what it will be told of `model` and `context`."""
        match told:
            case {"directory": str(directory), "model": str(model), "context": int(context)}:
                self._prewarming.ahead_of(directory, model, context)
                return {}
        raise ProxyError(400, "invalid_request_error", "directory, model, context: as text, text and number")

    async def _control_use(self, told: dict[str, object]) -> dict[str, object]:
        """Read now what is chosen; `keys`: of backends, from the environment of whoever chose."""
        held = told.get("keys")
        for name, key in held.items() if isinstance(held, dict) else ():
            self._serving_now.give(str(name), str(key))
        await self._serving_now.tick()
        return self._serving_now.told()

    async def _control_contexts(self, _: dict[str, object]) -> dict[str, object]:
        return dict(await self._serving_now.contexts())

    async def _control_boxes(self, _: dict[str, object]) -> dict[str, object]:
        """What each box that is reached says of itself, by its label."""
        return await self._boxes.healths()

    async def _control_test(self, told: dict[str, object]) -> dict[str, object]:
        """Ask the backend `name` for a token, with `key`, whether it is in use or not."""
        self._probing += 1
        try:
            backend = backends.get(self._settings.paths, str(told.get("name")))
            return await probe(backend, str(told.get("key") or ""))
        except SelfhostError as error:
            raise ProxyError(400, "invalid_request_error", error.message) from error
        finally:
            self._probing -= 1

    def _announce(self, port: int) -> None:
        path = self._settings.paths.keeper_file
        draft = path.with_suffix(".new")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"pid": os.getpid(), "port": port, "version": __version__}, file)
        draft.replace(path)


def _way(rental: Rental) -> tuple[object, ...]:
    """What a link goes by as long as it lasts. One that outlived its host key would accept that one for ever."""
    return rental.proxy_port, rental.host_keys


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
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            continue
        return listener
    raise SelfhostError(f"no free local port among {ports[0]} to {ports[-1]}", "Choose another with --port.")
