"""`selfhost doctor`: look at laptop, rental and box, and print what can be put into an issue."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from rich.markup import escape
from rich.text import Text

from selfhost_cli import config, doctor
from selfhost_cli.cli import exposed, render, wiring, words
from selfhost_cli.doctor import Case, Check, Report, Verdict

MARKS = {
    Verdict.OK: "[green]✓[/]",
    Verdict.WARNING: "[yellow]![/]",
    Verdict.FAILED: "[red]✗[/]",
    Verdict.SKIPPED: "[dim]–[/]",
}
NAME = 21
"""Columns for the name of a check."""
INDENT = " " * 4
HIDES = "Secrets, and what looks like one, are hidden. The lines of logs may quote from your work: read them first."
WIDEST, NARROWEST = 100, 40


def run(profile: str, flags: Mapping[str, object], *, json: bool) -> int:
    """Print the report; its exit code. Raises UsageError for a name that no profile can have."""
    env = dict(os.environ)  # as it was: the market's SDK changes it
    case = Case(
        profile,
        config.paths(profile, env),
        env,
        load=lambda: config.load(profile, flags=flags, env=env),
        exposed=exposed.warning,
        provider=wiring.provider,
        reach=wiring.reach,
    )
    if sys.stderr.isatty():
        with render.err.status("looking at laptop, rental and box"):
            report = doctor.look(case)
    else:
        report = doctor.look(case)
    # Before anything is wrapped: a command that is cut in two is not found any more.
    report = report.with_texts(lambda text: words.in_profile(text, profile))
    render.as_json(report) if json else show(report)
    return report.exit_code


def show(report: Report) -> None:
    """The report, in lines that fit the terminal."""
    width = max(NARROWEST, min(WIDEST, render.out.width))
    for line in _wrap(f"selfhost {report.version}, profile {report.profile}, {report.at}, {report.platform}", width):
        _print(escape(line))
    for part, in_part in groupby(report.checks, key=lambda check: check.part):
        _print(f"\n[bold]{part}[/]")
        # What was skipped for one reason is one line.
        for why, checks in groupby(in_part, key=lambda check: check.verdict is Verdict.SKIPPED and check.why):
            for line in _together(list(checks), why, width) if why else _each(checks, width):
                _print(line)
    found = ", ".join(f"{report.count(verdict)} {verdict}" for verdict in Verdict if report.count(verdict))
    _print("")
    for line in _wrap(f"{found}; {report.seconds:.1f} s. {HIDES}", width):
        _print(escape(line))


def _print(markup: str) -> None:
    """Not as a string: the console would look for commands in it again."""
    render.out.print(Text.from_markup(markup))


def _each(checks: Iterable[Check], width: int) -> Iterator[str]:
    for check in checks:
        yield from lines(check, width)


def _together(checks: Sequence[Check], why: str, width: int) -> Iterator[str]:
    if len(checks) == 1:
        yield from lines(checks[0], width)
        return
    for number, line in enumerate(_wrap(f"{why} ({', '.join(check.name for check in checks)})", width - 2)):
        yield f"{'  ' if number else MARKS[Verdict.SKIPPED] + ' '}{escape(line)}"


def lines(check: Check, width: int) -> Iterator[str]:
    """A check as markup: what was seen, then what is wrong with it and what to do."""
    first, *more = check.saw.splitlines() or [""]
    if more:  # a log
        first, more = "", [first, *more]
    told = first or (check.why if check.verdict is Verdict.SKIPPED else "")
    took = f"{check.seconds:.1f} s" if check.seconds >= 0.05 else ""
    wrapped = [escape(line) for line in _wrap(told, width - NAME - 2 - len(took) - 2)] or [""]
    if took:
        wrapped[-1] = f"{wrapped[-1]}  [dim]{took}[/]".lstrip()
    yield f"{MARKS[check.verdict]} {escape(f'{check.name:<{NAME}}')}{wrapped[0]}".rstrip()
    for line in wrapped[1:]:
        yield " " * (NAME + 2) + line
    for line in more:
        yield escape(f"{INDENT}| {line}")
    if check.verdict in (Verdict.WARNING, Verdict.FAILED):
        for line in _wrap(check.why, width - len(INDENT)):
            yield escape(f"{INDENT}{line}")
        for number, line in enumerate(_wrap(check.remedy, width - len(INDENT) - 2)):
            yield escape(f"{INDENT}{'  ' if number else '→ '}{line}")


def _wrap(text: str, width: int) -> list[str]:
    """Long words, such as paths, stay whole, and commands on one line: they are copied from there."""
    whole = re.sub("`[^`\n]+`", lambda command: command[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    return [
        line.replace("\N{NO-BREAK SPACE}", " ")
        for row in whole.splitlines()
        for line in textwrap.wrap(row, max(20, width), break_long_words=False, break_on_hyphens=False)
    ]
