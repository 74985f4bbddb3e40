from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from selfhost_cli import config, lifecycle
from selfhost_cli.config import Settings
from selfhost_cli.errors import SelfhostError, Superseded
from selfhost_cli.keeper.deadlines import Deadlines, Watch, outlived
from selfhost_cli.keeper.notice import Notice
from selfhost_cli.ledger import Ledger
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import BoxState, Caps, Heard, Instance, Rental, State
from tests.fakes.clock import FakeClock
from tests.fakes.market import FakeMarket
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


def test_a_box_that_cannot_be_ended_does_not_live_on_its_keepers_lease(settings: Settings) -> None:
    clock = FakeClock()
    deadlines, rental = Deadlines(settings, clock), make_rental(state=State.INSTALLING)
    assert not deadlines.orphaned(rental)
    clock.sleep(121)
    assert deadlines.orphaned(rental)
    assert not deadlines.orphaned(replace(rental, state=State.READY))


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
    clock.sleep(settings.ready_timeout * 60)
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
    assert not deadlines.due(rental)
    watch = Watch(down_since=clock.monotonic())
    clock.sleep(10)
    assert not deadlines.due(rental, watch)
    clock.sleep(1)
    assert deadlines.due(rental, watch)


HOUR = 3600.0
CAPS = Caps(max_s=7200, max_dollars=2.0)


class Ready:
    """A box that was ready one second after START, its keeper and its market: on a clock that tests move."""

    def __init__(self, settings: Settings) -> None:
        self.clock = FakeClock(START)
        self.ledger = Ledger(settings.paths.ledger)
        self.market = FakeMarket(self.clock)
        self.books = lifecycle.Books(
            settings=settings, provider=self.market, ledger=self.ledger, report=lambda event: None, clock=self.clock
        )
        self.deadlines = Deadlines(settings, self.clock)
        label = f"{self.books.prefix}1"
        times = {"created_at": START, "sent_at": START, "running_at": START, "ready_at": START + 1}
        self.ledger.intend(
            make_rental(label, state=State.READY, instance_id=7, dph_total=0.5, caps=CAPS, **times)  # type: ignore[arg-type]
        )
        self.market.boxes[7] = Instance(
            7, label, BoxState.RUNNING, "running", "", 1, "RTX 4090", 0.5, START, None, None
        )

    @property
    def rental(self) -> Rental:
        [rental] = self.ledger.all()
        return rental

    def heard(self, up_s: float, dollars: float = 0.1) -> Heard:
        """The watchdog's figures, as they are read now."""
        return Heard(self.clock.time(), up_s, 0.0, dollars, 0, 0)

    def pass_(self, seconds: int, watch: Callable[[], Watch]) -> float | None:
        """Let time pass, with the keeper's look every second; what is due is done. When the box was gone, if it was."""
        for _ in range(seconds):
            if work := self.deadlines.due(self.rental, watch()):
                with suppress(SelfhostError):  # it tries again
                    work(self.books, self.rental)
            if not self.market.boxes:
                return self.clock.time() - START
            self.clock.sleep(1)
        return None


@pytest.fixture
def ready(settings: Settings) -> Iterator[Ready]:
    stage = Ready(settings)
    yield stage
    stage.ledger.close()


def test_a_box_out_of_reach_is_ended_a_minute_after_its_hours(ready: Ready) -> None:
    lost = Watch(down_since=START + HOUR)
    ready.clock.sleep(7000)
    assert ready.pass_(260, lambda: lost) is None
    gone = ready.pass_(120, lambda: lost)
    assert gone is not None
    assert gone < 7200 + 60 + 30
    assert (ready.rental.state, ready.rental.reason) == (State.ENDED, "its 2 h are over")


def test_a_box_out_of_reach_is_ended_after_its_dollars_traffic_as_heard_last_included(ready: Ready) -> None:
    last = Heard(START + 1800, 1800.0, 0.0, 1.5, 0, 0)  # $1.25 of it were traffic; the rest lasts for an hour
    lost = Watch(down_since=START + 1800, heard=last)
    ready.clock.sleep(5300)
    assert ready.pass_(155, lambda: lost) is None
    assert ready.pass_(60, lambda: lost)
    assert ready.rental.reason == "its $2 are spent"


