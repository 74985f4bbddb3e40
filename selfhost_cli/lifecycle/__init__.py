"""Up and down: the only place where effects are sequenced.

A rental moves through `State`; `steps.STEPS` maps each state to the one step that leads on, so a crash resumes where
the ledger says. The rules that keep people from paying for a lost machine:

- The intent is committed, and the keeper knows of it, before the paid call.
- The paid call is sent once; a lost answer is resolved by looking for the label for longer than a listing can lag.
- Every failure before READY destroys what was made and proves it gone, or says loudly that it may still be billing.
- `down` writes ENDING first; whoever tries to move the rental on after that gets `Superseded` and stops.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from selfhost_cli import fleet
from selfhost_cli.config import Settings, Source
from selfhost_cli.errors import (
    BoxFailed,
    MarketError,
    MayBeBilling,
    NothingToRent,
    NotSetUp,
    OfferGone,
    SelfhostError,
    Superseded,
    TooOften,
    UsageError,
)
from selfhost_cli.fleet import Fleet
from selfhost_cli.ledger import LedgerBroken
from selfhost_cli.lifecycle.ending import check_market, down, finish, headline, lost_ledger, prove, settle
from selfhost_cli.lifecycle.identity import replace_at_last
from selfhost_cli.lifecycle.renting import create, make_plan, preflight
from selfhost_cli.lifecycle.steps import advance, check_health
from selfhost_cli.lifecycle.world import ANY_INSTALLATION, SIMULATED, Books, Ended, Keeper, Plan, Report, World
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Account, Event, Instance, Rental, State
from selfhost_cli.offers import Ranked
from selfhost_cli.wait import Pending, until

PAUSE_S = 5.0
"""Before another machine is rented in the place of one that failed."""
OFFERS = 5
"""Offers to ask for before the market's list is too old."""
SILENCES, SILENCE_S = 3, 120.0
"""So often, and for so long each time, a paid call is held back because the market wants to hear nothing."""


def up(world: World, confirm: Callable[[Plan], bool], *, needs_claude: bool = True) -> Rental:
    """Bring a ready box up: resume or reuse what is already paid for, else rent. Returns the READY rental."""
    return up_all(world, confirm, 1, needs_claude=needs_claude)[0]


def up_all(
    world: World, confirm: Callable[[Plan], bool], boxes: int, most: int = 0, *, needs_claude: bool = True
) -> list[Rental]:
    """Bring so many ready boxes up: resume or reuse what is already paid for, rent what is missing.

    `most`: as many as the keeper may make of them while requests wait; 0 leaves what holds.

    One after the other, so that never more than one is neither ready nor over. Returns the READY ones, oldest first.
    """
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
        if max(boxes, most) > 1:
            _check_spreading(world)
        account = preflight(world, needs_claude=needs_claude)
        live = _unfinished(world, account)
        missing = max(0, boxes - len(live))
        later = max(0, most - max(boxes, len(live)))
        for rental in live:
            _check_wishes(world, rental, alone=len(live) == 1 and not missing + later)
            if missing + later:
                _check_alike(world, rental)
        ready = [_attach(world, rental) for rental in live if rental.state is State.READY]
        for rental in live:
            if rental.state is not State.READY:
                ready.append(_guarded(world, lambda unready=rental: advance(world, unready), spared=ready))  # type: ignore[misc]
        if missing + later:
            plan = make_plan(world, account, missing, later)
            if not confirm(plan):
                raise SelfhostError("nothing was rented")
            if later:
                _remember(world, plan, most)
        if not later and (most or not live):  # a new first box is not to bring back what was meant for the last ones
            fleet.forget(world.settings.paths)
        return [*ready, *_rent_all(world, plan, ready)] if missing else ready


def _remember(world: World, plan: Plan, most: int) -> None:
    """What the keeper may rent later, as it was confirmed now; or before, if this is the keeper's own `up`."""
    share, paths = plan.caps.max_dollars, world.settings.paths
    held = [rental.caps.max_dollars for rental in world.ledger.live()]
    dollars = sum(held) + (plan.boxes + plan.later) * share
    wanted = Fleet(most, share, plan.ceiling, dollars, world.clock.time())
    fleet.remember(paths, wanted.renewed(fleet.recall(paths) if held else None))


def _check_spreading(world: World) -> None:
    if world.pick:
        raise UsageError("--pick is for one box", "Leave it out, or --boxes.")
    if not world.spreads():
        raise NotSetUp(
            "several boxes take vllm-router, which says on which of them a conversation stays; it is not installed",
            "Install it with `pip install 'selfhost-cli[boxes]'`.",
        )


def _check_alike(world: World, rental: Rental) -> None:
    """A conversation may move from one to another: all serve the same."""
    wish = world.settings
    same = (wish.model, wish.engine) == (rental.model, rental.engine)
    if not same or wish.context not in (rental.context, rental.context_asked):
        raise UsageError(
            f"{rental} serves {rental.model} with {rental.context} tokens, and another box would serve {wish.model} "
            f"with {wish.context}",
            "All boxes of a profile serve the same: pass what it serves, or `selfhost down` first.",
        )


