"""`selfhost models` and `selfhost models fit`: the catalogue, and the arithmetic of one model on one card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from selfhost_cli import claude, models
from selfhost_cli.cli import render
from selfhost_cli.config import Settings
from selfhost_cli.errors import NothingToRent, UsageError
from selfhost_cli.models import catalogue, planner
from selfhost_cli.models.planner import GIB, Fit, Shape

AS_KV = "q8_0"
"""What the catalogue counts with."""
SESSION = f"A session with Claude Code wants {claude.least_context()} or more."


@dataclass(frozen=True)
class Answer:
    """What is known of a model, on a card of `memory` bytes. `fit` is None when it cannot be counted."""

    found: models.Found
    card: str
    memory: int
    shape: Shape
    fit: Fit | None
    table: dict[int, dict[str, int]]
    """The largest context by slots and type of KV."""
    nearest: Shape | None
    """What was asked for if it fits, else what fits instead."""


def show(settings: Settings, *, json: bool) -> None:
    """Print the catalogue, each context as the configured card would have it."""
    card = _card(settings.gpu, None)
    rows = [(entry, _most(entry, card.memory)) for entry in catalogue.entries()]
    if json:
        told = [_entry(entry) | {"largest_context": most} for entry, most in rows]
        render.as_json({"card": card, "kv_cache_type": AS_KV, "models": told})
        return
    render.out.print(f"[bold]{'model':<22}{'GB':>5}{'made for':>10}{'fits':>9}[/]")
    for entry, most in rows:
        native = "unknown" if entry.native_context is None else entry.native_context
        fits = "unknown" if most is None else most or "–"
        what = f"{entry.kind}; {entry.note}"
        render.out.print(f"{entry.tag:<22}{entry.download_gb:>5.1f}{native:>10}{fits:>9}  {what}")
    render.out.print(
        f"\nfits: the largest context with {escape(card.name)} ({card.memory / GIB:.0f} GB), KV {AS_KV} and one slot; "
        f"– is none.\n{SESSION} Sources: --json.\n`selfhost models fit NAME --gpu CARD` counts it line by line."
    )


def count(settings: Settings, name: str, memory: float | None) -> Answer:
    """Raises UsageError for a model that does not exist, and a card that is not known."""
    card = _card(settings.gpu, memory)
    found = models.find(name, settings.registry)
    shape = Shape(settings.context, settings.slots, settings.kv_cache_type)
    model = found.model
    if model is None:
        return Answer(found, card.name, card.memory, shape, None, {}, None)
    least = min(claude.least_context(), settings.context)
    nearest = planner.choose(model, card.memory, shape, least)
    fit = Fit(model, shape, card.memory)
    return Answer(found, card.name, card.memory, shape, fit, planner.table(model, card.memory), nearest)


def show_fit(value: Answer, *, json: bool) -> None:
    """Print it. Raises NothingToRent, after that, when the model does not fit."""
    error = None if value.fit is None or value.fit.fits else _error(value, value.fit)
    if json:
        render.as_json(_answer(value), error)
    elif value.fit is None:
        _unknown(value)
    else:
        _show(value, value.fit)
    if error:
        raise error


def _card(name: str, memory: float | None) -> catalogue.Card:
    plain = name.replace("_", " ")
    if memory is not None:
        if not 0 < memory < 10_000:
            raise UsageError(f"--memory {memory:g}: expected GiB of a card, such as 24")
        return catalogue.Card(f"a card of {memory:g} GiB", round(memory * GIB))
    if found := catalogue.card(name):
        return found
    raise UsageError(f"how much memory a {plain} has is not known here", "Say it with --memory, in GiB.")


def _most(entry: catalogue.Entry, memory: int) -> int | None:
    if entry.weights is None or entry.attention is None:
        return None
    return planner.largest(planner.Model(entry.tag, entry.weights, entry.attention), memory, 1, AS_KV)


def _show(value: Answer, fit: Fit) -> None:
    model, shape = fit.model, fit.shape
    out = render.out
    out.print(f"[bold]{escape(model.name)}[/] on {escape(value.card)}: {shape}; from {escape(value.found.source)}")
    for name, size, how in _lines(value, fit):
        out.print(f"{name:<16}{size / GIB:>7.2f} GiB  {how}".rstrip())
    verdict = "[green]✓[/] fits" if fit.fits else "[red]✗[/] does not fit"
    left = fit.memory - fit.needed
    out.print(f"{verdict}: {abs(left) / GIB:.2f} GiB {'to spare' if left >= 0 else 'too little'}")
    out.print(f"\nthe largest context that fits, in tokens per slot; – is none. {SESSION}")
    out.print(f"[bold]{'slots':<7}" + "".join(f"{f'KV {kv}':>9}" for kv in planner.KV_TYPES) + "[/]")
    for slots, row in value.table.items():
        out.print(f"{slots:<7}" + "".join(f"{tokens or '–':>9}" for tokens in row.values()))


def _lines(value: Answer, fit: Fit) -> list[tuple[str, int, str]]:
    attention, shape = fit.model.attention, fit.shape
    per_value = planner.KV_TYPES[shape.kv_type]
    rows = [("weights", fit.model.weights, "")]
    for group in attention.layers:
        tokens = group.tokens(shape.context)
        size = round(group.values * per_value * tokens * shape.slots)
        how = (
            f"{group.count} layers × {group.kv_heads} KV heads × ({group.key_length} + {group.value_length}) × "
            f"{per_value:g} B = {group.values * per_value / 1024:.1f} KiB per token, × {tokens} × {shape.slots}"
        )
        rows.append(("KV" if not group.window else f"KV, window {group.window}", size, how))
    if fit.state:
        rows.append(("state", fit.state, f"{planner.STATES} copies of what the other layers keep, × {shape.slots}"))
    rows += [
        ("compute", planner.COMPUTE, "CUDA and buffers; an estimate"),
        ("= taken", fit.total, ""),
        ("left free", planner.MARGIN, "as llama.cpp does by itself"),
        ("driver", planner.DRIVER, "what of a card cannot be used; an estimate"),
        ("= needed", fit.needed, f"of {value.memory / GIB:.2f} GiB"),
    ]
    return rows


def _unknown(value: Answer) -> None:
    found = value.found
    size = "" if found.weights is None else f"its weights have {found.weights / GIB:.2f} GiB; "
    render.out.print(
        f"[bold]{escape(found.name)}[/]: {size}how much a token of context takes is unknown, so whether it fits, too"
    )
    render.out.print("`selfhost up` lets the box find out, and says what context it came to.")


def _error(value: Answer, fit: Fit) -> NothingToRent:
    native = fit.model.attention.native_context
    if fit.shape.context > native:
        what = f"{fit.model.name} takes at most {native} tokens of context"
    else:
        what = f"{fit.model.name} with {fit.shape} does not fit on {value.card}"
    if not value.nearest:
        return NothingToRent(what, f"Take a card of {-(-fit.needed // GIB)} GB or more, or a smaller model.")
    if value.found.local:
        return NothingToRent(what, f"This would fit: {value.nearest}.")
    shape = value.nearest
    return NothingToRent(
        what,
        f"This would fit: `selfhost up --model {fit.model.name} --context {shape.context} --slots {shape.slots} "
        f"--kv-cache-type {shape.kv_type}`.",
    )


def _entry(entry: catalogue.Entry) -> dict[str, Any]:
    return {
        "tag": entry.tag,
        "kind": entry.kind,
        "note": entry.note,
        "download_gb": entry.download_gb,
        "native_context": entry.native_context,
        "weights_bytes": entry.weights,
        "attention": entry.attention,
        "sources": entry.sources,
    }


def _answer(value: Answer) -> dict[str, Any]:
    fit = value.fit
    told: dict[str, Any] = {
        "model": value.found.name,
        "source": value.found.source,
        "card": {"name": value.card, "memory": value.memory},
        "shape": value.shape,
        "weights": value.found.weights,
        "fits": None if fit is None else fit.fits,
    }
    if fit:
        told |= {"kv": fit.kv, "state": fit.state, "compute": planner.COMPUTE, "taken": fit.total}
        told |= {"margin": planner.MARGIN, "driver": planner.DRIVER, "needed": fit.needed}
        told |= {"largest_context": value.table, "nearest": value.nearest}
    return told
