"""What can go wrong, on demand. One row of `KINDS` per fault; whoever can fail asks `take` at the point where it would.

A fault is aimed at one offer, or at whatever comes next; it happens `calls` times, or until it is cleared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from selfhost_cli.errors import UsageError

STAGES = ("null", "created", "loading")
"""What `actual_status` says before `running`, in order."""


@dataclass(frozen=True)
class Kind:
    """A fault's options: the default of each, and the values allowed where there are few."""

    meaning: str
    options: Mapping[str, Any]
    choices: Mapping[str, tuple[Any, ...]]


KINDS: Mapping[str, Kind] = {
    "offer_gone": Kind(
        "create answers no_such_ask, and the offer is in no search any more",
        {"spelling": "404"},
        {"spelling": ("400", "404", "410", "200")},
    ),
    "slow_boot": Kind(
        "seconds in each stage before running, instead of the market's usual ones",
        dict.fromkeys(STAGES),
        {},
    ),
    "boot_stuck": Kind("the boot stays in this stage for ever", {"stage": "loading"}, {"stage": STAGES}),
    "host_dies": Kind(
        "the box's processes are killed so many seconds after running, and the status says so",
        {"status": "offline", "after": 0.0},
        {"status": ("offline", "exited", "unknown")},
    ),
}


@dataclass(frozen=True)
class Fault:
    """One fault that is set. `offer` None: any offer; `calls` None: until cleared."""

    id: int
    kind: str
    options: Mapping[str, Any]
    offer: int | None = None
    calls: int | None = None


class Faults:
    """The faults that are set now."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._set: list[Fault] = []

    def add(
        self, kind: str, options: Mapping[str, Any], *, offer: int | None = None, calls: int | None = None
    ) -> Fault:
        """Set one. Raises UsageError for a kind or an option that there is not."""
        known = KINDS.get(kind)
        if known is None:
            raise UsageError(f"there is no fault {kind!r}", f"one of: {', '.join(KINDS)}")
        for name, value in options.items():
            if name not in known.options:
                raise UsageError(f"{kind} has no option {name!r}", f"one of: {', '.join(known.options)}")
            if name in known.choices and value not in known.choices[name]:
                raise UsageError(f"{kind}: {name} is {value!r}", f"one of: {known.choices[name]}")
            if name not in known.choices and not (isinstance(value, int | float) and value >= 0):
                raise UsageError(f"{kind}: {name} is {value!r}", "a number of seconds")
        fault = Fault(next(self._ids), kind, {**known.options, **options}, offer, calls)
        self._set.append(fault)
        return fault

    def take(self, kind: str, *, offer: int | None = None) -> Mapping[str, Any] | None:
        """The options of a fault of this kind that happens now (and is counted), None when all is well.

        A fault aimed at this very offer goes before one aimed at any.
        """
        for aimed in (offer, None) if offer is not None else (None,):
            for index, fault in enumerate(self._set):
                if fault.kind == kind and fault.offer == aimed:
                    self._count(index, fault)
                    return fault.options
        return None

    def _count(self, index: int, fault: Fault) -> None:
        if fault.calls is None:
            return
        if fault.calls <= 1:
            del self._set[index]
        else:
            self._set[index] = replace(fault, calls=fault.calls - 1)

    def clear(self, fault_id: int | None = None) -> None:
        """Forget one, or all of them."""
        self._set = [fault for fault in self._set if fault_id is not None and fault.id != fault_id]

    def __iter__(self) -> Iterator[Fault]:
        return iter(tuple(self._set))
