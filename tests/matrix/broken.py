"""Money rules broken on purpose, to see that the matrix notices: edits of the real code, in this process only."""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from selfhost_cli import lifecycle
from selfhost_cli.keeper.deadlines import Deadlines
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle import ending, identity, renting, steps
from tests.matrix.matrix import Group


@dataclass(frozen=True)
class Broken:
    """`edits` are (function, text in it, what stands there instead); `notice` is in what the matrix must say."""

    rule: int
    edits: tuple[tuple[Callable[..., Any], str, str], ...]
    group: Group
    notice: str

    def apply(self) -> None:
        for function, old, new in self.edits:
            rewrite(function, old, new)


def rewrite(function: Callable[..., Any], old: str, new: str) -> None:
    """Change a function's text in place, for everybody who has imported it. `\\g` in the new one is the old one."""
    name = function.__qualname__
    text = _TEXTS.get(name) or textwrap.dedent(inspect.getsource(function))
    assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times: the edit must follow the code"
    _TEXTS[name] = text = text.replace(old, new.replace("\\g", old))
    code = compile(text, function.__code__.co_filename, "exec", flags=__future__.annotations.compiler_flag)
    changed: dict[str, Any] = {}
    exec(code, function.__globals__, changed)
    (made,) = changed.values()
    function.__code__ = made.__code__  # type: ignore[attr-defined]


_TEXTS: dict[str, str] = {}
"""Of the functions that were changed: afterwards `inspect` finds them no more."""

WATCHED = (renting.create, "if label not in world.keeper.watched():", "if False:")
LOST, LAGS = "create: answer lost, with effect", "create: answer lost, and the list lags"
OF_READY, OF_CREATING = "down, of a ready box", "down, of an up killed at its create"

