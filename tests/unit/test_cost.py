"""What tokens cost on a box and at a list price; which rentals a month has."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from rich.table import Table

from selfhost_cli import config, cost
from selfhost_cli.cli import render
from selfhost_cli.cost import PerMillion
from selfhost_cli.errors import UsageError
from selfhost_cli.ledger import Ledger, Usage
from selfhost_cli.lifecycle import Books, billing
from selfhost_cli.model import Charges, Rental, State
from tests.fakes.clock import FakeClock
from tests.fakes.market import FakeMarket
from tests.fakes.rental import make_rental

PRICE = PerMillion(2.0, 0.2, 10.0)
MARKET = "http://127.0.0.1:9"
NOON = time.mktime((2026, 11, 10, 12, 0, 0, 0, 0, -1))
DAY = 86_400.0


def ended(label: str, began: float, dollars: float) -> Rental:
    facts = {"created_at": began, "sent_at": began, "running_at": began, "ended_at": began + 3600}
    charges = Charges(dollars, 0.0, 0.0, 0.0)
    return make_rental(label, state=State.ENDED, instance_id=7, charges=charges, **facts)  # type: ignore[arg-type]


def test_the_list_price_counts_reused_tokens_apart() -> None:
    assert PRICE.of(Usage(1, 1_000_000, 400_000, 100_000)) == pytest.approx(0.6 * 2 + 0.4 * 0.2 + 0.1 * 10)


def test_the_parts_of_the_bill_are_the_bill_in_the_ratio_of_the_list_price() -> None:
    usage = Usage(1, 3_000_000, 1_000_000, 200_000)
    value = cost.cost(0.93, usage, PRICE)
    assert value.per_million is not None
    assert value.per_million.of(usage) == pytest.approx(0.93)
    assert value.per_million.out / value.per_million.fresh == pytest.approx(5)
    assert value.overall == pytest.approx(0.93 / 3.2)
    assert value.list_dollars == pytest.approx(4 + 0.2 + 2)


def test_without_tokens_there_is_no_price_of_one() -> None:
    value = cost.cost(0.5, Usage(), PRICE)
    assert (value.per_million, value.overall, value.list_dollars) == (None, None, 0)


def test_with_a_list_price_of_nothing_nothing_can_be_split() -> None:
    assert cost.cost(0.5, Usage(1, 100, 0, 100), PerMillion(0, 0, 0)).per_million is None


def test_a_month_has_the_rentals_that_began_in_it_whole() -> None:
    rentals = [ended("one", NOON, 1.0), ended("two", NOON + DAY, 2.0), ended("before", NOON - 20 * DAY, 4.0)]
    usage = {"one": Usage(1, 10, 5, 1), "two": Usage(2, 20, 0, 2), "before": Usage(9, 9, 9, 9)}
    value = cost.report(rentals, usage, PRICE, "2026-11", now=NOON + 2 * DAY)
    assert [row.invoice.label for row in value.rentals] == ["one", "two"]
    assert value.total.dollars == 3.0
    assert value.total.usage == Usage(3, 30, 5, 3)
    assert (value.running, value.estimated) == ((), 0)
    assert [row.invoice.label for row in cost.report(rentals, usage, PRICE, "2026-10", now=NOON).rentals] == ["before"]


@pytest.mark.parametrize("month", ["2026-11", "2026-12", "2024-02"])
def test_a_month_spans_all_of_its_days(month: str) -> None:
    since, until = cost.span(month)
    assert (cost.month_of(since), cost.month_of(until - 1)) == (month, month)
    assert cost.month_of(since - 1) != month != cost.month_of(until)


def test_what_runs_is_told_so_far_whatever_the_month() -> None:
    live = replace(ended("live", NOON, 0.0), state=State.READY, charges=None, ended_at=None)
    value = cost.report([live], {}, PRICE, "2026-10", now=NOON + 7200)
    assert value.rentals == ()
    assert [(row.invoice.label, row.running, row.invoice.estimated) for row in value.running] == [("live", True, True)]
    assert value.running[0].cost.dollars == pytest.approx(2 * 0.31)
    assert cost.report([live], {}, PRICE, "2026-11", now=NOON + 7200).estimated == 1


def test_what_reuse_spared_is_the_sum_of_each_engines_own() -> None:
    rentals = [ended(label, NOON, 1.0) for label in ("fast", "slow", "unknown")]
    usage = {
        "fast": Usage(1, 2_000, 1_000, 1, read_tokens=1_000, read_s=1.0),
        "slow": Usage(1, 2_000, 1_000, 1, read_tokens=1_000, read_s=10.0),
        "unknown": Usage(1, 2_000, 1_000, 1),
    }
    report = cost.report(rentals, usage, PRICE, "2026-11", now=NOON)
    assert [row.cost.spared_s for row in report.rentals] == [1.0, 10.0, None]
    assert report.total.spared_s == 11.0


def test_a_rental_that_never_became_a_box_is_not_told() -> None:
    never = make_rental(state=State.ENDED, created_at=NOON)
    assert cost.report([never], {}, PRICE, "2026-11", now=NOON).rentals == ()


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    """Twelve rentals, one a day, that the market had no figures for so far."""
    settings = config.load("default", flags={"market_url": MARKET}, env={"SELFHOST_HOME": str(tmp_path)})
    settings.paths.make()
    clock = FakeClock(NOON + 13 * DAY - 1)
    with closing(Ledger(settings.paths.ledger)) as ledger:
        for number in range(12):
            rental = replace(
                ended(f"r{number}", NOON + number * DAY, 0.0),
                instance_id=number,
                charges=None,
                market=f"{MARKET} account 1",
            )
            ledger.intend(replace(rental, state=State.CREATING))
            ledger.amend(rental.label, state=State.ENDED)
        yield Books(
            settings=settings, provider=FakeMarket(clock), ledger=ledger, report=lambda event: None, clock=clock
        )


def test_all_estimates_are_asked_for_in_one_question_and_none_starves(books: Books) -> None:
    market = books.provider
    assert isinstance(market, FakeMarket)
    market.charged_for = {number: Charges(0.5, 0.0, 0.0, 0.0, until=NOON + 2 * DAY) for number in (0, 1)}
    billing.reconcile(books)
    assert market.charges_asked == 1
    assert [rental.label for rental in books.ledger.all() if rental.charges] == ["r0", "r1"]


def test_a_bill_brings_the_figures_of_the_last_days_along(books: Books) -> None:
    market = books.provider
    assert isinstance(market, FakeMarket)
    market.charged_for = {number: Charges(0.5, 0.0, 0.0, 0.0, until=NOON + 20 * DAY) for number in range(12)}
    (last,) = [rental for rental in books.ledger.all() if rental.label == "r11"]
    assert billing.bill(books, last).total == 0.5
    assert market.charges_asked == 1
    assert [rental.label for rental in books.ledger.all() if rental.charges] == ["r10", "r11"]


@pytest.mark.parametrize("text", ["", "11", "2026-13", "2026-11-01", "last"])
def test_a_month_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--month"):
        cost.month(text)


def test_a_month_may_be_written_short() -> None:
    assert cost.month("2026-3") == "2026-03"


def test_a_narrow_terminal_cuts_no_number_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()
    monkeypatch.setattr(render, "out", render._Console(file=told, width=40, force_terminal=True, color_system=None))
    table = Table(box=None)
    for name in ("dollars", "in", "out"):
        table.add_column(name, no_wrap=True)
    table.add_row("1" * 20, "2" * 20, "3" * 20)
    render.whole(table)
    assert [word for word in told.getvalue().split() if word.isdigit()] == ["1" * 20, "2" * 20, "3" * 20]
