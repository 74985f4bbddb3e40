"""`selfhost offers`, and the plan of `selfhost up`: the same ranking, from the value that is then executed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.segment import Segment, Segments
from rich.table import Table

from selfhost_cli import claude
from selfhost_cli.cli import progress, render, wiring, words
from selfhost_cli.config import Settings
from selfhost_cli.lifecycle import Plan, picking, renting
from selfhost_cli.lifecycle.picking import Pick
from selfhost_cli.lifecycle.renting import Search
from selfhost_cli.offers import Choice, Ranked, Refusal

NARROWEST, UNBOUND = 72, 200
"""Columns: a number that is cut off is a wrong one, and a file has no edge."""
IN_PLAN, AT_ONCE = 5, 20
"""Rows of a ranking."""


def look(settings: Settings, *, refused: bool) -> Search:
    """What the market has now; `up --pick` counts in it from here on. `refused`: all that does not fit, too."""
    with progress.Talk() as talk, wiring.world(settings, talk, needs_ledger=False) as world:
        value = renting.search(world, everything=refused)
    picking.remember(settings, value.choice, value.need.disk_gb)
    return value


def picked(settings: Settings, number: int | None) -> Pick | None:
    """What `--pick` means. Raises UsageError for a number that was not shown."""
    return None if number is None else picking.recall(settings, number)


def show(value: Search, *, everything: bool, refused: bool, json: bool) -> None:
    """Print it. Raises NothingToRent, after that, when nothing fits."""
    error = None if value.choice.ranked else renting.nothing(value)
    if json:
        render.as_json(value, error)
    else:
        _show(value, everything, refused)
    if error:
        raise error


def _show(value: Search, everything: bool, refused: bool) -> None:
    """The ranking, why it is not that of $/h, and what does not fit."""
    need, choice = value.need, value.choice
    gigabytes = f"{value.download.total / 1e9:.0f} GB to download (image, engine, {escape(value.model)})"
    disk = f"{need.disk_gb:g} GB of disk"
    if choice.ranked:
        card = escape(need.gpu) + (" (simulated)" if value.simulated else "")
        render.out.print(f"[bold]{card}[/] for {need.hours:g} h, {disk} included, {gigabytes}")
        _ranking(render.out, choice.ranked, need.hours, most=None if everything else AT_ONCE)
        if not everything and len(choice.ranked) > AT_ONCE:
            render.out.print(f"[dim]{len(choice.ranked) - AT_ONCE} more fit; --all shows them[/]")
    if refused:
        _refused(choice.refused)
    elif choice.refused and choice.ranked:
        render.out.print(f"[dim]{_left_out(choice)}; --refused tells each, and asks the market for more of them[/]")
    if choice.ranked:
        render.out.print("`selfhost up --pick N`, with the same options, rents the one with that number and no other.")


def show_plan(settings: Settings, value: Plan) -> None:
    """What `up` is about to do, what it costs, and what ends it: on stderr. `--pick` counts in its ranking then."""
    if not value.pick:  # a ranking of one would take the numbers away that were shown with it
        picking.remember(settings, value.choice, value.disk_gb)
    plan(value)


def plan(value: Plan) -> None:
    if not value.pick:
        _ranking(render.err, value.choice.ranked, value.hours, most=IN_PLAN, mark=1)
        more, left_out = len(value.choice.ranked) - IN_PLAN, _left_out(value.choice)
        if told := [f"{more} more fit"] * (more > 0) + [left_out] * bool(left_out):
            render.err.print(f"[dim]{', '.join(told)}; `selfhost offers` shows them[/]")
        render.err.print()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _lines(value):
        table.add_row(name, escape(words.in_profile(text, words.speaking_for)))
    _print(render.err, table)


def _several(value: Plan) -> list[tuple[str, str]]:
    count = value.boxes + value.later
    if count == 1 and not value.later:
        return []
    each, together = value.caps.max_dollars, value.caps.max_dollars * count
    now = f"{value.boxes}, one after the other" if value.boxes else "none now"
    later = f", and up to {value.later} more without asking, while requests wait" if value.later else ""
    most = f"at most ${count * value.ceiling:.2f}/h and ${together:.2f} in all, ${each:.2f} each"
    return [("boxes", f"{now}{later}; {most}. What follows is of one")]


def _lines(value: Plan) -> list[tuple[str, str]]:
    best, offer, caps = value.best, value.best.offer, value.caps
    card = f"{offer.gpu}{', simulated' if value.simulated else ''}, {offer.gpu_ram_mb / 1024:.0f} GB"
    number = f": number {value.pick.rank} of the ranking shown" if value.pick else ""
    ready = best.dollars - best.traffic - offer.dph_total * value.hours
    capped = f"; ${caps.max_dollars:g} end it before that" if best.dollars > caps.max_dollars else ""
    if value.attempts > 1:
        then = f"another one is tried: {value.attempts} at most, one after the other"
    else:
        then = "no other one is tried"
    return [
        *_several(value),
        (
            "card",
            _in_a_line(f"{card}, in {offer.place or 'an unknown place'}, reliability {offer.reliability:.3f}{number}"),
        ),
        (
            "price",
            f"${offer.dph_total:.3f}/h; {value.hours:g} h cost ${best.dollars:.2f} all in: ${ready:.2f} for the "
            f"{best.ready_s / 60:.0f} min until it is ready and ${best.traffic:.2f} of traffic are in it{capped}",
        ),
        ("model", f"{value.model}, context of {value.context} tokens, engine {value.engine}{_small(value)}"),
        *_memory(value),
        ("ends by itself", render.limits(caps)),
        (
            "if it fails",
            f"a box that does not get ready, or costs more than ${value.ceiling:.3f}/h, is destroyed, and {then}",
        ),
        (
            "ends with",
            f"`selfhost down`: removes the box and its {value.disk_gb:g} GB of disk with the model and all that you "
            "put there; the login key stays on the account",
        ),
        ("account", f"${value.account.credit:.2f}"),
    ]


def _small(value: Plan) -> str:
    """Of a context in which no session has room: one that was forced, or the sandbox's."""
    least = claude.least_context()
    return "" if value.context >= least else f"; too small for a session with Claude Code, which wants {least}"


