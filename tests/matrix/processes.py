"""Real processes for each command: forked from one that has everything imported, on real files and real locks."""

from __future__ import annotations

import faulthandler
import functools
import gc
import logging
import os
import pickle
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx
from httpx._transports import default as transports

from selfhost_cli import config, lifecycle, payload
from selfhost_cli.attach import Front
from selfhost_cli.cli.app import _signals_interrupt
from selfhost_cli.cli.wiring import _billing_headline
from selfhost_cli.config import Settings
from selfhost_cli.errors import SelfhostError
from selfhost_cli.keeper.deadlines import Deadlines, Watch
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle import reaping
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Event, Rental, State
from selfhost_cli.remote.ssh import make_key, public_half
from tests.fakes.box import FakeKeeper, serving
from tests.matrix.outside import Change, Memory, Outside
from tests.matrix.tripwire import SteppedLedger, Tripwire

MODEL, CONTEXT = "qwen2.5-coder-0.5b", 32_768
REAL_S = 30
"""Seconds of real time until a process counts as hanging."""
KEEPER_S = 3600.0
TICK_S = 5.0

FLAGS = {
    "market_url": "http://127.0.0.1:9",
    "api_key": "account-key-0123456789",
    "engine": "llamacpp",
    "model": MODEL,
    "context": CONTEXT,
    "model_url": "http://127.0.0.1:9/model.gguf",
    "model_bytes": 491_400_064,
    "disk": 30.0,
}