RULES = {
    "the intent is written after the paid call": Broken(
        1,
        (
            WATCHED,
            (renting.create, "    world.ledger.intend(rental)\n", ""),
            (renting.create, "world.ledger.note(rental, sent_at=", "replace(rental, sent_at="),
            (renting.create, '    world.report(Event("rent", "done"', "    world.ledger.intend(rental)\n\\g"),
        ),
        Group("up", "none", then=("keeper",)),
        "the keeper did not end what nobody uses",
    ),
    "the keeper is not asked": Broken(
        1, (WATCHED,), Group("up", "the keeper does not run", then=("keeper",)), "the keeper did not end"
    ),
    "the paid call is sent again when its answer is lost": Broken(
        2,
        ((renting.create, "        return rental\n", "        instance_id = world.provider.create(offer, spec)\n"),),
        Group("up", LOST, then=("down",)),
        "a second box was rented while one was alive",
    ),
    "a lost answer is given up at once": Broken(
        2,
        ((steps._resolve, ">= lag", ">= 0"),),
        Group("up", LAGS, then=("up",)),
        "a box is billed, and `up` ended with 1",
    ),
    "an unknown list counts as empty": Broken(
        3,
        ((ending.prove, "            return wait(error.message)\n", "            rows = []\n"),),
        Group(OF_CREATING, "the list unknown for 200 s after the crash", then=("down",)),
        "`down` ended with 0, and a box is billed",
    ),
    "down asks its memory instead of the market": Broken(
        3,
        ((ending.prove, "        for box in boxes:\n", "        boxes = [b for b in boxes if b.label in known]\n\\g"),),
        Group("up", "the ledger is lost at the crash", then=("down",)),
        "`down` ended with 0, and a box is billed",
    ),
    "absence counts at once": Broken(
        3,
        ((ending.prove, "may_appear = distrust or any(", "may_appear = False and any("),),
        Group("up", LAGS, then=("down",)),
        "`down` ended with 0, and a box is billed",
    ),
    "whatever the account has is ended": Broken(
        3,
        ((ending.prove, "prefix = only or (", 'prefix = "" and ('),),
        Group(OF_READY, "none", then=("down",)),
        "a box that is not ours was ended",
    ),
    "down does not record ENDING": Broken(
        4,
        ((ending._record_ending, 'books.ledger.end(rental.label, "down")', "rental"),),
        Group(OF_READY, "destroy fails 3 times", then=("keeper",)),
        "the keeper did not end what nobody uses",
    ),
    "up does not notice ENDING": Broken(
        4,
        ((Ledger.advance, "if current.state is not rental.state:", "if False:"),),
        Group("up", "none", "ending", ("down",)),
        "after ENDING was recorded",
    ),
    "up rents although a rental lives": Broken(
        4,
        (
            (lifecycle._unfinished, "    return world.ledger.live()\n", "    return []\n"),
            (Ledger.intend, "        if other:\n", "        if False:\n"),
            (renting._share, "if held and share < LEAST_SHARE:", "if False:"),
        ),
        Group("up", "none", then=("up",)),
        "a second box was rented while one was alive",
    ),
    "a failed up leaves its box": Broken(
        5,
        ((lifecycle._clean_up, "    rentals: list[Rental] = []\n", "    return\n"),),
        Group("up", "the install fails", then=("up",)),
        "`up` ended with 5",
    ),
    "Ctrl-C leaves the box": Broken(
        5,
        ((lifecycle._guarded, "except BaseException as error", "except Exception as error"),),
        Group("up", "none", "ctrl-c", ("down",)),
        "Ctrl-C left a box that was not ready",
    ),
    "Ctrl-C ends a box that was ready before": Broken(
        5,
        (
            (
                lifecycle.up_all,
                "[_attach(world, rental) for",
                "[_guarded(world, lambda one=rental: _attach(world, one), ()) for",
            ),
        ),
        Group("up, on a ready box", "none", "ctrl-c", ("down",), every=True),
        "Ctrl-C ended a box that was ready before",
    ),
    "the keeper leaves orphans": Broken(
        5,
        ((Deadlines._overdue, "return self._end_orphan", "return None"),),
        Group("up", "none", then=("keeper",)),
        "the keeper did not end what nobody uses",
    ),
    "the box shows a host key that the ledger does not have": Broken(
        5,
        ((identity.replace_bootstrap, "if new != rental.next_host_key:", "if False:"),),
        Group("up", "none", then=("up",)),
        "`up` did not resume the box that was paid for",
    ),
    "a box that cannot arm is used": Broken(
        6,
        ((steps._check_armed, 'if answer != "ok" and not world.settings.unguarded:', "if False:"),),
        Group("up", "the watchdog cannot arm", then=("up",)),
        "a box that cannot end itself is in use",
    ),
    "a box counts with its offer's price": Broken(
        6,
        ((steps._tell_price, "if rental.dph_told == rental.dph_total:", "if True:"),),
        Group("up", "the box is a little dearer than its offer", then=("up",)),
        "a box counts its dollars with another price than it costs",
    ),
    "what can only be read is forgotten": Broken(
        3,
        ((ending._record_ending, "return list(rentals.values()), error.message", "return [], error.message"),),
        Group("up, on a ready box", "the ledger cannot be written, and its label is another one", then=("down",)),
        "`down` ended with 0, and a box is billed",
    ),
    "the headline has no price": Broken(
        7,
        ((ending.headline, "told = [str(rental) for rental in rentals]", 'told = ["a box"]'),),
        Group(OF_READY, "market away for 10 min after the crash", then=("down",)),
        "exit 5 without the price",
    ),
    "the headline has no command": Broken(
        7,
        ((ending.headline, '"Run `selfhost down` until it', '"Wait until somebody'),),
        Group(OF_READY, "market away for 10 min after the crash", then=("down",)),
        "exit 5 without the command",
    ),
    "a machine that failed is rented again": Broken(
        8,
        ((renting._failed_before, "        if rental.instance_id\n", "        if False\n"),),
        Group("up", "the host cannot start the box", then=("up",)),
        "a machine that failed was rented again",
    ),
}
