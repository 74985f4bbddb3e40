"""`selfhost config`: every setting with its value, where that comes from and what it is; and one of them set."""

from __future__ import annotations

import os
import sys
import textwrap
from dataclasses import dataclass, fields

from rich.markup import escape
from rich.text import Text

from selfhost_cli import config, old_variables
from selfhost_cli.cli import render, words
from selfhost_cli.config import Settings, Source
from selfhost_cli.errors import UsageError
from selfhost_cli.old_variables import Found

NARROWEST, WIDEST = 40, 100


@dataclass(frozen=True)
class Setting:
    """One of them as it stands; a secret's value is hidden. `source`: default, file, environment or flag."""

    name: str
    value: object
    source: str
    help: str


@dataclass(frozen=True)
class Shown:
    """All settings of a profile, the file that may set them, and what is set of the old system's variables."""

    profile: str
    file: str
    settings: tuple[Setting, ...]
    old_variables: tuple[Found, ...]


def show(settings: Settings, *, json: bool) -> None:
    """Print all of them."""
    value = _look(settings)
    render.as_json(value) if json else _print(value, there=settings.paths.config_file.exists())


def get(settings: Settings, name: str, *, json: bool) -> None:
    """Print one value, as scripts want it. Raises UsageError for an unknown name and for a secret."""
    name = config.known(name)
    value = next(one for one in _look(settings).settings if one.name == name)
    if json:
        render.as_json(value)
    elif config.public(name, "x") == config.HIDDEN:
        raise UsageError(
            f"{name} is a secret and is not printed; it is {_is_set(value)}",
            f"`selfhost config set {name}` replaces it; {settings.paths.config_file} may hold it.",
        )
    else:
        print(words.plain(_written(value.value)))


def put(profile: str, name: str, text: str | None) -> None:
    """Write one into config.toml; without a text it is read from stdin, unseen. Raises UsageError."""
    where = config.paths(profile, os.environ)
    name = config.known(name)
    config.write(where, name, text if text is not None else _asked(name))
    shown = config.public(name, text) if text is not None else config.HIDDEN
    words.say(f"selfhost: {name} = {shown} in {where.config_file}")
    variable = f"SELFHOST_{name.upper()}"
    if os.environ.get(variable):
        words.say(f"selfhost: {variable} is set in the environment, which beats the file")


def take_out(profile: str, name: str) -> None:
    """The opposite of `put`: from then on the default holds, or what beats the file. Raises UsageError."""
    where, name = config.paths(profile, os.environ), config.known(name)
    was_there = config.unset(where, name)
    words.say(f"selfhost: {name} is {'no more' if was_there else 'not'} in {where.config_file}")
    variable = f"SELFHOST_{name.upper()}"
    if os.environ.get(variable):
        words.say(f"selfhost: {variable} is set in the environment, and holds")


def _look(settings: Settings) -> Shown:
    return Shown(
        settings.profile,
        str(settings.paths.config_file),
        tuple(
            Setting(
                one.name,
                config.public(one.name, getattr(settings, one.name)),
                settings.sources[one.name].name.lower(),
                one.metadata["help"],
            )
            for one in fields(Settings)
            if one.metadata
        ),
        old_variables.found(os.environ, settings.paths.state),
    )


def _print(value: Shown, *, there: bool) -> None:
    width = max(NARROWEST, min(WIDEST, render.out.width))
    _line(f"profile {escape(value.profile)}, {escape(value.file)}{'' if there else ' (not there)'}")
    for one in value.settings:
        set_here = one.source != Source.DEFAULT.name.lower()
        source = f"[cyan]{one.source}[/]" if set_here else f"[dim]{one.source}[/]"
        _line(f"[bold]{one.name}[/] = {escape(_written(one.value) or '(none)')}  {source}")
        _block(one.help, width)
    if value.old_variables:
        _line("\nvariables of the old system that are set here:")
    for found in value.old_variables:
        _line(f"[yellow]![/] [bold]{found.variable.name}[/] ({escape(found.where)}): {found.variable.now}")
        _block(f"was {found.variable.was}; {found.variable.instead}", width)


def _block(text: str, width: int) -> None:
    text = words.in_profile(words.plain(text), words.speaking_for)  # a command that is cut in two is not found any more
    for row in textwrap.wrap(text, width - 4, break_long_words=False, break_on_hyphens=False):
        render.out.print(Text(f"    {row}", "dim"))


def _line(markup: str) -> None:
    render.out.print(Text.from_markup(words.in_profile(words.plain(markup), words.speaking_for)))


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


def _is_set(one: Setting) -> str:
    return f"set ({one.source})" if one.value else "not set"


def _asked(name: str) -> str:
    """The first line of stdin; a person is asked for it and does not see it. Raises UsageError for an empty one."""
    import getpass

    try:
        text = getpass.getpass(f"{name}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    except EOFError:
        text = ""
    if not text.strip():  # an end of the input, or Enter, is no wish to lose what is stored
        raise UsageError("nothing was entered", f"Nothing was written. `selfhost config unset {name}` takes it out.")
    return text
