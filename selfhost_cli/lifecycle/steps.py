"""From the paid call to READY: each state's one step, so that a crash resumes where the ledger says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from selfhost_cli import __version__, archive, claude, health, install
from selfhost_cli.archive import Archive
from selfhost_cli.attach import Front
from selfhost_cli.errors import (
    BoxFailed,
    KeyRefused,
    MarketError,
    MarketUnreachable,
    NotServable,
    SelfhostError,
)
from selfhost_cli.lifecycle.identity import replace_bootstrap
from selfhost_cli.lifecycle.renting import ceiling, login_key
from selfhost_cli.lifecycle.stages import Stages
from selfhost_cli.lifecycle.world import SIMULATED, World
from selfhost_cli.model import BoxState, Endpoint, Event, Instance, Rental, State
from selfhost_cli.remote import ConnectionLost, NotYet, OtherKey, Remote
from selfhost_cli.wait import Pending, TimedOut, until

ARM_S = 60.0
KNOCK_S = 0.5
"""Between two knocks at a box, which is no question to the market: that one is asked every `poll` seconds."""
TUNNEL_S = 60.0
LOSSES = 3
"""So often the connection may break during the install; the box goes on with it meanwhile."""


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
    current, attached = rental, None
    login, public = login_key(world)
    stages = Stages(world.settings, world.clock)
    box: Instance | Pending | None = None
    ask_at = world.clock.monotonic()

    def knock() -> Rental | Pending:
        nonlocal attached, current, box, ask_at
        if world.clock.monotonic() >= ask_at:
            try:
                box = _look_up(world, current)
            except MarketUnreachable as error:
                box = Pending(error.message)
            ask_at = world.clock.monotonic() + world.settings.poll
        if isinstance(box, Pending):
            stages.skip()
            return box
        seen = f"{box.status} {box.message}".rstrip() if box else "the market does not list the box yet"
        if box is None or not (box.state is BoxState.RUNNING and box.endpoints):
            loading = box is not None and box.status == "loading"
            if box and attached is None:
                attached = _attach(world, box.id, public)
            stages.enter("loading" if loading else "created", seen, began=None if loading else current.sent_at)
            return Pending(seen)
        if current.running_at is None:
            current = world.ledger.note(current, running_at=world.clock.time(), **_price(world, current, box))
        if not attached:
            _attach(world, box.id, public)
            attached = True
        found = _knock(world, current, box.endpoints, login)
        if found.met:
            found.met[1].close()
            return world.ledger.advance(current, State.INSTALLING, endpoint=found.met[0])
        # Another host key too: the image's own sshd may be up before onstart has brought ours.
        stages.enter("ssh", found.why, began=current.running_at)
        current = world.ledger.note(current)  # raises Superseded once `down` has come
        return Pending(found.why)

    world.report(Event("boot", "start", f"box {rental.instance_id}"))
    ready = until(
        knock,
        what=f"ssh to box {rental.instance_id}",
        seconds=world.settings.ready_timeout * 60,
        every=min(KNOCK_S, world.settings.poll),
        clock=world.clock,
    )
    world.report(Event("boot", "done", f"ssh at {ready.endpoint}"))
    return ready


def _attach(world: World, instance_id: int, public: str) -> bool:
    """Put our login key on the box while it boots. It has been on the account since before, and onstart brings it."""
    try:
        world.provider.attach_key(instance_id, public)
        return True
    except KeyRefused:
        raise
    except MarketError as error:
        world.report(Event("boot", "note", error.message))
        return False


def _price(world: World, rental: Rental, box: Instance) -> dict[str, float]:
    """What the box costs by the market's own word, where that is not what the offer said.

    Raises BoxFailed when it is more than was confirmed: an offer may have become dearer while it was looked at. It may
    be the substitute of one that was cheaper, and what that one may have cost at most is what was agreed to.
    """
    more = box.dph_total - rental.dph_total
    if abs(more) < 0.0005 or not box.dph_total:
        return {}
    said = f"box {box.id} costs ${box.dph_total:.3f}/h, and its offer said ${rental.dph_total:.3f}/h"
    if box.dph_total > (rental.ceiling or ceiling(world.settings, rental.dph_total)):
        raise BoxFailed(said, "Run `selfhost up` again and look at its plan.")
    world.report(Event("boot", "note", said))
    return {"dph_total": box.dph_total, "dph_base": rental.dph_base + more}


def _look_up(world: World, rental: Rental) -> Instance | None:
    """The box as the market shows it now, None when it is not listed yet.

    Raises BoxFailed when the market says that it will not start, MarketUnreachable when it says nothing.
    """
    assert rental.instance_id is not None
    try:
        box = world.provider.get(rental.instance_id)
    except KeyRefused:
        raise
    except MarketUnreachable as error:
        world.report(Event("boot", "note", error.message))
        raise
    if box is None:
        return None
    said = f"{box.status} {box.message}".rstrip()
    if box.state is BoxState.IMAGELESS:
        why = f"box {box.id} cannot have the image {world.settings.image}: {said}"
        raise NotServable(why, "Set `image` to one that can be pulled.")
    if box.state is BoxState.FAILED:
        raise BoxFailed(f"box {box.id} will not start: {said}", "Run `selfhost up` again.")
    world.report(Event("boot", "progress", said))
    return box


@dataclass(frozen=True)
class _Found:
    """Who answered: the first endpoint that let us in, and a connection there; or why none did.

    `strangers`: of those reasons the ones of who showed another host key.
    """

    met: tuple[Endpoint, Remote] | None
    why: str = ""
    strangers: str = ""


def _knock(world: World, rental: Rental, endpoints: tuple[Endpoint, ...], login: Path) -> _Found:
    reasons, strangers = [], []
    for endpoint in dict.fromkeys(endpoints):
        try:
            return _Found((endpoint, world.connect(endpoint, rental.host_keys, login)))
        except NotYet as error:
            reasons.append(error.message)
            if isinstance(error, OtherKey):
                strangers.append(error.message)
    return _Found(None, "; ".join(reasons), "; ".join(strangers))


def _know_again(world: World, rental: Rental, login: Path, box: Instance | None) -> _Found:
    """Who answers where the market says that the box runs now: what showed another key may have got its old address.

    Raises BoxFailed when another key is shown there, too, and the box is nowhere else: its key has changed.
    """
    if box is None or box.state is not BoxState.RUNNING:
        return _Found(None)
    found = _knock(world, rental, box.endpoints, login)
    if found.strangers:
        kept = rental.state is State.READY
        raise BoxFailed(
            f"the host key of box {box.id} has changed: {found.strangers}",
            "End it with `selfhost down`." if kept else "Run `selfhost up` again.",
        )
    return found


def _install(world: World, rental: Rental) -> Rental:
    """INSTALLING: a host key of its own, watchdog armed, engine and proxy up, one real token through the tunnel."""
    stages = Stages(world.settings, world.clock)
    spec = _install_spec(world, rental)

    def observe(event: Event) -> None:
        world.report(event)
        stages.observe(event)

    for left in reversed(range(LOSSES + 1)):
        rental, remote = _reach(world, rental, stages)
        try:
            if rental.bootstrap:
                rental, remote = replace_bootstrap(world, rental, remote)
            guarded = _check_armed(world, remote)
            installed = install.apply(remote, spec, observe)
            _settle(world, rental, remote)
            rental = _tell_price(world, rental, remote)
            break
        except ConnectionLost as error:
            if not left:
                raise BoxFailed(f"{error.message}, and {LOSSES} times before", error.remedy) from error
            world.report(Event("install", "note", f"{error.message}; connecting again"))
        finally:
            remote.close()
    _remember(world, spec, installed.archive)
    rental = world.ledger.note(rental, proxy_port=installed.proxy_port, guarded=guarded)
    rental = check_health(world, rental)
    return world.ledger.advance(rental, State.READY, ready_at=world.clock.time())


def _reach(world: World, rental: Rental, stages: Stages) -> tuple[Rental, Remote]:
    """A connection to a box that had let us in: where it was then, or where the market says that it is now.

    Raises BoxFailed once the market has not known the box for as long as its word may lag behind.
    """
    login, _ = login_key(world)
    rental = world.ledger.note(rental)  # what was noted before the connection broke: the host keys
    assert rental.endpoint is not None
    endpoints: tuple[Endpoint, ...] = (rental.endpoint,)

    unknown_since: float | None = None

    def ask() -> tuple[Endpoint, Remote] | Pending:
        nonlocal endpoints, unknown_since
        found = _knock(world, rental, endpoints, login)
        if found.met:
            return found.met
        world.ledger.note(rental)  # raises Superseded once `down` has come
        try:
            box = _look_up(world, rental)
        except MarketUnreachable:
            stages.skip()  # it may be our own network that is away
            return Pending(found.why)
        stages.enter("ssh", found.why)
        now = world.clock.monotonic()
        unknown_since = None if box else (now if unknown_since is None else unknown_since)
        if unknown_since is not None and now - unknown_since > world.settings.listing_lag:
            raise BoxFailed(f"the market does not know {rental} any more", "Run `selfhost up` for another one.")
        endpoints = (box and box.endpoints) or endpoints
        again = _know_again(world, rental, login, box) if found.strangers else found
        return again.met or Pending(found.why)

    seconds = world.settings.ready_timeout * 60
    endpoint, remote = until(ask, what="ssh", seconds=seconds, every=world.settings.poll, clock=world.clock)
    return (rental if endpoint == rental.endpoint else world.ledger.note(rental, endpoint=endpoint)), remote


STEPS: dict[State, Callable[[World, Rental], Rental]] = {
    State.CREATING: _resolve,
    State.BOOTING: _boot,
    State.INSTALLING: _install,
}


def _check_armed(world: World, remote: Remote) -> bool:
    """Whether its watchdog is. A box that could not end itself is not worth the risk (money rule 6)."""

    def ask() -> str | Pending:
        answer = install.armed(remote)
        return answer or Pending("the watchdog has not said anything yet")

    world.report(Event("guard", "start", "waiting for the watchdog"))
    try:
        answer = until(ask, what="the box's watchdog", seconds=ARM_S, every=KNOCK_S / 2, clock=world.clock)
    except TimedOut as error:
        answer = error.message
    if answer != "ok" and not world.settings.unguarded:
        raise BoxFailed(
            f"the box cannot end itself: {answer}", "Run `selfhost up` for another one, or pass --unguarded."
        )
    if answer == "ok":
        world.report(Event("guard", "done", "armed"))
    else:
        world.report(Event("guard", "note", f"not armed ({answer}): this box does NOT end by itself"))
    return answer == "ok"


def _settle(world: World, rental: Rental, remote: Remote) -> None:
    """Until the model is loaded as it stays: in a card with too little room the launcher tries less, and less again.

    Raises BoxFailed when that takes longer than a load may.
    """

    def ask() -> bool | Pending:
        if install.settled(remote):
            return True
        world.ledger.note(rental)  # raises Superseded once `down` has come
        return Pending("the engine tries how much context fits into the card")

    seconds = world.settings.load_timeout * 60
    try:
        until(ask, what="the engine", seconds=seconds, every=KNOCK_S, clock=world.clock)
    except TimedOut as error:
        raise BoxFailed(error.message, error.remedy) from error


def _tell_price(world: World, rental: Rental, remote: Remote) -> Rental:
    """Its watchdog counts dollars with the offer's price: told what the box really costs, where that is another.

    Raises BoxFailed when it does not take that: its cap would be in other dollars than the bill.
    """
    if rental.dph_told == rental.dph_total:
        return rental
    result = remote.run(f"{install.LIMITS} DPH={rental.dph_total:.6f}")
    if result.code:
        why = result.err.strip() or f"status {result.code}"
        if not world.settings.unguarded:
            raise BoxFailed(f"the box does not count with its price: {why}", "Run `selfhost up` for another one.")
        world.report(Event("guard", "note", f"the box counts with another price than it costs: {why}"))
        return rental
    return world.ledger.note(rental, dph_told=rental.dph_total)


def _install_spec(world: World, rental: Rental) -> install.InstallSpec:
    settings = world.settings
    return install.InstallSpec(
        engine=rental.engine,
        model=rental.model,
        context=rental.context,
        slots=rental.slots,
        kv_cache_type=rental.kv_cache_type,
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


def check_health(world: World, rental: Rental) -> Rental:
    """Raises NotServable or BoxFailed when it is not healthy. The rental, with the context that it really has."""
    front = _tunnel(world, rental)
    world.keeper.prewarm(rental)
    report = health.check(
        front,
        model=rental.model,
        context=rental.context,
        gpu=SIMULATED not in rental.gpu,
        least=_least_context(world, rental),
        report=world.report,
        token_s=world.settings.token_timeout * 60,
    )
    if failed := report.failed:
        wished = failed.name in ("model", "context")  # one that is not on the GPU may be the machine's fault
        stands = rental.state is State.READY  # else it is destroyed before anybody reads this
        remedy = failed.remedy if stands else health.ONCE_GONE.get(failed.name, health.AGAIN)
        raise (NotServable if wished else BoxFailed)(f"health: {failed.name}: {failed.detail}", remedy)
    if report.context is not None and report.context < rental.context:
        said = f"the card has room for a context of {report.context} tokens, not {rental.context}; Claude Code is told"
        world.report(Event("health", "note", said))
        asked = rental.context_asked or rental.context
        rental = world.ledger.note(rental, context=report.context, context_asked=asked)
    return world.ledger.note(rental, changing=False) if rental.changing else rental


def _least_context(world: World, rental: Rental) -> int:
    """What may be left of it when it does not fit into the card: what one can work with, or half of what was forced."""
    return min(rental.context, rental.context // 2 if world.settings.small_context else claude.least_context())


def _tunnel(world: World, rental: Rental) -> Front:
    """The keeper's front, once requests get through. Raises BoxFailed when they do not in time."""
    front, told = world.keeper.start(), {""}

    def ask() -> Front | Pending:
        state, reason = world.keeper.tunnel(rental.label)
        if state == "up":
            return front
        if reason not in told:  # the keeper would wait for the box to come back, which one with another key never does
            told.add(reason)
            _refuse_another_key(world, rental)
        return Pending(f"{state} {reason}".strip())

    world.report(Event("tunnel", "start"))
    try:
        until(ask, what="the tunnel", seconds=TUNNEL_S, every=0.2, clock=world.clock)
    except TimedOut as error:
        raise BoxFailed(error.message, error.remedy) from error
    world.report(Event("tunnel", "done", front.url))
    return front


def _refuse_another_key(world: World, rental: Rental) -> None:
    """Raises BoxFailed when the box shows another host key than it had."""
    login, _ = login_key(world)
    try:
        box = world.provider.get(rental.instance_id or 0)
    except MarketError:
        return
    if met := _know_again(world, rental, login, box).met:
        met[1].close()


def change_model(world: World, rental: Rental, wanted: Rental) -> Rental:
    """Bring a ready box to `wanted`'s model and context, by the same script as at first. Raises like `advance`."""
    rental = world.ledger.note(rental, changing=True)
    world.keeper.watched()  # reads that now: until it is over, nobody's answers are taken for the new model's
    rental, remote = _reach(world, rental, Stages(world.settings, world.clock))
    try:
        install.apply(remote, _install_spec(world, wanted), world.report)
        _settle(world, rental, remote)
    finally:
        remote.close()
    asked = {"context": wanted.context, "context_asked": wanted.context_asked}
    return check_health(world, world.ledger.note(rental, model=wanted.model, **asked))
