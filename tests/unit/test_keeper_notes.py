"""What the keeper notes in the ledger: what the boxes' watchdogs counted, how its links are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from selfhost_cli import config
from selfhost_cli.keeper import wiring
from selfhost_cli.keeper.daemon import _Keeper
from selfhost_cli.keeper.links import LinkState
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Heard, Rental, State
from selfhost_cli.proxy.front import Away
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


@dataclass
class Wire:
    """Of a link what the keeper tells of."""

    state: LinkState = LinkState.CONNECTING
    reason: str = ""
    port: int | None = None

    def stop(self, state: LinkState) -> None:
        self.state = state


def told(ledger: Ledger) -> list[str]:
    return [text for rental in ledger.all() for _, kind, text in ledger.events(rental.label) if kind == "link"]


def test_each_state_of_a_link_is_in_the_ledger_once_with_its_reasons(keeper: _Keeper, ledger: Ledger) -> None:
    (rental,), wire = ledger.all(), Wire()
    keeper._links = {rental.label: wire}  # type: ignore[dict-item]
    for state, reason in (
        (LinkState.CONNECTING, "refused"),
        (LinkState.CONNECTING, "another host key"),
        (LinkState.CONNECTING, "refused"),
        (LinkState.UP, ""),
        (LinkState.RECONNECTING, "no answer for 8 s"),
    ):
        wire.state, wire.reason = state, reason
        keeper._note_links()
        keeper._note_links()
    ledger.end(rental.label, "down")
    keeper._read()
    keeper._relink()
    assert told(ledger) == [
        "connecting refused",
        "connecting another host key",
        "up",
        "reconnecting no answer for 8 s",
        "stopped",
    ]
    assert wire.state is LinkState.STOPPED


def test_a_box_that_makes_up_reasons_does_not_fill_the_ledger(keeper: _Keeper, ledger: Ledger) -> None:
    (rental,), wire = ledger.all(), Wire(LinkState.DEGRADED)
    keeper._links = {rental.label: wire}  # type: ignore[dict-item]
    for number in range(100):
        wire.reason = f"the box cannot renew its lease: {number}"
        keeper._note_links()
    assert 1 < len(told(ledger)) < 20


def test_who_asks_while_a_box_is_got_ready_is_told_to_come_back_in_a_minute(keeper: _Keeper, ledger: Ledger) -> None:
    (ready,) = ledger.all()
    for state, seconds in ((State.READY, 5), (State.INSTALLING, 60), (State.CREATING, 60)):
        keeper._rentals = [replace(ready, state=state)]
        keeper._links = {ready.label: Wire(LinkState.RECONNECTING, "lost")}  # type: ignore[dict-item]
        away = keeper._box()
        assert isinstance(away, Away)
        assert (away.state, away.retry_after) == ("reconnecting", seconds)


def test_a_cache_that_cannot_be_set_up_is_told_and_keeps_nobody_from_the_box(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))
    monkeypatch.setenv("SELFHOST_CACHE_STORE", "redis")
    monkeypatch.setenv("SELFHOST_REDIS_URL", "http://:hunter2@somewhere")
    settings = config.load("default")
    settings.paths.make()
    assert wiring.cache(settings, str) is None
    assert "no answers are cached: the URL of Redis is wrong" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_key_of_the_cache_that_cannot_be_read_keeps_nobody_from_the_box_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))
    settings = config.load("default")
    settings.paths.make()
    settings.paths.cache_key.mkdir()
    assert wiring.cache(settings, str) is None
    assert "no answers are cached" in caplog.text
