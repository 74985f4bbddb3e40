from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from selfhost_cli.lock import ProcessLock
from selfhost_cli.wait import Pending, TimedOut, until
from tests.fakes.clock import FakeClock


def test_until_returns_the_first_answer_that_is_not_pending() -> None:
    answers = iter([Pending("a"), Pending("b"), 0])
    clock = FakeClock()
    assert until(lambda: next(answers), what="x", seconds=10, every=2, clock=clock) == 0
    assert clock.sleeps == [2, 2]


def test_a_timeout_names_what_how_long_and_the_last_thing_seen() -> None:
    with pytest.raises(TimedOut, match=r"the box: not within 5 s; last seen: loading"):
        until(lambda: Pending("loading"), what="the box", seconds=5, every=2, clock=FakeClock())


def test_the_last_sleep_ends_with_the_deadline() -> None:
    clock = FakeClock()
    with pytest.raises(TimedOut):
        until(lambda: Pending(""), what="x", seconds=5, every=2, clock=clock)
    assert clock.sleeps == [2, 2, 1]


def test_what_a_probe_raises_ends_the_wait() -> None:
    def probe() -> Pending:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        until(probe, what="x", seconds=5, every=1, clock=FakeClock())


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = (
        "import sys; from pathlib import Path; from selfhost_cli.lock import ProcessLock\n"
        "lock = ProcessLock(Path(sys.argv[1])); print(lock.acquire(), flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        mine = ProcessLock(path)
        assert mine.holder() == child.pid
        assert not mine.acquire()
        child.kill()
        child.wait()
    assert mine.holder() is None
    assert mine.acquire()


def test_a_lock_that_was_never_taken_has_no_holder(tmp_path: Path) -> None:
    assert ProcessLock(tmp_path / "none").holder() is None
