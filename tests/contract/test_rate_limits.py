"""The real SDK on a market that keeps to its documented limits: nobody is ever told that it asks too often."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from selfhost_cli.errors import MarketError, MarketUnreachable, TooOften
from selfhost_cli.model import BoxSpec, Need, Offer
from selfhost_cli.providers.pacing import Pacer
from selfhost_cli.providers.vast import LIMITS, VastProvider, _retry_after
from selfhost_cli.remote.ssh import make_key
from selfhost_cli.sandbox.answers import INTERVALS, PENALTIES
from tests.sandbox.market_process import MarketProcess, SharedClock

NEED = Need(disk_gb=30.0, hours=0.1)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MarketProcess]:
    process = MarketProcess(tmp_path_factory.mktemp("market"))
    process.set("/settings", real_boxes=False)
    yield process
    process.close()


class Bench:
    """Three providers of three processes, on the market's own clock; `pace` 0 is as if there were no turns."""

    def __init__(self, market: MarketProcess, folder: Path, pace: float = 1.0) -> None:
        self.market = market
        self.clock = SharedClock(market)
        self.book = folder / "turns.sqlite3"
        self.providers = [self.provider(pace) for _ in range(3)]

    def provider(self, pace: float = 1.0) -> VastProvider:
        pacer = Pacer(self.book, self.market.url, pace, clock=self.clock)
        return VastProvider(self.market.facts["api_key"], self.market.url, pacer=pacer, clock=self.clock)

    def refused(self) -> Counter[str]:
        """How often the market said 429, by path."""
        return Counter(row["path"] for row in self.market.asked() if row["status"] == 429)

    def offer(self) -> Offer:
        return self.providers[0].offers(NEED)[0]


def spec(name: str) -> BoxSpec:
    return BoxSpec(f"selfhost-rates-{name}", "some/image:1", 30.0, "true")


@pytest.fixture
def bench(market: MarketProcess, tmp_path: Path) -> Iterator[Bench]:
    yield from _bench(market, tmp_path, 1.0)


@pytest.fixture
def hasty(market: MarketProcess, tmp_path: Path) -> Iterator[Bench]:
    yield from _bench(market, tmp_path, 0.0)


def _bench(market: MarketProcess, folder: Path, pace: float) -> Iterator[Bench]:
    market.advance(120)  # whatever the test before asked is forgotten
    market.control.delete("/requests")
    yield Bench(market, folder, pace)
    market.control.delete("/faults")
    market.destroy_all()


def everything_thrice(bench: Bench) -> None:
    """Every verb by three processes, one right after the other, again and again."""
    public = make_key("test")[1]
    for _ in range(3):
        offers = [provider.offers(NEED)[number] for number, provider in enumerate(bench.providers)]
        made = [0, 0, 0]
        for number, provider in enumerate(bench.providers):
            with suppress(MarketUnreachable):  # the paid call is not repeated
                made[number] = provider.create(offers[number], spec(str(number)))
        verbs: list[Callable[[VastProvider, int], object]] = [
            lambda provider, box: provider.instances("selfhost-"),
            lambda provider, box: provider.get(box),
            lambda provider, box: provider.account(),
            lambda provider, box: provider.register_key(public),
            lambda provider, box: provider.attach_key(box, public) if box else None,
            lambda provider, box: provider.charges([box], bench.clock.now - 60),
            lambda provider, box: provider.destroy(box),
        ]
        for verb in verbs:
            for provider, box in zip(bench.providers, made, strict=True):
                verb(provider, box)


def test_three_processes_that_do_all_there_is_to_do_are_never_told_off(bench: Bench) -> None:
    bench.market.set("/faults", fault="rate_intervals")
    everything_thrice(bench)
    assert bench.refused() == Counter()
    asked = bench.market.asked("PUT")
    assert len(asked) == 9
    assert min(b["at"] - a["at"] for a, b in itertools.pairwise(asked)) >= 5


def test_without_turns_the_same_calls_are_told_off(hasty: Bench) -> None:
    """So that the test above can fail."""
    hasty.market.set("/faults", fault="rate_intervals")
    everything_thrice(hasty)
    assert set(hasty.refused()) >= {"/api/v1/instances/", "/api/v0/ssh/", "/api/v0/charges/"}


