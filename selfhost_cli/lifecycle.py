"""Up and down: the only place where effects are sequenced.

A rental moves through `State`; `STEPS` maps each state to the one step that leads on, so a crash resumes where the
ledger says. The rules that keep people from paying for a lost machine:

- The intent is committed, and the keeper knows of it, before the paid call.
- The paid call is sent once; a lost answer is resolved by looking for the label for longer than a listing can lag.
- Every failure before READY destroys what was made and proves it gone, or says loudly that it may still be billing.
- `down` writes ENDING first; whoever tries to move the rental on after that gets `Superseded` and stops.
"""

from __future__ import annotations

import os
import secrets
import signal
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from selfhost_cli import __version__, config, health, install, offers, payload
from selfhost_cli.attach import Front
from selfhost_cli.config import Settings, Source
from selfhost_cli.errors import (
    AnswerLost,
    KeyRefused,
    MarketError,
    MarketUnreachable,
    MayBeBilling,
    NoCredit,
    NothingToRent,
    NotSetUp,
    OfferGone,
    SelfhostError,
    Superseded,
    UsageError,
)
from selfhost_cli.invoice import Invoice, invoice
from selfhost_cli.ledger import Ledger, LedgerBroken, Usage
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Account, BoxSpec, BoxState, Caps, Endpoint, Event, Instance, Need, Rental, State
from selfhost_cli.providers import Provider
from selfhost_cli.remote import NotYet, Remote
from selfhost_cli.wait import SYSTEM, Clock, Pending, TimedOut, until

Report = Callable[[Event], None]

CREATE_PAUSE_S = 5.0
"""Between two paid calls: the market's own limit is 4.5 s."""
ARM_S = 60.0
TUNNEL_S = 60.0
STOP_UP_S = 30.0
AGAIN_S = 20.0
"""Until a box that is still listed is destroyed once more."""
ANY_INSTALLATION = "selfhost-"
SIMULATED = " (simulated GPU)"
FORGIVEN_S = 14 * 86_400.0


class Keeper(Protocol):
    """The detached process that outlives `up`; see `keeper/`."""

    def start(self) -> Front:
        """Make sure that it runs, and return its front."""
        ...

    def watched(self) -> set[str]:
        """Make it read the ledger now; the labels it watches over."""
        ...

    def tunnel(self, label: str) -> tuple[str, str]:
        """State and reason of a rental's tunnel; the state is "up" when requests get through."""
        ...


@dataclass(frozen=True, kw_only=True)
class Books:
    """What it takes to end a box and prove it: made by a wiring, replaced by tests."""

    settings: Settings
    provider: Provider
    ledger: Ledger
    report: Report
    clock: Clock = SYSTEM

    @property
    def prefix(self) -> str:
        """What the labels of this installation's boxes begin with."""
        return f"{ANY_INSTALLATION}{config.installation_id(self.settings.paths)}-"


@dataclass(frozen=True, kw_only=True)
class World(Books):
    """What it takes to bring one up, too."""

    keeper: Keeper
    connect: Callable[[Endpoint, str, Path], Remote]
    make_key: Callable[[str], tuple[str, str]]
    find_claude: Callable[[], Path]


@dataclass(frozen=True)
class Plan:
    """What `up` is about to do: shown, confirmed and then executed from this one value."""

    choice: offers.Choice
    caps: Caps
    model: str
    engine: str
    context: int
    disk_gb: float
    hours: float
    account: Account
    simulated: bool

    @property
    def best(self) -> offers.Ranked:
        return self.choice.ranked[0]


@dataclass(frozen=True)
class Ended:
    """What `down` found and ended, and what carries another installation's label."""

    invoices: tuple[Invoice, ...]
    unknown: tuple[Instance, ...]
    foreign: tuple[Instance, ...]
    ledger_problem: str = ""


# --- up ---------------------------------------------------------------------------------------------------------


