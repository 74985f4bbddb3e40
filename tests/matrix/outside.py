"""What a killed process leaves behind: the market, its boxes, the ssh side and the time, in shared memory."""

from __future__ import annotations

import mmap
import pickle
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selfhost_cli.errors import MarketError, MarketUnreachable
from selfhost_cli.model import BoxSpec, BoxState, Endpoint, Instance, Offer
from selfhost_cli.remote import NotYet, Remote
from tests.fakes.box import FakeBox
from tests.fakes.clock import FakeClock
from tests.fakes.market import FakeMarket

STRANGERS = {1: "my-training-run", 2: "selfhost-0000000000-somebody"}
"""Boxes of the same account that nothing here may touch."""


def _nothing(verb: str) -> None:
    """The fakes' `before`, which cannot be pickled as they have it."""


class Clock(FakeClock):
    """Virtual time. The short waits, for another process to die, let a little real time pass."""

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if seconds <= 0.1:
            time.sleep(0.0005)


@dataclass
class Market(FakeMarket):
    """The fake with more faults, and with the count of what was rented, ended and billed."""

    clock: Clock
    away_until: float = 0.0
    hiccups: int = 0
    """Every so manieth question goes unanswered."""
    unknown_lists: int = 0
    """Listings that answer null, which the provider tells as unknown."""
    unknown_until: float = 0.0
    """Until then every listing does."""
    failing_destroys: int = 0
    undying_until: float = 0.0
    """Until then every destroy is refused."""
    unseen_s: float = 0.0
    """So long after its create a single box is answered by null."""
    boot_s: float = 0.0
    bad_machines: frozenset[int] = frozenset()
    stuck_machines: frozenset[int] = frozenset()
    refusing: int = 0
    """Creates that are refused with an error that says nothing exists."""
    questions: int = 0
    made: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, box, machine) of every create that took effect."""
    ended: list[tuple[float, int]] = field(default_factory=list)
    double_rents: int = 0
    asked_to_end: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for number, label in STRANGERS.items():
            self.boxes[number] = Instance(
                number, label, BoxState.RUNNING, "running", "", 90 + number, "RTX 4090", 0.3, None, None, None
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "before"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, before=_nothing)

    @property
    def ours(self) -> list[Instance]:
        """What is really there, whatever the listing says."""
        return [box for box in self.boxes.values() if box.id not in STRANGERS]

    @property
    def harmed(self) -> bool:
        return not STRANGERS.keys() <= self.boxes.keys()

    def create(self, offer: Offer, spec: BoxSpec, sending: Callable[[], None] = lambda: None) -> int:
        if self.clock.time() < self.away_until:
            raise MarketUnreachable("no connection")
        if self._take("refusing"):
            raise MarketError("the market says no")
        before = set(self.boxes)
        self.double_rents += len(self.ours) if not (self.gone or self.lost_without_effect or self.credit <= 0) else 0
        try:
            return super().create(offer, spec, sending)
        finally:
            for number in set(self.boxes) - before:
                self.made.append((self.clock.time(), number, offer.machine_id))

    def instances(self, label_prefix: str, ids: Collection[int] = ()) -> list[Instance]:
        found = [self._shown(box) for box in super().instances(label_prefix, ids)]
        if self.clock.time() < self.unknown_until or self._take("unknown_lists"):
            raise MarketUnreachable("the market's list of instances is malformed: what exists is unknown")
        return found

    def get(self, instance_id: int) -> Instance | None:
        box = super().get(instance_id)
        if box is None or box.start is None or self.clock.time() < box.start + self.unseen_s:
            return None
        return self._shown(box)

    def destroy(self, instance_id: int) -> None:
        self.asked_to_end.add(instance_id)
        before = set(self.boxes)
        if self._take("failing_destroys") or self.clock.time() < self.undying_until:
            self._ask("destroy")
            raise MarketUnreachable(f"the market did not confirm the end of box {instance_id}")
        super().destroy(instance_id)
        self.ended += [(self.clock.time(), number) for number in before - set(self.boxes)]

    def end_by_itself(self) -> None:
        for box in self.ours:
            del self.boxes[box.id]
            self.ended.append((self.clock.time(), box.id))

    def _shown(self, box: Instance) -> Instance:
        if box.start is None:
            return box
        if box.machine_id in self.stuck_machines or self.clock.time() < box.start + self.boot_s:
            return replace(box, state=BoxState.PENDING, status="loading")
        if box.machine_id in self.bad_machines:
            return replace(box, state=BoxState.FAILED, status="created", message="failed to inject CDI devices")
        return box

    def _ask(self, verb: str) -> None:
        self.questions += 1
        if self.clock.time() < self.away_until or (self.hiccups and self.questions % self.hiccups == 0):
            raise MarketUnreachable("the market cannot be reached")
        super()._ask(verb)


@dataclass
class Box(FakeBox):
    """Every box's ssh side. `refusing_until`: sshd is not there before that time."""

    clock: Clock = field(default_factory=Clock)
    refusing_until: float = 0.0

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "before"}
        return kept | {"uploads": [], "connections": [], "keys": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, before=_nothing)

    def connect(self, endpoint: Endpoint, host_keys: Sequence[str], login_key: Path) -> Remote:
        if self.clock.time() < self.refusing_until:
            raise NotYet(f"{endpoint}: connection refused")
        return super().connect(endpoint, host_keys, login_key)


@dataclass
class Outside:
    """One world outside. `answer` is what the last process said before it ended, see `processes`."""

    clock: Clock
    market: Market
    box: Box
    full: bool = False
    """The disk is: the ledger can only be read."""
    blind: bool = False
    """The keeper does not run, although it says so."""
    tunnel: str = "up"
    made_before_ending: int | None = None
    """Boxes that had been rented when another process recorded ENDING for one that was not ready."""
    answer: Any = None

    @classmethod
    def fresh(cls) -> Outside:
        clock = Clock()
        return cls(clock, Market(clock=clock), Box(clock=clock))


Change = Callable[[Outside], None]


class Memory:
    """One Outside, shared with every process that is forked later. Written by one process at a time."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 1 << 21)

    def save(self, outside: Outside) -> None:
        data = pickle.dumps(outside)
        self._map.seek(0)
        self._map.write(len(data).to_bytes(8, "little") + data)

    def load(self) -> Outside:
        self._map.seek(0)
        size = int.from_bytes(self._map.read(8), "little")
        outside = pickle.loads(self._map.read(size))
        assert isinstance(outside, Outside)
        return outside
