"""The bootstrap host key gives way to the box's own, and every step of that may be the last one of its process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import config, payload
from selfhost_cli.attach import Front
from selfhost_cli.errors import BoxFailed, Superseded
from selfhost_cli.keeper.daemon import _Keeper
from selfhost_cli.keeper.links import LinkState
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle import World
from selfhost_cli.lifecycle.renting import create, make_plan
from selfhost_cli.lifecycle.steps import advance
from selfhost_cli.model import Endpoint, Rental, State
from selfhost_cli.remote import ConnectionLost, Result
from selfhost_cli.remote.ssh import make_key, public_half
from tests.fakes.box import FakeBox, FakeKeeper, bare, serving
from tests.fakes.clock import FakeClock
from tests.fakes.market import FakeMarket
from tests.fakes.rental import make_rental

MODEL, CONTEXT = "qwen2.5-coder-0.5b", 32_768
STEPS = 40
"""More than there are; the test says which of them were reached."""


class Killed(BaseException):
    """What no clean-up of ours catches: the process is gone."""


class Steps:
    """Counts what changes something outside; the step number `at` does not come, nor does anything after it."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.taken: list[str] = []

    def __call__(self, verb: str) -> None:
        if len(self.taken) == self.at:
            raise Killed(verb)
        self.taken.append(verb)


class SteppedLedger(Ledger):
    step: Callable[[str], None] = lambda self, verb: None

    def note(self, rental: Rental, **changes: Any) -> Rental:
        self.step("before the ledger")
        noted = super().note(rental, **changes)
        self.step("after the ledger")
        return noted


class Stage:
    """One profile on one market; `process` is the next process of it."""

    def __init__(self, home: Path, front: Front) -> None:
        flags = {
            "market_url": "http://127.0.0.1:9", "api_key": "account-key-0123456789", "engine": "llamacpp",
            "model": MODEL, "context": CONTEXT, "disk": 30.0, "attempts": 1,
            "model_url": "http://127.0.0.1:9/model.gguf", "model_bytes": 491_400_064,
        }  # fmt: skip
        self.settings = config.load("default", flags=flags, env={"SELFHOST_HOME": str(home)})
        self.settings.paths.make()
        self.clock, self.box, self.front = FakeClock(), FakeBox(), front
        self.market = FakeMarket(self.clock)
        self.opened: list[Ledger] = []

    def process(self, step: Callable[[str], None] = lambda verb: None) -> World:
        ledger = SteppedLedger(self.settings.paths.ledger)
        ledger.step = step  # type: ignore[method-assign]
        self.box.before = step
        self.opened.append(ledger)
        return World(
            settings=self.settings, provider=self.market, ledger=ledger, report=lambda event: None, clock=self.clock,
            keeper=FakeKeeper(ledger, self.front), connect=self.box.connect, make_key=make_key,
            public_half=public_half, find_claude=lambda: Path("/bin/claude"), find_model=lambda: None,
        )  # fmt: skip

    def rent(self) -> Rental:
        world = self.process()
        plan = make_plan(world)
        return create(world, plan, plan.best)

    @property
    def rental(self) -> Rental:
        with closing(Ledger(self.settings.paths.ledger)) as ledger:
            return ledger.all()[-1]

    @property
    def shown(self) -> str:
        (key,) = self.box.shown.values()
        return key


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving(MODEL, CONTEXT) as front:
        yield front


@pytest.fixture
def stage(tmp_path: Path, front: Front) -> Iterator[Stage]:
    made = Stage(tmp_path, front)
    yield made
    for ledger in made.opened:
        ledger.close()


def test_a_ready_box_has_a_host_key_that_never_travelled(stage: Stage) -> None:
    bootstrap = stage.rent().host_key
    rental = advance(stage.process(), stage.rental)
    assert rental.state is State.READY
    assert (rental.host_keys, rental.bootstrap) == ((stage.shown,), False)
    assert stage.shown not in stage.market.specs[rental.label].onstart
    assert stage.box.keys[0] == (bootstrap,)
    first_sight = stage.box.keys.index((stage.shown,))
    assert all(keys == (stage.shown,) for keys in stage.box.keys[first_sight:])


def test_killed_before_any_step_the_ledger_knows_the_box_and_the_next_up_ends_with_one_key(
    tmp_path: Path, front: Front
) -> None:
    seen = set()
    for number in range(STEPS):
        stage, steps = Stage(tmp_path / str(number), front), Steps(number)
        stage.rent()
        try:
            advance(stage.process(steps), stage.rental)
            break
        except Killed as death:
            seen.add(str(death))
        rental = stage.rental
        if stage.box.shown:
            assert stage.shown in map(bare, rental.host_keys), f"lost at step {number}, after {steps.taken}"
        resumed = advance(stage.process(), rental)
        assert (resumed.state, resumed.host_keys, resumed.bootstrap) == (State.READY, (stage.shown,), False)
        assert stage.shown != bare(rental.host_key) or not rental.bootstrap
        for ledger in stage.opened:
            ledger.close()
    else:
        pytest.fail(f"more than {STEPS} steps")
    assert {"put", "make", "switch", "connect", "before the ledger", "after the ledger"} <= seen


