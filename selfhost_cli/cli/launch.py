"""The way to Claude Code: find the box and the keeper, wait for the tunnel, become `claude`.

On the short way of `selfhost claude`: nothing here imports Typer, or what speaks to a market, a box or an event loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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

    from selfhost_cli import attach, backends, config, old_variables
    from selfhost_cli import claude as code

    settings = config.load(profile)
    if (chain := backends.chain(settings.paths)) != (backends.VAST,):
        _on_backends(settings, chain, args)
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


def _on_backends(settings: Settings, chain: Sequence[str], args: Sequence[str]) -> NoReturn:
    """Become Claude Code on what `selfhost use` chose."""
    from pathlib import Path

    from selfhost_cli import claude as code

    binary = code.find(settings.claude, os.environ)
    if warning := code.seen_version(binary, settings.paths.state).warning:
        say(f"selfhost: {warning}")
    front, model, context = _chosen(settings, chain)
    launch = code.launch(
        binary,
        args,
        url=front.url,
        token=front.token,
        model=model,
        context=context,
        env=os.environ,
        home=Path(settings.claude_home).expanduser() if settings.claude_home else None,
        notice=code.Notice(settings.paths.notice_for_hooks, settings.paths.notice),
    )
    code.execute(launch)


def _chosen(settings: Settings, chain: Sequence[str]) -> tuple[Front, str, int]:
    """The front, the model's name as Claude Code may hear it, and the smallest context of all that may serve."""
    from selfhost_cli import attach, backends
    from selfhost_cli.backends import keys

    serving = [backends.get(settings.paths, name) for name in chain]
    held = {one.name: keys.read(settings.paths, one.name, one.key, os.environ) for one in serving if one.key}
    front = attach.ensure(settings)
    attach.call(front, "use", {"keys": held})
    contexts = [count for count in attach.call(front, "contexts").values() if isinstance(count, int)]
    rented = _rented(settings) if backends.VAST in chain else None
    if rented:
        contexts.append(rented.context)
    if not contexts:
        raise _no_box()
    model = serving[0].model or (rented.model if rented else serving[-1].model)
    # Claude Code takes such a name for one that it knows, and would count on another context.
    return front, f"{chain[0]}-{model}" if model.startswith("claude") else model, min(contexts)


@dataclass(frozen=True)
class Serving:
    """Who answers now: the front's address, the model, how many requests at once, and what that costs.

    `boxes`: what is rented, none when something else was chosen. `price`: dollars for new, reused and written tokens
    there.
    """

    front: Front
    model: str
    slots: int
    boxes: Sequence[Rental]
    price: Callable[[int, int, int], float]


def serving(settings: Settings, *, then: str) -> Serving:
    """For commands that ask by themselves; waits for the tunnel like `claude`, and raises like it."""
    from selfhost_cli import attach, backends

    chain = backends.chain(settings.paths)
    if chain != (backends.VAST,):
        front, model, _ = _chosen(settings, chain)
        first = backends.get(settings.paths, chain[0])
        rented = _all_rented(settings) if first.kind is backends.Kind.VAST else []
        return Serving(front, model, _slots(rented) or first.slots, rented, first.price)
    ledger = open_ledger(settings)
    try:
        rental = ready(ledger)
        front = attach.ensure(settings)
        wait_for_tunnel(front, ledger, rental, then=then)
    finally:
        ledger.close()
    rented = _all_rented(settings)
    return Serving(front, rental.model, _slots(rented), rented, lambda new, cached, out: 0.0)


def _slots(rentals: Iterable[Rental]) -> int:
    return sum(rental.slots for rental in rentals)


def _rented(settings: Settings) -> Rental | None:
    return next(iter(_all_rented(settings)), None)


def _all_rented(settings: Settings) -> list[Rental]:
    """The boxes that are ready."""
    from selfhost_cli.model import State

    if _absent(settings.paths.ledger):
        return []
    ledger = open_ledger(settings)
    try:
        return [rental for rental in ledger.live() if rental.state is State.READY]
    finally:
        ledger.close()


def environment(settings: Settings) -> dict[str, str]:
    """What `claude` sets, for other clients of the same box. Raises like `claude`."""
    from selfhost_cli import attach, backends
    from selfhost_cli import claude as code

    if (chain := backends.chain(settings.paths)) != (backends.VAST,):
        front, model, context = _chosen(settings, chain)
        return code.environment(front.url, front.token, model, context, os.environ)
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
