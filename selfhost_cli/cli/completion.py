"""`selfhost completion SHELL`: Typer's own scripts, and what they are to offer beside commands and options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfhost_cli import config
from selfhost_cli.errors import SelfhostError

if TYPE_CHECKING:
    from typer import Typer

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_SELFHOST_COMPLETE"
"""Set by these scripts when they ask; Typer answers before any command runs."""


def prepare(app: Typer) -> None:
    """Typer knows these shells only once it was told to; nothing is done when no shell asks."""
    if VARIABLE in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
        _offer_profile(app)


def _offer_profile(app: Typer) -> None:
    """Behind every command, too, as `app.run` takes it there before Typer sees the line."""
    from typer.core import TyperCommand

    class Command(TyperCommand):
        def get_params(self, ctx: Any) -> list[Any]:
            root = ctx.find_root().command
            return [*super().get_params(ctx), *(option for option in root.params if option.name == "profile")]

    for command in app.registered_commands:
        command.cls = Command
    for group in app.registered_groups:
        if group.typer_instance:
            _offer_profile(group.typer_instance)


def script(shell: str) -> str:
    """What the shell is to evaluate."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    return get_completion_script(prog_name="selfhost", complete_var=VARIABLE, shell=shell)


def profiles(incomplete: str) -> Sequence[str]:
    """Those that have a directory. Never raises: a shell would show it in the middle of a line."""
    try:
        folder = config.paths("default", os.environ).config.parent
        names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    except (OSError, SelfhostError):
        return []
    return [name for name in names if name.startswith(incomplete)]


def settings(incomplete: str) -> Sequence[str]:
    return [name for name in config.NAMES if name.startswith(incomplete)]


def models(incomplete: str) -> Sequence[str]:
    """Of the catalogue."""
    from selfhost_cli.models import catalogue

    return [entry.tag for entry in catalogue.entries() if entry.tag.startswith(incomplete)]


def cards(incomplete: str) -> Sequence[str]:
    """With _ for a space, as an unquoted word has none."""
    from selfhost_cli.models import catalogue

    names = [card.name.replace(" ", "_") for card in catalogue.cards()]
    return [name for name in names if name.startswith(incomplete)]


def backends(incomplete: str) -> Sequence[str]:
    """Of the profile that the environment names: which one the line will say is not known here."""
    from selfhost_cli import backends as known

    try:
        names = known.load(config.paths(os.environ.get("SELFHOST_PROFILE") or "default", os.environ))
    except SelfhostError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def parts(incomplete: str) -> Sequence[str]:
    """Of `logs`."""
    from selfhost_cli.logs import PARTS

    return [name for name in PARTS if name.startswith(incomplete)]
