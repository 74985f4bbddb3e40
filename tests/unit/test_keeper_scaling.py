"""Another box while requests wait: decided on a clock that the test moves, rented by a program that it replaces."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from selfhost_cli import config, fleet
from selfhost_cli.fleet import Fleet
from selfhost_cli.keeper.scaling import AGAIN_S, BUSY_S, LOOK_EVERY_S, Scaling
from selfhost_cli.model import Caps, Rental, State
from tests.fakes.clock import FakeClock
from tests.fakes.rental import make_rental
from tests.proxy.kit import asynchronous

CAPS = Caps(lease_s=2700, idle_s=2700, max_s=28_800, max_dollars=2.0)


class House:
    def __init__(self, home: Path) -> None:
        self.settings = config.load("default", env={"SELFHOST_HOME": str(home)})
        self.settings.paths.make()
        self.clock = FakeClock()
        self.waiting: list[object] = [0]
        self.started: list[tuple[Sequence[str], Mapping[str, str]]] = []
        self.code = 0
        self.spent = 0.0
        self.rentals: list[Rental] = [make_rental("a", state=State.READY, caps=CAPS)]
        self.scaling = Scaling(self.settings, self._healths, self._ended, {"HOME": "/nowhere"}, self._start, self.clock)
        fleet.remember(self.settings.paths, Fleet(3, 2.0, 0.5, 6.0, 7.0))

    def _ended(self, since: float) -> float:
        assert since == 7.0
        return self.spent

    async def _healths(self) -> Mapping[str, object]:
        return {str(number): {"requests": {"waiting": one}} for number, one in enumerate(self.waiting)}

    async def _start(self, words: Sequence[str], env: Mapping[str, str]) -> int:
        self.started.append((words, env))
        return self.code

    async def run(self, seconds: float) -> None:
        """So much time, as the keeper spends it."""
        for _ in range(round(seconds / LOOK_EVERY_S)):
            self.scaling.tick(self.rentals)
            for _ in range(5):
                await asyncio.sleep(0)
            self.clock.sleep(LOOK_EVERY_S)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@asynchronous
async def test_another_box_is_rented_when_requests_have_waited_for_long(house: House) -> None:
    house.waiting = [2]
    await house.run(BUSY_S)
    assert house.started == []
    await house.run(LOOK_EVERY_S)
    ((words, env),) = house.started
    assert list(words[1:]) == (
        ["-m", "selfhost_cli", "--profile", "default", "up", "--yes", "--detach", "--boxes", "2..3"]
    )
    one = house.rentals[0]
    assert (env["SELFHOST_MODEL"], env["SELFHOST_CONTEXT"]) == (one.model, str(one.context_asked or one.context))
    assert (env["SELFHOST_MAX_PRICE"], env["SELFHOST_MAX_SPEND"]) == ("0.5", "6.0")
    assert (env["SELFHOST_IDLE"], env["HOME"]) == ("15.0", "/nowhere")


@asynchronous
async def test_a_moment_without_waiting_begins_anew(house: House) -> None:
    house.waiting = [2]
    await house.run(BUSY_S)
    house.waiting = [0]
    await house.run(LOOK_EVERY_S)
    house.waiting = [1]
    await house.run(BUSY_S)
    assert house.started == []


@asynchronous
async def test_never_more_than_were_confirmed(house: House) -> None:
    house.waiting = [2]
    house.rentals = [make_rental(label, state=State.READY, caps=CAPS) for label in "abc"]
    await house.run(10 * BUSY_S)
    assert house.started == []
    fleet.forget(house.settings.paths)
    house.rentals = house.rentals[:1]
    await house.run(10 * BUSY_S)
    assert house.started == []


@asynchronous
async def test_while_one_is_being_made_or_ends_none_is_rented(house: House) -> None:
    house.waiting = [2]
    for state in (State.BOOTING, State.ENDING):
        house.rentals = [house.rentals[0], make_rental("b", state=state, caps=CAPS)]
        await house.run(10 * BUSY_S)
        assert house.started == []
    house.rentals = []
    await house.run(10 * BUSY_S)
    assert house.started == []


@asynchronous
async def test_one_that_could_not_be_had_is_tried_again_later(house: House) -> None:
    house.waiting, house.code = [2], 4
    await house.run(AGAIN_S)
    assert len(house.started) == 1
    await house.run(3 * BUSY_S)
    assert len(house.started) == 2


@asynchronous
@pytest.mark.parametrize(("spent", "rented"), [(2.0, 1), (2.1, 0)])
async def test_what_ended_boxes_cost_is_in_the_sum(house: House, spent: float, rented: int) -> None:
    """A rush after the other must not cost more than was confirmed."""
    house.waiting, house.spent = [2], spent
    await house.run(2 * BUSY_S)
    assert len(house.started) == rented


@asynchronous
async def test_what_a_box_does_not_say_is_no_reason(house: House) -> None:
    house.waiting = [None, "many", {}]
    await house.run(10 * BUSY_S)
    assert house.started == []
