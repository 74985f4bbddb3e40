from __future__ import annotations

import time
from dataclasses import replace

import pytest

from selfhost_cli import countdown
from selfhost_cli.countdown import Measured
from selfhost_cli.model import Caps, Heard, State
from tests.fakes.rental import make_rental

NOW = 1_795_010_000.0
RENTAL = make_rental(
    state=State.READY,
    sent_at=NOW - 4000,
    running_at=NOW - 3600,
    ready_at=NOW - 3000,
    dph_total=0.5,
    caps=Caps(lease_s=2700, idle_s=1800, max_s=7200, max_dollars=2.0),
)


def left(measured: Measured | None, **more: float) -> dict[str, float]:
    return {one.why: one.seconds for one in countdown.countdowns(RENTAL, measured, now=NOW, **more)}


def test_without_a_word_of_the_box_the_caps_count_from_when_it_ran() -> None:
    assert left(None) == {"hours": 3600, "dollars": pytest.approx(3 * 3600)}
    assert list(left(None)) == ["hours", "dollars"]


def test_what_the_box_measured_counts_and_the_soonest_is_first() -> None:
    measured = Measured(up_s=3700, lease_s=5, idle_s=1700, dollars=1.9)
    assert left(measured) == {"idle": 100, "dollars": pytest.approx(720), "hours": 3500}
    assert list(left(measured)) == ["idle", "dollars", "hours"]
    first = countdown.countdowns(RENTAL, measured, now=NOW)[0]
    assert first.at == NOW + 100


def test_idleness_counts_once_the_box_was_ready_and_the_lease_when_nobody_renews_it() -> None:
    measured = Measured(10, 5, 0, 0.0)
    fresh = replace(RENTAL, ready_at=None)
    assert [one.why for one in countdown.countdowns(fresh, measured, now=NOW)] == ["hours", "dollars"]
    assert left(measured, away_s=2000)["lease"] == 700


def test_a_free_box_has_no_end_in_dollars() -> None:
    assert [one.why for one in countdown.countdowns(replace(RENTAL, dph_total=0.0), None, now=NOW)] == ["hours"]


def test_the_watchdogs_line_is_read_and_its_verdict_too() -> None:
    assert countdown.parse("8/7/9/9 3700 5 120 0.4500 \n") == Measured(3700, 5, 120, 0.45, "", 8, 7)
    verdict = countdown.parse("8/7/9/9 3700 5 120 0.4500 idle for 120 s")
    assert verdict == Measured(3700, 5, 120, 0.45, "idle for 120 s", 8, 7)
    assert countdown.parse("-8/x/9/9 3700 5 120 0.4500") == Measured(3700, 5, 120, 0.45)
    told = {"age_s": 1.0, "up_s": 3700.0, "lease_s": 5.0, "idle_s": 120.0, "dollars": 0.45}
    assert countdown.read(told) == Measured(3700, 5, 120, 0.45)


@pytest.mark.parametrize("line", ["", "x", "9/9/9/9 1 2 3", "9 1 2 3 nan", "9 inf 2 3 4", "9 1 2 -3 4", "a b c d e f"])
def test_a_line_that_makes_no_sense_is_none(line: str) -> None:
    assert countdown.parse(line) is None


@pytest.mark.parametrize("told", [{}, {"up_s": 1}, {"up_s": [], "lease_s": 1, "idle_s": 1, "dollars": 1}])
def test_a_stranger_may_answer_anything(told: dict[str, object]) -> None:
    assert countdown.read(told) is None


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        (Measured(0, 0, 1300, 0), ["in 8 min", "30 min without a request", "selfhost extend --idle +30"]),
        (Measured(7170, 0, 0, 0), ["in less than a minute", "2 h are over", "selfhost extend --hours +2"]),
        (Measured(0, 0, 0, 1.95), ["in 6 min", "$2 are spent", "selfhost extend --max-spend +2"]),
    ],
)
def test_a_warning_says_when_why_and_what_moves_it(measured: Measured, says: list[str]) -> None:
    text = countdown.warning(RENTAL, countdown.countdowns(RENTAL, measured, now=NOW))
    assert all(part in text for part in says), text


