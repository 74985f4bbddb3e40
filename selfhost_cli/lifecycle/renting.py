"""Before and including the paid call: what could be wrong, what to rent, and the call itself."""

from __future__ import annotations

import os
import secrets
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfhost_cli import archive, claude, config, offers, payload
from selfhost_cli.config import Settings, Source
from selfhost_cli.errors import (
    AnswerLost,
    NoCredit,
    NothingToRent,
    NotSetUp,
    OfferGone,
    SelfhostError,
    UsageError,
)
from selfhost_cli.lifecycle import picking
from selfhost_cli.lifecycle.world import SIMULATED, Plan, World, market_of
from selfhost_cli.model import Account, BoxSpec, Caps, Event, Need, Offer, Rental, State
from selfhost_cli.models import catalogue, planner
from selfhost_cli.models.planner import Fit, Model, Shape

FORGIVEN_S = 14 * 86_400.0
"""How long a machine is not rented again that failed us."""
OURS = ("down", "interrupted", "reap", "its `selfhost up` is gone")
"""Ends of boxes that their machines had no part in."""
MIB = 2**20
LEAST_SHARE = 0.1
"""Dollars: for less a box is over before it was of use."""
SUBSTITUTE = 1.25
"""What another machine may cost, as a multiple of the confirmed one's $/h, unless --max-price said what may be paid."""


@dataclass(frozen=True)
class Search:
    """What was asked for, and what the market has of it."""

    need: Need
    model: str
    download: offers.Download
    choice: offers.Choice
    simulated: bool
    shape: Shape
    least_context: int
    counted: Model | None = None
    """The model, when its memory can be counted: `need` is a card that has room for it."""

    @property
    def needed_mb(self) -> int:
        """MiB of a card that the model takes in this shape; 0 when that is not known."""
        return _needed_mb(self.counted, self.shape) if self.counted else 0


def preflight(world: World, *, needs_claude: bool = True) -> Account:
    """Everything that can be known to be wrong before money is spent; who pays."""
    settings = world.settings
    if settings.engine not in ("llamacpp", "ollama"):
        raise UsageError(f"engine {settings.engine!r} is unknown", "The engines are ollama and llamacpp.")
    if settings.engine == "llamacpp" and not settings.sandbox:
        raise UsageError(
            "llamacpp here is a CPU build: on a rented GPU it would waste your money",
            "The engine for GPU boxes is ollama; llamacpp serves `selfhost demo`.",
        )
    archive.recall(settings.paths.archives, settings.archive_url(), settings.ollama_version)
    world.ledger.check()
    account = world.provider.account()
    if needs_claude:
        world.find_claude()
    world.keeper.start()  # finds the local port, too
    world.provider.register_key(login_key(world)[1])
    return account


def search(world: World, *, everything: bool = False) -> Search:
    """Ask the market and choose. With `everything`, or when nothing fits, also for what it leaves out by itself."""
    settings = world.settings
    model_bytes = _model_bytes(world)
    engine_bytes = config.OLLAMA_GB * 1e9
    shape = Shape(settings.context, settings.slots, settings.kv_cache_type)
    counted = _counted(world, shape)
    need = Need(
        gpu=settings.gpu,
        gpu_ram_mb=_least_memory(settings, counted, shape),
        ram_mb=settings.ram_mb,
        reliability=settings.reliability,
        inet_down_mbps=settings.inet_down_mbps,
        disk_gb=settings.disk_gb(model_bytes),
        hours=settings.hours,
        region=settings.region,
        max_price=settings.max_price,
    )
    download = offers.Download(config.IMAGE_GB * 1e9, model_bytes + engine_bytes)
    choice = _choose(world, need, download, world.provider.offers(need))
    if everything or not choice.ranked:
        choice = replace(choice, refused=_refused(world, need, download, choice))
    return Search(need, settings.model, download, choice, settings.sandbox, shape, _least(settings), counted)


