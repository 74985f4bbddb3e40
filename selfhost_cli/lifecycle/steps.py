"""From the paid call to READY: each state's one step, so that a crash resumes where the ledger says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from selfhost_cli import __version__, archive, health, install
from selfhost_cli.archive import Archive
from selfhost_cli.attach import Front
from selfhost_cli.errors import (
    KeyRefused,
    MarketUnreachable,
    NotServable,
    SelfhostError,
)
from selfhost_cli.lifecycle.renting import login_key
from selfhost_cli.lifecycle.world import SIMULATED, Report, World
from selfhost_cli.model import BoxState, Event, Instance, Rental, State
from selfhost_cli.remote import NotYet, Remote
from selfhost_cli.wait import Pending, TimedOut, until

ARM_S = 60.0
TUNNEL_S = 60.0


def advance(world: World, rental: Rental) -> Rental:
    """The state machine: one step after the other until READY."""
    while rental.state is not State.READY:
        rental = STEPS[rental.state](world, rental)
    return rental


def _resolve(world: World, rental: Rental) -> Rental:
    """CREATING: find out whether the paid call worked. A box that exists is adopted."""
    since = world.clock.monotonic()

    def look() -> Instance | Pending | None:
        try:
            found = world.provider.instances(rental.label)
        except MarketUnreachable as error:
            return Pending(error.message)
        if found:
            return found[0]
        lag = world.settings.listing_lag
        # Counted from now: the call may have left at any time until this process took the rental over.
        return None if world.clock.monotonic() - since >= lag else Pending("not in the market's list yet")

    box = None
    if rental.sent_at is not None:
        box = until(look, what="the lost answer", seconds=600, every=world.settings.poll, clock=world.clock)
    if box is None:
        why = "not sent" if rental.sent_at is None else "the answer was lost, and no box came of it"
        world.ledger.ended(rental.label, world.clock.time(), why)
        raise SelfhostError("the market did not rent the box; nothing is billed", "Run `selfhost up` again.")
    return world.ledger.advance(rental, State.BOOTING, instance_id=box.id)


def _boot(world: World, rental: Rental) -> Rental:
    """BOOTING: wait until the box shows the host key that we gave it, and lets us in."""
    assert rental.instance_id is not None
    instance_id, current = rental.instance_id, rental
    login, public = login_key(world)
    attached = False

    def knock() -> Rental | Pending:
        nonlocal attached, current
        box = _look_up(world, current)
        if box is None:
            return Pending("the market does not list the box yet")
        if box.state is BoxState.FAILED:
            raise SelfhostError(
                f"box {instance_id} will not start: {box.status} {box.message}".rstrip(), "Run `selfhost up` again."
            )
        world.report(Event("boot", "progress", f"{box.status} {box.message}".rstrip()))
        if box.state is not BoxState.RUNNING or not box.endpoints:
            return Pending(f"the box is {box.status}")
        if current.running_at is None:
            current = world.ledger.note(current, running_at=world.clock.time())
        if not attached:
            world.provider.attach_key(instance_id, public)
            attached = True
        reasons = []
        for endpoint in box.endpoints:
            try:
                world.connect(endpoint, current.host_key, login).close()
            except NotYet as error:
                reasons.append(error.message)
            else:
                return world.ledger.advance(current, State.INSTALLING, endpoint=endpoint)
        current = world.ledger.note(current)  # raises Superseded once `down` has come
        return Pending("; ".join(reasons))

    world.report(Event("boot", "start", f"box {instance_id}"))
    ready = until(
        knock,
        what=f"ssh to box {instance_id}",
        seconds=world.settings.boot_timeout * 60,
        every=world.settings.poll,
        clock=world.clock,
    )
    world.report(Event("boot", "done", f"ssh at {ready.endpoint}"))
    return ready


def _look_up(world: World, rental: Rental) -> Instance | None:
    """The box as the market shows it now; a market that does not answer is "not yet", it may come back."""
    assert rental.instance_id is not None
    try:
        return world.provider.get(rental.instance_id)
    except KeyRefused:
        raise
    except MarketUnreachable as error:
        world.report(Event("boot", "note", error.message))
        return None


def _install(world: World, rental: Rental) -> Rental:
    """INSTALLING: watchdog armed, engine and proxy up, one real token through the tunnel."""
    assert rental.endpoint is not None
    login, _ = login_key(world)
    remote = until(
        lambda: _connect(world, rental, login), what="ssh", seconds=120, every=world.settings.poll, clock=world.clock
    )
    try:
        _check_armed(world, remote)
        spec = _install_spec(world, rental)
        installed = install.apply(remote, spec, _until_deadline(world))
        _remember(world, spec, installed.archive)
        rental = world.ledger.note(rental, proxy_port=installed.proxy_port)
        check_health(world, rental)
    finally:
        remote.close()
    return world.ledger.advance(rental, State.READY, ready_at=world.clock.time())


STEPS: dict[State, Callable[[World, Rental], Rental]] = {
    State.CREATING: _resolve,
    State.BOOTING: _boot,
    State.INSTALLING: _install,
}


def _until_deadline(world: World) -> Report:
    """The report, which also ends an install that goes on for too long while it keeps talking."""
    deadline = world.clock.monotonic() + world.settings.install_timeout * 60

    def report(event: Event) -> None:
        world.report(event)
        if world.clock.monotonic() > deadline:
            raise TimedOut(
                f"the install: not within {world.settings.install_timeout:g} minutes; "
                f"last seen: {event.stage} {event.text}",
                "Run `selfhost up` for another box.",
            )

    return report


def _connect(world: World, rental: Rental, login: Path) -> Remote | Pending:
    assert rental.endpoint is not None
    try:
        return world.connect(rental.endpoint, rental.host_key, login)
    except NotYet as error:
        return Pending(error.message)


def _check_armed(world: World, remote: Remote) -> None:
    """A box that could not end itself is not worth the risk (money rule 6)."""

    def ask() -> str | Pending:
        answer = install.armed(remote)
        return answer or Pending("the watchdog has not said anything yet")

    world.report(Event("guard", "start", "waiting for the watchdog"))
    try:
        answer = until(ask, what="the box's watchdog", seconds=ARM_S, every=world.settings.poll, clock=world.clock)
    except TimedOut as error:
        answer = error.message
    if answer != "ok" and not world.settings.unguarded:
        raise SelfhostError(
            f"the box cannot end itself: {answer}", "Run `selfhost up` for another one, or pass --unguarded."
        )
    world.report(Event("guard", "done", "armed" if answer == "ok" else f"not armed: {answer}"))


def _install_spec(world: World, rental: Rental) -> install.InstallSpec:
    settings = world.settings
    return install.InstallSpec(
        engine=rental.engine,
        model=rental.model,
        context=rental.context,
        token=rental.box_token,
        version=__version__,
        url=settings.model_url,
        sha256=settings.model_sha256,
        size=settings.model_bytes,
        pip_args=settings.pip_args,
        proxy_requirements=settings.proxy_requirements,
        engine_requirements=settings.engine_requirements,
        ollama_url=settings.ollama_url,
        ollama_version=settings.ollama_version,
        archive=archive.recall(settings.paths.archives, settings.archive_url(), settings.ollama_version),
        registry=settings.registry,
    )


def _remember(world: World, spec: install.InstallSpec, found: Archive | None) -> None:
    """The archive's first sight: what the next box must get, too."""
    if (
        found
        and spec.archive is None
        and (found.url, found.version) == (world.settings.archive_url(), spec.ollama_version)
    ):
        archive.remember(world.settings.paths.archives, found)
        world.report(
            Event(
                "install", "note", f"first sight of Ollama {found.version}: {found.size} bytes, sha256 {found.sha256}"
            )
        )


def check_health(world: World, rental: Rental) -> None:
    front = _tunnel(world, rental)
    gpu = SIMULATED not in rental.gpu
    report = health.check(front, model=rental.model, context=rental.context, gpu=gpu, report=world.report)
    if failed := report.failed:
        wished = failed.name in ("model", "context")  # one that is not on the GPU may be the machine's fault
        raise (NotServable if wished else SelfhostError)(f"health: {failed.name}: {failed.detail}", failed.remedy)


def _tunnel(world: World, rental: Rental) -> Front:
    front = world.keeper.start()

    def ask() -> Front | Pending:
        state, reason = world.keeper.tunnel(rental.label)
        return front if state == "up" else Pending(f"{state} {reason}".strip())

    world.report(Event("tunnel", "start"))
    until(ask, what="the tunnel", seconds=TUNNEL_S, every=0.2, clock=world.clock)
    world.report(Event("tunnel", "done", front.url))
    return front
