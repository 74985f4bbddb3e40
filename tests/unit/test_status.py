"""What `status` tells of a box's end, from what the box says and from what the ledger knows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import config, status
from selfhost_cli.cli import render
from selfhost_cli.config import Settings
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Heard, State
from tests.fakes.front import StubFront
from tests.fakes.rental import make_rental

NOW = 1_795_010_000.0
TOKEN = "front-token"
LABEL = "selfhost-test-1"
WATCHED = {"age_s": 2.0, "up_s": 3600.0, "lease_s": 3.0, "idle_s": 60.0, "dollars": 0.5}

Said = Callable[[status.Status], str]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    found = config.load("default", env={"SELFHOST_HOME": str(tmp_path)})
    found.paths.make()
    return found


def look(settings: Settings, watchdog: Any, state: State = State.READY) -> status.Status:
    """The rental has been up for an hour, on a box that says this of its watchdog."""
    box = {"status": "healthy", "watchdog": watchdog}
    rows = {"rentals": [{"label": LABEL, "state": "up", "reason": ""}]}
    with StubFront(TOKEN, {"state": (200, rows), "/health": (200, {"box": box})}) as front:
        settings.paths.keeper_file.write_text(json.dumps({"pid": 1, "port": front.port, "version": "0"}))
        settings.paths.front_token.write_text(TOKEN)
        return ask(settings, state)


def ask(settings: Settings, state: State = State.READY, **facts: object) -> status.Status:
    settings.paths.ledger.unlink(missing_ok=True)
    with closing(Ledger(settings.paths.ledger)) as ledger:
        ready_at = NOW - 3000 if state is State.READY else None
        facts = {"state": state, "running_at": NOW - 3600, "ready_at": ready_at, "dph_total": 0.5} | facts
        ledger.intend(make_rental(LABEL, **facts))
        (found,) = status.look(settings, ledger, now=NOW)
        return found


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def tell(value: status.Status) -> str:
        render.status([value])
        return capsys.readouterr().out

    return tell


def test_each_end_is_told_soonest_first(settings: Settings, said: Said) -> None:
    value = look(settings, WATCHED)
    assert [(one.why, one.seconds) for one in value.ends] == [("idle", 2640), ("hours", 25_200), ("dollars", 32_400)]
    text = said(value)
    assert "in 44 min without a request (" in text
    assert text.index("in 7.0 h by --hours (") < text.index("in 9.0 h by --max-spend (")
    assert "!" not in text


def test_ten_minutes_before_the_end_there_is_a_warning(settings: Settings, said: Said) -> None:
    text = said(look(settings, WATCHED | {"idle_s": 2200}))
    assert "! " in text
    assert re.search(r"ends by itself in 8 min \(\d\d:\d\d\): 45 min without a request", text)


def test_of_a_box_out_of_reach_each_end_is_counted_from_what_was_heard_last(settings: Settings, said: Said) -> None:
    heard = Heard(NOW - 600, 3000.0, 1200.0, 0.5, down_bytes=0, up_bytes=0)
    value = ask(settings, instance_id=7, sent_at=NOW - 3600, heard=heard)
    assert [(one.why, one.seconds) for one in value.ends][:2] == [("idle", 900), ("lease", 2100)]
    assert "in 15 min without a request" in said(value)


def test_the_dollars_so_far_have_the_traffic_that_was_heard_of(settings: Settings, said: Said) -> None:
    rented = {"instance_id": 7, "sent_at": NOW - 3600}
    assert "$0.3100 in 1.00 h, traffic not counted yet" in said(ask(settings, **rented))
    heard = Heard(NOW - 30, 3570.0, 0.0, 0.5, down_bytes=20_000_000_000, up_bytes=0)
    text = said(ask(settings, **rented, heard=heard))
    assert "$0.3500 in 1.00 h, traffic of 20.00 GB included" in text
    assert "after 8 h or $5, after 45 min without a request" in text


def test_dollars_that_nobody_can_know_exactly_are_told_as_a_range(settings: Settings, said: Said) -> None:
    heard = Heard(NOW - 1800, 1800.0, 0.0, 0.15, down_bytes=0, up_bytes=0)
    text = said(ask(settings, instance_id=7, sent_at=NOW - 3600, heard=heard))
    assert "$0.3100 in 1.00 h, traffic of 0.00 GB included; between $0.1550 and $0.3100" in text


def test_a_watchdog_that_does_not_look_any_more_is_told(settings: Settings, said: Said) -> None:
    value = look(settings, WATCHED | {"age_s": 300.0})
    assert value.unwatched_s == 300
    assert "its watchdog has not looked for 300 s" in said(value)


@pytest.mark.parametrize("watchdog", [None, [], "x", {}, {"age_s": "[/x]"}, WATCHED | {"up_s": "[/x]"}])
def test_whatever_a_box_says_of_its_watchdog_the_caps_are_counted(
    settings: Settings, said: Said, watchdog: Any
) -> None:
    value = look(settings, watchdog)
    assert [one.why for one in value.ends] == ["hours", "dollars"]
    assert value.unwatched_s is None
    assert "by --hours" in said(value)


def test_an_unready_box_without_a_keeper_is_said_to_be_nobodys(settings: Settings, said: Said) -> None:
    text = said(ask(settings, State.BOOTING))
    assert "nobody looks after it: `selfhost up` goes on with it, `selfhost down` ends it" in text
