"""The parts without a process: offers and filters, the bill, faults."""

from __future__ import annotations

import asyncio
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from selfhost_cli.errors import UsageError
from selfhost_cli.sandbox.billing import Meter
from selfhost_cli.sandbox.catalogue import BadQuery, Catalogue
from selfhost_cli.sandbox.faults import Faults
from selfhost_cli.sandbox.market import Market, Options
from selfhost_cli.sandbox.timeline import Timeline

NOW = 1_800_000_000.0


def search(**query: Any) -> list[dict[str, Any]]:
    return Catalogue(1, NOW).search(query, NOW)


def test_the_same_seed_gives_the_same_offers_and_another_one_other_ids() -> None:
    def ids(seed: int) -> list[int]:
        return [row["id"] for row in Catalogue(seed, NOW).search({}, NOW)]

    assert ids(7) == ids(7)
    assert not set(ids(7)) & set(ids(8))


def test_a_row_has_every_key_of_a_real_one() -> None:
    real = json.loads(resources.files("selfhost_cli.sandbox").joinpath("offer.json").read_text())
    assert all(row.keys() == real.keys() for row in search())


def test_offers_are_varied() -> None:
    rows = search()
    cards = {row["gpu_name"] for row in rows}
    assert {"RTX 4090", "RTX 4090 D", "RTX 3090", "RTX 5090", "A100 SXM4"} <= cards
    assert len(rows) > len({row["machine_id"] for row in rows}), "some machines are offered in several sizes"
    assert {row["verification"] for row in rows} == {"verified", "unverified", "deverified"}
    assert max(row["internet_down_cost_per_tb"] for row in rows) == 52.0
    assert any(row["cpu_ram"] < 32_000 for row in rows)
    assert any(row["disk_space"] < 60 for row in rows)


def test_rtx_4090_d_is_another_gpu() -> None:
    assert {row["gpu_name"] for row in search(gpu_name={"eq": "RTX 4090"})} == {"RTX 4090"}


@pytest.mark.parametrize(
    ("query", "holds"),
    [
        ({"gpu_ram": {"gte": 80_000}}, lambda row: row["gpu_ram"] >= 80_000),
        ({"inet_down": {"gt": 905, "lt": 5000}}, lambda row: 905 < row["inet_down"] < 5000),
        ({"reliability": {"lte": 0.98}}, lambda row: row["reliability"] <= 0.98),
        ({"gpu_name": {"in": ["RTX 3090", "RTX 5090"]}}, lambda row: row["gpu_name"] in ("RTX 3090", "RTX 5090")),
        ({"gpu_name": {"notin": ["RTX 4090"]}}, lambda row: row["gpu_name"] != "RTX 4090"),
        ({"num_gpus": {"neq": 1}}, lambda row: row["num_gpus"] > 1),
        ({"num_gpus": {"eq": "2"}}, lambda row: row["num_gpus"] == 2),
        ({"verified": {"eq": True}}, lambda row: row["verification"] == "verified"),
        ({"datacenter": {"eq": True}}, lambda row: row["hosting_type"] == 1),
        ({"geolocation": {"notin": ["CN", "VN"]}}, lambda row: row["geolocation"][-2:] not in ("CN", "VN")),
        ({"geolocation": {"eq": "Quebec, CA"}}, lambda row: row["geolocation"] == "Quebec, CA"),
        ({"duration": {"lt": 86_400}}, lambda row: row["duration"] < 86_400),
        ({"driver_version": {"gte": 570000000}}, lambda row: row["driver_vers"] >= 570000000),
    ],
)
def test_filters_are_applied(query: dict[str, Any], holds: Any) -> None:
    everything = search()
    kept = search(**query)
    assert kept
    assert {row["id"] for row in kept} == {row["id"] for row in everything if holds(row)}


def test_external_null_counts_as_false_and_a_field_that_there_is_not_is_ignored() -> None:
    assert len(search(external={"eq": False}, no_such={"eq": 1})) == len(search())


