"""`selfhost cache`: what is kept, what came of it, and forgetting it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing

from rich.markup import escape
from rich.table import Table

from selfhost_cli import caching, config
from selfhost_cli.caching import looking
from selfhost_cli.caching.looking import Kept, Stats
from selfhost_cli.cli import render, words
from selfhost_cli.config import Settings
from selfhost_cli.errors import NotSetUp, UsageError, plain
from selfhost_cli.ledger import Ledger

SHORT = 12
"""Digits of a hash that are shown, and enough to name it by."""


def stats(settings: Settings, *, json: bool) -> None:
    """Print what the cache holds and has done."""
    _check(settings)
    prices = {}
    if settings.paths.ledger.exists():
        with closing(Ledger(settings.paths.ledger)) as ledger:
            prices = {rental.label: rental.dph_base for rental in ledger.all()}
    value = looking.stats(settings, os.environ, prices)
    render.as_json(value) if json else _stats(value)


def flush(settings: Settings, model: str, *, json: bool) -> None:
    """Forget what this scope has kept, or what one model answered."""
    _check(settings)
    gone = looking.flush(settings, os.environ, model)
    if json:
        render.as_json({"forgotten": gone})
    else:
        render.out.print(f"[green]✓[/] {gone} answers{f' of {escape(model)}' if model else ''} are forgotten")


def show(settings: Settings, wanted: str, *, json: bool) -> None:
    """Print the newest answers, or the one whose hash begins so. Raises UsageError when there is not exactly one."""
    _check(settings)
    found = looking.kept(settings, os.environ, wanted)
    if wanted and len(found) != 1:
        many = f"{len(found)} answers begin" if found else "no answer that this installation can open begins"
        raise UsageError(f"{many} with {wanted}", "`selfhost cache show` lists the newest.")
    if json:
        render.as_json(found[0] if wanted else found)
    elif wanted:
        _whole(found[0])
    else:
        _list(found)


def share(settings: Settings) -> None:
    """Print what another laptop needs to have the same cache: a secret, so only here and to stdout."""
    settings.paths.make()
    print(f"SELFHOST_CACHE_SCOPE={caching.scope(settings)}")
    print(f"SELFHOST_CACHE_KEY={caching.sealing_key(settings)}")
    words.say("selfhost: whoever has this key can read these answers, and write ones that Claude Code acts on")


def _check(settings: Settings) -> None:
    if not config.installed(settings.paths) and not settings.cache_scope:
        raise NotSetUp("nothing was cached yet", "Run `selfhost up` first.")


def _stats(value: Stats) -> None:
    rows = [("kept in", f"{value.store}, scope {escape(value.scope)}")]
    if not value.enabled:
        rows.append(("state", "[yellow]switched off[/] (cache_enabled)"))
    if value.trouble:
        rows.append(("trouble", f"[yellow]{escape(plain(value.trouble))}[/]"))
    else:
        evicted = "" if value.evictions is None else f", {value.evictions} had to go"
        rows.append(("answers", f"{value.entries} of {(value.bytes or 0) / 2**20:.1f} MB{evicted}"))
    ratio = "" if value.ratio is None else f" ({value.ratio:.0%})"
    whole = value.total
    rows += [
        ("hits", f"{whole.hits} of {whole.hits + whole.misses}{ratio}, {whole.bypasses} passed by"),
        ("saved", f"{whole.gpu_seconds:.0f} s that these answers had once taken ({render.money(value.saved_dollars)})"),
        ("tokens saved", f"{whole.input_tokens} in, {whole.output_tokens} out"),
    ]
    if value.similar:
        rows.append(("similar", ", ".join(f"{name} {number}" for name, number in value.similar.items())))
    for name, text in rows:
        render.out.print(f"[bold]{name:<14}[/]  {text}")
    if value.classes:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("class")
        for name in ("hits", "misses", "passed by", "s saved"):
            table.add_column(name, justify="right")
        for cls, one in value.classes.items():
            table.add_row(escape(cls), str(one.hits), str(one.misses), str(one.bypasses), f"{one.gpu_seconds:.0f}")
        render.out.print(table)


def _list(found: Sequence[Kept]) -> None:
    if not found:
        render.out.print("nothing is kept")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("hash", "kept", "class", "model", "in", "out", "s"):
        table.add_column(name, justify="right" if name in ("in", "out", "s") else "left", no_wrap=name == "hash")
    for one in found:
        table.add_row(*map(str, _row(one)))
    render.out.print(table)


def _row(one: Kept) -> tuple[object, ...]:
    at = time.strftime("%d %b %H:%M", time.localtime(time.time() - one.age_s))
    model = escape(plain(one.model))
    return one.hash[:SHORT], at, escape(one.cls), model, one.input_tokens, one.output_tokens, f"{one.seconds:.1f}"


def _whole(one: Kept) -> None:
    render.out.print(f"[bold]{one.hash}[/]")
    render.out.print(
        " ".join(str(part) for part in _row(one)[1:4]) + f", {one.input_tokens} in, {one.output_tokens} out"
    )
    for block in one.blocks:
        match block:
            case {"type": "tool_use"}:
                render.out.print(escape(plain(f"\n{block['name']} {block['input']}")))
            case _:
                render.out.print(escape(plain(f"\n{block[block['type']]}")))