def _rent_all(world: World, plan: Plan, ready: list[Rental]) -> list[Rental]:
    """Those of the plan. The later ones are chosen anew, within what was confirmed."""
    made: list[Rental] = []
    for number in range(plan.boxes):
        if number:
            world.report(Event("rent", "note", f"box {number} of {plan.boxes} serves; the next one"))
            found = make_plan(replace(world, settings=_rest(world, plan)))
            plan = replace(found, ceiling=plan.ceiling, caps=plan.caps, boxes=plan.boxes)
        made.append(_rent(world, plan, [*ready, *made]))
    return made


def _rest(world: World, plan: Plan) -> Settings:
    """What is left of the cap for the sum: the next one's share of it was confirmed."""
    held = sum(rental.caps.max_dollars for rental in world.ledger.live())
    return replace(world.settings, max_spend=held + plan.caps.max_dollars)


def _unfinished(world: World, account: Account) -> list[Rental]:
    """The rentals to go on with, after those that were to end have been ended."""
    lost, began = lost_ledger(world), world.clock.monotonic()
    check_market(world, world.ledger.live(), account)
    for rental in world.ledger.live():
        if rental.state is State.ENDING:
            finish(world, rental, account)
    live = world.ledger.live()
    known = {rental.label for rental in live}
    numbers = [rental.instance_id for rental in live if rental.instance_id is not None]
    listed: list[Instance] = []
    others: list[Instance] = []

    def look() -> list[Instance] | Pending:
        nonlocal listed, others
        listed = world.provider.instances(ANY_INSTALLATION, numbers)
        rest = [box for box in listed if box.label not in known and box.id not in numbers]
        others = [box for box in rest if not box.label.startswith(world.prefix)]
        unknown = [box for box in rest if box not in others]
        if unknown or not lost or world.clock.monotonic() - began >= world.settings.listing_lag:
            return unknown
        return Pending("the ledger is new, and a box of an older one may still appear in the market's list")

    every, limit = world.settings.poll, world.settings.listing_lag + 60
    unknown = until(look, what="the market's list", seconds=limit, every=every, clock=world.clock)
    if unknown:
        raise MayBeBilling(
            f"box {unknown[0].id} (${unknown[0].dph_total:.2f}/h) carries our label, but the ledger does not know it",
            "End it with `selfhost down`.",
        )
    for box in others:
        said = f"box {box.id} (${box.dph_total:.2f}/h) of another installation of selfhost runs on this account, too"
        world.report(Event("plan", "note", said))
    world.ledger.vouch()
    for rental in live:
        if rental.state is State.READY:
            settle(world, rental, account, listed)
    return world.ledger.live()


def _check_wishes(world: World, rental: Rental, *, alone: bool = True) -> None:
    """A flag that asks for something other than what is up is an error, and never silently ignored.

    Not `alone`: the cap in dollars is for the sum.
    """
    wish, caps, port = world.settings, rental.caps, world.keeper.start().port
    if world.pick and world.pick.machine_id != rental.machine_id:
        raise UsageError(
            f"{rental} is up already, and it is not {world.pick}", "Leave --pick out, or `selfhost down` first."
        )
    fulfilled = {
        "gpu": (wish.gpu == rental.gpu.removesuffix(SIMULATED), rental.gpu),
        "region": (wish.region.lower() in rental.place.lower(), f"in {rental.place or 'an unknown place'}"),
        "max_price": (wish.max_price is None or rental.dph_total <= wish.max_price, f"${rental.dph_total:.3f}/h"),
        "model": (wish.model == rental.model, rental.model),
        "context": (wish.context in (rental.context, rental.context_asked), f"{rental.context} tokens"),
        "slots": (wish.slots == rental.slots, f"{rental.slots} slots"),
        "kv_cache_type": (wish.kv_cache_type == rental.kv_cache_type, f"KV {rental.kv_cache_type}"),
        "small_context": (True, ""),
        "engine": (wish.engine == rental.engine, rental.engine),
        "disk": (wish.disk == rental.disk_gb, f"{rental.disk_gb or '?'} GB of disk"),
        "hours": (round(wish.hours * 3600) == caps.max_s, f"{caps.max_s / 3600:g} h"),
        "max_spend": (not alone or wish.max_spend == caps.max_dollars, f"${caps.max_dollars:g}"),
        "idle": (round(wish.idle * 60) == caps.idle_s, f"{caps.idle_s / 60:g} minutes"),
        "port": (wish.port == port, f"port {port}"),
        "attempts": (True, ""),
        # Whether its watchdog is armed is asked while it gets ready.
        "unguarded": (rental.state is not State.READY, "the watchdog that it has"),
    }
    for name, (holds, what) in fulfilled.items():
        if wish.sources[name] is Source.FLAG and not holds:
            option = f"--{name.replace('_', '-')}"
            if name in ("hours", "max_spend", "idle"):
                remedy = f"Move it with `selfhost extend {option} {getattr(wish, name):g}`, or leave {option} out."
            else:
                remedy = f"Leave {option} out, or end the box with `selfhost down` first."
            raise UsageError(f"{rental} is up already; {option} cannot change what it has: {what}", remedy)


