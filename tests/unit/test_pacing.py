"""Turns at the market: who waits how long, and that a book which cannot be used is in nobody's way."""

from __future__ import annotations

import itertools
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest

from selfhost_cli import config
from selfhost_cli.cli import wiring as cli_wiring
from selfhost_cli.errors import MarketUnreachable
from selfhost_cli.keeper import wiring as keeper_wiring
from selfhost_cli.providers import pacing
from selfhost_cli.providers.pacing import LONGEST_S, PATIENCE_S, SLACK_S, Limit, Pacer
from selfhost_cli.providers.vast import LIMITS, VastProvider
from tests.fakes.clock import FakeClock

URL = "https://market.test"
LIST = Limit(1.0)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    return tmp_path / "turns.sqlite3"


def turns(pacer: Pacer, clock: FakeClock, number: int, call: str = "list", limit: Limit = LIST) -> list[float]:
    """When so many calls were made, one after the other."""
    made = []
    for _ in range(number):
        pacer.wait(call, limit)
        made.append(clock.now)
    return made


def closest(times: list[float]) -> float:
    return min(later - earlier for earlier, later in itertools.pairwise(times))


def test_two_processes_share_the_turns_and_each_interval_has_slack(book: Path) -> None:
    clock = FakeClock()
    one, other = Pacer(book, URL, clock=clock), Pacer(book, URL, clock=clock)
    made = [made for _ in range(5) for pacer in (one, other) for made in turns(pacer, clock, 1)]
    assert made[0] == 1_795_000_000.0, "the first one need not wait"
    assert closest(made) >= LIST.every + SLACK_S
    assert made[-1] - made[0] < 9 * (LIST.every + 1.1)


def test_two_waits_are_not_equally_long(book: Path) -> None:
    clock = FakeClock()
    made = turns(Pacer(book, URL, clock=clock), clock, 5)
    assert len({round(later - earlier, 6) for earlier, later in itertools.pairwise(made)}) == 4


