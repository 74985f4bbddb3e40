"""How many boxes there may be: what was confirmed once, and what the keeper goes by when it rents another one."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, replace

from selfhost_cli.config import Paths
from selfhost_cli.errors import UsageError

MOST = 99
CENT = 0.01


@dataclass(frozen=True)
class Fleet:
    """`most` boxes; each that is rented later may cost `share` dollars in all and `ceiling` dollars per hour.

    `dollars`: all of them together, with those that ended since this was confirmed, at `since` (Unix time).
    """

    most: int
    share: float
    ceiling: float
    dollars: float
    since: float

    def renewed(self, before: Fleet | None) -> Fleet:
        """This one, as what was confirmed `before` goes on with it: what was spent then counts."""
        same = before and before.most == self.most and abs(before.share - self.share) < CENT
        return replace(self, dollars=before.dollars, since=before.since) if before and same else self


def parse(text: str) -> tuple[int, int]:
    """`N` or `MIN..MAX`: the least and the most. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,2})(?:\.\.(\d{1,2}))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most <= MOST:
        raise UsageError(f"--boxes {text}: it is a number, or two as in 1..3, from 1 to {MOST}")
    return least, most


def remember(paths: Paths, fleet: Fleet) -> None:
    draft = paths.fleet.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(asdict(fleet)))
    draft.replace(paths.fleet)


def recall(paths: Paths) -> Fleet | None:
    """None where no more boxes may be rented than were asked for."""
    try:
        told = json.loads(paths.fleet.read_bytes())
        figures = (float(told[name]) for name in ("share", "ceiling", "dollars", "since"))
        return Fleet(int(told["most"]), *figures)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(paths: Paths) -> None:
    paths.fleet.unlink(missing_ok=True)
