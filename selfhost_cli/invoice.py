"""What a box cost. Pure: a rental, its usage and the market's figures -> an invoice.

Until the market has figures for all of a rental they are estimated: the prices locked when it was rented, times the
seconds that it ran and existed, and the bytes that its own watchdog counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from selfhost_cli.countdown import countdowns, projected
from selfhost_cli.ledger import Usage
from selfhost_cli.model import Charges, Heard, Rental, Saved, State

NOTED_EVERY_S = 60.0
SLACK_S = 60.0
"""By so much the market's end of a rental and ours may differ: clocks, and the time that a proof takes."""
SETTLED_S = 26 * 3600.0
"""The market's figures for what lies so far back stay as they are: our assumption, it bills by the day at most."""
NOISE = 0.05
CENTS = 0.0005


@dataclass(frozen=True)
class Invoice:
    """Dollars and tokens of one rental. `estimated`: the market has no figures for all of it yet."""

    label: str
    instance_id: int | None
    gpu: str
    hours: float
    gpu_dollars: float
    disk_dollars: float
    traffic_dollars: float
    traffic_gb: float | None
    """As the watchdog counted, or from the market's dollars and the price per GB; None when neither is known."""
    usage: Usage
    estimated: bool
    reason: str
    least: float
    """Had it ended when it was heard last, in dollars; `most`: only when it was proven gone."""
    most: float
    estimate: float | None
    """What we had estimated before the market's figures came, in dollars."""
    saved: Saved | None = None
    """What was answered from the cache, and never came to the box."""
    saved_dollars: float = 0.0
    """What the seconds of the GPU would have cost that this had once taken, waiting included."""

    @property
    def total(self) -> float:
        return self.gpu_dollars + self.disk_dollars + self.traffic_dollars

    @property
    def per_million_tokens(self) -> float | None:
        tokens = self.usage.input_tokens + self.usage.output_tokens
        return self.total / tokens * 1e6 if tokens else None

    @property
    def uncertain(self) -> bool:
        """Whether `least` and `most` are worth telling."""
        return self.estimated and self.most - self.least > max(CENTS, NOISE * self.total)


def invoice(rental: Rental, usage: Usage, *, now: float, saved: Saved | None = None) -> Invoice:
    """The bill until `now` or the rental's end: the market's figures when the ledger has them, else an estimate."""
    end, over, seen = ended(rental, now), rental.ended_at or now, _seen(rental)
    charges = rental.charges or _counted(rental, end)
    least = _counted(rental, over if over - seen < 2 * NOTED_EVERY_S else seen)
    most = _counted(rental, over, unseen=True)
    return Invoice(
        label=rental.label,
        instance_id=rental.instance_id,
        gpu=rental.gpu,
        hours=_since(_ran_from(rental), end) / 3600,
        gpu_dollars=charges.gpu,
        disk_dollars=charges.disk,
        traffic_dollars=charges.down + charges.up,
        traffic_gb=_gigabytes(rental),
        usage=usage,
        estimated=rental.charges is None,
        reason=rental.reason,
        least=_sum(rental.charges or least),
        most=_sum(rental.charges or most),
        estimate=rental.estimated,
        saved=saved,
        saved_dollars=saved.gpu_seconds / 3600 * rental.dph_base if saved else 0.0,
    )


def ended(rental: Rental, now: float) -> float:
    """When its bill ended, as far as we know: proven gone, unless its own watchdog had to end it before.

    Hours may pass until somebody looks; the watchdog was there all the time, if it has one. That the box was seen
    to run later counts for more.
    """
    return max(_seen(rental), min(rental.ended_at or now, _deadline(rental, now)))


def covers(charges: Charges, rental: Rental, *, now: float) -> bool:
    """Whether the market's figures are about all of an ended rental: they may lag behind."""
    if charges.until is None:  # nobody says that such a row is about all of it
        return now - ended(rental, now) > SETTLED_S
    return charges.until >= ended(rental, now) - SLACK_S or now - charges.until > SETTLED_S


def worth_noting(rental: Rental, heard: Heard, *, lost: bool = False) -> bool:
    """Whether the ledger should know: rarely, because every write waits for the disk, but before money is missed.

    `lost`: the box cannot be reached, and this may have been its last word.
    """
    last = rental.heard
    if last is None or heard.at - last.at >= NOTED_EVERY_S:
        return True
    if heard.at <= last.at:
        return False
    missed = _traffic(rental, heard) - _traffic(rental, last)
    return lost or rental.state is State.ENDING or missed > max(5 / 3600 * rental.dph_total, heard.dollars / 100)


def _counted(rental: Rental, until: float, *, unseen: bool = False) -> Charges:
    """At the locked prices until then. `unseen`: a box that nobody saw running may have run from the start."""
    if rental.instance_id is None:
        return Charges(0.0, 0.0, 0.0, 0.0)
    ran, heard = _ran_from(rental), rental.heard
    if ran is None and unseen:
        ran = rental.sent_at
    return Charges(
        gpu=rental.dph_base * _since(ran, until) / 3600,
        disk=rental.storage_dph * _since(rental.sent_at, until) / 3600,
        down=heard.down_bytes / 1e9 * rental.down_per_gb if heard else 0.0,
        up=heard.up_bytes / 1e9 * rental.up_per_gb if heard else 0.0,
    )


def _ran_from(rental: Rental) -> float | None:
    """Its watchdog, started with the container, knows it better than we, who look every few seconds."""
    known = [] if rental.running_at is None else [rental.running_at]
    if rental.heard:
        known.append(rental.heard.at - rental.heard.up_s)
    return max(rental.sent_at or 0.0, min(known)) if known else None


def _seen(rental: Rental) -> float:
    """The last time that we surely knew it to exist."""
    heard = rental.heard.at if rental.heard else None
    known = (rental.created_at, rental.sent_at, rental.running_at, rental.ready_at, heard, rental.seen_at)
    return max(at for at in known if at is not None)


def _deadline(rental: Rental, now: float) -> float:
    """When its watchdog had to end it, going by what was heard last; never where none is armed."""
    if not rental.guarded:
        return float("inf")
    if rental.heard:
        ends = projected(rental, rental.heard, now=now, away=True)
    else:
        ends = countdowns(rental, None, now=now) if rental.running_at is not None else ()
    return ends[0].at if ends else float("inf")


def _gigabytes(rental: Rental) -> float | None:
    if rental.heard and not rental.charges:
        return (rental.heard.down_bytes + rental.heard.up_bytes) / 1e9
    if not rental.charges:
        return None
    priced = [(rental.charges.down, rental.down_per_gb), (rental.charges.up, rental.up_per_gb)]
    if any(price <= 0 for _, price in priced):
        return None
    return sum(dollars / price for dollars, price in priced)


def _traffic(rental: Rental, heard: Heard) -> float:
    return (heard.down_bytes * rental.down_per_gb + heard.up_bytes * rental.up_per_gb) / 1e9


def _sum(charges: Charges) -> float:
    return charges.gpu + charges.disk + charges.down + charges.up


def _since(start: float | None, end: float) -> float:
    return max(0.0, end - start) if start is not None else 0.0
