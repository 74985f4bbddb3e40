"""docs/offers.md says what the commands take and do."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from selfhost_cli import offers
from selfhost_cli.cli import app
from selfhost_cli.lifecycle import renting

TEXT = (Path(__file__).parents[2] / "docs" / "offers.md").read_text()
SHOWN = [shlex.split(line, comments=True) for line in TEXT.splitlines() if line.startswith("selfhost ")]


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_every_command_line_shown_is_understood(words: list[str]) -> None:
    group = typer.main.get_command(app.app)
    command = group.commands[words[1]]  # type: ignore[attr-defined]
    command.make_context(words[1], words[2:])


def test_every_option_named_is_one_of_up_or_offers() -> None:
    group = typer.main.get_command(app.app)
    known = {
        option for name in ("up", "offers") for one in group.commands[name].params for option in one.opts  # type: ignore[attr-defined]
    }  # fmt: skip
    assert set(re.findall(r"`(--[a-z-]+)", TEXT)) <= known


def test_offers_takes_the_filters_of_up() -> None:
    group = typer.main.get_command(app.app)
    up, offered = ({one.name for one in group.commands[name].params} for name in ("up", "offers"))  # type: ignore[attr-defined]
    assert offered - up == {"refused", "everything"}
    assert {"gpu", "region", "max_price", "model", "engine", "disk", "hours", "max_spend", "api_key"} <= offered


def test_its_figures_are_those_of_the_code() -> None:
    assert f"Boot is taken as {offers.BOOT_S / 60:g} minutes and load as {offers.LOAD_S / 60:g}" in TEXT
    assert f"refused for {renting.FORGIVEN_S / 86_400:g} days" in TEXT