def test_a_box_that_outlives_its_cap_is_told_of_too() -> None:
    text = countdown.warning(RENTAL, countdown.countdowns(RENTAL, Measured(7300, 0, 0, 0), now=NOW))
    assert "should have ended by itself: its 2 h are over. `selfhost down` ends it" in text


def test_there_is_no_warning_while_there_is_time() -> None:
    ends = countdown.countdowns(RENTAL, Measured(0, 0, 1100, 0), now=NOW)
    assert countdown.warning(RENTAL, ends) == ""
    assert countdown.warning(RENTAL, ends, within=3600) != ""
    assert countdown.warning(RENTAL, ()) == ""


def test_each_warning_is_said_once_and_again_after_its_death_had_moved_away() -> None:
    said = countdown.Warnings()

    def due(idle_s: float, up_s: float = 0) -> list[str]:
        return said.due(RENTAL, countdown.countdowns(RENTAL, Measured(up_s, 0, idle_s, 0), now=NOW))

    assert due(1000) == []
    assert len(due(1300)) == 1
    assert due(1305) == []
    assert ["2 h are over" in text for text in due(1310, up_s=7000)] == [True]
    assert due(5) == []
    assert len(due(1300)) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "in less than a minute"),
        (59, "in less than a minute"),
        (600, "in 10 min"),
        (5399, "in 90 min"),
        (7200, "in 2.0 h"),
    ],
)
def test_time_in_words(seconds: float, text: str) -> None:
    assert countdown.in_words(seconds) == text


def test_the_short_form_says_when_by_the_clock_and_what_moves_it() -> None:
    def said(measured: Measured, **more: float) -> str:
        return countdown.in_short(RENTAL, countdown.countdowns(RENTAL, measured, now=NOW, **more))

    clock = time.strftime("%H:%M", time.localtime(NOW + 500))
    idle = said(Measured(0, 0, 1300, 0))
    assert idle == f"the box ends at {clock}: 30 min without a request; `selfhost extend --idle +30` moves it"
    assert said(Measured(0, 0, 0, 0), away_s=2200.0) == f"the box ends at {clock}: 45 min without this machine"
    assert said(Measured(7300, 0, 0, 0)) == "the box should have ended: its 2 h are over; `selfhost down` ends it"
    assert said(Measured(0, 0, 0, 0)) == ""


def test_what_was_heard_once_is_carried_on_and_the_lease_only_while_nobody_renews_it() -> None:
    heard = Heard(NOW - 1000, up_s=600, idle_s=100, dollars=0.1, down_bytes=0, up_bytes=0)
    ends = {one.why: one for one in countdown.projected(RENTAL, heard, now=NOW)}
    assert {why: one.seconds for why, one in ends.items()} == {
        "idle": 700,
        "hours": 5600,
        "dollars": pytest.approx(1.9 / 0.5 * 3600 - 1000),
    }
    assert ends["idle"].at == NOW + 700
    away = countdown.projected(RENTAL, heard, now=NOW, away=True)
    assert [one.why for one in away] == ["idle", "lease", "hours", "dollars"]
    assert away[1].seconds == 1700


def test_only_a_hard_cap_that_is_well_past_is_outstayed() -> None:
    def reason(up_s: float, idle_s: float = 0, dollars: float = 0) -> str:
        measured = Measured(up_s, 0, idle_s, dollars)
        return countdown.outstayed(RENTAL, countdown.countdowns(RENTAL, measured, now=NOW, away_s=9000.0))

    assert [reason(7260), reason(7261)] == ["", "its 2 h are over"]
    assert reason(0, idle_s=9000) == ""
    assert reason(0, dollars=2.1) == "its $2 are spent"


def test_a_verdict_that_stands_is_read_from_its_own_file() -> None:
    for text in ("9/9/9/9 1 2 3 0.4 \nidle for 9 s\n", "9/9/9/9 1 2 3 0.4 idle for 12 s\nidle for 9 s\n"):
        measured = countdown.parse(text)
        assert measured
        assert measured.verdict == "idle for 9 s"
