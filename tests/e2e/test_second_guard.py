"""What the keeper does beside a box's own watchdog: warn where people are, and end what that one could not."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Rental
from selfhost_cli.sandbox import demo
from tests.e2e.stage import Stage
from tests.terminal import Terminal
from tests.waiting import until

pytestmark = pytest.mark.e2e

MakeStage = Callable[..., Stage]
SHORT = ["--tools", "", "--system-prompt", demo.SYSTEM_PROMPT]


def rental(stage: Stage) -> Rental:
    ledger = Ledger(stage.paths.ledger)
    try:
        return ledger.all()[-1]
    finally:
        ledger.close()


def kill_ssh(stage: Stage) -> None:
    sshd = int((stage.box() / "run" / "sshd.pid").read_text())
    sessions = map(int, Path(f"/proc/{sshd}/task/{sshd}/children").read_text().split())
    for pid in (sshd, *sessions):
        os.kill(pid, signal.SIGKILL)


def test_a_person_in_claude_code_sees_when_the_box_ends_and_no_more_once_that_was_moved(
    make_stage: MakeStage, tmp_path: Path
) -> None:
    stage = make_stage()
    stage.up()
    settings = stage.paths.state / "home" / ".claude" / ".claude.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    trusted = {"hasCompletedOnboarding": True, "projects": {str(tmp_path): {"hasTrustDialogAccepted": True}}}
    settings.write_text(json.dumps(trusted))
    assert not stage.paths.notice.exists()
    argv = [sys.executable, "-m", "selfhost_cli", "--profile", demo.PROFILE, "claude", *SHORT]
    terminal = Terminal(argv, env=stage.env, cwd=tmp_path)
    try:
        terminal.watch(lambda: "manualmode" in terminal.shown)
        stage.ask("extend", "--idle", "5")
        terminal.watch(lambda: "5minwithoutarequest" in terminal.shown)
        assert "`selfhost--profiledemoextend--idle+30`movesit" in terminal.shown
        assert "Stopsays" not in terminal.shown
        terminal.type("Say hi.\r")
        terminal.watch(lambda: "Stopsays:selfhost:theboxendsat" in terminal.shown)
    finally:
        terminal.close()
    answer = stage.ask("claude", "-p", "Say hi.", *SHORT)
    assert "the box ends at" not in answer.out
    stage.ask("extend", "--idle", "45")
    until(lambda: not stage.paths.notice.exists() and not stage.paths.notice_for_hooks.exists())
    stage.ask("down")


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_verdict_that_the_market_does_not_take_from_the_box_is_carried_out_by_the_keeper(
    make_stage: MakeStage,
) -> None:
    stage = make_stage()
    stage.up()
    stage.control("faults", fault="key_refused", whose="box", status="403")
    stage.ask("extend", "--idle", "0.1")
    until(lambda: stage.billed == 0, 6 + 60 + 60)
    assert rental(stage).reason.startswith("its watchdog could not end it: idle for ")
    stage.ask("down")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_box_out_of_reach_that_its_watchdog_cannot_end_ends_by_its_cap(make_stage: MakeStage) -> None:
    stage = make_stage(hours=0.025)
    stage.up()
    stage.control("faults", fault="key_refused", whose="box", status="403")
    kill_ssh(stage)
    until(lambda: stage.billed == 0, 90 + 60 + 60)
    assert rental(stage).reason == "its 0.025 h are over"
    stage.ask("down")


def test_reap_leaves_a_living_keepers_box_alone_and_ends_a_dead_ones(make_stage: MakeStage) -> None:
    stage = make_stage()
    stage.up()
    told = stage.ask("reap", "--yes", "--json").json
    assert (told["ended"], told["left"], told["held"]) == ([], [], [rental(stage).label])
    assert stage.billed == 1
    keeper = stage.keeper
    assert keeper
    os.kill(keeper, signal.SIGKILL)
    assert "no keeper of profile demo is running" in " ".join(stage.ask("reap", code=5).out.split())
    assert stage.billed == 1
    assert "✓ nothing of this installation is billed" in stage.ask("reap", "--yes").out
    assert stage.billed == 0
    assert rental(stage).reason == "reap"
