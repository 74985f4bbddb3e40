"""The values that travel between the parts. Frozen, without I/O.

Units: money in US dollars, sizes in bytes unless the name says otherwise (`_mb`, `_gb` are powers of ten, as the
market counts them), rates per second, times in Unix seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple


class Endpoint(NamedTuple):
    """Where a box's sshd can be reached."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Need:
    """What to ask the market for. The hard limits of a choice; see `offers.choose`."""

    gpu: str = "RTX 4090"
    gpu_ram_mb: int = 23_000
    ram_mb: int = 32_000
    reliability: float = 0.98
    inet_down_mbps: float = 300.0
    disk_gb: float = 60.0
    hours: float = 8.0
    region: str = ""
    max_price: float | None = None
    strict: bool = True
    """The market leaves out what is outside the limits; else it names whatever there is of that card, one of them."""


@dataclass(frozen=True)
class Offer:
    """One machine that can be rented now. Prices as the market quotes them for the asked disk."""

    id: int
    machine_id: int
    host_id: int
    gpu: str
    num_gpus: int
    gpu_ram_mb: int
    ram_mb: int
    disk_gb: float
    dph_base: float
    dph_total: float
    storage_dph: float
    down_per_gb: float
    up_per_gb: float
    inet_down_mbps: float
    inet_up_mbps: float
    reliability: float
    verified: bool
    rentable: bool
    cuda: float
    direct_ports: int
    duration_s: float
    place: str


class BoxState(StrEnum):
    """What the market says of an instance, sorted by what it means for us."""

    PENDING = "pending"
    RUNNING = "running"
    FAILED = "failed"
    IMAGELESS = "imageless"
    """The image cannot be had, there or anywhere."""


@dataclass(frozen=True)
class Instance:
    """One instance of the account, as the market lists it."""

    id: int
    label: str
    state: BoxState
    status: str
    message: str
    machine_id: int
    gpu: str
    dph_total: float
    start: float | None
    direct: Endpoint | None
    proxy: Endpoint | None

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Direct first: the market's relay is slower and may hang on large transfers."""
        return tuple(end for end in (self.direct, self.proxy) if end)


@dataclass(frozen=True)
class BoxSpec:
    """The one paid call: everything `Provider.create` needs beside the offer."""

    label: str
    image: str
    disk_gb: float
    onstart: str = field(repr=False)
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Account:
    """The market account behind the key."""

    id: str
    credit: float


@dataclass(frozen=True)
class Charges:
    """What the market has billed for one instance so far, in dollars: traffic by direction, seen from the box."""

    gpu: float
    disk: float
    down: float
    up: float
    until: float | None = None
    """The end of what they cover; None when the market does not say."""


@dataclass(frozen=True)
class Saved:
    """What the cache answered while a box was there: requests, their tokens, and the seconds these had once taken."""

    requests: int
    input_tokens: int
    output_tokens: int
    gpu_seconds: float

    def __add__(self, other: Saved) -> Saved:
        return Saved(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.gpu_seconds + other.gpu_seconds,
        )


@dataclass(frozen=True)
class Heard:
    """What the watchdog on a box had measured when it was heard last, at `at` of our clock.

    Seconds since the box ran first and since the last request, dollars with traffic, bytes received and sent.
    """

    at: float
    up_s: float
    idle_s: float
    dollars: float
    down_bytes: int
    up_bytes: int


@dataclass(frozen=True)
class Caps:
    """When a box ends by itself; the watchdog on the box enforces all of them."""

    lease_s: int = 45 * 60
    idle_s: int = 45 * 60
    max_s: int = 8 * 3600
    max_dollars: float = 5.0


class State(StrEnum):
    """A rental's life, in order. `ENDING` can follow any of them: `down` always wins."""

    CREATING = "creating"
    BOOTING = "booting"
    INSTALLING = "installing"
    READY = "ready"
    ENDING = "ending"
    ENDED = "ended"

    @property
    def live(self) -> bool:
        """May cost money."""
        return self is not State.ENDED


@dataclass(frozen=True)
class Rental:
    """Our record of a box that may cost money: one row of the ledger."""

    label: str
    state: State
    created_at: float
    offer_id: int
    machine_id: int
    gpu: str
    place: str
    dph_base: float
    dph_total: float
    storage_dph: float
    down_per_gb: float
    up_per_gb: float
    model: str
    engine: str
    context: int
    caps: Caps
    host_key: str
    box_token: str = field(repr=False)
    market: str = ""
    """The market's URL and the account's id: only they can prove that the box is gone."""
    sent_at: float | None = None
    instance_id: int | None = None
    endpoint: Endpoint | None = None
    proxy_port: int | None = None
    running_at: float | None = None
    ready_at: float | None = None
    ended_at: float | None = None
    reason: str = ""
    guarded: bool = True
    """Its watchdog is armed: without one it does not end by itself."""
    blameless: bool = False
    """The machine had no part in its end."""
    slots: int = 1
    """Answers at once, each with all of `context`, as they were asked for."""
    context_asked: int | None = None
    """What was asked for, where the card has room for `context` only."""
    kv_cache_type: str = "q8_0"
    changing: bool = False
    """It is being brought to another model, or that was begun and not ended."""
    disk_gb: float | None = None
    """Rented with it; None in records of older versions."""
    heard: Heard | None = None
    """What its own watchdog counted, noted now and then: for the bill."""
    charges: Charges | None = None
    """The market's figures for all of it, once it had them."""
    estimated: float | None = None
    """What we had estimated, in dollars, when they came."""
    bootstrap: bool = True
    """`host_key` still is the one that travelled in onstart, where the market can read it."""
    next_host_key: str = ""
    """The one that the box made itself, while it takes the place of `host_key`."""
    ceiling: float | None = None
    """$/h: what it may cost at most, as confirmed; None in records of older versions."""
    dph_told: float | None = None
    """$/h that its watchdog counts with; None in records of older versions."""
    seen_at: float | None = None
    """When the market last said that it ran, where its own watchdog had to end it before; just ahead of its destroy."""

    @property
    def host_keys(self) -> tuple[str, ...]:
        """Public key lines: the box may show one of these, and nothing else."""
        return (self.host_key, self.next_host_key) if self.next_host_key else (self.host_key,)

    def __str__(self) -> str:
        box = f"box {self.instance_id}" if self.instance_id else f"box labelled {self.label}"
        return f"{box} ({self.gpu}, ${self.dph_total:.2f}/h)"


@dataclass(frozen=True)
class Event:
    """Progress of a stage, for whoever draws it. `done`/`total` are bytes when there are bytes."""

    stage: str
    status: Literal["start", "progress", "done", "skip", "fail", "note"]
    text: str = ""
    done: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class Probe:
    """One answer of the health check."""

    name: str
    ok: bool
    detail: str
    seconds: float
    remedy: str = ""
