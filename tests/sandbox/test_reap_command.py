"""`selfhost reap` and `down --json` as programs read them: the command line, the real SDK and the sandbox's market."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import config
from selfhost_cli.ledger import Ledger
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import BoxSpec, Need, State
from selfhost_cli.providers.vast import VastProvider
from tests.fakes.rental import make_rental
from tests.sandbox.market_process import MarketProcess, SharedClock

OTHER = "selfhost-0000000000-1"


@dataclass
class Person:
    """Somebody with one profile and an account at the market."""

    home: Path
    market: MarketProcess

    def __post_init__(self) -> None:
        self.paths.make()
        self.prefix = f"selfhost-{config.installation_id(self.paths)}-"
        self._provider = VastProvider(self.market.facts["api_key"], self.market.url, clock=SharedClock(self.market))

    @property
    def paths(self) -> config.Paths:
        return config.paths("default", {"SELFHOST_HOME": str(self.home)})

    def rent(self, label: str) -> int:
        """A box at the market alone."""
        offer = self._provider.offers(Need(disk_gb=30.0, hours=0.1))[0]
        return self._provider.create(offer, BoxSpec(label, "some/image:1", 30.0, "true"))

    def record(self, number: int, label: str) -> None:
        market = f"{self.market.url} account {self._provider.account().id}"
        ledger = Ledger(self.paths.ledger)
        ledger.intend(make_rental(label, market=market))
        ledger.advance(ledger.live()[0], State.READY, instance_id=number, sent_at=1.0, running_at=1.0)
        ledger.close()

    @contextmanager
    def keeper(self) -> Iterator[None]:
        with ProcessLock(self.paths.keeper_lock) as lock:
            assert lock.acquire()
            yield

    def ask(self, *words: str) -> tuple[int, dict[str, Any], str]:
        """Exit code, the JSON on stdout and what stderr says."""
        settings = {"POLL": "0.05", "LISTING_LAG": "0.2", "PACE": "0", "MARKET_URL": self.market.url}
        settings |= {"API_KEY": self.market.facts["api_key"], "HOME": str(self.home)}
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home)}
        env |= {f"SELFHOST_{name}": value for name, value in settings.items()}
        command = [sys.executable, "-m", "selfhost_cli", *words, "--json"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout), done.stderr

    @property
    def billed(self) -> set[int]:
        return {row["id"] for row in self.market.billed()["instances"]}


@pytest.fixture
def person(clean: MarketProcess, tmp_path: Path) -> Person:
    clean.set("/settings", real_boxes=False)
    return Person(tmp_path / "selfhost", clean)


def ids(rows: list[dict[str, Any]]) -> set[int]:
    return {row["instance_id"] for row in rows}


def test_strays_on_all_pages_are_listed_and_then_ended_and_nothing_else_is(person: Person) -> None:
    person.market.set("/faults", fault="short_pages", call="list", rows=1)
    dead, unknown = person.rent(f"{person.prefix}1"), person.rent(f"{person.prefix}2")
    foreign, byhand = person.rent(OTHER), person.rent("by hand")
    person.record(dead, f"{person.prefix}1")
    code, told, err = person.ask("reap")
    assert (code, told["ended"], ids(told["left"])) == (5, [], {dead, unknown, foreign}), err
    row = next(row for row in told["left"] if row["instance_id"] == dead)
    assert row["why"] == "no keeper of profile default is running"
    assert row["age_s"] is not None
    assert row["dph_total"] > 0
    assert person.billed == {dead, unknown, foreign, byhand}
    code, told, err = person.ask("reap", "--yes")
    assert (code, ids(told["ended"]), ids(told["left"])) == (0, {dead, unknown}, {foreign}), err
    assert [bill["instance_id"] for bill in told["invoices"]] == [dead]
    assert person.billed == {foreign, byhand}
    code, told, err = person.ask("reap", "--yes", "--all")
    assert (code, ids(told["ended"]), told["left"], person.billed) == (0, {foreign}, [], {byhand}), err


def test_a_living_keepers_box_is_held(person: Person) -> None:
    label = f"{person.prefix}1"
    number = person.rent(label)
    person.record(number, label)
    with person.keeper():
        code, told, err = person.ask("reap", "--yes", "--all")
    assert (code, told["ended"], told["left"], told["held"]) == (0, [], [], [label]), err
    assert person.billed == {number}


@pytest.mark.parametrize("shape", ["null", "hollow", "bad_row"])
def test_a_list_that_makes_no_sense_is_unknown_to_programs_too(person: Person, shape: str) -> None:
    number = person.rent(f"{person.prefix}1")
    person.market.set("/faults", fault="odd_answer", call="list", shape=shape)
    code, told, err = person.ask("reap", "--yes")
    assert (code, told["error"]["exit_code"], told["left"], person.billed) == (5, 5, [], {number})
    assert "unknown" in told["error"]["message"]
    assert told["error"]["remedy"] == "Run `selfhost reap` again."
    assert told["error"]["message"] in err


def test_null_fields_hide_no_box(person: Person) -> None:
    number = person.rent(f"{person.prefix}1")
    person.market.set("/faults", fault="null_fields", fields="all")
    code, told, err = person.ask("reap", "--yes")
    assert (code, ids(told["ended"]), person.billed) == (0, {number}, set()), err
    assert told["ended"][0]["age_s"] is None


@pytest.mark.parametrize("words", [["down"], ["down", "--all"], ["reap", "--yes"]])
def test_what_cannot_be_asked_for_is_an_error_object_with_what_is_left(person: Person, words: list[str]) -> None:
    label = f"{person.prefix}1"
    number = person.rent(label)
    person.record(number, label)
    person.market.set("/faults", fault="key_refused", whose="account", status="401")
    code, told, _ = person.ask(*words)
    assert (code, told["error"]["exit_code"]) == (5, 5)
    assert f"box {number}" in told["error"]["message"]
    assert "selfhost down" in told["error"]["remedy"]
    assert [(row["instance_id"], row["label"]) for row in told["left"]] == [(number, label)]


def test_down_tells_programs_what_ended_and_what_is_left(person: Person) -> None:
    label = f"{person.prefix}1"
    number, foreign = person.rent(label), person.rent(OTHER)
    person.record(number, label)
    code, told, err = person.ask("down")
    assert (code, ids(told["ended"]), ids(told["left"])) == (0, {number}, {foreign}), err
    assert [bill["label"] for bill in told["invoices"]] == [label]
    code, told, err = person.ask("down", "--all")
    assert (code, ids(told["ended"]), told["left"], person.billed) == (0, {foreign}, [], set()), err
