"""Backends: the named engines that Claude Code can be served by, and which of them serve now.

`vast`, the rented box, is always there. The others are in `backends.toml` beside config.toml, which people may edit;
which serve, first to last, is in the profile's state. Keys are in neither, see `keys`.

On the way of every `selfhost claude`: what only some runs need is imported there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from selfhost_cli.backends import keys
from selfhost_cli.config import LOOPBACK, Paths
from selfhost_cli.errors import UsageError

VAST = "vast"
LABEL = "backend-"
"""Begins the ledger's names of backends; those of rentals begin otherwise."""
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
PRESETS = Path(__file__).with_name("presets.toml")
ENGINES = ("ollama", "llamacpp", "openai")
"""Of a server of one's own; `openai` is any that speaks that dialect, vLLM among them."""


class Kind(StrEnum):
    VAST = "vast"
    SSH = "ssh"
    """A machine of one's own that we installed on; its `url` is as `ssh` takes it."""
    LOCAL = "local"
    """A server on this machine or network."""
    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    """What speaks one of these dialects, mostly for money."""


@dataclass(frozen=True)
class Backend:
    """One of them. `url`: without /v1. `key`: where its key is, see `keys`. Prices in dollars per million tokens.

    `context`: in tokens, for a server that does not tell its own. `engine`: of a local server. `plain_http`: it may be
    asked over a network without encryption. `per_day`: dollars that it may cost between two midnights.
    """

    name: str
    kind: Kind
    url: str = ""
    model: str = ""
    context: int = 0
    engine: str = ""
    key: str = ""
    plain_http: bool = False
    slots: int = 8
    price_in: float = 0.0
    price_cached: float | None = None
    price_out: float = 0.0
    per_day: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    date: str = ""

    @property
    def label(self) -> str:
        """Under which the ledger has what it did."""
        return f"{LABEL}{self.name}"

    def price(self, new: int, cached: int, output: int) -> float:
        """Dollars for so many tokens."""
        reused = self.price_in if self.price_cached is None else self.price_cached
        return (new * self.price_in + cached * reused + output * self.price_out) / 1e6


def presets() -> dict[str, Backend]:
    import tomllib

    return {name: _parse(name, entry, PRESETS) for name, entry in tomllib.loads(PRESETS.read_text()).items()}


def load(paths: Paths) -> dict[str, Backend]:
    """All of a profile, by name; `vast` first. Raises UsageError, which names file and entry."""
    return {VAST: Backend(VAST, Kind.VAST)} | {
        name: _parse(name, entry, paths.backends) for name, entry in _read(paths)
    }


def get(paths: Paths, name: str) -> Backend:
    """Raises UsageError for a name that there is not."""
    known = load(paths)
    if name not in known:
        raise UsageError(
            f"there is no backend {name!r}: there are {', '.join(known)}", f"`selfhost backends add {name}` makes one."
        )
    return known[name]


def add(paths: Paths, backend: Backend) -> None:
    """Write it down, in place of one of that name. Raises UsageError for what cannot be, before anything is written."""
    plain = {one.name: _plain(value) for one in fields(backend) if (value := getattr(backend, one.name)) != one.default}
    entry = {name: value for name, value in plain.items() if name != "name" and value not in (None, {})}
    _parse(backend.name, entry, paths.backends)
    _edit(paths, backend.name, entry)


def remove(paths: Paths, name: str) -> Backend:
    """Raises UsageError while it serves."""
    if name == VAST:
        raise UsageError("`vast` is always there", "`selfhost down` ends what is rented.")
    backend = get(paths, name)
    if name in chain(paths):
        raise UsageError(f"backend {name} is in use", "Use another one first: `selfhost use vast`.")
    _edit(paths, name, None)
    return backend


def chain(paths: Paths) -> tuple[str, ...]:
    """The backends that serve, each when those before it cannot; never empty."""
    try:
        names = json.loads(paths.use.read_bytes())["chain"]
    except (OSError, ValueError, KeyError, TypeError):
        return (VAST,)
    told = tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()
    return told or (VAST,)


def use(paths: Paths, names: Sequence[str]) -> None:
    """From now on. Raises UsageError for a name that there is not, or that stands there twice."""
    for name in names:
        get(paths, name)
    if len(set(names)) != len(names):
        raise UsageError("a backend can stand in the row once only")
    paths.make()
    draft = paths.use.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps({"chain": list(names)}))
    draft.replace(paths.use)


def serving(paths: Paths) -> list[Backend]:
    """`chain`, each with what is known of it. Raises UsageError."""
    return [get(paths, name) for name in chain(paths)]