def up(world: World, confirm: Callable[[Plan], bool], *, needs_claude: bool = True) -> Rental:
    """Bring a ready box up: resume or reuse what is already paid for, else rent. Returns the READY rental."""
    lock = ProcessLock(world.settings.paths.up_lock)
    if not lock.acquire():
        raise UsageError(
            f"another `selfhost up` of this profile is running (process {lock.holder()})",
            "Wait for it, or end it and its box with `selfhost down`.",
        )
    with lock:
        # Held from here on, so that a `down` which begins now ends us before it proves that nothing is left.
        if ProcessLock(world.settings.paths.down_lock).holder() is not None:
            raise UsageError("a `selfhost down` of this profile is running", "Run `selfhost up` again when it is done.")
        preflight(world, needs_claude=needs_claude)
        rental = _unfinished(world)
        if rental is None:
            plan = make_plan(world)
            if not confirm(plan):
                raise SelfhostError("nothing was rented")
            return _guarded(world, lambda: _rent(world, plan))
        _check_wishes(world.settings, rental)
        if rental.state is State.READY:
            return _attach(world, rental)
        return _guarded(world, lambda: _advance(world, rental))


def preflight(world: World, *, needs_claude: bool = True) -> None:
    """Everything that can be known to be wrong before money is spent."""
    settings = world.settings
    if settings.engine not in ("llamacpp", "ollama"):
        raise UsageError(f"engine {settings.engine!r} is unknown", "The engines are ollama and llamacpp.")
    if settings.engine == "ollama":
        raise NotSetUp(
            "the engine ollama is not part of this version yet, so nothing can be served on a live GPU box",
            "Try `selfhost demo`: the whole way on this machine, in a sandbox.",
        )
    if not settings.sandbox:
        raise UsageError(
            "llamacpp here is a CPU build: on a rented GPU it would waste your money",
            "The engine for GPU boxes is ollama; llamacpp serves `selfhost demo`.",
        )
    world.ledger.check()
    world.provider.account()
    if needs_claude:
        world.find_claude()
    world.keeper.start()  # finds the local port, too
    world.provider.register_key(login_key(world)[1])


def make_plan(world: World) -> Plan:
    """Ask the market and choose. Raises NothingToRent with the reasons, NoCredit when the account cannot pay."""
    settings = world.settings
    need = Need(
        gpu=settings.gpu,
        gpu_ram_mb=settings.gpu_ram_mb,
        ram_mb=settings.ram_mb,
        reliability=settings.reliability,
        inet_down_mbps=settings.inet_down_mbps,
        disk_gb=settings.disk_gb,
        hours=settings.hours,
        region=settings.region,
        max_price=settings.max_price,
    )
    download = settings.model_bytes + config.IMAGE_GB * 1e9
    found = world.provider.offers(need)
    choice = offers.choose(
        need, found, download_bytes=download, avoid=_failed_before(world), max_spend=settings.max_spend
    )
    if not choice.ranked:
        raise NothingToRent(
            _why_nothing(world, need, download), "Loosen --max-price, --region, --disk or --hours, or try later."
        )
    account = world.provider.account()
    best = choice.ranked[0]
    least = best.offer.dph_total * (best.ready_s / 3600 + 1 / 6)
    if account.credit < least:
        raise NoCredit(
            f"the account has ${account.credit:.2f}; getting ready and ten minutes of work cost ${least:.2f}",
            "Add credit at https://cloud.vast.ai/billing/.",
        )
    caps = Caps(
        lease_s=round(settings.lease * 60),
        idle_s=round(settings.idle * 60),
        max_s=round(settings.hours * 3600),
        max_dollars=settings.max_spend,
    )
    return Plan(
        choice=choice,
        caps=caps,
        model=settings.model,
        engine=settings.engine,
        context=settings.context,
        disk_gb=settings.disk_gb,
        hours=settings.hours,
        account=account,
        simulated=settings.sandbox,
    )


def login_key(world: World) -> tuple[Path, str]:
    """This profile's login key, made at first use: (path of the private half, public line)."""
    path = world.settings.paths.login_key
    public = path.with_suffix(".pub")
    if not (path.exists() and public.exists()):
        private_text, public_text = world.make_key("selfhost")
        for target, text in ((path, private_text), (public, public_text + "\n")):
            draft = target.with_name(target.name + ".new")
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(text)
            draft.replace(target)
    return path, public.read_text().strip()


