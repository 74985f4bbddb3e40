"""The bootstrap host key gives way to the box's own, and every step of that may be the last one of its process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import config, lifecycle, payload
from selfhost_cli.attach import Front
from selfhost_cli.errors import BoxFailed, Superseded
from selfhost_cli.keeper.daemon import _Keeper
from selfhost_cli.keeper.links import LinkState
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle import World
from selfhost_cli.lifecycle.renting import create, make_plan
from selfhost_cli.lifecycle.steps import advance
from selfhost_cli.model import BoxState, Endpoint, Event, Rental, State
from selfhost_cli.remote import ConnectionLost, Result
from selfhost_cli.remote.ssh import make_key, public_half
from tests.fakes.box import FakeBox, FakeKeeper, bare, serving
from tests.fakes.clock import FakeClock
from tests.fakes.market import FakeMarket
from tests.fakes.rental import make_rental

MODEL, CONTEXT = "qwen2.5-coder-0.5b", 32_768
STRANGER = f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{'S' * 43}"
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
        self.told: list[Event] = []

    def process(self, step: Callable[[str], None] = lambda verb: None) -> World:
        ledger = SteppedLedger(self.settings.paths.ledger)
        ledger.step = step  # type: ignore[method-assign]
        self.box.before = step
        self.opened.append(ledger)
        return World(
            settings=self.settings, provider=self.market, ledger=ledger, report=self.told.append, clock=self.clock,
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

    @property
    def endpoint(self) -> Endpoint:
        ((endpoint,),) = (box.endpoints for box in self.market.boxes.values())
        return endpoint

    def install(self) -> Rental:
        """A box that let us in and got its own key; the process ended before it was ready."""
        self.rent()
        self.box.lines = ("",)
        with pytest.raises(Killed):
            advance(self.process(killed_at("line")), self.rental)
        self.told.clear()
        self.clock.sleeps.clear()
        self.box.connections.clear()
        return self.rental

    def of_an_older_version(self) -> Rental:
        """A ready box that still shows the key of its onstart."""
        bootstrap = self.rent().host_key
        ready = advance(self.process(), self.rental)
        self.box.shown, self.box.follows = {self.endpoint: bare(bootstrap)}, {}
        self.box.connections.clear()
        return self.process().ledger.note(ready, host_key=bootstrap, bootstrap=True)


def killed_at(verb: str) -> Callable[[str], None]:
    def before(taken: str) -> None:
        if taken == verb:
            raise Killed(verb)

    return before


def up(world: World) -> Rental:
    return lifecycle.up(world, lambda plan: pytest.fail("it would rent another one"), needs_claude=False)


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


# --- another key, before the box is ready ---


def test_another_key_before_the_first_contact_is_waited_out(stage: Stage) -> None:
    """The image's own sshd, before onstart."""
    bootstrap = bare(stage.rent().host_key)
    stage.box.shown[stage.endpoint] = STRANGER
    tries = 0

    def before(verb: str) -> None:
        nonlocal tries
        tries += verb == "connect"
        if verb == "connect" and tries == 4:
            stage.box.shown[stage.endpoint] = bootstrap

    assert advance(stage.process(before), stage.rental).host_keys == (stage.shown,)
    assert len(stage.clock.sleeps) == 3
    assert len(stage.box.keys) > 4


def test_a_key_that_changes_while_it_is_installed_is_refused_at_once_and_costs_the_box(stage: Stage) -> None:
    number = stage.install().instance_id
    stage.box.shown[stage.endpoint] = STRANGER
    waited: list[float] = []
    stage.market.before = lambda verb: waited.append(sum(stage.clock.sleeps)) if verb == "destroy" else None
    with pytest.raises(BoxFailed, match=rf"host key of box {number} has changed: .*shows another host key") as refused:
        up(stage.process())
    assert refused.value.remedy == "Run `selfhost up` again."
    assert (stage.rental.state, stage.market.boxes, stage.box.connections) == (State.ENDED, {}, [])
    assert stage.rental.reason == refused.value.message
    assert waited[0] == 0


def test_a_key_that_changed_with_the_last_steps_of_its_replacement_is_refused_as_that(stage: Stage) -> None:
    stage.rent()

    def switched(endpoint: Endpoint, verb: str, key: str) -> Result:
        result = replace_key(endpoint, verb, key)
        if verb == "switch":
            stage.box.shown[endpoint] = STRANGER
        return result

    replace_key, stage.box.replace_key = stage.box.replace_key, switched  # type: ignore[method-assign]
    with pytest.raises(BoxFailed, match="has changed"):
        advance(stage.process(), stage.rental)
    assert sum(stage.clock.sleeps) < 1


def test_another_machine_that_got_the_old_address_costs_nobody_the_box(stage: Stage) -> None:
    rental = stage.install()
    old, new = stage.endpoint, Endpoint("192.0.2.9", 49_999)
    number, listed = next(iter(stage.market.boxes.items()))
    stage.market.boxes[number] = replace(listed, direct=new)
    stage.box.shown = {old: STRANGER, new: rental.host_key}
    ready = advance(stage.process(), rental)
    assert (ready.state, ready.endpoint, set(stage.box.connections)) == (State.READY, new, {new})


def test_one_way_that_leads_to_the_box_is_enough(stage: Stage) -> None:
    rental = stage.install()
    relay = Endpoint("192.0.2.9", 49_999)
    number, listed = next(iter(stage.market.boxes.items()))
    stage.market.boxes[number] = replace(listed, proxy=relay)
    stage.box.shown = {rental.endpoint or relay: STRANGER, relay: rental.host_key}
    assert advance(stage.process(), rental).endpoint == relay


