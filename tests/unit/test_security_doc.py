"""docs/security.md: every line names a test that exists, or says that we cannot."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def claims() -> list[tuple[str, str]]:
    """What somebody could do, and the proof: the lines of the tables of adversaries."""
    rows = []
    for table in (ROOT / "docs" / "security.md").read_text().split("| what | proof |\n| --- | --- |\n")[1:]:
        for line in table.split("\n\n")[0].strip().splitlines():
            what, proof = line.strip("| ").split(" | ")
            rows.append((what, proof))
    return rows


def functions_of(file: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_every_line_names_a_test_or_says_that_we_cannot() -> None:
    assert len(claims()) > 40
    assert [what for what, proof in claims() if not NAMED.search(proof) and "we cannot" not in proof] == []


def test_every_test_that_is_named_exists() -> None:
    named = [pair for _, proof in claims() for pair in NAMED.findall(proof)]
    assert [f"{file}::{test}" for file, test in named if test not in functions_of(ROOT / file)] == []
    written = re.findall(r"`(tests/[^`]+)`", (ROOT / "docs" / "security.md").read_text())
    assert [name for name in written if not (ROOT / name.partition("::")[0]).exists()] == []


def test_every_adversary_has_a_table() -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / "security.md").read_text(), flags=re.MULTILINE)[2:]
    assert len(sections) == 8
    assert [section.splitlines()[0] for section in sections if "| what | proof |" not in section] == []