def make_plan(world: World, account: Account | None = None, boxes: int = 1, later: int = 0) -> Plan:
    """What to rent now, `boxes` times, and maybe `later`. `account`: as it was just told; else it is asked for.

    Raises NothingToRent with the reasons, NoCredit when the account cannot pay.
    """
    settings, pick = world.settings, world.pick
    check_context(settings)
    found = search(world)
    if pick:
        choice = offers.Choice((_picked(world, pick, found),), ())
    elif found.choice.ranked:
        choice = found.choice
    else:
        raise nothing(found)
    account = account or world.provider.account()
    best = choice.ranked[0]
    least = boxes * best.offer.dph_total * (best.ready_s / 3600 + 1 / 6)
    if account.credit < least:
        raise NoCredit(
            f"the account has ${account.credit:.2f}; getting ready and ten minutes of work cost ${least:.2f}",
            "Add credit at https://cloud.vast.ai/billing/.",
        )
    caps = Caps(
        lease_s=round(settings.lease * 60),
        idle_s=round(settings.idle * 60),
        max_s=round(settings.hours * 3600),
        max_dollars=_share(world, boxes + later),
    )
    return Plan(
        choice=choice,
        caps=caps,
        model=settings.model,
        engine=settings.engine,
        shape=found.shape,
        disk_gb=found.need.disk_gb,
        hours=settings.hours,
        account=account,
        simulated=settings.sandbox,
        attempts=1 if pick else settings.attempts,
        ceiling=ceiling(settings, best.offer.dph_total),
        pick=pick,
        fit=Fit(found.counted, found.shape, best.offer.gpu_ram_mb * MIB) if found.counted else None,
        boxes=boxes,
        later=later,
    )


def _share(world: World, boxes: int) -> float:
    """Dollars that each of so many may cost beside those that are there: the cap is for the sum.

    Each box's watchdog keeps its own share, without us and without knowing of the others.
    """
    held = [rental.caps.max_dollars for rental in world.ledger.live()]
    share = (world.settings.max_spend - sum(held)) / boxes
    if held and share < LEAST_SHARE:
        raise UsageError(
            f"the boxes that run may cost ${sum(held):g} already, and --max-spend is ${world.settings.max_spend:g} for "
            "all of them together",
            f"Pass a larger one: `selfhost up --boxes {len(held) + boxes} --max-spend {sum(held) + boxes:.0f}`.",
        )
    return share


