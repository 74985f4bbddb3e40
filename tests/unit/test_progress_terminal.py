"""The live tree on a real pseudo-terminal, driven by a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import selfhost_cli
from tests.terminal import CONTROL, Terminal

CHILD = """
import os, signal, sys, time
from selfhost_cli.cli import progress
from selfhost_cli.cli.entry import boundary
from selfhost_cli.model import Event

def work():
    with progress.Talk(trace=True) as talk:
        with talk.aside():
            sys.stderr.write("Rent it? [y/N]: ")
            sys.stderr.flush()
            sys.stdin.readline()
        talk(Event("rent", "start", "renting it"))
        for done in range(3000):
            talk(Event("model", "progress", "tiny.gguf", done * 10_000, 60_000_000))
        print("a library speaks", file=sys.stderr)
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)

sys.exit(boundary(work))
"""
HIDDEN, SHOWN, ERASED = b"\x1b[?25l", b"\x1b[?25h", b"\x1b[2K"


def test_a_question_a_live_tree_and_an_interrupt_on_a_real_terminal(tmp_path: Path) -> None:
    root = str(Path(selfhost_cli.__file__).parent.parent)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": root, "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    terminal = Terminal([sys.executable, "-c", CHILD], env=env, cwd=tmp_path)
    try:
        terminal.watch(lambda: "Rentit?[y/N]:" in terminal.shown)
        assert HIDDEN not in terminal._data
        terminal.type("y\r")
        terminal.watch(lambda: "alibraryspeaks" in terminal.shown and "30of60MB" in terminal.shown)
        assert terminal._data.rfind(HIDDEN) > terminal._data.rfind(SHOWN)
        assert terminal.shown.index("alibraryspeaks") < terminal.shown.rindex("tiny.gguf"), "the tree is the lowest"
        terminal.type("\r")
        terminal.watch(lambda: "selfhost:interrupted" in terminal.shown)
        assert terminal._data.rfind(SHOWN) > terminal._data.rfind(HIDDEN)
        stays = CONTROL.sub("", terminal._data[terminal._data.rfind(ERASED) :].decode())
        said = ("– model", "30 of 60 MB", "where the time went", "selfhost: interrupted")
        order = [stays.index(words) for words in said]
        assert order == sorted(order)
        assert len(terminal._data) < 100_000, "a frame for every event"
    finally:
        terminal.close()
