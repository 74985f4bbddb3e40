from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from selfhost_cli import config, lifecycle
from selfhost_cli.archive import Archive
from selfhost_cli.attach import Front
from selfhost_cli.config import Source
from selfhost_cli.errors import (
    BoxFailed,
    KeyRefused,
    MarketUnreachable,
    MayBeBilling,
    NoCredit,
    NothingToRent,
    NotServable,
    NotSetUp,
    SelfhostError,
    Superseded,
    TooOften,
    UsageError,
)
from selfhost_cli.ledger import Ledger, LedgerBroken
from selfhost_cli.lifecycle import Plan, World, ending
from selfhost_cli.lifecycle.renting import login_key, make_plan
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import BoxSpec, BoxState, Endpoint, Event, Heard, Instance, State
from selfhost_cli.remote import NotYet
from selfhost_cli.remote.ssh import make_key, public_half
from tests.fakes.box import FakeBox, FakeKeeper, serving
from tests.fakes.clock import FakeClock
from tests.fakes.market import FakeMarket, make_offer
from tests.fakes.rental import make_rental

MODEL, CONTEXT = "qwen2.5-coder-0.5b", 32_768


@dataclass
class Stage:
    """A world to act in, and the fakes behind it."""

    world: World
    market: FakeMarket
    box: FakeBox
    keeper: FakeKeeper
    clock: FakeClock
    events: list[Event] = field(default_factory=list)

    @property
    def ledger(self) -> Ledger:
        return self.world.ledger

    @property
    def billed(self) -> int:
        return len(self.market.boxes)

    def up(self) -> object:
        return lifecycle.up(self.world, lambda plan: True)

    def down(self) -> lifecycle.Ended:
        return lifecycle.down(self.world)


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving(MODEL, CONTEXT) as front:
        yield front


@pytest.fixture
def stage(tmp_path: Path, front: Front) -> Iterator[Stage]:
    flags = {
        "market_url": "http://127.0.0.1:9",
        "api_key": "account-key-0123456789",
        "engine": "llamacpp",
        "model": MODEL,
        "context": CONTEXT,
        "model_url": "http://127.0.0.1:9/model.gguf",
        "model_bytes": 491_400_064,
        "disk": 30.0,
        "listing_lag": 60.0,
    }
    settings = config.load("default", flags=flags, env={"SELFHOST_HOME": str(tmp_path)})
    settings.paths.make()
    clock = FakeClock()
    market, box, ledger = FakeMarket(clock), FakeBox(), Ledger(settings.paths.ledger)
    keeper = FakeKeeper(ledger, front)
    events: list[Event] = []
    world = World(
        settings=settings, provider=market, ledger=ledger, report=events.append, clock=clock, keeper=keeper,
        connect=box.connect, make_key=make_key, public_half=public_half, find_claude=lambda: Path("/bin/claude"),
        find_model=lambda: 700_000_000,
    )  # fmt: skip
    yield Stage(world, market, box, keeper, clock, events)
    ledger.close()


def test_up_rents_the_cheapest_and_gets_it_ready(stage: Stage) -> None:
    rental = lifecycle.up(stage.world, lambda plan: True)
    assert rental.state is State.READY
    assert rental.machine_id == 1
    assert stage.billed == 1
    assert stage.ledger.live() == [rental]
    told = [text for _, kind, text in stage.ledger.events(rental.label) if kind == "state"]
    assert told == ["creating", "booting", "installing", "ready"]


def test_the_intent_is_written_and_watched_before_the_paid_call(stage: Stage) -> None:
    seen: list[tuple[State, set[str]]] = []

    def before(verb: str) -> None:
        if verb == "create":
            seen.append((stage.ledger.live()[0].state, stage.keeper.watched()))

    stage.market.before = before
    rental = lifecycle.up(stage.world, lambda plan: True)
    assert seen == [(State.CREATING, {rental.label})]
    assert rental.label.startswith(f"selfhost-{config.installation_id(stage.world.settings.paths)}-")
    assert rental.label in stage.market.specs


def test_a_keeper_that_does_not_watch_stops_the_paid_call(stage: Stage) -> None:
    stage.keeper.blind = True
    with pytest.raises(SelfhostError, match="keeper"):
        stage.up()
    assert stage.market.creates == 0
    assert stage.ledger.live() == []
    assert stage.ledger.all()[0].reason == "not sent: the keeper does not watch the new rental"


def test_no_secret_of_ours_is_in_what_the_host_can_see(stage: Stage) -> None:
    rental = lifecycle.up(stage.world, lambda plan: True)
    spec = stage.market.specs[rental.label]
    private = stage.world.settings.paths.login_key.read_text()
    visible = spec.onstart + repr(spec.env)
    for secret in (rental.box_token, stage.world.settings.api_key, private, stage.keeper.front.token):
        assert secret not in visible
    assert len(spec.onstart.encode()) < 4000
    assert all(len(f"{name}={value}".encode()) <= 256 for name, value in spec.env.items())


def test_up_again_reuses_the_ready_box(stage: Stage) -> None:
    first = stage.up()
    assert stage.up() == first
    assert stage.market.creates == 1


def test_saying_no_rents_nothing(stage: Stage) -> None:
    shown: list[Plan] = []

    def confirm(plan: Plan) -> bool:
        shown.append(plan)
        return False

    with pytest.raises(SelfhostError, match="nothing was rented"):
        lifecycle.up(stage.world, confirm)
    assert stage.market.creates == 0
    assert shown[0].best.offer.machine_id == 1
    assert stage.ledger.all() == []


def test_an_offer_that_is_gone_leads_to_the_next(stage: Stage) -> None:
    stage.market.gone = 2
    assert lifecycle.up(stage.world, lambda plan: True).machine_id == 3
    assert stage.billed == 1
    first, second, third = stage.ledger.all()
    assert [rental.state for rental in (first, second, third)] == [State.ENDED, State.ENDED, State.READY]
    assert [text for _, _, text in stage.ledger.events(first.label)] == [
        "creating",
        "ended refused: offer 1001 is gone",
    ]


def test_a_lost_answer_that_took_effect_is_adopted_and_never_paid_twice(stage: Stage) -> None:
    stage.market.lost_with_effect, stage.market.listing_lag = 1, 40.0
    rental = lifecycle.up(stage.world, lambda plan: True)
    assert rental.state is State.READY
    assert stage.market.creates == 1


def test_a_lost_answer_without_effect_is_waited_out_longer_than_the_listing_lags(stage: Stage) -> None:
    stage.market.lost_without_effect = 1
    before = stage.clock.time()
    with pytest.raises(SelfhostError, match="did not rent"):
        stage.up()
    assert stage.clock.time() - before >= 60
    assert stage.ledger.live() == []
    assert stage.ledger.all()[0].reason == "the answer was lost, and no box came of it"
    assert lifecycle.up(stage.world, lambda plan: True).machine_id == 1


