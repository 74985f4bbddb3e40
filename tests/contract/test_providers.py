"""What `providers.Provider` promises, kept by the real SDK on the sandbox market and by the fake that tests use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.errors import AnswerLost, KeyRefused, MarketUnreachable, NoCredit, OfferGone, Superseded
from selfhost_cli.model import BoxSpec, BoxState, Need
from selfhost_cli.providers import Provider
from selfhost_cli.providers.vast import VastProvider, _offer, cli_key
from selfhost_cli.remote.ssh import make_key
from tests.fakes.clock import FakeClock
from tests.fakes.market import FakeMarket
from tests.sandbox.market_process import MarketProcess
from tests.waiting import until

NEED = Need(disk_gb=30.0, hours=2.0)


@dataclass
class Case:
    """A provider, and how to make its market misbehave: the next create, the account, the list, the next answers."""

    provider: Provider
    take_the_offer_away: Callable[[], None]
    lose_the_answer: Callable[[], None]
    take_the_money: Callable[[], None]
    lag: Callable[[float], None]
    go_down: Callable[[], None]
    pass_time: Callable[[float], None]


def fake_case() -> Case:
    fake = FakeMarket(FakeClock())

    def switch(name: str, value: float) -> Callable[[], None]:
        return lambda: setattr(fake, name, value)

    return Case(
        provider=fake,
        take_the_offer_away=switch("gone", 1),
        lose_the_answer=switch("lost_with_effect", 1),
        take_the_money=switch("credit", 0.0),
        lag=lambda seconds: setattr(fake, "listing_lag", seconds),
        go_down=switch("unreachable", 4),
        pass_time=fake.clock.sleep,
    )


def sandbox_case(market: MarketProcess) -> Case:
    def switch(fault: str, **options: Any) -> Callable[[], None]:
        return lambda: market.set("/faults", fault=fault, **options)

    def lag(seconds: float) -> None:
        market.set("/faults", fault="listed_late", seconds=seconds)
        market.set("/faults", fault="listed_long", seconds=seconds)

    return Case(
        provider=VastProvider(market.facts["api_key"], market.url, env=os.environ, clock=FakeClock()),
        take_the_offer_away=switch("offer_gone", calls=1),
        lose_the_answer=switch("answer_lost", how="drop", calls=1),
        take_the_money=switch("credit_gone"),
        lag=lag,
        go_down=switch("market_down", seconds=60),
        pass_time=market.advance,
    )


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MarketProcess]:
    process = MarketProcess(tmp_path_factory.mktemp("market"))
    yield process
    process.close()


def real(market: MarketProcess) -> VastProvider:
    return VastProvider(market.facts["api_key"], market.url, env=os.environ)


@pytest.fixture(params=["sandbox", "fake"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    if request.param == "fake":
        yield fake_case()
        return
    market: MarketProcess = request.getfixturevalue("market")
    yield sandbox_case(market)
    market.control.delete("/faults")
    market.destroy_all()


def spec(label: str) -> BoxSpec:
    return BoxSpec(label=label, image="vastai/base-image:test", disk_gb=30.0, onstart="true", env={"SELFHOST_X": "1"})


def test_a_box_can_be_made_found_read_and_ended(case: Case) -> None:
    provider = case.provider
    offer = provider.offers(NEED)[0]
    number = provider.create(offer, spec("selfhost-a-1"))
    assert [box.id for box in until(lambda: provider.instances("selfhost-a-"))] == [number]
    assert provider.instances("selfhost-b-") == []
    box = until(lambda: (found := provider.get(number)) and found.state is BoxState.RUNNING and found)
    assert (box.label, box.machine_id, box.gpu) == ("selfhost-a-1", offer.machine_id, offer.gpu)
    assert box.endpoints
    assert box.dph_total == pytest.approx(offer.dph_total)
    provider.destroy(number)
    until(lambda: not provider.instances("selfhost-a-"))
    provider.destroy(number)
    assert provider.get(number) is None


def test_an_offer_that_is_gone_says_so_and_makes_nothing(case: Case) -> None:
    offer = case.provider.offers(NEED)[0]
    case.take_the_offer_away()
    with pytest.raises(OfferGone, match=str(offer.id)):
        case.provider.create(offer, spec("selfhost-a-2"))
    assert case.provider.instances("selfhost-a-2") == []


def test_what_is_raised_at_the_last_moment_stops_the_paid_call(case: Case) -> None:
    def sending() -> None:
        raise Superseded("`down` was faster")

    with pytest.raises(Superseded):
        case.provider.create(case.provider.offers(NEED)[0], spec("selfhost-a-10"), sending)
    assert case.provider.instances("selfhost-a-10") == []


def test_a_box_is_found_by_its_number_whatever_its_label(case: Case) -> None:
    number = case.provider.create(case.provider.offers(NEED)[0], spec("selfhost-a-11"))
    assert [box.id for box in until(lambda: case.provider.instances("selfhost-b-", [number]))] == [number]
    assert case.provider.instances("selfhost-b-", [number + 1]) == []


def test_a_lost_answer_says_so_and_the_list_tells_what_became_of_it(case: Case) -> None:
    case.lose_the_answer()
    with pytest.raises(AnswerLost):
        case.provider.create(case.provider.offers(NEED)[0], spec("selfhost-a-7"))
    (box,) = case.provider.instances("selfhost-a-7")
    assert box.label == "selfhost-a-7"


def test_an_account_that_cannot_pay_says_so_and_makes_nothing(case: Case) -> None:
    offer = case.provider.offers(NEED)[0]
    case.take_the_money()
    with pytest.raises(NoCredit):
        case.provider.create(offer, spec("selfhost-a-8"))
    assert case.provider.account().credit <= 0
    assert case.provider.instances("selfhost-a-8") == []


def test_a_list_that_lags_shows_a_box_late_and_for_too_long(case: Case) -> None:
    case.lag(30)
    number = case.provider.create(case.provider.offers(NEED)[0], spec("selfhost-a-9"))
    assert case.provider.instances("selfhost-a-9") == []
    assert case.provider.get(number) is not None
    case.pass_time(30)
    assert [box.id for box in case.provider.instances("selfhost-a-9")] == [number]
    case.provider.destroy(number)
    assert case.provider.get(number) is None
    assert [box.id for box in case.provider.instances("selfhost-a-9")] == [number]
    case.pass_time(30)
    assert case.provider.instances("selfhost-a-9") == []


@pytest.mark.parametrize("verb", ["account", "offers", "instances", "get", "destroy"])
def test_a_market_that_is_down_is_unreachable_and_not_empty(case: Case, verb: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "account": (),
        "offers": (NEED,),
        "instances": ("selfhost-",),
        "get": (7,),
        "destroy": (7,),
    }
    case.go_down()
    with pytest.raises(MarketUnreachable):
        getattr(case.provider, verb)(*arguments[verb])


def test_a_login_key_can_be_registered_and_attached_again_and_again(case: Case) -> None:
    _, public = make_key("test")
    number = case.provider.create(case.provider.offers(NEED)[0], spec("selfhost-a-3"))
    for _ in range(2):
        case.provider.register_key(public)
        case.provider.attach_key(number, public)
    case.provider.destroy(number)


def test_the_account_has_credit(case: Case) -> None:
    assert case.provider.account().credit > 0


def test_charges_are_money_or_unknown(case: Case) -> None:
    number = case.provider.create(case.provider.offers(NEED)[0], spec("selfhost-a-4"))
    for one in case.provider.charges([number], time.time() - 60).values():
        assert min(one.gpu, one.disk, one.down, one.up) >= 0
    assert case.provider.charges([7], time.time() - 60) == {}
    case.provider.destroy(number)


@pytest.mark.parametrize("spelling", ["400", "404", "410", "200"])
def test_every_spelling_of_gone_is_understood(market: MarketProcess, spelling: str) -> None:
    market.set("/faults", fault="offer_gone", calls=1, spelling=spelling)
    provider = real(market)
    with pytest.raises(OfferGone):
        provider.create(provider.offers(NEED)[0], spec("selfhost-a-5"))


def test_the_paid_call_is_sent_once_whatever_happens(market: MarketProcess) -> None:
    market.control.delete("/requests")
    market.set("/faults", fault="offer_gone", calls=1)
    provider = real(market)
    with pytest.raises(OfferGone):
        provider.create(provider.offers(NEED)[0], spec("selfhost-a-6"))
    rows: list[dict[str, Any]] = market.control.get("/requests").json()
    (asked,) = [row for row in rows if row["method"] == "PUT"]
    assert asked["body"]["cancel_unavail"] is True
    assert asked["body"]["runtype"] == "ssh_direct"
    assert asked["body"]["label"] == "selfhost-a-6"


def test_filters_are_applied_to_more_than_a_page_of_instances(market: MarketProcess) -> None:
    provider = real(market)
    offers = provider.offers(Need(disk_gb=10.0, hours=0.1))
    made = [provider.create(offer, spec(f"selfhost-p-{offer.id}")) for offer in offers[:3]]
    assert sorted(box.id for box in provider.instances("selfhost-p-")) == sorted(made)
    market.destroy_all()


def test_a_machine_that_was_never_measured_is_an_offer_of_none_of_that(
    market: MarketProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unverified one may have no figures; what a choice has to refuse by name must be read at all."""
    provider = real(market)
    (row, *_) = market.sdk().search_offers(query={"verified": {"eq": False}, "num_gpus": {"eq": 1}}, no_default=True)
    blank = dict.fromkeys(("cpu_ram", "disk_space", "inet_down", "reliability", "reliability2", "direct_port_count"))
    monkeypatch.setattr(provider._sdk, "search_offers", lambda **asked: [row | blank])
    (offer,) = provider.offers(Need(strict=False))
    assert (offer.id, offer.verified) == (row["id"], False)
    assert (offer.ram_mb, offer.disk_gb, offer.inet_down_mbps, offer.reliability, offer.direct_ports) == (0, 0, 0, 0, 0)


