"""The scan of scripts/check: it sees what looks like a secret, and what is not one in this checkout draws no alarm."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def scan(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "no_secrets.py"], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "token = '{mixed}'",
        "export TOKEN={mixed}",
        "see https://host.example/?key={hex}",
        'PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\\n{long}\\n"',
    ],
)
def test_a_secret_in_a_file_is_named_by_its_line_and_not_shown(checkout: Path, line: str) -> None:
    values = {"mixed": secrets.token_urlsafe(32) + "aA1", "hex": secrets.token_hex(32), "long": "QyNTUxOQ" * 6}
    (checkout / "notes.md").write_text("first line\n" + line.format(**values))
    done = scan(checkout)
    assert done.returncode == 1
    assert done.stdout.startswith("notes.md:2: ")
    assert not any(value in done.stdout for value in values.values())


def test_words_and_identifiers_are_no_secrets(checkout: Path) -> None:
    text = "test_the_second_of_2_Commands_waits_for_the_first\nSELFHOST_PROXY_REQUIREMENTS=aiohttp==3.14.5\n" + "0" * 64
    (checkout / "notes.md").write_text(text)
    assert scan(checkout).returncode == 0


def test_nothing_in_this_checkout_looks_like_one() -> None:
    done = scan(ROOT)
    assert (done.returncode, done.stdout) == (0, "")
