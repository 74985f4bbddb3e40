"""What `up` and `down` work with: everything outside behind a seam, and the values between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from selfhost_cli import config, offers
from selfhost_cli.attach import Front
from selfhost_cli.config import Settings
from selfhost_cli.cost import Sold
from selfhost_cli.invoice import Invoice
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle.picking import Pick
from selfhost_cli.model import Account, Caps, Endpoint, Event, Instance, Rental
from selfhost_cli.models.planner import Fit, Model, Shape
from selfhost_cli.providers import Provider
from selfhost_cli.remote import Remote
from selfhost_cli.wait import SYSTEM, Clock

Report = Callable[[Event], None]

ANY_INSTALLATION = "selfhost-"
SIMULATED = " (simulated GPU)"


class Keeper(Protocol):
    """The detached process that outlives `up`; see `keeper/`."""

    def start(self) -> Front:
        """Make sure that it runs, and return its front."""
        ...

    def watched(self) -> set[str]:
        """Make it read the ledger now; the labels it watches over."""
        ...

    def prewarm(self, rental: Rental) -> None:
        """Have its box read ahead what a session in this directory begins with, by itself and if it can."""
        ...

    def tunnel(self, label: str) -> tuple[str, str]:
        """State and reason of a rental's tunnel; the state is "up" when requests get through."""
        ...


@dataclass(frozen=True, kw_only=True)
class Books:
    """What it takes to end a box and prove it: made by a wiring, replaced by tests."""

    settings: Settings
    provider: Provider
    ledger: Ledger
    report: Report
    clock: Clock = SYSTEM

    @property
    def prefix(self) -> str:
        """What the labels of this installation's boxes begin with."""
        return f"{ANY_INSTALLATION}{config.installation_id(self.settings.paths)}-"


@dataclass(frozen=True, kw_only=True)
class World(Books):
    """What it takes to bring one up, too."""

    keeper: Keeper
    connect: Callable[[Endpoint, Sequence[str], Path], Remote]
    """Where, the host keys that may be shown there, our login key."""
    make_key: Callable[[str], tuple[str, str]]
    public_half: Callable[[Path], str]
    """Of a private key file, as in a public key line. Raises NotSetUp for one that is damaged."""
    find_claude: Callable[[], Path]
    find_model: Callable[[], int | None]
    """Bytes to download, None when nobody can say now. Raises UsageError when there is no such model."""
    find_shape: Callable[[], Model | None] = lambda: None
    """What its memory can be counted with, None when that is not known. Raises UsageError like `find_model`."""
    pick: Pick | None = None
    """The one offer to rent, and no other in its place."""
    spreads: Callable[[], bool] = lambda: False
    """Whether conversations can be spread over several boxes."""


@dataclass(frozen=True)
class Plan:
    """What `up` is about to do: shown, confirmed and then executed from this one value."""

    choice: offers.Choice
    caps: Caps
    model: str
    engine: str
    shape: Shape
    disk_gb: float
    hours: float
    account: Account
    simulated: bool
    attempts: int
    """Machines to try, one after the other, when they do not get ready."""
    ceiling: float
    """$/h: no machine that is tried in the place of the best one may cost more. It is part of what was confirmed."""
    pick: Pick | None = None
    """It was picked: `choice` has this one alone."""
    fit: Fit | None = None
    """How the model's memory adds up on the best one's card; None when it is not known."""
    boxes: int = 1
    """To rent one after the other, each as planned here."""
    later: int = 0
    """So many more the keeper may rent while requests wait."""

    @property
    def context(self) -> int:
        return self.shape.context

    @property
    def best(self) -> offers.Ranked:
        return self.choice.ranked[0]


@dataclass(frozen=True)
class Ended:
    """What `down` found and ended, and what carries another installation's label."""

    invoices: tuple[Invoice, ...]
    unknown: tuple[Instance, ...]
    foreign: tuple[Instance, ...]
    ledger_problem: str = ""
    alone: bool = False
    """The account is known to have nothing else."""
    sold: tuple[Sold, ...] = ()
    """What other backends answered since the first of these was rented."""


def market_of(settings: Settings, account: Account) -> str:
    return f"{settings.market_url} account {account.id}"
