"""Values -> what a person or a program reads. The product goes to stdout, the talk to stderr."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from selfhost_cli import countdown, health
from selfhost_cli import status as state
from selfhost_cli.cli import words
from selfhost_cli.cost import Sold
from selfhost_cli.countdown import Countdown
from selfhost_cli.errors import MayBeBilling, SelfhostError
from selfhost_cli.invoice import Invoice
from selfhost_cli.lifecycle import SIMULATED, Ended
from selfhost_cli.lifecycle.extending import Extended
from selfhost_cli.model import Caps, Endpoint, Instance, Rental

PROOF, PROOF_OF_OURS = "nothing is billed any more", "nothing of this installation is billed any more"
UNGUARDED = "its watchdog is not armed: only `selfhost down` or the keeper ends it"
UNWATCHED_S = 60.0
"""A watchdog that lives looks every few seconds; the market's answer may keep it for twenty."""


UNBOUND = 250
"""Columns of a table that is shown whole, at most."""


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """Commands in texts are shown for the profile at hand."""
        super().print(
            *(words.in_profile(o, words.speaking_for) if isinstance(o, str) else o for o in objects), **options
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """Whatever is shown comes through here, cells of tables too; the live display of `progress` does not."""
        return super().render_str(words.plain(text), **options)

    def on_broken_pipe(self) -> None:
        """Rich would exit here, in the middle of whatever was being told; the error boundary knows better."""
        raise BrokenPipeError


out = _Console(highlight=False, soft_wrap=True)
err = _Console(stderr=True, highlight=False, soft_wrap=True)


def whole(table: Table) -> None:
    """As wide as it has to be: `Console.print` would cut it at the terminal's width;
    a number that is cut is a wrong one."""
    lines = out.render(table, out.options.update_width(UNBOUND))
    out.print(Segments(lines), end="", soft_wrap=True)


def as_json(value: Any, error: SelfhostError | None = None) -> None:
    """A value on stdout as JSON; dataclasses by their fields, secrets left out. `error`: what it means, beside it."""
    told = _plain(value) | _error(error) if error else _plain(value)
    out.print_json(json.dumps(told), ensure_ascii=True)  # else it would steer the terminal as any text


def as_json_line(value: Any) -> None:
    """The same in one line at once, for what comes bit by bit."""
    out.file.write(json.dumps(_plain(value)) + "\n")
    out.file.flush()


def ready(rental: Rental, url: str) -> None:
    err.print(f"[green]✓[/] {rental} serves {rental.model} at {url}. `selfhost down` ends the bill.")
    if not rental.guarded:
        err.print(f"[yellow]![/] {UNGUARDED}")


def machine_ready(destination: str, name: str, model: str, url: str) -> None:
    said = f"{escape(destination)} serves {escape(model)} at {url}. `selfhost down --ssh {name}` stops it."
    err.print(f"[green]✓[/] {said}")


def failed_as_json(error: SelfhostError) -> None:
    """What a program reads instead of the product: the error, its exit code, and what may be billed, if anything."""
    as_json(_error(error) | {"left": list(error.left) if isinstance(error, MayBeBilling) else []})


def _error(error: SelfhostError) -> dict[str, object]:
    told = {"message": error.message, "remedy": error.remedy, "exit_code": error.exit_code}
    shown = {
        name: words.in_profile(text, words.speaking_for) if isinstance(text, str) else text
        for name, text in told.items()
    }
    return {"error": shown}


def invoices(bills: Sequence[Invoice]) -> None:
    for bill in bills:
        _invoice(bill)


def sold(rows: Sequence[Sold], when: str) -> None:
    """What backends answered that are no box, and at which price."""
    for one in rows:
        used = one.usage
        tokens = f"{used.input_tokens} in ({used.cached_tokens} reused), {used.output_tokens} out"
        out.print(f"[bold]{escape(one.name):<14}[/]  {money(one.dollars)} {when}: {tokens}")


def ended(value: Ended) -> None:
    """The invoices, and the sentence that people came for."""
    invoices(value.invoices)
    sold(value.sold, "beside the box")
    for box in value.unknown:
        out.print(f"also destroyed: box {box.id} ({escape(box.label)}), which the ledger did not know")
    if value.ledger_problem:
        out.print(f"[yellow]![/] {escape(value.ledger_problem)}; move that file away")
    proof = PROOF if value.alone and not value.ledger_problem else PROOF_OF_OURS
    out.print(f"[green]✓[/] {proof}" if value.invoices or value.unknown else f"[green]✓[/] no box; {proof}")
    for box in value.foreign:
        out.print(
            f"[yellow]![/] box {box.id} (${box.dph_total:.2f}/h, {escape(box.label)}) belongs to another installation "
            "of selfhost; `selfhost down --all` ends it too"
        )


def status(values: Sequence[state.Status]) -> None:
    for line in status_lines(values):
        out.print(line)


def status_lines(values: Sequence[state.Status]) -> Iterator[str]:
    """Lines of markup: all of `status`, also as it is watched."""
    if not values:
        yield "the ledger knows of no box; `selfhost down` asks the market whether that is true"
    for value in values:
        yield from _status(value)


def _invoice(bill: Invoice) -> None:
    table = Table(
        title=f"Invoice: {escape(bill.gpu)}, box {bill.instance_id or '(never existed)'}",
        box=None,
        title_justify="left",
        show_header=False,
        pad_edge=False,
    )
    table.add_column()
    table.add_column(justify="right")
    used = bill.usage
    for name, text in (
        ("GPU", f"{bill.hours * 60:.1f} min  ${bill.gpu_dollars:.4f}"),
        ("disk", f"${bill.disk_dollars:.4f}"),
        ("traffic", f"{_gigabytes(bill.traffic_gb)}${bill.traffic_dollars:.4f}"),
        ("total", f"[bold]${bill.total:.4f}[/] ({figure(bill)})"),
        (
            "tokens",
            f"{used.input_tokens} in ({used.cached_tokens} reused), {used.output_tokens} out, {used.requests} requests",
        ),
        ("per million tokens", money(bill.per_million_tokens)),
        *([("from the cache", _saved(bill))] if bill.saved else []),
    ):
        table.add_row(name, text)
    out.print(table)
    if bill.uncertain:
        out.print(
            f"[yellow]![/] between {money(bill.least)} and {money(bill.most)}: when exactly it ended, only the market "
            "knows. `selfhost cost` asks it again."
        )


def figure(bill: Invoice) -> str:
    """Whose figures they are."""
    return "estimate" if bill.estimated else "market's figure"


def money(dollars: float | None) -> str:
    """With enough digits for small amounts; "–" for none."""
    if dollars is None:
        return "–"
    return f"${dollars:.2f}" if dollars >= 1 or not dollars else f"${dollars:.4f}"


def _gigabytes(amount: float | None) -> str:
    return "" if amount is None else f"{amount:.2f} GB  "


def status_rows(value: state.Status) -> Sequence[tuple[str, str]]:
    """Each thing there is to tell of a rental, as markup."""
    rental = value.rental
    usage = value.so_far.usage
    return (
        ("box", escape(f"{rental} in {rental.place}, {rental.state}")),
        ("engine", escape(_engine(value))),
        *([("conversations", str(value.sessions))] if value.sessions is not None else []),
        ("tunnel", escape(f"{value.tunnel} {value.reason}".strip() + (f", {value.url}" if value.url else ""))),
        ("proxy", escape(str(value.box.get("status") or "not asked"))),
        *([("prefix", escape(told))] if (told := _prefix(value.box.get("prefix"))) else []),
        ("tokens", f"{usage.input_tokens} in, {usage.output_tokens} out, {usage.requests} requests{_repaired(value)}"),
        *([("lately", told)] if (told := _lately(value)) else []),
        *([("from the cache", _saved(value.so_far))] if value.so_far.saved else []),
        ("so far", _so_far(value.so_far)),
        ("ends by itself", limits(rental.caps) if rental.guarded else UNGUARDED),
        ("as it stands", ", ".join(_countdown(one) for one in value.ends)),
    )


def status_warnings(value: state.Status) -> Iterator[str]:
    if soon := countdown.warning(value.rental, value.ends):
        yield escape(soon)
    if (value.unwatched_s or 0) > UNWATCHED_S:
        yield f"its watchdog has not looked for {value.unwatched_s:.0f} s; the keeper starts it again"


def _status(value: state.Status) -> Iterator[str]:
    for name, text in status_rows(value):
        yield f"[bold]{name:<14}[/]  {text}"
    for text in status_warnings(value):
        yield f"[yellow]![/] {text}"


def _prefix(told: object) -> str:
    """What the box has read ahead of the next session, "" for a box that does not say."""
    match told:
        case {"state": "warm", "tokens": int(tokens), "seconds": float(seconds) | int(seconds)}:
            return f"warm, {tokens} tokens" + (f", read ahead in {seconds:.1f} s" if seconds else "")
        case {"state": "none"}:
            return "cold: nothing of what Claude Code begins with was read ahead"
        case {"state": "refused", "wishes": dict(wishes)}:
            reasons = [str(wish.get("reason")) for wish in wishes.values() if isinstance(wish, dict)]
            return f"cold: {'; '.join(dict.fromkeys(reasons))}"
        case {"state": "reading" | "cold" as state}:
            return "cold, being read" if state == "reading" else "cold, to be read when nobody asks"
    return ""


def _saved(bill: Invoice) -> str:
    assert bill.saved
    saved = bill.saved
    spared = f"{saved.gpu_seconds:.0f} s ({money(bill.saved_dollars)}) saved"
    return f"{saved.requests} requests, {saved.input_tokens} tokens in, {saved.output_tokens} out; {spared}"


def _so_far(bill: Invoice) -> str:
    traffic = "not counted yet" if bill.traffic_gb is None else f"of {_gigabytes(bill.traffic_gb).strip()} included"
    told = f"{money(bill.total)} in {bill.hours:.2f} h, traffic {traffic}"
    return f"{told}; between {money(bill.least)} and {money(bill.most)}" if bill.uncertain else told


def extended(value: Extended) -> None:
    """What held, what holds, and when that ends the box."""
    old, new = value.before, value.rental.caps
    for name, unit, before, after in (
        ("--hours", "", old.max_s / 3600, new.max_s / 3600),
        ("--max-spend", "$", old.max_dollars, new.max_dollars),
        ("--idle", "", old.idle_s / 60, new.idle_s / 60),
    ):
        if before != after:
            out.print(f"[green]✓[/] {name} {unit}{before:.4g} → {unit}{after:.4g}")
    told = ", ".join(_countdown(one) for one in value.ends)
    out.print(f"{escape(str(value.rental))} ends by itself {told}")


def _countdown(one: Countdown) -> str:
    """Such as "in 40 min without a request (14:20)"."""
    why = {"idle": "without a request", "hours": "by --hours", "dollars": "by --max-spend", "lease": "without us"}
    clock = time.strftime("%H:%M" if one.seconds < 12 * 3600 else "%a %H:%M", time.localtime(one.at))
    return f"{countdown.in_words(one.seconds)} {why[one.why]} ({clock})"


def _lately(value: state.Status) -> str:
    """What the box is at, "" where its proxy does not say."""
    match value.box:
        case {"tokens_per_s": float(rate) | int(rate), "requests": {"running": int(running), "waiting": int(waiting)}}:
            return f"{rate:.1f} tokens/s out in the last minute; {running} requests run, {waiting} wait"
    return ""


def _repaired(value: state.Status) -> str:
    """Calls that the model wrote as text, since the proxy on the box was started."""
    count = health.section(value.box, "usage").get("repaired_calls")
    return f", {count} calls repaired" if count and isinstance(count, int) else ""


def _engine(value: state.Status) -> str:
    rental, facts = value.rental, health.section(value.box, "components", value.rental.engine)
    engine = f"{rental.engine} {facts.get('version', '')}".strip()
    context = f"{_slots(rental)}{value.box.get('context') or rental.context} tokens"
    told = f"{engine}, {health.described(rental.model, facts)}, {context}"
    share = None if SIMULATED in rental.gpu else health.on_gpu(facts)
    return told if share is None else f"{told}, {share:.0%} on the GPU"


def _slots(rental: Rental) -> str:
    return f"{rental.slots} × " if rental.slots > 1 else ""


def limits(caps: Caps) -> str:
    """What ends a box by itself, in words."""
    return (
        f"after {caps.max_s / 3600:g} h or ${caps.max_dollars:g}, after {caps.idle_s / 60:g} min without a request,"
        f" after {caps.lease_s / 60:g} min without this machine"
    )


def _box(one: Invoice | Instance) -> dict[str, object]:
    number = one.id if isinstance(one, Instance) else one.instance_id
    return {"instance_id": number, "label": one.label, "gpu": one.gpu}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        plain = {field.name: _plain(getattr(value, field.name)) for field in fields if field.repr}
        if isinstance(value, Invoice):
            plain |= {"total": value.total, "per_million_tokens": value.per_million_tokens}
        if isinstance(value, Ended):
            gone: tuple[Invoice | Instance, ...] = (*value.invoices, *value.unknown)
            plain |= {"ended": [_box(one) for one in gone], "left": [_box(one) for one in value.foreign]}
        return plain
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Endpoint):
        return value._asdict()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