def test_a_watchdog_that_is_dead_does_not_save_a_box_that_can_be_reached(ready: Ready) -> None:
    """Its file can be read for ever, and is a minute old each time."""
    ready.clock.sleep(7200)
    assert ready.pass_(150, lambda: Watch(heard=ready.heard(600))) is not None
    assert ready.rental.reason == "its 2 h are over"


def test_a_box_without_any_watchdog_ends_by_its_caps_too(ready: Ready) -> None:
    ready.clock.sleep(7200)
    assert ready.pass_(140, Watch) is not None
    assert ready.rental.reason == "its 2 h are over"


@pytest.mark.parametrize("hours", [12, -12])
def test_a_clock_that_is_set_ends_no_box_and_lets_none_go_on(ready: Ready, hours: int) -> None:
    lost = Watch(down_since=START + 60)
    ready.clock.sleep(HOUR)
    assert ready.pass_(30, lambda: lost) is None
    ready.clock.set_by = hours * HOUR
    assert ready.pass_(600, lambda: lost) is None
    assert ready.pass_(600, lambda: Watch(heard=ready.heard(ready.clock.now - START))) is None
    ready.clock.sleep(HOUR - 1230)
    dead = ready.heard(600)
    assert ready.pass_(200, lambda: Watch(heard=dead)) is not None
    assert ready.rental.reason == "its 2 h are over"


def test_a_watchdog_at_work_knows_better_what_was_extended(ready: Ready) -> None:
    ready.clock.sleep(7200)
    assert ready.pass_(600, lambda: Watch(heard=ready.heard(ready.clock.time() - START))) is None
    assert ready.rental.state is State.READY


def test_a_box_that_was_extended_lives_until_its_new_cap(ready: Ready) -> None:
    ready.ledger.note(ready.rental, caps=Caps(max_s=3 * 3600, max_dollars=5.0))
    lost = Watch(down_since=START + HOUR)
    ready.clock.sleep(7200)
    assert ready.pass_(600, lambda: lost) is None
    ready.clock.sleep(3060)
    assert ready.rental.state is State.READY
    assert ready.pass_(60, lambda: lost)
    assert ready.rental.reason == "its 3 h are over"


def test_extend_is_in_time_even_when_the_keeper_has_decided(ready: Ready) -> None:
    ready.clock.sleep(7300)
    seen, lost = ready.rental, Watch(down_since=START)
    while not (work := ready.deadlines.due(seen, lost)) or "over" not in repr(work):
        ready.clock.sleep(1)
    ready.ledger.note(seen, caps=Caps(max_s=9 * 3600, max_dollars=9.0))
    with pytest.raises(Superseded, match="were moved"):
        work(ready.books, seen)
    assert ready.rental.state is State.READY
    assert ready.market.boxes


def test_idleness_and_the_lease_are_the_boxs_own_business(ready: Ready) -> None:
    ready.ledger.note(ready.rental, caps=Caps(idle_s=60, lease_s=60))
    assert ready.pass_(600, lambda: Watch(down_since=START)) is None


def test_a_verdict_that_stands_for_a_minute_is_carried_out_by_the_keeper(ready: Ready) -> None:
    ready.clock.sleep(100)

    def watch() -> Watch:
        return Watch(heard=ready.heard(ready.clock.time() - START), verdict="idle for 2701 s" + "!" * 500)

    assert ready.pass_(60, watch) is None
    assert ready.pass_(30, watch)
    assert ready.rental.reason.startswith("its watchdog could not end it: idle for 2701 s!")
    assert len(ready.rental.reason) < 160


def test_a_box_that_went_by_its_own_verdict_is_recorded_so(ready: Ready) -> None:
    watch = Watch(down_since=START + 100, heard=ready.heard(100), verdict="idle for 2701 s")
    ready.clock.sleep(100)
    assert ready.pass_(5, lambda: watch) is None
    ready.market.boxes.clear()
    for _ in range(120):
        if ready.rental.state is State.READY and (work := ready.deadlines.due(ready.rental, watch)):
            work(ready.books, ready.rental)
        ready.clock.sleep(1)
    assert (ready.rental.state, ready.rental.reason) == (State.ENDED, "the box ended by itself")


