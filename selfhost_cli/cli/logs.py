"""`selfhost logs`: what the parts on the box and the keeper write of themselves, each line with its part."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rich.text import Text

from selfhost_cli import logs
from selfhost_cli.cli import render, wiring, words
from selfhost_cli.config import Settings
from selfhost_cli.doctor.secrets import Secrets, known
from selfhost_cli.ledger import Ledger
from selfhost_cli.logs import KEEPER, Hide, Line, Note

WIDTH = max(map(len, logs.PARTS))


def run(settings: Settings, named: Sequence[str], *, follow: bool, lines: int, json: bool) -> None:
    """Print the lines, also while they come, until Ctrl-C.

    Raises UsageError for a part that there is not, NotSetUp without a box, MayBeBilling for one out of reach.
    """
    parts = logs.chosen(named)
    unwritable: OSError | None = None
    with wiring.reach(settings) as (ledger, reach):
        hide = Hiding(settings, ledger)
        rental = logs.the_box(ledger, parts)
        log = settings.paths.keeper_log
        found: Iterable[Line | Note]
        if follow:
            found = logs.follow(parts, ledger, reach, log, hide, lines=lines)
        else:
            found = logs.recent(parts, rental, reach, log, hide, lines=lines)
            if rental is None and parts != (KEEPER,):
                words.say("selfhost: there is no box; the keeper's log is all there is")
        try:
            for one in found:
                try:
                    _show(one, alone=len(parts) == 1, json=json)
                except OSError as error:  # nobody reads it any more: no news of the box
                    unwritable = error
                    break
        except KeyboardInterrupt:
            if not follow:
                raise
    if unwritable:
        raise unwritable


def _show(one: Line | Note, *, alone: bool, json: bool) -> None:
    if isinstance(one, Note):
        words.say(words.in_profile(f"selfhost: {words.plain(one.text)}", words.speaking_for))
    elif json:
        render.as_json_line(one)
    else:
        head = Text() if alone else Text(f"{one.part:<{WIDTH}} | ", "dim")
        render.out.print(head.append(one.line))


class Hiding:
    """Hides the secrets of now: a box that is rented while we wait for one has a token of its own."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings, self._ledger = settings, ledger
        self._known: list[str] = []
        self._hide: Hide | None = None

    def __call__(self, text: str) -> str:
        tokens = [one.box_token for one in self._ledger.all()]
        if self._hide is None or tokens != self._known:
            self._known = tokens
            self._hide = Secrets(
                known(self._settings.paths, os.environ, self._settings.api_key, tokens), os.environ
            ).hide
        return self._hide(text)
