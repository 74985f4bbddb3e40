"""docs/troubleshooting.md: each symptom is something that we really say, each remedy a command that there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer

from selfhost_cli.claude import INSTALL
from selfhost_cli.cli import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
PARAGRAPHS = [text for text in PAGE.split("\n\n") if text.startswith("**")]


def said_by_us() -> str:
    """All our texts, as if nothing were put in and no line were broken."""
    files = [*(ROOT / "selfhost_cli").rglob("*.py"), *(ROOT / "templates").glob("*.sh"), ROOT / "README.md"]
    text = "\n".join(file.read_text() for file in files if "sandbox" not in file.parts)
    return re.sub(r'"\n\s*f?"', "", text)


def test_every_symptom_is_in_our_own_words() -> None:
    ours = said_by_us()
    symptoms = [one for text in PARAGRAPHS for one in re.findall(r"`([^`]+)`", text.rpartition("**")[0])]
    assert len(symptoms) > 15
    for symptom in symptoms:
        for words in symptom.removeprefix("health: ").split(" … "):
            assert words in ours, symptom


def test_every_paragraph_has_a_remedy_and_every_command_its_options() -> None:
    known = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    for text in PARAGRAPHS:
        commands = re.findall(r"`selfhost ([^`]+)`", text)
        assert commands or "is right" in text or "settings.md" in text, text
        for command in commands:
            name, *words = shlex.split(command)
            assert name in known, command
            parser = known[name]
            options = {option for parameter in parser.params for option in parameter.opts}
            if "--" in words:
                words = words[: words.index("--")]
            assert {word for word in words if word.startswith("-")} <= options, command
            # Typer takes the values, too: a number where it wants one.
            values = [word.replace("NAME", "x") for word in words]
            parser.make_context(name, values, resilient_parsing=False)


def test_claude_is_installed_in_the_version_that_we_know() -> None:
    assert INSTALL in PAGE
