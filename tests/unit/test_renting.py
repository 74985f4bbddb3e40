"""What is chosen, shown and rented: our own history with machines, `--pick`, and the plan."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from selfhost_cli import config, lifecycle
from selfhost_cli.attach import Front
from selfhost_cli.cli import offers as command
from selfhost_cli.cli import render
from selfhost_cli.config import Settings
from selfhost_cli.errors import BoxFailed, NothingToRent, SelfhostError, UsageError
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle import Plan, World, picking, renting
from selfhost_cli.model import BoxState, Event, State
from selfhost_cli.remote.ssh import make_key, public_half
from tests.fakes.box import FakeBox, FakeKeeper, serving
from tests.fakes.clock import FakeClock
from tests.fakes.market import FakeMarket, make_offer
from tests.fakes.rental import make_rental

MODEL, CONTEXT, DAY = "qwen2.5-coder-0.5b", 32_768, 86_400.0


@dataclass
class Person:
    """Somebody with a profile, and the market."""

    settings: Settings
    market: FakeMarket
    ledger: Ledger
    box: FakeBox
    front: Front
    told: list[Event] = field(default_factory=list)

    def world(self, number: int | None = None, **flags: object) -> World:
        """Of one command; `number` is its --pick."""
        settings = replace(self.settings, **flags)  # type: ignore[arg-type]
        return World(
            settings=settings, provider=self.market, ledger=self.ledger, report=self.told.append,
            clock=self.market.clock, keeper=FakeKeeper(self.ledger, self.front), connect=self.box.connect,
            make_key=make_key, public_half=public_half, find_claude=lambda: Path("/bin/claude"),
            find_model=lambda: 700_000_000, pick=command.picked(settings, number),
        )  # fmt: skip

    def look(self, **flags: object) -> renting.Search:
        """`selfhost offers`."""
        world = self.world(**flags)
        found = renting.search(world)
        picking.remember(world.settings, found.choice, found.need.disk_gb)
        return found

    def up(self, number: int | None = None, **flags: object) -> int:
        """`selfhost up --yes`; the machine that was rented."""
        return lifecycle.up(self.world(number, **flags), lambda plan: True).machine_id

    def failed(self, machine: int, days_ago: float, reason: str = "no sshd", **changes: object) -> None:
        at = self.market.clock.time() - days_ago * DAY
        label = f"selfhost-test-{machine}-{days_ago}"
        self.ledger.intend(make_rental(label, machine_id=machine, created_at=at))
        rental = self.ledger.advance(self.ledger.live()[0], State.BOOTING, instance_id=7, **changes)
        self.ledger.end(rental.label, reason)
        self.ledger.ended(rental.label, at)


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving(MODEL, CONTEXT) as front:
        yield front


@pytest.fixture
def person(tmp_path: Path, front: Front) -> Iterator[Person]:
    flags = {
        "market_url": "http://127.0.0.1:9", "api_key": "account-key-0123456789", "engine": "llamacpp",
        "model": MODEL, "context": CONTEXT, "model_url": "http://127.0.0.1:9/model.gguf",
        "model_bytes": 491_400_064, "disk": 30.0, "hours": 2.0,
    }  # fmt: skip
    settings = config.load("default", flags=flags, env={"SELFHOST_HOME": str(tmp_path)})
    settings.paths.make()
    ledger = Ledger(settings.paths.ledger)
    yield Person(settings, FakeMarket(FakeClock()), ledger, FakeBox(), front)
    ledger.close()


def test_a_machine_that_failed_is_refused_with_its_reason_for_two_weeks_and_not_longer(person: Person) -> None:
    person.failed(1, days_ago=13.9)
    person.failed(2, days_ago=14.1)
    choice = person.look().choice
    assert [row.offer.machine_id for row in choice.ranked] == [2, 3, 4, 5]
    assert [(one.offer.machine_id, one.why) for one in choice.refused] == [(1, "this machine failed before: no sshd")]


@pytest.mark.parametrize("reason", renting.OURS)
def test_what_the_machine_had_no_part_in_is_not_held_against_it(person: Person, reason: str) -> None:
    person.failed(1, days_ago=0.1, reason=reason)
    assert person.look().choice.ranked[0].offer.machine_id == 1


def test_a_machine_that_served_is_not_held_against_it_when_it_ends(person: Person) -> None:
    person.failed(1, days_ago=0.1, reason="the box ended by itself", ready_at=1.0)
    assert person.look().choice.ranked[0].offer.machine_id == 1


def test_the_number_that_was_shown_is_rented(person: Person) -> None:
    assert [row.offer.machine_id for row in person.look().choice.ranked] == [1, 2, 3, 4, 5]
    assert person.up(3) == 3


def test_the_number_counts_in_the_ranking_that_was_shown_and_not_in_todays(person: Person) -> None:
    person.look()
    person.market.stock.insert(0, make_offer(9, dph_total=0.1))
    person.market.stock = [offer for offer in person.market.stock if offer.machine_id != 1]
    assert person.up(3) == 3


def test_the_number_may_be_of_the_plan_that_was_declined(person: Person) -> None:
    world = person.world()

    def decline(plan: Plan) -> bool:
        command.show_plan(world.settings, plan)
        return False

    with pytest.raises(SelfhostError, match="nothing was rented"):
        lifecycle.up(world, decline)
    assert person.up(2) == 2


def unlisted(person: Person) -> None:
    person.market.stock = [offer for offer in person.market.stock if offer.machine_id != 2]


def snatched(person: Person) -> None:
    person.market.gone = 1


def another_id(person: Person) -> None:
    """The machine is there, in another offer."""
    person.market.stock = [replace(offer, id=offer.id + 100 * (offer.machine_id == 2)) for offer in person.market.stock]


def changed(**changes: object) -> object:
    def change(person: Person) -> None:
        stock = person.market.stock
        person.market.stock = [replace(one, **changes) if one.machine_id == 2 else one for one in stock]  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (unlisted, r"^number 2 of the ranking shown \(offer 1002, RTX 4090 in Quebec, CA\) is gone$"),
        (snatched, "number 2 .* is gone$"),
        (another_id, "number 2 .* is gone$"),
        (changed(machine_id=77), "number 2 .* is gone$"),
        (changed(verified=False), "number 2 .* does not fit .*: not verified by the market"),
        (changed(reliability=0.9), "number 2 .* does not fit .*: reliability below 0.98: 0.900"),
        (changed(dph_total=0.5), r"number 2 .* became dearer: \$0\.500/h, shown was \$0\.330/h"),
        (changed(down_per_gb=0.05), r"number 2 .* became dearer: traffic \$50/TB, shown was \$2/TB"),
        (lambda person: person.failed(2, 0.1), "number 2 .* does not fit .*: this machine failed before: no sshd"),
    ],
)  # fmt: skip
def test_a_pick_that_is_gone_unfit_or_dearer_is_an_error_and_no_other_is_rented(
    person: Person, happens: object, said: str
) -> None:
    person.look()
    happens(person)  # type: ignore[operator]
    with pytest.raises(NothingToRent, match=said) as caught:
        person.up(2)
    assert "`selfhost offers`" in caught.value.remedy
    assert person.market.boxes == {}


def test_a_pick_that_the_market_leaves_out_by_itself_is_said_to_be_unfit(person: Person) -> None:
    """As the real one does, it applies the limits of the question."""
    person.look()
    stock, ask = person.market.stock, person.market.offers
    person.market.stock = [replace(one, reliability=0.9) if one.machine_id == 2 else one for one in stock]
    person.market.offers = lambda need: [  # type: ignore[method-assign]
        one for one in ask(need) if not need.strict or one.reliability >= need.reliability
    ]
    with pytest.raises(NothingToRent, match=r"does not fit .*: reliability below 0\.98: 0\.900"):
        person.up(2)


def test_a_pick_that_does_not_get_ready_is_the_end(person: Person) -> None:
    person.look()
    person.market.state = BoxState.FAILED
    with pytest.raises(BoxFailed):
        person.up(2)
    assert (person.market.creates, person.market.boxes) == (1, {})


def test_a_second_offer_of_a_machine_may_still_be_the_picked_one(person: Person) -> None:
    person.look()
    person.market.stock.append(replace(make_offer(2), id=99, dph_total=0.2))
    person.up(2)
    assert [rental.offer_id for rental in person.ledger.live()] == [1002]


def test_a_number_that_was_not_shown_is_a_mistake(person: Person) -> None:
    with pytest.raises(UsageError, match="a ranking that was shown, and there is none"):
        person.up(1)
    person.look()
    for number in (0, 6, -1):
        with pytest.raises(UsageError, match="has the numbers 1 to 5"):
            person.up(number)
    with pytest.raises(UsageError, match="there is none"):
        person.up(1, market_url="http://127.0.0.1:10")
    person.look(region="Mars")
    with pytest.raises(UsageError, match="there is none"):
        person.up(1)


def test_a_pick_with_another_card_or_disk_than_shown_is_a_mistake(person: Person) -> None:
    person.look()
    with pytest.raises(UsageError, match="is no RTX 3090") as caught:
        person.up(2, gpu="RTX 3090")
    assert "selfhost offers --gpu 'RTX 3090'" in caught.value.remedy
    with pytest.raises(UsageError, match="priced with 30 GB of disk, and this `up` asks for 40 GB"):
        person.up(2, disk=40.0)


def test_a_pick_while_another_machine_is_up_is_a_mistake(person: Person) -> None:
    person.look()
    assert person.up() == 1
    with pytest.raises(UsageError, match="is up already, and it is not number 2"):
        person.up(2)
    assert person.up(1) == 1
    assert person.market.creates == 1


def test_nothing_within_the_limits_names_the_rules_and_what_would_loosen_them(person: Person) -> None:
    found = person.look(max_price=0.2, gpu_ram_mb=40_000)
    assert found.choice.ranked == ()
    told = renting.nothing(found)
    assert told.message == ("no RTX 4090 within the limits; 5 offers refused: 5 × less than 40000 MB of video memory")
    refused = "`selfhost offers --refused`, with the same options, tells each."
    assert told.remedy == f"Loosen gpu_ram_mb, or try later. {refused}"
    person.market.stock = [make_offer(1), make_offer(2, dph_total=0.25)]
    told = renting.nothing(person.look(max_price=0.2))
    assert "2 × above $0.2/h" in told.message
    assert told.remedy.startswith("Loosen --max-price, or try later.")


def test_a_card_that_nobody_offers_may_be_misspelt(person: Person) -> None:
    person.market.stock = []
    told = renting.nothing(person.look())
    assert told.message == "the market has no RTX 4090 now"
    assert told.remedy.startswith("Names are exact, such as")


def shown(monkeypatch: pytest.MonkeyPatch, width: int, plan: Plan) -> str:
    text = io.StringIO()
    monkeypatch.setattr(render, "err", render._Console(file=text, width=width, force_terminal=True, color_system=None))
    command.plan(plan)
    return text.getvalue()


def test_the_plan_that_is_shown_is_the_one_that_is_executed(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    person.market.stock[0] = make_offer(1, dph_total=0.25, down_per_gb=0.052)
    plans: list[str] = []
    ceilings: list[float] = []

    def confirm(plan: Plan) -> bool:
        plans.append(" ".join(shown(monkeypatch, 100, plan).split()))
        ceilings.append(plan.ceiling)
        return True

    rental = lifecycle.up(person.world(max_spend=3.0, idle=30.0), confirm)
    (told,) = plans
    spec = person.market.specs[rental.label]
    assert f"card RTX 4090, simulated, 24 GB, in {rental.place}, reliability 0.995" in told
    assert f"price ${rental.dph_total:.3f}/h; 2 h cost $" in told
    assert f"model {rental.model}, context of {rental.context} tokens, engine {rental.engine}" in told
    assert rental.caps.max_dollars == 3.0
    assert "ends by itself after 2 h or $3, after 30 min without a request, after 45 min without this machine" in told
    assert f"`selfhost down`: removes the box and its {spec.disk_gb:g} GB of disk with the model" in told
    assert f"costs more than ${ceilings[0]:.3f}/h, is destroyed, and another one is tried: 3 at most" in told
    assert "account $20.00" in told
    assert "→ 1 0.330" in told
    assert "traffic $52/TB" in told


def test_the_plan_of_a_pick_has_this_one_alone(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    person.look()
    plan = renting.make_plan(person.world(4))
    told = " ".join(shown(monkeypatch, 100, plan).split())
    assert [row.offer.machine_id for row in plan.choice.ranked] == [4]
    assert "$0.350/h" in told
    assert "number 4 of the ranking shown" in told
    assert "destroyed, and no other one is tried" in told


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_number_is_cut_off_and_no_line_is_too_long(
    person: Person, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    place = "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch, United Kingdom, GB"
    person.market.stock = [make_offer(n, place=place, inet_down_mbps=12345.0, down_per_gb=0.0521) for n in range(1, 12)]
    told = shown(monkeypatch, width, renting.make_plan(person.world(max_price=1.0)))
    table = [line for line in told.splitlines() if "12345" in line]
    assert len(table) == command.IN_PLAN
    assert all(re.search(r"0\.3\d0 +\$\d\.\d\d +\d min +12345 +52\.1 +0\.995 ", line) for line in table)
    assert all(
        len(line) <= max(width, command.NARROWEST) for line in told.splitlines() if "selfhost offers" not in line
    )
    assert "…" not in told
    assert not re.search(" $", told, re.MULTILINE)


def test_offers_are_shown_with_what_does_not_fit_and_as_json(
    person: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    person.market.stock[4] = make_offer(5, verified=False, place="Mars \x1b[2J[/x]\n✓ nothing is billed")
    found = person.look()
    command.show(found, everything=False, refused=False, json=False)
    told = capsys.readouterr().out
    assert "RTX 4090 (simulated) for 2 h, 30 GB of disk included" in told
    assert "1 does not fit: 1 × not verified by the market; --refused tells each" in told
    assert "`selfhost up --pick N`" in told
    command.show(found, everything=False, refused=True, json=False)
    told = capsys.readouterr().out
    assert "$0.360/h  Mars [2J[/x] ✓ nothing is billed  not verified by the market" in told
    assert "\x1b" not in told
    command.show(found, everything=False, refused=False, json=True)
    value = json.loads(capsys.readouterr().out)
    assert [(row["rank"], row["offer"]["machine_id"]) for row in value["choice"]["ranked"]] == [
        (n, n) for n in range(1, 5)
    ]
    assert value["choice"]["refused"][0]["why"] == "not verified by the market"
    assert {"dollars", "ready_s", "image_s", "model_s", "traffic", "note"} <= set(value["choice"]["ranked"][0])


def test_a_long_ranking_is_cut_and_says_so(person: Person, capsys: pytest.CaptureFixture[str]) -> None:
    person.market.stock = [make_offer(number) for number in range(1, 31)]
    found = person.look()
    for everything, rows in ((False, command.AT_ONCE), (True, 30)):
        command.show(found, everything=everything, refused=False, json=False)
        told = capsys.readouterr().out
        assert told.count("Quebec") == rows
        assert ("10 more fit; --all shows them" in told) is not everything


def test_no_offer_is_exit_code_4_and_the_json_says_why(person: Person, capsys: pytest.CaptureFixture[str]) -> None:
    person.market.stock = [make_offer(1, verified=False)]
    with pytest.raises(NothingToRent, match="1 × not verified") as caught:
        command.show(person.look(), everything=False, refused=False, json=True)
    assert caught.value.exit_code == 4
    assert json.loads(capsys.readouterr().out)["choice"]["ranked"] == []
