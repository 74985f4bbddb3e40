"""Ollama's release archive as it was seen first, kept as ssh keeps its known hosts: later boxes must get the same file.

No list of checksums to check it against is published in a place that this project could read. So the first box's
archive is taken on trust, and what it was is remembered; another file under the same address is refused from then on.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

from selfhost_cli.errors import UsageError


@dataclass(frozen=True)
class Archive:
    """One file: `size` in bytes, its checksum, and the version that the program inside said it has."""

    size: int
    sha256: str
    version: str
    url: str

    def __str__(self) -> str:
        """As a box writes it to run/archive, and as it is kept: the four, separated by spaces."""
        return " ".join(str(value) for value in astuple(self))


def parse(line: str) -> Archive:
    """Raises ValueError."""
    size, sha256, version, url = line.split()
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise ValueError(f"{sha256!r} is no SHA-256 checksum")
    return Archive(int(size), sha256, version, url)


def recall(path: Path, url: str, version: str) -> Archive | None:
    """What was seen first under this address, None when nothing was yet. Raises UsageError for a broken file."""
    return next((found for found in _read(path) if (found.url, found.version) == (url, version)), None)


def remember(path: Path, archive: Archive) -> None:
    """Keep it, unless there is one of this address and version already: the first one counts."""
    if recall(path, archive.url, archive.version) is None:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{archive}\n")


def _read(path: Path) -> list[Archive]:
    try:
        return [parse(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UsageError(f"{path}: {error}", "Delete the wrong line; what it held is recorded anew.") from error
