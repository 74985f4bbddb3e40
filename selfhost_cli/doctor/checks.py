"""The values of an examination, and how checks are run: each line in a thread of its own, with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum

from selfhost_cli.config import Paths, Settings
from selfhost_cli.errors import SelfhostError
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle.reaching import Reach
from selfhost_cli.providers import Provider

PARTS = ("laptop", "rental", "box")
AGAIN = "Run `selfhost doctor` again; should it stay, put this report into an issue."


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """What one check saw. `why`: what is wrong with it, or why it was not asked; `exit_code`: of a failure."""

    verdict: Verdict
    saw: str = ""
    why: str = ""
    remedy: str = ""
    exit_code: int = SelfhostError.exit_code


@dataclass(frozen=True)
class Check:
    """A finding with its name and the seconds that it took."""

    part: str
    name: str
    verdict: Verdict
    why: str
    saw: str
    remedy: str
    seconds: float
    exit_code: int = field(default=SelfhostError.exit_code, repr=False)

    def with_texts(self, change: Callable[[str], str]) -> Check:
        return replace(self, why=change(self.why), saw=change(self.saw), remedy=change(self.remedy))


@dataclass(frozen=True)
class Report:
    """All checks, in the order of PARTS; `exit_code` is the command's."""

    version: str
    profile: str
    platform: str
    at: str
    checks: tuple[Check, ...]
    seconds: float
    exit_code: int

    def with_texts(self, change: Callable[[str], str]) -> Report:
        return replace(self, checks=tuple(check.with_texts(change) for check in self.checks))

    def count(self, verdict: Verdict) -> int:
        return sum(check.verdict is verdict for check in self.checks)


@dataclass(frozen=True)
class Case:
    """Whom to look at, and with what: `load` reads the settings, `provider` and `reach` get to market and box.

    `exposed` says what others can read, and behind "; " the command that mends it, "" for nothing.
    """

    profile: str
    paths: Paths
    env: Mapping[str, str] = field(repr=False)
    load: Callable[[], Settings]
    exposed: Callable[[Paths], str]
    provider: Callable[[Settings], Provider]
    reach: Callable[[Settings], AbstractContextManager[tuple[Ledger, Reach]]]


@dataclass(frozen=True)
class Line:
    """Checks that share something: asked one after the other, `seconds` for all. `ask` gives a finding for each name.

    Where it ends early, the rest is skipped.
    """

    part: str
    names: tuple[str, ...]
    ask: Callable[[], Iterable[Finding]]
    seconds: float


def ok(saw: str) -> Finding:
    return Finding(Verdict.OK, saw)


def warning(saw: str, why: str, remedy: str = "") -> Finding:
    return Finding(Verdict.WARNING, saw, why, remedy)


def failed(saw: str, why: str, remedy: str = "", exit_code: int = SelfhostError.exit_code) -> Finding:
    return Finding(Verdict.FAILED, saw, why, remedy, exit_code)


def skipped(why: str) -> Finding:
    return Finding(Verdict.SKIPPED, why=why)


def raised(error: Exception) -> Finding:
    """What was raised instead of a finding. Of a bug of ours, too: a report that ends there helps nobody."""
    if isinstance(error, SelfhostError):
        return failed("", error.message, error.remedy or AGAIN, error.exit_code)
    return failed("", f"{type(error).__name__}: {error}", AGAIN)


def attempt(ask: Callable[[], Finding]) -> Finding:
    """One check of a line that the others do not depend on."""
    try:
        return ask()
    except Exception as error:
        return raised(error)


def examine(lines: Sequence[Line]) -> list[Check]:
    """Run all lines at once. Returns when each has ended or had its time; never raises."""
    runs = [_Run(line) for line in lines]
    for run in runs:
        run.start()
    return [check for run in runs for check in run.checks()]


class _Run(threading.Thread):
    """One line. A daemon: one that hangs is left behind."""

    def __init__(self, line: Line) -> None:
        super().__init__(name=f"doctor-{line.names[0]}", daemon=True)
        self._line = line
        self._found: list[tuple[Finding, float]] = []
        self._began = time.monotonic()

    def run(self) -> None:
        before = self._began
        try:
            for finding in self._line.ask():
                now = time.monotonic()
                self._found.append((finding, now - before))
                before = now
        except Exception as error:
            self._found.append((raised(error), time.monotonic() - before))

    def checks(self) -> Iterator[Check]:
        self.join(max(0.0, self._began + self._line.seconds - time.monotonic()))
        hangs, found = self.is_alive(), list(self._found)
        before = ""
        for place, name in enumerate(self._line.names):
            if place < len(found):
                finding, seconds = found[place]
            elif hangs and place == len(found):
                why = f"no answer within {self._line.seconds:g} s"
                finding, seconds = failed("", why, AGAIN), self._line.seconds
            else:
                finding, seconds = skipped(f"{before}: {'no answer' if hangs else 'it has to work first'}"), 0.0
            if place <= len(found) and finding.verdict is not Verdict.SKIPPED:
                before = name
            yield Check(
                self._line.part, name, finding.verdict, finding.why, finding.saw, finding.remedy,
                round(seconds, 3), finding.exit_code,
            )  # fmt: skip
