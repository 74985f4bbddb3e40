"""`selfhost offers` and `up --pick` as processes: the command line, the real SDK and the sandbox's market."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox.market_process import MarketProcess


@dataclass
class Person:
    """Somebody with one profile and an account at the market."""

    home: Path
    market: MarketProcess
    settings: dict[str, str] = field(default_factory=dict)

    def ask(self, *words: str, width: int = 0) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        settings = {"PACE": "0", "MARKET_URL": self.market.url, "API_KEY": self.market.facts["api_key"]}
        settings |= {"HOME": str(self.home), "ENGINE": "llamacpp", "MODEL_BYTES": "19000000000", "HOURS": "2"}
        settings |= self.settings
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home), "COLUMNS": str(width or 80)}
        env |= {f"SELFHOST_{name}": value for name, value in settings.items()}
        command = [sys.executable, "-m", "selfhost_cli", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
        return done.returncode, done.stdout, done.stderr

    def offers(self, *words: str) -> dict[str, Any]:
        code, out, err = self.ask("offers", "--json", *words)
        assert code == 0, err
        choice: dict[str, Any] = json.loads(out)["choice"]
        return choice


@pytest.fixture
def person(clean: MarketProcess, tmp_path: Path) -> Person:
    clean.set("/settings", real_boxes=False)
    return Person(tmp_path / "selfhost", clean)


def test_the_ranking_is_printed_with_the_reasons_and_nothing_is_rented(person: Person) -> None:
    code, out, err = person.ask("offers", "--refused")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("RTX 4090 (simulated) for 2 h, 56 GB of disk included, 29 GB to download")
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert re.search(r"cheaper per hour than 1, dearer for your 2 h: traffic \$5\d/TB", out)
    for reason in (
        "reliability below 0.98: 0.970",
        "slower than 300 Mbit/s down: 118",
        "less than 32 GB of memory: 24",
        "less than 56 GB of disk: 31",
        "no direct port",
    ):
        assert reason in out, reason
    assert out.count("not verified by the market") == 2, "a machine never verified, and one that is not any more"
    assert person.market.billed()["count"] == 0


def test_whatever_the_market_has_of_the_card_is_ranked_or_refused_by_name(person: Person) -> None:
    rows = person.market.sdk().search_offers(
        query={"gpu_name": {"eq": "RTX 4090"}, "num_gpus": {"eq": 1}, "rented": {"eq": False}}, no_default=True
    )
    person.market.control.delete("/requests")
    choice = person.offers("--refused", "--max-price", "0.3", "--region", "C")
    named = [row["offer"]["id"] for row in (*choice["ranked"], *choice["refused"])]
    assert sorted(named) == sorted(row["id"] for row in rows)
    asked = [row for row in person.market.control.get("/requests").json() if row["path"].startswith("/api/v0/bundles")]
    assert [row["body"]["limit"] for row in asked] == [64, 64], "two bounded questions, however much there is"


def test_the_filters_are_those_of_up(person: Person) -> None:
    some = person.offers("--region", "US", "--max-price", "0.4")["ranked"]
    assert [row["offer"]["place"] for row in some] == ["Texas, US", "Oregon, US"]
    code, out, err = person.ask("offers", "--max-price", "0.01", "--json")
    assert code == 4
    told = json.loads(out)
    assert told["choice"]["ranked"] == []
    assert (told["error"]["exit_code"], told["error"]["message"] in err) == (4, True)
    assert "`selfhost offers --refused`, with the same options," in err
    assert "above $0.01/h" in err
    assert "--max-price" in err


def test_a_picked_offer_that_somebody_else_took_is_an_error_and_no_other_is_rented(person: Person) -> None:
    third = person.offers()["ranked"][2]["offer"]
    person.market.sdk().create_instance(id=third["id"], image="some/image:1", disk=30.0)
    code, _, err = person.ask("up", "--pick", "3", "--yes", "--detach")
    assert code == 4, err
    assert f"number 3 of the ranking shown (offer {third['id']}" in err
    assert person.market.billed()["count"] == 1


def test_a_number_before_any_ranking_is_a_usage_error(person: Person) -> None:
    code, _, err = person.ask("up", "--pick", "1", "--yes", "--detach")
    assert code == 2
    assert "`selfhost offers`" in err
