from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from selfhost_cli.cli import progress, render
from selfhost_cli.cli.timeline import Timeline
from selfhost_cli.model import Event
from tests.unit.test_render import STEERING, steers
from tests.waiting import until


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError

    def isatty(self) -> bool:
        return False


def test_talk_goes_quiet_when_nobody_listens_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "err", render._Console(file=Broken()))
    with progress.Talk() as talk:
        talk(Event("boot", "done", "here"))
        talk(Event("boot", "done", "there"))


def test_progress_without_a_terminal_is_a_line_for_each_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()
    monkeypatch.setattr(render, "err", Console(file=told, width=100))
    with progress.Talk() as talk:
        for megabyte in range(101):
            talk(Event("model", "progress", "", megabyte * 1_000_000, 100_000_000))
        talk(Event("model", "done", "100 MB"))
    lines = told.getvalue().splitlines()
    assert len(lines) == 12
    assert "100 of 100 MB" in lines[-2]
    assert lines[-1].startswith("✓ model")
    assert re.search(r"50 of 100 MB, \d+ MB/s, \d+ s to go", told.getvalue())


def test_lines_of_stages_that_run_at_once_are_no_more_than_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()
    monkeypatch.setattr(render, "err", Console(file=told, width=100))
    with progress.Talk() as talk:
        for megabyte in range(101):
            talk(Event("model", "progress", "tiny", megabyte * 1_000_000, 100_000_000))
            talk(Event("proxy", "progress", "installing aiohttp"))
        talk(Event("proxy", "done", "aiohttp"))
        talk(Event("model", "done", "100 MB"))
    lines = told.getvalue().splitlines()
    assert sum("model" in line for line in lines) == 12
    assert all(re.search(r" \d+\.\d s$", line) for line in lines[-2:])
    assert len(lines) == 14


def test_what_interrupts_a_download_is_told_between_the_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()
    monkeypatch.setattr(render, "err", Console(file=told, width=100))
    with progress.Talk() as talk:
        talk(Event("model", "progress", "tiny", 10_000_000, 100_000_000))
        for text in ("tiny: interrupted (it stalled), going on", "tiny"):
            talk(Event("model", "progress", text, 12_000_000, 100_000_000))
    lines = told.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("tiny: interrupted (it stalled), going on")