def breaks_off(box: FakeBox, verb: str) -> None:
    """Do it, once, and lose the answer."""
    replace_key, left = box.replace_key, 1

    def lost(endpoint: Endpoint, asked: str, key: str) -> Result:
        nonlocal left
        result = replace_key(endpoint, asked, key)
        if asked == verb and left:
            left -= 1
            raise ConnectionLost("the connection to the box broke")
        return result

    box.replace_key = lost  # type: ignore[method-assign]


@pytest.mark.parametrize("verb", ["make", "switch"])
def test_a_connection_that_breaks_meanwhile_does_not_cost_the_box(stage: Stage, verb: str) -> None:
    stage.rent()
    breaks_off(stage.box, verb)
    rental = advance(stage.process(), stage.rental)
    assert (rental.state, rental.host_keys) == (State.READY, (stage.shown,))


def test_an_sshd_that_was_busy_is_told_again(stage: Stage) -> None:
    stage.rent()
    stage.box.deaf = 2
    assert advance(stage.process(), stage.rental).host_keys == (stage.shown,)


def test_a_box_that_goes_on_with_the_key_from_the_market_is_given_up(stage: Stage) -> None:
    stage.rent()
    stage.box.deaf = 1000
    with pytest.raises(BoxFailed, match=r"does not show its own host key.*shows another host key"):
        advance(stage.process(), stage.rental)
    assert stage.rental.bootstrap


def test_a_box_that_cannot_make_a_key_is_given_up(stage: Stage) -> None:
    stage.rent()
    stage.box.makes_keys = False
    with pytest.raises(BoxFailed, match="no host key can be made"):
        advance(stage.process(), stage.rental)


@pytest.mark.parametrize(
    "answer",
    ["", "ssh-rsa AAAA", "ssh-ed25519 AAAA'; reboot #", f"ssh-ed25519 {'A' * 68}", "the old one", "two\nlines"],
)
def test_what_is_no_new_host_key_never_gets_into_the_ledger(stage: Stage, answer: str) -> None:
    old = bare(stage.rent().host_key)
    stage.box.replace_key = lambda endpoint, verb, key: Result(  # type: ignore[method-assign]
        0, old if answer == "the old one" else answer, ""
    )
    with pytest.raises(BoxFailed, match="does not make a host key of its own"):
        advance(stage.process(), stage.rental)
    assert bare(stage.rental.host_key) == old
    assert stage.rental.next_host_key == ""


def test_the_bootstrap_key_is_refused_once_the_box_has_shown_its_own(stage: Stage) -> None:
    bootstrap = bare(stage.rent().host_key)
    (endpoint,) = next(iter(stage.market.boxes.values())).endpoints
    stage.box.losses = 1  # of the connection, while install.sh runs
    said: list[int] = []

    def before(verb: str) -> None:
        if verb == "line":
            stage.box.shown[endpoint] = bootstrap  # somebody who knows it from the market
            said.append(len(stage.box.connections))

    world = stage.process()
    stage.box.lines, stage.box.before = ("",), before
    with pytest.raises(BoxFailed, match="shows another host key"):
        advance(world, stage.rental)
    assert len(stage.box.connections) == said[0], "it was logged in to"


def test_down_in_the_middle_stops_it(stage: Stage) -> None:
    label = stage.rent().label

    def before(verb: str) -> None:
        if verb == "make":
            world.ledger.end(label, "down")

    world = stage.process()
    stage.box.before = before
    with pytest.raises(Superseded):
        advance(world, stage.rental)
    assert stage.rental.next_host_key == ""


def test_a_record_of_an_older_version_has_the_key_it_was_rented_with(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "ledger.sqlite3")) as ledger:
        ledger.intend(make_rental())
        ledger._db.execute("UPDATE rentals SET record = json_remove(record, '$.bootstrap', '$.next_host_key')")
        (read,) = ledger.all()
        assert (read.host_keys, read.bootstrap) == (("ssh-ed25519 AAAA",), True)
        new = ledger.note(read, next_host_key="ssh-ed25519 BBBB")
        assert ledger.all() == [new] == [replace(read, next_host_key="ssh-ed25519 BBBB")]
        assert new.host_keys == ("ssh-ed25519 AAAA", "ssh-ed25519 BBBB")


def test_the_keeper_drops_a_connection_that_goes_by_an_old_host_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))
    settings = config.load("default")
    settings.paths.make()
    with closing(Ledger(settings.paths.ledger)) as ledger:
        rental = make_rental(state=State.READY, endpoint=Endpoint("127.0.0.1", 9))
        ledger.intend(rental)
        keeper, links = _Keeper(settings), []
        try:
            for changes in ({}, {"guarded": False}, {"next_host_key": "ssh-ed25519 BBBB"}):
                ledger.note(rental, **changes)
                keeper._read()
                keeper._relink()
                links.append(keeper._links[rental.label])
            assert links[0] is links[1] is not links[2]
            assert links[2].rental.host_keys == ("ssh-ed25519 AAAA", "ssh-ed25519 BBBB")
            links[0].join(20)
            assert links[0].state is LinkState.STOPPED
        finally:
            links[-1].stop()
            links[-1].join(20)
            keeper._ledger.close()


def test_the_script_travels_with_the_rest(stage: Stage) -> None:
    stage.rent()
    advance(stage.process(), stage.rental)
    assert stage.box.uploads[0] == payload.script("hostkey.sh")
