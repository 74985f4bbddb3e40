"""What people are to know while they sit in Claude Code: a file for its hooks and one for its status line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from selfhost_cli.config import Paths
from selfhost_cli.errors import in_profile

log = logging.getLogger("selfhost.keeper")


class Notice:
    """The files are there while there is something to tell; `claude.launch` has Claude Code show them."""

    def __init__(self, paths: Paths, profile: str) -> None:
        self._paths = paths
        self._profile = profile
        self._told: str | None = None

    def tell(self, text: str) -> None:
        """Show this from now on, "" for nothing. What cannot be written is in the log, and tried again."""
        if text == self._told:
            return
        # What a market says of a card could move a terminal's cursor.
        line = in_profile(f"selfhost: {text}", self._profile) if text else ""
        line = "".join(character for character in line if character.isprintable())
        try:
            _put(self._paths.notice_for_hooks, json.dumps({"systemMessage": line}) if line else "")
            _put(self._paths.notice, line)
            self._told = text
        except OSError as error:
            log.error("%s: %s", self._paths.notice, error)


def _put(path: Path, text: str) -> None:
    """Whole or not at all: what is no JSON, Claude Code would show to the model."""
    if not text:
        path.unlink(missing_ok=True)
        return
    draft = path.with_suffix(".new")
    draft.write_text(f"{text}\n")
    draft.replace(path)