def test_a_box_can_neither_break_the_display_nor_say_what_only_we_say(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Talk() as talk:
        talk(Event("[/]", "done", "[/x]\n✓ nothing is billed any more"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "[/]" in line
    assert "[/x]" in line


# --- the live tree ---


class Screen(io.StringIO):
    """What a terminal is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        self.writes += 1
        return super().write(text)

    @property
    def cursor_shown(self) -> bool:
        return self.getvalue().rfind("\x1b[?25h") >= self.getvalue().rfind("\x1b[?25l")

    @property
    def stays(self) -> str:
        """What is there when nothing moves any more: behind the last time that something was erased."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue()[self.getvalue().rfind("\x1b[2K") + 4 :])


def console(screen: Screen, term: str = "xterm-256color", **options: object) -> Console:
    return render._Console(
        file=screen,
        force_terminal=True,
        width=80,
        height=24,
        highlight=False,
        soft_wrap=True,
        _environ={"TERM": term, **{name: str(value) for name, value in options.items()}},
    )


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    screen, stderr = Screen(), sys.stderr
    monkeypatch.setattr(render, "err", console(screen))
    yield screen
    assert sys.stderr is stderr, "still taken over by the display"


RENTED = [
    Event("rent", "start", "renting it"),
    Event("rent", "done", "box 7"),
    Event("boot", "start", "box 7"),
    Event("boot", "done", "ssh at 127.0.0.1:22"),
    Event("upload", "start"),
    Event("upload", "done", "8 files"),
    Event("tools", "skip", "already there"),
]


def test_a_terminal_gets_a_tree_that_stays_when_it_is_over(screen: Screen) -> None:
    with progress.Talk() as talk:
        for event in (*RENTED, Event("start", "done", "healthy")):
            talk(event)
        assert not screen.cursor_shown
    lines = [re.sub(r" [\d.]+ s$", "", line) for line in screen.stays.splitlines() if line]
    assert lines == [
        "✓ rent       box 7",
        "✓ boot       ssh at 127.0.0.1:22",
        "✓ install   ",
        "  ✓ upload   8 files",
        "  ✓ tools    already there",
        "  ✓ start    healthy",
    ]
    assert screen.cursor_shown


def test_thousands_of_events_are_a_few_frames(screen: Screen) -> None:
    with progress.Talk() as talk:
        for done in range(5000):
            talk(Event("model", "progress", "tiny", done * 10_000, 50_000_000))
    assert screen.writes < 100


def test_what_is_printed_once_the_display_has_settled_is_below_it(screen: Screen) -> None:
    with progress.Talk() as talk:
        talk(RENTED[0])
        talk.settle()
        render.err.print("the end")
    assert screen.stays.splitlines()[-1] == "the end"
    assert screen.stays.count("renting it") == 1


def test_a_question_has_the_screen_and_the_cursor_to_itself(screen: Screen) -> None:
    with progress.Talk() as talk:
        talk(Event("down", "start", "destroying another one"))
        with talk.aside():
            assert screen.cursor_shown
            before = screen.getvalue()
            talk.settle()  # even the thread that draws is done
            assert screen.getvalue() == before
        talk(RENTED[0])
        assert not screen.cursor_shown


def test_notes_stay_above_the_tree_as_they_come(screen: Screen) -> None:
    with progress.Talk() as talk:
        talk(RENTED[0])
        talk(Event("rent", "note", "the offer is gone; trying the next one"))
        shown = screen.getvalue()
        assert shown.rfind("trying the next one") < shown.rfind("renting it")


def test_an_interrupt_leaves_the_terminal_as_it_was_and_says_how_far_it_was(screen: Screen) -> None:
    def interrupted() -> None:
        with progress.Talk() as talk:
            for event in (*RENTED, Event("model", "progress", "tiny.gguf", 20_000_000, 50_000_000)):
                talk(event)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert screen.cursor_shown
    assert "– install" in screen.stays
    assert "– model    20 of 50 MB, tiny.gguf" in screen.stays


def test_each_machine_has_a_tree_of_its_own(screen: Screen) -> None:
    with progress.Talk() as talk:
        for event in (*RENTED, Event("model", "fail", "no disk"), Event("down", "done", "none of ours")):
            talk(event)
        talk(Event("rent", "note", "another machine is tried"))
        assert screen.cursor_shown
        order = [screen.stays.index(said) for said in ("✗ install", "✗ model", "✓ down", "! rent       another")]
        assert order == sorted(order)
        talk(RENTED[0])
    assert "boot" not in screen.stays


def test_a_terminal_that_goes_away_ends_the_drawing_and_nothing_else(screen: Screen) -> None:
    with progress.Talk(trace=True) as talk:
        talk(RENTED[0])
        screen.gone = True
        until(lambda: talk._deaf, 5)  # the thread that draws has noticed
        for event in RENTED:
            talk(event)
        talk(Event("rent", "note", "nobody reads this"))
    assert "nobody" not in screen.getvalue()


@pytest.mark.parametrize(("term", "options"), [("dumb", {}), ("xterm", {"TTY_INTERACTIVE": 0})])
def test_where_the_cursor_cannot_be_moved_progress_is_lines(
    monkeypatch: pytest.MonkeyPatch, term: str, options: dict[str, int]
) -> None:
    screen = Screen()
    monkeypatch.setattr(render, "err", console(screen, term, **options))
    with progress.Talk() as talk:
        for event in RENTED:
            talk(event)
    assert "\x1b[2K" not in screen.getvalue()
    assert "\x1b[?25l" not in screen.getvalue()
    assert "… rent            renting it" in screen.getvalue()


def test_a_terminal_that_cannot_show_our_marks_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(Screen, "encoding", "ascii")
    monkeypatch.setattr(render, "err", console(screen))
    with progress.Talk() as talk:
        talk(RENTED[0])
    assert "\x1b[2K" not in screen.getvalue()


def test_without_colours_the_marks_still_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(render, "err", console(screen, NO_COLOR=1))
    with progress.Talk() as talk:
        for event in (*RENTED, Event("model", "fail", "no disk")):
            talk(event)
    assert "✗ model" in screen.stays
    assert not re.search(r"\x1b\[[0-9;]*3\dm", screen.getvalue())


class Hand:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def drawn(width: int, height: int, *events: tuple[float, Event], after: float = 0.0) -> list[str]:
    """The frame after these, each so many seconds behind the one before."""
    clock = Hand()
    times = Timeline(clock)
    for seconds, event in events:
        clock.now += seconds
        times.tell(event)
    clock.now += after
    return progress.frame(times, width, height).plain.split("\n")


LONG = "a-very-long-name-of-a-model-that-goes-on-and-on-and-on-q4_k_m.gguf"
PULL = (
    (0.0, RENTED[0]),
    (1.0, RENTED[1]),
    (0.0, RENTED[2]),
    (30.0, RENTED[3]),
    (0.0, Event("model", "start")),
    (0.0, Event("model", "progress", LONG, 0, 19_000_000_000)),
    (5.0, Event("model", "progress", LONG, 500_000_000, 19_000_000_000)),
)


def test_a_download_shows_how_much_how_fast_and_how_long_still() -> None:
    rent, _, install, model, tunnel, health = drawn(100, 24, *PULL)
    assert rent.split() == ["✓", "rent", "box", "7", "1.0", "s"]
    assert install.split()[1:] == ["install", "5", "s"]
    assert "a-very-long" in model
    assert "─" in model
    assert model.endswith("0.5 of 19.0 GB, 100.0 MB/s, 3:05 to go 5 s")
    assert (tunnel.strip(), health.strip()) == ("· tunnel", "· health")


@pytest.mark.parametrize("width", [20, 37, 50, 60, 77, 97])
def test_every_line_fits_whatever_the_width_and_how_much_is_there_goes_last(width: int) -> None:
    lines = drawn(width, 24, *PULL)
    assert max(map(len, lines)) <= width
    if width >= 37:
        assert "0.5 of 19.0 GB" in lines[3]


def test_a_rate_falls_while_nothing_comes() -> None:
    (line,) = (line for line in drawn(97, 24, *PULL, after=20.0) if "GB" in line)
    assert "20.0 MB/s" in line


def test_a_rate_is_that_of_the_last_seconds() -> None:
    slow = [(1.0, Event("model", "progress", LONG, n * 1_000_000, 3_000_000_000)) for n in range(30)]
    fast = [(1.0, Event("model", "progress", LONG, n * 100_000_000, 3_000_000_000)) for n in range(1, 15)]
    assert "100.0 MB/s" in "".join(drawn(97, 24, *slow, *fast))


def test_a_low_terminal_keeps_what_goes_on() -> None:
    lines = drawn(77, 2, *PULL)
    assert len(lines) == 2
    assert "GB" in lines[-1]


def test_all_that_goes_on_at_once_is_shown() -> None:
    times = Timeline(lambda: 0.0)
    for event in (Event("model", "start"), Event("proxy", "start"), Event("model", "progress", "tiny.gguf", 1, 2)):
        times.tell(event)
    lines = progress.frame(times, 80, 20).plain.splitlines()
    spinning = [line.split()[1] for line in lines if line.strip()[0] in progress.SPINNER]
    assert spinning == ["install", "model", "proxy"]


def test_what_is_over_is_folded_into_a_line() -> None:
    events = [(0.0, event) for event in RENTED[4:]] + [(4.0, Event("start", "done", "healthy"))]
    lines = drawn(77, 24, *events, (0.0, Event("tunnel", "start")))
    assert lines[0].split() == ["✓", "install", "healthy", "4.0", "s"]
    assert lines[1].split()[1] == "tunnel"


def test_the_live_display_shows_no_steering_either(screen: Screen) -> None:
    for total in (None, 100_000_000):
        with progress.Talk(trace=True) as talk:
            talk(Event(STEERING, "progress", STEERING, 1, total))
            talk(Event(STEERING, "note", STEERING))
    sent = re.sub(r"\x1b\[(\?25[lh]|2K|1A|[0-9;]*m)|\r(?=\x1b)", "", screen.getvalue())
    assert "gone" in sent
    assert not steers(sent)


# --- where the time went ---


def test_a_trace_is_printed_at_the_end_whatever_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    told, clock = io.StringIO(), Hand()
    monkeypatch.setattr(render, "err", Console(file=told, width=80))

    def failing() -> None:
        with progress.Talk(trace=True, clock=clock) as talk:
            clock.now += 1
            with talk.aside():
                clock.now += 60
            talk(Event("rent", "start", "it"))
            clock.now += 1
            talk(Event("rent", "done", "box 7"))
            talk(Event("model", "progress", LONG, 0, 60_000_000))
            clock.now += 2
            talk(Event("model", "progress", "checking", 60_000_000, 60_000_000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    rows = told.getvalue()[told.getvalue().index("where the time went") :].splitlines()
    assert [re.split(r"  +", row.strip()) for row in rows] == [
        ["where the time went", "seconds", "share"],
        ["plan", "1.0", "25%"],
        ["question", "60.0"],
        ["rent", "1.0", "25%"],
        ["install", "2.0", "50%"],
        ["model", "2.0", "50%", "60 MB, 30.0 MB/s"],
        ["total", "4.0"],
    ]
    assert max(map(len, rows)) <= 80


def test_nothing_is_traced_of_what_was_never_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()
    monkeypatch.setattr(render, "err", Console(file=told, width=80))
    with progress.Talk(trace=True) as talk, talk.aside():
        pass
    assert told.getvalue() == ""
