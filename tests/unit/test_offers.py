from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfhost_cli import offers
from selfhost_cli.model import Need, Offer
from selfhost_cli.offers import Download
from tests.fakes.market import make_offer

GB = 1e9
NEED = Need(hours=2.0)
SMALL, LARGE = Download(0.5 * GB, 0.5 * GB), Download(8 * GB, 19 * GB)


def test_the_cheapest_all_in_wins_over_the_cheapest_per_hour_and_it_is_said_why() -> None:
    cheap_hour = make_offer(1, dph_total=0.25, down_per_gb=0.052)
    cheap_total = make_offer(2, dph_total=0.30, down_per_gb=0.002)
    first, second = offers.choose(NEED, [cheap_hour, cheap_total], download=LARGE).ranked
    assert [first.offer, second.offer] == [cheap_total, cheap_hour]
    assert first.note == ""
    assert second.note == "cheaper per hour than 1, dearer for your 2 h: traffic $52/TB"


def test_a_slow_line_is_paid_for_in_hours() -> None:
    fast, slow = make_offer(1, dph_total=0.30), make_offer(2, dph_total=0.30, inet_down_mbps=300.0)
    ranked = offers.choose(NEED, [slow, fast], download=LARGE).ranked
    assert [row.offer for row in ranked] == [fast, slow]
    assert ranked[1].ready_s - ranked[0].ready_s == pytest.approx(27e9 * 8 / 300e6 - 27e9 * 8 / 900e6)
    slow = replace(slow, dph_total=0.29)
    assert offers.choose(replace(NEED, hours=0.5), [slow, fast], download=LARGE).ranked[1].note == (
        "cheaper per hour than 1, dearer for your 0.5 h: 15 min to get ready at 300 Mbit/s"
    )


def test_for_a_longer_session_the_cheaper_hour_wins() -> None:
    cheap_hour = make_offer(1, dph_total=0.25, down_per_gb=0.052)
    cheap_start = make_offer(2, dph_total=0.30, down_per_gb=0.002)
    first = {
        hours: offers.choose(replace(NEED, hours=hours), [cheap_hour, cheap_start], download=LARGE).ranked[0].offer
        for hours in (2.0, 40.0)
    }
    assert first == {2.0: cheap_start, 40.0: cheap_hour}


@pytest.mark.parametrize(
    ("change", "setting", "why"),
    [
        ({"gpu": "RTX 4090 D"}, "gpu", "another card: RTX 4090 D"),
        ({"num_gpus": 2}, "", "more than one GPU: 2"),
        ({"rentable": False}, "", "not rentable now"),
        ({"verified": False}, "", "not verified by the market"),
        ({"gpu_ram_mb": 22_000}, "gpu_ram_mb", "less than 23000 MB of video memory: 22000 MB"),
        ({"ram_mb": 16_000}, "ram_mb", "less than 32 GB of memory: 16 GB"),
        ({"disk_gb": 10.0}, "disk", "less than 60 GB of disk: 10 GB"),
        ({"reliability": 0.9}, "reliability", "reliability below 0.98: 0.900"),
        ({"reliability": float("nan")}, "reliability", "reliability below 0.98: nan"),
        ({"inet_down_mbps": 100.0}, "inet_down_mbps", "slower than 300 Mbit/s down: 100 Mbit/s"),
        ({"inet_down_mbps": float("inf")}, "inet_down_mbps", "slower than 300 Mbit/s down: inf Mbit/s"),
        ({"direct_ports": 0}, "", "no direct port"),
        ({"duration_s": 3600.0}, "hours", "offered for less than 2 h: 1.0 h"),
        ({"duration_s": float("nan")}, "hours", "offered for less than 2 h: nan h"),
        ({"place": "Beijing, CN"}, "region", "not in CA: Beijing, CN"),
        ({"dph_total": 0.9}, "max_price", "above $0.5/h: $0.900/h"),
        ({"down_per_gb": 3.0}, "max_spend", "getting ready alone costs $2 or more: $3.02"),
    ],
)
def test_every_limit_refuses_and_says_why(change: dict[str, object], setting: str, why: str) -> None:
    need = replace(NEED, region="CA", max_price=0.5)
    choice = offers.choose(need, [make_offer(1, **change)], download=SMALL, max_spend=2.0)
    assert not choice.ranked
    assert [(one.why, one.setting) for one in choice.refused] == [(why, setting)]
    assert choice.refused[0].why.startswith(choice.refused[0].rule)


def test_a_line_of_no_speed_is_refused_even_where_any_would_do() -> None:
    choice = offers.choose(replace(NEED, inet_down_mbps=0.0), [make_offer(1, inet_down_mbps=0.0)], download=SMALL)
    assert [one.setting for one in choice.refused] == ["inet_down_mbps"]


def test_a_machine_that_failed_before_is_avoided_and_its_reason_said() -> None:
    choice = offers.choose(NEED, [make_offer(1), make_offer(2)], download=SMALL, avoid={1: "no sshd"})
    assert [ranked.offer.machine_id for ranked in choice.ranked] == [2]
    assert [one.why for one in choice.refused] == ["this machine failed before: no sshd"]


def test_of_one_machine_only_the_cheapest_offer_is_kept() -> None:
    dear, cheap = make_offer(1, id=1, machine_id=7, down_per_gb=0.05), make_offer(2, id=2, machine_id=7)
    choice = offers.choose(NEED, [dear, cheap], download=LARGE)
    assert [ranked.offer for ranked in choice.ranked] == [cheap]
    assert [(refusal.offer, refusal.why) for refusal in choice.refused] == [(dear, offers.SAME_MACHINE)]