def interrupt_once(stage: Stage, verb: str) -> None:
    armed = True

    def before(asked: str) -> None:
        nonlocal armed
        if asked == verb and armed:
            armed = False
            raise KeyboardInterrupt

    stage.market.before = stage.box.before = before


@pytest.mark.parametrize("verb", ["get", "connect", "run", "put", "attach_key"])
def test_an_interrupt_anywhere_destroys_what_this_up_made(stage: Stage, verb: str) -> None:
    interrupt_once(stage, verb)
    with pytest.raises(KeyboardInterrupt):
        stage.up()
    assert stage.billed == 0
    assert stage.ledger.live() == []


def test_a_second_interrupt_during_the_cleanup_is_the_headline(stage: Stage) -> None:
    def before(verb: str) -> None:
        if verb in ("connect", "destroy"):
            raise KeyboardInterrupt

    stage.market.before = stage.box.before = before
    with pytest.raises(MayBeBilling, match=r"box 5001 .*\$0.32/h.* MAY STILL BE BILLING") as caught:
        stage.up()
    assert "selfhost down" in caught.value.remedy
    assert stage.ledger.live()[0].state is State.ENDING


def test_an_interrupt_keeps_a_box_that_was_ready_before(stage: Stage) -> None:
    stage.up()

    def before(verb: str) -> None:
        if verb == "instances":
            raise KeyboardInterrupt

    stage.market.before = before
    with pytest.raises(KeyboardInterrupt):
        stage.up()
    assert stage.billed == 1
    assert stage.ledger.live()[0].state is State.READY


def test_a_box_that_cannot_arm_is_destroyed_with_that_reason(stage: Stage) -> None:
    stage.box.armed = "refused 401"
    with pytest.raises(SelfhostError, match="refused 401"):
        stage.up()
    assert stage.billed == 0
    assert "refused 401" in stage.ledger.all()[0].reason


def test_unguarded_keeps_a_box_that_cannot_arm(stage: Stage) -> None:
    stage.box.armed = "refused 401"
    world = replace(stage.world, settings=replace(stage.world.settings, unguarded=True))
    rental = lifecycle.up(world, lambda plan: True)
    assert rental.state is State.READY
    assert not rental.guarded
    assert any("does NOT end by itself" in event.text for event in stage.events)


def test_a_failed_install_destroys_the_box_and_says_why(stage: Stage) -> None:
    stage.box.install_code = 1
    with pytest.raises(SelfhostError, match="the disk is full"):
        stage.up()
    assert stage.billed == 0


def test_a_host_that_cannot_start_the_box_is_left_at_once(stage: Stage) -> None:
    stage.market.state = BoxState.FAILED
    before = stage.clock.time()
    with pytest.raises(BoxFailed, match="will not start"):
        lifecycle.up(only_one(stage), lambda plan: True)
    assert stage.billed == 0
    assert stage.clock.time() - before < 120


def test_an_image_that_nobody_has_is_not_looked_for_on_other_machines(stage: Stage) -> None:
    stage.market.state, stage.market.status = BoxState.IMAGELESS, "loading"
    with pytest.raises(NotServable, match="cannot have the image vastai/base-image"):
        stage.up()
    assert (stage.market.creates, stage.billed) == (1, 0)
    assert stage.ledger.all()[0].blameless


def test_a_box_that_never_lets_us_in_is_destroyed_at_the_deadline(stage: Stage) -> None:
    stage.box.refusals = 10_000
    with pytest.raises(BoxFailed, match=r"'ssh' was not over within 5 minutes.*refused"):
        stage.up()
    assert stage.billed == 0


def test_up_resumes_the_box_of_an_up_that_was_killed(stage: Stage) -> None:
    offer = make_offer(1)
    rental = make_rental(f"{stage.world.prefix}a", sent_at=stage.clock.time(), disk_gb=30.0)
    stage.ledger.intend(rental)
    spec = BoxSpec(rental.label, "image", 30.0, "", {})
    stage.ledger.advance(rental, State.BOOTING, instance_id=stage.market.create(offer, spec))
    resumed = lifecycle.up(stage.world, lambda plan: pytest.fail("nothing new may be rented"))
    assert (resumed.label, resumed.state) == (rental.label, State.READY)
    assert stage.market.creates == 1


def test_only_one_up_at_a_time(stage: Stage) -> None:
    with ProcessLock(stage.world.settings.paths.up_lock) as lock:
        assert lock.acquire()
        with pytest.raises(UsageError, match=str(os.getpid())):
            stage.up()


def test_a_ledger_that_was_lost_refuses_to_rent_a_second_box(stage: Stage) -> None:
    stage.up()
    stage.ledger.close()
    stage.world.settings.paths.ledger.unlink()
    world = replace(stage.world, ledger=Ledger(stage.world.settings.paths.ledger))
    with pytest.raises(MayBeBilling, match="does not know it"):
        lifecycle.up(world, lambda plan: True)
    ended = lifecycle.down(world)
    assert [box.id for box in ended.unknown] == [5001]
    assert stage.billed == 0


def test_a_broken_ledger_refuses_to_rent(stage: Stage) -> None:
    stage.ledger.close()
    with pytest.raises(LedgerBroken):
        stage.up()
    assert stage.market.creates == 0


def test_down_ends_proves_and_bills(stage: Stage) -> None:
    stage.up()
    stage.clock.now += 3600
    stage.market.listing_lag = 45.0
    ended = stage.down()
    assert stage.billed == 0
    assert stage.ledger.live() == []
    assert ended.invoices[0].gpu_dollars == pytest.approx(0.31, abs=0.02)


def test_down_twice_is_nothing_to_do(stage: Stage) -> None:
    stage.up()
    stage.down()
    assert stage.down() == lifecycle.Ended((), (), (), alone=True)


def test_down_waits_for_a_box_that_is_not_listed_yet(stage: Stage) -> None:
    stage.market.listing_lag = 40.0
    rental = make_rental(f"{stage.world.prefix}a", sent_at=stage.clock.time())
    stage.ledger.intend(rental)
    stage.market.create(make_offer(1), BoxSpec(rental.label, "image", 30.0, "", {}))
    stage.down()
    assert stage.billed == 0
    assert stage.ledger.get(rental.label).state is State.ENDED  # type: ignore[union-attr]


def test_a_destroy_that_did_nothing_is_asked_for_again(stage: Stage) -> None:
    stage.up()
    stage.market.undead = 1
    stage.down()
    assert stage.billed == 0


def test_down_says_that_it_may_still_be_billing_when_the_market_is_away(stage: Stage) -> None:
    stage.up()
    stage.market.unreachable = 10_000
    with pytest.raises(MayBeBilling, match="box 5001"):
        stage.down()
    assert stage.ledger.live()[0].state is State.ENDING
    stage.market.unreachable = 0
    stage.down()
    assert stage.billed == 0


def test_up_says_what_else_of_selfhost_runs_on_the_account(stage: Stage) -> None:
    stage.up()
    stage.market.boxes[77] = replace(stage.market.boxes[5001], id=77, label="selfhost-0000000000-other")
    stage.up()
    told = [event.text for event in stage.events if "another installation" in event.text]
    assert told == ["box 77 ($0.32/h) of another installation of selfhost runs on this account, too"]


