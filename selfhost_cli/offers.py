"""Choosing what to rent: need + limits + offers -> ranked by real cost, and why each other one was refused. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from selfhost_cli.model import Need, Offer

BOOT_S = 120.0
"""Seconds from the create call to a running container, the image pull aside: 1 to 5 minutes are usual."""
LOAD_S = 60.0
"""Seconds to bring the model from disk to the GPU and answer once."""
SHOWN = 0.001
"""$/h: a smaller difference is not to be seen in a table, and not worth a word."""
SAME_MACHINE = "another offer of the same machine costs no more"


@dataclass(frozen=True)
class Download:
    """Bytes that a box fetches until it serves, all of them at the price of traffic."""

    image: float
    model: float
    """With the engine."""

    @property
    def total(self) -> float:
        return self.image + self.model


@dataclass(frozen=True)
class Ranked:
    """An offer within the limits, with the money and the time it would take."""

    offer: Offer
    dollars: float
    """All-in for the planned hours: (GPU + disk) × (boot + image + model + load + session) + traffic."""
    ready_s: float
    image_s: float
    model_s: float
    """Of `ready_s`: the two downloads, at the rate of the machine."""
    traffic: float
    """Of `dollars`."""
    rank: int = 0
    """From 1, within its choice."""
    note: str = ""
    """Why it ranks below one that costs more per hour; "" when it does not."""


@dataclass(frozen=True)
class Refusal:
    """`why` is `rule` with the offer's own figure; `setting` names the one that would have to be looser, if any."""

    offer: Offer
    why: str
    rule: str
    setting: str = ""


@dataclass(frozen=True)
class Choice:
    """Cheapest first; one offer per machine."""

    ranked: tuple[Ranked, ...]
    refused: tuple[Refusal, ...]


def choose(
    need: Need,
    offers: Sequence[Offer],
    *,
    download: Download,
    avoid: Mapping[int, str] = MappingProxyType({}),
    max_spend: float = 1e9,
) -> Choice:
    """Rank what fits. `avoid`: ids of machines that failed us before, and why.

    Every limit is checked here again, because the market does not always apply the filters it was given. The order of
    `offers` has no influence.
    """
    fitting: list[Ranked] = []
    refused: list[Refusal] = []
    for offer in sorted(offers, key=lambda offer: (offer.dph_total, offer.id, repr(offer))):
        if refusal := _refusal(need, offer, download, avoid, max_spend):
            refused.append(refusal)
        else:
            fitting.append(price(offer, hours=need.hours, download=download))
    fitting.sort(key=lambda ranked: (ranked.dollars, ranked.ready_s, ranked.offer.id))
    ranked: dict[int, Ranked] = {}
    for one in fitting:
        if one.offer.machine_id in ranked:
            refused.append(Refusal(one.offer, SAME_MACHINE, SAME_MACHINE))
        else:
            ranked[one.offer.machine_id] = replace(one, rank=len(ranked) + 1)
    rows = list(ranked.values())
    noted = [replace(row, note=_note(row, rows[:above], need)) for above, row in enumerate(rows)]
    return Choice(tuple(noted), tuple(refused))


def price(offer: Offer, *, hours: float, download: Download) -> Ranked:
    """What an offer costs for a session of that many hours, and how long until it serves."""
    image_s, model_s = (_seconds(size, offer.inet_down_mbps) for size in (download.image, download.model))
    ready_s = BOOT_S + image_s + model_s + LOAD_S
    traffic = download.total / 1e9 * offer.down_per_gb
    dollars = offer.dph_total * (ready_s / 3600 + hours) + traffic
    return Ranked(offer, dollars, ready_s, image_s, model_s, traffic)


def _seconds(size: float, mbps: float) -> float:
    return size * 8 / (mbps * 1e6) if mbps > 0 else float("inf")


