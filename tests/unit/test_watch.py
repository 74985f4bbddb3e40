"""`selfhost status --watch`: redrawn in place on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import config
from selfhost_cli.cli import watch
from selfhost_cli.countdown import Countdown
from selfhost_cli.invoice import invoice
from selfhost_cli.ledger import Ledger, Usage
from selfhost_cli.model import State
from selfhost_cli.status import Status
from tests.fakes.rental import make_rental
from tests.terminal import Terminal

NOW = 1_795_010_000.0
COMMAND = [sys.executable, "-m", "selfhost_cli", "status", "--watch"]


def value(**changes: Any) -> Status:
    rental = make_rental(state=State.READY, instance_id=7, sent_at=NOW - 3600, running_at=NOW - 3600)
    ends = (Countdown("idle", NOW + 2640, 2640.0),)
    made = Status(
        rental, "up", "", "http://127.0.0.1:8001", {"status": "healthy"}, invoice(rental, Usage(), now=NOW), ends, None
    )
    return replace(made, **changes)


def told(capsys: pytest.CaptureFixture[str], *looks: Sequence[Status], json: bool = False) -> list[str]:
    """What is printed while these are seen, one after the other, and then Ctrl-C."""
    seen = iter(looks)

    def ask() -> Sequence[Status]:
        try:
            return next(seen)
        except StopIteration:
            raise KeyboardInterrupt from None

    watch.run(ask, json=json, pause=lambda _: None)
    return capsys.readouterr().out.splitlines()


def test_without_a_terminal_each_change_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    later = (Countdown("idle", NOW + 2640, 2000.0),)
    lines = told(
        capsys,
        [value()],
        [value(ends=later)],  # time goes by
        [value(tunnel="down", reason="no answer for 3 s")],
        [value(tunnel="down", reason="no answer for 5 s")],
        [value(ends=(Countdown("idle", NOW, 300.0),))],
        [],
        [],
    )
    assert len(lines) == 4
    assert "box 7 (RTX 4090, $0.31/h) in Quebec, CA, ready; tunnel up, http://127.0.0.1:8001; proxy healthy" in lines[0]
    assert "in 44 min without a request" in lines[0]
    assert "tunnel down no answer for 3 s" in lines[1]
    assert "ends by itself in 5 min" in lines[2]
    assert lines[3].endswith(" no box")


def test_as_json_each_change_is_an_object_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = map(json.loads, told(capsys, [value()], [value()], [], json=True))
    assert first[0]["rental"]["instance_id"] == 7
    assert "box_token" not in first[0]["rental"]
    assert second == []


@pytest.mark.parametrize("width", [30, 80, 120])
def test_a_frame_has_all_of_the_status_and_fits(width: int) -> None:
    lines = watch.frame([value()], width, 60).plain.splitlines()
    assert max(map(len, lines)) < width
    words = "".join("".join(lines).split())
    for said in ("box7", "healthy", "http://127.0.0.1:8001", "withoutarequest", "Ctrl-Cendsit"):
        assert said in words
    assert len(watch.frame([value()], width, 5).plain.splitlines()) == 4


def test_a_frame_steers_no_terminal() -> None:
    assert "\x1b" not in watch.frame([value(reason="\x1b[2J\x1b]0;x\x07", box={"status": "\x1b[1m"})], 80, 40).plain


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    made = {"SELFHOST_HOME": str(tmp_path), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    paths = config.paths("default", made)
    paths.make()
    with closing(Ledger(paths.ledger)) as ledger:
        ledger.intend(make_rental(state=State.BOOTING, instance_id=7, created_at=time.time(), sent_at=time.time()))
    return made


@pytest.fixture
def terminal(env: dict[str, str], tmp_path: Path) -> Iterator[Terminal]:
    shown = Terminal(COMMAND, env=env, cwd=tmp_path)
    yield shown
    shown.close()


def test_on_a_terminal_it_is_redrawn_in_place_and_ctrl_c_ends_it_with_zero(
    env: dict[str, str], terminal: Terminal
) -> None:
    terminal.watch(lambda: "Ctrl-Cendsit" in terminal.shown)
    assert "booting" in terminal.shown
    with closing(Ledger(config.paths("default", env).ledger)) as ledger:
        (rental,) = ledger.live()
        ledger.amend(rental.label, state=State.ENDED)
    terminal.watch(lambda: "theledgerknowsofnobox" in terminal.shown)
    assert b"\x1b[1A" in terminal._data  # the cursor goes back up
    assert b"\x1b[?25l" in terminal._data
    terminal._process.send_signal(signal.SIGINT)
    assert terminal._process.wait(20) == 0


def test_in_a_dumb_terminal_there_are_lines_and_sigint_ends_them_with_zero(env: dict[str, str], tmp_path: Path) -> None:
    with subprocess.Popen(COMMAND, env=env | {"TERM": "dumb"}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert "booting; tunnel no keeper" in line
    assert (process.returncode, rest) == (0, "")