def test_down_tells_what_else_the_account_has(stage: Stage) -> None:
    stage.up()
    box = stage.market.boxes[5001]
    assert stage.down().alone
    stage.market.boxes[3] = replace(box, id=3, label="training")
    ended = stage.down()
    assert (ended.foreign, ended.alone) == ((), False)


def test_down_touches_neither_strangers_nor_other_installations_unless_told(stage: Stage) -> None:
    for number, label in ((1, "my-training-run"), (2, "selfhost-0000000000-x"), (3, "")):
        stage.market.boxes[number] = Instance(
            number, label, BoxState.RUNNING, "running", "", number, "RTX 4090", 0.3, None, None, None
        )
    ended = stage.down()
    assert [box.id for box in ended.foreign] == [2]
    assert not ended.alone
    assert sorted(stage.market.boxes) == [1, 2, 3]
    lifecycle.down(stage.world, everything=True)
    assert sorted(stage.market.boxes) == [1, 3]


def test_down_wins_over_an_up_in_the_middle(stage: Stage) -> None:
    def before(verb: str) -> None:
        if verb == "put":
            for rental in stage.ledger.live():
                stage.ledger.end(rental.label, "down")

    stage.box.before = before
    with pytest.raises(Superseded):
        stage.up()
    assert stage.ledger.live()[0].state is State.ENDING
    stage.box.before = lambda verb: None
    stage.down()
    assert stage.billed == 0


def test_up_notices_that_the_ready_box_has_ended_by_itself(stage: Stage) -> None:
    stage.up()
    stage.clock.now += 120  # so long the list may lag
    stage.market.boxes.clear()
    rental = lifecycle.up(stage.world, lambda plan: True)
    assert rental.instance_id == 5002
    assert stage.ledger.all()[0].reason == "the box ended by itself"


def test_settle_records_an_end_only_when_the_list_proves_it(stage: Stage) -> None:
    rental = lifecycle.up(stage.world, lambda plan: True)
    assert not lifecycle.settle(stage.world, rental)
    stage.clock.now += 120  # so long the list may lag
    stage.market.boxes.clear()
    assert lifecycle.settle(stage.world, rental)
    assert stage.ledger.live() == []


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"engine": "magic"}, UsageError, "magic"),
        ({"market_url": "https://console.vast.ai"}, UsageError, "CPU"),
    ],
)
def test_what_cannot_work_is_refused_before_money_is_spent(
    stage: Stage, change: dict[str, str], error: type[SelfhostError], match: str
) -> None:
    world = replace(stage.world, settings=replace(stage.world.settings, **change))  # type: ignore[arg-type]
    with pytest.raises(error, match=match):
        lifecycle.up(world, lambda plan: True)
    assert stage.market.creates == 0


def with_ollama(stage: Stage, find_model: Callable[[], int | None] = lambda: 700_000_000) -> World:
    """The same world, with the engine of GPU boxes on the live market."""
    live = replace(
        stage.world.settings, engine="ollama", market_url="https://console.vast.ai", disk=None, small_context=True
    )
    return replace(stage.world, settings=live, find_model=find_model)


def test_a_model_that_does_not_exist_is_found_before_money_is_spent(stage: Stage) -> None:
    def missing() -> int:
        raise UsageError("the registry has no model 'qwen3-codr'")

    with pytest.raises(UsageError, match="qwen3-codr"):
        lifecycle.up(with_ollama(stage, missing), lambda plan: True)
    assert stage.market.creates == 0


def test_the_disk_follows_the_size_of_the_model(stage: Stage) -> None:
    plans: list[Plan] = []

    def decline(plan: Plan) -> bool:
        plans.append(plan)
        return False

    for size in (lambda: 30_000_000_000, lambda: 700_000_000, lambda: None):
        with pytest.raises(SelfhostError, match="nothing was rented"):
            lifecycle.up(with_ollama(stage, size), decline)
    assert [plan.disk_gb for plan in plans] == [78.0, 19.0, 19.0]
    assert "cannot be asked" in stage.events[-1].text


def test_a_disk_that_cannot_hold_the_model_is_refused_before_money_is_spent(stage: Stage) -> None:
    world = with_ollama(stage, lambda: 19_000_000_000)
    with pytest.raises(UsageError, match=r"20 GB of disk are too few for .* \(19.0 GB\)") as caught:
        lifecycle.up(replace(world, settings=replace(world.settings, disk=20.0)), lambda plan: True)
    assert "25 GB at least" in caught.value.remedy
    assert stage.market.creates == 0


def test_a_box_begins_with_the_archive_of_ollama(stage: Stage) -> None:
    lifecycle.up(with_ollama(stage), lambda plan: True)
    ((_, spec),) = stage.market.specs.items()
    assert spec.env["SELFHOST_FETCH_URL"].endswith("/ollama-linux-amd64.tar.zst?version=0.34.0")


def test_the_first_archive_is_remembered_and_the_next_box_gets_nothing_else(stage: Stage) -> None:
    world = with_ollama(stage)
    seen = Archive(1900, "ab" * 32, "0.34.0", world.settings.archive_url())
    for found in (seen, replace(seen, sha256="cd" * 32)):
        stage.box.archive = str(found)
        stage.box.uploads.clear()
        lifecycle.up(world, lambda plan: True)
        told = b"".join(stage.box.uploads)
        assert (seen.sha256.encode() in told) == (found is not seen)
        lifecycle.down(world)
    assert world.settings.paths.archives.read_text() == f"{seen}\n"


def test_an_empty_account_rents_nothing(stage: Stage) -> None:
    stage.market.credit = 0.01
    with pytest.raises(NoCredit, match=r"\$0.01"):
        stage.up()
    assert stage.market.creates == 0


def test_an_empty_market_says_what_it_refused(stage: Stage) -> None:
    stage.market.stock = [make_offer(1, verified=False), make_offer(2, verified=False)]
    with pytest.raises(NothingToRent, match="2 × not verified"):
        stage.up()


def test_a_missing_claude_is_found_before_money_is_spent(stage: Stage) -> None:
    def missing() -> Path:
        raise NotSetUp("no claude")

    world = replace(stage.world, find_claude=missing)
    with pytest.raises(NotSetUp, match="no claude"):
        lifecycle.up(world, lambda plan: True)
    assert stage.market.creates == 0
    assert lifecycle.up(world, lambda plan: True, needs_claude=False).state is State.READY


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 99, "a part of it"])
def test_a_damaged_login_key_is_found_before_money_is_spent(stage: Stage, content: bytes | str) -> None:
    path, _ = login_key(stage.world)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] if isinstance(content, str) else content)
    with pytest.raises(NotSetUp, match=f"the login key {path} cannot be used"):
        stage.up()
    assert stage.market.creates == 0
    path.write_bytes(whole)
    assert lifecycle.up(stage.world, lambda plan: True).state is State.READY


