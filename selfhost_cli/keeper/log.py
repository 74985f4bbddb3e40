"""The keeper's log does not grow without bound: it is our stderr, which outlives each keeper, and is cut in place."""

from __future__ import annotations

import logging
import os
from pathlib import Path

LARGEST, KEPT = 4_000_000, 400_000
"""Bytes: of the log, and of its end when it became larger."""


class Log(logging.StreamHandler):  # type: ignore[type-arg]
    """To stderr. `bound`: cut the file at that path as it grows, provided that stderr is it."""

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None

    def bound(self, path: Path) -> None:
        """Only the keeper that has the lock may: two would cut each other's lines."""
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if self._path:
            try:
                cut(self._path, self.stream.fileno())
            except (OSError, ValueError):
                pass  # a log that cannot be cut must not end who ends boxes


def cut(path: Path, descriptor: int, largest: int = LARGEST, kept: int = KEPT) -> None:
    """Leave the last whole lines of a file that is open for appending. Raises OSError."""
    status = os.fstat(descriptor)
    if status.st_size <= largest or not os.path.samestat(status, path.stat()):
        return
    with path.open("rb") as file:
        file.seek(-kept, os.SEEK_END)
        rest = file.read().partition(b"\n")[2]
    os.ftruncate(descriptor, 0)
    os.write(descriptor, rest)  # at the end, which is the beginning now