def test_every_interval_that_the_market_documents_is_in_our_table() -> None:
    for call, (most, seconds) in INTERVALS.items():
        if call == "change":  # the watchdog's, with a key of its own
            continue
        limit = LIMITS[call]
        assert limit.burst + seconds / limit.every <= most + 1
        assert limit.penalty >= PENALTIES.get(call, 5.0)


@pytest.mark.parametrize("form", ["plain", "json", "detail"])
def test_a_rate_limit_silences_the_other_processes_too_but_for_that_call_only(bench: Bench, form: str) -> None:
    one, other, _ = bench.providers
    made = one.create(bench.offer(), spec("1"))
    bench.market.set("/faults", fault="rate_limited", call="list", form=form, retry_after=90, calls=1)
    with pytest.raises(MarketUnreachable, match="90 s of silence"):
        one.instances("selfhost-")
    asked = len(bench.market.asked())
    with pytest.raises(MarketUnreachable, match="another 90 s"):
        other.instances("selfhost-")
    assert len(bench.market.asked()) == asked, "nothing was sent"
    before = bench.clock.now
    other.destroy(made)
    assert bench.clock.now == before, "a destroy is not behind it"
    bench.clock.sleep(50)
    assert other.instances("selfhost-") == []
    assert 90 <= bench.clock.now - before < 95


def test_a_create_that_came_too_early_keeps_every_process_from_the_next_one_for_long_enough(bench: Bench) -> None:
    one, other, _ = bench.providers
    offer = bench.offer()
    bench.market.set("/faults", fault="rate_intervals")
    # Somebody who does not keep turns, with the same key.
    VastProvider(bench.market.facts["api_key"], bench.market.url, clock=bench.clock).create(offer, spec("1"))
    with pytest.raises(MarketUnreachable, match="12 s of silence"):
        one.create(bench.offer(), spec("2"))
    before = bench.clock.now
    other.create(bench.offer(), spec("3"))
    assert 12 <= bench.clock.now - before < 14
    assert sum(bench.refused().values()) == 1


def test_a_create_whose_turn_is_far_away_is_not_sent_and_makes_nothing(bench: Bench) -> None:
    one, other, _ = bench.providers
    offer = bench.offer()
    bench.market.set("/faults", fault="rate_limited", call="create", retry_after=40, calls=1)
    with pytest.raises(TooOften, match="40 s of silence") as told:
        one.create(offer, spec("1"))
    with pytest.raises(TooOften, match="another 40 s") as refused:
        other.create(offer, spec("2"))
    assert [round(caught.value.seconds) for caught in (told, refused)] == [40, 40]
    assert (len(bench.market.asked("PUT")), bench.clock.sleeps) == (1, [])


def answer(headers: dict[str, str], body: str = "too frequent") -> requests.Response:
    response = requests.Response()
    response.status_code, response._content = 429, body.encode()
    response.headers.update(headers)
    return response


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({}, "API requests too frequent", 0.0),
        ({"Retry-After": "17"}, "", 17.0),
        ({"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}, "", 30.0),
        ({"Retry-After": "soon"}, "", 0.0),
        ({"Retry-After": "nan"}, "", 0.0),
        ({}, '{"success": false, "retry_after": 8.5}', 8.5),
        ({}, '{"retry_after": {"no": "number"}}', 0.0),
        ({}, "[]", 0.0),
    ],
)
def test_the_silence_that_the_market_asks_for_is_read_in_every_form(
    headers: dict[str, str], body: str, seconds: float
) -> None:
    assert _retry_after(answer(headers, body), now=784_111_747.0) == seconds


def test_a_login_key_that_is_there_is_attached_and_one_that_the_market_does_not_take_is_told(bench: Bench) -> None:
    provider, public = bench.providers[0], make_key("test")[1]
    number = provider.create(bench.offer(), spec("1"))
    for _ in range(2):
        provider.attach_key(number, public)
    asked: list[dict[str, Any]] = [row for row in bench.market.asked() if row["path"].rstrip("/").endswith("/ssh")]
    assert len(asked) == 2
    bench.market.set("/faults", fault="odd_answer", call="attach", shape="unsuccessful", calls=1)
    with pytest.raises(MarketError, match=f"box {number}: Something went wrong") as caught:
        provider.attach_key(number, public)
    assert type(caught.value) is MarketError
