from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfhost_cli import offers
from selfhost_cli.model import Need, Offer
from tests.fakes.market import make_offer

GB = 1e9
NEED = Need(hours=2.0)


def test_the_cheapest_all_in_wins_over_the_cheapest_per_hour() -> None:
    cheap_hour = make_offer(1, dph_total=0.25, down_per_gb=0.052)
    cheap_total = make_offer(2, dph_total=0.30, down_per_gb=0.002)
    choice = offers.choose(NEED, [cheap_hour, cheap_total], download_bytes=27 * GB)
    assert [ranked.offer for ranked in choice.ranked] == [cheap_total, cheap_hour]


def test_a_slow_line_is_paid_for_in_hours() -> None:
    fast, slow = make_offer(1, dph_total=0.30), make_offer(2, dph_total=0.30, inet_down_mbps=300.0)
    ranked = offers.choose(NEED, [slow, fast], download_bytes=27 * GB).ranked
    assert [row.offer for row in ranked] == [fast, slow]
    assert ranked[1].ready_s - ranked[0].ready_s == pytest.approx(27e9 * 8 / 300e6 - 27e9 * 8 / 900e6)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gpu": "RTX 4090 D"}, "RTX 4090 D"),
        ({"num_gpus": 2}, "2 GPUs"),
        ({"rentable": False}, "rentable"),
        ({"verified": False}, "verified"),
        ({"gpu_ram_mb": 22_000}, "22000 MB"),
        ({"ram_mb": 16_000}, "16 GB of memory"),
        ({"disk_gb": 10.0}, "10 GB of disk"),
        ({"reliability": 0.9}, "0.900"),
        ({"inet_down_mbps": 100.0}, "100 Mbit/s"),
        ({"direct_ports": 0}, "port"),
        ({"duration_s": 3600.0}, "1.0 h"),
        ({"place": "Beijing, CN"}, "Beijing"),
        ({"dph_total": 0.9}, "$0.900/h"),
    ],
)
def test_every_limit_refuses_and_says_why(change: dict[str, object], why: str) -> None:
    need = replace(NEED, region="CA", max_price=0.5)
    choice = offers.choose(need, [make_offer(1, **change)], download_bytes=GB)
    assert not choice.ranked
    assert why in choice.refused[0].why


def test_a_machine_that_failed_before_is_avoided() -> None:
    choice = offers.choose(NEED, [make_offer(1), make_offer(2)], download_bytes=GB, avoid={1: "sshd"})
    assert [ranked.offer.machine_id for ranked in choice.ranked] == [2]


def test_of_one_machine_only_the_cheapest_offer_is_kept() -> None:
    dear, cheap = make_offer(1, id=1, machine_id=7, down_per_gb=0.05), make_offer(2, id=2, machine_id=7)
    choice = offers.choose(NEED, [dear, cheap], download_bytes=30 * GB)
    assert [ranked.offer for ranked in choice.ranked] == [cheap]
    assert [refusal.offer for refusal in choice.refused] == [dear]


def test_an_offer_whose_start_alone_breaks_the_cap_is_refused() -> None:
    choice = offers.choose(NEED, [make_offer(1, down_per_gb=0.052)], download_bytes=27 * GB, max_spend=1.0)
    assert "getting ready alone" in choice.refused[0].why


some_offers = st.lists(
    st.builds(
        make_offer,
        st.integers(1, 6),
        dph_total=st.floats(0.05, 2.0),
        down_per_gb=st.floats(0.0, 0.06),
        inet_down_mbps=st.floats(0.0, 2000.0),
        disk_gb=st.floats(1.0, 900.0),
        reliability=st.floats(0.5, 1.0),
        gpu=st.sampled_from(["RTX 4090", "RTX 4090 D"]),
        verified=st.booleans(),
    ),
    max_size=12,
)


@given(found=some_offers)
def test_no_choice_breaks_a_limit_or_the_order_and_none_is_lost(found: list[Offer]) -> None:
    need = replace(NEED, max_price=1.0)
    choice = offers.choose(need, found, download_bytes=27 * GB, max_spend=3.0)
    for ranked in choice.ranked:
        offer = ranked.offer
        assert offer.gpu == "RTX 4090"
        assert offer.verified
        assert offer.dph_total <= 1.0
        assert offer.disk_gb >= need.disk_gb
        assert ranked == offers.price(offer, hours=2.0, download_bytes=27 * GB)
    dollars = [ranked.dollars for ranked in choice.ranked]
    assert dollars == sorted(dollars)
    assert len({ranked.offer.machine_id for ranked in choice.ranked}) == len(choice.ranked)
    assert len(choice.ranked) + len(choice.refused) == len(found)


@given(found=some_offers)
def test_the_choice_does_not_depend_on_the_order_of_the_listing(found: list[Offer]) -> None:
    unique = list({offer.id: offer for offer in found}.values())
    one = offers.choose(NEED, unique, download_bytes=27 * GB)
    other = offers.choose(NEED, unique[::-1], download_bytes=27 * GB)
    assert one.ranked == other.ranked
