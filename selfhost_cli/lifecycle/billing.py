"""What ended rentals cost: asked of the market, which may have its figures later than we have our invoice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selfhost_cli import caching
from selfhost_cli.config import Settings
from selfhost_cli.errors import MarketError, Superseded
from selfhost_cli.invoice import Invoice, covers, invoice
from selfhost_cli.ledger import Ledger, LedgerBroken, Usage
from selfhost_cli.lifecycle.world import Books
from selfhost_cli.model import Charges, Event, Rental, State

ASKED_FOR_S = 60 * 86_400.0
"""Older ones stay estimates: every question reads all charges since then."""
LATELY_S = 3 * 86_400.0
"""What `down` asks for beside its own: it adds a page or two to an answer that it waits for."""


def bill(books: Books, rental: Rental) -> Invoice:
    """The invoice of one that has ended. Not being able to ask the market is a note, and no reason to fail."""
    usage, now = Usage(), books.clock.time()
    try:
        rental = books.ledger.get(rental.label) or rental
        usage = books.ledger.usage(rental.label)
        others = unsettled(books.settings, books.ledger, now=now, within=LATELY_S)
        rental = _ask(books, [rental, *(one for one in others if one.label != rental.label)])[0]
    except (LedgerBroken, MarketError) as error:
        books.report(Event("down", "note", f"the invoice is an estimate: {error.message}"))
    saved = caching.saved(books.settings).get(rental.label)
    return invoice(rental, usage, now=books.clock.time(), saved=saved)


def unsettled(settings: Settings, ledger: Ledger, *, now: float, within: float = ASKED_FOR_S) -> list[Rental]:
    """Ended rentals of this market, begun so many seconds ago at most, whose invoice is an estimate."""
    since, here = now - within, f"{settings.market_url} account "
    return [
        rental
        for rental in ledger.all()
        if rental.state is State.ENDED
        and rental.instance_id is not None
        and rental.charges is None
        and rental.created_at > since
        and rental.market.startswith(here)
    ]


def reconcile(books: Books) -> None:
    """Ask again for all of them, in one question. Raises MarketError when the market cannot be asked."""
    _ask(books, unsettled(books.settings, books.ledger, now=books.clock.time()))


def _ask(books: Books, rentals: Sequence[Rental]) -> list[Rental]:
    """The rentals with the market's figures, where it has any: one question, whatever their number."""
    began = {
        rental.instance_id: rental.sent_at or rental.created_at
        for rental in rentals
        if rental.instance_id is not None and rental.charges is None
    }
    found = books.provider.charges(began.keys(), min(began.values())) if began else {}
    return [_settled(books, rental, found.get(rental.instance_id or 0)) for rental in rentals]


def _settled(books: Books, rental: Rental, charges: Charges | None) -> Rental:
    """With these figures, in the ledger too, once they are about all of it."""
    if rental.charges is not None:
        return rental
    now = books.clock.time()
    if charges is None or not covers(charges, rental, now=now):
        return rental
    estimated = invoice(rental, Usage(), now=now).total
    try:
        return books.ledger.amend(rental.label, charges=charges, estimated=estimated)
    except (LedgerBroken, Superseded):  # the figures count all the same
        return replace(rental, charges=charges, estimated=estimated)
