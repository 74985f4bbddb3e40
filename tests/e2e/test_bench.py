"""`selfhost bench` on a box with the real engine: relations that hold at any speed, and none of its figures."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.e2e.stage import Stage, finished

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("ready"), pytest.mark.timeout(400)]

SECONDS = 300.0
"""Half a minute where nobody else wants the cores."""


def test_cold_is_read_whole_warm_in_part_cached_not_at_all_and_all_of_it_is_timed(ready: Stage, tmp_path: Path) -> None:
    svg = tmp_path / "bench.svg"
    before = ready.ask("status", "--json").json[0]["so_far"]["usage"]
    process = ready.spawn("bench", "--quick", "--lengths", "256,512", "--json", "--svg", str(svg))
    out, err = finished(process, ready.home, SECONDS)
    assert process.returncode == 0, err
    found = {one["figure"]: one for one in json.loads(out)}
    for length in (256, 512):
        prompt, cold, warm = (
            found[f"{name}, {length} tokens"]["value"] for name in ("prompt", "read of it, cold", "read of it, warm")
        )
        assert prompt == pytest.approx(length, rel=0.1)
        assert cold > 0.9 * prompt, "there was something of a prefix that nobody ever asked"
        assert 0 < warm < cold / 2
        for name in ("time to first token, cold", "time to first token, warm", "prefill", "a million tokens read"):
            assert found[f"{name}, {length} tokens"]["value"] > 0
        cached = found.get(f"read of it, cached, {length} tokens")
        assert cached["value"] == 0 if cached else "the answer was cut" in err
    assert found["tool session, reused of the prompt before"]["value"] > 90
    assert {f"generated together, {number} at once" for number in (1, 2, 4)} <= found.keys()
    assert {one["unit"] for one in found.values()} == {"tokens", "s", "tokens/s", "$", "%"}
    assert all(one["goal"] is None and one["met"] is None for one in found.values())
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert "this takes about" in err
    after = ready.ask("status", "--json").json[0]["so_far"]["usage"]
    asked = 2 + 7 + 5 + 2 * 2  # to begin with, at once, turns, for each length; a hit never comes to the box
    assert after["requests"] - before["requests"] == asked, err


def test_an_interrupt_ends_it_and_shows_what_there_is(ready: Stage) -> None:
    process = ready.spawn("bench", "--quick")
    assert process.stderr
    assert any("a session" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "requests at once" in out
    assert "session with tools" not in out
