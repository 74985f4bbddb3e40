from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from selfhost_cli import __version__, config
from selfhost_cli.cli import app

ROOT = Path(__file__).parent.parent.parent
COMMANDS = {command.name or command.callback.__name__ for command in app.app.registered_commands if command.callback}


def test_the_table_of_settings_is_the_one_that_validates() -> None:
    done = subprocess.run([sys.executable, "scripts/docs.py", "--check"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_every_option_of_up_that_is_a_setting_is_listed_as_one() -> None:
    options = set(inspect.signature(app.up).parameters) & set(config.NAMES)
    assert options == set(config.FLAGS)


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_every_command_shown_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    shown = set(re.findall(r"`selfhost ([a-z]+)", text)) | set(re.findall(r"^selfhost ([a-z]+)", text, re.MULTILINE))
    assert shown <= COMMANDS
    for script in re.findall(r"scripts/([a-z-]+)(?![\w.])", text):
        assert (ROOT / "scripts" / script).exists(), script


@pytest.mark.parametrize("page", ["README.md", "docs/design.md", "docs/dependencies.md", "docs/ollama.md"])
def test_every_link_and_every_room_named_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for room in re.findall(r"`(selfhost_cli/[\w/.]+)`", text):
        assert (ROOT / room).exists(), room


def test_every_dependency_says_what_it_is_for() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=\[]", requirement)[0]
        assert f"| {name} |" in text, name


def test_the_changelog_is_kept_and_the_version_is_one() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
