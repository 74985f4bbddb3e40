"""Whether a model fits on a card, and with how much context. Arithmetic only; sizes in bytes, contexts in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

GIB = 2**30
KV_TYPES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Bytes per value: the quantized ones are blocks of 32 values with a scale of 2 bytes (ggml-common.h of llama.cpp)."""
DRIVER = GIB // 2
"""What a card's memory lacks from the start: of 24 GiB about 23.5 can be used."""
COMPUTE = GIB
"""CUDA's own and the buffers of the computation. An estimate: 792 MiB of buffers were logged for a 27B model at 65,536
tokens (https://github.com/hogeheer499-commits/strix-halo-guide), and CUDA's context takes some hundred."""
MARGIN = GIB
"""Left free. llama.cpp, which Ollama runs, leaves as much by default before it puts layers on the CPU (its --fit)."""
BATCH = 1024
"""Tokens that a layer with a window holds beside it: the batch with which Ollama 0.34.0 starts its llama-server."""
STATES = 5
"""Copies of a recurrent state that one slot keeps: 748 MiB were logged where one copy is 150 (same log as COMPUTE)."""
GRAIN = 4096
"""Contexts are multiples of this."""
SLOTS = (1, 2, 4)


@dataclass(frozen=True)
class Layers:
    """`count` like layers that keep keys and values of each token; with a `window` only of the last so many."""

    count: int
    kv_heads: int
    key_length: int
    value_length: int
    window: int = 0

    @property
    def values(self) -> int:
        """Per token."""
        return self.count * self.kv_heads * (self.key_length + self.value_length)

    def tokens(self, context: int) -> int:
        """What is kept of a conversation of this length."""
        return min(context, self.window + BATCH) if self.window else context


@dataclass(frozen=True)
class Attention:
    """What a model keeps of a conversation. `state`: bytes of one copy of what layers without KV keep instead."""

    layers: tuple[Layers, ...]
    native_context: int
    state: int = 0

    def kv(self, context: int, kv_type: str) -> int:
        """Bytes for one conversation."""
        return round(sum(group.values * group.tokens(context) for group in self.layers) * KV_TYPES[kv_type])


@dataclass(frozen=True)
class Model:
    """What decides how much memory a model takes. `weights` include a projector for images."""

    name: str
    weights: int
    attention: Attention


@dataclass(frozen=True)
class Shape:
    """How a model is served: each of `slots` conversations at once has the whole `context`."""

    context: int
    slots: int = 1
    kv_type: str = "q8_0"

    def __str__(self) -> str:
        return f"{self.slots} × {self.context} tokens, KV {self.kv_type}"


@dataclass(frozen=True)
class Fit:
    """A model in one shape on a card of `memory` bytes, added up."""

    model: Model
    shape: Shape
    memory: int

    @cached_property
    def kv(self) -> int:
        return self.shape.slots * self.model.attention.kv(self.shape.context, self.shape.kv_type)

    @property
    def state(self) -> int:
        return self.shape.slots * STATES * self.model.attention.state

    @property
    def total(self) -> int:
        """What is taken."""
        return self.model.weights + self.kv + self.state + COMPUTE

    @property
    def needed(self) -> int:
        """The smallest card for it."""
        return self.total + MARGIN + DRIVER

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory and self.shape.context <= self.model.attention.native_context

    def __str__(self) -> str:
        """Such as "1 × 65536 tokens, KV q8_0: 17.3 + 3.2 + 1.0 = 21.5 of 24.0 GiB"."""
        parts = [self.model.weights, self.kv, *([self.state] if self.state else []), COMPUTE]
        summed = " + ".join(f"{part / GIB:.1f}" for part in parts)
        return f"{self.shape}: {summed} = {self.total / GIB:.1f} of {self.memory / GIB:.1f} GiB"


def largest(model: Model, memory: int, slots: int, kv_type: str) -> int:
    """The largest context that fits, a multiple of GRAIN or the native one; 0 when none does."""
    native = model.attention.native_context
    low, high = 0, native // GRAIN
    while low < high:
        middle = (low + high + 1) // 2
        if Fit(model, Shape(middle * GRAIN, slots, kv_type), memory).fits:
            low = middle
        else:
            high = middle - 1
    whole = low == native // GRAIN and Fit(model, Shape(native, slots, kv_type), memory).fits
    return native if whole else low * GRAIN


def table(model: Model, memory: int) -> dict[int, dict[str, int]]:
    """The largest context by slots and type."""
    return {slots: {kv: largest(model, memory, slots, kv) for kv in KV_TYPES} for slots in SLOTS}


def choose(model: Model, memory: int, wanted: Shape, least: int) -> Shape | None:
    """What was asked for if it fits, else the nearest to it with a context of `least` or more; None when none fits."""
    return next((shape for shape in _nearest(model, memory, wanted, least) if Fit(model, shape, memory).fits), None)


def _nearest(model: Model, memory: int, wanted: Shape, least: int) -> Iterator[Shape]:
    """Fewer slots before less context, and the type that costs quality last."""
    yield wanted
    usual = ["q8_0"] if wanted.kv_type == "f16" else [wanted.kv_type]
    for kv_types in (usual, ["q4_0"]):
        for kv_type in kv_types:
            for slots in range(wanted.slots, 0, -1):
                yield Shape(wanted.context, slots, kv_type)
            most = largest(model, memory, 1, kv_type)
            if least <= most:
                yield Shape(min(most, wanted.context), 1, kv_type)


def options(shape: Shape, other: Shape) -> str:
    """The options of `selfhost up` that turn `other` into `shape`, such as "--context 40960 --slots 2"."""
    pairs = (
        ("--context", shape.context, other.context),
        ("--slots", shape.slots, other.slots),
        ("--kv-cache-type", shape.kv_type, other.kv_type),
    )
    return " ".join(f"{option} {now}" for option, now, before in pairs if now != before)
