"""The first turn on a new box, which has read ahead what the last session began with."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.sandbox import demo
from tests.e2e.stage import Stage
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

LONG = demo.SYSTEM_PROMPT + " Be brief." * 40
SECRET = "walnut-48151"


def prefix(stage: Stage) -> Any:
    (row,) = stage.ask("status", "--json").json
    return row["box"].get("prefix", {})


def first_turn(stage: Stage, prompt: str, folder: Path) -> tuple[int, int]:
    """Of a new session: tokens of its first prompt, and how many of them the box had read before."""
    log = stage.box() / "root/.selfhost/log/proxy.log"
    before = log.stat().st_size
    words = ["-p", prompt, "--tools", "Read", "--system-prompt", LONG]
    stage.ask("claude", *words, cwd=folder, env={"SELFHOST_CACHE": "off"})
    found = re.search(r"class=main .* in=(\d+) cached=(\d+)", log.read_text()[before:])
    assert found
    return int(found[1]), int(found[2])


def test_a_new_box_has_read_what_the_last_session_began_with(make_stage: Callable[..., Stage], tmp_path: Path) -> None:
    stage = make_stage()
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()

    def up_in(folder: Path) -> None:
        stage.ask("up", "--yes", "--detach", cwd=folder)

    up_in(here)
    assert prefix(stage) == {"state": "none"}  # the sandbox records none by itself
    total, reused = first_turn(stage, f"Say hi to {SECRET}.", here)
    assert reused < 100 < total
    until(lambda: prefix(stage)["state"] == "warm")
    kept = stage.paths.prefixes
    assert stat.S_IMODE(os.stat(kept).st_mode) == 0o600
    assert SECRET not in kept.read_text()
    stage.ask("down")

    up_in(here)
    until(lambda: prefix(stage)["state"] == "warm", seconds=60)
    assert "warm" in stage.ask("status").out
    total, reused = first_turn(stage, "Say hello.", here)
    assert total - reused < 50
    total, elsewhere = first_turn(stage, "Say hello.", there)
    assert reused / 4 < elsewhere < reused, "of another project's prompt, what all projects have in common is reused"
    stage.ask("down")
