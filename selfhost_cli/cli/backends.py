"""`selfhost use` and `selfhost backends`: which engine serves Claude Code, and the ones there are."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from selfhost_cli import attach, backends
from selfhost_cli.backends import Backend, Kind, finding, imported, keys
from selfhost_cli.cli import render
from selfhost_cli.cli.words import in_profile, say
from selfhost_cli.config import Settings
from selfhost_cli.errors import SelfhostError, UsageError, plain

TEST_S = 180.0
"""A service that sleeps takes its time to wake up."""
CHECK = "`selfhost backends test {}` asks it for a token."


@dataclass(frozen=True)
class Shown:
    """One backend, with what the keeper says of it while it serves; `place`: in the row of those that do, from 1."""

    name: str
    kind: str
    url: str
    model: str
    key: str
    place: int | None
    state: str
    reason: str


def show(settings: Settings, *, json: bool) -> None:
    """Print all of them, those that serve first."""
    rows = look(settings)
    if json:
        render.as_json(rows)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "backend", "kind", "model", "where", "state"):
        table.add_column(title, overflow="fold")
    for row in rows:
        state = f"{row.state}: {row.reason}" if row.reason else row.state
        mark = "" if row.place is None else "→" if row.place == 1 else f"{row.place}."
        table.add_row(mark, row.name, row.kind, plain(row.model), plain(row.url), plain(state))
    render.out.print(table)
    if len(rows) == 1:
        say(
            in_profile(
                "selfhost: `selfhost backends add` adds one; `selfhost use NAME` switches to it", settings.profile
            )
        )


def look(settings: Settings) -> list[Shown]:
    chain = backends.chain(settings.paths)
    told = _keeper(settings)
    rows = []
    for backend in backends.load(settings.paths).values():
        place = chain.index(backend.name) + 1 if backend.name in chain else None
        state, reason = told.get(backend.name, ("", "")) if place else ("", "")
        rows.append(
            Shown(backend.name, str(backend.kind), backend.url, backend.model, backend.key, place, state, reason)
        )
    return sorted(rows, key=lambda row: (row.place is None, row.place or 0))


def serving(settings: Settings) -> None:
    """Print who serves, where that is not simply the rented box."""
    if (chain := backends.chain(settings.paths)) == (backends.VAST,):
        return
    told = _keeper(settings)
    rows = []
    for name in chain:
        state, reason = told.get(name, ("no keeper", "it starts with the next `selfhost claude`"))
        rows.append(f"{name} ({state}: {reason})" if reason else f"{name} ({state})")
    render.out.print(f"[bold]{'backends':<14}[/]  {escape(plain(', then '.join(rows)))}")


def _keeper(settings: Settings) -> dict[str, tuple[str, str]]:
    """State and reason of those that serve, as the keeper sees them; nothing while none runs."""
    front = attach.find(settings.paths)
    if front is None:
        return {}
    try:
        told = attach.call(front, "state").get("backends")
    except SelfhostError:
        return {}
    rows = told.get("chain") if isinstance(told, dict) else None
    return {
        str(row.get("name")): (str(row.get("state") or ""), str(row.get("reason") or ""))
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
    }


def use(settings: Settings, names: Sequence[str]) -> None:
    """Switch, while Claude Code runs: its next request goes there. Raises NotSetUp when the first has no key."""
    before = backends.chain(settings.paths)
    held = {}
    for name in names:
        backend = backends.get(settings.paths, name)
        if backend.key:
            held[name] = keys.read(settings.paths, name, backend.key, os.environ)
    backends.use(settings.paths, names)
    needed = any(name != backends.VAST for name in names)
    front = attach.ensure(settings) if needed else attach.find(settings.paths)
    if front:
        try:
            attach.call(front, "use", {"keys": held})
        except SelfhostError:
            backends.use(settings.paths, before)
            raise
    then = f", then {', then '.join(names[1:])}" if len(names) > 1 else ""
    say(f"selfhost: {names[0]} serves from now on{then}; what is being answered goes on where it was begun")


def add(settings: Settings, name: str, given: dict[str, Any], *, endpoint: str, preset: str) -> None:
    """Write one down, from a preset of that name where there is one. Raises UsageError."""
    presets = backends.presets()
    if preset and preset not in presets:
        raise UsageError(f"there is no preset {preset!r}: there are {', '.join(presets)}")
    known = backends.load(settings.paths)
    start = known.get(name) if name in known and name != backends.VAST else presets.get(preset or name)
    backend = replace(start, name=name) if start else Backend(name, Kind.OPENAI)
    wished = {key: value for key, value in given.items() if value is not None}
    if "{endpoint}" in (wished.get("url") or backend.url):
        if not endpoint:
            raise UsageError(f"{name} wants to know which endpoint is yours", "Pass --endpoint ID.")
        wished["url"] = (wished.get("url") or backend.url).replace("{endpoint}", endpoint)
    if not (wished.get("url") or backend.url):
        raise UsageError(f"where is {name}?", f"Pass --url, or take a preset: {', '.join(presets)}.")
    wished["url"] = backends.address(wished.get("url") or backend.url, plain_http=bool(wished.get("plain_http")))
    if start is None and "kind" not in wished:
        wished |= _found(wished)
    if wished.get("kind") is not None:
        wished["kind"] = Kind(wished["kind"])
    backend = replace(backend, **wished)
    backends.add(settings.paths, backend)
    say(f"selfhost: {name} is in {settings.paths.backends}: {backend.model} at {backend.url}")
    if backend.key and not _has_key(settings, backend):
        say(
            in_profile(
                f"selfhost: its key is still missing: `selfhost backends key {name}` keeps one", settings.profile
            )
        )
    say(in_profile("selfhost: " + CHECK.format(name), settings.profile))


def _found(wished: dict[str, Any]) -> dict[str, Any]:
    """Of a server that nothing was said of but its address."""
    if wished.get("key"):
        return {"kind": Kind.OPENAI}
    server = finding.look(wished["url"])
    found: dict[str, Any] = {"kind": Kind.LOCAL, "engine": wished.get("engine") or server.engine}
    if not wished.get("model"):
        if len(server.models) != 1:
            names = ", ".join(plain(name) for name in server.models) or "none"
            raise UsageError(f"which model of {wished['url']}? It has {names}", "Pass --model NAME.")
        found["model"] = server.models[0]
    return found


def _has_key(settings: Settings, backend: Backend) -> bool:
    try:
        return bool(keys.read(settings.paths, backend.name, backend.key, os.environ))
    except SelfhostError:
        return False


def key(settings: Settings, name: str, place: str) -> None:
    """Keep a key, read from stdin: an argument could be seen by every user of this machine. Raises UsageError."""
    backend = backends.get(settings.paths, name)
    if backend.kind is Kind.VAST:
        raise UsageError("the rented box has a key of its own", "That of the account is the setting `api_key`.")
    text = _secret(name)
    if not text:
        raise UsageError("there is no key on stdin", f"Type it, or pipe it: `selfhost backends key {name} < FILE`.")
    keys.keep(settings.paths, name, place, text)
    backends.add(settings.paths, replace(backend, key=place))
    _tell_keeper(settings, name, text)
    say(f"selfhost: the key of {name} is kept ({place})")


def _secret(name: str) -> str:
    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass(f"Key of {name}: ").strip()
    return sys.stdin.readline().strip()


def _tell_keeper(settings: Settings, name: str, text: str) -> None:
    """One that serves goes on with it."""
    if name in backends.chain(settings.paths) and (front := attach.find(settings.paths)):
        attach.call(front, "use", {"keys": {name: text}})


def test(settings: Settings, name: str, *, json: bool) -> None:
    """Ask it for a token. Raises NotSetUp without a key, and SelfhostError with what it said."""
    backend = backends.get(settings.paths, name)
    if backend.kind is Kind.VAST:
        raise UsageError("the rented box is tested by `selfhost doctor`")
    if backend.kind is Kind.SSH:
        raise UsageError(f"{name} is asked for a token by `up`", f"Run `selfhost up --ssh {backend.url} --detach`.")
    held = keys.read(settings.paths, name, backend.key, os.environ)
    try:
        told = attach.call(attach.ensure(settings), "test", {"name": name, "key": held}, timeout=TEST_S)
    except attach.Refused as error:
        raise SelfhostError(error.said or error.message) from error
    if json:
        render.as_json({"name": name, "url": backend.url, "model": backend.model} | told)
        return
    say(
        f"selfhost: {name} answers: {backend.model} with {told.get('context')} tokens of context;"
        f" {told.get('tokens')} tokens in {float(str(told.get('answer_s', 0))):.2f} s"
    )


def remove(settings: Settings, name: str) -> None:
    """With its key, where that is ours."""
    backend = backends.remove(settings.paths, name)
    keys.forget(settings.paths, name, backend.key)
    say(f"selfhost: {name} is no more in {settings.paths.backends}")


def take_over(settings: Settings, path: Path) -> None:
    """From the old system's file: backends into ours, keys into files of their own. The old file stays as it is."""
    known = backends.load(settings.paths)
    for one in imported.read(path):
        if one.backend is None:
            say(in_profile(f"selfhost: {one.name} is left out: {one.left_out}", settings.profile))
        elif one.name in known:
            say(f"selfhost: {one.name} is left out: there is one already")
        else:
            if one.key:
                keys.keep(settings.paths, one.name, "file", one.key)
            backends.add(settings.paths, one.backend)
            say(f"selfhost: {one.name} is taken over{', its key is in a file of its own' if one.key else ''}")
    say(f"selfhost: {path} still holds its keys: delete it once all works")
