"""Every switch of the market, met by the real SDK as our provider uses it: what a call returns or raises then.

Without boxes, and on the market's own clock: those that need a real sshd are in test_sandbox_boxes.py.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.errors import AnswerLost, KeyRefused, MarketError, MarketUnreachable, NoCredit
from selfhost_cli.model import BoxSpec, BoxState, Endpoint, Instance, Need, Offer
from selfhost_cli.providers.vast import VastProvider
from selfhost_cli.sandbox import faults
from tests.sandbox.market_process import MarketProcess, SharedClock
from tests.waiting import until

PREFIX = "selfhost-faults-"
ODD = ("null", "empty", "html", "unsuccessful")


class Bench:
    """A provider on a market whose faults are switched, and what is asked again and again."""

    def __init__(self, market: MarketProcess) -> None:
        self.market = market
        self.clock = SharedClock(market)
        self.provider = VastProvider(market.facts["api_key"], market.url, clock=self.clock, timeout=0.5)
        self.offer: Offer = self.provider.offers(Need(disk_gb=30.0, hours=0.1))[0]

    def fault(self, fault: str, **options: Any) -> None:
        self.market.set("/faults", fault=fault, **options)

    def rent(self, name: str = "1", offer: Offer | None = None) -> int:
        return self.provider.create(offer or self.offer, BoxSpec(PREFIX + name, "some/image:1", 30.0, "true"))

    def running(self) -> int:
        number = self.rent()
        self.until_state(number, BoxState.RUNNING)
        return number

    def get(self, number: int) -> Instance:
        box = self.provider.get(number)
        assert box is not None
        return box

    def until_state(self, number: int, state: BoxState) -> Instance:
        return until(lambda: (box := self.get(number)) and box.state is state and box) or self.get(number)

    def listed(self) -> list[int]:
        return [box.id for box in self.provider.instances(PREFIX)]

    def billed(self) -> list[tuple[bool, bool]]:
        """(GPU, disk) of what is billed now."""
        return [(row["gpu_hour"] > 0, row["disk_hour"] > 0) for row in self.market.billed()["instances"]]

    def row(self, number: int) -> dict[str, Any]:
        with self.market.http(self.market.facts["api_key"]) as http:
            row: dict[str, Any] = http.get(f"/api/v0/instances/{number}/").json()["instances"]
        return row


@pytest.fixture
def bench(clean: MarketProcess) -> Bench:
    clean.set("/settings", real_boxes=False)
    bench = Bench(clean)
    clean.control.delete("/requests")
    return bench


# --- the paid call ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effect", [True, False])
@pytest.mark.parametrize("how", ["408", "500", "502", "503", "504", "drop", "cut", "hang"])
def test_a_create_whose_answer_is_lost_is_sent_once_and_only_its_label_can_tell(
    bench: Bench, how: str, effect: bool
) -> None:
    bench.fault("answer_lost", call="create", how=how, effect=effect, calls=1)
    with pytest.raises(AnswerLost, match=str(bench.offer.id)):
        bench.rent()
    assert len(bench.market.asked("PUT")) == 1
    assert len(until(lambda: bench.listed() if effect else [0])) == 1
    assert bench.market.billed()["count"] == len(bench.listed()) == effect


@pytest.mark.parametrize("shape", ODD)
def test_a_create_whose_answer_is_odd_counts_as_lost(bench: Bench, shape: str) -> None:
    bench.fault("odd_answer", call="create", shape=shape, calls=1)
    with pytest.raises(AnswerLost):
        bench.rent()
    assert len(bench.listed()) == len(bench.market.asked("PUT")) == 1


@pytest.mark.parametrize("status", ["200", "400", "500"])
def test_an_error_that_carries_a_contract_is_a_box(bench: Bench, status: str) -> None:
    bench.fault("contract_in_error", status=status, calls=1)
    number = bench.rent()
    assert bench.listed() == [number]
    assert bench.billed() == [(False, True)]
    assert bench.get(number).state is BoxState.FAILED


@pytest.mark.parametrize(
    ("why", "error", "words"),
    [
        ("insufficient_credit", NoCredit, "lacks credit"),
        ("spend_limit", MarketError, "spend rate limit"),
        ("no_ssh_key_for_vm", MarketError, "SSH key"),
    ],
)
def test_what_the_account_may_not_do_is_told_and_is_no_reason_to_try_another_offer(
    bench: Bench, why: str, error: type[MarketError], words: str
) -> None:
    bench.fault("create_refused", why=why, calls=1)
    with pytest.raises(MarketError, match=words) as caught:
        bench.rent()
    assert type(caught.value) is error
    assert bench.market.billed()["count"] == 0


def test_a_create_that_comes_too_early_is_not_repeated_and_makes_nothing(bench: Bench) -> None:
    bench.fault("rate_limited", call="create", retry_after=12, calls=1)
    with pytest.raises(MarketUnreachable) as caught:
        bench.rent()
    assert "12 s of silence" in caught.value.message
    assert (len(bench.market.asked("PUT")), bench.clock.sleeps, bench.listed()) == (1, [], [])


def test_a_fault_can_be_aimed_at_one_offer(bench: Bench) -> None:
    other = bench.provider.offers(Need(disk_gb=30.0, hours=0.1))[1]
    bench.fault("create_refused", why="spend_limit", offer=other.id)
    bench.rent("a")
    with pytest.raises(MarketError, match=str(other.id)):
        bench.rent("b", other)


@pytest.mark.parametrize("after", [0, 600])
def test_a_price_that_rises_is_what_the_row_says_and_what_is_billed(bench: Bench, after: int) -> None:
    bench.fault("price_rises", factor=3, after=after, calls=1)
    number = bench.running()
    dearer = bench.offer.dph_base * 3 + bench.offer.storage_dph
    if after:
        assert bench.get(number).dph_total == pytest.approx(bench.offer.dph_total)
        bench.market.advance(after)
    until(lambda: bench.get(number).dph_total > bench.offer.dph_total)
    assert bench.get(number).dph_total == pytest.approx(dearer)
    before = bench.market.billed()["total"]
    bench.market.advance(3600)
    assert bench.market.billed()["total"] - before == pytest.approx(dearer, rel=0.01)


# --- any answer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "json", "detail"])
@pytest.mark.parametrize(("retry_after", "waited"), [(None, 5.0), (1, 5.0), (20, 20.0)])
def test_a_rate_limit_is_waited_out_as_long_as_the_market_says_and_at_least_as_long_as_it_documents(
    bench: Bench, form: str, retry_after: int | None, waited: float
) -> None:
    bench.fault("rate_limited", call="list", form=form, retry_after=retry_after, calls=2)
    assert bench.listed() == []
    assert bench.clock.sleeps == [waited, waited]


def test_a_rate_limit_that_asks_for_more_than_a_minute_is_told_at_once(bench: Bench) -> None:
    bench.fault("rate_limited", call="list", retry_after=90)
    with pytest.raises(MarketUnreachable) as caught:
        bench.listed()
    assert "90 s of silence" in caught.value.message
    assert bench.clock.sleeps == []


def test_a_rate_limit_without_end_is_unknown_after_a_few_tries(bench: Bench) -> None:
    bench.fault("rate_limited")
    with pytest.raises(MarketUnreachable, match="too often"):
        bench.listed()
    assert len(bench.market.asked()) == 4


def test_the_daily_search_quota_is_no_rate_limit_to_wait_for(bench: Bench) -> None:
    bench.fault("rate_limited", call="search", form="quota")
    with pytest.raises(MarketError, match="quota") as caught:
        bench.provider.offers(Need())
    assert type(caught.value) is MarketError
    assert len(bench.market.asked()) == 1


def test_who_asks_more_often_than_documented_is_limited(bench: Bench) -> None:
    number = bench.rent()
    bench.fault("rate_intervals")
    assert bench.get(number)
    assert bench.clock.sleeps == []
    assert bench.get(number), "the second within 2 s is refused, and waited for"
    assert bench.clock.sleeps == [5.0]
    for _ in range(10):
        bench.provider.offers(Need())
    assert bench.clock.sleeps == [5.0]
    with pytest.raises(MarketUnreachable):  # ten searches a minute are allowed
        bench.provider.offers(Need())


@pytest.mark.parametrize("how", ["500", "502", "503", "504", "drop"])
def test_a_market_that_is_down_for_minutes_is_unknown_and_comes_back(bench: Bench, how: str) -> None:
    number = bench.rent()
    bench.fault("market_down", seconds=120, how=how)
    for ask in (
        bench.listed,
        bench.provider.account,
        lambda: bench.provider.get(number),
        lambda: bench.provider.destroy(number),
        lambda: bench.provider.offers(Need()),
        lambda: bench.provider.charges([number], 0.0),
    ):
        with pytest.raises(MarketUnreachable):
            ask()
    with pytest.raises(AnswerLost):
        bench.rent("2")
    assert bench.market.billed()["count"] == 1, "neither the create nor the destroy had an effect"
    bench.market.advance(120)
    assert bench.listed() == [number]


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_an_account_key_that_is_refused_says_so_whatever_is_asked(bench: Bench, status: str) -> None:
    number = bench.rent()
    bench.fault("key_refused", whose="account", status=status)
    asks: list[Callable[[], object]] = [
        bench.provider.account,
        bench.listed,
        lambda: bench.get(number),
        lambda: bench.rent("2"),
        lambda: bench.provider.destroy(number),
    ]
    for ask in asks:
        with pytest.raises(KeyRefused):
            ask()
    assert bench.market.billed()["count"] == 1


def test_a_boxs_own_key_can_be_refused_while_the_accounts_is_not(bench: Bench) -> None:
    answer = bench.market.sdk().create_instance(id=bench.offer.id, image="i", disk=20, label=PREFIX)
    bench.fault("key_refused", whose="box", status="403")
    with bench.market.http(answer["instance_api_key"]) as box:
        path = f"/api/v0/instances/{answer['new_contract']}/"
        assert box.put(path, json={"state": "running"}).status_code == 403
        assert box.request("DELETE", path, json={}).status_code == 403
    assert bench.listed() == [answer["new_contract"]]


@pytest.mark.parametrize("shape", ODD)
def test_no_odd_answer_is_taken_for_news(bench: Bench, shape: str) -> None:
    number = bench.rent()
    bench.fault("odd_answer", call="any", shape=shape)
    asks: list[Callable[[], object]] = [
        bench.provider.account,
        bench.listed,
        lambda: bench.provider.get(number),
        lambda: bench.provider.offers(Need()),
        lambda: bench.provider.charges([number], 0.0),
        lambda: bench.provider.destroy(number),
    ]
    for ask in asks:
        with pytest.raises(MarketUnreachable):
            ask()


# --- reading ------------------------------------------------------------------------------------------------------


ODD_LISTS = (*ODD, "refusal", "no_rows", "hollow", "bad_row", "no_token", "endless")


@pytest.mark.parametrize("shape", ODD_LISTS)
def test_an_odd_list_is_unknown_though_there_is_a_box(bench: Bench, shape: str) -> None:
    bench.rent()
    bench.fault("odd_answer", call="list", shape=shape)
    with pytest.raises(MarketUnreachable):
        bench.listed()


@pytest.mark.parametrize("shape", sorted({*ODD_LISTS} - {"hollow"}))
def test_an_odd_list_is_unknown_and_never_none(bench: Bench, shape: str) -> None:
    bench.fault("odd_answer", call="list", shape=shape)
    with pytest.raises(MarketUnreachable):
        bench.listed()


def test_a_new_box_that_reads_as_null_is_in_the_list_all_the_same(bench: Bench) -> None:
    number = bench.rent()
    bench.fault("show_null", calls=2)
    assert [bench.provider.get(number), bench.provider.get(number)] == [None, None]
    assert bench.listed() == [number]
    assert bench.get(number).id == number


@pytest.mark.parametrize("fields", ["start_date", "extra_env", "all"])
def test_a_row_with_nulls_hides_neither_itself_nor_another(bench: Bench, fields: str) -> None:
    number, second = bench.running(), bench.rent("2", bench.provider.offers(Need(disk_gb=30.0, hours=0.1))[1])
    bench.fault("null_fields", fields=fields, offer=bench.offer.id)
    sdk = bench.market.sdk()
    with pytest.raises(TypeError):
        sdk.show_instances()  # why the provider does not use that
    assert bench.listed() == [number, second]
    box = bench.get(number)
    assert box.start is None or fields == "extra_env"
    assert box.state is (BoxState.PENDING if fields == "all" else BoxState.RUNNING)


def test_the_list_may_lag_after_a_create(bench: Bench) -> None:
    bench.fault("listed_late", seconds=40, calls=1)
    number = bench.rent()
    assert bench.listed() == []
    assert bench.get(number).id == number
    bench.market.advance(39)
    assert bench.listed() == []
    bench.market.advance(1)
    assert bench.listed() == [number]


def test_the_list_may_lag_after_a_destroy(bench: Bench) -> None:
    number = bench.rent()
    bench.fault("listed_long", seconds=45, calls=1)
    bench.provider.destroy(number)
    assert bench.market.billed()["count"] == 0
    assert bench.listed() == [number]
    assert bench.provider.get(number) is None
    bench.provider.destroy(number)
    bench.market.advance(45)
    assert bench.listed() == []


def test_every_page_of_the_list_is_read(bench: Bench) -> None:
    offers = bench.provider.offers(Need(disk_gb=30.0, hours=0.1))
    rented = sorted(bench.rent(str(number), offer) for number, offer in enumerate(offers[:5]))
    bench.market.control.delete("/requests")
    bench.fault("short_pages", rows=2)
    assert bench.listed() == rented
    assert len(bench.market.asked()) == 3
    bench.fault("answer_lost", call="list", how="500", skip=2)
    with pytest.raises(MarketUnreachable):  # the last page is missing
        bench.listed()


def test_every_page_of_the_charges_is_read(bench: Bench) -> None:
    offers = bench.provider.offers(Need(disk_gb=30.0, hours=0.1))
    rented = [bench.rent(str(number), offer) for number, offer in enumerate(offers[:9])]
    bench.market.advance(3600)
    bench.fault("short_pages", call="charges", rows=7)  # of a hundred that other tests left
    since = bench.clock.time() - 400 * 86_400
    charges = bench.provider.charges([*rented, 7], since)
    assert set(charges) == set(rented)
    assert min(one.disk for one in charges.values()) > 0


# --- starting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["created", "loading"])
def test_a_boot_that_hangs_is_pending_for_hours_and_bills_its_disk(bench: Bench, stage: str) -> None:
    bench.fault("boot_stuck", stage=stage, calls=1)
    number = bench.rent()
    until(lambda: bench.get(number).status == stage)
    bench.market.advance(4 * 3600)
    assert bench.get(number).state is BoxState.PENDING
    assert bench.billed() == [(False, True)]


def test_a_slow_boot_takes_its_time_on_the_markets_clock(bench: Bench) -> None:
    bench.fault("slow_boot", null=60, created=60, loading=3600, calls=1)
    number = bench.rent()
    for status, seconds in (("accepted", 60), ("created", 60), ("loading", 3600)):
        until(lambda expected=status: bench.get(number).status == expected)  # type: ignore[misc]
        bench.market.advance(seconds)
    assert bench.until_state(number, BoxState.RUNNING).status == "running"


@pytest.mark.parametrize(
    ("why", "state", "status", "words"),
    [
        ("cdi", BoxState.FAILED, "created", "failed to inject CDI devices"),
        ("oci", BoxState.FAILED, "created", "OCI runtime create failed"),
        ("cdi_running", BoxState.FAILED, "running", "failed to inject CDI devices"),
        ("manifest", BoxState.IMAGELESS, "loading", "manifest for some/image:1 not found"),
        ("pull_denied", BoxState.IMAGELESS, "loading", "pull access denied"),
    ],
)
def test_a_host_that_cannot_run_the_container_is_known_by_its_message(
    bench: Bench, why: str, state: BoxState, status: str, words: str
) -> None:
    bench.fault("boot_fails", why=why, calls=1)
    number = bench.rent()
    box = bench.until_state(number, state)
    assert box.status == status
    assert words in box.message
    assert bench.row(number)["intended_status"] == "running"
    assert bench.billed() == [(False, True)]


def test_what_the_market_itself_gives_up_on_has_failed_whatever_the_message(bench: Bench) -> None:
    bench.fault("boot_fails", why="other", calls=1)
    number = bench.rent()
    until(lambda: "no luck" in bench.get(number).message)
    assert bench.get(number).state is BoxState.PENDING
    bench.market.advance(420)
    assert bench.until_state(number, BoxState.FAILED).status == "loading"
    assert bench.row(number)["intended_status"] == "stopped"


# --- running ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "shown", "disk"),
    [
        ("offline", "offline", False),
        ("exited", "exited", True),
        ("unknown", "unknown", True),
        ("outbid", "exited", True),
    ],
)
@pytest.mark.parametrize("by", ["itself", "control"])
def test_a_box_that_dies_in_the_middle_has_failed_and_must_still_be_destroyed(
    bench: Bench, status: str, shown: str, disk: bool, by: str
) -> None:
    if by == "itself":
        bench.fault("host_dies", status=status, after=900, calls=1)
        number = bench.running()
        bench.market.advance(900)
    else:
        number = bench.running()
        bench.market.set("/kill", instance=number, status=status)
    assert bench.until_state(number, BoxState.FAILED).status == shown
    assert bench.billed() == [(False, disk)]
    assert (bench.row(number)["intended_status"] == "stopped") == (status == "outbid")
    bench.provider.destroy(number)
    assert bench.listed() == []


@pytest.mark.parametrize("only", ["direct", "proxy"])
@pytest.mark.parametrize("other", ["closed", "absent"])
def test_one_endpoint_may_be_dead_or_not_there_at_all(bench: Bench, only: str, other: str) -> None:
    bench.fault("one_endpoint", only=only, other=other, calls=1)
    box = bench.get(bench.running())
    good, bad = (box.direct, box.proxy) if only == "direct" else (box.proxy, box.direct)
    assert good in box.endpoints
    assert (bad is None) == (other == "absent")
    if bad is not None:
        assert bad != good
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(bad, timeout=5)


def test_an_endpoint_may_move_when_the_box_starts_again(bench: Bench) -> None:
    number = bench.running()
    before = bench.get(number).endpoints
    bench.fault("endpoint_moves", calls=1)
    for expected in (1, 0):
        bench.market.sdk().stop_instance(id=number)
        assert bench.get(number).state is BoxState.FAILED
        bench.market.sdk().start_instance(id=number)
        after = bench.until_state(number, BoxState.RUNNING).endpoints
        assert (after != before) == bool(expected)
        before = after
    assert isinstance(before[0], Endpoint)


def test_a_queued_start_fires_and_bills_later(bench: Bench) -> None:
    number = bench.running()
    sdk = bench.market.sdk()
    bench.fault("start_queued", seconds=600)
    assert sdk.start_instance(id=number)["success"] is True, "it runs: nothing to queue"
    sdk.stop_instance(id=number)
    answer = sdk.start_instance(id=number)
    assert (answer["success"], answer["error"]) == (False, "resources_unavailable")
    row = bench.row(number)
    assert (row["actual_status"], row["cur_state"], row["next_state"]) == ("stopped", "stopped", "running")
    assert bench.get(number).state is BoxState.FAILED
    assert bench.billed() == [(False, True)]
    bench.market.advance(600)
    bench.until_state(number, BoxState.RUNNING)
    assert bench.billed() == [(True, True)]


@pytest.mark.parametrize("end", ["stop", "destroy"])
def test_a_queued_start_is_cancelled_by_a_stop_or_a_destroy(bench: Bench, end: str) -> None:
    number = bench.running()
    sdk = bench.market.sdk()
    bench.fault("start_queued", seconds=600, calls=1)
    sdk.stop_instance(id=number)
    sdk.start_instance(id=number)
    if end == "destroy":
        bench.provider.destroy(number)
    else:
        sdk.stop_instance(id=number)
    for _ in range(3):  # the start itself would take its time
        bench.market.advance(1200)
    assert bench.billed() == ([] if end == "destroy" else [(False, True)])


# --- ending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["408", "500", "502", "drop", "cut", "hang"])
@pytest.mark.parametrize("effect", [True, False])
def test_a_destroy_that_fails_once_is_asked_for_again(bench: Bench, how: str, effect: bool) -> None:
    number = bench.rent()
    bench.fault("answer_lost", call="destroy", how=how, effect=effect, calls=1)
    bench.provider.destroy(number)
    assert [row["status"] for row in bench.market.asked("DELETE")][1:] == [404 if effect else 200]
    assert (bench.listed(), bench.market.billed()["count"]) == ([], 0)


def test_a_destroy_that_always_fails_is_told_and_the_box_goes_on_billing(bench: Bench) -> None:
    number = bench.rent()
    bench.fault("answer_lost", call="destroy", how="500", effect=False)
    with pytest.raises(MarketUnreachable, match="500"):
        bench.provider.destroy(number)
    assert (bench.listed(), bench.market.billed()["count"]) == ([number], 1)


def test_a_destroy_that_is_rate_limited_is_repeated_after_a_pause(bench: Bench) -> None:
    number = bench.rent()
    bench.fault("rate_limited", call="destroy", calls=2)
    bench.provider.destroy(number)
    assert (bench.clock.sleeps, bench.listed()) == ([5.0, 5.0], [])


@pytest.mark.parametrize("effect", [True, False])
def test_a_destroy_that_finds_nothing_proves_nothing(bench: Bench, effect: bool) -> None:
    number = bench.rent()
    bench.fault("destroy_404", effect=effect, calls=1)
    bench.provider.destroy(number)
    assert bench.listed() == ([] if effect else [number]), "the list tells"
    bench.provider.destroy(number)
    assert bench.listed() == []


@pytest.mark.parametrize("spent", ["elsewhere", "here"])
def test_when_the_credit_runs_out_what_runs_is_stopped_and_its_disk_billed(bench: Bench, spent: str) -> None:
    number = bench.running()
    if spent == "elsewhere":
        bench.fault("credit_gone", after=1800)
        bench.market.advance(1799)
        assert bench.provider.account().credit > 0
        bench.market.advance(1)
    else:
        spent_before = bench.market.billed()["total"]
        bench.market.set("/settings", credit=spent_before + bench.offer.dph_total)
        assert bench.provider.account().credit > 0
        bench.market.advance(3700)
    assert bench.provider.account().credit <= 0
    assert bench.until_state(number, BoxState.FAILED).status == "exited"
    row = bench.row(number)
    assert row["cur_state"] == row["intended_status"] == row["next_state"] == "stopped"
    assert bench.billed() == [(False, True)]
    with pytest.raises(NoCredit):
        bench.rent("2")


# --- the table ----------------------------------------------------------------------------------------------------


def test_no_switch_is_without_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tests += (Path(__file__).parent.parent / "contract/test_providers.py").read_text()
    missing = [name for name in faults.KINDS if f'fault("{name}"' not in tests and f'fault="{name}"' not in tests]
    assert not missing


def test_the_documented_table_is_the_one_that_is_switched() -> None:
    page = Path(__file__).parent.parent.parent / "docs/sandbox-market.md"
    assert faults.table() in page.read_text(), "python -m selfhost_cli.sandbox.faults prints it"