def _unfinished(world: World) -> Rental | None:
    """The rental to go on with, after those that were to end have been ended."""
    _check_market(world, world.ledger.live())
    for rental in world.ledger.live():
        if rental.state is State.ENDING:
            finish(world, rental)
        elif rental.state is State.READY:
            settle(world, rental)
    live = world.ledger.live()
    known = {rental.label for rental in live}
    unknown = [box for box in world.provider.instances(world.prefix) if box.label not in known]
    if unknown:
        raise MayBeBilling(
            f"box {unknown[0].id} (${unknown[0].dph_total:.2f}/h) carries our label, but the ledger does not know it",
            "End it with `selfhost down`.",
        )
    return live[0] if live else None


def _check_wishes(settings: Settings, rental: Rental) -> None:
    """A flag that asks for something other than what is up is an error, and never silently ignored."""
    caps = rental.caps
    have: dict[str, object] = {"model": rental.model, "engine": rental.engine, "max_spend": caps.max_dollars}
    have |= {"gpu": rental.gpu.removesuffix(SIMULATED), "hours": caps.max_s / 3600, "idle": caps.idle_s / 60}
    for name, value in have.items():
        if settings.sources[name] is Source.FLAG and getattr(settings, name) != value:
            raise UsageError(
                f"{rental} is up already, with {name} {value}; --{name.replace('_', '-')} cannot change that",
                "Leave the option out, or end the box with `selfhost down` first.",
            )


def _failed_before(world: World) -> set[int]:
    """Machines on which a box of ours never got ready, in the last two weeks."""
    since = world.clock.time() - FORGIVEN_S
    ours = ("down", "interrupted")
    return {
        rental.machine_id
        for rental in world.ledger.all()
        if rental.instance_id and rental.ready_at is None and rental.reason not in ours and rental.created_at > since
    }


def _guarded(world: World, work: Callable[[], Rental]) -> Rental:
    """Run a part of `up` that spends money: unless it returns, what it made is destroyed and proven gone."""
    try:
        return work()
    except Superseded:
        raise  # `down` was faster and ends the box itself
    except BaseException as error:
        _clean_up(world, error)
        raise


def _clean_up(world: World, cause: BaseException) -> None:
    """Only called while no box was READY before, so all that carries our prefix is this `up`'s."""
    reason = "interrupted" if isinstance(cause, KeyboardInterrupt) else str(cause)
    rentals: list[Rental] = []
    try:
        try:
            rentals = world.ledger.live()
            for rental in rentals:
                world.ledger.end(rental.label, reason)
            if not rentals:
                return  # nothing was sent, or the market said no
        except LedgerBroken as error:
            world.report(Event("down", "note", f"{error.message}; ending what carries our label"))
        _prove(world, rentals)
    except MayBeBilling as error:
        raise error from cause
    except BaseException as error:
        raise _headline(rentals, (), str(error) or "interrupted again while cleaning up") from cause


def _rent(world: World, plan: Plan) -> Rental:
    """Walk the offers until one is ours and READY."""
    problem: MarketError | None = None
    for turn, ranked in enumerate(plan.choice.ranked[:5]):
        if turn:
            world.clock.sleep(CREATE_PAUSE_S if not world.settings.sandbox else 0.2)
        try:
            rental = _create(world, plan, ranked)
        except OfferGone as error:
            world.report(Event("rent", "note", f"{error.message}; trying the next one"))
            problem = error
            continue
        return _advance(world, rental)
    raise NothingToRent("every offer was gone when we asked for it", "Run `selfhost up` again.") from problem


