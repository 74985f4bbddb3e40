"""Ends that the keeper brings about: whom they are blamed on, and that none waits behind stale ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from selfhost_cli import config, lifecycle
from selfhost_cli.keeper.daemon import _Keeper
from selfhost_cli.keeper.deadlines import Deadlines
from selfhost_cli.ledger import Ledger
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import BoxState, Instance, Rental, State
from tests.fakes.clock import FakeClock
from tests.fakes.market import FakeMarket
from tests.fakes.rental import make_rental
from tests.waiting import until


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[lifecycle.Books]:
    """One rental that is installing, and its box."""
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))
    settings = config.load("default", env=os.environ)
    settings.paths.make()
    clock = FakeClock()
    market = FakeMarket(clock)
    with closing(Ledger(settings.paths.ledger)) as ledger:
        books = lifecycle.Books(
            settings=settings, provider=market, ledger=ledger, report=lambda event: None, clock=clock
        )
        label = f"{books.prefix}1"
        ledger.intend(make_rental(label, state=State.INSTALLING, instance_id=7, sent_at=clock.time() - 600))
        market.boxes[7] = Instance(7, label, BoxState.RUNNING, "running", "", 1, "RTX 4090", 0.5, None, None, None)
        yield books


def ended_by_its_keeper(books: lifecycle.Books, seconds: int) -> Rental:
    deadlines, (rental,) = Deadlines(books.settings, books.clock), books.ledger.live()
    for _ in range(seconds):
        if work := deadlines.due(rental):
            work(books, rental)
            break
        books.clock.sleep(1)
    return books.ledger.all()[0]


def test_a_machine_is_not_blamed_for_an_up_that_was_killed(books: lifecycle.Books) -> None:
    rental = ended_by_its_keeper(books, 150)
    assert (rental.state, rental.reason, rental.blameless) == (State.ENDED, "its `selfhost up` is gone", True)


def test_a_machine_is_blamed_for_a_box_that_never_got_ready(books: lifecycle.Books) -> None:
    with ProcessLock(books.settings.paths.up_lock) as up:
        assert up.acquire()
        rental = ended_by_its_keeper(books, 2 * 3600)
    assert (rental.state, rental.reason, rental.blameless) == (State.ENDED, "it did not get ready in time", False)


def test_what_is_due_does_not_wait_behind_questions_that_are_stale(
    books: lifecycle.Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link is down for an hour, and each look at the market takes minutes."""
    keeper, answered, done = _Keeper(config.load("default")), threading.Event(), []
    keeper._rentals = [replace(rental, state=State.READY) for rental in books.ledger.live()]

    def due(*_: object) -> Callable[..., None]:
        return slow

    def slow(*_: object) -> None:
        answered.wait(20)
        done.append("stale")

    def work(task: Callable[..., None], rental: Rental) -> None:
        task(books, rental)

    monkeypatch.setattr(keeper._deadlines, "due", due)
    monkeypatch.setattr(keeper, "_work", work)
    for _ in range(180):
        keeper._end_what_nobody_uses()
    answered.set()
    until(lambda: done == ["stale"])
    keeper._worker.shutdown(wait=True)
    assert done == ["stale"]
