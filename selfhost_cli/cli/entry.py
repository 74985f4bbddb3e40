"""The `selfhost` command: `selfhost claude` takes a short way, everything else goes to Typer.

The short way must cost `claude` next to nothing, so it imports neither Typer nor anything that speaks to a market, a
box or an event loop, and what only some runs need is imported where it is needed.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from selfhost_cli.cli import words
from selfhost_cli.errors import NotSetUp, SelfhostError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""What a full or broken disk says, of what has no name: our own output."""


def main() -> NoReturn:
    """The console script."""
    words.speaking_for = profile_of(sys.argv[1:], os.environ)
    sys.exit(boundary(lambda: _run(sys.argv[1:])))


def boundary(action: Callable[[], int]) -> int:
    """Run a command; its exit code. The one place where errors become texts, and only those meant for a person.

    Anything else that is raised is a bug of ours and keeps its traceback.
    """
    try:
        code = action()
        if sys.stdout is not None:  # it is when it was closed before we started
            sys.stdout.flush()
        return code
    except SelfhostError as error:
        words.say(
            words.in_profile(
                f"selfhost: {error.message}" + (f"\n{error.remedy}" if error.remedy else ""), words.speaking_for
            )
        )
        return error.exit_code
    except KeyboardInterrupt:
        words.say("selfhost: interrupted")
        return 130
    except BrokenPipeError:
        return 128 + 13
    except OSError as error:
        if error.filename is not None:
            words.say(f"selfhost: {error.filename}: {error.strerror}")
            return NotSetUp.exit_code
        if error.errno not in UNWRITABLE:
            raise
        words.say(f"selfhost: the output cannot be written: {error.strerror}")
        return SelfhostError.exit_code
    finally:
        _drop_what_cannot_be_written()


def _drop_what_cannot_be_written() -> None:
    """What is left of stdout, after a failure to write it: the interpreter would try again at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        words.discard(1)


def profile_of(argv: Sequence[str], env: Mapping[str, str]) -> str:
    """The profile that a command line names, for what is said about it; whether it is right is checked elsewhere."""
    profile, words = env.get("SELFHOST_PROFILE") or "default", list(argv)
    for place, word in enumerate(words):
        if word == "--":
            break
        if word == "--profile" and place + 1 < len(words):
            profile = words[place + 1]
        elif word.startswith("--profile="):
            profile = word.partition("=")[2]
        elif word == "claude":
            break
    return profile


def claude_arguments(argv: Sequence[str], env: Mapping[str, str]) -> tuple[str, list[str]] | None:
    """Profile and Claude's own arguments when this is `selfhost [--profile NAME] claude …`, else None."""
    profile, rest = env.get("SELFHOST_PROFILE") or "default", list(argv)
    while rest:
        word = rest.pop(0)
        if word == "claude":
            return profile, rest
        if word == "--profile" and rest:
            profile = rest.pop(0)
        elif word.startswith("--profile="):
            profile = word.partition("=")[2]
        else:
            return None
    return None


def _run(argv: list[str]) -> int:
    wanted = claude_arguments(argv, os.environ)
    if wanted is not None:
        from selfhost_cli.cli import launch

        launch.claude(*wanted)
    from selfhost_cli.cli.app import run

    return run(argv)