@pytest.mark.parametrize("line", [b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI me", b"ssh-ed25519", b"\xff\xfe", b""])
def test_a_public_half_of_another_key_is_found_before_money_is_spent_and_made_again_when_deleted(
    stage: Stage, line: bytes
) -> None:
    path, right = login_key(stage.world)
    public = path.with_suffix(".pub")
    public.write_bytes(line)
    with pytest.raises(NotSetUp, match=f"{public} does not belong to the login key") as caught:
        stage.up()
    assert "Delete it" in caught.value.remedy
    assert stage.market.creates == 0
    public.unlink()
    assert login_key(stage.world) == (path, right)


def test_a_login_key_that_is_damaged_while_the_box_boots_is_not_the_machines_fault(stage: Stage) -> None:
    def before(verb: str) -> None:
        if verb == "attach_key":
            raise NotSetUp("the login key cannot be used")

    stage.market.before = before
    with pytest.raises(NotSetUp):
        stage.up()
    assert stage.billed == 0
    assert stage.ledger.all()[0].blameless


def lose_the_ledger(stage: Stage) -> None:
    """From now on every write fails, as on a full disk."""
    stage.ledger._db.execute("PRAGMA query_only = 1")


@pytest.mark.parametrize("label", ["ours", "changed at the market"])
def test_a_ledger_that_can_only_be_read_still_knows_the_box(stage: Stage, label: str) -> None:
    stage.up()
    stage.clock.now += 3600
    if label != "ours":
        relabel(stage, 5001)
    lose_the_ledger(stage)
    ended = stage.down()
    assert stage.billed == 0
    assert (ended.unknown, [bill.instance_id for bill in ended.invoices]) == ((), [5001])
    assert ended.invoices[0].total == pytest.approx(0.32, abs=0.02)
    assert "ledger" in ended.ledger_problem


def test_a_ledger_that_can_only_be_read_still_knows_whose_account_it_was(stage: Stage) -> None:
    stage.up()
    lose_the_ledger(stage)
    with pytest.raises(MayBeBilling, match=r"account 1, and this is .* account 2"):
        lifecycle.down(replace(stage.world, provider=FakeMarket(stage.clock, account_id="2")))
    assert stage.billed == 1


def test_what_an_up_rented_until_it_was_stopped_is_ended_and_billed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rent_another(books: lifecycle.Books) -> bool:
        """The first one failed, as `down` began; its `up` had the next one by the time it was stopped."""
        (failed,) = stage.ledger.live()
        stage.market.boxes.clear()
        stage.ledger.ended(failed.label, stage.clock.time())
        second = replace(failed, label=f"{stage.world.prefix}b", instance_id=None, ended_at=None, state=State.CREATING)
        stage.ledger.intend(second)
        number = stage.market.create(make_offer(2), BoxSpec(second.label, "image", 30.0, "", {}))
        stage.ledger.advance(second, State.BOOTING, instance_id=number)
        relabel(stage, number)
        return True

    stage.up()
    monkeypatch.setattr(ending, "_stop_up", rent_another)
    ended = stage.down()
    assert stage.billed == 0
    assert [bill.instance_id for bill in ended.invoices] == [5001, 5002]
    assert [rental.state for rental in stage.ledger.all()] == [State.ENDED] * 2


def test_down_works_with_a_stand_in_for_a_broken_ledger(stage: Stage) -> None:
    stage.up()
    world = replace(stage.world, ledger=Ledger.in_memory(broken="it is no database"))
    ended = lifecycle.down(world)
    assert stage.billed == 0
    assert ended.ledger_problem == "it is no database"


def test_a_ledger_that_fails_after_the_paid_call_still_ends_the_box(stage: Stage) -> None:
    def before(verb: str) -> None:
        if verb == "create":
            lose_the_ledger(stage)

    stage.market.before = before
    with pytest.raises(LedgerBroken):
        stage.up()
    assert stage.billed == 0


def test_a_young_box_that_is_not_listed_yet_is_not_declared_gone(stage: Stage) -> None:
    stage.market.listing_lag, stage.market.undead = 20.0, 1
    interrupt_once(stage, "get")
    with pytest.raises(KeyboardInterrupt):
        stage.up()
    assert stage.billed == 0


@pytest.mark.parametrize("change", ["url", "account"])
def test_another_market_or_account_cannot_prove_that_a_box_is_gone(stage: Stage, change: str) -> None:
    stage.up()
    elsewhere = FakeMarket(stage.clock, account_id="2" if change == "account" else "1")
    settings = stage.world.settings
    if change == "url":
        settings = replace(settings, market_url="http://127.0.0.1:10")
    world = replace(stage.world, provider=elsewhere, settings=settings)
    with pytest.raises(MayBeBilling, match=r"was rented at http://127\.0\.0\.1:9 account 1"):
        lifecycle.down(world)
    with pytest.raises(MayBeBilling):
        lifecycle.up(world, lambda plan: True)
    assert stage.billed == 1
    stage.down()
    assert stage.billed == 0


def test_a_box_that_cannot_be_destroyed_does_not_shield_the_others(stage: Stage) -> None:
    prefix = stage.world.prefix
    for number in (1, 2):
        stage.market.boxes[number] = Instance(
            number, f"{prefix}{number}", BoxState.RUNNING, "running", "", number, "RTX 4090", 0.3, None, None, None
        )
    stage.market.immortal = {1}
    with pytest.raises(MayBeBilling, match=r"box 1 .*\$0.30/h"):
        stage.down()
    assert sorted(stage.market.boxes) == [1]


def test_what_the_market_lists_decides_and_not_what_destroy_answers(stage: Stage) -> None:
    stage.up()
    stage.market.boxes.clear()
    stage.market.immortal = {5001}
    stage.down()
    assert stage.ledger.live() == []


def test_up_waits_for_no_down_but_refuses_while_one_proves(stage: Stage) -> None:
    with ProcessLock(stage.world.settings.paths.down_lock) as lock:
        assert lock.acquire()
        with pytest.raises(UsageError, match="selfhost down"):
            stage.up()
    assert stage.market.creates == 0


def test_an_install_that_talks_for_ever_is_ended_at_its_deadline(stage: Stage) -> None:
    stage.box.before = lambda verb: stage.clock.sleep(100 if verb == "line" else 0)
    stage.box.lines = ("@selfhost\tproxy\tprogress\t\t\tinstalling",) * 1000
    with pytest.raises(BoxFailed, match=r"'download' was not over within 30 minutes; last seen: proxy installing"):
        stage.up()
    assert stage.billed == 0


@pytest.mark.parametrize(
    ("state", "status", "minutes"),
    [(BoxState.PENDING, "created", 5), (BoxState.PENDING, "loading", 15)],
)
def test_a_box_that_is_stuck_is_left_at_its_stages_deadline(
    stage: Stage, state: BoxState, status: str, minutes: int
) -> None:
    stage.market.state, stage.market.status = state, status
    before = stage.clock.time()
    with pytest.raises(BoxFailed, match=f"{status!r} was not over within {minutes} minutes; last seen: {status}"):
        lifecycle.up(only_one(stage), lambda plan: True)
    assert minutes * 60 < stage.clock.time() - before < minutes * 60 + 30
    assert stage.billed == 0


def test_a_model_that_never_loads_is_given_up(stage: Stage) -> None:
    stage.box.before = lambda verb: stage.clock.sleep(100 if verb == "line" else 0)
    stage.box.lines = ("@selfhost\tstart\tprogress\t\t\tloading",) * 1000
    with pytest.raises(BoxFailed, match="'load' was not over within 10 minutes"):
        stage.up()


def download(rate: float, seconds: int, total: int = 19_000_000_000) -> tuple[str, ...]:
    """What install.sh says, one line a second, at so many bytes per second."""
    return tuple(f"@selfhost\tmodel\tprogress\t{int(rate * n)}\t{total}\tthe model" for n in range(seconds))


def test_a_download_that_cannot_make_it_is_given_up_after_three_minutes(stage: Stage) -> None:
    stage.box.before = lambda verb: stage.clock.sleep(1 if verb == "line" else 0)
    stage.box.lines = download(2e6, 3600)
    before = stage.clock.time()
    with pytest.raises(BoxFailed, match=r"too slow: model came at 2\.0 MB/s"):
        lifecycle.up(only_one(stage), lambda plan: True)
    assert 180 <= stage.clock.time() - before < 200
    assert stage.billed == 0


def test_a_download_that_pauses_and_makes_it_is_kept(stage: Stage) -> None:
    stage.box.before = lambda verb: stage.clock.sleep(1 if verb == "line" else 0)
    quick = download(50e6, 380)
    stage.box.lines = quick[:100] + quick[99:100] * 90 + quick[100:]
    stage.up()
    assert stage.market.creates == 1


def only_one(stage: Stage) -> World:
    return replace(stage.world, settings=replace(stage.world.settings, attempts=1))


def test_a_machine_that_fails_is_destroyed_and_the_next_one_tried(stage: Stage) -> None:
    stage.box.refusals = 700  # five minutes and more
    told: list[tuple[str, float]] = []
    stage.market.before = lambda verb: told.append((verb, stage.clock.time()))
    rental = lifecycle.up(stage.world, lambda plan: True)
    assert (rental.machine_id, stage.market.creates, stage.billed) == (2, 2, 1)
    first = stage.ledger.all()[0]
    assert first.state is State.ENDED
    assert "'ssh' was not over" in first.reason
    verbs = [verb for verb, _ in told]
    second = len(verbs) - 1 - verbs[::-1].index("create")
    assert "instances" in verbs[verbs.index("destroy") : second]
    assert told[second][1] - told[verbs.index("destroy")][1] >= 5
    choice = make_plan(replace(stage.world, settings=replace(stage.world.settings, max_spend=20.0))).choice
    assert [(refusal.offer.machine_id, refusal.why) for refusal in choice.refused] == [
        (1, f"this machine failed before: {first.reason}")
    ]


def test_no_more_machines_are_tried_than_attempts(stage: Stage) -> None:
    stage.market.state = BoxState.FAILED
    with pytest.raises(BoxFailed, match="will not start"):
        stage.up()
    assert (stage.market.creates, stage.billed) == (3, 0)
    with pytest.raises(BoxFailed):
        lifecycle.up(only_one(stage), lambda plan: True)
    assert stage.market.creates == 4


def test_a_failed_box_that_cannot_be_proven_gone_is_the_end(stage: Stage) -> None:
    stage.market.state, stage.market.immortal = BoxState.FAILED, {5001}
    with pytest.raises(MayBeBilling, match=r"box 5001 .*MAY STILL BE BILLING"):
        stage.up()
    assert stage.market.creates == 1


def test_no_machine_is_taken_that_costs_more_than_was_confirmed(stage: Stage) -> None:
    stage.market.stock = [make_offer(1), make_offer(2, dph_total=0.41)]  # 0.32 + 25 % are 0.40
    stage.market.state = BoxState.FAILED
    with pytest.raises(NothingToRent, match=r"\$0\.410/h by now, more than the \$0\.400/h"):
        stage.up()
    assert (stage.market.creates, stage.billed) == (1, 0)
    world = replace(stage.world, settings=replace(stage.world.settings, max_price=0.42))
    with pytest.raises(NothingToRent, match="failed before"):
        lifecycle.up(world, lambda plan: True)
    assert stage.market.creates == 2


def test_the_market_may_be_away_for_minutes_while_a_box_boots(stage: Stage) -> None:
    stage.market.state = BoxState.PENDING

    def before(verb: str) -> None:
        if verb == "attach_key":
            return
        if stage.market.boxes and began + 60 < stage.clock.time() < began + 600:
            raise MarketUnreachable("the market cannot be reached")
        if stage.market.boxes and stage.clock.time() >= began + 600:
            stage.market.boxes = {n: replace(box, state=BoxState.RUNNING) for n, box in stage.market.boxes.items()}

    began = stage.clock.time()
    stage.market.before = before
    stage.up()
    assert stage.market.creates == 1
    assert stage.clock.time() >= began + 600


def test_a_connection_that_breaks_during_the_install_does_not_cost_the_box(stage: Stage) -> None:
    stage.box.losses = 2
    stage.up()
    assert stage.market.creates == 1
    assert len(stage.box.connections) >= 3


def test_a_connection_that_keeps_breaking_costs_the_box(stage: Stage) -> None:
    stage.box.losses = 4
    rental = lifecycle.up(stage.world, lambda plan: True)
    assert rental.machine_id == 2
    assert "broke, and 3 times before" in stage.ledger.all()[0].reason


def test_a_box_that_moves_during_the_install_is_found_again(stage: Stage) -> None:
    stage.box.losses = 1
    moved = Endpoint("192.0.2.9", 41_999)

    def before(verb: str) -> None:
        if verb == "line":
            stage.market.boxes = {n: replace(box, direct=moved) for n, box in stage.market.boxes.items()}
            stage.box.refusals = 1

    stage.box.before, stage.box.lines = before, download(1e6, 1)
    assert lifecycle.up(stage.world, lambda plan: True).endpoint == moved
    assert stage.market.creates == 1


def test_a_host_that_gives_up_during_the_install_is_left_at_once(stage: Stage) -> None:
    stage.box.losses = 1

    def before(verb: str) -> None:
        if verb == "line" and stage.market.creates == 1:
            stage.market.boxes = {n: replace(box, state=BoxState.FAILED) for n, box in stage.market.boxes.items()}
            stage.box.refusals = 1

    stage.box.before, stage.box.lines = before, download(1e6, 1)
    began = stage.clock.time()
    assert lifecycle.up(stage.world, lambda plan: True).machine_id == 2
    assert stage.clock.time() - began < 60 + stage.world.settings.listing_lag


def wish(stage: Stage, name: str, value: object) -> World:
    """The same world, with one more flag on the command line."""
    settings = stage.world.settings
    wished = replace(settings, **{name: value}, sources={**settings.sources, name: Source.FLAG})  # type: ignore[arg-type]
    return replace(stage.world, settings=wished)


UNFULFILLABLE = [
    ("gpu", "RTX 5090", "RTX 4090"),
    ("region", "Mars", "in Quebec, CA"),
    ("max_price", 0.25, "$0.320/h"),
    ("model", "other", MODEL),
    ("context", 4096, "32768 tokens"),
    ("slots", 2, "1 slots"),
    ("kv_cache_type", "f16", "KV q8_0"),
    ("engine", "ollama", "llamacpp"),
    ("disk", 31.0, "30.0 GB of disk"),
    ("hours", 1.0, "8 h"),
    ("max_spend", 0.5, "$5"),
    ("idle", 5.0, "45 minutes"),
    ("port", 9, "port "),
    ("unguarded", True, "the watchdog"),
]


def test_every_option_of_up_is_compared_with_what_is_up() -> None:
    assert {name for name, _, _ in UNFULFILLABLE} == set(config.FLAGS) - {"api_key", "attempts", "small_context"}


def test_a_box_that_is_not_healthy_is_told_by_whether_it_still_stands(stage: Stage) -> None:
    settings = replace(stage.world.settings, context=CONTEXT + 1)  # more than the front behind it has
    with pytest.raises(NotServable, match="health: context") as caught:
        lifecycle.up(replace(stage.world, settings=settings), lambda plan: True)
    assert caught.value.remedy.startswith("Ask for less: `selfhost up --context TOKENS`; ")
    assert stage.billed == 0
    rental = lifecycle.up(stage.world, lambda plan: True)
    stage.ledger.amend(rental.label, context=CONTEXT + 1)
    with pytest.raises(NotServable, match="health: context") as caught:
        lifecycle.up(replace(stage.world, settings=settings), lambda plan: True)
    assert "`selfhost down`, then" in caught.value.remedy
    assert stage.billed == 1


@pytest.mark.parametrize(("name", "value", "what"), UNFULFILLABLE)
def test_an_option_that_the_box_at_hand_cannot_fulfil_is_an_error(
    stage: Stage, name: str, value: object, what: str
) -> None:
    stage.up()
    world = wish(stage, name, value)
    with pytest.raises(UsageError, match=rf"box 5001 .* is up already; --{name.replace('_', '-')} ") as caught:
        lifecycle.up(world, lambda plan: True)
    assert what in caught.value.message
    movable = {"hours": "--hours 1", "max_spend": "--max-spend 0.5", "idle": "--idle 5"}.get(name)
    assert (f"`selfhost extend {movable}`" if movable else "`selfhost down` first") in caught.value.remedy
    assert stage.billed == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("region", "quebec"), ("max_price", 0.32), ("disk", 30.0), ("hours", 8.0), ("idle", 45.0), ("port", None)],
)
def test_an_option_that_the_box_at_hand_fulfils_is_none(stage: Stage, name: str, value: object) -> None:
    rental = stage.up()
    value = stage.keeper.front.port if name == "port" else value
    assert lifecycle.up(wish(stage, name, value), lambda plan: True) == rental


