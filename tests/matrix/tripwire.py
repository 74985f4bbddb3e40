"""Every step of a process, found by hooking what it does: the seams' verbs, the ledger's transactions, its files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfhost_cli.ledger import Ledger

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FILE_EVENTS = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock", "os.kill")


class Tripwire:
    """Counts the steps; at number `at` (from 0), or the first with that name, it calls `act`. Names them in `steps`."""

    def __init__(self, at: int | str | None, act: Callable[[], None], look: Callable[[], object] | None = None) -> None:
        self.steps: list[str] = []
        self.seen: list[object] = []
        """What `look` returned at each step."""
        self._at, self._act, self._look = at, act, look
        self._busy = False

    def step(self, name: str) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            self.steps.append(name)
            if self._look:
                self.seen.append(self._look())
            if self._at in (name, len(self.steps) - 1):
                self._at = None
                self._act()
        finally:
            self._busy = False

    def watch_files(self, below: Path) -> None:
        """Every change of a file there, every lock, every signal and every connection: before it happens. For good."""
        prefix = str(below)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, _, flags = arguments
                if isinstance(path, str | Path) and str(path).startswith(prefix) and int(flags) & WRITING:
                    self.step(f"file:open {Path(path).name}")
            elif event in FILE_EVENTS or event == "socket.connect":
                self.step(f"file:{event}")

        sys.addaudithook(hook)

    def around(self, seam: str, target: Any) -> Any:
        """`target` with a step before and after each call of its verbs, also when the verb raises."""
        return _Seam(self, seam, target)

    def call(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any, **named: Any) -> Any:
            self.step(f"{name}:before")
            try:
                return function(*arguments, **named)
            finally:
                self.step(f"{name}:after")

        return stepped


class _Seam:
    def __init__(self, wire: Tripwire, name: str, target: Any) -> None:
        self._wire, self._name, self._target = wire, name, target

    def __getattr__(self, verb: str) -> Any:
        value = getattr(self._target, verb)
        return self._wire.call(f"{self._name}:{verb}", value) if callable(value) else value


class SteppedLedger(Ledger):
    """The real ledger, with steps before each transaction begins, before it commits, and after."""

    def __init__(self, path: Path, wire: Tripwire) -> None:
        self._wire = wire
        super().__init__(path)
        self._db.execute("PRAGMA busy_timeout = 300")  # of real time, for a process that was stopped in the middle

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        method = sys._getframe(2).f_code.co_name
        self._wire.step(f"ledger:{method}:before")
        with super()._transaction() as db:
            yield db
            self._wire.step(f"ledger:{method}:commit")
        self._wire.step(f"ledger:{method}:after")
