"""Events, each at its time -> the tree of stages that `progress` draws and `--trace` adds up."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from selfhost_cli.model import Event

Status = Literal["running", "done", "skip", "fail", "left"]
"""`left`: something else came before it was done."""

STATES: dict[str, Status] = {"start": "running", "progress": "running", "done": "done", "skip": "skip", "fail": "fail"}

WAY = ("rent", "boot", "secure", "install", "tunnel", "health")
"""What a box goes through, in order."""
LAST = {"install": "start", "health": "health: token"}
"""Without it, a group was not gone through."""
GROUPS = {
    "identity": "secure",
    "guard": "secure",
    "upload": "install",
    "tools": "install",
    "engine": "install",
    "model": "install",
    "proxy": "install",
    "start": "install",
}
AT_ONCE = ("install",)
"""Groups of which several stages may run at a time: together they take longer than all of it."""
PLAN, QUESTION = "plan", "question"
"""Until the plan was there, and the time in which a person was asked; no share of the whole."""

WINDOW_S = 10.0
PARTS = 20
"""Of one stage that are told apart at most: a box may say anything."""
LEAST_S = 0.05


@dataclass
class Transfer:
    """How far a download is, in bytes; the rate is that of the last WINDOW_S."""

    done: int
    total: int
    first: int
    _seen: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=100))

    def saw(self, now: float, done: int, total: int) -> None:
        if done < self.done or total != self.total:
            self._seen.clear()
            self.first = min(self.first, done)
        self.done, self.total = done, total
        if not self._seen or now - self._seen[-1][0] >= WINDOW_S / 50:
            self._seen.append((now, done))
        while len(self._seen) > 1 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()

    def rate(self, now: float) -> float:
        """Bytes per second; it falls while nothing comes."""
        if not self._seen or now - self._seen[0][0] < 0.5:
            return 0.0
        return (self.done - self._seen[0][1]) / (now - self._seen[0][0])


@dataclass
class Stage:
    """One stage: what it says, and how long it was busy, with what (parts by what it said meanwhile, in seconds)."""

    name: str
    status: Status = "running"
    text: str = ""
    seconds: float = 0.0
    transfer: Transfer | None = None
    parts: dict[str, float] = field(default_factory=dict)
    part: str = ""

    def busy_with(self, part: str) -> None:
        """What it does from now on; what it did before its first word was that, too."""
        self.part = part
        if part and "" in self.parts:
            self.parts[part] = self.parts.pop("")

    def spend(self, seconds: float) -> None:
        self.seconds += seconds
        name = self.part if self.part in self.parts or len(self.parts) < PARTS else "more"
        self.parts[name] = self.parts.get(name, 0.0) + seconds


@dataclass
class Group:
    """Stages that belong together, some of them at once; `seconds` is all of its time.

    `before` is what passed of that before one of them said that it began.
    """

    name: str
    stages: dict[str, Stage] = field(default_factory=dict)
    seconds: float = 0.0
    before: float = 0.0
    over: bool = False

    @property
    def alone(self) -> Stage | None:
        """Its one stage, where that has the group's own name."""
        return self.stages.get(self.name) if len(self.stages) == 1 else None

    @property
    def status(self) -> Status:
        if self.alone:
            return self.alone.status
        states = [stage.status for stage in self.stages.values()]
        if "fail" in states:
            return "fail"
        if not self.over:
            return "running"
        last = self.stages.get(LAST.get(self.name, ""), list(self.stages.values())[-1])
        whole = LAST.get(self.name, last.name) == last.name
        return "done" if whole and last.status in ("done", "skip") else "left"


@dataclass(frozen=True)
class Span:
    """Where time went. `share`: of all but the question, None for that. `bytes`: what came of a download meanwhile."""

    name: str
    seconds: float
    share: float | None
    bytes: int | None = None
    parts: tuple[Span, ...] = ()


