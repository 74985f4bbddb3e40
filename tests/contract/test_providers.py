"""What `providers.Provider` promises, kept by the real SDK on the sandbox market and by the fake that tests use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.errors import KeyRefused, MarketUnreachable, OfferGone
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
    """A provider, and how to make its next create fail because the offer is gone."""

    provider: Provider
    take_the_offer_away: Callable[[], None]


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
        fake = FakeMarket(FakeClock())
        yield Case(fake, lambda: setattr(fake, "gone", 1))
        return
    market: MarketProcess = request.getfixturevalue("market")
    yield Case(real(market), lambda: market.set("/faults", fault="offer_gone", calls=1))
    market.destroy_all()
    market.control.delete("/faults")


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
    charges = case.provider.charges(number, time.time() - 60)
    assert charges is None or min(charges.gpu, charges.disk, charges.down, charges.up) >= 0
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
