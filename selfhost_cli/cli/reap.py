"""The `reap` command."""

from __future__ import annotations

from rich.markup import escape

from selfhost_cli.cli import progress, render, wiring
from selfhost_cli.config import Settings
from selfhost_cli.errors import MayBeBilling
from selfhost_cli.lifecycle import reaping
from selfhost_cli.lifecycle.reaping import Reaped, Stray


def run(settings: Settings, *, yes: bool, everything: bool, json: bool) -> int:
    """The exit code: 5 while something of this installation that nobody looks after may be billed."""
    with progress.Talk() as talk, wiring.world(settings, talk, needs_ledger=False) as world:
        value = reaping.reap(world, everything=everything) if yes else reaping.look(world)
    render.as_json(value) if json else show(value)
    ours = any(stray.profile for stray in value.left)
    return MayBeBilling.exit_code if ours else 0


def show(value: Reaped) -> None:
    """What was ended, what is left and why, and whether any of it is ours."""
    render.invoices(value.invoices)
    for stray in value.ended:
        render.out.print(f"[green]✓[/] ended, and proven gone: {_line(stray)}")
    for stray in value.left:
        render.out.print(f"[yellow]![/] nobody of this installation looks after {_line(stray)}")
    if any(stray.profile for stray in value.left):
        render.out.print("[yellow]![/] MAY BE BILLED; `selfhost reap --yes` ends what is this installation's")
    else:
        render.out.print("[green]✓[/] nothing of this installation is billed that nobody looks after")
    if any(not stray.profile for stray in value.left):
        render.out.print("[yellow]![/] other installations' boxes end only with `selfhost reap --yes --all`")
    if value.held:
        render.out.print(f"looked after: {escape(', '.join(value.held))}")


def _line(stray: Stray) -> str:
    box = f"box {stray.instance_id}" if stray.instance_id else "a box without a number"
    age = "of unknown age" if stray.age_s is None else f"{stray.age_s / 3600:.1f} h old"
    told = f"{box} ({stray.gpu}, ${stray.dph_total:.2f}/h), {age}, {stray.label}: {stray.why}"
    return escape(told)
