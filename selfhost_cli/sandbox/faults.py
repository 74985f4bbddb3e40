"""What can go wrong, on demand. One row of `KINDS` per fault; whoever can fail asks `take` at the point where it would.

A fault is aimed at one offer (and the instances rented from it), or at whatever comes next. It happens `calls` times,
or until it is cleared, after it has been `skip`ped so many times. `python -m selfhost_cli.sandbox.faults` prints the
table for docs/sandbox-market.md.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from selfhost_cli.errors import UsageError

STAGES = ("null", "created", "loading")
"""What `actual_status` says before `running`, in order."""

CALLS = ("search", "create", "list", "show", "change", "destroy", "attach", "keys", "account", "charges", "logs")
"""The API's calls by name: `change` is start, stop and label, `attach` an instance's keys, `keys` the account's."""

_REPRODUCED = "SDK 1.9's reaction recorded"
_DOCUMENTED = "market's documentation"
_DSTACK = "reported by dstack"
_SKYPILOT = "reported by SkyPilot"
_USERS = "reported by users"
_OURS = "not reported; the client must stand it"


@dataclass(frozen=True)
class Kind:
    """A fault: what one of its `calls` is, and its options with their defaults.

    Values are those of `choices`; where there are none, a number from 0 on (or nothing, where that is the default).
    """

    at: str
    meaning: str
    known: str
    options: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_YES_NO = (True, False)
_HTTP = ("500", "502", "503", "504")

