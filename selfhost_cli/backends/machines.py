"""What we know of machines of one's own that we installed on, and nobody else may: the token of the proxy there."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from selfhost_cli.config import Paths


@dataclass(frozen=True)
class Machine:
    """`port`: of the proxy, on its own 127.0.0.1."""

    token: str = field(repr=False)
    port: int


def name_for(destination: str) -> str:
    """A backend's name, of a destination as `ssh` takes it."""
    host = re.sub(r"^ssh://|:\d+/?$", "", destination).rpartition("@")[2]
    return re.sub(r"[^a-z0-9]+", "-", host.lower()).strip("-")[:32].strip("-") or "machine"


def recall(paths: Paths, name: str) -> Machine | None:
    """None when there is nothing of it that makes sense."""
    try:
        told = json.loads(_file(paths, name).read_bytes())
        return Machine(str(told["token"]), int(told["port"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(paths: Paths, name: str, machine: Machine) -> None:
    file = _file(paths, name)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_suffix(f".{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        json.dump(asdict(machine), out)
    draft.replace(file)


def forget(paths: Paths, name: str) -> None:
    _file(paths, name).unlink(missing_ok=True)


def _file(paths: Paths, name: str) -> Path:
    return paths.state / "backends" / name / "machine.json"
