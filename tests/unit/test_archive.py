from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from selfhost_cli import archive
from selfhost_cli.archive import Archive
from selfhost_cli.errors import UsageError

SEEN = Archive(1_900_000_000, "ab" * 32, "0.34.0", "https://example.invalid/ollama.tar.zst?version=0.34.0")


def test_nothing_was_seen_before_the_first_box(tmp_path: Path) -> None:
    assert archive.recall(tmp_path / "archives", SEEN.url, SEEN.version) is None


def test_the_first_sight_counts(tmp_path: Path) -> None:
    path = tmp_path / "archives"
    archive.remember(path, SEEN)
    archive.remember(path, replace(SEEN, sha256="cd" * 32))
    assert archive.recall(path, SEEN.url, SEEN.version) == SEEN


@pytest.mark.parametrize("other", [{"url": "https://example.invalid/other"}, {"version": "0.35.0"}])
def test_another_address_or_version_is_another_file(tmp_path: Path, other: dict[str, str]) -> None:
    path = tmp_path / "archives"
    archive.remember(path, SEEN)
    second = replace(SEEN, sha256="cd" * 32, **other)  # type: ignore[arg-type]
    archive.remember(path, second)
    assert archive.recall(path, second.url, second.version) == second
    assert archive.recall(path, SEEN.url, SEEN.version) == SEEN


@pytest.mark.parametrize(
    "line", ["garbage", "\xff", "1 2 3 4 5", f"many {'ab' * 32} 0.34.0 url", f"1 {'xy' * 32} 0.34.0 url"]
)
def test_a_broken_line_is_named_with_its_file(tmp_path: Path, line: str) -> None:
    (tmp_path / "archives").write_text(f"{SEEN}\n{line}\n", encoding="latin-1")
    with pytest.raises(UsageError, match=str(tmp_path / "archives")):
        archive.recall(tmp_path / "archives", SEEN.url, SEEN.version)