def test_while_the_market_is_away_the_keeper_goes_on_trying(ready: Ready) -> None:
    lost = Watch(down_since=START)
    ready.clock.sleep(7300)
    ready.market.unreachable = 8
    assert ready.pass_(600, lambda: lost)
    assert ready.market.unreachable == 0
    assert (ready.rental.state, ready.rental.reason) == (State.ENDED, "its 2 h are over")


class Killed(BaseException):
    """Nothing catches a SIGKILL."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_keeper_that_is_killed_at_any_step_of_it_is_followed_by_one_that_finishes(ready: Ready, when: str) -> None:
    """Until a round goes through without meeting the step at which it would be killed."""
    row, lost, step = ready.market.boxes[7], Watch(down_since=START), 0
    ready.clock.sleep(7300)
    while True:
        steps: list[str] = []

        def kill(verb: str, steps: list[str] = steps, step: int = step) -> None:
            steps.append(verb)
            if len(steps) == step + 1:
                if verb == "destroy" and when == "after":
                    ready.market.boxes.clear()
                raise Killed

        ready.market.before = kill
        try:
            ready.pass_(600, lambda: lost)
        except Killed:
            pass
        ready.market.before = lambda verb: None
        ready.deadlines = Deadlines(ready.books.settings, ready.clock)
        for _ in range(300):
            if work := ready.deadlines.due(ready.rental, lost):
                work(ready.books, ready.rental)
            ready.clock.sleep(1)
        assert (ready.market.boxes, ready.rental.state) == ({}, State.ENDED), steps
        if len(steps) <= step:
            break
        step += 1
        before = replace(ready.rental, state=State.READY, ended_at=None, reason="")
        ready.ledger.close()
        ready.books.settings.paths.ledger.unlink()
        ready.ledger = Ledger(ready.books.settings.paths.ledger)
        ready.ledger.intend(before)
        ready.books = replace(ready.books, ledger=ready.ledger)
        ready.market.boxes[7] = row
        ready.deadlines = Deadlines(ready.books.settings, ready.clock)
    assert step >= 4, "destroy, list and what comes before them"


def test_what_people_are_told_is_written_whole_for_their_profile_and_goes_away(settings: Settings) -> None:
    notice, paths = Notice(settings.paths, "demo"), settings.paths
    paths.notice.write_text("of a keeper that was killed")
    notice.tell("")
    assert not paths.notice.exists()
    notice.tell('it ends; `selfhost extend` moves\x1b[2J it "soon"')
    told = 'selfhost: it ends; `selfhost --profile demo extend` moves[2J it "soon"'
    assert paths.notice.read_text() == f"{told}\n"
    assert json.loads(paths.notice_for_hooks.read_text()) == {"systemMessage": told}
    notice.tell("")
    assert list(paths.state.glob("notice*")) == []


def test_a_notice_that_cannot_be_written_is_tried_again(settings: Settings) -> None:
    notice, blocked = Notice(settings.paths, "default"), settings.paths.notice_for_hooks
    (blocked / "x").mkdir(parents=True)
    notice.tell("hello")
    (blocked / "x").rmdir()
    blocked.rmdir()
    notice.tell("hello")
    assert settings.paths.notice.read_text() == "selfhost: hello\n"


def test_a_keeper_holds_out_for_an_hour_longer_than_the_box_can_live() -> None:
    rental = make_rental(sent_at=START, caps=Caps(max_s=7200))
    assert not outlived(rental, START + 7200 + 3599)
    assert outlived(rental, START + 7200 + 3601)


def test_a_rental_that_was_never_sent_counts_from_its_intent() -> None:
    rental = make_rental(created_at=START, sent_at=None, caps=Caps(max_s=60))
    assert not outlived(rental, START + 3600)
    assert outlived(rental, START + 3661)
