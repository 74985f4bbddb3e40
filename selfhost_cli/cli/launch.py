"""The way to Claude Code: find the box and the keeper, wait for the tunnel, become `claude`.

On the short way of `selfhost claude`: nothing here imports Typer, or what speaks to a market, a box or an event loop.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from selfhost_cli.cli.words import in_profile, say
from selfhost_cli.errors import MayBeBilling, NotSetUp, SelfhostError

if TYPE_CHECKING:
    from pathlib import Path

    from selfhost_cli.attach import Front
    from selfhost_cli.config import Settings
    from selfhost_cli.ledger import Ledger
    from selfhost_cli.model import Rental
    from selfhost_cli.wait import Clock

TUNNEL_WAIT_S = 60.0
TOLD_S = 3600.0
"""A box that ends within this is worth a line before Claude Code starts."""


def claude(profile: str, args: Sequence[str]) -> NoReturn:
    """Become Claude Code on this profile's box. Raises NotSetUp, or MayBeBilling once there is a box."""
    from pathlib import Path

    from selfhost_cli import attach, config, old_variables
    from selfhost_cli import claude as code

    settings = config.load(profile)
    ledger = open_ledger(settings)
    rental = ready(ledger)
    try:
        binary = code.find(settings.claude, os.environ)
        if warning := code.seen_version(binary, settings.paths.state).warning:
            say(f"selfhost: {warning}")
        if remark := old_variables.remark(os.environ, settings.paths.state):
            say(in_profile(f"selfhost: {remark}", profile))
        front = attach.ensure(settings)
    except SelfhostError as error:
        raise _billed(error, rental) from error
    wait_for_tunnel(front, ledger, rental)
    ledger.close()
    if soon := _ends_soon(rental):
        say(in_profile(f"selfhost: {soon}", profile))
    try:
        launch = code.launch(
            binary,
            args,
            url=front.url,
            token=front.token,
            model=rental.model,
            context=rental.context,
            env=os.environ,
            home=Path(settings.claude_home).expanduser() if settings.claude_home else None,
            notice=code.Notice(settings.paths.notice_for_hooks, settings.paths.notice),
        )
        code.execute(launch)
    except SelfhostError as error:
        raise _billed(error, rental) from error


def environment(settings: Settings) -> dict[str, str]:
    """What `claude` sets, for other clients of the same box. Raises like `claude`."""
    from selfhost_cli import attach
    from selfhost_cli import claude as code

    ledger = open_ledger(settings)
    rental = ready(ledger)
    ledger.close()
    try:
        front = attach.ensure(settings)
        return code.environment(front.url, front.token, rental.model, rental.context, os.environ)
    except SelfhostError as error:
        raise _billed(error, rental) from error


def ready(ledger: Ledger) -> Rental:
    """The box to talk to. Raises NotSetUp when there is none, MayBeBilling when one exists that is not ready."""
    from selfhost_cli.model import State

    live = ledger.live()
    for rental in live:
        if rental.state is State.READY:
            return rental
    if not live:
        raise _no_box()
    rental = live[-1]
    ending = rental.state is State.ENDING
    raise MayBeBilling(
        f"{rental} is {rental.state}, not ready, and may be billed",
        "`selfhost down` ends it" + ("." if ending else "; `selfhost up` goes on with it."),
    )


def wait_for_tunnel(
    front: Front,
    ledger: Ledger,
    rental: Rental,
    *,
    seconds: float = TUNNEL_WAIT_S,
    clock: Clock | None = None,
    then: str = "starting claude all the same, it tries again by itself",
) -> None:
    """Return when the keeper says that the tunnel is up, or after `seconds`: the front answers then as well.

    Raises like `ready` when the box is taken down meanwhile.
    """
    from selfhost_cli import wait

    told = False

    def probe() -> bool | wait.Pending:
        nonlocal told
        why = _away(front, rental)
        if not why:
            return True
        if ready(ledger).label != rental.label:
            raise _no_box()
        if not told:
            say(f"selfhost: waiting for the tunnel to {rental}: {why}")
            told = True
        return wait.Pending(why)

    try:
        wait.until(probe, what="the tunnel", seconds=seconds, every=0.25, clock=clock or wait.SYSTEM)
    except wait.TimedOut as error:
        say(f"selfhost: {error.message}; {then}")


def _ends_soon(rental: Rental) -> str:
    """What to say when a cap ends the box within the hour; without the box's own figures, so traffic is not counted."""
    import time

    from selfhost_cli import countdown

    return countdown.warning(rental, countdown.countdowns(rental, None, now=time.time()), within=TOLD_S)


def open_ledger(settings: Settings) -> Ledger:
    """The profile's ledger; where there is none, none is made. Raises NotSetUp."""
    from selfhost_cli.ledger import Ledger

    if _absent(settings.paths.ledger):
        raise _no_box()
    return Ledger(settings.paths.ledger)


def _absent(path: Path) -> bool:
    """Surely not there. A file that cannot be looked at may be there, and opening it tells what is wrong."""
    try:
        path.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def _away(front: Front, rental: Rental) -> str:
    """Why requests do not reach the box, "" when they do."""
    from selfhost_cli import attach

    try:
        known = attach.call(front, "state").get("rentals")
    except SelfhostError as error:
        return error.message
    for entry in known if isinstance(known, list) else []:
        if isinstance(entry, dict) and entry.get("label") == rental.label:
            return "" if entry.get("state") in ("up", "degraded") else str(entry.get("reason") or entry.get("state"))
    return "the keeper does not hold it yet"


def _billed(error: SelfhostError, rental: Rental) -> MayBeBilling:
    """What keeps us from using the box: that it costs money meanwhile is the headline."""
    remedy = f"{error.remedy}\n`selfhost down` ends the box.".lstrip()
    return MayBeBilling(f"{rental} is {rental.state} and billed, but {error.message}", remedy)


def _no_box() -> NotSetUp:
    return NotSetUp("there is no box to run Claude Code on", "Rent one: `selfhost up`.")
