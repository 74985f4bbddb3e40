"""Where the key of a backend is: in the environment, in a file of its own, in the system's keyring. Never in a listing.

A place is written `env:NAME`, `file` (`keys/BACKEND` of the profile's configuration, for its owner alone) or `keyring`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfhost_cli.config import Paths
from selfhost_cli.errors import NotSetUp, UsageError

SERVICE = "selfhost"
"""Under which the keyring has them."""
PLACES = "env:NAME, file or keyring"


def checked(place: str) -> str:
    """A place as it may be written, "" for none. Raises UsageError."""
    if place in ("", "file", "keyring") or re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*", place):
        return place
    raise UsageError(f"{place!r} is no place for a key: expected {PLACES}")


def read(paths: Paths, name: str, place: str, env: Mapping[str, str]) -> str:
    """The key of the backend of that name, "" when it has none. Raises NotSetUp, without the key in it."""
    if not place:
        return ""
    key = _clean(_held(paths, name, place, env))
    if not key:
        raise NotSetUp(f"backend {name}: its key is empty ({_where(paths, name, place)})", _remedy(name, place))
    if not key.isascii() or any(character.isspace() or not character.isprintable() for character in key):
        raise NotSetUp(
            f"backend {name}: its key holds what no key holds ({_where(paths, name, place)})", _remedy(name, place)
        )
    return key


def keep(paths: Paths, name: str, place: str, key: str) -> None:
    """Put it there. Raises UsageError for a place that is not ours to write."""
    if place == "file":
        path = _file(paths, name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(_clean(key) + "\n")
        draft.replace(path)
    elif place == "keyring":
        _keyring(name).set_password(SERVICE, _entry(paths, name), _clean(key))
    else:
        raise UsageError(f"a key at {place!r} is not kept by selfhost", "Use --key file or --key keyring.")


def forget(paths: Paths, name: str, place: str) -> None:
    if place == "file":
        _file(paths, name).unlink(missing_ok=True)
    elif place == "keyring":
        ring = _keyring(name)
        if ring.get_password(SERVICE, _entry(paths, name)) is not None:
            ring.delete_password(SERVICE, _entry(paths, name))


def variable(place: str) -> str:
    """Which variable of the environment holds it, "" for none."""
    return place.partition(":")[2] if place.startswith("env:") else ""


def _held(paths: Paths, name: str, place: str, env: Mapping[str, str]) -> str:
    if wanted := variable(place):
        if wanted not in env:
            raise NotSetUp(f"backend {name}: its key is missing: {wanted} is not set", _remedy(name, place))
        return env[wanted]
    if place == "keyring":
        held = _keyring(name).get_password(SERVICE, _entry(paths, name))
        if held is None:
            raise NotSetUp(f"backend {name}: its key is missing from the keyring", _remedy(name, place))
        return str(held)
    path = _file(paths, name)
    try:
        mode = path.stat().st_mode
        text = path.read_text()
    except FileNotFoundError:
        raise NotSetUp(f"backend {name}: its key is missing: {path} is not there", _remedy(name, place)) from None
    except (OSError, ValueError) as error:
        raise NotSetUp(f"backend {name}: {path}: {error}", _remedy(name, place)) from error
    if stat.S_IMODE(mode) & 0o077:
        raise NotSetUp(
            f"backend {name}: others may read {path}", f"Run `chmod 600 {path}`; the key may be known by now."
        )
    return text


def _keyring(name: str) -> Any:
    """The package of that name, which is an extra. Raises NotSetUp."""
    try:
        import keyring  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise NotSetUp(
            f"backend {name}: its key is in the keyring, and the package `keyring` is not installed",
            "Install it with `pip install 'selfhost-cli[keyring]'`, or keep the key in a file: --key file.",
        ) from error
    return keyring


def _entry(paths: Paths, name: str) -> str:
    """One for each profile: what another one called the same may be something else."""
    return f"{paths.config.name}/{name}"


def _file(paths: Paths, name: str) -> Path:
    return paths.config / "keys" / name


def _where(paths: Paths, name: str, place: str) -> str:
    return variable(place) or (str(_file(paths, name)) if place == "file" else "in the keyring")


def _remedy(name: str, place: str) -> str:
    again = f"`selfhost backends key {name}` keeps one in a file."
    return f"Export {variable(place)}; or {again}" if variable(place) else again[0].upper() + again[1:]


def _clean(key: str) -> str:
    """Without what comes along when one is pasted."""
    return key.strip()
