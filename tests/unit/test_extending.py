"""`extend` on the shipped limits.sh, run by a local shell in a box's directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from selfhost_cli.errors import MarketUnreachable, NotSetUp, SelfhostError, UsageError
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle.extending import Amount, Wish, amount, extend
from selfhost_cli.lifecycle.reaching import Reach
from selfhost_cli.model import Caps, Endpoint, Rental, State
from selfhost_cli.remote import ConnectionLost, NotYet, Remote, Result
from tests.fakes.remote import RemoteFake
from tests.fakes.rental import make_rental

NOW = 1_795_010_000.0
HERE, MOVED = Endpoint("192.0.2.1", 22), Endpoint("192.0.2.2", 22)
CAPS = Caps(lease_s=2700, idle_s=2700, max_s=28_800, max_dollars=5.0)
CREATED = "SELFHOST_LEASE_S='2700'\nSELFHOST_IDLE_S='2700'\nSELFHOST_MAX_S='28800'\nSELFHOST_MAX_DOLLARS='5.0000'\n"
MORE = Wish(hours=Amount(10, adds=False))


class BreaksOff(RemoteFake):
    """Does what it is told, and the answer is lost."""

    def run(self, command: str, *, timeout: float = 60.0, on_line: Callable[[str], None] | None = None) -> Result:
        result = super().run(command, timeout=timeout, on_line=on_line)
        if "=" in command:
            raise ConnectionLost("the connection to the box broke")
        return result


@dataclass
class Box:
    """Where a rental's box answers. `at`: its address; `asked`: the host keys that were wanted of it."""

    home: Path
    at: Endpoint = HERE
    market: tuple[Endpoint, ...] | None = (MOVED,)
    make: Callable[..., RemoteFake] = RemoteFake
    asked: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.home / ".selfhost/run"

    def measured(self, up_s: int = 3600, idle_s: int = 0, dollars: float = 0.5) -> None:
        (self.run / "watch").write_text(f"1/2/1/2 {up_s} 4 {idle_s} {dollars} \n")

    @property
    def reach(self) -> Reach:
        def connect(endpoint: Endpoint, host_keys: Sequence[str], login_key: Path) -> Remote:
            self.asked.append(tuple(host_keys))
            if endpoint != self.at:
                raise NotYet(f"{endpoint}: connection refused")
            return self.make(self.home, {"PATH": os.environ["PATH"]})

        def endpoints(rental: Rental) -> tuple[Endpoint, ...]:
            if self.market is None:
                raise MarketUnreachable("the market cannot be reached")
            return self.market

        return Reach(connect, self.home / "login", endpoints)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    made = Box(tmp_path / "home")
    made.run.mkdir(parents=True)
    (made.home / ".selfhost/bin").mkdir()
    (made.run / "box.env").write_text(CREATED)
    made.measured()
    return made


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite3")
    opened.intend(ready())
    yield opened
    opened.close()


def ready(**changes: object) -> Rental:
    values = {"state": State.READY, "endpoint": HERE, "caps": CAPS, "instance_id": 7, "sent_at": NOW - 3700}
    return make_rental(**(values | {"running_at": NOW - 3600, "ready_at": NOW - 3500} | changes))


def caps(ledger: Ledger) -> Caps:
    return ledger.live()[0].caps


def test_new_totals_hold_on_the_box_and_in_the_ledger(ledger: Ledger, box: Box) -> None:
    wish = Wish(Amount(10, adds=False), Amount(8, adds=False), Amount(60, adds=False))
    done = extend(ledger, box.reach, wish, now=NOW)
    wanted = replace(CAPS, max_s=36_000, max_dollars=8.0, idle_s=3600)
    assert (done.before, done.rental.caps, caps(ledger)) == (CAPS, wanted, wanted)
    text = (box.run / "limits").read_text()
    assert sorted(text.split()) == ["SELFHOST_IDLE_S=3600", "SELFHOST_MAX_DOLLARS=8", "SELFHOST_MAX_S=36000"]
    assert box.asked == [("ssh-ed25519 AAAA",)]
    assert {one.why: one.seconds for one in done.ends}["hours"] == 36_000 - 3600


def test_a_plus_adds_to_what_the_box_has_whatever_the_ledger_thinks(ledger: Ledger, box: Box) -> None:
    (box.run / "limits").write_text("SELFHOST_MAX_S=32400\n")  # moved, and the laptop was gone before it noted that
    done = extend(ledger, box.reach, Wish(hours=Amount(2, adds=True)), now=NOW)
    assert (done.before.max_s, done.rental.caps.max_s, caps(ledger).max_s) == (32_400, 39_600, 39_600)
    assert caps(ledger).max_dollars == 5.0


def test_a_cap_that_is_what_it_was_is_noted_again(ledger: Ledger, box: Box) -> None:
    (box.run / "limits").write_text("SELFHOST_MAX_S=36000\n")
    assert extend(ledger, box.reach, MORE, now=NOW).before.max_s == 36_000
    assert caps(ledger).max_s == 36_000


