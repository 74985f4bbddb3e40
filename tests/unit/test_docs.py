from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from selfhost_cli import __version__, config
from selfhost_cli.cli import app

ROOT = Path(__file__).parent.parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
GROUP: Any = typer.main.get_command(app.app)
COMMANDS = set(GROUP.commands)
REFUSED: Any = (typer.BadParameter.__base__, KeyError)
"""What a parser raises: Typer has a click of its own, which has no public name for it."""
NOT_OURS = {"--dangerously-skip-permissions", "--settings", "--help", "--prefix", "--broken"}
"""Options of Claude Code, of every command, of npm and of a script."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def every_command(group: Any = GROUP, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each with its full name, the program itself ("") and groups included."""
    yield name, group
    for word, command in getattr(group, "commands", {}).items():
        yield from every_command(command, f"{name} {word}".strip())


def shown(page: str) -> tuple[list[str], list[str]]:
    """Command lines of ours: in blocks of shell, and in running text. Transcripts are the demo's to get right."""
    text = text_of(page)
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^selfhost .*", blocks, re.MULTILINE), re.findall(r"`(selfhost(?: [^`]+)?)`", prose)


def parsed(line: str) -> None:
    """By the command's own parser, which knows options and types. Raises REFUSED."""
    words = shlex.split(re.split(r"\s[|>]", line)[0], comments=True)[1:]
    if words[:1] == ["--profile"]:
        words = words[2:]
    if not words or words[0] == "COMMAND":
        return
    command = GROUP
    while (within := getattr(command, "commands", None)) is not None and words:
        command = within[words.pop(0)]
    if within is None:
        stands = {"NAME": "model", "N": "1", "SHELL": "bash", "…": "x"}
        command.make_context(command.name, [stands.get(word, word) for word in words])


def test_the_table_of_settings_is_the_one_that_validates() -> None:
    done = subprocess.run([sys.executable, "scripts/docs.py", "--check"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_every_option_of_up_that_is_a_setting_is_listed_as_one() -> None:
    options = set(inspect.signature(app.up).parameters) & set(config.NAMES)
    assert options == set(config.FLAGS)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_shown_exists(page: str) -> None:
    text = text_of(page)
    named = set(re.findall(r"`selfhost ([a-z]+)", text)) | set(re.findall(r"^selfhost ([a-z]+)", text, re.MULTILINE))
    assert named <= COMMANDS
    for script in re.findall(r"scripts/([a-z-]+)(?![\w.])", text):
        assert (ROOT / "scripts" / script).exists(), script


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_shown_is_understood(page: str) -> None:
    typed, mentioned = shown(page)
    wrong = []
    for line in [*typed, *mentioned]:
        try:
            parsed(line)
        except REFUSED as error:
            # Half a line, such as `selfhost up --pick`, is all right in a sentence.
            if line in typed or type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
                wrong.append(f"{line}: {error}")
    assert wrong == []


def test_a_command_line_that_is_wrong_would_be_noticed() -> None:
    for line in ("selfhost upp", "selfhost up --prick 3", "selfhost up --pick three", "selfhost config got x"):
        with pytest.raises(REFUSED):
            parsed(line)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_named_in_the_text_is_one_of_ours(page: str) -> None:
    ours = {option for _, command in every_command() for one in command.params for option in one.opts}
    assert set(re.findall(r"`(--[a-z][a-z-]+)", text_of(page))) <= ours | NOT_OURS


def test_the_readme_names_every_command() -> None:
    table = text_of("README.md").split("## Commands")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `selfhost ([a-z]+)", table, re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize(
    ("name", "command"), list(every_command()), ids=[name or "selfhost" for name, _ in every_command()]
)
def test_help_tells_every_option_with_what_it_does(name: str, command: Any) -> None:
    assert command.help, name
    for one in command.params:
        assert getattr(one, "help", None), f"{name} {one.opts}"
    if name == "claude":
        return  # it has no help of its own: Claude Code's is shown
    told = CliRunner().invoke(app.app, [*name.split(), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert told.exit_code == 0
    for one in command.params:
        for option in one.opts if one.param_type_name == "option" else ():
            assert option in told.output, f"{name} {option}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_room_named_exists(page: str) -> None:
    text = text_of(page)
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), f"{link}#{anchor}"
    for room in re.findall(r"`(selfhost_cli/[\w/.]+)`", text):
        assert (ROOT / room).exists(), room


def headings(page: Path) -> set[str]:
    """As links name them."""
    found = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_every_page_is_in_the_readmes_index() -> None:
    index = text_of("README.md").split("## Documentation")[1]
    assert [page for page in PAGES[1:] if f"]({page})" not in index] == []


def test_the_pages_send_people_to_no_other_place_of_vast_than_the_program_does() -> None:
    told = "\n".join(file.read_text() for file in (ROOT / "selfhost_cli").rglob("*.py"))
    for page in PAGES:
        for link in re.findall(r"https://cloud\.vast\.ai/[\w-]*/?", text_of(page)):
            assert link in told, f"{page}: {link}"


def test_every_room_is_in_the_design() -> None:
    text = text_of("docs/design.md").split("## A rental's life")[0]
    for room in (ROOT / "selfhost_cli").iterdir():
        if room.name.startswith("_") or room.is_symlink() or not (room.is_dir() or room.suffix == ".py"):
            continue
        assert re.search(rf"`(selfhost_cli/)?{room.name}/?`", text), room.name


def test_the_page_for_developers_names_every_script_folder_of_tests_and_marker() -> None:
    text = text_of("docs/development.md")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    folders = [f"tests/{file.name}" for file in (ROOT / "tests").iterdir() if list(file.glob("test_*.py"))]
    scripts = [f"scripts/{file.name}" for file in (ROOT / "scripts").iterdir() if file.is_file() and not file.suffix]
    for name in [*folders, *scripts]:
        assert f"`{name}`" in text, name
    for marker in settings["markers"]:
        assert f"\n| `{marker.partition(':')[0]}` |" in text, marker


def test_what_a_host_can_do_is_said_where_people_begin() -> None:
    for page in ("README.md", "docs/how-it-works.md"):
        assert re.search(r"can\s+read\s+your\s+prompts.*Claude\s+Code\s+ask\s+to\s+run", text_of(page), re.DOTALL), page
    assert "| read prompts, code and answers; keep them | we cannot" in text_of("docs/security.md")
    assert "ask Claude Code to run a command | we cannot" in text_of("docs/security.md")


def test_every_dependency_says_what_it_is_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=\[]", requirement)[0]
        assert f"| {name} |" in text, name


def test_the_changelog_is_kept_and_the_version_is_one() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
