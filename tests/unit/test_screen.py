"""What is redrawn in place, while the window changes and after Ctrl-Z."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

import selfhost_cli
from selfhost_cli.cli.screen import HIDE_CURSOR, SHOW_CURSOR, UP, Redrawn, rows
from tests.terminal import Terminal


@pytest.mark.parametrize(
    ("lines", "width", "wrapped"),
    [([80, 3], 80, 2), ([81, 3], 80, 3), ([0], 80, 1), ([100, 100, 20], 40, 7), ([100], 0, 100)],
)
def test_lines_take_the_rows_that_a_window_wraps_them_into(lines: list[int], width: int, wrapped: int) -> None:
    assert rows(lines, width) == wrapped


def test_a_window_that_became_narrower_leaves_nothing_behind_and_a_wider_one_loses_nothing() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, height=30, color_system=None)

    def ups(width: int) -> int:
        console.width = width
        file.seek(0)
        file.truncate()
        live.refresh()
        return file.getvalue().count(UP)

    with Redrawn(
        console=console,
        get_renderable=lambda: Text("\n".join(["x" * (console.width - 3)] * 4)),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as live:
        live.refresh()
        assert ups(100) == 3
        assert ups(40) == 4 * 3 - 1, "four lines of 97 columns are three rows each"
        assert ups(40) == 3
        assert ups(100) == 3


def test_what_handled_the_signals_before_handles_them_after() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTSTP, signal.SIGCONT)]
    with Redrawn(Text("x"), console=Console(file=io.StringIO()), auto_refresh=False):
        assert signal.getsignal(signal.SIGTSTP) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTSTP, signal.SIGCONT)] == before


SHELL = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], process_group=0)
for said in ("stopped once", "stopped twice"):
    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
    print("shell:", said, flush=True)
    sys.stdin.readline()
    os.kill(child.pid, signal.SIGCONT)
sys.exit(child.wait())
"""
CHILD = """
import os, signal, time
from selfhost_cli.cli import progress
from selfhost_cli.model import Event
with progress.Talk() as talk:
    talk(Event("rent", "start", "renting it"))
    for sign in (signal.SIGTSTP, signal.SIGSTOP):
        time.sleep(0.5)
        os.kill(os.getpid(), sign)
    time.sleep(0.5)
print("the end")
"""


def test_stopped_by_a_key_the_cursor_comes_back_and_after_that_the_tree(tmp_path: Path) -> None:
    root = str(Path(selfhost_cli.__file__).parent.parent)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": root, "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    terminal = Terminal([sys.executable, "-c", SHELL, CHILD], env=env, cwd=tmp_path)
    hide, show = HIDE_CURSOR.encode(), SHOW_CURSOR.encode()
    try:
        terminal.watch(lambda: "stoppedonce" in terminal.shown)
        stopped = terminal._data.index(b"shell:")
        assert terminal._data.rfind(show, 0, stopped) > terminal._data.rfind(hide, 0, stopped)
        terminal.type("\r")
        terminal.watch(lambda: "stoppedtwice" in terminal.shown)
        again = terminal._data[stopped : terminal._data.index(b"shell:", stopped + 1)]
        assert hide in again
        assert b"renting it" in again
        assert UP.encode() not in again[: again.index(b"renting it")], "what the shell wrote stays"
        terminal.type("\r")
        terminal.watch(lambda: "theend" in terminal.shown)
        last = terminal._data[terminal._data.index(b"shell: stopped twice") :]
        assert hide in last
        assert show in last[last.rindex(hide) :]
    finally:
        terminal.close()