def _create(world: World, plan: Plan, ranked: offers.Ranked) -> Rental:
    """Intent, keeper, paid call: in this order. Returns the rental in BOOTING."""
    offer, settings = ranked.offer, world.settings
    host_private, host_public = world.make_key("selfhost-bootstrap")
    _, login_public = login_key(world)
    label = f"{world.prefix}{uuid.uuid4()}"
    env = _box_env(settings, plan, ranked)
    spec = BoxSpec(label, settings.image, plan.disk_gb, payload.onstart(host_private, host_public, login_public), env)
    rental = Rental(
        label=label,
        state=State.CREATING,
        created_at=world.clock.time(),
        offer_id=offer.id,
        machine_id=offer.machine_id,
        gpu=f"{offer.gpu}{SIMULATED}" if plan.simulated else offer.gpu,
        place=offer.place,
        dph_base=offer.dph_base,
        dph_total=offer.dph_total,
        storage_dph=offer.storage_dph,
        down_per_gb=offer.down_per_gb,
        up_per_gb=offer.up_per_gb,
        model=plan.model,
        engine=plan.engine,
        context=plan.context,
        caps=plan.caps,
        host_key=host_public,
        box_token=secrets.token_urlsafe(32),
        market=_market(settings, plan.account),
    )
    world.ledger.intend(rental)
    try:
        if label not in world.keeper.watched():
            raise SelfhostError("the keeper does not watch the new rental", "Run `selfhost up` again.")
        world.report(Event("rent", "start", f"renting {rental.gpu} in {offer.place or 'an unknown place'}"))
        rental = world.ledger.note(rental, sent_at=world.clock.time())
    except SelfhostError:
        world.ledger.ended(label, world.clock.time())  # not sent: nothing exists
        raise
    try:
        instance_id = world.provider.create(offer, spec)
    except AnswerLost:
        world.report(Event("rent", "note", "the market's answer was lost; looking for the box by its label"))
        return rental
    except MarketError:
        world.ledger.ended(label, world.clock.time())  # refused: nothing exists
        raise
    world.report(Event("rent", "done", f"box {instance_id}"))
    return world.ledger.advance(rental, State.BOOTING, instance_id=instance_id)


def _box_env(settings: Settings, plan: Plan, ranked: offers.Ranked) -> dict[str, str]:
    """What the box must know before anybody can log in. No secret: the market shows these to the host."""
    offer, caps = ranked.offer, plan.caps
    env = {
        "SELFHOST_MARKET_URL": settings.market_url,
        "SELFHOST_LEASE_S": str(caps.lease_s),
        "SELFHOST_IDLE_S": str(caps.idle_s),
        "SELFHOST_MAX_S": str(caps.max_s),
        "SELFHOST_MAX_DOLLARS": f"{caps.max_dollars:.4f}",
        "SELFHOST_DPH": f"{offer.dph_total:.6f}",
        "SELFHOST_DOWN_PER_GB": f"{offer.down_per_gb:.6f}",
        "SELFHOST_UP_PER_GB": f"{offer.up_per_gb:.6f}",
        "SELFHOST_UNGUARDED": "1" if settings.unguarded else "",
    }
    if settings.model_url:
        env["SELFHOST_FETCH_URL"] = settings.model_url
        env["SELFHOST_FETCH_SHA256"] = settings.model_sha256
    return env


def _advance(world: World, rental: Rental) -> Rental:
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
        world.ledger.ended(rental.label, world.clock.time())
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
        installed = install.apply(remote, _install_spec(world, rental), _until_deadline(world))
        rental = world.ledger.note(rental, proxy_port=installed.proxy_port)
        _check_health(world, rental)
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
    )


def _check_health(world: World, rental: Rental) -> None:
    front = _tunnel(world, rental)
    report = health.check(front, model=rental.model, context=rental.context, report=world.report)
    if failed := report.failed:
        raise SelfhostError(f"health: {failed.name}: {failed.detail}", failed.remedy)


def _attach(world: World, rental: Rental) -> Rental:
    """A box that was READY before: reused, checked, and never destroyed by `up`."""
    world.report(Event("reuse", "done", f"{rental} is already yours"))
    _check_health(world, rental)
    return rental


def _tunnel(world: World, rental: Rental) -> Front:
    front = world.keeper.start()

    def ask() -> Front | Pending:
        state, reason = world.keeper.tunnel(rental.label)
        return front if state == "up" else Pending(f"{state} {reason}".strip())

    world.report(Event("tunnel", "start"))
    until(ask, what="the tunnel", seconds=TUNNEL_S, every=0.2, clock=world.clock)
    world.report(Event("tunnel", "done", front.url))
    return front


def _why_nothing(world: World, need: Need, download: float) -> str:
    """Ask again without the limits, so that they can be named."""
    loose = replace(need, gpu_ram_mb=0, ram_mb=0, reliability=0.0, inet_down_mbps=0.0, hours=0.0, max_price=None)
    choice = offers.choose(need, world.provider.offers(loose), download_bytes=download)
    if not choice.refused:
        return f"the market has no {need.gpu} now"
    reasons = Counter(refusal.why for refusal in choice.refused).most_common(4)
    told = ", ".join(f"{count} × {why}" for why, count in reasons)
    return f"no {need.gpu} within the limits; {len(choice.refused)} offers refused: {told}"


