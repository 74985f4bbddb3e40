"""The bill of a rental: what we count ourselves, and when the market's figures take its place."""

from __future__ import annotations

from dataclasses import replace

import pytest

from selfhost_cli.invoice import covers, invoice, worth_noting
from selfhost_cli.ledger import Usage
from selfhost_cli.model import Caps, Charges, Heard, Rental, Saved, State
from tests.fakes.rental import make_rental

HOUR = 3600.0
START = 1_795_000_000.0
GB = 1_000_000_000


def make_heard(at: float, **changes: float) -> Heard:
    """Of a box that began to run with the rental, and is busy."""
    values = {"up_s": at - START, "idle_s": 0.0, "dollars": 0.0, "down_bytes": 0, "up_bytes": 0}
    return Heard(at, **(values | changes))  # type: ignore[arg-type]


def running(**changes: object) -> Rental:
    facts: dict[str, object] = {"instance_id": 7, "sent_at": START, "running_at": START, "ready_at": START}
    return make_rental(created_at=START, **(facts | changes))


def test_the_gpu_costs_from_running_and_the_disk_from_creation() -> None:
    rental = running(running_at=START + HOUR, ended_at=START + 3 * HOUR)
    bill = invoice(rental, Usage(), now=START + 99 * HOUR)
    assert bill.gpu_dollars == pytest.approx(2 * 0.30)
    assert bill.disk_dollars == pytest.approx(3 * 0.01)
    assert bill.estimated


def test_the_watchdog_knows_better_than_we_when_the_container_began_to_run() -> None:
    rental = running(running_at=START + 400, heard=make_heard(START + 600, up_s=500), ended_at=START + 700)
    assert invoice(rental, Usage(), now=START + 700).hours == pytest.approx(600 / HOUR)


def test_a_box_whose_clock_says_1970_did_not_run_before_it_was_rented() -> None:
    rental = running(heard=make_heard(START + 600, up_s=START), ended_at=START + 610)
    assert invoice(rental, Usage(), now=START + HOUR).hours == pytest.approx(600 / HOUR)


def test_the_bytes_that_the_watchdog_counted_are_billed() -> None:
    rental = running(heard=make_heard(START + HOUR, down_bytes=20 * GB, up_bytes=GB), ended_at=START + HOUR)
    bill = invoice(rental, Usage(), now=START + HOUR)
    assert bill.traffic_dollars == pytest.approx(20 * 0.002 + 0.004)
    assert bill.traffic_gb == 21


def test_the_markets_own_figures_win_and_what_we_thought_stays() -> None:
    rental = running(charges=Charges(0.5, 0.1, down=0.2, up=0.2), estimated=0.9)
    bill = invoice(rental, Usage(2, 900_000, 0, 100_000), now=START + HOUR)
    assert not bill.estimated
    assert bill.total == bill.least == bill.most == pytest.approx(1.0)
    assert bill.estimate == 0.9
    assert bill.traffic_gb == pytest.approx(0.2 / 0.002 + 0.2 / 0.004)
    assert bill.per_million_tokens == pytest.approx(1.0)


def test_a_box_that_never_existed_costs_nothing() -> None:
    bill = invoice(make_rental(sent_at=START), Usage(), now=START + HOUR)
    assert bill.total == bill.most == 0
    assert bill.per_million_tokens is None


def test_a_box_that_nobody_saw_running_may_have_run_from_the_start() -> None:
    bill = invoice(running(running_at=None, ready_at=None, ended_at=START + HOUR), Usage(), now=START + HOUR)
    assert (bill.gpu_dollars, bill.disk_dollars) == (0, pytest.approx(0.01))
    assert (bill.least, bill.most) == (0, pytest.approx(0.31))
    assert bill.uncertain


@pytest.mark.parametrize(
    ("caps", "heard", "ends_after"),
    [
        (Caps(), {}, 2700 + HOUR),
        (Caps(lease_s=600), {}, 600 + HOUR),
        (Caps(idle_s=1200), {"idle_s": 300.0}, 900 + HOUR),
        (Caps(max_s=4000), {}, 4000),
        (Caps(max_dollars=0.41), {"dollars": 0.31}, 0.1 / 0.31 * HOUR + HOUR),
    ],
)
def test_hours_after_its_watchdog_had_to_end_it_nothing_more_is_billed(
    caps: Caps, heard: dict[str, float], ends_after: float
) -> None:
    rental = running(state=State.ENDED, caps=caps, heard=make_heard(START + HOUR, **heard), ended_at=START + 9 * HOUR)
    bill = invoice(rental, Usage(), now=START + 10 * HOUR)
    assert bill.hours == pytest.approx(ends_after / HOUR)
    assert (bill.least, bill.most) == (pytest.approx(0.31), pytest.approx(9 * 0.31))
    assert bill.uncertain


