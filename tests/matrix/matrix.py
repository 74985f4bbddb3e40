"""The combinations: what is killed, under which fault, at which step, and who comes next; and the rules."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from selfhost_cli.model import State
from tests.matrix.faults import FAULTS
from tests.matrix.outside import Outside
from tests.matrix.processes import Answer, Scene

ZERO_S = 900.0
"""The longest that `down` or the keeper may take once the market answers: orphan, lag and retries, with room."""
TYPED_AGAIN, PAUSE_S = 12, 60.0

KILL = ("down", "up", "keeper", "twice")
"""What follows a SIGKILL: `down` · `up`, then `down` · nobody but the keeper · `down` killed as well, then `down`."""


@dataclass(frozen=True)
class Scenario:
    """`what` dies; before it, `before` have run: (what, the name of the step at which it was killed, or "")."""

    name: str
    what: str
    before: tuple[tuple[str, str], ...] = ()


RELABELLED = "its label is another one after the crash"
"""Only where the ledger knows the box by number: else nobody could know it again."""
FULL = "the ledger cannot be written"
FULL_RELABELLED = "the ledger cannot be written, and its label is another one"
"""Nobody but `down` works with such a ledger."""

KILLED_CREATING = ("up", "market:create:after")
KILLED_BOOTING = ("up", "market:attach_key:before")
KILLED_INSTALLING = ("up", "ssh:put:before")
READY = ("up", "")

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("up", "up"),
        Scenario("up, on a ready box", "up", (READY,)),
        Scenario("up, after one killed at its create", "up", (KILLED_CREATING,)),
        Scenario("up, after one killed installing", "up", (KILLED_INSTALLING,)),
        Scenario("up, after a killed down", "up", (READY, ("down", "market:destroy:after"))),
        Scenario("down, of a ready box", "down", (READY,)),
        Scenario("down, of an up killed at its create", "down", (KILLED_CREATING,)),
        Scenario("down, of an up killed booting", "down", (KILLED_BOOTING,)),
        Scenario("reap, of an up killed at its create", "reap", (KILLED_CREATING,)),
        Scenario("reap, of an up killed installing", "reap", (KILLED_INSTALLING,)),
        Scenario("keeper, of an up killed at its create", "keeper", (KILLED_CREATING,)),
        Scenario("keeper, of an up killed booting", "keeper", (KILLED_BOOTING,)),
    )
}


@dataclass(frozen=True)
class Group:
    """The combinations of one scenario and one fault with one kind of crash. `every`: all steps, else those after
    which a next process could see something new."""

    scenario: str
    fault: str
    kind: str = "kill"
    then: tuple[str, ...] = ("down", "up", "keeper")
    every: bool = False


def groups() -> list[Group]:
    """The whole matrix."""
    made = [
        Group("up", "none", every=True),
        Group("up", "none", then=("twice",), every=True),
        Group("up", "none", "ctrl-c", ("down",), every=True),
        Group("up", "none", "stop", ("down",), every=True),
        Group("up", "none", "ending", ("down",), every=True),
    ]
    made += [Group("up", name) for name in FAULTS if name not in ("none", RELABELLED, FULL, FULL_RELABELLED)]
    made += [Group(name, FULL, then=("down",)) for name in ("up", "up, on a ready box", "down, of a ready box")]
    made += [Group(name, FULL_RELABELLED, then=("down",)) for name in ("up, on a ready box", "down, of a ready box")]
    for name in ("the list lags 45 s", "create: answer lost, and the list lags", "destroy fails 3 times"):
        made += [Group("up", name, kind, ("down",)) for kind in ("ctrl-c", "stop", "ending")]
        made.append(Group("up", name, then=("twice",)))
    made.append(Group("up", "the ledger is lost, and the list lags", then=("twice",)))
    made += [Group(name, RELABELLED, then=KILL[:3]) for name in ("up, on a ready box", "down, of a ready box")]
    ending = (
        "none", "the list lags 45 s", "market away for 90 s after the crash", "every 7th question unanswered",
        "the list unknown, 4 times after the crash", "destroy fails 3 times", "destroy without effect, once",
        "destroy refused for 150 s after the crash", "the box ends by itself, and a minute passes",
        "the ledger is lost at the crash", "the ledger is lost, and the list lags", "an hour passes after the crash",
    )  # fmt: skip
    for scenario in SCENARIOS.values():
        if scenario.name == "up":
            continue
        for name in ending:
            whole = name == "none"
            every = whole and scenario.name == "down, of a ready box"
            made.append(Group(scenario.name, name, then=KILL if whole else KILL[:3], every=every))
        if scenario.what != "keeper":
            made.append(Group(scenario.name, "none", "ctrl-c", ("down",), every=scenario.what == "down"))
    return made


@dataclass
class Row:
    """One combination and what became of it. `violations` are empty when every rule held."""

    scenario: str
    fault: str
    kind: str
    step: str
    number: int
    then: str
    created: int = 0
    billed: int = 0
    double_rents: int = 0
    zero_s: float | None = None
    """Seconds of the market's time from the crash (or from the `down` after an `up`) until nothing was billed."""
    violations: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_group(group: Group, scenes: Callable[[], Scene], chosen: Callable[[int, str], bool]) -> Iterator[Row]:
    """Find the group's steps by a run that nobody kills, then run every combination that is `chosen`.

    What comes before, and the crash itself, happen once for all who come next: each finds the same files and market.
    """
    scene = scenes()
    _prepare(scene, group)
    prepared = scene.snapshot()
    for number, step in _steps(group, scene):
        wanted = [then for then in group.then if chosen(number, then)]
        if not wanted:
            continue
        scene.restore(prepared)
        crash = _Crash(group, number, step, scene)
        left = None if group.kind == "stop" else scene.snapshot()
        for turn, then in enumerate(wanted):
            if turn:
                assert left, "a process that was left stopped cannot be had twice"
                scene.restore(left)
            yield _Combination(crash, then, scene).run()


