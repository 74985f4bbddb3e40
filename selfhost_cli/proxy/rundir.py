"""The box's run directory: the files by which proxy, engine and watchdog know of each other."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from selfhost_cli.proxy.errors import EngineDown

HOST = "127.0.0.1"
UNREAD = 2**17
"""Bytes that the kernel may keep for a client that does not read (Linux doubles it). By itself it would keep 4 MB."""


class RunDir:
    def __init__(self, path: Path) -> None:
        self.path = path

    def engine_url(self) -> str:
        """Raises EngineDown while the engine has not written its port."""
        port = self._port("engine.port")
        if port is None:
            raise EngineDown("the engine is still starting")
        return f"http://{HOST}:{port}"

    def touch_activity(self) -> None:
        """A client is being served now: the watchdog counts idleness from here."""
        (self.path / "activity").touch()

    def mark_ready(self) -> None:
        """From the first time on the watchdog counts idleness at all; a restart must not begin that anew."""
        ready = self.path / "ready"
        if not ready.exists():
            ready.touch()

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