def test_a_machine_whose_box_never_got_ready_is_avoided_the_next_time(stage: Stage) -> None:
    stage.box.install_code = 1
    with pytest.raises(BoxFailed):
        lifecycle.up(only_one(stage), lambda plan: True)
    stage.box.install_code = 0
    assert lifecycle.up(stage.world, lambda plan: True).machine_id == 2


def test_a_machine_is_not_blamed_for_our_own_interrupt(stage: Stage) -> None:
    interrupt_once(stage, "connect")
    with pytest.raises(KeyboardInterrupt):
        stage.up()
    stage.box.before = stage.market.before = lambda verb: None
    assert lifecycle.up(stage.world, lambda plan: True).machine_id == 1


def test_a_machine_is_not_blamed_for_what_no_machine_could_do(stage: Stage) -> None:
    stage.box.install_status = "refuse"
    stage.box.install_code = 1
    with pytest.raises(NotServable):
        stage.up()
    stage.box.install_code = 0
    assert lifecycle.up(stage.world, lambda plan: True).machine_id == 1


def test_a_machine_is_not_blamed_for_a_market_that_refuses_our_key(stage: Stage) -> None:
    def before(verb: str) -> None:
        if verb == "get":
            raise KeyRefused("the market does not accept the account key")

    stage.market.before = before
    with pytest.raises(KeyRefused):
        stage.up()
    stage.market.before = lambda verb: None
    assert lifecycle.up(stage.world, lambda plan: True).machine_id == 1


