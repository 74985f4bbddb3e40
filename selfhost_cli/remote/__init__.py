"""The seam to a box: run a command, put a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from selfhost_cli.errors import SelfhostError


class NotYet(SelfhostError):
    """The box cannot be used yet (refused, denied, or another host key before first contact): try again."""


class OtherKey(NotYet):
    """Somebody answers who is not the box, or not yet: no login was tried."""


class ConnectionLost(SelfhostError):
    """The connection broke while something ran; whether it finished is unknown."""


@dataclass(frozen=True)
class Result:
    """What a remote command said and how it ended."""

    code: int
    out: str
    err: str


class Remote(Protocol):
    """An authenticated connection to one box whose host key was checked. Raises ConnectionLost when it breaks."""

    def run(self, command: str, *, timeout: float = 60.0, on_line: Callable[[str], None] | None = None) -> Result:
        """Run a shell command; `on_line` sees each line of stdout as it comes. `timeout` is seconds of silence."""
        ...

    def put(self, data: bytes, path: str, *, mode: int = 0o600) -> None:
        """Write a file (relative to the home directory) atomically, with that mode from its first byte."""
        ...

    def close(self) -> None: ...