def _refusal(
    need: Need, offer: Offer, download: Download, avoid: Mapping[int, str], max_spend: float
) -> Refusal | None:
    """Why an offer is outside the limits, None when it is within them."""
    for holds, rule, figure, setting in _rules(need, offer, download, avoid, max_spend):
        if not holds:
            return Refusal(offer, f"{rule}: {figure}" if figure else rule, rule, setting)
    return None


def _rules(
    need: Need, offer: Offer, download: Download, avoid: Mapping[int, str], max_spend: float
) -> Iterator[tuple[bool, str, str, str]]:
    """(holds, the rule as it is broken, the offer's figure, its setting). Each holds only for a figure that is one."""
    dear, start = need.max_price, _start(offer, download)
    rate = offer.inet_down_mbps
    yield offer.gpu == need.gpu, "another card", offer.gpu, "gpu"
    yield offer.num_gpus == 1, "more than one GPU", f"{offer.num_gpus}", ""
    yield offer.rentable, "not rentable now", "", ""
    yield offer.verified, "not verified by the market", "", ""
    yield offer.machine_id not in avoid, "this machine failed before", avoid.get(offer.machine_id, ""), ""
    least = f"less than {need.gpu_ram_mb} MB of video memory"
    yield offer.gpu_ram_mb >= need.gpu_ram_mb, least, f"{offer.gpu_ram_mb} MB", "gpu_ram_mb"
    least = f"less than {need.ram_mb / 1000:g} GB of memory"
    yield offer.ram_mb >= need.ram_mb, least, f"{offer.ram_mb / 1000:.0f} GB", "ram_mb"
    yield offer.disk_gb >= need.disk_gb, f"less than {need.disk_gb:g} GB of disk", f"{offer.disk_gb:.0f} GB", "disk"
    least = f"reliability below {need.reliability:g}"
    yield offer.reliability >= need.reliability, least, f"{offer.reliability:.3f}", "reliability"
    least = f"slower than {need.inet_down_mbps:g} Mbit/s down"
    yield rate >= need.inet_down_mbps and 0 < rate < float("inf"), least, f"{rate:.0f} Mbit/s", "inet_down_mbps"
    yield offer.direct_ports >= 1, "no direct port", "", ""
    least = f"offered for less than {need.hours:g} h"
    yield offer.duration_s >= need.hours * 3600, least, f"{offer.duration_s / 3600:.1f} h", "hours"
    yield need.region.lower() in offer.place.lower(), f"not in {need.region}", offer.place or "place unknown", "region"
    yield dear is None or offer.dph_total <= dear, f"above ${dear or 0:g}/h", f"${offer.dph_total:.3f}/h", "max_price"
    # Else the box would end before it serves.
    yield start < max_spend, f"getting ready alone costs ${max_spend:g} or more", f"${start:.2f}", "max_spend"


def _start(offer: Offer, download: Download) -> float:
    """Dollars until it serves."""
    return price(offer, hours=0.0, download=download).dollars


def _note(row: Ranked, above: Sequence[Ranked], need: Need) -> str:
    """The difference to the first of those above that cost more per hour."""
    offer = row.offer
    other = next((one for one in above if one.offer.dph_total - offer.dph_total >= SHOWN), None)
    if other is None:
        return ""
    wait = (offer.dph_total * row.ready_s - other.offer.dph_total * other.ready_s) / 3600
    traffic = row.traffic - other.traffic
    causes = []
    if traffic > 0 and traffic >= wait / 3:
        causes.append(f"traffic ${offer.down_per_gb * 1000:.0f}/TB")
    if wait > 0 and wait >= traffic / 3:
        causes.append(f"{row.ready_s / 60:.0f} min to get ready at {offer.inet_down_mbps:.0f} Mbit/s")
    dearer = "dearer" if row.dollars > other.dollars else "as dear"
    return f"cheaper per hour than {other.rank}, {dearer} for your {need.hours:g} h: {' and '.join(causes)}"