class Timeline:
    """What was told so far. The time between two events is that of the stages which ran, else of what came next."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._told_at = clock()
        self._running: list[Stage] = []
        """Of one group: the one that was told of last."""
        self._at = Group("")
        self.groups: list[Group] = []
        """Of what is going on: what one display shows."""
        self._past: list[Group] = []

    def tell(self, event: Event) -> None:
        if event.status == "note":
            return
        now = self.clock()
        group = self._group(GROUPS.get(event.stage, event.stage.partition(": ")[0]))
        stage = group.stages.setdefault(event.stage, Stage(event.stage))
        self._spend(now, group, None if event.status == "start" else stage)
        if self._running != [stage] and (group is not self._at or group.name not in AT_ONCE):
            self._leave()
        self._at = group
        stage.status = STATES[event.status]
        stage.text = event.text if event.text or event.status == "progress" else stage.text
        stage.busy_with(_part(event))
        if event.done is not None and event.total:
            stage.transfer = stage.transfer or Transfer(event.done, event.total, event.done)
            stage.transfer.saw(now, event.done, event.total)
        if (stage.status == "running") != (stage in self._running):
            (self._running.append if stage.status == "running" else self._running.remove)(stage)

    def mark(self, name: str) -> None:
        """All of the time since the last event went into this, which nobody draws."""
        group = Group(name, {name: Stage(name, "done")}, over=True)
        self._spend(self.clock(), group, group.stages[name])
        self._past.append(group)

    def close(self) -> Sequence[Group]:
        """End what is shown, and return it; what comes next is another display's."""
        now, shown = self.clock(), self.groups
        if self._running:
            self._spend(now, self._at, None)
            self._leave()
        for group in shown:
            group.over = True
        self._past += shown
        self.groups = []
        return shown

    def elapsed(self, one: Stage | Group) -> float:
        """Seconds that it has lasted, until now when it is what goes on."""
        goes_on = one in self._running if isinstance(one, Stage) else self._running and one is self._at
        return one.seconds + (self.clock() - self._told_at if goes_on else 0.0)

    def trace(self) -> tuple[Span, ...]:
        """Where all of the time went until now, in the order in which it began."""
        groups = [*self._past, *self.groups]
        whole = sum(group.seconds for group in groups if group.name != QUESTION)
        return tuple(_span(group, whole) for group in groups)

    def _group(self, name: str) -> Group:
        for group in self.groups:
            group.over = group.name != name
        found = next((group for group in self.groups if group.name == name), None)
        if found is None:
            found = Group(name)
            self.groups.append(found)
        return found

    def _leave(self) -> None:
        for stage in self._running:
            stage.status = "left"
        self._running = []

    def _spend(self, now: float, group: Group, stage: Stage | None) -> None:
        """The time until now is that of what runs; else of the stage, or of what was before any in the group."""
        seconds, self._told_at = now - self._told_at, now
        (self._at if self._running else group).seconds += seconds
        for one in self._running or filter(None, [stage]):
            one.spend(seconds)
        if not self._running and stage is None:
            group.before += seconds


def _part(event: Event) -> str:
    """Its own words, without what changes from second to second; of the market's only the state."""
    if event.status != "progress":
        return ""
    if event.stage == "boot":
        return event.text.partition(" ")[0]
    return re.sub(r"(\.part)?( \(\d+ s\))?$", "", event.text)


def _span(group: Group, whole: float) -> Span:
    def span(name: str, seconds: float, count: int | None = None, parts: Iterable[Span] = ()) -> Span:
        share = None if group.name == QUESTION else seconds / whole if whole else 0.0
        return Span(name, round(seconds, 3), share if share is None else round(share, 4), count, tuple(parts))

    def of(stage: Stage) -> Span:
        parts = [span(name, took) for name, took in stage.parts.items() if took >= LEAST_S]
        name = stage.name.removeprefix("health: ")
        gained = stage.transfer.done - stage.transfer.first if stage.transfer else None
        return span(name, stage.seconds, gained, parts if len(parts) > 1 else ())

    before = [span("before", group.before)] if group.before >= LEAST_S else []
    if group.alone:
        one = of(group.alone)
        return span(group.name, group.seconds, one.bytes, [*before, *one.parts])
    return span(group.name, group.seconds, parts=[*before, *map(of, group.stages.values())])
