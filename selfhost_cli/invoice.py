"""What a box cost. Pure: a rental, its usage and the market's figures -> an invoice."""

from __future__ import annotations

from dataclasses import dataclass

from selfhost_cli.ledger import Usage
from selfhost_cli.model import Charges, Rental


@dataclass(frozen=True)
class Invoice:
    """Dollars and tokens of one rental. `estimated` says that the market had no figures yet."""

    label: str
    instance_id: int | None
    gpu: str
    hours: float
    gpu_dollars: float
    disk_dollars: float
    traffic_dollars: float
    traffic_gb: float | None
    """From the dollars and the price per GB; None without the market's figures, or when traffic is free."""
    usage: Usage
    estimated: bool
    reason: str

    @property
    def total(self) -> float:
        return self.gpu_dollars + self.disk_dollars + self.traffic_dollars

    @property
    def per_million_tokens(self) -> float | None:
        tokens = self.usage.input_tokens + self.usage.output_tokens
        return self.total / tokens * 1e6 if tokens else None


def invoice(rental: Rental, usage: Usage, charges: Charges | None, *, now: float) -> Invoice:
    """The bill until `now` or the rental's end. Without the market's figures, hours × the price locked at rent time."""
    end = rental.ended_at or now
    running_s = _since(rental.running_at, end)
    exists_s = _since(rental.sent_at, end) if rental.instance_id is not None else 0.0
    if charges is None:
        charges = Charges(rental.dph_base * running_s / 3600, rental.storage_dph * exists_s / 3600, down=0.0, up=0.0)
        estimated, gigabytes = True, None
    else:
        estimated, gigabytes = False, _gigabytes(rental, charges)
    return Invoice(
        label=rental.label,
        instance_id=rental.instance_id,
        gpu=rental.gpu,
        hours=running_s / 3600,
        gpu_dollars=charges.gpu,
        disk_dollars=charges.disk,
        traffic_dollars=charges.down + charges.up,
        traffic_gb=gigabytes,
        usage=usage,
        estimated=estimated,
        reason=rental.reason,
    )


def _gigabytes(rental: Rental, charges: Charges) -> float | None:
    priced = [(charges.down, rental.down_per_gb), (charges.up, rental.up_per_gb)]
    if any(price <= 0 for _, price in priced):
        return None
    return sum(dollars / price for dollars, price in priced)


def _since(start: float | None, end: float) -> float:
    return max(0.0, end - start) if start is not None else 0.0
