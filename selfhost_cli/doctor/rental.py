"""The rental: what the ledger knows beside what the market lists, who looks after it, and whether it answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing

from selfhost_cli import attach, config, health, status
from selfhost_cli.config import Settings
from selfhost_cli.doctor.checks import Case, Finding, Line, failed, ok, skipped, warning
from selfhost_cli.errors import MayBeBilling
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle import SIMULATED
from selfhost_cli.model import BoxState, Instance, Probe, Rental, State

LABELS = "selfhost-"
MARKET_S = 60.0
"""It may make us wait for our turn, behind the account's questions."""
LINK_S = 15.0
TOKEN_S = 60.0
HEALTH_S = TOKEN_S + 2 * health.LOOK_S
HEALTH = tuple(f"health: {name}" for name in health.PROBES)
NO_RENTAL = "there is no rental"
BILL = "`selfhost down` ends the bill."


def lines(case: Case, settings: Settings | None, rentals: Sequence[Rental]) -> list[Line]:
    """`rentals`: those of the ledger that may cost money."""
    return [
        Line("rental", ("boxes",), lambda: [_boxes(case, settings, rentals)], MARKET_S),
        Line("rental", ("keeper", "tunnel"), lambda: _link(case, settings, rentals), LINK_S),
        Line("rental", HEALTH, lambda: _health(case, rentals), HEALTH_S),
    ]


def _boxes(case: Case, settings: Settings | None, rentals: Sequence[Rental]) -> Finding:
    if settings is None:
        return skipped("the settings cannot be read")
    if not config.installed(case.paths):
        return skipped("nothing was ever rented with this profile")
    ours = f"{LABELS}{config.installation_id(case.paths)}-"
    return boxes(case.provider(settings).instances(LABELS), ours, rentals)


def boxes(listed: Sequence[Instance], ours: str, rentals: Sequence[Rental]) -> Finding:
    """The market's complete list of boxes with our label beside the ledger's rentals."""
    mine = {box.label: box for box in listed if box.label.startswith(ours)}
    others = len(listed) - len(mine)
    saw = ", ".join(f"box {box.id} (${box.dph_total:.2f}/h) is {box.status}" for box in mine.values()) or "no box"
    saw += f"; {others} of other profiles or installations" if others else ""
    known = {rental.label for rental in rentals}
    if strays := [box for label, box in mine.items() if label not in known]:
        told = ", ".join(f"box {box.id}" for box in strays)
        why = f"{told} MAY BE BILLED, and no live rental of the ledger is it"
        return failed(saw, why, "`selfhost reap` tells more, `selfhost reap --yes` ends it.", MayBeBilling.exit_code)
    dead = [box for box in mine.values() if box.state in (BoxState.FAILED, BoxState.IMAGELESS)]
    if dead:
        return failed(saw, f"box {dead[0].id} does not run: {dead[0].message or dead[0].status}", BILL)
    if lost := [rental for rental in rentals if rental.label not in mine]:
        return warning(saw, f"the market does not list {lost[0]}", "`selfhost down` proves that it is gone.")
    return ok(saw)


def _link(case: Case, settings: Settings | None, rentals: Sequence[Rental]) -> Iterator[Finding]:
    """Whether a keeper looks after it, and what that says of the way to the box."""
    if not rentals:
        yield skipped(NO_RENTAL)
        yield skipped(NO_RENTAL)
        return
    front = attach.find(case.paths)
    if front is None:
        ready = rentals[-1].state is State.READY
        saw, why = f"none; {_last_words(case)}", "no keeper runs: nobody renews the lease, and the box ends by itself"
        remedy = f"`selfhost {'env' if ready else 'up'}` starts one; {BILL}"
        yield warning(saw, why, remedy) if ready else failed(saw, why, remedy)
        yield skipped("there is no keeper")
        return
    yield ok(f"on port {front.port}")
    asked = settings or Settings(case.profile, case.paths, {})
    with closing(Ledger(case.paths.ledger)) as ledger:
        values = status.look(asked, ledger, now=time.time())
    yield tunnel(values[-1].tunnel, values[-1].reason) if values else skipped("the rental has ended meanwhile")


def tunnel(state: str, reason: str) -> Finding:
    """What the keeper says of the link."""
    saw = f"{state}: {reason}" if reason else state
    if state == "up":
        return ok(saw)
    again = f"It comes back by itself; `selfhost status` tells when. {BILL}"
    if state in ("degraded", "connecting", "waiting for box", "reconnecting"):
        return warning(saw, "requests wait for it, or may soon have to", again)
    return failed(saw, "no request reaches the box", again)


def _last_words(case: Case) -> str:
    try:
        lines = case.paths.keeper_log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return f"its log ends: {lines[-1]}" if lines else "it has no log"


def _health(case: Case, rentals: Sequence[Rental]) -> Iterator[Finding]:
    rental = rentals[-1] if rentals else None
    front = attach.find(case.paths) if rental else None
    if rental is None or front is None or rental.state is not State.READY:
        why = NO_RENTAL if rental is None else "there is no keeper" if front is None else f"it is {rental.state}"
        yield from (skipped(why) for _ in HEALTH)
        return
    real = SIMULATED not in rental.gpu
    left = list(health.PROBES)
    for probe in health.probes(front, model=rental.model, context=rental.context, gpu=real, token_s=TOKEN_S):
        while left and probe.name in left and left[0] != probe.name:
            left.pop(0)
            yield skipped("the engine does not tell" if real else "the GPU is simulated")
        if left and probe.name == left[0]:
            left.pop(0)
        yield of_probe(probe)


def of_probe(probe: Probe) -> Finding:
    return ok(probe.detail) if probe.ok else failed("", probe.detail, f"{probe.remedy} {BILL}")
