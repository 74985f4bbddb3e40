"""`selfhost batch`: a file of prompts, asked a few at a time; a bar tells tokens, dollars and what is left."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from selfhost_cli.batch import run as running
from selfhost_cli.batch.journal import Journal, Result
from selfhost_cli.batch.tasks import Task, read
from selfhost_cli.claude import cache_wish
from selfhost_cli.cli import launch, render
from selfhost_cli.cli.launch import Serving
from selfhost_cli.cli.words import say
from selfhost_cli.config import Settings
from selfhost_cli.errors import SelfhostError, UsageError, plain

STDIN = "-"
FAILED_SHOWN = 20


class SomeFailed(SelfhostError):
    """Of the tasks, so that a script sees it."""


@dataclass
class Tally:
    """What came of it so far."""

    serving: Serving
    began: float = field(default_factory=time.monotonic)
    answered: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    failed: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        if result.error:
            self.failed.append(result)
        else:
            self.answered += 1
        self.input_tokens += result.input_tokens
        self.cached_tokens += result.cached_tokens
        self.output_tokens += result.output_tokens

    @property
    def dollars(self) -> float:
        """The time of all boxes, or the service's tokens."""
        if boxes := self.serving.boxes:
            return (time.monotonic() - self.began) / 3600 * sum(box.dph_total for box in boxes)
        new = self.input_tokens - self.cached_tokens
        return self.serving.price(new, self.cached_tokens, self.output_tokens)

    def told(self) -> str:
        return f"{self.input_tokens} tokens in, {self.output_tokens} out, {render.money(self.dollars)}"


def run(settings: Settings, source: str, out: Path | None, *, at_once: int | None, max_tokens: int, json: bool) -> None:
    """Ask what has no answer yet. Raises UsageError before anything is asked, SomeFailed at the end."""
    tasks = _tasks(source)
    wish = cache_wish(os.environ)
    path = out or _beside(source)
    journal = Journal(path)
    try:
        left = journal.left(tasks)
        if len(left) < len(tasks):
            say(f"selfhost: {len(tasks) - len(left)} of {len(tasks)} tasks are answered in {path} already")
        if left:
            serving = launch.serving(settings, then="asking all the same")
            tally = Tally(serving)
            with _interruptible(path):
                asyncio.run(_run(tally, left, journal, wish, at_once or serving.slots, max_tokens, json=json))
            _conclude(tally, path)
    finally:
        journal.close()


def _tasks(source: str) -> list[Task]:
    if source == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("there are no tasks on stdin", "Name a file, or pipe prompts, one a line.")
        return read(sys.stdin, "stdin")
    try:
        return read(Path(source).read_text().split("\n"), source)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"{source}: {why}") from error


def _beside(source: str) -> Path:
    if source == STDIN:
        raise UsageError("where are the results to go?", "Pass --out FILE.")
    path = Path(source)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.results.jsonl")


async def _run(
    tally: Tally, tasks: list[Task], journal: Journal, wish: str, at_once: int, max_tokens: int, *, json: bool
) -> None:
    with _bar(len(tasks)) as bar:
        line = bar.add_task("", total=len(tasks), told=tally.told())

        def keep(result: Result) -> None:
            journal.keep(result)
            tally.add(result)
            bar.update(line, advance=1, told=tally.told())
            if json:
                render.as_json_line(result)
            if result.error and not bar.console.is_terminal:
                say(f"selfhost: task {plain(result.id)}: {result.error}")

        async with running.connected(tally.serving.front, wish) as http:
            await running.run(http, tasks, model=tally.serving.model, max_tokens=max_tokens, at_once=at_once, keep=keep)


def _bar(total: int) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
        console=render.err,
        transient=False,
        disable=not render.err.is_terminal,
    )


@contextmanager
def _interruptible(path: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(f"selfhost: what was answered is in {path}; the same command goes on with the rest")
        raise


def _conclude(tally: Tally, path: Path) -> None:
    seconds = time.monotonic() - tally.began
    say(f"selfhost: {tally.answered} answered in {seconds:.0f} s, {tally.told()}; they are in {path}")
    if tally.failed:
        shown = [f"  {plain(one.id)}: {one.error}" for one in tally.failed[:FAILED_SHOWN]]
        more = len(tally.failed) - len(shown)
        listed = "\n".join([*shown, *([f"  and {more} more"] if more else [])])
        raise SomeFailed(f"{len(tally.failed)} tasks failed:\n{listed}", "The same command asks them again.")