def test_a_box_of_which_nothing_was_heard_ended_at_its_caps_at_the_latest() -> None:
    bill = invoice(running(caps=Caps(max_s=7200), ended_at=START + 9 * HOUR), Usage(), now=START + 9 * HOUR)
    assert bill.hours == 2


def test_a_box_without_a_watchdog_is_billed_until_it_was_proven_gone() -> None:
    rental = running(guarded=False, heard=make_heard(START + HOUR), ended_at=START + 10 * HOUR)
    assert invoice(rental, Usage(), now=START + 11 * HOUR).hours == 10
    so_far = replace(rental, state=State.READY, ended_at=None)
    assert invoice(so_far, Usage(), now=START + 9 * HOUR).hours == 9


def test_a_box_that_was_seen_to_run_was_not_ended_by_its_watchdog() -> None:
    rental = running(heard=make_heard(START + HOUR), ended_at=START + 10 * HOUR, seen_at=START + 10 * HOUR)
    bill = invoice(rental, Usage(), now=START + 11 * HOUR)
    assert (bill.hours, bill.uncertain) == (10, False)


def test_an_end_that_was_seen_leaves_no_doubt() -> None:
    rental = running(heard=make_heard(START + HOUR), ended_at=START + HOUR + 50)
    bill = invoice(rental, Usage(), now=START + 9 * HOUR)
    assert not bill.uncertain
    assert bill.hours == pytest.approx((HOUR + 50) / HOUR)


@pytest.mark.parametrize(
    ("until", "now", "right"),
    [
        (None, START + 20 * HOUR, False),  # nobody says that it is all
        (None, START + 30 * HOUR, True),
        (START + HOUR - 30, START + HOUR, True),
        (START + HOUR / 2, START + HOUR, False),  # they lag behind
        (START + HOUR / 2, START + 20 * HOUR, False),
        (START + HOUR / 2, START + 30 * HOUR, True),  # a day later that was all
    ],
)
def test_figures_count_once_they_are_about_all_of_the_rental(until: float | None, now: float, right: bool) -> None:
    rental = running(state=State.ENDED, heard=make_heard(START + HOUR - 9), ended_at=START + HOUR)
    assert covers(Charges(0.1, 0.1, 0.0, 0.0, until), rental, now=now) is right


def test_figures_that_end_where_the_watchdog_ended_the_box_are_about_all_of_it() -> None:
    rental = running(state=State.ENDED, heard=make_heard(START + HOUR), ended_at=START + 9 * HOUR)
    figures = Charges(0.1, 0.1, 0.0, 0.0, START + HOUR + 2705)
    assert covers(figures, rental, now=START + 9 * HOUR)
    assert not covers(replace(figures, until=START + HOUR), rental, now=START + 9 * HOUR)


def test_what_a_box_says_is_noted_once_a_minute_and_at_once_when_it_is_money() -> None:
    first = make_heard(START + 100)
    rental = running(state=State.READY)
    assert worth_noting(rental, first)
    rental = replace(rental, heard=first)
    assert not worth_noting(rental, first)
    assert not worth_noting(rental, make_heard(START + 159))
    assert worth_noting(rental, make_heard(START + 160))
    assert not worth_noting(rental, make_heard(START + 105, down_bytes=GB // 10))
    assert worth_noting(rental, make_heard(START + 105, down_bytes=GB // 2))
    dear = make_heard(START + 105, down_bytes=GB // 2, dollars=3.0)
    assert not worth_noting(rental, dear), "half a cent of three dollars"


def test_the_last_word_of_a_box_is_noted() -> None:
    rental = running(state=State.READY, heard=make_heard(START + 100))
    last = make_heard(START + 105)
    assert worth_noting(rental, last, lost=True)
    assert worth_noting(replace(rental, state=State.ENDING), last)
    assert not worth_noting(replace(rental, heard=last), last, lost=True)


def test_what_the_cache_saved_is_worth_the_gpus_price_and_no_part_of_the_bill() -> None:
    rental = running(ended_at=START + HOUR)
    bill = invoice(rental, Usage(), now=START + HOUR, saved=Saved(5, 900, 80, gpu_seconds=600))
    assert bill.saved_dollars == pytest.approx(0.30 / 6)
    assert bill.total == invoice(rental, Usage(), now=START + HOUR).total
