"""`up`: what does not fit on the card is refused before it is paid for, and what fits less well is told truly."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from selfhost_cli import claude, lifecycle
from selfhost_cli.cli import offers as page
from selfhost_cli.config import Source
from selfhost_cli.errors import BoxFailed, NothingToRent, NotServable, SelfhostError, Superseded, UsageError
from selfhost_cli.lifecycle import Plan, World
from selfhost_cli.model import Rental, State
from selfhost_cli.models.planner import GIB, Model, Shape
from tests.fakes.box import FakeKeeper, serving
from tests.fakes.market import make_offer
from tests.unit import test_lifecycle
from tests.unit.test_lifecycle import MODEL, Stage
from tests.unit.test_models_planner import CODER

stage, front = test_lifecycle.stage, test_lifecycle.front
WEIGHTS = Model(MODEL, round(17.3 * GIB), CODER)


def live(stage: Stage, model: Model | None = WEIGHTS, **changes: Any) -> World:
    """The world of the live market, where cards are real, and nothing is forced."""
    world = test_lifecycle.with_ollama(stage)
    settings = replace(world.settings, **{"context": 65_536, "small_context": False, **changes})
    return replace(world, settings=settings, find_shape=lambda: model)


def planned(world: World) -> Plan:
    plans: list[Plan] = []

    def decline(plan: Plan) -> bool:
        plans.append(plan)
        return False

    with pytest.raises(SelfhostError, match="nothing was rented"):
        lifecycle.up(world, decline)
    return plans[0]


def refused(stage: Stage, world: World, error: type[SelfhostError] = NothingToRent) -> SelfhostError:
    with pytest.raises(error) as caught:
        lifecycle.up(world, lambda plan: True)
    assert stage.market.creates == 0
    assert type(caught.value) is error
    return caught.value


def test_the_plan_shows_how_it_adds_up_on_the_card(stage: Stage) -> None:
    plan = planned(live(stage))
    assert plan.fit
    assert dict(page._lines(plan))["memory"] == ("1 × 65536 tokens, KV q8_0: 17.3 + 3.2 + 1.0 = 21.5 of 24.0 GiB")


def test_what_is_not_known_is_no_reason_to_refuse(stage: Stage) -> None:
    plan = planned(live(stage, model=None, slots=4, context=131_072))
    assert plan.fit is None
    assert "not known before it is loaded" in dict(page._lines(plan))["memory"]


def test_what_does_not_fit_is_refused_before_money_is_spent_with_what_does(stage: Stage) -> None:
    error = refused(stage, live(stage, slots=2))
    assert error.exit_code == 4
    assert error.message == (
        f"{MODEL} does not fit on RTX 4090: 2 × 65536 tokens, KV q8_0: 17.3 + 6.4 + 1.0 = 24.7 of 24.0 GiB, and "
        "1.5 GiB have to stay free"
    )
    assert "`selfhost up --slots 1` fits" in error.remedy
    assert "a card of 27 GB" in error.remedy


@pytest.mark.parametrize(
    "changes", [{"slots": 2}, {"slots": 4, "context": 131_072}, {"kv_cache_type": "f16"}, {"context": 120_832}]
)
def test_the_remedy_is_not_refused_in_its_turn(stage: Stage, changes: dict[str, Any]) -> None:
    world = live(stage, **changes)
    found = re.search(r"`selfhost up ([^`]*)` fits", refused(stage, world).remedy)
    assert found
    words = found[1].split()
    wanted = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    settings = replace(world.settings, **{k: v if k == "kv_cache_type" else int(v) for k, v in wanted.items()})
    assert planned(replace(world, settings=settings)).fit


def test_a_larger_card_of_the_same_name_is_taken_when_only_that_has_room(stage: Stage) -> None:
    stage.market.stock = [make_offer(1), make_offer(2, gpu_ram_mb=49_140)]
    plan = planned(live(stage, slots=2))
    assert [row.offer.machine_id for row in plan.choice.ranked] == [2]
    assert plan.fit
    assert plan.fit.memory == 49_140 * 2**20


def test_a_small_card_will_do_for_a_small_model_unless_the_setting_says_no(stage: Stage) -> None:
    stage.market.stock = [make_offer(1, gpu_ram_mb=12_288)]
    small = replace(WEIGHTS, weights=4 * GIB)
    assert planned(live(stage, small)).choice.ranked
    world = live(stage, small)
    by_hand = {**world.settings.sources, "gpu_ram_mb": Source.FILE}
    error = refused(stage, replace(world, settings=replace(world.settings, sources=by_hand)))
    assert "gpu_ram_mb" in error.remedy


def test_more_than_the_model_was_made_for_is_a_usage_error(stage: Stage) -> None:
    short = replace(WEIGHTS, attention=replace(CODER, native_context=32_768))
    error = refused(stage, live(stage, short), UsageError)
    assert "takes at most 32768 tokens" in error.message
    assert "`selfhost up --context 32768 --small-context`" in error.remedy


def test_a_context_without_room_for_a_session_is_refused_unless_it_is_forced(stage: Stage) -> None:
    least = claude.least_context()
    assert planned(live(stage, context=least))
    error = refused(stage, live(stage, context=least - 1), UsageError)
    assert error.exit_code == 2
    assert "`selfhost up --context 49152`" in error.remedy
    assert f"`selfhost up --context {least - 1} --small-context`" in error.remedy
    assert planned(live(stage, context=8192, small_context=True))


def test_the_sandbox_has_a_small_one_without_being_told(stage: Stage) -> None:
    assert planned(stage.world).context == test_lifecycle.CONTEXT < claude.least_context()


def up(stage: Stage, world: World, real: int, confirm: Callable[[Plan], bool] = lambda plan: True) -> Rental:
    """On a box whose engine came to that context."""
    with serving(MODEL, real, "ollama", size=20, size_vram=20) as front:
        return lifecycle.up(replace(world, keeper=FakeKeeper(stage.ledger, front)), confirm)


def test_the_real_context_is_what_the_ledger_has_and_claude_code_is_told(stage: Stage) -> None:
    rental = up(stage, live(stage), 57_344)
    assert (rental.state, rental.context, rental.context_asked) == (State.READY, 57_344, 65_536)
    assert stage.ledger.live() == [rental]
    assert any("a context of 57344 tokens, not 65536" in event.text for event in stage.events)
    # Later, on the box that is up, it holds as well.
    assert up(stage, live(stage, disk=rental.disk_gb), 49_152).context == 49_152
    assert stage.ledger.live()[0].context == 49_152


def test_a_real_context_that_is_too_small_to_work_in_is_refused_and_nothing_is_billed(stage: Stage) -> None:
    with pytest.raises(NotServable, match="health: context: 40960 tokens, promised 65536") as caught:
        up(stage, live(stage), 40_960)
    assert "`selfhost models` shows what fits" in caught.value.remedy
    assert stage.billed == 0


@pytest.mark.parametrize(("real", "good"), [(8192, True), (8191, False)])
def test_of_a_context_that_was_forced_half_will_do(stage: Stage, real: int, good: bool) -> None:
    world = live(stage, context=16_384, small_context=True)
    if good:
        assert up(stage, world, real).context == real
    else:
        with pytest.raises(NotServable):
            up(stage, world, real)


def test_up_waits_until_the_launcher_has_found_what_fits(stage: Stage) -> None:
    stage.box.shapes = ['{"loaded": false}', '{"loaded": false}', '{"loaded": true}']
    began = stage.clock.monotonic()
    assert up(stage, live(stage), 65_536).state is State.READY
    assert len(stage.box.shapes) == 1
    assert stage.clock.monotonic() > began


def test_a_card_on_which_nothing_fits_is_this_machines_fault(stage: Stage) -> None:
    stage.box.shapes = ["tiny does not fit into the GPU's memory: 9 of 20 MB are there"]
    with pytest.raises(BoxFailed, match="cannot be loaded as it should be: tiny does not fit"):
        up(stage, live(stage, attempts=1), 65_536)
    assert stage.billed == 0


def test_a_launcher_that_never_settles_is_given_up_and_the_next_machine_tried(stage: Stage) -> None:
    stage.box.shapes = ['{"loaded": false}']
    with pytest.raises(BoxFailed, match="tries how much context fits"):
        up(stage, live(stage, attempts=2), 65_536)
    assert (stage.market.creates, stage.billed) == (2, 0)


def test_down_is_heard_while_the_launcher_is_settling(stage: Stage) -> None:
    world = live(stage)
    stage.box.shapes = ['{"loaded": false}']

    def before(verb: str) -> None:
        rental = stage.ledger.live()[0]
        if rental.state is State.INSTALLING and stage.clock.monotonic() > began + 20:
            stage.ledger.end(rental.label, "down")

    began, stage.box.before = stage.clock.monotonic(), before
    with pytest.raises(Superseded):
        up(stage, world, 65_536)


@pytest.mark.parametrize("said", ["{", "{}", '{"loaded": null}', "{]", '{"loaded": "false"}'])
def test_what_makes_no_sense_does_not_keep_up_waiting(stage: Stage, said: str) -> None:
    stage.box.shapes = [said]
    assert up(stage, live(stage), 65_536).state is State.READY


def test_slots_and_the_type_of_kv_are_kept_with_the_rental(stage: Stage) -> None:
    rental = up(stage, live(stage, model=None, slots=2, kv_cache_type="q4_0"), 65_536)
    assert (rental.slots, rental.kv_cache_type) == (2, "q4_0")


def test_the_shape_is_planned_as_it_is_asked_for(stage: Stage) -> None:
    assert planned(live(stage, model=None, slots=3)).shape == Shape(65_536, 3, "q8_0")