@pytest.mark.parametrize(
    "wish",
    [
        Wish(hours=Amount(0.9, adds=False)),
        Wish(max_spend=Amount(0.4, adds=False)),
        Wish(idle=Amount(1, adds=False)),
    ],
)
def test_what_would_end_the_box_at_once_is_refused(ledger: Ledger, box: Box, wish: Wish) -> None:
    box.measured(idle_s=100)
    with pytest.raises(UsageError, match="at once"):
        extend(ledger, box.reach, wish, now=NOW)
    assert not (box.run / "limits").exists()
    assert caps(ledger) == CAPS


def test_less_than_now_is_taken_as_long_as_it_is_not_over(ledger: Ledger, box: Box) -> None:
    assert extend(ledger, box.reach, Wish(hours=Amount(2, adds=False)), now=NOW).rental.caps.max_s == 7200


def test_a_box_that_moved_is_found_where_the_market_says(ledger: Ledger, box: Box) -> None:
    box.at = MOVED
    extend(ledger, box.reach, MORE, now=NOW)
    assert caps(ledger).max_s == 36_000


@pytest.mark.parametrize("market", [(), (MOVED,), None])
def test_out_of_reach_nothing_changes_and_the_error_says_so(
    ledger: Ledger, box: Box, market: tuple[Endpoint, ...] | None
) -> None:
    box.at, box.market = Endpoint("192.0.2.9", 9), market
    with pytest.raises(SelfhostError, match=r"cannot be reached, and its caps are as they were: 192.0.2.1"):
        extend(ledger, box.reach, MORE, now=NOW)
    assert not (box.run / "limits").exists()
    assert caps(ledger) == CAPS


def test_when_the_answer_is_lost_the_error_says_that_nobody_knows(ledger: Ledger, box: Box) -> None:
    box.make = BreaksOff
    with pytest.raises(ConnectionLost, match="is not known") as caught:
        extend(ledger, box.reach, MORE, now=NOW)
    assert "rather than with +" in caught.value.remedy
    assert caps(ledger).max_s == 36_000  # the keeper must not end what may have been moved
    box.make = RemoteFake
    extend(ledger, box.reach, MORE, now=NOW)
    assert caps(ledger).max_s == 36_000


def test_whenever_extend_is_killed_the_ledger_is_never_stricter_than_the_box(ledger: Ledger, box: Box) -> None:
    class Killed(RemoteFake):
        def run(self, command: str, *, timeout: float = 60.0, on_line: object = None) -> Result:
            if "=" in command:
                super().run(command, timeout=timeout)
                raise KeyboardInterrupt
            return super().run(command, timeout=timeout)

    box.make = Killed
    for hours in (10, 2):
        with pytest.raises(KeyboardInterrupt):
            extend(ledger, box.reach, Wish(hours=Amount(hours, adds=False)), now=NOW)
        assert f"SELFHOST_MAX_S={hours * 3600}" in (box.run / "limits").read_text()
        assert caps(ledger).max_s == 36_000


def test_a_box_that_is_ending_says_so(ledger: Ledger, box: Box) -> None:
    (box.run / "verdict").write_text("idle for 2701 s\n")
    with pytest.raises(SelfhostError, match="ending already: idle for 2701 s"):
        extend(ledger, box.reach, MORE, now=NOW)
    assert caps(ledger) == CAPS


def test_a_box_whose_answer_makes_no_sense_is_not_believed(ledger: Ledger, box: Box) -> None:
    class Babbles(RemoteFake):
        def run(self, command: str, *, timeout: float = 60.0, on_line: object = None) -> Result:
            return Result(0, "MAX_S=soon\n", "")

    box.make = Babbles
    with pytest.raises(SelfhostError, match="does not tell its caps"):
        extend(ledger, box.reach, MORE, now=NOW)


def test_down_wins(ledger: Ledger, box: Box) -> None:
    class DownComes(RemoteFake):
        def close(self) -> None:
            ledger.end("selfhost-test-1", "down")

    box.make = DownComes
    for _ in range(2):
        with pytest.raises(SelfhostError, match="is ending"):
            extend(ledger, box.reach, MORE, now=NOW)
    assert ledger.live()[0].state is State.ENDING


def test_there_has_to_be_a_box_and_something_to_move(tmp_path: Path, ledger: Ledger, box: Box) -> None:
    with pytest.raises(UsageError, match="nothing to move"):
        extend(ledger, box.reach, Wish(), now=NOW)
    ledger.end("selfhost-test-1", "down")
    ledger.ended("selfhost-test-1", NOW)
    with pytest.raises(NotSetUp, match="no box"):
        extend(ledger, box.reach, MORE, now=NOW)
    ledger.intend(ready(label="selfhost-test-2", state=State.BOOTING))
    with pytest.raises(SelfhostError, match="is booting"):
        extend(ledger, box.reach, MORE, now=NOW)
    assert box.asked == []


def test_amounts() -> None:
    assert amount("--hours", None) is None
    assert amount("--hours", "8") == Amount(8, adds=False)
    assert amount("--hours", "+2.5") == Amount(2.5, adds=True)


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "+-1", "nan", "inf", "1e9", "+"])
def test_what_is_no_amount_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--hours"):
        amount("--hours", text)


def test_more_than_a_box_takes_is_a_usage_error(ledger: Ledger, box: Box) -> None:
    with pytest.raises(UsageError, match="more than a box takes"):
        extend(ledger, box.reach, Wish(hours=Amount(99_995, adds=True)), now=NOW)