def test_a_key_that_cannot_be_attached_is_told_and_no_reason_to_give_up(stage: Stage) -> None:
    def before(verb: str) -> None:
        if verb == "attach_key":
            raise MarketUnreachable("the market cannot be reached")

    stage.market.before = before
    stage.up()
    assert any(event.text == "the market cannot be reached" for event in stage.events)


def test_a_down_that_comes_while_the_paid_call_waits_for_its_turn_stops_it(stage: Stage) -> None:
    def before(verb: str) -> None:
        if verb == "create":
            stage.ledger.end(stage.ledger.live()[0].label, "down")

    stage.market.before = before
    with pytest.raises(Superseded):
        stage.up()
    assert stage.billed == 0
    assert stage.ledger.live() == []


def test_a_ledger_that_was_lost_refuses_even_when_the_list_lags(stage: Stage) -> None:
    stage.market.listing_lag = 40.0
    stage.up()
    stage.ledger.close()
    stage.world.settings.paths.ledger.unlink()
    world = replace(stage.world, ledger=Ledger(stage.world.settings.paths.ledger))
    with pytest.raises(MayBeBilling, match="does not know it"):
        lifecycle.up(world, lambda plan: True)
    assert stage.market.creates == 1


def test_a_down_that_was_interrupted_does_not_make_a_new_ledger_vouch(stage: Stage) -> None:
    stage.market.listing_lag = 40.0
    stage.up()
    stage.ledger.close()
    stage.world.settings.paths.ledger.unlink()
    world = replace(stage.world, ledger=Ledger(stage.world.settings.paths.ledger))
    interrupt_once(stage, "instances")
    with pytest.raises((MayBeBilling, KeyboardInterrupt)):
        lifecycle.down(world)
    lifecycle.down(replace(world, ledger=Ledger(stage.world.settings.paths.ledger)))
    assert stage.billed == 0


def test_without_a_box_and_without_a_market_every_down_says_so_at_once(stage: Stage) -> None:
    stage.market.unreachable = 10
    before = stage.clock.time()
    for _ in range(2):
        with pytest.raises(MarketUnreachable):
            stage.down()
    assert stage.clock.time() == before


def test_a_young_box_that_the_list_lacks_is_reused_and_not_given_up(stage: Stage) -> None:
    stage.market.listing_lag = 40.0
    assert stage.up() == stage.up()
    assert stage.market.creates == 1


