"""`selfhost cost`: ask the market for what it had no figures for, then tell what everything cost."""

from __future__ import annotations

import time
from contextlib import closing

from rich.markup import escape
from rich.table import Table

from selfhost_cli import cost
from selfhost_cli.cli import progress, render, wiring
from selfhost_cli.config import Settings
from selfhost_cli.cost import Cost, PerMillion, Report, Row
from selfhost_cli.errors import MarketError, NotSetUp
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle import billing
from selfhost_cli.model import Event


def run(settings: Settings, month: str | None, *, json: bool) -> None:
    """Print the report; a market that cannot be asked is a note. Raises UsageError, LedgerBroken."""
    now = time.time()
    wanted, price = cost.month(month) if month else cost.month_of(now), cost.list_price(settings)
    value = cost.report([], {}, price, wanted, now=now)
    if settings.paths.ledger.exists():  # asking makes nothing
        with closing(Ledger(settings.paths.ledger)) as ledger, progress.Talk() as talk:
            try:
                _ask_again(settings, ledger, talk)
            except (MarketError, NotSetUp) as error:
                talk(Event("cost", "note", f"estimates stay estimates: {error.message}"))
            since, until = cost.span(wanted)
            sold = cost.sold(settings.paths, ledger.usages(since=since, until=until))
            value = cost.report(ledger.all(), ledger.usages(), price, wanted, now=now, sold=sold)
    render.as_json(value) if json else _report(value)


def _ask_again(settings: Settings, ledger: Ledger, talk: progress.Talk) -> None:
    if billing.unsettled(settings, ledger, now=time.time()):  # without any, no SDK is loaded, and no key is needed
        billing.reconcile(wiring.books(settings, ledger, talk))


def _report(value: Report) -> None:
    for row in value.running:
        _running(row, value.list_price)
    render.sold(value.sold, f"in {value.month}")
    if not value.rentals:
        render.out.print(f"no rental began in {value.month}")
        return
    render.out.print(f"[bold]Rentals that began in {value.month}[/]")
    render.whole(_table(value))
    _cost("total", value.total, value.list_price)
    for bill in (row.invoice for row in value.rentals if row.invoice.uncertain):
        between = f"between {render.money(bill.least)} and {render.money(bill.most)}"
        render.out.print(f"[yellow]![/] box {bill.instance_id}: {between}, nobody saw when exactly it ended")
    if value.estimated:
        render.out.print(f"{value.estimated} of {len(value.rentals)} are estimates until the market has its figures.")
    render.out.print(
        "[dim]A box is paid by the second: the dollars are split between tokens in, reused and out in the ratio of the "
        "list price.[/]"
    )


def _running(row: Row, price: PerMillion) -> None:
    bill = row.invoice
    parts = f"GPU {render.money(bill.gpu_dollars)}, disk {render.money(bill.disk_dollars)}"
    between = f", between {render.money(bill.least)} and {render.money(bill.most)}" if bill.uncertain else ""
    render.out.print(f"[bold]This rental[/]: box {bill.instance_id} ({escape(bill.gpu)}), {escape(row.model)}")
    render.out.print(f"{bill.hours:.2f} h: {parts}, traffic {render.money(bill.traffic_dollars)}{between}")
    _cost("so far", row.cost, price)
    render.out.print()


def _cost(name: str, value: Cost, price: PerMillion) -> None:
    used = value.usage
    rows = [
        (name, f"[bold]{render.money(value.dollars)}[/]"),
        ("tokens", f"{used.input_tokens} in ({used.cached_tokens} reused), {used.output_tokens} out"),
    ]
    if value.spared_s:
        rows.append(("reuse saved", f"{value.spared_s:.0f} GPU-seconds of reading prompts"))
    if value.per_million:
        here = value.per_million
        rows += [
            ("per million", f"{_prices(here)}; {render.money(value.overall)} over all"),
            ("at list price", f"{render.money(value.list_dollars)} ({_prices(price)})"),
        ]
    for label, text in rows:
        render.out.print(f"[bold]{label:<14}[/]  {text}")


def _prices(price: PerMillion) -> str:
    return f"{render.money(price.fresh)} in, {render.money(price.cached)} reused, {render.money(price.out)} out"


def _table(value: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("began", "box", "hours", "dollars", "figure", "in", "reused", "out"):
        table.add_column(name, justify="left" if name in ("began", "box", "figure") else "right", no_wrap=True)
    for row in value.rentals:
        bill, used = row.invoice, row.invoice.usage
        table.add_row(
            time.strftime("%d %b %H:%M", time.localtime(row.began)),
            str(bill.instance_id),
            f"{bill.hours:.2f}",
            render.money(bill.total),
            "so far" if row.running else "estimate" if bill.estimated else "market's",
            str(used.input_tokens),
            str(used.cached_tokens),
            str(used.output_tokens),
        )
    return table
