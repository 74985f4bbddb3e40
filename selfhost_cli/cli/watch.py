"""`selfhost status --watch`: the same value again and again; redrawn in place, or a line for each change."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing

from rich.text import Text

from selfhost_cli import countdown
from selfhost_cli import status as state
from selfhost_cli.cli import render, words
from selfhost_cli.cli.screen import Redrawn
from selfhost_cli.config import Settings
from selfhost_cli.ledger import Ledger
from selfhost_cli.status import Status

EVERY_S = 2.0
NAME = 16
"""Columns in front of what is told."""


def look(settings: Settings) -> list[Status]:
    """What `selfhost status` shows; asking makes nothing."""
    if not settings.paths.ledger.exists():
        return []
    with closing(Ledger(settings.paths.ledger)) as ledger:
        return state.look(settings, ledger, now=time.time())


def run(
    ask: Callable[[], Sequence[Status]], *, json: bool = False, pause: Callable[[float], None] = time.sleep
) -> None:
    """Show what `ask` returns until Ctrl-C, which is its proper end."""
    try:
        if not json and render.out.file.isatty() and render.out.is_interactive:
            _redraw(ask, pause)
        else:
            _tell_changes(ask, json, pause)
    except KeyboardInterrupt:
        return


def _redraw(ask: Callable[[], Sequence[Status]], pause: Callable[[float], None]) -> None:
    values = ask()
    with Redrawn(
        frame(values, render.out.width, render.out.height),
        console=render.out,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        vertical_overflow="crop",
    ) as live:
        while True:
            live.update(frame(values, render.out.width, render.out.height), refresh=True)
            pause(EVERY_S)
            values = ask()


def frame(values: Sequence[Status], width: int, height: int) -> Text:
    """What `status` prints and the time, wrapped and cut to so many columns and rows."""
    lines = [_text(line) for line in render.status_lines(values)]
    lines.append(Text(f"{time.strftime('%H:%M:%S')}, every {EVERY_S:g} s; Ctrl-C ends it", "dim"))
    rows = [row for line in lines for row in _wrapped(line, max(20, width - 1))]
    return Text("\n").join(rows[: max(1, height - 1)])


def _wrapped(line: Text, width: int) -> list[Text]:
    first, *more = line.wrap(render.out, width)
    if not more:
        return [first]
    rest = line[len(first.plain) :]
    rest = rest[len(rest.plain) - len(rest.plain.lstrip()) :]
    return [first, *(Text(" " * NAME).append_text(row) for row in rest.wrap(render.out, max(10, width - NAME)))]


def _tell_changes(ask: Callable[[], Sequence[Status]], json: bool, pause: Callable[[float], None]) -> None:
    before: object = None
    while True:
        values = ask()
        now = [_what_changes(value) for value in values]
        if now != before:
            before = now
            if json:
                render.as_json_line(values)
            else:
                for line in [_in_a_line(value) for value in values] or ["no box"]:
                    render.out.print(_text(f"{time.strftime('%H:%M:%S')} {line}"))
            render.out.file.flush()
        pause(EVERY_S)


def _what_changes(value: Status) -> tuple[object, ...]:
    """What is worth a line: no figure that moves by itself."""
    soon = value.ends[0].why if countdown.warning(value.rental, value.ends) else ""
    blind = (value.unwatched_s or 0) > render.UNWATCHED_S
    reason = re.sub(r"\d+", "", value.reason)
    return value.rental.label, value.rental.state, value.tunnel, reason, value.box.get("status"), soon, blind


def _in_a_line(value: Status) -> str:
    rows = dict(render.status_rows(value))
    told = [rows["box"], f"tunnel {rows['tunnel']}", f"proxy {rows['proxy']}", rows["so far"], rows["as it stands"]]
    return "; ".join([*told, *render.status_warnings(value)]).replace("\n", " ")


def _text(markup: str) -> Text:
    return Text.from_markup(words.in_profile(words.plain(markup), words.speaking_for))