ODD = st.sampled_from([0.0, float("nan"), float("inf")])
some_offers = st.lists(
    st.builds(
        make_offer,
        st.integers(1, 6),
        id=st.integers(1, 20),
        dph_total=st.floats(0.05, 2.0),
        down_per_gb=st.floats(0.0, 0.06),
        inet_down_mbps=st.floats(0.0, 2000.0) | ODD,
        disk_gb=st.floats(1.0, 900.0) | ODD,
        reliability=st.floats(0.5, 1.0) | ODD,
        duration_s=st.floats(1e3, 1e6) | ODD,
        gpu=st.sampled_from(["RTX 4090"] * 4 + ["RTX 4090 D"]),
        gpu_ram_mb=st.sampled_from([24_564] * 4 + [16_000]),
        num_gpus=st.sampled_from([1, 1, 1, 2]),
        direct_ports=st.sampled_from([3, 3, 3, 0]),
        place=st.sampled_from(["Quebec, CA", "Texas, US", ""]),
        verified=st.sampled_from([True, True, True, False]),
    ),
    max_size=12,
)
needs = st.builds(
    Need,
    hours=st.floats(0.1, 48.0),
    region=st.sampled_from(["", "", "us"]),
    max_price=st.none() | st.floats(0.1, 1.5),
    inet_down_mbps=st.sampled_from([0.0, 300.0]),
)
downloads = st.builds(Download, st.floats(0.0, 20e9), st.floats(1e8, 60e9))


@given(found=some_offers, need=needs, download=downloads, max_spend=st.floats(0.2, 5.0))
def test_no_choice_breaks_a_limit_and_every_offer_is_ranked_or_refused_with_a_reason(
    found: list[Offer], need: Need, download: Download, max_spend: float
) -> None:
    choice = offers.choose(need, found, download=download, avoid={3: "it failed"}, max_spend=max_spend)
    for ranked in choice.ranked:
        offer = ranked.offer
        assert (offer.gpu, offer.num_gpus, offer.verified, offer.rentable) == (need.gpu, 1, True, True)
        assert offer.machine_id != 3
        assert offer.gpu_ram_mb >= need.gpu_ram_mb
        assert offer.direct_ports >= 1
        assert offer.disk_gb >= need.disk_gb
        assert offer.reliability >= need.reliability
        assert offer.inet_down_mbps >= need.inet_down_mbps
        assert offer.duration_s >= need.hours * 3600
        assert need.region.lower() in offer.place.lower()
        assert need.max_price is None or offer.dph_total <= need.max_price
        assert ranked.dollars - offer.dph_total * need.hours < max_spend + 1e-9
    assert len({ranked.offer.machine_id for ranked in choice.ranked}) == len(choice.ranked)
    seen = [row.offer for row in choice.ranked] + [refusal.offer for refusal in choice.refused]
    assert sorted(map(repr, seen)) == sorted(map(repr, found))
    assert all(refusal.why for refusal in choice.refused)


@given(found=some_offers, need=needs, download=downloads)
def test_the_ranking_is_that_of_the_stated_formula(found: list[Offer], need: Need, download: Download) -> None:
    choice = offers.choose(need, found, download=download)
    dollars = []
    for row in choice.ranked:
        rate = row.offer.inet_down_mbps * 1e6 / 8
        ready_s = offers.BOOT_S + download.image / rate + download.model / rate + offers.LOAD_S
        traffic = (download.image + download.model) / 1e9 * row.offer.down_per_gb
        assert row.ready_s == pytest.approx(ready_s)
        assert row.dollars == pytest.approx(row.offer.dph_total * (ready_s / 3600 + need.hours) + traffic)
        dollars.append(row.dollars)
    assert dollars == sorted(dollars)
    assert [row.rank for row in choice.ranked] == list(range(1, len(dollars) + 1))
    ranked = {row.offer.machine_id: row.dollars for row in choice.ranked}
    for refusal in choice.refused:
        if refusal.rule == offers.SAME_MACHINE:
            again = offers.price(refusal.offer, hours=need.hours, download=download)
            assert again.dollars >= ranked[refusal.offer.machine_id]


@given(found=some_offers, need=needs, download=downloads)
def test_who_ranks_below_a_dearer_hour_is_told_why_and_nobody_else(
    found: list[Offer], need: Need, download: Download
) -> None:
    ranked = offers.choose(need, found, download=download).ranked
    for row in ranked:
        dearer = [one for one in ranked[: row.rank - 1] if one.offer.dph_total - row.offer.dph_total >= offers.SHOWN]
        assert bool(row.note) is bool(dearer)
        if dearer:
            assert f"cheaper per hour than {dearer[0].rank}, " in row.note
            assert not row.note.endswith(": ")


@given(found=some_offers, need=needs, seed=st.integers())
def test_the_choice_does_not_depend_on_the_order_of_the_listing(found: list[Offer], need: Need, seed: int) -> None:
    shuffled = found.copy()
    random.Random(seed).shuffle(shuffled)
    one = offers.choose(need, found, download=LARGE)
    other = offers.choose(need, shuffled, download=LARGE)
    assert repr(one) == repr(other)  # NaN is not equal to itself