# --- down -------------------------------------------------------------------------------------------------------


def down(books: Books, *, everything: bool = False) -> Ended:
    """End every box of this installation and prove it. Raises MayBeBilling when that cannot be proven.

    Works without a usable ledger, from the labels alone. `everything` also ends boxes of other installations of
    selfhost on this account; nothing else is ever touched.
    """
    with ProcessLock(books.settings.paths.down_lock) as lock:
        lock.acquire()  # a second `down` beside us does no harm: everything here may be done twice
        rentals, broken = _record_ending(books)
        _check_market(books, rentals)
        _stop_up(books)
        if not broken:
            rentals = books.ledger.live()
        unknown = _prove(books, rentals, everything=everything, distrust=broken)
        foreign = () if everything else _others(books)
        return Ended(tuple(_bill(books, rental) for rental in rentals), unknown, foreign, broken)


def finish(books: Books, rental: Rental) -> Invoice:
    """End one rental that is recorded as ENDING: destroy, prove, record. Repeatable, by whoever gets to it."""
    _check_market(books, [rental])
    _prove(books, [books.ledger.get(rental.label) or rental], only=rental.label)
    return _bill(books, rental)


def settle(books: Books, rental: Rental) -> bool:
    """Whether a box has ended by itself (its watchdog, its host): recorded only when the market's list proves it."""
    _check_market(books, [rental])
    if any(box.id == rental.instance_id for box in books.provider.instances(rental.label)):
        return False
    books.ledger.end(rental.label, "the box ended by itself")
    finish(books, rental)
    return True


def _record_ending(books: Books) -> tuple[list[Rental], str]:
    """ENDING for every live rental, and why that could not be written, if so."""
    try:
        rentals = books.ledger.live()
        for rental in rentals:
            books.ledger.end(rental.label, "down")
    except LedgerBroken as error:
        books.report(Event("down", "note", f"{error.message}; asking the market itself"))
        return [], error.message
    return rentals, books.ledger.broken


def _market(settings: Settings, account: Account) -> str:
    return f"{settings.market_url} account {account.id}"


def _check_market(books: Books, rentals: list[Rental]) -> None:
    """Another market or account knows nothing of our boxes, and its silence would prove nothing."""
    if not rentals:
        return
    try:
        here = _market(books.settings, books.provider.account())
    except MarketError as error:
        raise _headline(rentals, (), error.message) from error
    for rental in rentals:
        if rental.market and rental.market != here:
            raise _headline([rental], (), f"it was rented at {rental.market}, and this is {here}")


def _stop_up(books: Books) -> None:
    """End an `up` that is still running."""
    lock = ProcessLock(books.settings.paths.up_lock)
    holder = _sure_holder(lock, books.clock)
    if holder is None or holder == os.getpid():
        return
    books.report(Event("down", "note", f"ending the `selfhost up` that is running (process {holder})"))
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(holder, sign)
            until(
                lambda: Pending("still running") if lock.holder() == holder else True,
                what="the running `selfhost up`",
                seconds=STOP_UP_S,
                every=0.1,
                clock=books.clock,
            )
        except ProcessLookupError:
            return
        except TimedOut:
            continue
        return


def _sure_holder(lock: ProcessLock, clock: Clock) -> int | None:
    """The same process id twice: for a moment a lock's file may still hold the one of an owner that was killed."""
    for _ in range(20):
        first = lock.holder()
        if first is None:
            return None
        clock.sleep(0.05)
        if first and lock.holder() == first:
            return first
    return None


