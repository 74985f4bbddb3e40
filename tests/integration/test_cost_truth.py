"""Our invoices against the market's own sums: `up`, hours of work and `down` on the sandbox's market, in its time."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from selfhost_cli import config, cost, countdown, lifecycle
from selfhost_cli.attach import Front
from selfhost_cli.cli import app
from selfhost_cli.errors import MarketUnreachable, SelfhostError
from selfhost_cli.invoice import Invoice, invoice, worth_noting
from selfhost_cli.ledger import Ledger, Usage
from selfhost_cli.lifecycle import World
from selfhost_cli.lifecycle.billing import reconcile
from selfhost_cli.model import Charges, Event, Heard, Rental, State
from selfhost_cli.providers import Provider
from selfhost_cli.providers.vast import VastProvider
from selfhost_cli.remote.ssh import make_key, public_half
from selfhost_cli.sandbox.instances import Instance, Settings
from selfhost_cli.sandbox.market import Market, Options
from tests.fakes.box import FakeBox, FakeKeeper, serving
from tests.fakes.clock import FakeClock

MODEL, CONTEXT = "qwen2.5-coder-0.5b", 32_768
KEY = "account-key-0123456789"
GB = 1_000_000_000
HOUR, LEASE = 3600.0, 45 * 60.0
START = time.mktime((*time.localtime(time.time() - 86_400)[:3], 12, 0, 0, 0, 0, -1))
"""Yesterday at noon: `selfhost cost` goes by the real time, and no test may cross the end of a month."""


class MarketHere:
    """The sandbox's market in a thread of this process, on a clock that moves only when it is told."""

    def __init__(self, folder: Path) -> None:
        stages = {"null": 4.0, "created": 3.0, "loading": 33.0}
        options = Options(folder, api_key=KEY, settings=Settings(real_boxes=False, stages=stages))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = self._run(self._serve(options))
        headers = {"Authorization": f"Bearer {self._market.control_token}"}
        self._control = httpx.Client(base_url=f"{self.url}/control", headers=headers, trust_env=False)

    async def _serve(self, options: Options) -> str:
        self._market = Market(options, clock=lambda: START)
        self._runner = web.AppRunner(self._market.app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def ask(self, path: str, **body: Any) -> Any:
        answer = self._control.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def box(self, rental: Rental) -> Instance:
        found = self._market.instances.known(rental.instance_id or 0)
        assert found
        return found

    def billed(self, rental: Rental) -> float:
        """The market's own sum for it."""
        return self.box(rental).bill(self.ask("/clock")["now"]).total

    def destroy(self, rental: Rental) -> None:
        """As its watchdog does, with the key of the box itself."""
        key = self.box(rental).key
        url = f"{self.url}/api/v0/instances/{rental.instance_id}/"
        answer = httpx.request("DELETE", url, json={}, headers={"Authorization": f"Bearer {key}"}, trust_env=False)
        assert answer.status_code == 200

    def close(self) -> None:
        self._control.close()
        self._run(self._market.instances.close())
        self._run(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class MarketClock(FakeClock):
    """Whoever sleeps makes time pass for the market, in steps in which it can act."""

    def __init__(self, market: MarketHere) -> None:
        super().__init__(START)
        self._market = market

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self._market.ask("/clock", advance=seconds)


@dataclass
class Bookkeeping:
    """A `Provider` whose market is slow with its figures: none, or those until then only."""

    market: Provider
    late: bool = False
    until: float | None = None
    answers: float = float("inf")
    """So many questions, then it is away."""
    asked: int = 0

    def charges(self, ids: Collection[int], since: float) -> dict[int, Charges]:
        self.asked += 1
        if self.asked > self.answers:
            raise MarketUnreachable("the market cannot be reached")
        found = {} if self.late else self.market.charges(ids, since)
        if self.until is not None:
            return {number: replace(one, gpu=one.gpu / 2, until=self.until) for number, one in found.items()}
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.market, name)


@dataclass
class Session:
    """What a person and their box do."""

    world: World
    market: MarketHere
    clock: MarketClock
    books: Bookkeeping
    events: list[Event] = field(default_factory=list)
    noted: int = 0

    @property
    def ledger(self) -> Ledger:
        return self.world.ledger

    def up(self) -> Rental:
        return lifecycle.up(self.world, lambda plan: True)

    def work(self, rental: Rental, seconds: float, *, down_bytes: int = 0, up_bytes: int = 0) -> None:
        """Time passes, bytes flow evenly, and the keeper hears of it every few seconds."""
        box, steps = self.market.box(rental), int(seconds / 15)
        for _ in range(steps):
            self.clock.sleep(15)
            box.meter.down_bytes += down_bytes // steps
            box.meter.up_bytes += up_bytes // steps
            self.hear(rental)

    def hear(self, rental: Rental) -> None:
        """What the watchdog wrote, as the keeper's link and the keeper treat it."""
        box, now = self.market.box(rental), self.clock.time()
        bill = box.bill(now)
        counted = f"{box.meter.down_bytes}/{box.meter.up_bytes}/0/0"
        measured = countdown.parse(f"{counted} {now - box.created - 40:.0f} 3 9 {bill.total:.4f}")
        assert measured
        heard = Heard(now, measured.up_s, measured.idle_s, measured.dollars, measured.down_bytes, measured.up_bytes)
        known = self.ledger.get(rental.label)
        assert known
        if worth_noting(known, heard):
            self.noted += 1
            self.ledger.amend(rental.label, heard=heard)

    def down(self) -> Invoice:
        (bill,) = lifecycle.down(self.world).invoices
        return bill

    def again(self, rental: Rental) -> Invoice:
        """What a later command says, which asks the market once more."""
        reconcile(self.world)
        found = self.ledger.get(rental.label)
        assert found
        return invoice(found, Usage(), now=self.clock.time())

    def check(self, bill: Invoice, rental: Rental) -> None:
        """Within 5 % or 5 s of rent of the market's own sum."""
        truth = self.market.billed(rental)
        assert abs(bill.total - truth) <= max(0.05 * truth, 5 / HOUR * rental.dph_total), (bill, truth)


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving(MODEL, CONTEXT) as front:
        yield front


@pytest.fixture
def market(tmp_path: Path) -> Iterator[MarketHere]:
    here = MarketHere(tmp_path / "market")
    yield here
    here.close()


@pytest.fixture
def session(tmp_path: Path, market: MarketHere, front: Front) -> Iterator[Session]:
    flags = {
        "market_url": market.url,
        "api_key": KEY,
        "engine": "llamacpp",
        "model": MODEL,
        "context": CONTEXT,
        "model_url": f"{market.url}/model.gguf",
        "model_bytes": 491_400_064,
        "disk": 30.0,
        "attempts": 1,
    }
    settings = config.load("default", flags=flags, env={"SELFHOST_HOME": str(tmp_path)})
    settings.paths.make()
    clock, ledger, box = MarketClock(market), Ledger(settings.paths.ledger), FakeBox()
    events: list[Event] = []
    books = Bookkeeping(VastProvider(KEY, market.url, clock=clock))
    world = World(
        settings=settings, provider=books, ledger=ledger, report=events.append, clock=clock,  # type: ignore[arg-type]
        keeper=FakeKeeper(ledger, front), connect=box.connect, make_key=make_key, public_half=public_half,
        find_claude=lambda: Path("/bin/claude"), find_model=lambda: 491_400_064,
    )  # fmt: skip
    yield Session(world, market, clock, books, events)
    ledger.close()


def test_a_plain_run_is_billed_with_the_markets_figures_and_ours_agree(session: Session) -> None:
    rental = session.up()
    session.work(rental, 1800, down_bytes=GB)
    bill = session.down()
    assert not bill.estimated
    assert bill.total == pytest.approx(session.market.billed(rental))
    assert bill.estimate is not None
    session.check(replace(bill, gpu_dollars=bill.estimate, disk_dollars=0.0, traffic_dollars=0.0), rental)


def test_before_the_market_has_figures_the_estimate_is_as_good(session: Session) -> None:
    session.books.late = True
    rental = session.up()
    session.work(rental, 1800, down_bytes=GB)
    bill = session.down()
    assert bill.estimated
    assert not bill.uncertain
    session.check(bill, rental)
    assert session.noted < 40, "of 120 times that it was heard"


def test_a_run_of_a_minute_is_estimated_as_well(session: Session) -> None:
    session.books.late = True
    rental = session.up()
    session.work(rental, 60)
    session.check(session.down(), rental)


def test_the_time_that_a_proof_takes_is_not_billed(session: Session) -> None:
    session.books.late = True
    rental = session.up()
    session.work(rental, 120)
    session.market.ask("/faults", fault="listed_long", seconds=45.0)
    ended = session.clock.time()
    bill = session.down()
    assert session.clock.time() - ended >= 45
    session.check(bill, rental)


def test_figures_that_come_late_take_the_place_of_the_estimate_and_say_what_it_was(session: Session) -> None:
    session.books.late = True
    rental = session.up()
    session.work(rental, 1800)
    first = session.down()
    assert session.again(rental).estimated
    session.books.late = False
    settled = session.again(rental)
    assert not settled.estimated
    assert settled.total == pytest.approx(session.market.billed(rental))
    assert settled.estimate == pytest.approx(first.total)
    asked = session.books.asked
    assert session.again(rental) == settled
    assert session.books.asked == asked, "what is settled is not asked for again"


def test_figures_for_half_of_it_are_not_the_bill(session: Session) -> None:
    rental = session.up()
    session.work(rental, 1800)
    session.books.until = session.clock.time() - 900
    bill = session.down()
    assert bill.estimated
    session.check(bill, rental)


def test_traffic_that_costs_more_than_the_rent_is_in_the_estimate(session: Session) -> None:
    session.books.late = True
    rental = session.up()
    session.work(rental, 600, down_bytes=200 * GB, up_bytes=10 * GB)
    bill = session.down()
    assert bill.traffic_dollars > bill.gpu_dollars
    session.check(bill, rental)


def test_a_box_whose_watchdog_failed_is_billed_until_it_was_ended(session: Session) -> None:
    session.books.late = True
    rental = session.up()
    session.work(rental, HOUR)
    session.clock.sleep(9 * HOUR)  # nobody renews its lease, and nobody ends it
    bill = session.down()
    session.check(bill, rental)


def test_a_market_that_wants_silence_costs_time_and_nothing_else(session: Session) -> None:
    session.market.ask("/faults", fault="rate_limited", call="create", retry_after=40, calls=1)
    rental = session.up()
    assert len(session.ledger.all()) == 2
    session.market.ask("/faults", fault="rate_limited", call="account", retry_after=90, calls=1)
    session.down()
    found = session.ledger.get(rental.label)
    assert found
    assert found.state is State.ENDED


def test_a_price_that_rose_is_seen_once_the_market_has_figures(session: Session) -> None:
    session.market.ask("/faults", fault="price_rises", factor=2.0, after=600.0)
    session.books.late = True
    rental = session.up()
    session.work(rental, 1800)
    first = session.down()
    session.books.late = False
    settled = session.again(rental)
    assert settled.total > 1.3 * first.total
    assert settled.total == pytest.approx(session.market.billed(rental))


@pytest.mark.parametrize("late", [True, False])
def test_a_box_that_ended_by_itself_is_not_billed_until_somebody_looks(session: Session, late: bool) -> None:
    session.books.late = late
    rental = session.up()
    session.work(rental, HOUR, down_bytes=GB)
    session.clock.sleep(LEASE + 3)  # the laptop is shut
    session.market.destroy(rental)
    session.clock.sleep(6 * HOUR)
    bill = session.down()
    assert bill.estimated is late
    session.check(bill, rental)
    if late:
        assert bill.uncertain
        assert bill.least < session.market.billed(rental) < bill.most
        session.books.late = False
        assert session.again(rental).total == pytest.approx(session.market.billed(rental))


@pytest.mark.parametrize("how", ["stopped", "destroyed elsewhere"])
def test_an_end_that_nobody_saw_is_told_as_a_range(session: Session, how: str) -> None:
    session.books.late = True
    rental = session.up()
    session.work(rental, HOUR)
    session.clock.sleep(300)  # the laptop is shut
    if how == "stopped":
        session.market.ask("/kill", instance=rental.instance_id, status="outbid")
    else:
        session.market.destroy(rental)
    session.clock.sleep(5 * HOUR)
    bill = session.down()
    assert bill.uncertain
    truth = session.market.billed(rental)
    assert bill.least <= truth <= bill.total * 1.05 < bill.most
    session.books.late = False
    session.clock.sleep(30 * HOUR)
    assert session.again(rental).total == pytest.approx(truth)


def test_a_box_that_never_started_costs_its_disk(session: Session) -> None:
    session.market.ask("/faults", fault="boot_stuck", stage="loading")
    with pytest.raises(SelfhostError):
        session.up()
    (rental,) = session.ledger.all()
    assert rental.state is State.ENDED
    estimate = invoice(rental, Usage(), now=session.clock.time())
    assert estimate.gpu_dollars == 0 < estimate.disk_dollars
    session.check(estimate, rental)
    assert session.again(rental).total == pytest.approx(session.market.billed(rental))


def test_a_market_that_cannot_be_asked_is_a_note_and_no_failure_of_down(session: Session) -> None:
    rental = session.up()
    session.work(rental, 600)
    session.books.answers = 0
    bill = session.down()
    session.check(bill, rental)
    assert any("the invoice is an estimate" in event.text for event in session.events)


def test_an_old_estimate_is_settled_by_the_next_down(session: Session) -> None:
    session.books.late = True
    first = session.up()
    session.down()
    session.books.late = False
    session.up()
    session.down()
    found = session.ledger.get(first.label)
    assert found
    assert found.charges
    assert session.books.asked == 2, "one question for both"


def told(session: Session, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    assert app.run(["cost", *words]) == 0
    return capsys.readouterr()


@pytest.fixture
def environment(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = session.world.settings
    monkeypatch.setenv("SELFHOST_HOME", str(settings.paths.config.parent.parent))
    monkeypatch.setenv("SELFHOST_MARKET_URL", settings.market_url)
    monkeypatch.setenv("SELFHOST_API_KEY", KEY)


@pytest.mark.usefixtures("environment")
def test_cost_tells_this_rental_and_the_month_and_asks_for_late_figures(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    session.books.late = True
    first = session.up()
    session.work(first, 1800)
    session.ledger.add_usage(first.label, "main", Usage(1, 900_000, 500_000, 100_000))
    before = session.down()
    second = session.up()
    session.work(second, 600)
    month = ["--month", cost.month_of(first.created_at)]
    value = json.loads(told(session, capsys, *month, "--json")[0])
    ended, runs = value["rentals"]
    assert (ended["invoice"]["estimated"], ended["invoice"]["estimate"]) == (False, pytest.approx(before.total))
    assert ended["cost"]["dollars"] == pytest.approx(session.market.billed(first))
    assert ended["cost"]["list_dollars"] == pytest.approx(0.4 * 2 + 0.5 * 0.2 + 0.1 * 10)
    assert (runs["running"], runs["invoice"]["label"]) == (True, second.label)
    assert value["running"] == [runs]
    assert value["total"]["dollars"] == pytest.approx(ended["cost"]["dollars"] + runs["cost"]["dollars"])
    text = told(session, capsys, *month, "--list-price-out", "20")[0]
    assert "This rental" in text
    assert re.search(rf"{first.instance_id} .* market's +900000  500000  100000", text)
    assert "900000 in (500000 reused), 100000 out" in text
    assert "$2.90 ($2.00 in, $0.2000 reused, $20.00 out)" in text


@pytest.mark.usefixtures("environment")
def test_cost_without_a_market_tells_what_it_has(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.books.late = True
    rental = session.up()
    session.down()
    session.market.ask("/faults", fault="market_down", seconds=1e9)
    out, err = told(session, capsys, "--month", cost.month_of(rental.created_at))
    assert "1 of 1 are estimates until the market has its figures." in out
    assert "estimates stay estimates: " in err


@pytest.mark.usefixtures("environment")
def test_cost_of_a_month_without_rentals_asks_nobody(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no rental began in 1999-12" in told(session, capsys, "--month", "1999-12")[0]
