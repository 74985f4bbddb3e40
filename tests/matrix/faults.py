"""What can be wrong outside while a process dies: each with what it excuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.matrix.outside import Outside


def _nothing(outside: Outside) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """`start` is done to a world before anything runs, `crash` at the moment of the crash.

    `hopeless`: no `up` can succeed under it. `delays`: a command may end with "may still be billing" and must work
    when typed again later. `lost`: the ledger is gone after the crash.
    """

    name: str
    start: Callable[[Outside], None] = _nothing
    crash: Callable[[Outside], None] = _nothing
    hopeless: bool = False
    delays: bool = False
    lost: bool = False
    unwritable: bool = False
    """Nothing can be written to the ledger after the crash."""
    early: bool = False
    """Done to the world before what ran before, too."""


def _set(**values: object) -> Callable[[Outside], None]:
    """Fields of the market, or of the box with `box_` before them."""

    def change(outside: Outside) -> None:
        for name, value in values.items():
            if name.startswith("box_"):
                setattr(outside.box, name.removeprefix("box_"), value)
            else:
                assert hasattr(outside.market, name), name
                setattr(outside.market, name, value)

    return change


def _away(seconds: float) -> Callable[[Outside], None]:
    def change(outside: Outside) -> None:
        outside.market.away_until = outside.clock.time() + seconds

    return change


def _unknown(outside: Outside) -> None:
    outside.market.unknown_until = outside.clock.time() + 200


def _later(seconds: float) -> Callable[[Outside], None]:
    return lambda outside: outside.clock.sleep(seconds)


def _dead_box(outside: Outside) -> None:
    outside.market.end_by_itself()
    outside.clock.sleep(60)


def _relabelled(outside: Outside) -> None:
    outside.market.boxes |= {box.id: replace(box, label="my-claude-box") for box in outside.market.ours}


def _full(outside: Outside) -> None:
    outside.full = True


def _full_and_relabelled(outside: Outside) -> None:
    _full(outside)
    _relabelled(outside)


def _no_sshd(outside: Outside) -> None:
    outside.box.refusing_until = outside.clock.time() + 90


def _undying(outside: Outside) -> None:
    outside.market.undying_until = outside.clock.time() + 150


def _blind(outside: Outside) -> None:
    outside.blind = True


def _no_tunnel(outside: Outside) -> None:
    outside.tunnel = "reconnecting"


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("none"),
        Fault("the list lags 45 s", _set(listing_lag=45.0), early=True),
        Fault("create: answer lost, with effect", _set(lost_with_effect=1)),
        Fault("create: answer lost, and the list lags", _set(lost_with_effect=1, listing_lag=45.0)),
        Fault("create: answer lost, without effect", _set(lost_without_effect=1)),
        Fault("create: two offers gone", _set(gone=2)),
        Fault("create: refused once", _set(refusing=1)),
        Fault("create: out of credit", _set(credit=0.01), hopeless=True),
        Fault("market away for 90 s after the crash", crash=_away(90), delays=True),
        Fault("market away for 10 min after the crash", crash=_away(600), delays=True),
        Fault("every 7th question unanswered", _set(hiccups=7), hopeless=True, delays=True),
        Fault("the list unknown, 4 times after the crash", crash=_set(unknown_lists=4), delays=True),
        Fault("the list unknown for 200 s after the crash", crash=_unknown, delays=True),
        Fault("a box unseen for 20 s", _set(unseen_s=20.0, listing_lag=20.0)),
        Fault("destroy fails 3 times", _set(failing_destroys=3)),
        Fault("destroy without effect, once", _set(undead=1)),
        Fault("destroy refused for 150 s after the crash", crash=_undying, delays=True),
        Fault("sshd away for 90 s after the crash", crash=_no_sshd),
        Fault("sshd refuses 5 times", _set(box_refusals=5)),
        Fault("boot takes 3 minutes", _set(boot_s=180.0)),
        Fault("the host cannot start the box", _set(bad_machines=frozenset({1}))),
        Fault("the host loads for ever", _set(stuck_machines=frozenset({1}))),
        Fault("the box is dearer than its offer", _set(charged=1.28), hopeless=True),
        Fault("the box is a little dearer than its offer", _set(charged=0.36)),
        Fault("its label is another one after the crash", crash=_relabelled),
        Fault("the install fails", _set(box_install_code=1), hopeless=True),
        Fault("the watchdog cannot arm", _set(box_armed="refused 401"), hopeless=True),
        Fault("no tunnel", _no_tunnel, hopeless=True),
        Fault("the box ends by itself, and a minute passes", crash=_dead_box),
        Fault("an hour passes after the crash", crash=_later(3600)),
        Fault("the ledger is lost at the crash", lost=True),
        Fault("the ledger is lost, and the list lags", _set(listing_lag=45.0), early=True, lost=True),
        Fault("the ledger cannot be written", crash=_full, unwritable=True),
        Fault(
            "the ledger cannot be written, and its label is another one", crash=_full_and_relabelled, unwritable=True
        ),
        Fault("the keeper does not run", _blind, hopeless=True),
    )
}