def test_a_gpu_that_is_not_used_may_be_the_machines_fault(stage: Stage) -> None:
    with serving(MODEL, CONTEXT, "ollama", size=1000, size_vram=0) as front:
        stage.keeper.front = front
        with pytest.raises(SelfhostError, match="0% of the model is on the GPU"):
            lifecycle.up(with_ollama(stage), lambda plan: True)
    assert not stage.ledger.all()[0].blameless


def test_a_market_that_is_away_is_said_at_once_when_nothing_speaks_for_a_box(stage: Stage) -> None:
    stage.market.unreachable = 1
    before = stage.clock.time()
    with pytest.raises(MarketUnreachable):
        stage.down()
    assert stage.clock.time() == before


def test_down_waits_for_what_a_lost_ledger_may_have_known(stage: Stage) -> None:
    stage.market.listing_lag = 40.0
    stage.market.create(make_offer(1), BoxSpec(f"{stage.world.prefix}a", "image", 30.0, "", {}))
    stage.ledger.close()
    stage.world.settings.paths.ledger.unlink()
    world = replace(stage.world, ledger=Ledger(stage.world.settings.paths.ledger))
    ended = lifecycle.down(world)
    assert [box.label for box in ended.unknown] == [f"{stage.world.prefix}a"]
    assert stage.billed == 0


def test_the_very_first_down_waits_for_nothing(stage: Stage) -> None:
    before = stage.clock.time()
    stage.down()
    assert stage.clock.time() == before


@pytest.mark.parametrize("state", ["a folder", "a full disk"])
def test_down_needs_no_disk(stage: Stage, state: str) -> None:
    stage.up()
    lock = stage.world.settings.paths.down_lock
    lock.unlink(missing_ok=True)
    if state == "a folder":
        lock.mkdir()
    else:
        lock.symlink_to("/dev/full")
    stage.down()
    assert stage.billed == 0


def relabel(stage: Stage, number: int) -> None:
    stage.market.boxes[number] = replace(stage.market.boxes[number], label="my claude box")


def test_a_box_whose_label_was_changed_is_still_ours(stage: Stage) -> None:
    ready = stage.up()
    relabel(stage, 5001)
    assert stage.up() == ready
    stage.market.immortal = {5001}
    with pytest.raises(MayBeBilling, match="box 5001"):
        stage.down()
    stage.market.immortal = set()
    assert stage.down().unknown == ()
    assert stage.billed == 0


def test_an_empty_list_does_not_outweigh_a_box_that_the_market_shows(stage: Stage) -> None:
    ready = stage.up()
    stage.clock.sleep(3600)
    stage.market.hidden_until[5001] = stage.clock.time() + 10
    assert stage.up() == ready
    assert stage.market.creates == 1


def test_a_failed_up_leaves_the_box_of_a_laptop_that_shares_its_settings(stage: Stage) -> None:
    stage.box.install_code = 1
    other = f"{stage.world.prefix}other"

    def before(verb: str) -> None:
        if verb == "connect":
            stage.market.boxes.setdefault(77, replace(stage.market.boxes[5001], id=77, label=other))

    stage.box.before = before
    with pytest.raises(MayBeBilling, match=r"box 77 .*listed again"):
        stage.up()
    assert list(stage.market.boxes) == [77]


def test_nothing_more_is_rented_while_something_of_ours_is_listed(stage: Stage) -> None:
    stage.market.state = BoxState.FAILED
    stage.market.undead = 2

    asked: list[float] = []

    def before(verb: str) -> None:
        if verb == "destroy":  # the listing forgets the box for longer than it may lag
            asked.append(stage.clock.time())
            stage.market.hidden_until[5001] = asked[0] + 67

    stage.market.before = before
    with pytest.raises(MayBeBilling, match=r"box 5001 .*MAY STILL BE BILLING: it is listed again"):
        stage.up()
    assert stage.market.creates == 1


@pytest.mark.parametrize("price", [0.33, 0.28])
def test_a_price_that_moved_a_little_is_told_and_recorded(stage: Stage, price: float) -> None:
    stage.market.charged = price
    rental = lifecycle.up(stage.world, lambda plan: True)
    assert rental.dph_total == price
    assert rental.dph_base == pytest.approx(price - 0.01)
    assert any("its offer said $0.320/h" in event.text for event in stage.events)
    assert list(stage.box.limits.values()) == [f"DPH={price:.6f}"], "what its watchdog counts with"
    assert stage.ledger.live()[0].dph_told == price


def test_a_box_at_its_offers_price_is_told_nothing(stage: Stage) -> None:
    stage.up()
    assert stage.box.limits == {}


def test_a_box_that_does_not_count_with_its_price_is_not_kept(stage: Stage) -> None:
    stage.market.charged, stage.box.limits_code = 0.33, 1
    with pytest.raises(BoxFailed, match=r"does not count with its price: limits\.sh: no"):
        lifecycle.up(only_one(stage), lambda plan: True)
    assert stage.billed == 0
    world = replace(stage.world, settings=replace(stage.world.settings, unguarded=True))
    assert lifecycle.up(world, lambda plan: True).state is State.READY


def test_the_price_is_told_by_whoever_goes_on_with_the_install(stage: Stage) -> None:
    stage.market.charged, stage.box.losses = 0.33, 4
    with pytest.raises(BoxFailed):
        lifecycle.up(only_one(stage), lambda plan: True)
    assert stage.box.limits == {}
    rental = make_rental(f"{stage.world.prefix}a", sent_at=stage.clock.time(), disk_gb=30.0, dph_told=0.31)
    stage.ledger.intend(rental)
    number = stage.market.create(make_offer(3), BoxSpec(rental.label, "image", 30.0, "", {}))
    rental = stage.ledger.advance(rental, State.BOOTING, instance_id=number, running_at=stage.clock.time())
    stage.ledger.note(rental, dph_total=0.33)
    assert lifecycle.up(stage.world, lambda plan: True).dph_told == 0.33
    assert list(stage.box.limits.values()) == ["DPH=0.330000"]


def test_a_substitute_that_is_dearer_than_its_offer_is_held_to_what_was_confirmed(stage: Stage) -> None:
    stage.market.stock = [make_offer(1, dph_total=0.40), make_offer(2, dph_total=0.495)]  # 0.40 + 25 % are 0.50
    stage.market.gone, stage.market.charged = 1, 0.61
    with pytest.raises(BoxFailed, match=r"costs \$0\.610/h, and its offer said \$0\.495/h"):
        lifecycle.up(only_one(stage), lambda plan: True)
    assert stage.billed == 0


def away(stage: Stage, seconds: float) -> Callable[[str], None]:
    """From now on the market, and ssh with it, for so long."""
    until = stage.clock.time() + seconds

    def before(verb: str) -> None:
        if stage.clock.time() < until:
            stage.clock.sleep(1)
            raise NotYet("no route") if verb == "connect" else MarketUnreachable("no connection")

    return before