def _guarded(world: World, work: Callable[[], Rental], spared: Sequence[Rental]) -> Rental:
    """Run a part of `up` that spends money: unless it returns, what it made is destroyed and proven gone.

    `spared`: boxes that are READY, and go on.
    """
    try:
        return work()
    except Superseded:
        raise  # `down` was faster and ends the box itself
    except BaseException as error:
        _clean_up(world, error, {rental.label for rental in spared})
        raise


def _clean_up(world: World, cause: BaseException, spared: Collection[str]) -> None:
    """What is not `spared` was never READY. Another laptop may share our settings, and so our prefix."""
    reason = "interrupted" if isinstance(cause, KeyboardInterrupt) else str(cause)
    rentals: list[Rental] = []
    distrust = False
    try:
        try:
            rentals = [rental for rental in world.ledger.live() if rental.label not in spared]
            for rental in rentals:
                world.ledger.end(rental.label, reason, blameless=not isinstance(cause, BoxFailed))
            if not rentals:
                return  # nothing was sent, or the market said no
        except LedgerBroken as error:
            world.report(Event("down", "note", f"{error.message}; ending what carries our label"))
            distrust = True
        these = {rental.label for rental in rentals} if spared and not distrust else None
        only = rentals[0].label if len(rentals) == 1 and these is None else ""
        prove(world, rentals, only=only, distrust=distrust, these=these)
    except MayBeBilling as error:
        raise error from cause
    except BaseException as error:
        raise headline(rentals, (), str(error) or "interrupted again while cleaning up") from cause


def _rent(world: World, plan: Plan, spared: Sequence[Rental]) -> Rental:
    """One machine after the other until one is READY. What failed is destroyed, and proven gone, before the next."""
    left = plan.attempts
    while True:
        try:
            return _guarded(world, lambda wanted=plan: advance(world, _take(world, wanted)), spared)  # type: ignore[misc]
        except BoxFailed as error:
            left -= 1
            if not left:
                raise
            world.report(Event("rent", "note", f"{error.message}; it is destroyed, and another machine is tried"))
            world.clock.sleep(PAUSE_S)
            plan = _again(world, plan, error, spared)


def _again(world: World, confirmed: Plan, cause: BoxFailed, spared: Sequence[Rental]) -> Plan:
    """What the market has now, within what was confirmed. Raises NothingToRent, with what the last machine did."""
    labels = {rental.label for rental in spared}
    if left := [box for box in world.provider.instances(world.prefix) if box.label not in labels]:
        raise headline([], left, "it is listed again after it was proven gone") from cause
    try:
        plan = make_plan(replace(world, settings=_rest(world, confirmed)) if spared else world)
    except NothingToRent as error:
        raise NothingToRent(f"{error.message}; before that: {cause.message}", error.remedy) from cause
    return replace(plan, ceiling=confirmed.ceiling, caps=confirmed.caps, boxes=confirmed.boxes)


def _take(world: World, plan: Plan) -> Rental:
    """Walk the offers until one is ours."""
    problem: MarketError | None = None
    affordable = [ranked for ranked in plan.choice.ranked if ranked.offer.dph_total <= plan.ceiling]
    for ranked in affordable[:OFFERS]:
        try:
            return _create(world, plan, ranked)
        except OfferGone as error:
            world.report(Event("rent", "note", f"{error.message}; trying the next one"))
            problem = error
    if not affordable:
        raise NothingToRent(
            f"the cheapest machine is ${plan.best.offer.dph_total:.3f}/h by now, more than the ${plan.ceiling:.3f}/h "
            "that the confirmed plan allows",
            "Run `selfhost up` again and look at its plan.",
        )
    raise NothingToRent("every offer was gone when we asked for it", "Run `selfhost up` again.") from problem


def _create(world: World, plan: Plan, ranked: Ranked) -> Rental:
    """The paid call. A market that only wants silence made nothing: after it another one, with an intent of its own."""
    for _ in range(SILENCES):
        try:
            return create(world, plan, ranked)
        except TooOften as error:
            if error.seconds > SILENCE_S:
                raise
            world.report(Event("rent", "note", f"{error.message}; waiting"))
            world.clock.sleep(error.seconds)
    return create(world, plan, ranked)


def _attach(world: World, rental: Rental) -> Rental:
    """A box that was READY before: reused, checked, and never destroyed by `up`."""
    world.report(Event("reuse", "done", f"{rental} is already yours"))
    rental = replace_at_last(world, rental)
    return check_health(world, rental)


__all__ = [
    "SIMULATED",
    "Books",
    "Ended",
    "Keeper",
    "Plan",
    "Report",
    "World",
    "down",
    "finish",
    "preflight",
    "settle",
    "up",
    "up_all",
]