def test_a_row_that_makes_no_sense_is_a_box_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the list; nobody could end it, or any other, if it hid them."""
    rows = [{"id": 7, "label": "selfhost-q-1", "dph_total": "soon"}, {"id": 8, "label": "mine", "machine_id": []}]
    provider = VastProvider("key", "http://127.0.0.1:9", clock=FakeClock())
    monkeypatch.setattr(provider._sdk, "show_instances_v1", lambda asked: {"instances": rows, "next_token": None})
    first, second = provider.instances("")
    assert (first.id, first.label, first.state) == (7, "selfhost-q-1", BoxState.PENDING)
    assert "row of box 7 makes no sense" in first.message
    assert (second.id, second.label, second.dph_total) == (8, "mine", 0.0)


def test_a_wrong_key_is_refused_with_a_remedy(market: MarketProcess) -> None:
    with pytest.raises(KeyRefused) as caught:
        VastProvider("wrong", market.url).account()
    assert "SELFHOST_API_KEY" in caught.value.remedy


def test_a_market_that_is_not_there_is_unreachable_after_a_few_tries() -> None:
    clock = FakeClock()
    with pytest.raises(MarketUnreachable):
        VastProvider("key", "http://127.0.0.1:9", clock=clock).account()
    assert len(clock.sleeps) == 3


def test_a_key_is_never_in_what_is_said(market: MarketProcess) -> None:
    with pytest.raises(MarketUnreachable) as caught:
        VastProvider("secret\r", market.url, clock=FakeClock()).account()
    assert "secret" not in caught.value.message


def test_neither_netrc_nor_a_proxy_comes_between_us_and_the_market(
    market: MarketProcess, clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clean_environment / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    (clean_environment / ".netrc").chmod(0o600)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert real(market).account().credit > 0


def test_the_vast_command_lines_own_key_is_found(tmp_path: Path) -> None:
    assert cli_key({"HOME": str(tmp_path)}) == ""
    (tmp_path / ".vast_api_key").write_text("old\n")
    assert cli_key({"HOME": str(tmp_path)}) == "old"
    (tmp_path / ".config" / "vastai").mkdir(parents=True)
    (tmp_path / ".config" / "vastai" / "vast_api_key").write_text("new\n")
    assert cli_key({"HOME": str(tmp_path)}) == "new"


@pytest.mark.parametrize("column", ["dph_total", "dph_base", "inet_down_cost"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "soon"])
def test_a_price_that_is_none_is_no_offer(market: MarketProcess, column: str, value: object) -> None:
    rows = market.sdk().search_offers(query={"gpu_name": {"eq": "RTX 4090"}}, no_default=True, limit=1)
    assert _offer(rows[0]) is not None
    assert _offer({**rows[0], column: value}) is None
