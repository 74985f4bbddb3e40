"""The one script that moves what ends a box, on a box's own files."""

from __future__ import annotations

import subprocess

import pytest

from selfhost_cli import install, payload
from tests.templates.box import Box

CREATED = "SELFHOST_LEASE_S='2700'\nSELFHOST_IDLE_S='600'\nSELFHOST_MAX_S='7200'\nSELFHOST_MAX_DOLLARS='3.5000'\n"


@pytest.fixture
def limits(box: Box) -> Box:
    """A box whose create call said so."""
    box.run.mkdir(parents=True)
    (box.dir / "bin").mkdir()
    (box.dir / "bin/limits.sh").write_bytes(payload.script("limits.sh"))
    (box.run / "box.env").write_text(CREATED)
    box.env = {"HOME": str(box.home), "PATH": box.env["PATH"]}
    return box


def ask(box: Box, words: str = "") -> subprocess.CompletedProcess[str]:
    return box.sh("-c", f"{install.LIMITS} {words}")


def holds(box: Box) -> dict[str, str]:
    done = ask(box)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_it_tells_what_the_create_call_said(limits: Box) -> None:
    told = {"LEASE_S": "2700", "IDLE_S": "600", "MAX_S": "7200", "MAX_DOLLARS": "3.5000", "WATCH": ""}
    assert holds(limits) == told
    assert not (limits.run / "limits").exists()


def test_it_tells_the_defaults_of_the_watchdog_when_nothing_was_said(limits: Box) -> None:
    (limits.run / "box.env").unlink()
    limits.env["SELFHOST_MAX_S"] = "1"  # of a session; the watchdog knows nothing of it
    told = {"LEASE_S": "2700", "IDLE_S": "2700", "MAX_S": "28800", "MAX_DOLLARS": "5", "WATCH": ""}
    assert holds(limits) == told


def test_what_is_moved_holds_and_the_rest_stays(limits: Box) -> None:
    (limits.run / "watch").write_text("1/2/1/2 30 4 0 0.1000 \n")
    assert ask(limits, "MAX_S=36000").returncode == 0
    done = ask(limits, "MAX_DOLLARS=7.25 IDLE_S=900")
    assert done.stdout == "LEASE_S=2700\nIDLE_S=900\nMAX_S=36000\nMAX_DOLLARS=7.25\nWATCH=1/2/1/2 30 4 0 0.1000 \n"
    ask(limits, "MAX_S=40000")
    assert holds(limits)["MAX_S"] == "40000"


@pytest.mark.parametrize(
    "wrong",
    [
        *("MAX_S", "MAX_S=", "MAX_S=-1", "MAX_S=1e9", "MAX_S=.5", "MAX_S=1.2.3", "MAX_S=12345678901", "DPH=-1"),
        *("'MAX_S=1;id'", "'MAX_S=1\nMAX_S=2'", "'MAX_S=1 '", "CONTAINER_ID=1", "''", "'MAX_S=$(id)'", "max_s=1"),
    ],
)
def test_nonsense_is_refused_and_moves_nothing(limits: Box, wrong: str) -> None:
    done = ask(limits, f"IDLE_S=1200 {wrong}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no limit" in done.stderr
    assert holds(limits)["IDLE_S"] == "600"


def test_the_price_that_dollars_are_counted_with_can_be_moved(limits: Box) -> None:
    before = holds(limits)
    assert ask(limits, "DPH=0.790000").returncode == 0
    assert (limits.run / "limits").read_text() == "SELFHOST_DPH=0.790000\n"
    assert ask(limits, "MAX_S=40000").returncode == 0
    assert holds(limits) == before | {"MAX_S": "40000"}
    assert "SELFHOST_DPH=0.790000" in (limits.run / "limits").read_text()


def test_a_box_that_is_ending_gets_no_more_time(limits: Box) -> None:
    (limits.run / "verdict").write_text("idle for 601 s\n")
    done = ask(limits, "IDLE_S=1200")
    assert done.returncode == 1
    assert "ending already: idle for 601 s" in done.stderr
    assert holds(limits)["IDLE_S"] == "600"


def test_a_full_disk_keeps_the_limits_that_were(limits: Box) -> None:
    ask(limits, "IDLE_S=900")
    (limits.run / "limits.new").symlink_to("/dev/full")
    done = ask(limits, "IDLE_S=1200")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert holds(limits)["IDLE_S"] == "900"