def test_a_filter_on_id_matches_nothing_but_one_on_ask_contract_id_does() -> None:
    wanted = search()[3]["id"]
    assert search(id={"eq": wanted}) == []
    assert [row["id"] for row in search(ask_contract_id={"eq": wanted})] == [wanted]


@pytest.mark.parametrize(
    "query",
    [{"verified": True}, {"num_gpus": {"is": 1}}, {"gpu_name": {"in": "RTX"}}, {"type": "free"}, {"limit": "many"}],
)
def test_a_query_that_makes_no_sense_is_refused(query: dict[str, Any]) -> None:
    with pytest.raises(BadQuery):
        search(**query)


def test_order_and_limit() -> None:
    prices = [row["dph_total"] for row in search(order=[["dph_total", "asc"]], limit=5)]
    assert prices == sorted(prices)
    assert len(prices) == 5
    down = [row["inet_down"] for row in search(order=[["inet_down", "desc"], ["id", "asc"]])]
    assert down == sorted(down, reverse=True)
    assert len(search(limit=1000)) <= 64


def test_the_price_includes_the_disk_asked_for() -> None:
    for small, large in zip(
        search(allocated_storage=10, order=[["id", "asc"]]),
        search(allocated_storage=110, order=[["id", "asc"]]),
        strict=True,
    ):
        assert large["dph_total"] - small["dph_total"] == pytest.approx(small["storage_cost"] * 100 / 720)
        assert large["dph_total"] == pytest.approx(large["dph_base"] + large["storage_total_cost"])
        assert large["search"]["totalHour"] == large["dph_total"]


def test_the_meter_bills_the_disk_from_creation_the_gpu_while_running_and_bytes() -> None:
    meter = Meter(gpu_hour=3.6, disk_hour=0.36, down_per_gb=0.002, up_per_gb=0.004, since=NOW)
    assert meter.bill(NOW + 100).total == pytest.approx(0.01)
    meter.switch(NOW + 100, gpu=True, disk=True)
    assert meter.rates == (3.6, 0.36)
    meter.switch(NOW + 300, gpu=False, disk=True)
    meter.switch(NOW + 400, gpu=False, disk=False)
    meter.down_bytes, meter.up_bytes = 5_000_000_000, 1_000_000_000
    bill = meter.bill(NOW + 10_000)
    assert bill.gpu == pytest.approx(0.2)
    assert bill.disk == pytest.approx(0.04)
    assert (bill.down, bill.up) == (pytest.approx(0.01), pytest.approx(0.004))
    assert meter.rates == (0, 0)


def test_a_fault_happens_as_often_as_it_was_set_and_the_one_aimed_at_an_offer_first() -> None:
    faults = Faults()
    faults.add("offer_gone", {"spelling": "410"}, calls=2)
    faults.add("offer_gone", {"spelling": "200"}, offer=5, calls=1)
    taken = [faults.take("offer_gone", offer=offer) for offer in (5, 5, 6, 7)]
    assert [options and options["spelling"] for options in taken] == ["200", "410", "410", None]


def test_a_fault_without_calls_stays_until_it_is_cleared() -> None:
    faults = Faults()
    faults.add("boot_stuck", {})
    assert all(faults.take("boot_stuck", offer=offer) == {"stage": "loading"} for offer in range(3))
    faults.clear()
    assert faults.take("boot_stuck", offer=1) is None