@dataclass(frozen=True)
class Answer:
    """How a process ended. `code` is what a shell would see: negative is the signal; `error` is what it said."""

    code: int
    error: str = ""
    kind: str = ""
    box: int | None = None
    armed: bool = True
    steps: tuple[str, ...] = ()
    seen: tuple[object, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """The files of a scene (None: a directory), their modes, and the pickled outside."""

    files: dict[Path, bytes | None]
    modes: dict[Path, int]
    outside: bytes


@dataclass
class Scene:
    """One installation's directory and the world outside; `run` starts a process in it and waits for its end."""

    folder: Path
    front: Front
    memory: Memory = field(default_factory=Memory)
    _left_stopped: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings = config.load("default", flags=FLAGS, env={"SELFHOST_HOME": str(self.folder)})
        self.settings.paths.make()
        self.outside = Outside.fresh()

    def run(
        self,
        what: str,
        *,
        at: int | str | None = None,
        kind: str = "kill",
        record: bool = False,
        change: Change | None = None,
    ) -> Answer:
        """Run `up`, `down`, `reap` or `keeper` to its end, or until `kind` happens to it at its step number `at`.

        kind: kill (SIGKILL) · stop (SIGSTOP: it stays there until `reap`) · ctrl-c · ending (another process
        records ENDING, and it goes on). `change` is done to the outside when that happens, or at the end.
        """
        self.memory.save(self.outside)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _Process(self, what, at, kind, record, change).live()
        _, status = os.waitpid(child, os.WUNTRACED)
        stopped = os.WIFSTOPPED(status)
        if stopped:
            self._left_stopped.append(child)
        self.outside = self.memory.load()
        answer = self.outside.answer
        self.outside.answer = None
        if isinstance(answer, Answer):
            return answer
        if stopped:
            return Answer(-signal.SIGSTOP)
        code = os.waitstatus_to_exitcode(status)
        return Answer(code, kind="" if code == -signal.SIGKILL else "hang")

    def reap(self) -> None:
        """End the processes that were left stopped, if nobody did."""
        while self._left_stopped:
            child = self._left_stopped.pop()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def snapshot(self) -> Snapshot:
        """Everything that lasts, as a killed process left it."""
        files = {path: path.read_bytes() if path.is_file() else None for path in sorted(self.folder.rglob("*"))}
        return Snapshot(files, {path: path.stat().st_mode for path in files}, pickle.dumps(self.outside))

    def restore(self, earlier: Snapshot) -> None:
        self.reap()
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        for path, data in earlier.files.items():
            if data is None:
                path.mkdir()
            else:
                path.write_bytes(data)
            path.chmod(earlier.modes[path])
        self.outside = pickle.loads(earlier.outside)

    def rental(self) -> Rental | None:
        """The live one, as the ledger has it."""
        if not self.settings.paths.ledger.exists():
            return None
        with closing(Ledger(self.settings.paths.ledger)) as ledger:
            return next(iter(ledger.live()), None)

    def state(self) -> State | None:
        rental = self.rental()
        return rental.state if rental else None

    def lose_the_ledger(self) -> None:
        for path in self.settings.paths.state.glob("ledger.sqlite3*"):
            path.unlink()


class _Process:
    """The life of one forked process."""

    def __init__(
        self, scene: Scene, what: str, at: int | str | None, kind: str, record: bool, change: Change | None
    ) -> None:
        self._scene, self._what, self._kind, self._change = scene, what, kind, change
        self._outside = scene.memory.load()
        self._record = record
        self._wire = Tripwire(at, self._happen, self._fingerprint if record else None)

    def live(self) -> NoReturn:
        code = 70
        logging.disable(logging.CRITICAL)
        try:
            faulthandler.dump_traceback_later(REAL_S, exit=True)
            code = self._run()
        finally:
            os._exit(code)

    def _run(self) -> int:
        settings = self._scene.settings
        self._wire.watch_files(self._scene.folder)
        try:
            with _signals_interrupt():
                if self._what == "keeper":
                    self._keeper(settings)
                    answer = Answer(0)
                else:
                    answer = self._command(settings)
        except SelfhostError as error:
            answer = Answer(error.exit_code, f"{error.message} {error.remedy}", type(error).__name__)
        except KeyboardInterrupt:
            answer = Answer(130)
        except BaseException:
            answer = Answer(70, traceback.format_exc(), "traceback")
        self._leave(answer)
        return answer.code

    def _leave(self, answer: Answer | None) -> None:
        if answer and self._record:
            answer = Answer(
                answer.code, answer.error, answer.kind, answer.box, answer.armed,
                tuple(self._wire.steps), tuple(self._wire.seen),
            )  # fmt: skip
        self._outside.answer = answer
        self._scene.memory.save(self._outside)

    def _command(self, settings: Settings) -> Answer:
        with closing(SteppedLedger(settings.paths.ledger, self._wire)) as ledger, _billing_headline(settings, ledger):
            if self._outside.full:
                ledger._db.execute("PRAGMA query_only = 1")
            world = self._world(settings, ledger)
            if self._what == "down":
                lifecycle.down(world)
                return Answer(0)
            if self._what == "reap":
                reaping.reap(world)
                return Answer(0)
            rental = lifecycle.up(world, lambda plan: True)
            return Answer(0, box=rental.instance_id, armed=self._outside.box.armed == "ok")

    def _world(self, settings: Settings, ledger: Ledger) -> lifecycle.World:
        outside, wire = self._outside, self._wire
        keeper = FakeKeeper(ledger, self._scene.front, blind=outside.blind)
        keeper.tunnel = self._tunnel  # type: ignore[method-assign]

        def connect(*arguments: Any) -> Any:
            return wire.around("ssh", outside.box.connect(*arguments))

        return lifecycle.World(
            settings=settings,
            provider=wire.around("market", outside.market),
            ledger=ledger,
            report=_nobody_listens,
            clock=outside.clock,
            keeper=wire.around("keeper", keeper),
            connect=wire.call("ssh:connect", connect),
            make_key=make_key,
            public_half=public_half,
            find_claude=lambda: Path("/bin/claude"),
            find_model=lambda: None,
        )

    def _tunnel(self, label: str) -> tuple[str, str]:
        return (self._outside.tunnel, "") if self._outside.market.ours else ("reconnecting", "connection refused")

    def _keeper(self, settings: Settings) -> None:
        """The keeper's loop in virtual time, until nothing is billed or its patience is at its end."""
        outside = self._outside
        deadlines, began = Deadlines(settings, outside.clock), outside.clock.monotonic()
        if outside.blind or not settings.paths.ledger.exists():
            return
        with closing(SteppedLedger(settings.paths.ledger, self._wire)) as ledger:
            books = lifecycle.Books(
                settings=settings, provider=self._wire.around("market", outside.market), ledger=ledger,
                report=_nobody_listens, clock=outside.clock,
            )  # fmt: skip
            while outside.clock.monotonic() - began < KEEPER_S:
                rentals = ledger.live()
                if not rentals or (rentals[0].state is State.READY and outside.market.ours):
                    return
                for rental in rentals:
                    there = any(box.label == rental.label for box in outside.market.ours)
                    if work := deadlines.due(rental, Watch(down_since=None if there else began)):
                        try:
                            work(books, rental)
                        except SelfhostError:
                            pass  # the real one logs it, and tries again
                outside.clock.sleep(TICK_S)

    def _happen(self) -> None:
        """The step has come at which something happens to this process."""
        if self._change:
            self._change(self._outside)
        match self._kind:
            case "kill":
                self._leave(None)
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                self._leave(None)
                os.kill(os.getpid(), signal.SIGSTOP)
            case "ctrl-c":
                os.kill(os.getpid(), signal.SIGINT)
            case "ending":
                with closing(Ledger(self._scene.settings.paths.ledger)) as ledger:
                    for rental in ledger.live():
                        ledger.end(rental.label, "down")
                        sent = rental.sent_at is not None and rental.instance_id is None  # too late to hold that back
                        if rental.ready_at is None:
                            self._outside.made_before_ending = len(self._outside.market.made) + sent
            case _:
                raise ValueError(self._kind)

    def _fingerprint(self) -> object:
        """Everything that a next process could see of this moment, the time aside."""
        paths, market, box = self._scene.settings.paths, self._outside.market, self._outside.box
        rows: list[Any] = []
        if paths.ledger.exists():
            with closing(Ledger(paths.ledger)) as ledger:
                rows = [
                    (rental.state, rental.instance_id, rental.sent_at, rental.endpoint, rental.host_keys)
                    for rental in ledger.all()
                ]
        files = sorted(str(path) for path in self._scene.folder.rglob("*") if "sqlite3-" not in path.name)
        files = [name for name in files if ".ledger.sqlite3." not in name]
        locks = [ProcessLock(path).holder() for path in (paths.up_lock, paths.down_lock)]
        counters = (market.gone, market.lost_with_effect, market.lost_without_effect, market.undead)
        counters += (market.failing_destroys, market.unknown_lists, market.refusing, len(market.made), box.refusals)
        counters += (sorted(box.shown.items()), sorted(box.follows.items()), sorted(box.limits.items()))
        return hash(repr((rows, files, locks, sorted(market.boxes), sorted(market.ghosts), counters)))


def _nobody_listens(event: Event) -> None:
    pass


@contextmanager
def fork_server() -> Iterator[Callable[[], Scene]]:
    """Everything imported and computed once. Gives a maker of scenes, each in a directory in memory if possible."""
    transports.create_ssl_context = functools.cache(transports.create_ssl_context)
    payload.proxy_zip = functools.cache(payload.proxy_zip)  # the same sources give the same bytes
    payload.proxy_zip()
    httpx.Client(trust_env=False).close()
    "127.0.0.1".encode("idna")  # loads the codec
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shared = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="crash-matrix-", dir=shared if os.access(shared, os.W_OK) else None))
    port, keeper = _front()
    made: list[Path] = []

    def scene() -> Scene:
        for old in made:
            shutil.rmtree(old)
        made[:] = [root / "scene"]
        made[0].mkdir()
        return Scene(made[0], Front(f"http://127.0.0.1:{port}", port, "front-token"))

    try:
        yield scene
    finally:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)
        shutil.rmtree(root)


def _front() -> tuple[int, int]:
    """A front with a healthy box behind it in a process of its own, so that this one stays without threads."""
    tell, told = os.pipe()[::-1]
    alive, parent = os.pipe()
    child = os.fork()
    if not child:
        os.close(parent)
        with serving(MODEL, CONTEXT) as front:
            os.write(tell, str(front.port).encode())
            os.read(alive, 1)  # until the parent is gone
        os._exit(0)
    os.close(alive)
    return int(os.read(told, 10)), child
