"""`selfhost bench`: how fast the box is, as a table, as JSON, and drawn over the length of the prompt."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from selfhost_cli import attach
from selfhost_cli.attach import Front
from selfhost_cli.bench import client, plot
from selfhost_cli.bench import plan as plans
from selfhost_cli.bench.figures import Number, Report, figures, report
from selfhost_cli.bench.plan import TURNS, Plan
from selfhost_cli.bench.run import Measured, Run
from selfhost_cli.claude import cache_wish
from selfhost_cli.cli import launch, render
from selfhost_cli.cli.words import say
from selfhost_cli.config import Settings
from selfhost_cli.errors import NotSetUp, SelfhostError
from selfhost_cli.model import Rental

NAMES, FIGURES = 28, 12
"""Columns of a table: of its names, and of a figure at least."""
Cells = tuple[list[str], dict[str, list[str]]]
"""The heads of a table, and its rows by their names."""


@dataclass(frozen=True)
class Bench:
    """One that can begin. `wish`: what the user asks of the cache, in the words of Cache-Control."""

    rental: Rental
    front: Front
    plan: Plan
    wish: str
    svg: Path | None


def prepare(settings: Settings, *, lengths: str, rounds: int | None, quick: bool, svg: Path | None) -> Bench:
    """Of the box that is ready; nothing is asked yet. Raises NotSetUp, MayBeBilling, UsageError, SelfhostError."""
    wish = cache_wish(os.environ)
    if svg:
        plot.check()
        if not (folder := svg.absolute().parent).is_dir():
            raise NotSetUp(f"--svg {svg}: there is no folder {folder}", "Make it, or name another file.")
    with closing(launch.open_ledger(settings)) as ledger:
        rental = launch.ready(ledger)
        plan = plans.plan(rental.model, rental.context, lengths=lengths, rounds=rounds, quick=quick)
        front = attach.ensure(settings)
        launch.wait_for_tunnel(front, ledger, rental, then="asking all the same")
    return Bench(rental, front, plan, wish, svg)


def run(bench: Bench, *, json: bool) -> None:
    """Measure and print. When it is interrupted, or the box fails, print what there is by then; and then raise that."""
    began, seen = time.monotonic(), Measured()
    failed: SelfhostError | None = None
    try:
        asyncio.run(_measure(bench, seen))
    except SelfhostError as error:
        failed = error
        raise
    finally:
        _show(bench, seen, time.monotonic() - began, failed, json=json)


async def _measure(bench: Bench, seen: Measured) -> None:
    async with client.connected(bench.front, bench.wish) as asker:
        await Run(asker, bench.plan, seen, bench.rental.dph_total, lambda text: say(f"selfhost: {text}")).all()


def _show(bench: Bench, seen: Measured, seconds: float, failed: SelfhostError | None, *, json: bool) -> None:
    value = report(seen, bench.rental.dph_total)
    for note in seen.notes:
        say(f"selfhost: {note}")
    if json:
        found = figures(value)
        render.as_json({"figures": found}, failed) if failed else render.as_json(found)
    else:
        tables(value, bench.rental, bench.plan.rounds)
        dollars = render.money(seconds / 3600 * bench.rental.dph_total)
        render.out.print(f"[dim]{seconds:.0f} s, {dollars} of the box's time[/]")
    if bench.svg and value.lengths:
        plot.draw(value.lengths, bench.rental.model, bench.svg)
        say(f"selfhost: {bench.svg} is drawn")


def tables(value: Report, rental: Rental, rounds: int) -> None:
    """Print a report. What was not measured is a dash, and a table of nothing is left out."""
    middle = f"medians of up to {rounds} rounds, with the range of their middle half" if rounds > 1 else "one round"
    render.out.print(f"[bold]{escape(str(rental))}[/]: {escape(rental.model)}, context {rental.context} tokens")
    render.out.print(f"[dim]{middle}[/]")
    for heads, rows in (_lengths(value), _at_once(value), _session(value)):
        if heads:
            render.out.print()
            _print(heads, rows)


def _lengths(value: Report) -> Cells:
    all_of = value.lengths
    return [f"{one.prompt.value:.0f}" for one in all_of], {
        "prompt, tokens": [],
        "first token, cold": [_seconds(one.cold) for one in all_of],
        "first token, warm": [_seconds(one.warm) for one in all_of],
        "first token, cached": [_seconds(one.cached) for one in all_of],
        "prefill, tokens/s": [_plain(one.prefill) for one in all_of],
        "decode, tokens/s": [_plain(one.decode) for one in all_of],
        "$ per million tokens read": [_plain(one.read_dollars) for one in all_of],
        "$ per million generated": [_plain(one.out_dollars) for one in all_of],
    }


def _at_once(value: Report) -> Cells:
    all_of = value.at_once
    return [str(one.number) for one in all_of], {
        "requests at once": [],
        "read and generated, tokens/s": [_plain(one.all) for one in all_of],
        "generated, tokens/s": [_plain(one.out) for one in all_of],
        "first token of each": [_seconds(one.first) for one in all_of],
        "first token of the last": [_seconds(one.last_first) for one in all_of],
    }


def _session(value: Report) -> Cells:
    if not (one := value.session):
        return [], {}
    return [""], {
        f"session with tools, {TURNS} turns": [],
        "first turn": [_seconds(one.opening)],
        "each later turn": [_seconds(one.turn)],
        "reused of the prompt before": [_plain(one.reused, " %")],
    }


def _print(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """The first row's name is that of the heads."""
    (corner, _), *others = rows.items()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(corner, min_width=NAMES, no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", min_width=FIGURES, no_wrap=True)
    for name, cells in others:
        table.add_row(name, *cells)
    render.whole(table)


def _seconds(number: Number | None) -> str:
    if number is None or number.value >= 0.1:
        return _plain(number, " s")
    return _plain(Number(number.value * 1000, number.spread and number.spread * 1000), " ms")


def _plain(number: Number | None, unit: str = "") -> str:
    """Three digits that count, and two of the spread."""
    if number is None:
        return "–"
    value = f"{number.value:.0f}" if number.value >= 100 else f"{number.value:.3g}"
    return f"{value}{unit}" + ("" if number.spread is None else f" [dim]({number.spread:.2g})[/]")