def test_a_network_that_is_away_during_the_install_is_not_the_boxs_fault(stage: Stage) -> None:
    def before(verb: str) -> None:
        if verb == "line":
            stage.box.before = stage.market.before = away(stage, 330)

    stage.box.losses, stage.box.lines, stage.box.before = 1, download(1e6, 1), before
    assert lifecycle.up(stage.world, lambda plan: True).machine_id == 1
    assert stage.market.creates == 1


def test_a_box_that_ended_itself_during_the_install_is_not_waited_for(stage: Stage) -> None:
    def before(verb: str) -> None:
        if verb == "line" and stage.market.creates == 1:
            stage.market.boxes.clear()
            stage.box.before = gone

    def gone(verb: str) -> None:
        if stage.market.creates == 1:
            raise NotYet("refused")

    stage.box.losses, stage.box.lines, stage.box.before = 1, download(1e6, 1), before
    began = stage.clock.time()
    assert lifecycle.up(stage.world, lambda plan: True).machine_id == 2
    assert "does not know" in stage.ledger.all()[0].reason
    assert stage.clock.time() < began + 120


def test_a_market_that_is_away_right_after_the_create_is_not_the_boxs_fault(stage: Stage) -> None:
    stage.market.state, stage.market.status = BoxState.PENDING, "created"

    def before(verb: str) -> None:
        if stage.market.boxes and stage.clock.time() < began + 360:
            stage.clock.sleep(1)
            raise MarketUnreachable("no connection")
        if stage.clock.time() > began + 400:
            stage.market.boxes = {n: replace(box, state=BoxState.RUNNING) for n, box in stage.market.boxes.items()}

    began = stage.clock.time()
    stage.market.before = before
    assert lifecycle.up(stage.world, lambda plan: True).machine_id == 1
    assert stage.market.creates == 1
    assert stage.clock.time() > began + 400


def test_what_was_not_skipped_counts_for_the_up_that_takes_over(stage: Stage) -> None:
    stage.market.state, stage.market.status = BoxState.PENDING, "created"
    rental = make_rental(f"{stage.world.prefix}a", sent_at=stage.clock.time(), disk_gb=30.0)
    stage.ledger.intend(rental)
    number = stage.market.create(make_offer(1), BoxSpec(rental.label, "image", 30.0, "", {}))
    stage.ledger.advance(rental, State.BOOTING, instance_id=number)
    stage.clock.now += 290
    with pytest.raises(BoxFailed, match="'created' was not over within 5 minutes"):
        lifecycle.up(only_one(stage), lambda plan: True)
    assert stage.clock.time() - (rental.sent_at or 0) < 400


def asked(stage: Stage, work: Callable[[], object]) -> Counter[str]:
    """How often each question went to the market."""
    questions: Counter[str] = Counter()
    stage.market.before = lambda verb: questions.update([verb])
    work()
    stage.market.before = lambda verb: None
    return questions


def test_a_healthy_up_and_down_ask_each_thing_once(stage: Stage) -> None:
    """Every second question of a kind waits for its turn."""
    first = asked(stage, stage.up)
    assert (first["account"], first["instances"]) == (1, 1)
    again = asked(stage, stage.up)
    assert (again["account"], again["instances"], again["get"]) == (1, 1, 0)
    stage.clock.now += 3600
    assert asked(stage, stage.up) == again
    end = asked(stage, stage.down)
    assert (end["account"], end["instances"], end["destroy"], end["charges"]) == (1, 1, 1, 1)


def test_a_box_that_was_to_end_is_ended_before_what_is_listed_counts(stage: Stage) -> None:
    stage.up()
    stage.ledger.end(stage.ledger.live()[0].label, "down")
    assert lifecycle.up(stage.world, lambda plan: True).instance_id == 5002


def test_a_create_that_the_market_did_not_want_yet_is_made_after_the_silence(stage: Stage) -> None:
    stage.market.silences = [12.0, 40.0]
    before = stage.clock.time()
    rental = lifecycle.up(stage.world, lambda plan: True)
    assert (rental.machine_id, stage.billed) == (1, 1)
    assert stage.clock.time() - before >= 52
    assert [one.state for one in stage.ledger.all()] == [State.ENDED, State.ENDED, State.READY]
    assert len({one.label for one in stage.ledger.all()}) == 3, "each paid call has its own intent"
    assert "refused: we ask too often" in stage.ledger.all()[0].reason


@pytest.mark.parametrize("silences", [[12.0] * 4, [600.0]])
def test_a_market_that_wants_no_paid_call_for_long_gets_none(stage: Stage, silences: list[float]) -> None:
    stage.market.silences = silences
    with pytest.raises(TooOften):
        stage.up()
    assert (stage.billed, stage.ledger.live()) == (0, [])


def test_down_waits_out_a_silence_that_somebody_else_brought_about(stage: Stage) -> None:
    stage.up()
    wanted = stage.clock.time() + 120

    def before(verb: str) -> None:
        if verb == "account" and stage.clock.time() < wanted:
            raise TooOften("the market wants silence", seconds=wanted - stage.clock.time())

    stage.market.before = before
    assert len(stage.down().invoices) == 1
    assert stage.billed == 0
    assert wanted <= stage.clock.time() < wanted + 60


def test_a_failed_up_without_a_ledger_to_read_waits_for_the_list(stage: Stage) -> None:
    """Its own box need not be listed yet, and nothing else speaks for it."""
    stage.market.listing_lag = 45.0
    stage.box.install_code = 1

    def before(verb: str) -> None:
        if verb == "run":
            stage.ledger.close()

    stage.box.before = before
    with pytest.raises(SelfhostError):
        lifecycle.up(only_one(stage), lambda plan: True)
    assert stage.billed == 0


def test_the_bill_goes_on_to_the_end_of_a_box_whose_watchdog_failed(stage: Stage) -> None:
    rental = lifecycle.up(stage.world, lambda plan: True)
    stage.ledger.amend(rental.label, heard=Heard(stage.clock.time(), 60.0, 0.0, 0.01, 0, 0))
    stage.clock.now += 10 * 3600
    (bill,) = stage.down().invoices
    assert bill.hours == pytest.approx(10, abs=0.05)
    assert not bill.uncertain
    stage.up()
    stage.clock.now += 10 * 3600
    stage.market.boxes.clear()  # its watchdog did its work
    (bill,) = stage.down().invoices
    assert bill.hours == pytest.approx(8, abs=0.05)


def test_a_market_that_does_not_say_whether_an_overdue_box_runs_does_not_keep_it_alive(stage: Stage) -> None:
    stage.up()
    stage.clock.now += 10 * 3600

    def before(verb: str) -> None:
        if verb == "get":
            raise MarketUnreachable("the market cannot be reached")

    stage.market.before = before
    (bill,) = stage.down().invoices
    assert stage.billed == 0
    assert (bill.hours, bill.uncertain) == (pytest.approx(8, abs=0.05), True)


def test_a_box_that_is_much_dearer_than_its_offer_is_not_kept(stage: Stage) -> None:
    stage.market.charged = 1.28
    with pytest.raises(BoxFailed, match=r"costs \$1\.280/h, and its offer said"):
        stage.up()
    assert stage.billed == 0
