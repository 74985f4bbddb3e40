"""What `reap` finds and ends, and what it never touches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from selfhost_cli import config
from selfhost_cli.cli import reap as command
from selfhost_cli.config import Paths, Settings
from selfhost_cli.errors import KeyRefused, MarketUnreachable, MayBeBilling
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle import Books, reaping
from selfhost_cli.lifecycle.world import market_of
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import BoxState, Instance, State
from tests.fakes.clock import FakeClock
from tests.fakes.market import FakeMarket
from tests.fakes.rental import make_rental

START = 1_795_000_000.0
OTHER = "selfhost-0000000000-1"


@dataclass
class House:
    """One profile: what it has recorded, and whether its keeper lives."""

    settings: Settings
    ledger: Ledger
    prefix: str
    market: FakeMarket

    @property
    def paths(self) -> Paths:
        return self.settings.paths

    def rent(self, number: int, state: State = State.READY, **changes: object) -> str:
        """A box that is recorded and listed."""
        label = f"{self.prefix}{number}"
        self.record(number, state, **changes)
        self.market.boxes[number] = row(number, label)
        return label

    def record(self, number: int, state: State = State.READY, **changes: object) -> str:
        label = f"{self.prefix}{number}"
        where = market_of(self.settings, self.market.account())
        values = {"instance_id": number, "sent_at": START - 3600, "running_at": START - 3600, "market": where}
        for rental in self.ledger.live():
            self.ledger.ended(rental.label, START)
        self.ledger.intend(make_rental(label, **(values | changes)))  # type: ignore[arg-type]
        self.ledger.advance(self.ledger.live()[0], state)
        return label

    @contextmanager
    def keeper(self, which: str = "keeper_lock") -> Iterator[None]:
        with ProcessLock(getattr(self.paths, which)) as lock:
            assert lock.acquire()
            yield


def row(number: int, label: str, start: float | None = START - 7200) -> Instance:
    return Instance(number, label, BoxState.RUNNING, "running", "", 1, "RTX 4090", 0.31, start, None, None)


@pytest.fixture
def market() -> FakeMarket:
    return FakeMarket(FakeClock(START))


@pytest.fixture
def make_house(tmp_path: Path, market: FakeMarket) -> Iterator[Callable[[str], House]]:
    houses: list[House] = []

    def make(profile: str) -> House:
        settings = config.load(profile, env={"SELFHOST_HOME": str(tmp_path)})
        settings.paths.make()
        prefix = f"selfhost-{config.installation_id(settings.paths)}-"
        houses.append(House(settings, Ledger(settings.paths.ledger), prefix, market))
        return houses[-1]

    yield make
    for house in houses:
        house.ledger.close()


@pytest.fixture
def house(make_house: Callable[[str], House]) -> House:
    return make_house("default")


@pytest.fixture
def books(house: House, market: FakeMarket) -> Books:
    settings = house.settings
    return Books(settings=settings, provider=market, ledger=house.ledger, report=lambda event: None, clock=market.clock)


def numbers(strays: tuple[reaping.Stray, ...]) -> list[int | None]:
    return [stray.instance_id for stray in strays]


def test_a_box_of_a_dead_keeper_is_found_and_ended_and_billed(books: Books, house: House, market: FakeMarket) -> None:
    label = house.rent(7)
    [stray] = reaping.look(books).left
    assert (stray.instance_id, stray.label, stray.gpu, stray.dph_total) == (7, label, "RTX 4090", 0.31)
    assert (stray.age_s, stray.profile, stray.why) == (7200, "default", "no keeper of profile default is running")
    assert 7 in market.boxes
    done = reaping.reap(books)
    assert (numbers(done.ended), done.left, market.boxes) == ([7], (), {})
    assert [bill.instance_id for bill in done.invoices] == [7]
    gone = house.ledger.get(label)
    assert gone
    assert (gone.state, gone.reason) == (State.ENDED, "reap")
    assert reaping.reap(books) == reaping.Reaped((), (), ())


@pytest.mark.parametrize("which", ["keeper_lock", "up_lock"])
def test_a_box_that_somebody_looks_after_is_not_touched(
    books: Books, house: House, market: FakeMarket, which: str
) -> None:
    label = house.rent(7)
    with house.keeper(which):
        assert reaping.reap(books, everything=True) == reaping.Reaped((), (), (label,))
    assert 7 in market.boxes
    assert house.ledger.live()[0].state is State.READY


def test_a_living_keeper_does_not_claim_what_its_ledger_does_not_have(
    books: Books, house: House, market: FakeMarket
) -> None:
    kept = house.rent(7)
    market.boxes[8] = row(8, f"{house.prefix}8", start=None)
    with house.keeper():
        done = reaping.reap(books)
    assert (numbers(done.ended), done.held, set(market.boxes)) == ([8], (kept,), {7})
    assert done.ended[0].why == "the ledger of profile default does not have it"
    assert done.ended[0].age_s is None


def test_a_box_that_the_ledger_says_has_ended_is_a_stray(books: Books, house: House, market: FakeMarket) -> None:
    label = house.rent(7)
    house.ledger.ended(label, START)
    with house.keeper():
        assert numbers(reaping.reap(books).ended) == [7]
    assert market.boxes == {}


def test_other_installations_are_shown_and_end_with_all_only(books: Books, market: FakeMarket) -> None:
    market.boxes = {8: row(8, OTHER), 9: row(9, "mine, by hand"), 10: row(10, ""), 11: row(11, "my-selfhost-1")}
    done = reaping.reap(books)
    assert [(stray.instance_id, stray.profile, stray.why) for stray in done.left] == [(8, "", "another installation's")]
    assert set(market.boxes) == {8, 9, 10, 11}
    assert numbers(reaping.reap(books, everything=True).ended) == [8]
    assert set(market.boxes) == {9, 10, 11}


def test_all_profiles_of_the_installation_count_each_with_its_own_keeper_and_ledger(
    books: Books, house: House, market: FakeMarket, make_house: Callable[[str], House]
) -> None:
    work, play = make_house("work"), make_house("play")
    mine, theirs, kept = house.rent(7), work.rent(8), play.rent(9)
    with play.keeper():
        done = reaping.reap(books)
    assert [(stray.instance_id, stray.profile) for stray in done.ended] == [(7, "default"), (8, "work")]
    assert (done.left, done.held, set(market.boxes)) == ((), (kept,), {9})
    assert {bill.label for bill in done.invoices} == {mine, theirs}
    states = [each.ledger.all()[0].state for each in (house, work, play)]
    assert states == [State.ENDED, State.ENDED, State.READY]


def test_a_profile_with_a_damaged_id_stops_nobody(
    books: Books, house: House, market: FakeMarket, make_house: Callable[[str], House]
) -> None:
    work = make_house("work")
    house.rent(7)
    work.rent(8)
    (work.paths.config / "installation").write_text("?")
    done = reaping.reap(books)
    assert (numbers(done.ended), numbers(done.left), done.left[0].profile) == ([7], [8], "")


def test_a_box_whose_label_was_changed_at_the_market_is_known_by_its_number(
    books: Books, house: House, market: FakeMarket
) -> None:
    house.rent(7)
    market.boxes[7] = replace(market.boxes[7], label="renamed")
    market.boxes[8] = row(8, "renamed")
    assert numbers(reaping.reap(books).ended) == [7]
    assert set(market.boxes) == {8}


def test_what_the_list_may_not_have_yet_is_waited_for(books: Books, house: House, market: FakeMarket) -> None:
    """Its `up` and its keeper died just after the paid call."""
    label = house.record(7, State.CREATING, instance_id=None, sent_at=START - 5)
    market.boxes[7] = row(7, label)
    market.hidden_until[7] = START + 30
    [stray] = reaping.look(books).left
    assert (stray.instance_id, stray.label) == (None, label)
    assert numbers(reaping.reap(books).ended) == [None]
    assert market.boxes == {}
    assert house.ledger.live() == []


def test_a_lost_ledger_is_waited_out_before_nothing_counts(books: Books, house: House, market: FakeMarket) -> None:
    market.boxes[7] = row(7, f"{house.prefix}7")
    market.hidden_until[7] = START + 30
    assert numbers(reaping.reap(books).ended) == [7]
    assert market.boxes == {}
    market.clock.sleep(1)
    began = market.clock.now
    house.ledger.vouch()
    assert reaping.look(books) == reaping.Reaped((), (), ())
    assert market.clock.now == began


def test_one_that_is_long_gone_from_the_list_is_not_counted(books: Books, house: House) -> None:
    house.record(7)
    assert reaping.look(books) == reaping.Reaped((), (), ())


def test_a_rental_at_another_market_is_not_this_accounts_and_neither_is_its_number(
    books: Books, house: House, market: FakeMarket
) -> None:
    house.record(7, sent_at=START - 5, market="http://127.0.0.1:1 account 9")
    market.boxes[7] = row(7, "by hand")
    assert reaping.reap(books, everything=True) == reaping.Reaped((), (), ())
    assert set(market.boxes) == {7}


def test_a_market_that_does_not_tell_is_no_all_clear(books: Books, house: House, market: FakeMarket) -> None:
    for ask in (reaping.look, reaping.reap):
        market.unreachable = 1
        with pytest.raises(MayBeBilling, match="what is rented is unknown"):
            ask(books)

    def refused(verb: str) -> None:
        raise KeyRefused("the key is wrong")

    market.before = refused
    with pytest.raises(KeyRefused):
        reaping.look(books)
    market.before = lambda verb: None
    label = house.record(7)
    market.before = refused
    with pytest.raises(MayBeBilling, match="the key is wrong") as caught:
        reaping.look(books)
    assert [one["label"] for one in caught.value.left] == [label]


def test_what_cannot_be_proven_gone_is_named_and_the_rest_is_ended_all_the_same(
    books: Books, house: House, market: FakeMarket, make_house: Callable[[str], House]
) -> None:
    work = make_house("work")
    label = house.rent(7)
    work.rent(8)
    market.boxes[9] = row(9, OTHER)
    market.immortal = {7}
    with pytest.raises(MayBeBilling, match=r"box 7 .* MAY STILL BE BILLING") as caught:
        reaping.reap(books, everything=True)
    assert [(one["instance_id"], one["label"]) for one in caught.value.left] == [(7, label)]
    assert set(market.boxes) == {7}
    assert house.ledger.live()[0].state is State.ENDING


def test_a_list_that_fails_after_the_first_look_is_no_proof(books: Books, house: House, market: FakeMarket) -> None:
    market.boxes[8] = row(8, f"{house.prefix}8")
    asked: list[str] = []

    def before(verb: str) -> None:
        asked.append(verb)
        if asked.count("instances") > 1:
            raise MarketUnreachable("the market's list of instances is malformed")

    market.before = before
    with pytest.raises(MayBeBilling, match=r"box 8 .* MAY STILL BE BILLING.*malformed"):
        reaping.reap(books)


def test_a_ledger_that_cannot_be_read_claims_nothing_unless_somebody_lives_there(
    books: Books, house: House, market: FakeMarket, make_house: Callable[[str], House]
) -> None:
    work = make_house("work")
    work.rent(8)
    work.ledger.close()
    work.paths.ledger.write_bytes(b"no database" * 1000)
    with work.keeper(), pytest.raises(MayBeBilling, match=r"the keeper of profile work .* looks after box 8 .*unknown"):
        reaping.reap(books)
    assert 8 in market.boxes
    [stray] = reaping.reap(books).ended
    assert (stray.instance_id, market.boxes) == (8, {})
    assert "cannot be used" in stray.why


class While:
    """Something that happens once, at the first question of a kind to the market."""

    def __init__(self, market: FakeMarket, verb: str, happens: Callable[[], object]) -> None:
        self._verb, self._happens, self._done = verb, happens, False
        market.before = self

    def __call__(self, verb: str) -> None:
        if verb == self._verb and not self._done:
            self._done = True
            self._happens()


def test_the_box_of_an_up_that_rented_while_the_list_was_read_is_not_touched(
    books: Books, house: House, market: FakeMarket
) -> None:
    house.ledger.vouch()
    with house.keeper("up_lock"):
        While(market, "instances", lambda: house.rent(7, State.BOOTING))
        assert reaping.reap(books, everything=True) == reaping.Reaped((), (), (f"{house.prefix}7",))
    assert (set(market.boxes), house.ledger.live()[0].state) == ({7}, State.BOOTING)


def test_a_profile_that_came_into_being_while_the_list_was_read_is_ours(
    books: Books, house: House, market: FakeMarket, make_house: Callable[[str], House]
) -> None:
    house.ledger.vouch()
    work: list[House] = []
    with ExitStack() as guards:

        def begin() -> None:
            work.append(make_house("work"))
            guards.enter_context(work[0].keeper("up_lock"))
            work[0].rent(7, State.BOOTING)

        While(market, "instances", begin)
        assert reaping.reap(books, everything=True).held == (f"{work[0].prefix}7",)
    assert set(market.boxes) == {7}


@pytest.mark.parametrize("question", ["account", "instances"])
def test_a_keeper_that_starts_while_the_market_is_asked_keeps_its_box(
    books: Books, house: House, market: FakeMarket, question: str
) -> None:
    label = house.rent(7)
    with ExitStack() as guards:
        While(market, question, lambda: guards.enter_context(house.keeper()))
        assert reaping.reap(books).held == (label,)
    assert (set(market.boxes), house.ledger.live()[0].state) == ({7}, State.READY)


def test_a_keeper_that_starts_while_another_profiles_box_is_ended_keeps_its_own(
    books: Books, house: House, market: FakeMarket, make_house: Callable[[str], House]
) -> None:
    work = make_house("work")
    house.rent(7)
    label = work.rent(8)
    with ExitStack() as guards:
        While(market, "destroy", lambda: guards.enter_context(work.keeper()))
        done = reaping.reap(books)
    assert (numbers(done.ended), done.held, set(market.boxes)) == ([7], (label,), {8})
    assert work.ledger.live()[0].state is State.READY


def test_a_machine_is_not_blamed_for_what_was_reaped_before_it_was_ready(books: Books, house: House) -> None:
    house.rent(7, State.INSTALLING)
    reaping.reap(books)
    assert house.ledger.all()[0].blameless


def test_what_cannot_be_told_of_one_profile_does_not_keep_the_rest_alive(
    books: Books, house: House, market: FakeMarket, make_house: Callable[[str], House]
) -> None:
    work, play = make_house("work"), make_house("play")
    house.rent(7)
    play.rent(9)
    work.rent(8)
    work.ledger.close()
    work.paths.ledger.write_bytes(b"no database" * 1000)
    with work.keeper(), pytest.raises(MayBeBilling, match=r"looks after box 8 .*unknown") as caught:
        reaping.reap(books)
    assert set(market.boxes) == {8}
    assert [one["instance_id"] for one in caught.value.left] == [8]


@pytest.mark.parametrize("ask", [reaping.look, reaping.reap])
def test_a_lost_ledger_is_waited_out_once(
    books: Books, house: House, market: FakeMarket, make_house: Callable[[str], House], ask: Callable[..., object]
) -> None:
    house.ledger.vouch()
    work = make_house("work")
    work.ledger.close()
    work.paths.ledger.unlink()
    for waited in (True, False):
        began = market.clock.now
        assert ask(books) == reaping.Reaped((), (), ())
        assert (market.clock.now > began) is waited


def test_a_lost_ledger_that_was_not_waited_for_does_not_vouch(
    books: Books, house: House, market: FakeMarket, make_house: Callable[[str], House]
) -> None:
    """The list has a box of the one, and is not asked again for the sake of the other."""
    make_house("work")
    market.boxes[7] = row(7, f"{house.prefix}7")
    market.boxes[8] = row(8, f"{make_house('work').prefix}8")
    market.hidden_until[8] = START + 200
    assert numbers(reaping.reap(books).ended) == [7]
    market.clock.now = START + 201
    assert numbers(reaping.reap(books).ended) == [8]
    assert market.boxes == {}


def stray(number: int, profile: str, label: str = "selfhost-1-a") -> reaping.Stray:
    return reaping.Stray(number, label, "RTX 4090", 0.31, 5400.0, profile, "no keeper is running")


def test_people_read_what_is_left_why_and_what_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    command.show(reaping.Reaped((), (stray(7, "default"), stray(8, "", "selfhost-[/x]")), ("selfhost-1-b",)))
    said = capsys.readouterr().out
    for part in ("7", "0.31", "1.5 h", "no keeper is running", "selfhost-[/x]", "MAY BE BILLED; `selfhost reap --yes`"):
        assert part in said
    assert "`selfhost reap --yes --all`" in said
    assert "looked after: selfhost-1-b" in said
    assert "nothing of this installation" not in said
    command.show(reaping.Reaped((stray(7, "default"),), (), ()))
    said = capsys.readouterr().out
    assert "ended, and proven gone" in said
    assert "✓ nothing of this installation is billed that nobody looks after" in said
