"""Whether other users of this machine can read the account key in config.toml: told, and never a reason to stop."""

from __future__ import annotations

import shlex
import stat
from pathlib import Path

from selfhost_cli.config import Paths

READ, PASS = stat.S_IRGRP | stat.S_IROTH, stat.S_IXGRP | stat.S_IXOTH


def warning(paths: Paths) -> str:
    """What to say of this profile's config.toml, "" when nothing.

    No refusal, as ssh's of such a key: `down` has to work whatever the modes are.
    """
    path = paths.config_file
    try:
        if not readable_by_others(path) or not _holds_a_key(path):
            return ""
    except OSError:
        return ""
    return f"other users of this machine can read the account key in {path}; `chmod 600 {shlex.quote(str(path))}`"


def readable_by_others(path: Path) -> bool:
    """Whether its mode lets the group or everybody read it, and those of all its directories let them get there.

    Raises OSError.
    """
    path = path.resolve()
    who = (path.stat().st_mode & READ) >> 2  # as the bits that say who may pass a directory
    for folder in path.parents:
        who &= folder.stat().st_mode & PASS
    return bool(who)


def _holds_a_key(path: Path) -> bool:
    import tomllib

    try:
        return bool(tomllib.loads(path.read_text(encoding="utf-8")).get("api_key"))
    except ValueError:
        return False  # settings cannot be loaded from it either, and that is told