def _steps(group: Group, scene: Scene) -> list[tuple[int, str]]:
    answer = scene.run(SCENARIOS[group.scenario].what, record=True)
    steps = list(enumerate(answer.steps))
    assert steps, f"{group}: {answer}"
    if group.kind == "ending":  # nobody else can write while a transaction is open
        steps = [(number, step) for number, step in steps if not step.endswith(":commit")]
    if group.every:
        return steps
    return [(number, step) for number, step in steps if not number or answer.seen[number] != answer.seen[number - 1]]


def _prepare(scene: Scene, group: Group) -> None:
    """What ran before, and the fault."""
    fault = FAULTS[group.fault]
    if fault.early or not SCENARIOS[group.scenario].before:
        fault.start(scene.outside)
    for what, step in SCENARIOS[group.scenario].before:
        scene.run(what, at=step or None)
        scene.outside.clock.sleep(3.0)
    if not fault.early and SCENARIOS[group.scenario].before:
        fault.start(scene.outside)


class _Crash:
    """A prepared scene after the crash: how the process ended, and which boxes there were before it."""

    def __init__(self, group: Group, number: int, step: str, scene: Scene) -> None:
        self.group, self.number, self.step = group, number, step
        self.fault = FAULTS[group.fault]
        self.before = {box.id for box in scene.outside.market.ours}
        what = SCENARIOS[group.scenario].what
        self.answer = scene.run(what, at=number, kind=group.kind, change=self.fault.crash)


