"""A batch on a real box that is killed in the middle, and goes on where it was."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.e2e.stage import Stage
from tests.e2e.test_real_cli import Log
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("ready"), pytest.mark.timeout(240)]

PROMPTS = [f"Say the number {number} and nothing else." for number in range(6)]


def test_a_batch_that_was_killed_asks_only_what_has_no_answer(ready: Stage, tmp_path: Path) -> None:
    tasks, results = tmp_path / "tasks.jsonl", tmp_path / "tasks.results.jsonl"
    tasks.write_text("\n".join([*PROMPTS, json.dumps({"id": "last", "prompt": "Say bye.", "max_tokens": 5})]))
    off = {"SELFHOST_CACHE": "off"}
    log = Log(ready)
    killed = ready.spawn("batch", str(tasks), env=off)
    until(lambda: results.exists() and results.read_bytes().count(b"\n") >= 2, 60)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=20)
    kept = results.read_bytes()
    told = ready.ask("batch", str(tasks), env=off)
    assert "of 7 tasks are answered in" in told.err
    assert results.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    answers = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(answer["id"] for answer in answers) == ["1", "2", "3", "4", "5", "6", "last"]
    assert all(answer["text"] and not answer["error"] for answer in answers)
    asked = len(log.requests)
    assert asked <= 7 + 1, "what was being answered when it was killed is asked once more"
    assert ready.ask("batch", str(tasks), env=off).out == ""
    assert len(log.requests) == asked