def _prove(
    books: Books, rentals: list[Rental], *, only: str = "", everything: bool = False, distrust: str = ""
) -> tuple[Instance, ...]:
    """Destroy until a complete listing shows none of ours, and return the boxes that the ledger did not know.

    What the listing says decides; a destroy that fails is told and tried again. Absence counts only once the listing
    can no longer lag behind the last possible create: of a rental without an id, of a young one, or, when the ledger
    cannot be trusted, of any. Raises MayBeBilling naming what may be left.
    """
    prefix = only or (ANY_INSTALLATION if everything else books.prefix)
    known = {rental.label for rental in rentals}
    numbers = [rental.instance_id for rental in rentals if rental.instance_id is not None]
    listed: dict[int, Instance] = {}
    asked: dict[int, float] = {}
    problems: dict[int, str] = {}
    lag, began = books.settings.listing_lag, books.clock.monotonic()
    may_appear = bool(distrust) or any(_young(rental, lag, books.clock.time()) for rental in rentals)

    def destroy(number: int) -> None:
        asked[number] = books.clock.monotonic()
        try:
            books.provider.destroy(number)
        except MarketError as error:
            problems[number] = error.message
            asked.pop(number)

    def wait(why: str) -> Pending:
        books.report(Event("down", "progress", why))
        return Pending(why)

    def look() -> bool | Pending:
        nonlocal may_appear
        try:
            boxes = books.provider.instances(prefix)
        except KeyRefused:
            raise
        except MarketError as error:
            if not rentals and not listed and not distrust:
                raise  # nothing speaks for a box of ours; this is about the network
            return wait(error.message)
        for box in boxes:
            listed[box.id] = box
            if books.clock.monotonic() - asked.get(box.id, float("-inf")) > AGAIN_S:
                destroy(box.id)
        if boxes:
            return wait(problems.get(boxes[0].id) or f"the market still lists box {boxes[0].id}")
        if may_appear and books.clock.monotonic() - began < lag:
            return wait(f"a box may still appear in the market's list, for {lag:.0f} s")
        if may_appear and numbers:
            may_appear = False
            for number in numbers:
                destroy(number)  # the first time it may have been too young to be known
            return Pending("asked once more")
        return True

    for rental in rentals:
        if rental.instance_id is not None:
            books.report(Event("down", "start", f"destroying {rental}"))
            destroy(rental.instance_id)

    def strangers() -> tuple[Instance, ...]:
        return tuple(box for box in listed.values() if box.label not in known)

    try:
        until(
            look, what="proof that nothing is left", seconds=lag * 3 + 60, every=books.settings.poll, clock=books.clock
        )
    except (MarketError, TimedOut, KeyboardInterrupt) as error:
        if not rentals and not listed and isinstance(error, MarketError):
            raise  # no sign of a box anywhere: this is about the key or the network
        raise _headline(rentals, strangers(), str(error) or "interrupted") from error
    _record_ended(books, rentals)
    books.report(Event("down", "done", "the market lists none of our boxes"))
    return strangers()


def _young(rental: Rental, lag: float, now: float) -> bool:
    """Whether the listing may not know the box yet."""
    return rental.sent_at is not None and (rental.instance_id is None or now - rental.sent_at < lag)


def _record_ended(books: Books, rentals: list[Rental]) -> None:
    for rental in rentals:
        try:
            books.ledger.ended(rental.label, books.clock.time())
        except LedgerBroken as error:
            books.report(Event("down", "note", f"the box is gone, but {error.message}"))


def _others(books: Books) -> tuple[Instance, ...]:
    ours = books.prefix
    try:
        boxes = books.provider.instances(ANY_INSTALLATION)
    except MarketError as error:
        books.report(Event("down", "note", f"other installations were not looked for: {error.message}"))
        return ()
    return tuple(box for box in boxes if not box.label.startswith(ours))


def _bill(books: Books, rental: Rental) -> Invoice:
    """The invoice; the market's own figures when it has them. Not being able to ask is no reason to fail `down`."""
    usage, charges = Usage(), None
    try:
        rental = books.ledger.get(rental.label) or rental
        usage = books.ledger.usage(rental.label)
        if rental.instance_id is not None:
            charges = books.provider.charges(rental.instance_id, rental.sent_at or rental.created_at)
    except (LedgerBroken, MarketError) as error:
        books.report(Event("down", "note", f"the invoice is an estimate: {error.message}"))
    return invoice(rental, usage, charges, now=books.clock.time())


def _headline(rentals: Sequence[Rental], strangers: Sequence[Instance], why: str) -> MayBeBilling:
    """Money may still flow: what, how much, and the command that ends it."""
    told = [str(rental) for rental in rentals]
    told += [f"box {box.id} ({box.gpu}, ${box.dph_total:.2f}/h)" for box in strangers]
    return MayBeBilling(
        f"{', '.join(told) or 'a box of this installation'} MAY STILL BE BILLING: {why}",
        "Run `selfhost down` until it says that nothing is billed any more, or end it at "
        "https://cloud.vast.ai/instances/.",
    )
