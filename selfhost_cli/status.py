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
    sessions: int | None = None
    """Conversations that were on this box in the last minutes; None where there is one box, or the keeper is away."""


def look(settings: Settings, ledger: Ledger, *, now: float) -> list[Status]:
    """Every rental that may cost money. Asks the keeper when it runs, never the market, and starts nothing."""
    front = attach.find(settings.paths)
    saved = caching.saved(settings) if (live := ledger.live()) else {}
    boxes = _ask_boxes(front) if front and len(live) > 1 else None
    return [_status(rental, front, boxes, ledger, saved.get(rental.label), now) for rental in live]


def _status(
    rental: Rental,
    front: Front | None,
    boxes: dict[str, Any] | None,
    ledger: Ledger,
    saved: Saved | None,
    now: float,
) -> Status:
    tunnel, reason, sessions = _tunnel(rental, front)
    box: dict[str, Any] = {}
    if front and tunnel in ("up", "degraded"):
        box = _ask_box(front) if boxes is None else boxes.get(rental.label, {})
    so_far = invoice(rental, ledger.usage(rental.label), now=now, saved=saved)
    watch = box.get("watchdog")
    measured = countdown.read(watch) if isinstance(watch, dict) else None
    if rental.heard and not measured:  # it cannot be asked; what the keeper heard last still counts
        ends = countdown.projected(rental, rental.heard, now=now, away=tunnel not in ("up", "installing"))
    else:
        ends = countdown.countdowns(rental, measured, now=now)
    unwatched = watch.get("age_s") if isinstance(watch, dict) and measured else None
    age = float(unwatched) if isinstance(unwatched, int | float) else None
    return Status(
        rental,
        tunnel,
        reason,
        front.url if front else "",
        box,
        so_far,
        ends,
        age,
        sessions if boxes is not None else None,
    )


def _tunnel(rental: Rental, front: Front | None) -> tuple[str, str, int | None]:
    if front is None:
        ready = "it starts with the next `selfhost claude`"
        unready = "nobody looks after it: `selfhost up` goes on with it, `selfhost down` ends it"
        return "no keeper", ready if rental.state is State.READY else unready, None
    try:
        answer = attach.call(front, "state")
    except SelfhostError as error:
        return "no answer", error.message, None
    rows = answer.get("rentals")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and row.get("label") == rental.label:
            sessions = row.get("sessions")
            return str(row.get("state")), str(row.get("reason", "")), sessions if isinstance(sessions, int) else None
    return "not watched", "", None


def _ask_boxes(front: Front) -> dict[str, Any]:
    """What each says of itself, by its label; nothing from a keeper of a version that had one."""
    try:
        told = attach.call(front, "boxes")
    except SelfhostError:
        return {}
    return {label: health for label, health in told.items() if isinstance(health, dict)}


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
