"""Several boxes of one `up`: one after the other, each with all rules of one, and one cap for the sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from selfhost_cli import backends, fleet, lifecycle
from selfhost_cli import ledger as ledger_module
from selfhost_cli.backends import Backend, Kind
from selfhost_cli.cli import render
from selfhost_cli.config import Source
from selfhost_cli.errors import BoxFailed, NotSetUp, SelfhostError, Superseded, UsageError
from selfhost_cli.ledger import Ledger, Usage
from selfhost_cli.lifecycle import Plan, World
from selfhost_cli.model import BoxSpec, BoxState, Rental, State
from tests.fakes.rental import make_rental
from tests.unit import test_lifecycle
from tests.unit.test_lifecycle import Stage, interrupt_once

front = test_lifecycle.front
stage = test_lifecycle.stage


def world(stage: Stage, **flags: object) -> World:
    settings = stage.world.settings
    sources = dict(settings.sources) | dict.fromkeys(flags, Source.FLAG)
    settings = replace(settings, **flags, sources=sources)  # type: ignore[arg-type]
    return replace(stage.world, settings=settings, spreads=lambda: True)


def up(stage: Stage, boxes: int, **flags: object) -> list[Rental]:
    return lifecycle.up_all(world(stage, **flags), lambda plan: True, boxes)


def labels(stage: Stage) -> set[str]:
    return {box.label for box in stage.market.boxes.values()}


def test_each_is_rented_once_and_all_of_them_are_confirmed_once(stage: Stage) -> None:
    plans: list[Plan] = []
    made = lifecycle.up_all(world(stage, max_spend=6.0), lambda plan: not plans.append(plan), 3)  # type: ignore[func-returns-value]
    assert [rental.state for rental in made] == [State.READY] * 3
    assert len({rental.instance_id for rental in made}) == stage.market.creates == stage.billed == 3
    assert [plan.boxes for plan in plans] == [3]
    assert [rental.caps.max_dollars for rental in made] == [2.0, 2.0, 2.0]


def test_what_runs_already_is_counted_in(stage: Stage) -> None:
    (first,) = up(stage, 1, max_spend=2.0)
    made = up(stage, 3, max_spend=6.0)
    assert made[0].label == first.label
    assert stage.billed == 3
    assert sum(rental.caps.max_dollars for rental in made) == 6.0
    assert [rental.label for rental in up(stage, 2)] == [rental.label for rental in made]
    assert stage.market.creates == 3


def test_the_cap_in_dollars_is_for_the_sum(stage: Stage) -> None:
    up(stage, 1, max_spend=5.0)
    with pytest.raises(UsageError, match=r"may cost \$5 already, and --max-spend is \$5 for all") as caught:
        up(stage, 2, max_spend=5.0)
    assert "--boxes 2 --max-spend 6" in caught.value.remedy
    assert stage.billed == 1


def test_another_box_serves_the_same(stage: Stage) -> None:
    up(stage, 1)
    settings = stage.world.settings
    sources = dict(settings.sources) | {"model": Source.FILE}
    settings = replace(settings, model="another", max_spend=9.0, sources=sources)
    changed = replace(world(stage), settings=settings)
    with pytest.raises(UsageError, match="another box would serve another"):
        lifecycle.up_all(changed, lambda plan: True, 2)
    assert stage.billed == 1


def test_without_the_router_nothing_is_rented(stage: Stage) -> None:
    with pytest.raises(NotSetUp, match="vllm-router") as caught:
        lifecycle.up_all(stage.world, lambda plan: True, 2)
    assert "selfhost-cli[boxes]" in caught.value.remedy
    assert stage.market.creates == 0


def test_a_box_that_fails_is_ended_and_those_that_serve_go_on(stage: Stage) -> None:
    def fail_from_the_second_on(verb: str) -> None:
        if verb == "create" and stage.market.creates >= 1:
            stage.market.state = BoxState.FAILED

    stage.market.before = fail_from_the_second_on
    with pytest.raises(BoxFailed):
        up(stage, 3)
    (live,) = stage.ledger.live()
    assert live.state is State.READY
    assert labels(stage) == {live.label}


@pytest.mark.parametrize("verb", ["create", "get", "connect"])
def test_an_interrupt_ends_what_was_not_ready_yet(stage: Stage, verb: str) -> None:
    up(stage, 1, max_spend=2.0)
    (first,) = stage.ledger.live()
    interrupt_once(stage, verb)
    with pytest.raises(KeyboardInterrupt):
        up(stage, 3, max_spend=6.0)
    assert [rental.label for rental in stage.ledger.live()] == [first.label]
    assert labels(stage) == {first.label}


def test_one_that_was_being_made_is_gone_on_with(stage: Stage) -> None:
    up(stage, 1, max_spend=2.0)
    (first,) = stage.ledger.live()
    label = f"{stage.world.prefix}killed"
    number = stage.market.create(stage.market.stock[1], BoxSpec(label, "image", 30.0, "true", {}))
    left = replace(first, label=label, state=State.BOOTING, instance_id=number, endpoint=None, ready_at=None)
    stage.ledger.intend(left)
    made = up(stage, 1)
    assert [rental.state for rental in made] == [State.READY, State.READY]
    assert stage.market.creates == 2


def test_what_may_be_rented_later_is_confirmed_and_counted_in(stage: Stage) -> None:
    plans: list[Plan] = []
    made = lifecycle.up_all(world(stage, max_spend=6.0), lambda plan: not plans.append(plan), 1, 3)  # type: ignore[func-returns-value]
    assert [(plan.boxes, plan.later) for plan in plans] == [(1, 2)]
    assert [rental.caps.max_dollars for rental in made] == [2.0]
    confirmed = fleet.recall(stage.world.settings.paths)
    assert confirmed
    assert (confirmed.most, confirmed.share, confirmed.ceiling, confirmed.dollars) == (3, 2.0, plans[0].ceiling, 6.0)
    stage.clock.sleep(100)
    more = lifecycle.up_all(world(stage, max_spend=6.0), lambda plan: True, 2, 3)
    assert [rental.caps.max_dollars for rental in more] == [2.0, 2.0]
    assert fleet.recall(stage.world.settings.paths) == confirmed, "the keeper's own `up` begins no new sum"
    up(stage, 2)
    assert fleet.recall(stage.world.settings.paths), "a plain `up` leaves it"
    lifecycle.up_all(world(stage), lambda plan: True, 2, 2)
    assert fleet.recall(stage.world.settings.paths) is None


def test_what_was_not_confirmed_is_not_rented_later(stage: Stage) -> None:
    up(stage, 1, max_spend=2.0)
    with pytest.raises(SelfhostError, match="nothing was rented"):
        lifecycle.up_all(world(stage, max_spend=6.0), lambda plan: False, 1, 3)
    assert fleet.recall(stage.world.settings.paths) is None


def test_a_new_first_box_does_not_bring_back_what_was_confirmed_for_the_last_ones(stage: Stage) -> None:
    lifecycle.up_all(world(stage, max_spend=6.0), lambda plan: True, 1, 3)
    stage.market.boxes.clear()  # its watchdog ended it
    stage.clock.sleep(3600)
    up(stage, 1)
    assert fleet.recall(stage.world.settings.paths) is None


def test_down_ends_the_renting_of_more(stage: Stage) -> None:
    lifecycle.up_all(world(stage, max_spend=6.0), lambda plan: True, 1, 3)
    stage.down()
    assert fleet.recall(stage.world.settings.paths) is None


@pytest.mark.parametrize(
    ("text", "counts"), [("1", (1, 1)), ("3", (3, 3)), ("1..3", (1, 3)), ("2..2", (2, 2)), ("99", (99, 99))]
)
def test_a_number_or_a_range(text: str, counts: tuple[int, int]) -> None:
    assert fleet.parse(text) == counts


@pytest.mark.parametrize("text", ["0", "0..2", "3..1", "100", "1..", "..3", "-1", "1.5", "a", "1..2..3", "1 ..3"])
def test_what_is_no_number_of_boxes(text: str) -> None:
    with pytest.raises(UsageError, match="from 1 to 99"):
        fleet.parse(text)


def test_down_ends_all_of_them(stage: Stage) -> None:
    up(stage, 3, max_spend=6.0)
    assert len(stage.down().invoices) == 3
    assert stage.billed == 0


def test_the_invoice_has_what_services_cost_beside_the_box(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger_module.time, "time", stage.clock.time)
    stage.ledger.add_usage("backend-sold", "main", Usage(1, 9_000_000, 0, 0))  # before there was a box
    stage.clock.sleep(10)
    up(stage, 1)
    sold = Backend("sold", Kind.OPENAI, url="https://sold.test", model="m", price_in=2.0, price_out=8.0)
    backends.add(stage.world.settings.paths, sold)
    stage.ledger.add_usage("backend-sold", "main", Usage(1, 1_000_000, 0, 500_000))
    stage.ledger.add_usage("backend-removed", "main", Usage(1, 10, 0, 10))
    ended = stage.down()
    assert {one.name: one.dollars for one in ended.sold} == {"sold": 6.0, "removed": None}
    render.ended(ended)
    assert "$6.00 beside the box: 1000000 in (0 reused), 500000 out" in capsys.readouterr().out


def test_one_at_a_time_is_neither_ready_nor_over(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.intend(make_rental("a", state=State.READY))
    ledger.intend(make_rental("b", state=State.BOOTING))
    with pytest.raises(Superseded, match="rental b is not finished"):
        ledger.intend(make_rental("c"))
    ledger.close()
