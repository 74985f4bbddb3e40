"""vast.ai's own command line, unmodified, from search to destroy on the sandbox's market."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox.market_process import MarketProcess

PROGRAM = Path(sys.executable).parent / "vastai"


class CommandLine:
    """`vastai … --url … --api-key …` in a home of its own."""

    def __init__(self, market: MarketProcess, home: Path) -> None:
        self._given = ["--url", market.url, "--api-key", market.facts["api_key"]]
        self._env = {"HOME": str(home), "PATH": os.defpath, "NO_PROXY": "127.0.0.1", "VASTAI_NO_UPDATE_CHECK": "1"}

    def run(self, *arguments: str) -> str:
        """What it printed; on its standard error it says nothing."""
        done = subprocess.run(
            [PROGRAM, *arguments, *self._given], env=self._env, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def raw(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--raw"))


@pytest.fixture
def vastai(clean: MarketProcess, tmp_path: Path) -> CommandLine:
    if not PROGRAM.exists():
        pytest.skip("this installation of vastai brings no command")
    clean.set("/settings", real_boxes=False)
    return CommandLine(clean, tmp_path)


def test_vasts_own_command_line_drives_a_box_from_search_to_destroy(clean: MarketProcess, vastai: CommandLine) -> None:
    query = "gpu_name=RTX_4090 num_gpus=1 reliability>0.98 disk_space>=40"
    offers = vastai.raw("search", "offers", query, "-o", "dph_total", "--storage", "20")
    assert {row["gpu_name"] for row in offers} == {"RTX 4090"}
    offer = str(offers[0]["id"])
    create = ["--image", "some/image:1", "--disk", "20", "--ssh", "--direct", "--label", "by-hand", "--cancel-unavail"]
    created = vastai.raw("create", "instance", offer, *create)
    assert created["success"] is True
    number = str(created["new_contract"])
    (listed,) = vastai.raw("show", "instances")
    assert (listed["id"], listed["label"]) == (int(number), "by-hand")
    assert clean.billed()["count"] == 1
    assert f"destroying instance {number}" in vastai.run("destroy", "instance", number, "-y")
    assert clean.billed()["count"] == 0


def test_vasts_own_command_line_says_why_an_offer_is_gone(clean: MarketProcess, vastai: CommandLine) -> None:
    clean.set("/faults", fault="offer_gone", spelling="410", calls=1)
    offer = str(clean.sdk().search_offers(query={"disk_space": {"gte": 40}})[0]["id"])
    with pytest.raises(AssertionError, match="no_such_ask"):
        vastai.run("create", "instance", offer, "--image", "some/image:1", "--disk", "20")
    assert clean.billed()["count"] == 0
