"""What the keeper notes in the ledger of what the boxes' watchdogs counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from selfhost_cli import config
from selfhost_cli.keeper.daemon import _Keeper
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Heard, Rental, State
from tests.fakes.rental import make_rental
from tests.waiting import until

FIRST = Heard(1000.0, 900.0, 0.0, 0.1, down_bytes=1_000_000, up_bytes=1000)
LATER = Heard(1005.0, 905.0, 0.0, 0.1, down_bytes=2_000_000, up_bytes=1000)


@dataclass
class Line:
    """Of a link what the keeper reads."""

    last: Heard | None = None
    down_since: float | None = None


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))
    paths = config.paths("default", os.environ)
    paths.make()
    ledger = Ledger(paths.ledger)
    ledger.intend(make_rental(state=State.READY))
    yield ledger
    ledger.close()


@pytest.fixture
def keeper(ledger: Ledger) -> _Keeper:
    return _Keeper(config.load("default"))


def noted(keeper: _Keeper, ledger: Ledger, line: Line) -> Rental:
    (rental,) = ledger.all()
    keeper._links = {rental.label: line}  # type: ignore[dict-item]
    keeper._read()
    keeper._note_traffic()
    return ledger.all()[0]


def test_the_bytes_survive_the_keeper(keeper: _Keeper, ledger: Ledger) -> None:
    assert noted(keeper, ledger, Line()).heard is None
    assert noted(keeper, ledger, Line(FIRST)).heard == FIRST


def test_not_every_renewal_is_written(keeper: _Keeper, ledger: Ledger) -> None:
    noted(keeper, ledger, Line(FIRST))
    assert noted(keeper, ledger, Line(LATER)).heard == FIRST


def test_the_last_word_of_a_box_that_is_lost_or_taken_down_is_written(keeper: _Keeper, ledger: Ledger) -> None:
    noted(keeper, ledger, Line(FIRST))
    assert noted(keeper, ledger, Line(LATER, down_since=1.0)).heard == LATER
    last = Heard(1006.0, 906.0, 0.0, 0.1, down_bytes=3_000_000, up_bytes=1000)
    ledger.end(ledger.all()[0].label, "down")
    assert noted(keeper, ledger, Line(last)).heard == last


def test_a_ledger_that_cannot_be_written_does_not_keep_it_from_its_work(keeper: _Keeper, ledger: Ledger) -> None:
    keeper._ledger._db.execute("PRAGMA query_only = 1")
    assert noted(keeper, ledger, Line(FIRST)).heard is None


def test_no_link_renews_the_lease_of_a_box_that_nobody_will_use(
    keeper: _Keeper, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFHOST_ORPHAN", "0")
    late, (ready,) = _Keeper(config.load("default")), ledger.all()
    installing = replace(ready, state=State.INSTALLING)
    until(lambda: not late._is_worth_a_link(installing))
    assert late._is_worth_a_link(ready)
    assert keeper._is_worth_a_link(installing)
