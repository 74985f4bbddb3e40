"""What there is, and what it costs: the ledger's word, the keeper's, and the box's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from selfhost_cli import attach, caching, countdown
from selfhost_cli.attach import Front
from selfhost_cli.config import Settings
from selfhost_cli.countdown import Countdown
from selfhost_cli.errors import SelfhostError
from selfhost_cli.invoice import Invoice, invoice
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Rental, Saved, State

LOOK_S = 5.0


@dataclass(frozen=True)
class Status:
    """One rental as it stands. `tunnel` is the keeper's state of it, `box` what the proxy on the box answered.

    `ends`: what will end the box by itself, soonest first; `unwatched_s`: for how long its watchdog has not looked.
    """

    rental: Rental
    tunnel: str
    reason: str
    url: str
    box: dict[str, Any]
    so_far: Invoice
    ends: tuple[Countdown, ...]
    unwatched_s: float | None


def look(settings: Settings, ledger: Ledger, *, now: float) -> list[Status]:
    """Every rental that may cost money. Asks the keeper when it runs, never the market, and starts nothing."""
    front = attach.find(settings.paths)
    saved = caching.saved(settings) if (live := ledger.live()) else {}
    return [_status(rental, front, ledger, saved.get(rental.label), now) for rental in live]


def _status(rental: Rental, front: Front | None, ledger: Ledger, saved: Saved | None, now: float) -> Status:
    tunnel, reason = _tunnel(rental, front)
    box = _ask_box(front) if front and tunnel in ("up", "degraded") else {}
    so_far = invoice(rental, ledger.usage(rental.label), now=now, saved=saved)
    watch = box.get("watchdog")
    measured = countdown.read(watch) if isinstance(watch, dict) else None
    if rental.heard and not measured:  # it cannot be asked; what the keeper heard last still counts
        ends = countdown.projected(rental, rental.heard, now=now, away=tunnel not in ("up", "installing"))
    else:
        ends = countdown.countdowns(rental, measured, now=now)
    unwatched = watch.get("age_s") if isinstance(watch, dict) and measured else None
    age = float(unwatched) if isinstance(unwatched, int | float) else None
    return Status(rental, tunnel, reason, front.url if front else "", box, so_far, ends, age)


def _tunnel(rental: Rental, front: Front | None) -> tuple[str, str]:
    if front is None:
        ready = "it starts with the next `selfhost claude`"
        unready = "nobody looks after it: `selfhost up` goes on with it, `selfhost down` ends it"
        return "no keeper", ready if rental.state is State.READY else unready
    try:
        answer = attach.call(front, "state")
    except SelfhostError as error:
        return "no answer", error.message
    rows = answer.get("rentals")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and row.get("label") == rental.label:
            return str(row.get("state")), str(row.get("reason", ""))
    return "not watched", ""


def _ask_box(front: Front) -> dict[str, Any]:
    try:
        answer = httpx.get(
            f"{front.url}/health",
            headers={"Authorization": f"Bearer {front.token}"},
            timeout=LOOK_S,
            trust_env=False,
            verify=False,  # plain http on loopback; loading certificates takes 60 ms
        ).json()
    except (httpx.HTTPError, ValueError):
        return {}
    box = answer.get("box") if isinstance(answer, dict) else None
    return box if isinstance(box, dict) else {}