def _memory(value: Plan) -> list[tuple[str, str]]:
    if value.fit:
        return [("memory", str(value.fit))]
    if value.simulated:
        return []
    return [("memory", f"{value.shape}: not known before it is loaded; what does not fit is loaded with less")]


def _ranking(console: Console, rows: Sequence[Ranked], hours: float, *, most: int | None, mark: int = 0) -> None:
    shown = rows[:most]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "", "$/h", f"for {hours:g} h", "ready in", "Mbit/s", "$/TB", "reliable"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("place", overflow="fold")
    for row in shown:
        offer = row.offer
        table.add_row(
            "→" if row.rank == mark else "",
            str(row.rank),
            f"{offer.dph_total:.3f}",
            f"${row.dollars:.2f}",
            f"{row.ready_s / 60:.0f} min",
            f"{offer.inet_down_mbps:.0f}",
            f"{offer.down_per_gb * 1000:.1f}",
            f"{offer.reliability:.3f}",
            escape(_in_a_line(offer.place)),
        )
    _print(console, table)
    for row in shown:
        if row.note:
            console.print(f"[dim]{row.rank}: {escape(row.note)}[/]")


def _refused(refusals: Sequence[Refusal]) -> None:
    render.out.print(f"[bold]{_misfits(refusals)}[/]" if refusals else "the market has no other one")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for one in refusals:
        table.add_row(f"${one.offer.dph_total:.3f}/h", escape(_in_a_line(one.offer.place)), escape(_in_a_line(one.why)))
    if refusals:
        _print(render.out, table)


def _left_out(choice: Choice) -> str:
    """How many the limits of ours left out, and by which rule; "" for none."""
    groups = Counter(one.rule for one in choice.refused).most_common()
    told = ", ".join(f"{count} × {escape(rule)}" for rule, count in groups)
    return f"{_misfits(choice.refused)}: {told}" if told else ""


def _in_a_line(text: str) -> str:
    """A market's or a box's words; in a second line they could say what only we say."""
    return " ".join(words.plain(text).split())


def _print(console: Console, table: Table) -> None:
    """As wide as it has to be: `Console.print` alone would cut it to the window. Without spaces at the end of lines."""
    width = max(NARROWEST, console.width if console.is_terminal else UNBOUND)
    for line in Segment.split_lines(console.render(table, console.options.update_width(width))):
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
        console.print(Segments([*line, Segment.line()]), end="", soft_wrap=True)


def _misfits(refusals: Sequence[Refusal]) -> str:
    return f"{len(refusals)} {'does' if len(refusals) == 1 else 'do'} not fit"
