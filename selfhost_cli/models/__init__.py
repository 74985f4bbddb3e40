"""Models before they are rented for: how large they are, what of them fits on a card, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selfhost_cli.errors import UsageError
from selfhost_cli.models import catalogue, gguf, planner, registry
from selfhost_cli.models.planner import Attention, Model
from selfhost_cli.models.registry import manifest_url, size


@dataclass(frozen=True)
class Found:
    """What is known of a model, and from where; None for what is not."""

    name: str
    weights: int | None
    attention: Attention | None
    source: str
    local: bool = False
    """A file of this machine, and no tag."""

    @property
    def model(self) -> Model | None:
        """None when too little is known to count with."""
        if self.weights is None or self.attention is None:
            return None
        return Model(self.name, self.weights, self.attention)


def find(name: str, registry_url: str = "", *, exact: bool = False) -> Found:
    """From the catalogue, else a GGUF file of that path, else the header that the registry has.

    `exact`: the catalogue's weights are a little off, so the registry is asked for them where it answers.
    Raises UsageError for a file that is no GGUF, and when the registry has no such model.
    """
    entry = catalogue.find(name)
    if entry and entry.weights and entry.attention:
        real = registry.weights(name, registry_url, header=False)[0] if exact else None
        return Found(name, real or entry.weights, entry.attention, "the catalogue")
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _read(path)
    weights, metadata = registry.weights(name, registry_url)
    return Found(name, weights, gguf.attention(metadata), "its GGUF, of which the registry sent the front")


def _read(path: Path) -> Found:
    try:
        with path.open("rb") as file:
            attention = gguf.attention(gguf.metadata(file))
        return Found(path.name, path.stat().st_size, attention, str(path), local=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error


__all__ = ["Found", "catalogue", "find", "manifest_url", "planner", "size"]
