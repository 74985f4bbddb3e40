"""`selfhost logs`: read by a real shell in a box's home, over a connection that may break."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from selfhost_cli import config, logs
from selfhost_cli.doctor.secrets import Secrets
from selfhost_cli.errors import NotSetUp, SelfhostError, UsageError
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle.reaching import Reach
from selfhost_cli.logs import Line
from selfhost_cli.model import Endpoint, Rental, State
from selfhost_cli.remote import NotYet
from tests.fakes.remote import RemoteFake
from tests.fakes.rental import make_rental

TOKEN = "box-token-of-many-characters"
LABEL = "selfhost-test-1"
HERE = Endpoint("127.0.0.1", 22)


@dataclass
class Box:
    """A rented box whose home is a directory; `away`: nobody gets in."""

    home: Path
    ledger: Ledger
    keeper_log: Path
    away: bool = False
    remotes: list[RemoteFake] = field(default_factory=list)
    market_asked: int = 0

    def log(self, part: str, text: str | bytes) -> None:
        path = self.keeper_log if part == logs.KEEPER else self.home / ".selfhost/log" / f"{part}.log"
        with path.open("ab") as file:
            file.write(text if isinstance(text, bytes) else text.encode())

    @property
    def reach(self) -> Reach:
        def connect(endpoint: Endpoint, host_keys: object, login_key: Path) -> RemoteFake:
            if self.away:
                raise NotYet(f"{endpoint} refuses")
            self.remotes.append(RemoteFake(self.home, {"PATH": os.environ["PATH"]}))
            return self.remotes[-1]

        def endpoints(rental: Rental) -> list[Endpoint]:
            self.market_asked += 1
            return []

        return Reach(connect, Path("unused"), endpoints)

    def recent(self, *named: str, lines: int = 50) -> list[Line]:
        parts = logs.chosen(named)
        hide = Secrets([TOKEN], {}).hide
        rental = logs.the_box(self.ledger, parts)
        return list(logs.recent(parts, rental, self.reach, self.keeper_log, hide, lines=lines))

    def follow(self, *then: Callable[[], object], named: tuple[str, ...] = (), lines: int = 50) -> list[str]:
        """What is told while `then` happens, one after each look, and the box ends."""
        steps: Iterator[Callable[[], object]] = iter([*then, lambda: self.ledger.amend(LABEL, state=State.ENDED)])
        seconds = iter(range(0, 10_000, 10))
        found = logs.follow(
            logs.chosen(named),
            self.ledger,
            self.reach,
            self.keeper_log,
            Secrets([TOKEN], {}).hide,
            lines=lines,
            pause=lambda _: next(steps)(),
            clock=lambda: next(seconds),
        )
        return [f"{one.part}: {one.line}" if isinstance(one, Line) else f"! {one.text}" for one in found]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    (tmp_path / "home/.selfhost/log").mkdir(parents=True)
    with closing(Ledger(tmp_path / "ledger.sqlite3")) as ledger:
        ledger.intend(make_rental(LABEL, state=State.READY, endpoint=HERE, instance_id=7))
        yield Box(tmp_path / "home", ledger, tmp_path / "keeper.log")


def test_the_recent_lines_of_all_parts_come_part_by_part(box: Box) -> None:
    box.log("proxy", "one\ntwo\n")
    box.log("onstart", "first\n")
    box.log("keeper", "ours\nno end yet")
    told = [(one.part, one.line) for one in box.recent()]
    assert told == [
        ("onstart", "first"), ("proxy", "one"), ("proxy", "two"), ("keeper", "ours"), ("keeper", "no end yet"),
    ]  # fmt: skip


def test_only_the_named_parts_are_read_and_only_their_last_lines(box: Box) -> None:
    box.log("engine", "".join(f"{n}\n" for n in range(100)))
    box.log("proxy", "other\n")
    assert [one.line for one in box.recent("engine", lines=2)] == ["98", "99"]


def test_of_a_large_log_only_the_end_is_fetched_and_a_line_has_its_limit(box: Box) -> None:
    box.log("engine", "x" * 300_000 + "\n" + "y" * 5000 + "\nlast\n")
    told = [one.line for one in box.recent("engine")]
    assert told == ["y" * logs.LONGEST + " …", "last"]


def test_what_would_steer_a_terminal_is_gone(box: Box) -> None:
    box.log("engine", b"\x1b[31mred\x1b[0m \x1b]0;title\x07\xff\x07\xe2\x80\xae!\n 10 %\r 50 %\r100 %\r\n")
    assert [one.line for one in box.recent("engine")] == ["red \ufffd!", "100 %"]


def test_secrets_are_hidden_also_one_of_several_lines(box: Box) -> None:
    key = "-----BEGIN OPENSSH PRIVATE KEY-----\nbm90IGEga2V5\n-----END OPENSSH PRIVATE KEY-----"
    box.log("proxy", f"token {TOKEN}\nAuthorization: Bearer abc.def\n{key}\nend\n")
    text = "\n".join(one.line for one in box.recent("proxy"))
    assert TOKEN not in text
    assert "abc.def" not in text
    assert "bm90" not in text
    assert text.endswith("(hidden)\nend")


def test_a_part_that_there_is_not_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no part 'prxy'") as caught:
        logs.chosen(["prxy"])
    assert "Did you mean 'proxy'?" in caught.value.remedy


def test_without_a_box_there_is_the_keepers_log_alone(box: Box) -> None:
    box.ledger.amend(LABEL, state=State.ENDED)
    box.log("keeper", "ours\n")
    assert box.recent() == [Line("keeper", "ours")]
    with pytest.raises(NotSetUp, match="there is no box"):
        box.recent("engine")


def test_out_of_reach_the_keepers_lines_come_before_the_reason(box: Box) -> None:
    box.away = True
    box.log("keeper", "ours\n")
    found = logs.recent(logs.PARTS, box.ledger.live()[-1], box.reach, box.keeper_log, lambda text: text, lines=5)
    assert next(found) == Line("keeper", "ours")
    with pytest.raises(SelfhostError, match=r"cannot be reached: 127\.0\.0\.1:22 refuses"):
        next(found)


def test_followed_lines_come_once_and_whole_until_the_box_has_ended(box: Box) -> None:
    box.log("engine", "".join(f"old {n}\n" for n in range(9)))
    told = box.follow(
        lambda: box.log("engine", "ha"),
        lambda: (box.log("engine", "lf\nnext\n"), box.log("keeper", "ours\n")),
        lambda: None,
        lines=2,
    )
    assert told[:2] == ["engine: old 7", "engine: old 8"]
    assert told[2:5] == ["engine: half", "engine: next", "keeper: ours"]
    assert told[5:] == ["! box 7 (RTX 4090, $0.31/h) has ended"]


def test_a_connection_that_breaks_is_made_again_and_nothing_is_told_twice(box: Box) -> None:
    def goes() -> None:
        box.away = True
        box.remotes[-1].lost = True
        box.log("engine", "meanwhile\n")

    def comes() -> None:
        box.away = False

    box.log("engine", "before\n")
    told = box.follow(
        goes, lambda: None, lambda: None, lambda: None, comes, lambda: box.log("engine", "after\n"), named=("engine",)
    )
    kept = [line for line in told if line.startswith("engine")]
    assert kept == ["engine: before", "engine: meanwhile", "engine: after"]
    notes = [line for line in told if line.startswith("!")]
    assert "connection to the box is gone; trying again" in notes[0]
    assert "127.0.0.1:22 refuses; trying again" in notes[1]
    assert "can be reached again" in notes[2]
    assert "has ended" in notes[3]
    assert len(notes) == 4
    assert box.market_asked <= 2


def test_a_log_that_was_cut_in_place_goes_on_at_its_end(box: Box) -> None:
    path = box.home / ".selfhost/log/engine.log"
    box.log("engine", "a long line that was there\n")
    told = box.follow(lambda: path.write_text("end\n"), lambda: box.log("engine", "new\n"), named=("engine",))
    assert told[1:3] == ["engine: (the log was cut)", "engine: new"]


def test_of_more_than_a_look_may_take_the_last_is_told_and_how_much_was_not(box: Box) -> None:
    line = "z" * 99 + "\n"
    told = box.follow(lambda: box.log("engine", line * 4000), named=("engine",))
    left_out, *lines, _ = told
    assert left_out == f"engine: ({400_000 - logs.MOST} bytes left out)"
    assert sum(len(one) for one in lines) < logs.MOST * 1.2
    assert set(lines) == {"engine: " + "z" * 99}


def test_a_log_that_appears_later_is_told_from_its_beginning(box: Box) -> None:
    told = box.follow(lambda: box.log("proxy", "".join(f"{n}\n" for n in range(9))), named=("proxy",), lines=2)
    assert told[:-1] == [f"proxy: {n}" for n in range(9)]


def test_the_first_box_is_waited_for(box: Box) -> None:
    box.ledger.amend(LABEL, state=State.ENDED)
    box.log("engine", "hello\n")
    told = box.follow(
        lambda: box.ledger.intend(make_rental("selfhost-test-2", state=State.READY, endpoint=HERE, instance_id=8)),
        lambda: box.ledger.amend("selfhost-test-2", state=State.ENDED),
    )
    assert told[0] == "! there is no box; waiting for one"
    assert "engine: hello" in told
    assert "has ended" in told[-1]


@pytest.mark.parametrize("said", ["engine", "engine x YQ==", "engine 0 !!", "shadow 0 YQ==", "engine -5 YQ==", "\x00"])
def test_what_a_box_says_beside_the_form_is_nothing(said: str) -> None:
    assert logs._parse(f"{said}\nproxy 3 YQ==\nproxy 9 YQ==\n", ("engine", "proxy")) == {"proxy": (3, b"a")}


def test_as_a_command_a_closed_pipe_is_no_news_of_the_box(tmp_path: Path) -> None:
    env = {"SELFHOST_HOME": str(tmp_path), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    paths = config.paths("default", env)
    paths.make()
    with closing(Ledger(paths.ledger)) as ledger:
        ledger.intend(make_rental(LABEL, state=State.READY, endpoint=HERE))
    paths.keeper_log.write_text("one\ntwo\n")
    run = [sys.executable, "-m", "selfhost_cli", "logs", "keeper"]
    whole = subprocess.run(run, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (whole.returncode, whole.stdout, whole.stderr) == (0, "one\ntwo\n", "")
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(run, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (141, "")
