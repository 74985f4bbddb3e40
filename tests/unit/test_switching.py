"""Another model on a box that is ready, and back to the one before when that does not work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from selfhost_cli import lifecycle
from selfhost_cli.errors import MayBeBilling, NotSetUp, SelfhostError, UsageError
from selfhost_cli.lifecycle.switching import use_model
from selfhost_cli.lifecycle.world import World
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Rental, State
from selfhost_cli.models import catalogue
from selfhost_cli.models.planner import Model
from tests.fakes.box import serving
from tests.unit import test_lifecycle
from tests.unit.test_lifecycle import CONTEXT, MODEL, Stage

stage, front = test_lifecycle.stage, test_lifecycle.front


def wishing(stage: Stage, model: str, context: int = CONTEXT) -> World:
    settings = replace(stage.world.settings, model=model, context=context, small_context=True)
    return replace(stage.world, settings=settings)


def rented(stage: Stage) -> Rental:
    return lifecycle.up(stage.world, lambda plan: True)


def test_the_box_serves_it_from_then_on(stage: Stage) -> None:
    before = rented(stage)
    with serving("another", 16_384) as stage.keeper.front:
        after = use_model(wishing(stage, "another", 16_384))
    assert (after.model, after.context, after.state) == ("another", 16_384, State.READY)
    assert not after.changing
    assert (after.label, after.box_token) == (before.label, before.box_token)
    assert stage.ledger.live() == [after]
    assert b"SELFHOST_MODEL='another'" in b"".join(stage.box.uploads)
    assert stage.billed == 1


def test_what_it_serves_already_is_left_alone(stage: Stage) -> None:
    before = rented(stage)
    sent = len(stage.box.uploads)
    assert use_model(wishing(stage, MODEL)) == before
    assert len(stage.box.uploads) == sent


def test_what_fails_ends_with_the_model_of_before(stage: Stage) -> None:
    before = rented(stage)
    with pytest.raises(SelfhostError, match="another cannot be served") as error:
        use_model(wishing(stage, "another"))  # the box goes on serving what it did
    assert f"serves {MODEL}, as before" in error.value.remedy
    (after,) = stage.ledger.live()
    assert (after.model, after.context, after.state) == (before.model, before.context, State.READY)
    settings = [upload for upload in stage.box.uploads if b"SELFHOST_MODEL=" in upload]
    assert f"SELFHOST_MODEL='{MODEL}'".encode() in settings[-1]


def test_where_nothing_works_any_more_that_it_is_billed_is_the_headline(stage: Stage) -> None:
    rented(stage)
    stage.box.install_code = 1
    with pytest.raises(MayBeBilling, match="serves nothing now") as error:
        use_model(wishing(stage, "another"))
    assert "selfhost down" in error.value.remedy
    (left,) = stage.ledger.live()
    assert left.changing, "which model answers is not known"
    assert stage.billed == 1
    stage.box.install_code = 0
    stage.up()
    (left,) = stage.ledger.live()
    assert not left.changing


def test_without_a_box_there_is_nothing_to_change(stage: Stage) -> None:
    with pytest.raises(NotSetUp, match="no box"):
        use_model(wishing(stage, "another"))


def test_not_beside_an_up(stage: Stage) -> None:
    rented(stage)
    with ProcessLock(stage.world.settings.paths.up_lock) as lock:
        assert lock.acquire()
        with pytest.raises(UsageError, match="is running"):
            use_model(wishing(stage, "another"))


def test_what_has_no_room_on_the_card_is_refused_before_anything_is_changed(stage: Stage) -> None:
    rental = rented(stage)
    stage.ledger.note(rental, gpu="RTX 4090")
    entry = catalogue.find("qwen3-coder:30b")
    assert entry
    assert entry.weights
    assert entry.attention
    large = replace(
        wishing(stage, entry.tag, 262_144), find_shape=lambda: Model(entry.tag, entry.weights, entry.attention)
    )
    sent = len(stage.box.uploads)
    with pytest.raises(UsageError, match="does not fit on RTX 4090") as error:
        use_model(large)
    assert "selfhost models use qwen3-coder:30b --context" in error.value.remedy
    assert len(stage.box.uploads) == sent