def check_context(settings: Settings) -> None:
    """Raises UsageError for one in which an interactive session is over before it begins, unless that is wanted."""
    if settings.context >= _least(settings):
        return
    good = -(-claude.least_context() // planner.GRAIN) * planner.GRAIN
    raise UsageError(
        f"{settings.context} tokens of context are too few to work with Claude Code: its first request has about "
        f"{claude.FIRST_REQUEST}, and at {max(0, claude.compacts_at(settings.context))} it sums the conversation up",
        f"Take `selfhost up --context {good}` or more. For `claude -p --tools` with few tools it may do: "
        f"`selfhost up --context {settings.context} --small-context`.",
    )


def _needed_mb(model: Model, shape: Shape) -> int:
    return -(-Fit(model, shape, 0).needed // MIB)


def _least_memory(settings: Settings, model: Model | None, shape: Shape) -> int:
    """MiB of a card. The default is for when nothing better is known."""
    if model is None:
        return settings.gpu_ram_mb
    set_by_hand = settings.sources["gpu_ram_mb"] is not Source.DEFAULT
    return max(_needed_mb(model, shape), settings.gpu_ram_mb if set_by_hand else 0)


def _least(settings: Settings) -> int:
    """Tokens of context that make sense; the sandbox says of its own that they are few."""
    return 1 if settings.small_context or settings.sandbox else claude.least_context()


def _counted(world: World, shape: Shape) -> Model | None:
    """Raises UsageError when the model was not made for such a context."""
    model = world.find_shape()
    if model and shape.context > model.attention.native_context:
        most = model.attention.native_context
        forced = "" if most >= _least(world.settings) else " --small-context"
        raise UsageError(
            f"{model.name} takes at most {most} tokens of context, {shape.context} were asked for",
            f"Ask for that with `selfhost up --context {most}{forced}`, or choose another model.",
        )
    return model


def check_model(world: World, rental: Rental) -> None:
    """Raises UsageError when the model has no room on the card of a box that is there.

    Where card or model cannot be counted, the engine's launcher finds out.
    """
    settings = world.settings
    shape = Shape(settings.context, rental.slots, rental.kv_cache_type)
    model = _counted(world, shape)
    card = next((card for card in catalogue.cards() if card.name == rental.gpu), None)
    if model is None or card is None or (fit := Fit(model, shape, card.memory)).fits:
        return
    nearest = planner.choose(model, card.memory, shape, _least(settings))
    good = f"`selfhost models use {model.name} --context {nearest.context}` has room. " if nearest else ""
    raise UsageError(
        f"{model.name} does not fit on {rental.gpu}: {fit}",
        f"{good}`selfhost models fit {model.name} --gpu {card.name.replace(' ', '_')}` counts it.",
    )


def _picked(world: World, pick: picking.Pick, found: Search) -> offers.Ranked:
    """The picked one as the market has it now. Raises NothingToRent when it is gone, unfit or dearer than shown."""
    picking.check(pick, found.need.gpu, found.need.disk_gb)
    hours, download, choice = found.need.hours, found.download, found.choice
    if ranked := picking.find(pick, choice, hours=hours, download=download):
        return ranked
    # The market leaves out what is outside the limits: is that why?
    every = replace(choice, refused=_refused(world, found.need, download, choice))
    picking.find(pick, every, hours=hours, download=download)
    raise picking.gone(pick)


def ceiling(settings: Settings, confirmed: float) -> float:
    """The most that a machine may cost in $/h, where one for `confirmed` was agreed to."""
    return settings.max_price or confirmed * SUBSTITUTE


def _model_bytes(world: World) -> int:
    """What has to be downloaded, as the registry says. Raises UsageError when the disk asked for cannot hold it."""
    settings = world.settings
    if settings.engine != "ollama":
        return settings.model_bytes
    found = world.find_model()
    if found is None:
        world.report(Event("plan", "note", f"the registry cannot be asked about {settings.model} now"))
        return settings.model_bytes
    least = found / 1e9 + 3 * config.OLLAMA_GB
    if settings.disk and settings.disk < least:
        raise UsageError(
            f"{settings.disk:g} GB of disk are too few for {settings.model} ({found / 1e9:.1f} GB) and its engine",
            f"Ask for {least:.0f} GB at least, or leave --disk out.",
        )
    return found


def login_key(world: World) -> tuple[Path, str]:
    """This profile's login key, made at first use: (path of the private half, public line). Raises NotSetUp."""
    path = world.settings.paths.login_key
    public = path.with_suffix(".pub")
    if not path.exists():
        public.unlink(missing_ok=True)
        _write(path, world.make_key("selfhost")[0])
    half = world.public_half(path)
    if not public.exists():
        _write(public, f"{half} selfhost\n")
    line = public.read_text(errors="replace").strip()
    if line.split()[:2] != half.split():
        raise NotSetUp(
            f"{public} does not belong to the login key beside it, and no box would let us in",
            "Delete it: it is made again from that key.",
        )
    return path, line


def _write(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".new")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def create(world: World, plan: Plan, ranked: offers.Ranked) -> Rental:
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
        slots=plan.shape.slots,
        kv_cache_type=plan.shape.kv_type,
        caps=plan.caps,
        host_key=host_public,
        box_token=secrets.token_urlsafe(32),
        market=market_of(settings, plan.account),
        disk_gb=plan.disk_gb,
        ceiling=plan.ceiling,
        dph_told=offer.dph_total,
    )
    world.ledger.intend(rental)

    def sending() -> None:
        nonlocal rental
        rental = world.ledger.note(rental, sent_at=world.clock.time())  # raises Superseded once `down` has come

    try:
        if label not in world.keeper.watched():
            raise SelfhostError("the keeper does not watch the new rental", "Run `selfhost up` again.")
        world.report(Event("rent", "start", f"renting {rental.gpu} in {offer.place or 'an unknown place'}"))
        instance_id = world.provider.create(offer, spec, sending)
    except AnswerLost:
        world.report(Event("rent", "note", "the market's answer was lost; looking for the box by its label"))
        return rental
    except SelfhostError as error:
        why = "refused" if rental.sent_at else "not sent"
        world.ledger.ended(label, world.clock.time(), f"{why}: {error.message}")
        if plan.pick and isinstance(error, OfferGone):
            raise picking.gone(plan.pick) from error
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
    if plan.engine == "ollama":
        env["SELFHOST_FETCH_URL"] = settings.archive_url()
    elif settings.model_url:
        env["SELFHOST_FETCH_URL"] = settings.model_url
    return env


def _failed_before(world: World) -> dict[int, str]:
    """Machines on which a box of ours never got ready, in the last two weeks, and why it did not."""
    since = world.clock.time() - FORGIVEN_S
    return {
        rental.machine_id: rental.reason
        for rental in world.ledger.all()
        if rental.instance_id
        and rental.ready_at is None
        and not rental.blameless
        and rental.reason not in OURS
        and rental.created_at > since
    }


def _choose(world: World, need: Need, download: offers.Download, found: Sequence[Offer]) -> offers.Choice:
    return offers.choose(
        need, found, download=download, avoid=_failed_before(world), max_spend=world.settings.max_spend
    )


def _refused(world: World, need: Need, download: offers.Download, choice: offers.Choice) -> tuple[offers.Refusal, ...]:
    """All that do not fit. The market is asked once more, without the limits: it does not name what they left out."""
    loose = replace(need, strict=False)
    known = {row.offer.id for row in choice.ranked} | {refusal.offer.id for refusal in choice.refused}
    others = [offer for offer in world.provider.offers(loose) if offer.id not in known]
    return (*choice.refused, *_choose(world, need, download, others).refused)


def nothing(found: Search) -> NothingToRent:
    """Why nothing fits, and what would have to be looser."""
    need, refused = found.need, found.choice.refused
    largest = max((one.offer.gpu_ram_mb for one in refused), default=0)
    if found.counted and 0 < largest < found.needed_mb:
        return _too_large(found, found.counted, largest)
    if not refused:
        return NothingToRent(
            f"the market has no {need.gpu} now",
            "Names are exact, such as `RTX 4090`. Take another card with --gpu, or try later.",
        )
    groups = Counter(one.rule for one in refused).most_common(4)
    single = {one.rule: one.why for one in refused}
    told = ", ".join(f"{count} × {single[rule] if count == 1 else rule}" for rule, count in groups)
    names = [name for name, _ in Counter(one.setting for one in refused if one.setting).most_common(2)]
    options = [f"--{name.replace('_', '-')}" if name in config.FLAGS else name for name in names]
    loosen = f"Loosen {' or '.join(options)}, or try later" if options else "Try later"
    return NothingToRent(
        f"no {need.gpu} within the limits; {len(refused)} offers refused: {told}",
        f"{loosen}. `selfhost offers --refused`, with the same options, tells each.",
    )


def _too_large(found: Search, model: Model, memory_mb: int) -> NothingToRent:
    """Known before anything is rented: the model does not fit on the largest of these cards, and what would."""
    gpu, fit = found.need.gpu, Fit(model, found.shape, memory_mb * MIB)
    nearest = planner.choose(model, fit.memory, found.shape, found.least_context)
    fits = f"`selfhost up {planner.options(nearest, found.shape)}` fits. " if nearest else ""
    return NothingToRent(
        f"{model.name} does not fit on {gpu}: {fit}, and "
        f"{(planner.MARGIN + planner.DRIVER) / planner.GIB:.1f} GiB have to stay free",
        f"{fits}`selfhost models fit {model.name} --gpu {gpu.replace(' ', '_')}` shows all that does; for more, take a "
        f"card of {-(-found.needed_mb // 1024)} GB with --gpu.",
    )