KINDS: Mapping[str, Kind] = {
    # the paid call
    "offer_gone": Kind(
        "create",
        "no_such_ask in one of its spellings, and the offer is in no search any more",
        f"{_DOCUMENTED}; {_DSTACK}",
        {"spelling": "404"},
        {"spelling": ("400", "404", "410", "200")},
    ),
    "create_refused": Kind(
        "create",
        "the account may not rent: 400, nothing is made (the wording of spend_limit is ours)",
        f"{_DOCUMENTED}; spend_limit {_USERS}",
        {"why": "insufficient_credit"},
        {"why": ("insufficient_credit", "spend_limit", "no_ssh_key_for_vm")},
    ),
    "contract_in_error": Kind(
        "create",
        "an error that carries `new_contract`: a stopped instance exists, and its disk is billed",
        _DSTACK,
        {"status": "400"},
        {"status": ("200", "400", "500")},
    ),
    "price_rises": Kind(
        "create",
        "the instance costs `factor` times what its offer said, from `after` seconds on",
        f"SDK 1.9 (pending price increases); 0 s: {_OURS}",
        {"factor": 2.0, "after": 0.0},
    ),
    # any answer
    "answer_lost": Kind(
        "the call named",
        "the call takes effect (or not), and its answer is an error page, a closed connection, half of it or silence",
        _REPRODUCED,
        {"call": "create", "how": "502", "effect": True},
        {"call": ("any", *CALLS), "how": ("408", *_HTTP, "drop", "cut", "hang"), "effect": _YES_NO},
    ),
    "odd_answer": Kind(
        "the call named",
        "the call takes effect, and its answer with status 200 is not of the promised shape",
        f"null: {_SKYPILOT}; else {_OURS}",
        {"call": "list", "shape": "null"},
        {
            "call": ("any", *CALLS),
            "shape": (
                "null",
                "empty",
                "html",
                "unsuccessful",
                "refusal",
                "no_rows",
                "hollow",
                "bad_row",
                "no_token",
                "endless",
            ),
        },
    ),
    "rate_limited": Kind(
        "the call named",
        "429 as plain text or JSON, with a Retry-After header of so many seconds or without; quota: the daily one",
        f"{_DOCUMENTED}; {_DSTACK}",
        {"call": "any", "form": "plain", "retry_after": None},
        {"call": ("any", *CALLS), "form": ("plain", "json", "detail", "quota")},
    ),
    "rate_intervals": Kind(
        "",
        "429 for whoever asks more often than the documentation allows, per call and key; a create that came too "
        "early is followed by 12 s in which none is taken",
        _DOCUMENTED,
    ),
    "market_down": Kind(
        "",
        "every call fails for so many seconds, without effect",
        _OURS,
        {"seconds": 180.0, "how": "503"},
        {"how": (*_HTTP, "drop")},
    ),
    "key_refused": Kind(
        "use of the key",
        "the account's key, or a box's own, is not accepted",
        f"{_DOCUMENTED}; 404 {_USERS}",
        {"whose": "box", "status": "401"},
        {"whose": ("box", "account"), "status": ("401", "403", "404")},
    ),
    # reading
    "show_null": Kind("read of one", '`{"instances": null}` though the instance exists', _SKYPILOT),
    "null_fields": Kind(
        "row",
        "columns are null; all: every one but id and label",
        _REPRODUCED,
        {"fields": "all"},
        {"fields": ("start_date", "extra_env", "all")},
    ),
    "listed_late": Kind("create", "the list does not show the instance for so many seconds", _OURS, {"seconds": 30.0}),
    "listed_long": Kind(
        "destroy", "the list still shows the destroyed instance for so many seconds", _USERS, {"seconds": 45.0}
    ),
    "short_pages": Kind(
        "page",
        "a page of the list, or of the charges, has so many rows",
        f"{_DOCUMENTED} (25; 100)",
        {"call": "list", "rows": 1},
        {"call": ("list", "charges")},
    ),
    # starting
    "slow_boot": Kind(
        "boot",
        "seconds in each stage before running, instead of the market's usual ones",
        _USERS,
        dict.fromkeys(STAGES),
    ),
    "boot_stuck": Kind(
        "boot", "the boot stays in this stage for ever", _USERS, {"stage": "loading"}, {"stage": STAGES}
    ),
    "boot_fails": Kind(
        "boot",
        "the host cannot run the container, and its status message says why: cdi and oci stay in created, cdi_running "
        "claims to run, manifest, pull_denied and other stay in loading, and after 7 minutes the market stops them",
        f"{_SKYPILOT}; cdi_running {_USERS}",
        {"why": "cdi"},
        {"why": ("cdi", "oci", "manifest", "pull_denied", "other", "cdi_running")},
    ),
    # running
    "host_dies": Kind(
        "start",
        "the box's processes are killed so many seconds after running, and the status says so; outbid: the market "
        "stops it, and its disk is billed",
        f"{_DOCUMENTED}; {_SKYPILOT}",
        {"status": "offline", "after": 0.0},
        {"status": ("offline", "exited", "unknown", "outbid")},
    ),
    "ssh_refuses": Kind("start", "running, but sshd listens only after so many seconds", _USERS, {"seconds": 30.0}),
    "ssh_denies": Kind("start", "sshd knows no key for so many seconds", _USERS, {"seconds": 30.0}),
    "one_endpoint": Kind(
        "create",
        "only one endpoint answers; at the other nobody listens, or it is not in the row",
        f"{_DOCUMENTED}; {_USERS}",
        {"only": "proxy", "other": "closed"},
        {"only": ("direct", "proxy"), "other": ("closed", "absent")},
    ),
    "endpoint_moves": Kind("start again", "the container comes back on another port", _OURS),
    # ending
    "destroy_404": Kind(
        "destroy",
        "404 no_such_instance, whether it was destroyed or not",
        f"{_DSTACK}; without effect: {_OURS}",
        {"effect": False},
        {"effect": _YES_NO},
    ),
    "start_queued": Kind(
        "start again",
        "resources_unavailable: the start fires, and bills, so many seconds later unless stopped or destroyed before",
        _DOCUMENTED,
        {"seconds": 60.0},
    ),
    "credit_gone": Kind(
        "",
        "the account has nothing left after so many seconds: what runs is stopped, and its disk billed",
        _DOCUMENTED,
        {"after": 0.0},
    ),
}
"""Kinds without an `at` hold while they are set; `calls` means nothing to them."""


