"""Another model on a box that is ready: the same way as at first, and back to the one before when that fails."""

from __future__ import annotations

from dataclasses import replace

from selfhost_cli.errors import BoxFailed, MayBeBilling, NotServable, NotSetUp, SelfhostError, UsageError
from selfhost_cli.lifecycle.renting import check_context, check_model
from selfhost_cli.lifecycle.steps import change_model
from selfhost_cli.lifecycle.world import World
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Event, Rental, State


def use_model(world: World) -> Rental:
    """Serve the model and context of the settings from now on, on the box that is ready.

    Raises NotSetUp without a box, UsageError for what cannot fit on its card, SelfhostError when it failed and the box
    serves what it did before, MayBeBilling when that failed, too.
    """
    lock = ProcessLock(world.settings.paths.up_lock)
    if not lock.acquire():
        raise UsageError(
            f"a `selfhost up` of this profile is running (process {lock.holder()})", "Try again when it is done."
        )
    with lock:
        before = _ready(world)
        settings = world.settings
        wanted = replace(before, model=settings.model, context=settings.context, context_asked=None)
        held = before.model, before.context_asked or before.context
        if held == (wanted.model, wanted.context) and not before.changing:
            world.report(Event("model", "note", f"{before} serves {before.model} already"))
            return before
        check_context(settings)
        check_model(world, before)
        try:
            return change_model(world, before, wanted)
        except (BoxFailed, NotServable) as error:
            world.report(Event("model", "note", f"{error.message}; going back to {before.model}"))
            _go_back(world, before, error)
            raise SelfhostError(
                f"{wanted.model} cannot be served: {error.message}", f"{before} serves {before.model}, as before."
            ) from error


def _ready(world: World) -> Rental:
    live = world.ledger.live()
    if len(live) > 1:
        raise UsageError(
            f"there are {len(live)} boxes, and all of them are to serve the same",
            "Another model for several boxes: `selfhost down`, then `selfhost up --boxes N --model NAME`.",
        )
    for rental in live:
        if rental.state is State.READY:
            return rental
    if live:
        raise MayBeBilling(f"{live[-1]} is {live[-1].state}, not ready", "`selfhost up` goes on with it.")
    raise NotSetUp("there is no box to change", "Rent one: `selfhost up --model NAME`.")


def _go_back(world: World, before: Rental, why: SelfhostError) -> None:
    try:
        change_model(world, world.ledger.get(before.label) or before, before)
    except SelfhostError as error:
        raise MayBeBilling(
            f"{before} serves nothing now: {why.message}; and going back to {before.model}: {error.message}",
            "Run `selfhost models use` again with another model, or end it: `selfhost down`.",
        ) from error