def test_many_real_processes_at_once_get_turns_apart(book: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from selfhost_cli.wait import SystemClock\n"
        "from selfhost_cli.providers.pacing import Limit, Pacer\n"
        "class Clock(SystemClock):\n"
        "    def time(self):\n"
        "        self.last = super().time()\n"
        "        return self.last\n"
        "clock = Clock()\n"
        "for _ in range(8):\n"
        f"    Pacer(Path(sys.argv[1]), {URL!r}, 0.02, clock=clock).wait('list', Limit(1.0))\n"
        "    print(clock.last)\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(book)], stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    made = sorted(float(line) for process in started for line in process.communicate(timeout=60)[0].split())
    assert len(made) == 48
    assert closest(made) >= 0.02 * (LIST.every + SLACK_S) - 0.002


def test_who_calls_slowly_again_and_again_does_not_keep_others_waiting(book: Path) -> None:
    """Each slow answer postpones the turns of those who wait, but not their place."""
    slow, done = [], Event()

    def call_slowly() -> None:
        while not done.is_set() and len(slow) < 25:
            with Pacer(book, URL, 0.2).turn("list", LIST):
                time.sleep(0.3)
            slow.append(time.monotonic())

    thread = Thread(target=call_slowly)
    thread.start()
    try:
        for _ in range(4):
            Pacer(book, URL, 0.2).wait("list", LIST)
    finally:
        done.set()
        thread.join()
    assert len(slow) < 13


def test_ten_searches_a_minute_are_allowed_and_the_first_ones_at_once(book: Path) -> None:
    clock = FakeClock()
    made = turns(Pacer(book, URL, clock=clock), clock, 25, "search", LIMITS["search"])
    assert made[3] == made[0]
    # A second more than a minute: what left in time may arrive late.
    assert max(sum(start <= at < start + 61 for at in made) for start in made) <= 10


def test_who_polls_is_not_in_the_way_of_a_destroy_nor_is_another_market(book: Path) -> None:
    clock = FakeClock()
    pacer = Pacer(book, URL, clock=clock)
    pacer.wait("show", LIMITS["show"])
    pacer.hold("show", 20)
    pacer.wait("destroy", LIMITS["destroy"])
    Pacer(book, "https://other.test", clock=clock).wait("show", LIMITS["show"])
    assert clock.sleeps == []
    pacer.wait("show", LIMITS["show"])
    assert clock.sleeps == [20]


@pytest.mark.parametrize(("pace", "least", "most"), [(0.0, 0.0, 0.0), (2.0, 3.0, 4.0)])
def test_the_setting_stretches_the_intervals_or_drops_them(book: Path, pace: float, least: float, most: float) -> None:
    clock = FakeClock()
    made = turns(Pacer(book, URL, pace, clock=clock), clock, 2)
    assert least <= made[1] - made[0] <= most


def test_silence_holds_for_everybody_even_without_intervals_and_for_that_call_only(book: Path) -> None:
    clock = FakeClock()
    Pacer(book, URL, clock=clock).hold("list", 20)
    other = Pacer(book, URL, 0.0, clock=clock)
    other.wait("show", LIST)
    assert clock.sleeps == []
    other.wait("list", LIST)
    assert clock.sleeps == [20]


def test_silence_holds_for_whoever_waits_already(book: Path) -> None:
    class Interrupted(FakeClock):
        """While the first one sleeps, the market tells somebody else to be silent."""

        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if len(self.sleeps) == 1:
                Pacer(book, URL, clock=self).hold("list", 20)

    clock = Interrupted()
    pacer = Pacer(book, URL, clock=clock)
    pacer.wait("list", LIST)
    before = clock.now
    pacer.wait("list", LIST)
    assert clock.now - before >= 21


def test_after_a_slow_call_the_interval_counts_from_its_answer_for_those_who_wait_already(book: Path) -> None:
    class Meanwhile(FakeClock):
        """While the second process waits, the call of the first one takes as long."""

        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if len(self.sleeps) == 1:
                first.__exit__(None, None, None)

    clock = Meanwhile()
    first = Pacer(book, URL, clock=clock).turn("list", LIST)
    first.__enter__()
    with Pacer(book, URL, clock=clock).turn("list", LIST):
        assert clock.now - 1_795_000_000.0 >= 3


def test_a_quick_call_costs_nobody_anything(book: Path) -> None:
    clock = FakeClock()
    pacer = Pacer(book, URL, clock=clock)
    for _ in range(2):
        with pacer.turn("list", LIST):
            clock.now += 0.1
    assert clock.sleeps[0] <= 1.9


def test_a_turn_that_was_overslept_is_taken_again(book: Path) -> None:
    class Suspended(FakeClock):
        """The laptop sleeps for an hour while somebody waits; the next process is faster when it wakes up."""

        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if len(self.sleeps) == 1:
                self.now += 3600
                made.extend(turns(Pacer(book, URL, clock=self), self, 1))

    made: list[float] = []
    clock = Suspended()
    pacer = Pacer(book, URL, clock=clock)
    pacer.wait("list", LIST)
    made.extend(turns(pacer, clock, 1))
    assert len(made) == 2
    assert closest(made) >= 1.5


def test_no_wait_is_longer_than_a_minute_and_who_gives_up_takes_no_turn(book: Path) -> None:
    clock = FakeClock()
    pacer = Pacer(book, URL, clock=clock)
    pacer.hold("list", PATIENCE_S + 5)
    for _ in range(50):
        with pytest.raises(MarketUnreachable, match="another 65 s"):
            pacer.wait("list", LIST)
    clock.now += 5
    pacer.wait("list", LIST)
    assert clock.sleeps == [PATIENCE_S]


def test_a_market_that_asks_for_a_day_is_asked_again_after_minutes(book: Path) -> None:
    clock = FakeClock()
    Pacer(book, URL, clock=clock).hold("destroy", 86_400)
    clock.now += LONGEST_S
    Pacer(book, URL, clock=clock).wait("destroy", LIMITS["destroy"])
    assert clock.sleeps == []


@pytest.mark.parametrize("seconds", [3600.0, -3600.0])
def test_a_clock_that_jumps_stalls_nobody(book: Path, seconds: float) -> None:
    clock = FakeClock()
    pacer = Pacer(book, URL, clock=clock)
    pacer.wait("list", LIST)
    pacer.hold("list", 30)
    clock.now += seconds
    pacer.wait("list", LIST)
    assert clock.sleeps == []
    pacer.wait("list", LIST)
    assert 1.5 <= clock.sleeps[0] <= 2, "from here on turns are kept again"


def rubbish(book: Path) -> None:
    book.write_bytes(b"no database at all" * 100)


def a_folder(book: Path) -> None:
    book.mkdir()


def another_form(book: Path) -> None:
    with sqlite3.connect(book) as db:
        db.execute("CREATE TABLE turns (something TEXT)")
    db.close()


def times_without_sense(book: Path) -> None:
    Pacer(book, URL).wait("list", LIST)
    with sqlite3.connect(book) as db:
        db.execute("UPDATE turns SET next = 9e99, quiet = 9e99")
    db.close()


@pytest.mark.parametrize("damage", [rubbish, a_folder, another_form, times_without_sense])
def test_a_book_that_cannot_be_used_stops_nobody_and_turns_are_kept(book: Path, damage: Callable[[Path], None]) -> None:
    damage(book)
    clock = FakeClock(time.time())
    made = turns(Pacer(book, URL, clock=clock), clock, 1) + turns(Pacer(book, URL, clock=clock), clock, 2)
    assert clock.now - made[0] < 5
    assert closest(made) >= 1.5


def test_a_book_of_rubbish_is_replaced(book: Path) -> None:
    rubbish(book)
    clock = FakeClock()
    turns(Pacer(book, URL, clock=clock), clock, 2)
    with sqlite3.connect(book) as db:
        assert db.execute("SELECT count(*) FROM turns").fetchone() == (1,)
    db.close()
    assert book.stat().st_mode & 0o777 == 0o600


def test_a_process_that_was_stopped_with_the_book_open_stops_nobody(
    book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "BUSY_S", 0.05)
    clock = FakeClock()
    pacer = Pacer(book, URL, clock=clock)
    pacer.wait("list", LIST)
    with sqlite3.connect(book, isolation_level=None) as stopped:
        stopped.execute("BEGIN EXCLUSIVE")
        made = turns(pacer, clock, 2)
        stopped.execute("ROLLBACK")
    stopped.close()
    assert closest(made) >= 1.5
    assert clock.sleeps[0] >= 1.5, "what this process knew of the book still counts"


def test_markets_that_are_no_more_leave_nothing_behind(book: Path) -> None:
    clock = FakeClock()
    for number in range(20):
        Pacer(book, f"http://127.0.0.1:{number}", clock=clock).wait("list", LIST)
        clock.now += 2 * LONGEST_S
    with sqlite3.connect(book) as db:
        assert db.execute("SELECT count(*) FROM turns").fetchone()[0] <= 2
    db.close()


@pytest.mark.parametrize("maker", [cli_wiring.provider, keeper_wiring.provider])
def test_commands_and_keepers_of_all_profiles_use_one_book(
    tmp_path: Path, maker: Callable[[config.Settings], VastProvider]
) -> None:
    env = {"SELFHOST_HOME": str(tmp_path), "SELFHOST_API_KEY": "key"}
    books = set()
    for profile in ("default", "other"):
        settings = config.load(profile, env=env)
        settings.paths.make()
        pacer = maker(settings)._pacer
        pacer.wait("list", LIST)
        books.add(pacer._path)
        assert (pacer._market, pacer._pace) == (config.LIVE_MARKET, 1.0)
    assert books == {tmp_path / "state" / "turns.sqlite3"}
