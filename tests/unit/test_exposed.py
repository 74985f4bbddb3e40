"""The account key in a config.toml that other users can read: told by the commands, and no reason to stop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from selfhost_cli import config
from selfhost_cli.cli import exposed

KEY = "an-account-key-of-ours"


@pytest.fixture
def home() -> Iterator[Path]:
    """One that everybody may enter, unlike pytest's own directories."""
    with TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "config" / "default").mkdir(parents=True)
        for one in (home, home / "config", home / "config" / "default"):
            one.chmod(0o755)
        if any(not above.stat().st_mode & 0o001 for above in home.resolve().parents):
            pytest.skip("nobody else gets to where this machine's temporary files are")
        yield home


def write(home: Path, text: str, mode: int) -> config.Paths:
    paths = config.paths("default", {"SELFHOST_HOME": str(home)})
    paths.config_file.write_text(text)
    paths.config_file.chmod(mode)
    return paths


@pytest.mark.parametrize(
    ("mode", "told"), [(0o644, True), (0o640, True), (0o604, True), (0o600, False), (0o611, False)]
)
def test_a_key_that_others_can_read_is_told_with_what_to_type(home: Path, mode: int, told: bool) -> None:
    paths = write(home, f'api_key = "{KEY}"\n', mode)
    said = exposed.warning(paths)
    assert bool(said) is told
    assert KEY not in said
    if told:
        assert said.endswith(f"; `chmod 600 {paths.config_file}`")


@pytest.mark.parametrize("text", ["hours = 2\n", 'api_key = ""\n', "", "hours = [\n"])
def test_a_file_without_a_key_may_be_read(home: Path, text: str) -> None:
    assert exposed.warning(write(home, text, 0o644)) == ""


@pytest.mark.parametrize(("mode", "told"), [(0o700, False), (0o710, True), (0o701, True), (0o744, False)])
def test_a_directory_that_nobody_else_may_enter_keeps_the_key(home: Path, mode: int, told: bool) -> None:
    paths = write(home, f'api_key = "{KEY}"\n', 0o644)
    paths.config.parent.chmod(mode)
    assert bool(exposed.warning(paths)) is told


@pytest.mark.parametrize(("mode", "told"), [(0o644, True), (0o600, False)])
def test_the_file_that_a_link_leads_to_counts(home: Path, mode: int, told: bool) -> None:
    paths = write(home, "", 0o644)
    (home / "dotfiles").write_text(f'api_key = "{KEY}"\n')
    (home / "dotfiles").chmod(mode)
    paths.config_file.unlink()
    paths.config_file.symlink_to(home / "dotfiles")
    assert bool(exposed.warning(paths)) is told


def test_no_file_is_nothing_to_tell(tmp_path: Path) -> None:
    assert exposed.warning(config.paths("default", {"SELFHOST_HOME": str(tmp_path)})) == ""


def test_a_command_warns_on_stderr_and_does_its_work(home: Path) -> None:
    paths = write(home, f'api_key = "{KEY}"\n', 0o644)
    done = subprocess.run(
        [sys.executable, "-m", "selfhost_cli", "status", "--json"],
        env={"SELFHOST_HOME": str(home), "HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]")
    assert f"`chmod 600 {paths.config_file}`" in done.stderr
    assert KEY not in done.stderr
