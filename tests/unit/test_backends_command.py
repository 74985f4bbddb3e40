"""`selfhost use` and `selfhost backends`, as they are typed; what they say holds no key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from selfhost_cli import config
from selfhost_cli.ledger import Ledger, Usage

KEY = "sk-not-a-real-one"


@dataclass
class User:
    home: Path

    def selfhost(self, *words: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "selfhost_cli", *words],
            input=stdin,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home), "SELFHOST_HOME": str(self.home), **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert KEY not in done.stdout + done.stderr
        return done

    def rows(self) -> dict[str, int | None]:
        return {row["name"]: row["place"] for row in json.loads(self.selfhost("use", "--json").stdout)}


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    made = User(tmp_path)
    yield made
    made.selfhost("use", "vast")  # its keeper ends by itself


def test_a_preset_is_added_by_its_name_and_its_key_from_stdin(user: User) -> None:
    added = user.selfhost("backends", "add", "cerebras", "--per-day", "2")
    assert added.returncode == 0, added.stderr
    assert "its key is still missing" in added.stderr
    assert user.selfhost("backends", "key", "cerebras", stdin=f"{KEY}\n").returncode == 0
    again = user.selfhost("backends", "add", "cerebras", "--model", "other")
    assert "missing" not in again.stderr
    (row,) = (one for one in json.loads(user.selfhost("backends", "--json").stdout) if one["name"] == "cerebras")
    assert (row["model"], row["key"], row["place"]) == ("other", "file", None)
    removed = user.selfhost("backends", "remove", "cerebras")
    assert removed.returncode == 0
    assert not list(user.home.rglob("keys/*"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["use", "nobody"], 2, "there is no backend 'nobody'"),
        (["use", "--then", "vast"], 2, "--then goes with a name"),
        (["use", "vast", "--then", "vast"], 2, "once only"),
        (["backends", "add", "mine"], 2, "where is mine?"),
        (["backends", "add", "runpod", "--model", "m"], 2, "--endpoint"),
        (["backends", "add", "mine", "--url", "http://10.0.0.1"], 2, "not encrypted"),
        (["backends", "add", "mine", "--url", "http://127.0.0.1:9"], 1, "no server that is known answers"),
        (["backends", "add", "Mine", "--url", "https://a", "--kind", "openai", "--model", "m"], 2, "small letters"),
        (["backends", "add", "mine", "--preset", "wat"], 2, "no preset"),
        (["backends", "remove", "vast"], 2, "always there"),
        (["backends", "key", "vast"], 2, "api_key"),
        (["backends", "test", "vast"], 2, "selfhost doctor"),
        (["backends", "import", "/nowhere/.llmrc.json"], 2, "No such file"),
    ],
)
def test_what_cannot_be_is_told_with_what_to_do(user: User, words: list[str], code: int, said: str) -> None:
    done = user.selfhost(*words)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def test_use_without_a_key_changes_nothing(user: User) -> None:
    user.selfhost("backends", "add", "cerebras")
    refused = user.selfhost("use", "cerebras")
    assert refused.returncode == 3
    assert "CEREBRAS_API_KEY is not set" in refused.stderr
    assert user.rows() == {"vast": 1, "cerebras": None}


def test_the_old_file_is_taken_over_and_its_key_shown_nowhere(user: User) -> None:
    old = user.home / ".llmrc.json"
    old.write_text(json.dumps({"backends": {"cerebras": {"apiKey": KEY}, "vast-ai": {"apiKey": KEY}}}))
    taken = user.selfhost("backends", "import", str(old))
    assert taken.returncode == 0, taken.stderr
    assert "cerebras is taken over" in taken.stderr
    assert "vast is left out" in taken.stderr
    held = [path for path in user.home.rglob("*") if path.is_file() and path != old and KEY in path.read_text("latin1")]
    assert [(path.name, path.stat().st_mode & 0o777) for path in held] == [("cerebras", 0o600)]
    assert user.rows()["cerebras"] is None


def test_cost_tells_what_a_backend_cost_in_the_month(user: User) -> None:
    user.selfhost("backends", "add", "cerebras", "--price-in", "2", "--price-cached", "1", "--price-out", "10")
    where = config.paths("default", {"SELFHOST_HOME": str(user.home)})
    where.make()
    with closing(Ledger(where.ledger)) as ledger:
        ledger.add_usage("backend-cerebras", "main", Usage(1, 1_000_000, 400_000, 100_000))
        ledger.add_usage("backend-gone", "main", Usage(1, 10, 0, 1))
    told = {one["name"]: one["dollars"] for one in json.loads(user.selfhost("cost", "--json").stdout)["sold"]}
    assert told == {"cerebras": pytest.approx(1.2 + 0.4 + 1.0), "gone": None}
    assert "cerebras" in user.selfhost("cost").stdout
    assert json.loads(user.selfhost("cost", "--month", "2020-01", "--json").stdout)["sold"] == []
