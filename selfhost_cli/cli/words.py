"""What the commands say, in the words of the profile at hand. As light as `entry`, which everything passes."""

from __future__ import annotations

import os
import sys

from selfhost_cli.errors import in_profile as in_profile
from selfhost_cli.errors import plain as plain

speaking_for = "default"
"""The profile of this process, for the commands that its texts show."""


def say(text: str) -> None:
    """One remark on stderr; stdout belongs to the product."""
    try:
        print(plain(text), file=sys.stderr, flush=True)
    except OSError:
        discard(2)


def discard(descriptor: int) -> None:
    """Nobody reads it any more. The interpreter would fail, with an exit code of its own, to flush it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
