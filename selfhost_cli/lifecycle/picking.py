"""`up --pick N`: the Nth offer of the ranking that this profile showed last, and never another one in its place."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from selfhost_cli import offers
from selfhost_cli.config import Settings
from selfhost_cli.errors import NothingToRent, UsageError
from selfhost_cli.model import Offer

LOOK = "Look at what there is now: `selfhost offers`."


@dataclass(frozen=True)
class Pick:
    """One row of a ranking as it was shown, with the terms that it was shown with."""

    rank: int
    offer_id: int
    machine_id: int
    gpu: str
    place: str
    dph_total: float
    down_per_gb: float
    disk_gb: float
    """That the price was for."""
    market_url: str

    def __str__(self) -> str:
        where = self.place or "an unknown place"
        return f"number {self.rank} of the ranking shown (offer {self.offer_id}, {self.gpu} in {where})"


def remember(settings: Settings, choice: offers.Choice, disk_gb: float) -> None:
    """A ranking is about to be shown: from now on `--pick` counts in this one."""
    rows = [
        Pick(row.rank, offer.id, offer.machine_id, offer.gpu, offer.place, offer.dph_total, offer.down_per_gb,
             disk_gb, settings.market_url)
        for row in choice.ranked
        for offer in (row.offer,)
    ]  # fmt: skip
    path = _path(settings)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump([asdict(row) for row in rows], file)
    draft.replace(path)


def recall(settings: Settings, number: int) -> Pick:
    """The row of that number. Raises UsageError when no ranking of this market was shown, or none so long."""
    try:
        rows = [Pick(**row) for row in json.loads(_path(settings).read_text())]
    except (OSError, ValueError, TypeError):
        rows = []
    rows = [row for row in rows if row.market_url == settings.market_url]
    if not rows:
        raise UsageError(
            "--pick takes a number of a ranking that was shown, and there is none with offers in it",
            "See one first: `selfhost offers`.",
        )
    if found := next((row for row in rows if row.rank == number), None):
        return found
    raise UsageError(f"--pick {number}: the ranking shown has the numbers 1 to {len(rows)}", LOOK)


def check(pick: Pick, gpu: str, disk_gb: float) -> None:
    """Raises UsageError when this `up` asks for something else than the ranking did."""
    if pick.gpu != gpu:
        raise UsageError(
            f"{pick} is no {gpu}",
            f"Pass the --gpu of that ranking, or see another one: `selfhost offers --gpu '{gpu}'`.",
        )
    if pick.disk_gb != disk_gb:
        raise UsageError(
            f"{pick} was priced with {pick.disk_gb:g} GB of disk, and this `up` asks for {disk_gb:g} GB",
            "Pass the same --model and --disk to `selfhost offers` and to `selfhost up`.",
        )


def find(pick: Pick, choice: offers.Choice, *, hours: float, download: offers.Download) -> offers.Ranked | None:
    """It as the market has it now, None when it is not in there.

    Raises NothingToRent when it does not fit, or became dearer than it was shown.
    """
    found = next((row for row in choice.ranked if row.offer.id == pick.offer_id), None)
    if found is None:
        refusal = next((one for one in choice.refused if one.offer.id == pick.offer_id), None)
        if refusal is None:
            return None
        if refusal.rule != offers.SAME_MACHINE:
            raise NothingToRent(f"{pick} does not fit (any more): {refusal.why}", LOOK)
        found = offers.price(refusal.offer, hours=hours, download=download)
    if found.offer.machine_id != pick.machine_id:
        return None
    if told := _dearer(pick, found.offer):
        raise NothingToRent(f"{pick} became dearer: {told}", LOOK)
    return found


def gone(pick: Pick) -> NothingToRent:
    return NothingToRent(f"{pick} is gone", f"No other was taken in its place. {LOOK}")


def _dearer(pick: Pick, offer: Offer) -> str:
    """What rose by more than a table can show, "" when nothing did."""
    if offer.dph_total - pick.dph_total >= offers.SHOWN:
        return f"${offer.dph_total:.3f}/h, shown was ${pick.dph_total:.3f}/h"
    if offer.down_per_gb - pick.down_per_gb >= offers.SHOWN:
        return f"traffic ${offer.down_per_gb * 1000:.0f}/TB, shown was ${pick.down_per_gb * 1000:.0f}/TB"
    return ""


def _path(settings: Settings) -> Path:
    return settings.paths.state / "ranking.json"
