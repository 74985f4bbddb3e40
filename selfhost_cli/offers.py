"""Choosing what to rent: need + limits + offers -> ranked by real cost, and why each other one was refused. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from selfhost_cli.model import Need, Offer

BOOT_S = 120.0
"""Seconds from the create call to a running container, the image pull aside: 1 to 5 minutes are usual."""
LOAD_S = 60.0
"""Seconds to bring the model from disk to the GPU and answer once."""


@dataclass(frozen=True)
class Ranked:
    """An offer within the limits, with the money and the time it would take."""

    offer: Offer
    dollars: float
    """All-in for the planned hours: (GPU + disk) × (boot + pull + load + session) + traffic."""
    ready_s: float


@dataclass(frozen=True)
class Refusal:
    offer: Offer
    why: str


@dataclass(frozen=True)
class Choice:
    """Cheapest first; one offer per machine."""

    ranked: tuple[Ranked, ...]
    refused: tuple[Refusal, ...]


def choose(
    need: Need,
    offers: Sequence[Offer],
    *,
    download_bytes: float,
    avoid: Mapping[int, str] = MappingProxyType({}),
    max_spend: float = 1e9,
) -> Choice:
    """Rank what fits. `download_bytes` is image plus model; `avoid`: ids of machines that failed us before, and why.

    Every limit is checked here again, because the market does not always apply the filters it was given.
    """
    fitting: dict[int, Ranked] = {}
    refused: list[Refusal] = []
    for offer in sorted(offers, key=lambda offer: (offer.dph_total, offer.id)):
        ranked = price(offer, hours=need.hours, download_bytes=download_bytes)
        if why := _refusal(need, offer, avoid) or _too_dear(ranked, download_bytes, max_spend):
            refused.append(Refusal(offer, why))
        elif offer.machine_id not in fitting or ranked.dollars < fitting[offer.machine_id].dollars:
            if earlier := fitting.get(offer.machine_id):
                refused.append(Refusal(earlier.offer, "another offer of the same machine is cheaper"))
            fitting[offer.machine_id] = ranked
        else:
            refused.append(Refusal(offer, "another offer of the same machine is cheaper"))
    ordered = sorted(fitting.values(), key=lambda ranked: (ranked.dollars, ranked.ready_s, ranked.offer.id))
    return Choice(tuple(ordered), tuple(refused))


def price(offer: Offer, *, hours: float, download_bytes: float) -> Ranked:
    """What an offer costs for a session of that many hours, and how long until it serves."""
    pull_s = download_bytes * 8 / (offer.inet_down_mbps * 1e6) if offer.inet_down_mbps > 0 else float("inf")
    ready_s = BOOT_S + pull_s + LOAD_S
    dollars = offer.dph_total * (ready_s / 3600 + hours) + download_bytes / 1e9 * offer.down_per_gb
    return Ranked(offer, dollars, ready_s)


def _refusal(need: Need, offer: Offer, avoid: Mapping[int, str]) -> str:
    """Why an offer is outside the limits, "" when it is within them."""
    checks = (
        (offer.gpu != need.gpu, f"is a {offer.gpu}"),
        (offer.num_gpus != 1, f"{offer.num_gpus} GPUs"),
        (not offer.rentable, "not rentable now"),
        (not offer.verified, "not verified"),
        (offer.machine_id in avoid, f"this machine failed before: {avoid.get(offer.machine_id)}"),
        (offer.gpu_ram_mb < need.gpu_ram_mb, f"{offer.gpu_ram_mb} MB of video memory"),
        (offer.ram_mb < need.ram_mb, f"{offer.ram_mb / 1000:.0f} GB of memory"),
        (offer.disk_gb < need.disk_gb, f"{offer.disk_gb:.0f} GB of disk"),
        (offer.reliability < need.reliability, f"reliability {offer.reliability:.3f}"),
        (offer.inet_down_mbps < need.inet_down_mbps, f"{offer.inet_down_mbps:.0f} Mbit/s down"),
        (offer.direct_ports < 1, "no direct port"),
        (offer.duration_s < need.hours * 3600, f"its host offers only {offer.duration_s / 3600:.1f} h"),
        (need.region.lower() not in offer.place.lower(), f"in {offer.place or 'an unknown place'}"),
        (need.max_price is not None and offer.dph_total > need.max_price, f"${offer.dph_total:.3f}/h"),
    )
    return next((why for failed, why in checks if failed), "")


def _too_dear(ranked: Ranked, download_bytes: float, max_spend: float) -> str:
    """Whether getting ready alone would eat the spending cap: then the box would end before it serves."""
    offer = ranked.offer
    start = offer.dph_total * ranked.ready_s / 3600 + download_bytes / 1e9 * offer.down_per_gb
    return f"getting ready alone costs ${start:.2f}" if start >= max_spend else ""