def variables(paths: Paths) -> frozenset[str]:
    """Of the environment: those that hold keys of backends that are in use. Where nothing can be read, none."""
    try:
        return frozenset(filter(None, (keys.variable(one.key) for one in serving(paths))))
    except UsageError:
        return frozenset()


def address(url: str, *, plain_http: bool) -> str:
    """The base of a server's URL, as it is kept: without /v1 and what follows it.

    Raises UsageError for what is no such URL, holds a password, or would send a key in clear over a network.
    """
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is no URL of a server", "It begins with https://, or with http:// on this machine.")
    if parts.username or parts.password:
        raise UsageError("a URL with a name or a password in it is not kept", "Give the key with --key.")
    if parts.query or parts.fragment or re.search(r"[{}\s]", url):
        raise UsageError(f"{url!r} is no base of a server's URL: only scheme, host, port and path belong to it")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK and not plain_http:
        raise UsageError(
            f"http://{parts.hostname} is not encrypted: whoever is on the way reads all that you and it say",
            "Use https://, or pass --plain-http for a network that you trust.",
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = re.sub(r"(/v1(/(messages|chat/completions|models))?)?/*$", "", parts.path)
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{path}"


def _parse(name: str, entry: Any, file: Path) -> Backend:
    """A table of the file. Raises UsageError."""
    try:
        if not NAME.fullmatch(name):
            raise UsageError("a name has 1 to 32 small letters, digits and hyphens")
        if not isinstance(entry, dict):
            raise UsageError("it is no table")
        known = {one.name: one for one in fields(Backend) if one.name != "name"}
        if unknown := sorted(entry.keys() - known.keys()):
            raise UsageError(f"it knows no {', '.join(unknown)}")
        backend = Backend(
            name, Kind(entry.get("kind", "")), **{key: value for key, value in entry.items() if key != "kind"}
        )
        return _checked(backend, template=file == PRESETS)
    except UsageError as error:
        raise UsageError(f"{file}: backend {name}: {error.message}", error.remedy) from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file}: backend {name}: {error}", f"Its kind is one of {', '.join(Kind)}.") from error


def _checked(backend: Backend, *, template: bool) -> Backend:
    texts = {"url": str, "model": str, "engine": str, "key": str, "plain_http": bool, "context": int, "slots": int}
    for name, kind in texts.items():
        if type(getattr(backend, name)) is not kind:
            raise UsageError(
                f"{name} is to be {'a text' if kind is str else 'true or false' if kind is bool else 'a whole number'}"
            )
    amounts = ("price_in", "price_out", "price_cached", "per_day")
    for name in amounts:
        value = getattr(backend, name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6
        ):
            raise UsageError(f"{name} is to be a number of dollars")
    if not isinstance(backend.fields, Mapping):
        raise UsageError("fields is to be a table: what every request there gets, too")
    if backend.context < 0 or backend.slots < 1:
        raise UsageError("context and slots are numbers above zero")
    keys.checked(backend.key)
    if backend.kind is Kind.VAST:
        if backend.name != VAST:
            raise UsageError("`vast` is there already")
        return backend
    if backend.name == VAST:
        raise UsageError("that name is taken by the rented box")
    if backend.kind is Kind.LOCAL and backend.engine not in ENGINES:
        raise UsageError(f"engine is one of {', '.join(ENGINES)}")
    if template:
        return backend
    if not backend.model:
        raise UsageError("it has no model", "Pass --model NAME, as that server calls it.")
    if backend.kind is Kind.SSH:
        if not backend.url:
            raise UsageError("it has no url", "It is where `ssh` goes: user@host.")
        return backend
    return replace(backend, url=address(backend.url, plain_http=backend.plain_http))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, StrEnum) else value


def _read(paths: Paths) -> list[tuple[str, Any]]:
    import tomllib

    try:
        return list(tomllib.loads(paths.backends.read_text()).items())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UsageError(f"{paths.backends}: {error}", "Mend the file, or move it away.") from error


def _edit(paths: Paths, name: str, entry: Mapping[str, Any] | None) -> None:
    """Set or take out one table; all else in the file stays as it is."""
    import tomlkit

    _read(paths)  # what is no TOML is not written over
    document = tomlkit.parse(paths.backends.read_text()) if paths.backends.exists() else tomlkit.document()
    document.pop(name, None)
    if entry is not None:
        document[name] = dict(entry)
    paths.make()
    draft = paths.backends.with_suffix(f".{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(tomlkit.dumps(document))
    draft.replace(paths.backends)


def as_row(backend: Backend) -> dict[str, Any]:
    """For --json; nothing in it is secret."""
    return asdict(backend) | {"kind": str(backend.kind)}
