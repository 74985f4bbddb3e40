"""Events -> what a person sees of a command at work: on stderr, beside the product."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from rich.markup import escape
from rich.text import Text

from selfhost_cli.cli import render, words
from selfhost_cli.cli.screen import Redrawn
from selfhost_cli.cli.timeline import LEAST_S, PLAN, QUESTION, WAY, Group, Span, Stage, Status, Timeline, Transfer
from selfhost_cli.model import Event

FRAMES = 5
"""Of the live display in a second, whatever the number of events."""
WIDEST = 100
"""Columns: times that stand further away from what they belong to are hard to read."""
BIG = 10_000_000
"""Bytes of a download from which on it is worth a bar."""
NAME = 10
"""Columns for it, in the tree."""
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
GLYPHS: dict[Status, tuple[str, str]] = {
    "done": ("✓", "green"),
    "skip": ("✓", "green"),
    "fail": ("✗", "red"),
    "left": ("–", "yellow"),
}


@dataclasses.dataclass
class _Told:
    """What the lines said of a stage that goes on; it began then. `head_start` in bytes."""

    began: float
    text: str = ""
    tenth: int = -1
    words: str = ""
    news: str = ""
    head_start: int = 0


class Talk:
    """Progress on stderr: a live tree on a terminal, plain lines elsewhere. Use as a context manager.

    `trace`: at the end, print where the time went. Never raises: when nobody listens any more, what is being told about
    (a clean-up, say) must go on.
    """

    MARKS: ClassVar = {"done": "[green]✓[/]", "skip": "[green]✓[/]", "fail": "[red]✗[/]", "note": "[yellow]![/]"}

    def __init__(self, *, trace: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        err = render.err
        # Where the cursor cannot be moved, or our marks cannot be written, lines do.
        self._draws = err.file.isatty() and err.is_interactive and not err.options.ascii_only
        self._times, self._lock = Timeline(clock), threading.Lock()
        self._traces = trace
        self._clock = clock
        self._deaf = False
        self._live: _Live | None = None
        self._said = ""
        self._told: dict[str, _Told] = {}

    def __enter__(self) -> Talk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()
        if self._traces:
            self._tell(lambda: _print_trace(self.trace()))

    def __call__(self, event: Event) -> None:
        said = dataclasses.replace(event, stage=_in_a_line(event.stage), text=_in_a_line(event.text))
        if said.stage == "rent" and any(group.name != "rent" for group in self._times.groups):
            self.settle()  # what became of one machine, and then the next
        with self._lock:
            self._times.tell(said)
        self._tell(lambda: self._draw(said) if self._draws else self._show(said))

    def settle(self) -> None:
        """Something else is printed next: what was shown stays, as it ended, and nothing moves any more."""
        live, self._live = self._live, None
        try:
            if live:
                live.stop()
        except OSError:
            self._deaf = True
        with self._lock:
            shown = self._times.close()
        if self._draws:
            self._tell(lambda: _print_tree(shown))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A person is asked something meanwhile: the screen is theirs, and the time, too."""
        self.settle()
        self._times.mark(PLAN)
        try:
            yield
        finally:
            self._times.mark(QUESTION)

    def trace(self) -> tuple[Span, ...]:
        """Where the time went until now."""
        return self._times.trace()

    def _tell(self, telling: Callable[[], None]) -> None:
        if self._deaf:
            return
        try:
            telling()
        except OSError:
            self._deaf = True

    # --- lines ---

    def _show(self, event: Event) -> None:
        if event.status in ("start", "progress"):
            self._told.setdefault(event.stage, _Told(self._clock()))
        if event.status in self.MARKS:
            self._say(self.MARKS[event.status], event.stage, event.text or event.status, self._took(event))
        elif event.total is not None and event.done is not None:
            self._say_tenth(event.stage, event.done, event.total, event.text)
        elif event.text and event.text != self._told[event.stage].text:
            self._told[event.stage].text = event.text
            self._say("…", event.stage, event.text)

    def _took(self, event: Event) -> str:
        """Where it is over; what comes of that stage then is another beginning."""
        told = None if event.status == "note" else self._told.pop(event.stage, None)
        return f" [dim]{self._clock() - told.began:.1f} s[/]" if told and event.status == "done" else ""

    def _say(self, mark: str, stage: str, text: str, took: str = "") -> None:
        line = f"{mark} {escape(f'{stage:<15} {text}')}"
        if line != self._said:
            self._said = line
            render.err.print(line + took)

    def _say_tenth(self, stage: str, done: int, total: int, text: str) -> None:
        """A line for each tenth of a download and for what interrupts it: a log can bear that. None for small ones."""
        if total < BIG:
            return
        tenth, so_far = 10 * done // total, self._told[stage]
        if so_far.tenth < 0:
            so_far.head_start, so_far.words = done, text  # from before we looked: onstart's, or an earlier run's
        if tenth > so_far.tenth or text not in (so_far.words, so_far.news):
            so_far.tenth, so_far.news = tenth, text
            rate = (done - so_far.head_start) / max(0.5, self._clock() - so_far.began)
            told = [f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"]
            if rate:
                told.append(f"{rate / 1e6:.0f} MB/s")
            if rate and done < total:
                told.append(f"{(total - done) / rate:.0f} s to go")
            if text != so_far.words:
                told.append(text)
            self._say("…", stage, ", ".join(told))

    # --- the tree ---

    def _draw(self, event: Event) -> None:
        if event.status == "note":  # above the tree, where it stays
            render.err.print(_entry(("!", "yellow"), event.stage, event.text))
        elif self._live is None:
            self._live = _Live(self._frame, self._lost)
            self._live.start(refresh=True)

    def _frame(self) -> Text:
        with self._lock:
            # A Ctrl-C is echoed where the last line ends.
            return frame(self._times, min(render.err.width, WIDEST) - len("^C "), render.err.height - 1)

    def _lost(self) -> None:
        self._deaf = True


def frame(times: Timeline, width: int, height: int) -> Text:
    """What is over in a line each, what goes on with its stages, what is still to come; cut to so much room."""
    lines = [line for group in times.groups for line in _lines(times, group, width)]
    coming = [_line(("·", "dim"), name, "", "", width) for name in _to_come(times.groups)]
    return Text("\n").join(lines[-max(1, height) :] + coming[: max(0, height - len(lines))])


def _lines(times: Timeline, group: Group, width: int) -> list[Text]:
    stages = list(group.stages.values())
    if group.alone:
        return [_of_stage(times, group.alone, times.elapsed(group), width)]
    text = stages[-1].text if group.status == "done" else ""
    took = _took(times.elapsed(group), group.status == "running")
    head = _line(_glyph(times, group.status), group.name, text, took, width)
    if group.status == "done":
        return [head]
    return [head, *(_of_stage(times, stage, times.elapsed(stage), width, depth=1) for stage in stages)]


def _of_stage(times: Timeline, stage: Stage, seconds: float, width: int, depth: int = 0) -> Text:
    running, transfer, bar = stage.status == "running", stage.transfer, None
    if running and transfer and transfer.total >= BIG and transfer.done < transfer.total:
        bar = (transfer, transfer.rate(times.clock()))
    glyph = _glyph(times, stage.status)
    return _line(glyph, stage.name, stage.text, _took(seconds, running), width, depth, bar)


def _glyph(times: Timeline, status: Status) -> tuple[str, str]:
    return GLYPHS.get(status) or (SPINNER[int(times.clock() * FRAMES) % len(SPINNER)], "green")


class _Live(Redrawn):
    """Drawn by a thread of its own, at its own pace. Errors of writing end the drawing and nothing else."""

    def __init__(self, draw: Callable[[], Text], lost: Callable[[], None]) -> None:
        super().__init__(
            console=render.err,
            get_renderable=draw,
            refresh_per_second=FRAMES,
            transient=True,
            redirect_stdout=False,  # the product does not go to stderr
            vertical_overflow="crop",
        )
        self._lost = lost

    def refresh(self) -> None:
        try:
            super().refresh()
        except OSError:
            self._lost()
            if self._refresh_thread:
                self._refresh_thread.stop()


def _to_come(groups: Sequence[Group]) -> Sequence[str]:
    """What a box that gets ready still goes through: nothing is known once something failed, or was ended."""
    if not groups or groups[-1].name not in WAY or any(group.status in ("fail", "left") for group in groups):
        return ()
    been = {group.name for group in groups}
    return [name for name in WAY[WAY.index(groups[-1].name) + 1 :] if name not in been]


def _head(mark: str, style: str, name: str, depth: int) -> Text:
    name = words.in_profile(name.removeprefix("health: "), words.speaking_for)
    said = f" {name:<{NAME - 2 * depth}} "
    return Text("  " * depth).append(mark, style).append(said, "dim" if mark == "·" else "")


def _line(
    glyph: tuple[str, str],
    name: str,
    text: str,
    took: str,
    width: int,
    depth: int = 0,
    bar: tuple[Transfer, float] | None = None,
) -> Text:
    """One line of a frame, cut to `width` columns."""
    line = _head(*glyph, name, depth)
    text, room = words.in_profile(text, words.speaking_for), max(0, width - line.cell_len - cell_len(took) - 1)
    line.append_text(_transfer(*bar, text, room) if bar else Text(_cut(text, room)))
    if took:
        line.append(" " * max(1, width - line.cell_len - cell_len(took))).append(took, "dim")
    line.truncate(width, overflow="ellipsis")
    return line


def _entry(glyph: tuple[str, str], name: str, text: str, took: str = "", depth: int = 0) -> Text:
    """What stays: all of it, set in where it takes more than a line."""
    line = _head(*glyph, name, depth)
    body = Text(words.in_profile(f"{text} " if text and took else text, words.speaking_for)).append(took, "dim")
    lines = body.wrap(render.err, max(20, render.err.width - line.cell_len))
    return line.append_text(Text("\n" + " " * line.cell_len).join(lines))


def _transfer(transfer: Transfer, rate: float, text: str, room: int) -> Text:
    """How much, when it ends, how fast, a bar, what: in this order of weight, as far as there is room."""
    told = [_amount(transfer.done, transfer.total)]
    if rate > 0:
        told.append(f"{rate / 1e6:.1f} MB/s")
        told.append(f"{_clock((transfer.total - transfer.done) / rate)} to go")
    while len(told) > 1 and len(", ".join(told)) > room:
        told.pop(1)
    figures = ", ".join(told)
    left = room - len(figures)
    bar = 20 if left >= 22 else 10 if left >= 12 else 0
    left -= bar + 1 if bar else 0
    line = Text(_cut(text, left - 1) + " " if text and left >= 8 else "")
    if bar:
        full = bar * transfer.done // transfer.total
        line.append("━" * full, "green").append("─" * (bar - full) + " ", "dim")
    return line.append(_cut(figures, room))


def _amount(done: int, total: int) -> str:
    if total < 1_000_000_000:
        return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
    return f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"


def _clock(seconds: float) -> str:
    """Such as "12 s", "3:20", "1:03:20"."""
    whole = round(min(seconds, 359_999))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _took(seconds: float, running: bool = False) -> str:
    """Tenths are for what is over: in what goes on, they would only flicker."""
    return _clock(int(seconds)) if running or seconds >= 60 else f"{seconds:.1f} s"


def _cut(text: str, room: int) -> str:
    if cell_len(text) <= room:
        return text
    return set_cell_size(text, room - 1).rstrip() + "…" if room > 1 else ""


def _print_tree(groups: Sequence[Group]) -> None:
    for group in groups:
        text = _outcome(group.alone) if group.alone else ""
        render.err.print(_entry(GLYPHS[group.status], group.name, text, _took(group.seconds)))
        for stage in () if group.alone else group.stages.values():
            render.err.print(_entry(GLYPHS[stage.status], stage.name, _outcome(stage), _took(stage.seconds), depth=1))


def _outcome(stage: Stage) -> str:
    """What it said last, or how far it came."""
    if stage.status != "left" or not stage.transfer or stage.transfer.total < BIG:
        return stage.text
    return f"{_amount(stage.transfer.done, stage.transfer.total)}, {stage.text}".removesuffix(", ")


def _print_trace(spans: Sequence[Span]) -> None:
    if not any(span.name not in (PLAN, QUESTION) for span in spans):
        return  # nothing was done
    name = max(12, min(44, render.err.width - 28))
    render.err.print(Text(f"{'where the time went':<{name}} {'seconds':>8}  share", "bold"))
    for span in (span for span in spans if span.name != QUESTION or span.seconds >= LEAST_S):
        _print_span(span, name, 0)
    whole = sum(span.seconds for span in spans if span.name != QUESTION)
    render.err.print(Text(f"{'total':<{name}} {whole:>8.1f}", "bold"))


def _print_span(span: Span, width: int, depth: int) -> None:
    name = set_cell_size(_cut("  " * depth + span.name, width), width)
    share = "      " if span.share is None else f"{span.share:>6.0%}"
    line = f"{name} {span.seconds:>8.1f} {share}"
    if span.bytes and span.bytes >= BIG and span.seconds >= LEAST_S:
        came = f"  {span.bytes / 1e6:.0f} MB, {span.bytes / 1e6 / span.seconds:.1f} MB/s"
        line += came if cell_len(line + came) <= render.err.width else ""
    render.err.print(Text(line.rstrip()))
    for part in (part for part in span.parts if part.seconds >= LEAST_S):
        _print_span(part, width, depth + 1)


def _in_a_line(text: str) -> str:
    """A box names its stages and tells what it does: in a second line it could say what only we say."""
    return words.plain(text).replace("\n", " ")
