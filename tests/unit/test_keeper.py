from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from selfhost_cli import config, lifecycle
from selfhost_cli.config import Settings
from selfhost_cli.keeper.deadlines import Deadlines, outlived
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Caps, State
from tests.fakes.clock import FakeClock
from tests.fakes.rental import make_rental

START = 1_795_000_000.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = config.load("default", env={"SELFHOST_HOME": str(tmp_path)})
    settings.paths.make()
    return settings


@pytest.fixture
def up(settings: Settings) -> Iterator[ProcessLock]:
    """A `selfhost up` that runs."""
    with ProcessLock(settings.paths.up_lock) as lock:
        assert lock.acquire()
        yield lock


def test_an_orphan_is_due_after_two_minutes_and_then_every_twenty_seconds(settings: Settings) -> None:
    clock = FakeClock()
    deadlines, rental = Deadlines(settings, clock), make_rental(state=State.BOOTING)
    due = []
    for second in range(150):
        if deadlines.due(rental):
            due.append(second)
        clock.sleep(1)
    assert due == [121, 141]


def test_a_new_up_that_takes_over_starts_the_two_minutes_anew(settings: Settings) -> None:
    clock = FakeClock()
    deadlines, rental = Deadlines(settings, clock), make_rental(state=State.BOOTING)
    assert not deadlines.due(rental)
    clock.sleep(119)
    with ProcessLock(settings.paths.up_lock) as lock:
        assert lock.acquire()
        assert not deadlines.due(rental)
    clock.sleep(5)
    assert not deadlines.due(rental)


def test_an_up_that_lives_but_gets_nowhere_does_not_keep_its_box_for_ever(settings: Settings, up: ProcessLock) -> None:
    clock = FakeClock()
    deadlines, rental = Deadlines(settings, clock), make_rental(state=State.INSTALLING)
    assert not deadlines.due(rental)
    clock.sleep((settings.boot_timeout + settings.install_timeout) * 60)
    assert not deadlines.due(rental)
    clock.sleep(settings.orphan * 60 + 1)
    assert deadlines.due(rental)


def test_a_rental_that_is_to_end_is_finished_by_the_keeper_after_a_minute(settings: Settings) -> None:
    clock = FakeClock()
    deadlines, rental = Deadlines(settings, clock), make_rental(state=State.ENDING)
    assert not deadlines.due(rental)
    clock.sleep(61)
    assert deadlines.due(rental) is lifecycle.finish


def test_a_ready_box_is_looked_for_only_once_it_is_out_of_reach(settings: Settings) -> None:
    clock = FakeClock()
    deadlines, rental = Deadlines(settings, clock), make_rental(state=State.READY)
    assert not deadlines.due(rental, None)
    down_since = clock.monotonic()
    clock.sleep(10)
    assert not deadlines.due(rental, down_since)
    clock.sleep(1)
    assert deadlines.due(rental, down_since)


def test_a_keeper_holds_out_for_an_hour_longer_than_the_box_can_live() -> None:
    rental = make_rental(sent_at=START, caps=Caps(max_s=7200))
    assert not outlived(rental, START + 7200 + 3599)
    assert outlived(rental, START + 7200 + 3601)


def test_a_rental_that_was_never_sent_counts_from_its_intent() -> None:
    rental = make_rental(created_at=START, sent_at=None, caps=Caps(max_s=60))
    assert not outlived(rental, START + 3600)
    assert outlived(rental, START + 3661)
