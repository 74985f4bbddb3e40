"""Three real processes in real time, on a market that keeps to its documented limits."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox.market_process import MarketProcess

READING = """
import sys
from selfhost_cli import config
from selfhost_cli.cli import wiring as cli
from selfhost_cli.keeper import wiring as keeper
settings = config.load(sys.argv[1])
settings.paths.make()
provider = (keeper.provider if sys.argv[2] == "keeper" else cli.provider)(settings)
provider.get(7)
provider.instances("selfhost-")
provider.account()
"""


@pytest.fixture
def market(tmp_path: Path) -> Iterator[MarketProcess]:
    process = MarketProcess(tmp_path)
    process.set("/faults", fault="rate_intervals")
    yield process
    process.close()


def statuses(market: MarketProcess, home: Path, pace: float) -> Counter[int]:
    """How often the market gave which status to two processes of one profile and one of another."""
    env = {"SELFHOST_HOME": str(home), "SELFHOST_MARKET_URL": market.url, "SELFHOST_PACE": str(pace)}
    env["SELFHOST_API_KEY"] = market.facts["api_key"]
    started = [
        subprocess.Popen([sys.executable, "-c", READING, profile, what], env=env)
        for profile, what in (("default", "command"), ("default", "keeper"), ("other", "command"))
    ]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    return Counter(row["status"] for row in market.asked())


def test_three_processes_that_share_nothing_but_the_account_are_never_told_off(
    market: MarketProcess, tmp_path: Path
) -> None:
    assert statuses(market, tmp_path, 1.0) == {200: 9}