def test_a_fault_can_wait_for_its_turn_and_be_meant_for_one_call() -> None:
    faults = Faults()
    faults.add("answer_lost", {"call": "list"}, skip=2, calls=1)
    asked = ["list", "create", "list", "list", "list"]
    assert [faults.take("answer_lost", call=call) is not None for call in asked] == [False, False, False, True, False]
    faults.add("rate_limited", {}, calls=1)
    assert faults.take("rate_limited", call="charges") is not None, "any call is meant"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("earthquake", {}),
        ("offer_gone", {"spelling": "418"}),
        ("slow_boot", {"lunch": 1}),
        ("slow_boot", {"null": -1}),
        ("listed_late", {"seconds": None}),
        ("listed_late", {"seconds": float("inf")}),
        ("answer_lost", {"effect": 1}),
        ("answer_lost", {"call": "lunch"}),
    ],
)
def test_a_fault_that_there_is_not_is_refused(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Faults().add(kind, options)


@pytest.mark.parametrize("aim", [{"calls": "many"}, {"skip": -1}, {"offer": 0.5}])
def test_an_aim_that_makes_no_sense_is_refused(aim: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Faults().add("offer_gone", {}, **aim)


def test_who_sleeps_on_the_markets_time_wakes_when_it_is_moved_however_far() -> None:
    async def scenario() -> list[str]:
        timeline, woken = Timeline(lambda: NOW), []

        async def sleeper(seconds: float) -> None:
            await timeline.sleep(seconds)
            woken.append(f"{seconds:g} at {timeline() - NOW:g}")

        timeline.stop(True)
        sleepers = [asyncio.create_task(sleeper(seconds)) for seconds in (60, 3600)]
        for step in (0, 59, 1, 10_000):
            timeline.advance(step)
            for _ in range(20):
                await asyncio.sleep(0)
        await asyncio.wait(sleepers, timeout=10)
        return woken

    assert asyncio.run(scenario()) == ["60 at 60", "3600 at 10060"]


def test_the_markets_time_stands_still_and_runs_on_from_there_and_never_goes_back() -> None:
    system = [NOW]
    timeline = Timeline(lambda: system[0])
    timeline.advance(10)
    system[0] += 1
    timeline.stop(True)
    system[0] += 100
    assert timeline() == NOW + 11
    timeline.stop(False)
    system[0] += 5
    assert timeline() == NOW + 16
    with pytest.raises(ValueError, match="ahead only"):
        timeline.advance(-1)


def test_a_new_price_bills_what_comes_after_it_only() -> None:
    meter = Meter(gpu_hour=3.6, disk_hour=0.0, down_per_gb=0.0, up_per_gb=0.0, since=NOW)
    meter.switch(NOW, gpu=True, disk=True)
    meter.reprice(NOW + 100, 7.2)
    assert meter.bill(NOW + 200).gpu == pytest.approx(0.1 + 0.2)
    assert meter.rates == (7.2, 0.0)


def test_an_hour_on_the_markets_clock_is_billed_as_an_hour(tmp_path: Path) -> None:
    """The clock is an argument: charges and the bill of a rental that costs only its disk, to the cent."""
    clock = [NOW]

    async def rent_for_an_hour() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        market = Market(Options(state=tmp_path, api_key="k"), clock=lambda: clock[0])
        async with TestClient(TestServer(market.app)) as client:
            control = {"Authorization": f"Bearer {market.control_token}"}
            account = {"Authorization": "Bearer k"}
            stuck = {"fault": "boot_stuck", "stage": "null"}
            assert (await client.post("/control/faults", json=stuck, headers=control)).status == 200
            offers = await (await client.post("/api/v0/bundles/", json={"disk_space": {"gte": 100}})).json()
            offer = offers["offers"][0]
            body = {"image": "i", "disk": 72}
            created = await client.put(f"/api/v0/asks/{offer['id']}/", json=body, headers=account)
            assert created.status == 200
            clock[0] += 3600
            billed = await (await client.get("/control/billed", headers=control)).json()
            charges = await (await client.get("/api/v0/charges/", headers=account)).json()
            await market.instances.close()
        return offer, billed, charges

    offer, billed, charges = asyncio.run(rent_for_an_hour())
    disk = offer["storage_cost"] * 72 / 720
    assert billed["instances"][0]["total"] == pytest.approx(disk)
    assert billed["instances"][0]["disk_hour"] == pytest.approx(disk)
    assert charges["results"][0]["amount"] == pytest.approx(disk)
    assert charges["results"][0]["end"] - charges["results"][0]["start"] == 3600
