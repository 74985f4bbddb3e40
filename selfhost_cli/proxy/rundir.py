"""The box's run directory: the files by which proxy, engine and watchdog know of each other."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from pathlib import Path

from selfhost_cli.proxy.errors import EngineDown

HOST = "127.0.0.1"
UNREAD = 2**17
"""Bytes that the kernel may keep for a client that does not read (Linux doubles it). By itself it would keep 4 MB."""

log = logging.getLogger("selfhost.proxy")


class RunDir:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._engine_port, self._activity = path / "engine.port", path / "activity"
        self._engine: tuple[tuple[int, int], str] | None = None

    def engine_url(self) -> str:
        """Raises EngineDown while the engine has not written its port."""
        try:
            stat = os.stat(self._engine_port)
        except OSError:
            raise EngineDown("the engine is still starting") from None
        written = stat.st_ino, stat.st_mtime_ns
        # asked for at every request: a look at the file is cheaper than reading it
        if self._engine is None or self._engine[0] != written:
            port = self._port("engine.port")
            if port is None:
                raise EngineDown("the engine is still starting")
            self._engine = written, f"http://{HOST}:{port}"
        return self._engine[1]

    @property
    def engine_start(self) -> tuple[int, int] | None:
        """Something else for every start of the engine, None while it is away."""
        try:
            self.engine_url()
        except EngineDown:
            return None
        return self._engine[0] if self._engine else None

    def slots(self, otherwise: int) -> int:
        """Answers at once for which the engine had room, where it came to less than was asked for."""
        try:
            told = json.loads((self.path / "engine.fit").read_bytes())["slots"]
        except (OSError, ValueError, KeyError, TypeError):
            return otherwise
        return told if isinstance(told, int) and 0 < told < otherwise else otherwise

    def touch_activity(self) -> None:
        """A client is being served now: the watchdog counts idleness from here. Where that cannot be noted it may end
        the box too early, but requests are answered."""
        try:
            self._activity.touch()
        except OSError as error:
            log.warning("%s: %s", self._activity, error)

    def mark_ready(self) -> None:
        """From the first time on the watchdog counts idleness at all; a restart must not begin that anew."""
        ready = self.path / "ready"
        if not ready.exists():
            ready.touch()

    def watched(self) -> dict[str, float] | None:
        """What the watchdog measured at its last look, `age_s` ago: seconds and dollars. None before the first."""
        path = self.path / "watch"
        try:
            up, lease, idle, dollars = map(float, path.read_text().split()[1:5])
            age = round(time.time() - path.stat().st_mtime, 1)
        except (OSError, ValueError):
            return None
        return {"age_s": age, "up_s": up, "lease_s": lease, "idle_s": idle, "dollars": dollars}

    def listen(self, preferred: int) -> socket.socket:
        """Bind the port of last time, the preferred one or the next that is free, and write it down."""
        before = self._port("proxy.port")
        candidates = [*([before] if before else []), *range(preferred, preferred + 100), 0]
        bound = _first_free(candidates)
        draft = self.path / f".proxy.port.{os.getpid()}"
        draft.write_text(f"{bound.getsockname()[1]}\n")
        draft.replace(self.path / "proxy.port")
        return bound

    def _port(self, name: str) -> int | None:
        try:
            port = int((self.path / name).read_text())
        except (OSError, ValueError):
            return None
        return port if 0 < port < 65536 else None


def _first_free(ports: list[int]) -> socket.socket:
    for port in ports:
        candidate = socket.socket()
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)  # what it accepts inherits it
        try:
            candidate.bind((HOST, port))
            # a port can be bound twice before one of the two listens
            candidate.listen(128)
        except (OSError, OverflowError):
            candidate.close()
            continue
        return candidate
    raise OSError("no free port on the loopback interface")