def test_a_market_that_says_nothing_is_no_proof_that_a_key_has_changed(stage: Stage) -> None:
    rental = stage.install()
    stage.box.shown[stage.endpoint] = STRANGER
    stage.market.unreachable = 2
    with pytest.raises(BoxFailed, match="has changed"):
        advance(stage.process(), rental)
    assert len(stage.clock.sleeps) == 2


def test_what_answers_while_the_box_does_not_run_is_not_taken_for_it(stage: Stage) -> None:
    rental = stage.install()
    number, listed = next(iter(stage.market.boxes.items()))
    stage.market.boxes[number] = replace(listed, state=BoxState.PENDING)
    own, stage.box.shown[stage.endpoint] = stage.shown, STRANGER
    asked = 0

    def before(verb: str) -> None:
        nonlocal asked
        asked += verb == "get"
        if asked == 3:
            stage.market.boxes[number], stage.box.shown[stage.endpoint] = listed, own

    stage.market.before = before
    assert advance(stage.process(), rental).host_keys == (own,)


class Disconnected(FakeKeeper):
    """Its tunnel is never up; `look` is called each time that it is asked."""

    look: Callable[[], None] = lambda self: None
    reason = "it shows another host key"

    def tunnel(self, label: str) -> tuple[str, str]:
        self.look()
        return "reconnecting", self.reason


def test_a_key_that_changed_when_only_the_tunnel_was_missing_is_refused_at_once(stage: Stage) -> None:
    """The session over which it was installed may have outlived the change."""
    stage.rent()
    world = stage.process()
    keeper = Disconnected(world.ledger, stage.front)
    keeper.look = lambda: stage.box.shown.update({stage.endpoint: STRANGER})  # type: ignore[method-assign]
    with pytest.raises(BoxFailed, match="has changed"):
        advance(replace(world, keeper=keeper), stage.rental)
    assert sum(stage.clock.sleeps) < 1


def test_a_tunnel_that_is_away_for_another_reason_is_waited_for(stage: Stage) -> None:
    stage.rent()
    world = stage.process()
    keeper = Disconnected(world.ledger, stage.front)
    before = len(stage.box.connections)
    with pytest.raises(BoxFailed, match="the tunnel"):
        advance(replace(world, keeper=keeper), stage.rental)
    assert sum(stage.clock.sleeps) > 50
    assert len(stage.box.connections) - before < 6, "it was logged in to again and again"


# --- boxes that an older version got ready ---


def test_a_ready_box_of_an_older_version_gets_its_own_key_at_the_next_up(stage: Stage) -> None:
    bootstrap = bare(stage.of_an_older_version().host_key)
    rental = up(stage.process())
    assert (rental.state, rental.host_keys, rental.bootstrap) == (State.READY, (stage.shown,), False)
    assert stage.shown != bootstrap
    assert rental == stage.rental
    tries = len(stage.box.keys)
    assert up(stage.process()) == rental
    assert len(stage.box.keys) == tries, "it was done again"


def test_killed_before_any_step_of_that_the_box_is_known_and_the_next_up_ends_with_one_key(
    tmp_path: Path, front: Front
) -> None:
    seen = set()
    for number in range(STEPS):
        stage, steps = Stage(tmp_path / str(number), front), Steps(number)
        label = stage.of_an_older_version().label
        try:
            up(stage.process(steps))
            break
        except Killed as death:
            seen.add(str(death))
        rental = stage.rental
        assert (rental.label, rental.state) == (label, State.READY)
        assert stage.shown in map(bare, rental.host_keys), f"lost at step {number}, after {steps.taken}"
        resumed = up(stage.process())
        assert (resumed.label, resumed.host_keys, resumed.bootstrap) == (label, (stage.shown,), False)
        assert stage.market.creates == 1
        for ledger in stage.opened:
            ledger.close()
    else:
        pytest.fail(f"more than {STEPS} steps")
    assert {"put", "make", "switch", "connect", "before the ledger", "after the ledger"} <= seen


@pytest.mark.parametrize("trouble", ["refused", "cannot make one", "does not show it", "breaks off"])
def test_what_keeps_such_a_box_from_its_own_key_is_told_and_costs_nobody_the_box(stage: Stage, trouble: str) -> None:
    bootstrap = bare(stage.of_an_older_version().host_key)
    match trouble:
        case "refused":
            stage.box.refusals = 1
        case "cannot make one":
            stage.box.makes_keys = False
        case "does not show it":
            stage.box.deaf = 1000
        case "breaks off":
            breaks_off(stage.box, "switch")
    rental = up(stage.process())
    assert (rental.state, rental.bootstrap, bare(rental.host_key)) == (State.READY, True, bootstrap)
    assert stage.shown in map(bare, rental.host_keys)
    (said,) = [event.text for event in stage.told if (event.stage, event.status) == ("identity", "note")]
    assert "one that the market knows" in said
    stage.box.makes_keys, stage.box.deaf = True, 0
    assert up(stage.process()).host_keys == (stage.shown,)


def test_a_changed_key_of_a_ready_box_is_refused_at_once_and_up_does_not_end_it(stage: Stage) -> None:
    stage.of_an_older_version()
    stage.box.shown[stage.endpoint] = STRANGER
    stage.clock.sleeps.clear()
    world = stage.process()
    with pytest.raises(BoxFailed, match="has changed") as refused:
        up(replace(world, keeper=Disconnected(world.ledger, stage.front)))
    assert refused.value.remedy == "End it with `selfhost down`."
    assert (stage.rental.state, stage.box.connections, len(stage.market.boxes)) == (State.READY, [], 1)
    assert sum(stage.clock.sleeps) < 1
