"""Current coding models and the market's cards, as data: `catalogue.toml`, each figure with where it was read."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from selfhost_cli.models.planner import GIB, Attention, Layers


@dataclass(frozen=True)
class Source:
    """Where a figure was read, when, and how sure it is."""

    url: str
    read: str
    how: str


@dataclass(frozen=True)
class Entry:
    """One model. `sources`: by the name of a figure; a figure that is None is not known."""

    tag: str
    kind: str
    note: str
    download_gb: float
    native_context: int | None
    weights: int | None
    attention: Attention | None
    sources: Mapping[str, Source]


@dataclass(frozen=True)
class Card:
    """As the market writes its name. `memory`: bytes."""

    name: str
    memory: int


@cache
def entries() -> tuple[Entry, ...]:
    """In the order of the file."""
    data = _data()
    return tuple(_entry(row, data["sources"]) for row in data["models"])


@cache
def cards() -> tuple[Card, ...]:
    return tuple(Card(name, mib * 2**20) for name, mib in _data()["cards"].items())


def find(tag: str) -> Entry | None:
    """The entry of exactly this tag."""
    return next((entry for entry in entries() if entry.tag == tag), None)


def card(name: str) -> Card | None:
    """`RTX_4090` and `rtx 4090` are "RTX 4090"."""
    plain = name.replace("_", " ").casefold()
    return next((card for card in cards() if card.name.casefold() == plain), None)


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(files("selfhost_cli.models").joinpath("catalogue.toml").read_text("utf-8"))


def _entry(row: Mapping[str, Any], sources: Mapping[str, Any]) -> Entry:
    figures = {name: value for name, value in row.items() if isinstance(value, dict)}
    attention, weights = figures.get("attention"), figures.get("weights")
    native = figures["context"]["tokens"] if "context" in figures else None
    return Entry(
        tag=row["tag"],
        kind=row["kind"],
        note=row.get("note", ""),
        download_gb=figures["download"]["gb"],
        native_context=native,
        weights=round(weights["gib"] * GIB) if weights else None,
        attention=_attention(attention, native) if attention and native else None,
        sources={name: Source(**sources[figure["source"]]) for name, figure in figures.items()},
    )


def _attention(row: Mapping[str, Any], native: int) -> Attention:
    groups = tuple(
        Layers(group["layers"], group["kv_heads"], group["length"], group["length"], group.get("window", 0))
        for group in row["groups"]
    )
    return Attention(groups, native, row.get("state", 0))
