"""What tokens cost on rented boxes, and what they would have cost at a list price. Pure.

A box is paid by the second and not by the token, so a price per token is a division of the bill by what was done with
it. Between tokens in, reused and out the dollars are split in the ratio of the list price: whatever share of the list
price's sum the tokens out would have been, that share of the bill is theirs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace

from selfhost_cli import backends
from selfhost_cli.backends import LABEL
from selfhost_cli.config import Paths, Settings
from selfhost_cli.errors import UsageError
from selfhost_cli.invoice import Invoice, invoice
from selfhost_cli.ledger import Usage
from selfhost_cli.model import Rental


@dataclass(frozen=True)
class PerMillion:
    """Dollars per million tokens: in, in but reused from the engine's cache, out."""

    fresh: float
    cached: float
    out: float

    def times(self, factor: float) -> PerMillion:
        return PerMillion(self.fresh * factor, self.cached * factor, self.out * factor)

    def of(self, usage: Usage) -> float:
        """What these tokens cost at this price. Writing a cache costs nothing extra here."""
        fresh = usage.input_tokens - usage.cached_tokens
        return (fresh * self.fresh + usage.cached_tokens * self.cached + usage.output_tokens * self.out) / 1e6


@dataclass(frozen=True)
class Cost:
    """Dollars paid for so many tokens. `overall` is per million of all tokens; None where there were none.

    `spared_s`: seconds of reading prompts that reused tokens saved; None where nobody saw how fast the engine reads.
    """

    dollars: float
    usage: Usage
    list_dollars: float
    per_million: PerMillion | None
    overall: float | None
    spared_s: float | None


@dataclass(frozen=True)
class Row:
    """One rental. `running`: the bill so far."""

    began: float
    running: bool
    model: str
    invoice: Invoice
    cost: Cost


@dataclass(frozen=True)
class Sold:
    """What a backend answered in the month. `dollars`: at its own prices, None where it was removed since."""

    name: str
    usage: Usage
    dollars: float | None


@dataclass(frozen=True)
class Report:
    """What is rented now, and every rental that began in the month (YYYY-MM, local time), each counted whole."""

    month: str
    list_price: PerMillion
    running: tuple[Row, ...]
    rentals: tuple[Row, ...]
    total: Cost
    estimated: int
    """So many of the month's rentals the market has no figures for yet."""
    sold: tuple[Sold, ...] = ()


def sold(paths: Paths, usages: Mapping[str, Usage]) -> tuple[Sold, ...]:
    """What of it backends answered, by the prices that hold now. Raises UsageError when their file cannot be read."""
    of_backends = {label: used for label, used in usages.items() if label.startswith(LABEL)}
    known = {one.label: one for one in backends.load(paths).values()} if of_backends else {}
    found = []
    for label, used in of_backends.items():
        one = known.get(label)
        new = used.input_tokens - used.cached_tokens
        dollars = one.price(new, used.cached_tokens, used.output_tokens) if one else None
        found.append(Sold(label.removeprefix(LABEL), used, dollars))
    return tuple(found)


def report(
    rentals: Iterable[Rental],
    usage: Mapping[str, Usage],
    price: PerMillion,
    month: str,
    *,
    now: float,
    sold: Iterable[Sold] = (),
) -> Report:
    """`usage` by label. Rentals that never became a box are left out: they cost nothing."""
    rows = [_row(rental, usage.get(rental.label, Usage()), price, now) for rental in rentals if rental.instance_id]
    of_month = tuple(row for row in rows if month_of(row.began) == month)
    dollars = sum(row.invoice.total for row in of_month)
    total = cost(dollars, _together(row.cost.usage for row in of_month), price)
    spared = [row.cost.spared_s for row in of_month if row.cost.spared_s is not None]  # each engine at its own rate
    return Report(
        month=month,
        list_price=price,
        running=tuple(row for row in rows if row.running),
        rentals=of_month,
        total=replace(total, spared_s=sum(spared) if spared else None),
        estimated=sum(row.invoice.estimated for row in of_month),
        sold=tuple(sold),
    )


def cost(dollars: float, usage: Usage, price: PerMillion) -> Cost:
    """See the module on how the dollars are split."""
    listed, tokens = price.of(usage), usage.input_tokens + usage.output_tokens
    return Cost(
        dollars=dollars,
        usage=usage,
        list_dollars=listed,
        per_million=price.times(dollars / listed) if listed else None,
        overall=dollars / tokens * 1e6 if tokens else None,
        spared_s=usage.spared_s,
    )


def list_price(settings: Settings) -> PerMillion:
    return PerMillion(settings.list_price_in, settings.list_price_cached, settings.list_price_out)


def month_of(at: float) -> str:
    return time.strftime("%Y-%m", time.localtime(at))


def span(month: str) -> tuple[float, float]:
    """When it began, and when it ended or will, in Unix seconds."""
    year, number = map(int, month.split("-"))
    return time.mktime((year, number, 1, 0, 0, 0, 0, 0, -1)), time.mktime((year, number + 1, 1, 0, 0, 0, 0, 0, -1))


def month(text: str) -> str:
    """Such as 2026-11. Raises UsageError."""
    try:
        return time.strftime("%Y-%m", time.strptime(text, "%Y-%m"))
    except ValueError:
        raise UsageError(f"--month {text}: expected a year and a month", "Such as --month 2026-11.") from None


def _row(rental: Rental, usage: Usage, price: PerMillion, now: float) -> Row:
    bill = invoice(rental, usage, now=now)
    return Row(rental.created_at, rental.state.live, rental.model, bill, cost(bill.total, usage, price))


def _together(usages: Iterable[Usage]) -> Usage:
    return Usage(*(sum(column) for column in zip(*map(astuple, usages), strict=True)))
