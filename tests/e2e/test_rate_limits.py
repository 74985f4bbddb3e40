"""`up`, the keeper, `down` and a second profile on a market that keeps to its documented limits, in real time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from tests.e2e.stage import Stage
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.long]

READING = """
from selfhost_cli import config
from selfhost_cli.cli import wiring
settings = config.load("other")
settings.paths.make()
provider = wiring.provider(settings)
while True:
    provider.instances("selfhost-")
    provider.get(7)
    provider.account()
"""


def asked(stage: Stage) -> list[dict[str, object]]:
    """What was asked by everybody but the box, which has a key and an address of its own."""
    rows: list[dict[str, object]] = stage.control("requests", "GET")
    return [row for row in rows if "vastai" in row["headers"]["User-Agent"]]  # type: ignore[index]


@pytest.mark.timeout(300)
def test_up_keeper_and_down_beside_another_profile_are_never_told_off(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(pace=1)
    stage.control("faults", fault="rate_intervals")
    market = {"SELFHOST_MARKET_URL": stage.market.url, "SELFHOST_API_KEY": stage.market.api_key}
    other = subprocess.Popen([sys.executable, "-c", READING], env={**stage.env, **market})
    try:
        stage.up()
        stage.control("kill", instance=max(row["id"] for row in stage.control("boxes", "GET")))
        # The keeper asks where the box is now, and then whether it is gone, every few seconds.
        before = len(asked(stage))
        until(lambda: len(asked(stage)) > before + 12)
        stage.ask("down")
        assert other.poll() is None, "the other one went on all the time"
    finally:
        other.kill()
        other.wait()
    assert set(Counter(row["status"] for row in asked(stage))) <= {200, 404, None}
    assert os.path.exists(stage.home / "state" / "turns.sqlite3")
