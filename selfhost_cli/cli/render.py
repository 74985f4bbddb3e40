"""Values -> what a person or a program reads. The product goes to stdout, the talk to stderr."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from selfhost_cli.invoice import Invoice
from selfhost_cli.lifecycle import Ended, Plan
from selfhost_cli.model import Caps, Event, Rental
from selfhost_cli.status import Status

PROOF = "nothing is billed any more"

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def as_json(value: Any) -> None:
    """A value on stdout as JSON; dataclasses by their fields, secrets left out."""
    out.print_json(json.dumps(_plain(value)))


class Talk:
    """Progress on stderr: a live display on a terminal, plain lines elsewhere. Use as a context manager."""

    def __init__(self) -> None:
        self._live = err.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[line]}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=err,
            transient=True,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._began = time.monotonic()
        self._said = ""
        self._tenth = -1

    def __enter__(self) -> Talk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hide()

    def __call__(self, event: Event) -> None:
        if event.stage != self._stage and event.status in ("start", "progress"):
            self._stage, self._began, self._tenth = event.stage, time.monotonic(), -1
        if event.status == "progress":
            self._show_progress(event)
        elif event.status == "start":
            self._show_progress(event)
            if not self._live and event.text:
                self._say("…", event.stage, event.text)
        else:
            self._hide()
            marks = {"done": "[green]✓[/]", "skip": "[green]✓[/]", "fail": "[red]✗[/]", "note": "[yellow]![/]"}
            self._say(marks[event.status], event.stage, event.text or event.status, self._took(event))

    def _took(self, event: Event) -> str:
        seconds = time.monotonic() - self._began
        return f" [dim]{seconds:.1f} s[/]" if event.status == "done" and event.stage == self._stage else ""

    def _say(self, mark: str, stage: str, text: str, took: str = "") -> None:
        line = f"{mark} {stage:<15} {_escape(text)}"
        if line != self._said:
            self._said = line
            err.print(line + took)

    def _show_progress(self, event: Event) -> None:
        if self._live:
            line = f"{event.stage:<15} {_escape(event.text)[:60]}"
            if self._task is None:
                self._progress.start()
                self._task = self._progress.add_task("", line=line, total=event.total)
            self._progress.update(self._task, line=line, completed=event.done or 0, total=event.total)
        elif event.total and event.done is not None:
            tenth = 10 * event.done // event.total
            if tenth > self._tenth:
                self._tenth = tenth
                rate = event.done / 1e6 / max(0.1, time.monotonic() - self._began)
                self._say("…", event.stage, f"{event.done / 1e6:.0f} of {event.total / 1e6:.0f} MB, {rate:.0f} MB/s")
        elif event.text:
            self._say("…", event.stage, event.text)

    def _hide(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.stop()  # a question may come next, and the display would draw over it
            self._task = None


def plan(value: Plan) -> None:
    """What `up` is about to do, and what it costs, on stderr."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "GPU", "$/h", "all-in", "ready in", "down", "$/TB", "reliability", "place"):
        table.add_column(column, justify="left" if column in ("", "GPU", "place") else "right")
    for rank, ranked in enumerate(value.choice.ranked[:5], start=1):
        offer = ranked.offer
        table.add_row(
            "→" if rank == 1 else "",
            offer.gpu + (" (simulated GPU)" if value.simulated else ""),
            f"{offer.dph_total:.3f}",
            f"${ranked.dollars:.2f}",
            f"{ranked.ready_s / 60:.0f} min",
            f"{offer.inet_down_mbps:.0f} Mbit/s",
            f"{offer.down_per_gb * 1000:.1f}",
            f"{offer.reliability:.3f}",
            offer.place,
        )
    err.print(table)
    others = len(value.choice.ranked) - 5
    if others > 0 or value.choice.refused:
        err.print(f"[dim]{max(0, others)} more fit, {len(value.choice.refused)} do not[/]")
    best = value.best
    err.print(
        f"\nRent the first one for [bold]${best.offer.dph_total:.3f}/h[/]; {value.hours:g} h cost"
        f" [bold]${best.dollars:.2f}[/] all in. Model {value.model}, engine {value.engine}, {value.context} tokens."
    )
    err.print(
        f"It ends by itself: {_caps(value.caps)}. `selfhost down` destroys it with its disk. "
        f"The account has ${value.credit:.2f}."
    )


def ready(rental: Rental, url: str) -> None:
    err.print(f"[green]✓[/] {rental} serves {rental.model} at {url}. `selfhost down` ends the bill.")


def ended(value: Ended) -> None:
    """The invoices, and the sentence that people came for."""
    for bill in value.invoices:
        _invoice(bill)
    for box in value.unknown:
        out.print(f"also destroyed: box {box.id} ({box.label}), which the ledger did not know")
    out.print(f"[green]✓[/] {PROOF}" if value.invoices or value.unknown else f"[green]✓[/] no box; {PROOF}")
    for box in value.foreign:
        out.print(
            f"[yellow]![/] box {box.id} (${box.dph_total:.2f}/h, {box.label}) belongs to another installation "
            "of selfhost; `selfhost down --all` ends it too"
        )


def status(values: Sequence[Status]) -> None:
    if not values:
        out.print(f"no box; {PROOF}")
    for value in values:
        _status(value)


def _invoice(bill: Invoice) -> None:
    table = Table(
        title=f"Invoice: {bill.gpu}, box {bill.instance_id or '(never existed)'}",
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
        ("traffic", f"${bill.traffic_dollars:.4f}"),
        ("total", f"[bold]${bill.total:.4f}[/]" + (" (estimate)" if bill.estimated else "")),
        (
            "tokens",
            f"{used.input_tokens} in ({used.cached_tokens} reused), {used.output_tokens} out, {used.requests} requests",
        ),
        ("per million tokens", f"${bill.per_million_tokens:.2f}" if bill.per_million_tokens is not None else "–"),
    ):
        table.add_row(name, text)
    out.print(table)


def _status(value: Status) -> None:
    rental = value.rental
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    simulated = " (simulated GPU)" if value.box.get("simulated_gpu") else ""
    usage = value.so_far.usage
    for name, text in (
        ("box", f"{rental}{simulated} in {rental.place}, {rental.state}"),
        ("engine", f"{rental.engine}, {rental.model}, {value.box.get('context') or rental.context} tokens"),
        ("tunnel", f"{value.tunnel} {value.reason}".strip() + (f", {value.url}" if value.url else "")),
        ("proxy", str(value.box.get("status") or "not asked")),
        ("tokens", f"{usage.input_tokens} in, {usage.output_tokens} out, {usage.requests} requests"),
        ("so far", f"${value.so_far.total:.4f} in {value.so_far.hours:.2f} h, traffic not counted"),
        ("ends by itself", _caps(rental.caps)),
    ):
        table.add_row(name, text)
    out.print(table)


def _caps(caps: Caps) -> str:
    return (
        f"after {caps.max_s / 3600:g} h or ${caps.max_dollars:g}, after {caps.idle_s / 60:g} min without a request,"
        f" after {caps.lease_s / 60:g} min without this machine"
    )


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        plain = {field.name: _plain(getattr(value, field.name)) for field in fields if field.repr}
        if isinstance(value, Invoice):
            plain |= {"total": value.total, "per_million_tokens": value.per_million_tokens}
        return plain
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
