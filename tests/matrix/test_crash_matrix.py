"""The crash matrix in processes of its own: it forks, and what forks must not have threads. `scripts/crash-matrix`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.broken import RULES

ROOT = Path(__file__).parents[2]
PARTS = 10
SAMPLE = 2200


def matrix(*words: str) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Exit code, the combinations and the sums of one run."""
    command = [sys.executable, "-m", "tests.matrix", "--json", "--workers", "1", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-3000:]
    *rows, sums = (json.loads(line) for line in done.stdout.splitlines())
    return done.returncode, rows, sums


def failures(rows: list[dict[str, Any]]) -> str:
    bad = [row for row in rows if row["violations"] or row["billed"]]
    return "\n".join(json.dumps(row) for row in bad[:10])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_whatever_is_killed_nothing_stays_billed_and_nothing_is_rented_twice(part: int) -> None:
    code, rows, sums = matrix("--part", f"{part}/{PARTS}", "--sample", str(SAMPLE))
    assert not failures(rows)
    assert code == 0
    assert (sums["billed"], sums["double_rents"]) == (0, 0)
    assert sums["combinations"] > SAMPLE / PARTS / 3
    assert sums["created"] > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rule", RULES)
def test_the_matrix_notices_a_money_rule_that_is_broken(rule: str) -> None:
    code, rows, _ = matrix("--broken", rule)
    said = [violation for row in rows for violation in row["violations"]]
    assert any(RULES[rule].notice in violation for violation in said), said
    assert code == 1


def test_every_money_rule_that_lives_in_this_code_is_broken_once() -> None:
    assert {broken.rule for broken in RULES.values()} == set(range(1, 9))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_whole_matrix() -> None:
    code, rows, sums = matrix("--workers", "2")
    assert not failures(rows)
    assert code == 0
    assert sums["combinations"] > 4000