class _Combination:
    """What follows a crash. Every rule that is broken goes into the row."""

    def __init__(self, crash: _Crash, then: str, scene: Scene) -> None:
        self._crash, self._then, self._scene = crash, then, scene
        self._group, self._fault = crash.group, crash.fault
        self._row = Row(self._group.scenario, self._group.fault, self._group.kind, crash.step, crash.number, then)
        self._began = self._outside.clock.time()

    def run(self) -> Row:
        self._after(self._crash.answer, self._crash.before)
        if self._fault.lost:
            self._scene.lose_the_ledger()
        self._outside.clock.sleep(3.0)
        match self._then:
            case "down":
                self._down()
            case "up":
                self._up()
                self._began = self._outside.clock.time()
                self._down()
            case "keeper":
                self._keeper()
                self._down()
            case "twice":
                self._twice()
        self._scene.reap()
        return self._finish()

    @property
    def _outside(self) -> Outside:
        return self._scene.outside

    @property
    def _billed(self) -> int:
        return len(self._outside.market.ours)

    def _broken(self, rule: str) -> None:
        if rule not in self._row.violations:
            self._row.violations.append(rule)

    def _after(self, answer: Answer, before: set[int]) -> None:
        """What must hold before anybody does anything."""
        if self._group.kind in ("kill", "stop") and answer.code not in (-9, -19):
            self._broken(f"the step was not reached: {answer}")
        kind, rental, there = self._group.kind, self._scene.rental(), {box.id for box in self._outside.market.ours}
        if answer.kind == "traceback":
            self._broken(f"a bug: {_short(answer)}")
        if kind == "ctrl-c":
            self._speaks(answer)
            if there and answer.code != 5:
                self._broken(f"a box is billed after Ctrl-C, and it ended with {answer.code}")
            if there - before and not (rental and rental.state is State.READY) and not self._fault.delays:
                self._broken("Ctrl-C left a box that was not ready")
            if SCENARIOS[self._group.scenario].name == "up, on a ready box" and not there:
                self._broken("Ctrl-C ended a box that was ready before")
        if (ended := self._outside.made_before_ending) is not None:
            if len(self._outside.market.made) > ended:
                self._broken("a box was rented after ENDING was recorded")
            if answer.code == 0:
                self._broken("`up` went on after ENDING was recorded")

    def _speaks(self, answer: Answer) -> None:
        """Money rule 7: whoever ends with 5 says what, how much and which command ends it."""
        if answer.code == 5 and "selfhost down" not in answer.error:
            self._broken("exit 5 without the command that ends it")
        if answer.code == 5 and "/h" not in answer.error and not self._fault.lost:
            self._broken("exit 5 without the price")
        if answer.kind == "traceback":
            self._broken(f"a bug: {_short(answer)}")
        if answer.kind == "hang":
            self._broken("a command hangs")

    def _down(self) -> None:
        for _ in range(TYPED_AGAIN):
            answer = self._scene.run("down")
            self._speaks(answer)
            if answer.code == 0:
                break
            if not self._fault.delays:
                self._broken(f"`down` ended with {answer.code}: {_short(answer)}")
            if self._billed and answer.code != 5 and not self._fault.lost:
                self._broken(f"a box is billed, and `down` ended with {answer.code}")
            self._outside.clock.sleep(PAUSE_S)
        else:
            self._broken(f"`down` never succeeds: {_short(answer)}")
        if self._billed:
            self._broken("`down` ended with 0, and a box is billed")
        if self._scene.state() is not None and not self._fault.unwritable:
            self._broken("`down` ended with 0, and the ledger has a live rental")

    def _up(self) -> None:
        """Resume what is paid for, or rent anew once it is proven gone; never a second one."""
        made, state, there = len(self._outside.market.made), self._scene.state(), self._outside.market.ours
        resumable = there and state not in (None, State.ENDING) and not self._fault.hopeless
        failed: set[int] = set()
        for turn in range(TYPED_AGAIN):
            so_far = len(self._outside.market.made)
            answer = self._scene.run("up")
            self._speaks(answer)
            if failed & {machine for _, _, machine in self._outside.market.made[so_far:]}:
                self._broken("a machine that failed was rented again")
            if answer.code == 0:
                break
            if self._billed and answer.code != 5:
                self._broken(f"a box is billed, and `up` ended with {answer.code}")
            if answer.code == 5 and not (self._fault.delays or self._fault.lost):
                self._broken(f"`up` ended with 5: {_short(answer)}")
            if turn == 2 and (self._fault.hopeless or self._fault.lost):
                return
            if answer.code == 1:
                failed |= {machine for _, _, machine in self._outside.market.made}
                failed &= self._outside.market.bad_machines | self._outside.market.stuck_machines
            self._outside.clock.sleep(PAUSE_S)
        else:
            self._broken(f"`up` never succeeds: {_short(answer)}")
            return
        boxes = self._outside.market.ours
        if [box.id for box in boxes] != [answer.box]:
            self._broken(f"`up` ended with 0 and box {answer.box}, the market has {[box.id for box in boxes]}")
        if not answer.armed:
            self._broken("a box that cannot end itself is in use")
        told, price = self._outside.box.limits, self._outside.market.charged
        if price and any(told.get(box.direct) != f"DPH={price:.6f}" for box in boxes if box.direct):
            self._broken("a box counts its dollars with another price than it costs")
        again = self._outside.market.made[made:]
        if resumable and not failed and (again or answer.box != there[0].id):
            self._broken("`up` did not resume the box that was paid for")

    def _keeper(self) -> None:
        """Nobody types anything. What was not ready, or was to end, must end; a ready box is not the keeper's."""
        state = self._scene.state()
        self._scene.run("keeper")
        market = self._outside.market
        to_end = state is not State.READY or any(box.id in market.asked_to_end for box in market.ours)
        if self._billed and to_end and not self._fault.lost:
            self._broken("the keeper did not end what nobody uses")
        self._time_to_zero(ZERO_S)

    def _twice(self) -> None:
        """`down` is killed as well, at a step that depends on the combination."""
        steps = 40
        at = zlib.crc32(f"{self._row}".encode()) % steps
        self._scene.run("down", at=at)
        self._outside.clock.sleep(3.0)
        self._down()

    def _time_to_zero(self, limit: float) -> None:
        market = self._outside.market
        if market.ours or not market.ended:
            return
        self._row.zero_s = max(
            0.0, market.ended[-1][0] - max(self._began, market.away_until, market.undying_until, market.unknown_until)
        )
        if self._row.zero_s > limit:
            self._broken(f"{self._row.zero_s:.0f} s until nothing was billed")

    def _finish(self) -> Row:
        market, row = self._outside.market, self._row
        row.created, row.billed, row.double_rents = len(market.made), self._billed, market.double_rents
        if row.zero_s is None:
            self._time_to_zero(ZERO_S)
        if market.double_rents:
            self._broken("a second box was rented while one was alive")
        if market.harmed:
            self._broken("a box that is not ours was ended")
        return row


def _short(answer: Answer) -> str:
    return answer.error.strip().splitlines()[-1][:200] if answer.error else answer.kind