@dataclass(frozen=True)
class Fault:
    """One fault that is set, at `since` on the market's clock. `offer` None: any; `calls` None: until cleared."""

    id: int
    kind: str
    options: Mapping[str, Any]
    offer: int | None = None
    calls: int | None = None
    skip: int = 0
    since: float = 0.0


class Faults:
    """The faults that are set now."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ids = itertools.count(1)
        self._set: list[Fault] = []

    def add(
        self,
        kind: str,
        options: Mapping[str, Any],
        *,
        offer: int | None = None,
        calls: int | None = None,
        skip: int = 0,
    ) -> Fault:
        """Set one. Raises UsageError for a kind, an option or a value that there is not."""
        known = KINDS.get(kind)
        if known is None:
            raise UsageError(f"there is no fault {kind!r}", f"one of: {', '.join(KINDS)}")
        for name, value in options.items():
            if name not in known.options:
                raise UsageError(f"{kind} has no option {name!r}", f"one of: {', '.join(known.options)}")
            if not _allowed(known, name, value):
                wanted = f"one of: {known.choices[name]}" if name in known.choices else "a number from 0 on"
                raise UsageError(f"{kind}: {name} is {value!r}", wanted)
        for name, count in (("offer", offer), ("calls", calls), ("skip", skip)):
            if count is not None and (not isinstance(count, int) or count < 0):
                raise UsageError(f"{kind}: {name} is {count!r}", "a whole number")
        fault = Fault(next(self._ids), kind, {**known.options, **options}, offer, calls, skip, self._clock())
        self._set.append(fault)
        return fault

    def take(self, kind: str, *, offer: int | None = None, **aimed: str) -> Mapping[str, Any] | None:
        """The options of a fault of this kind that happens now (and is counted), None when all is well.

        `aimed` names options that say what the fault is for (call="list"). A fault aimed at this very offer goes before
        one aimed at any.
        """
        for target in (offer, None) if offer is not None else (None,):
            for index, fault in enumerate(self._set):
                if fault.kind != kind or fault.offer != target:
                    continue
                meant = all(fault.options[name] in (value, "any") for name, value in aimed.items())
                if meant and self._count(index, fault):
                    return fault.options
        return None

    def holding(self, kind: str) -> Fault | None:
        """The latest of a kind that holds while it is set."""
        return next((fault for fault in reversed(self._set) if fault.kind == kind), None)

    def _count(self, index: int, fault: Fault) -> bool:
        """Whether it is this fault's turn."""
        if fault.skip:
            self._set[index] = replace(fault, skip=fault.skip - 1)
            return False
        if fault.calls is not None and fault.calls <= 1:
            del self._set[index]
        elif fault.calls is not None:
            self._set[index] = replace(fault, calls=fault.calls - 1)
        return True

    def clear(self, fault_id: int | None = None) -> None:
        """Forget one, or all of them."""
        self._set = [fault for fault in self._set if fault_id is not None and fault.id != fault_id]

    def __iter__(self) -> Iterator[Fault]:
        return iter(tuple(self._set))


def _allowed(kind: Kind, name: str, value: Any) -> bool:
    if name in kind.choices:
        # By type too: 1 is not True here.
        return any(value == choice and type(value) is type(choice) for choice in kind.choices[name])
    if value is None:
        return kind.options[name] is None
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def table() -> str:
    """`KINDS` in Markdown."""
    rows = ["| switch | one call is a | what happens | options, default first | known how |", "| --- " * 5 + "|"]
    for name, kind in KINDS.items():
        options = "<br>".join(_option(kind, option) for option in kind.options)
        rows.append(f"| `{name}` | {kind.at or '(holds)'} | {kind.meaning} | {options} | {kind.known} |")
    return "\n".join(rows) + "\n"


def _option(kind: Kind, name: str) -> str:
    default = kind.options[name]
    if len(kind.choices.get(name, ())) > len(CALLS):
        return f"`call`: {default}, or another one"
    others = [choice for choice in kind.choices.get(name, ()) if choice != default]
    return f"`{name}`: " + ", ".join(_word(value) for value in (default, *others))


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)


if __name__ == "__main__":
    sys.stdout.write(table())
