"""What ended rentals cost: asked of the market, which may have its figures later than we have our invoice."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from selfhost_cli.config import Settings
from selfhost_cli.errors import MarketError, Superseded
from selfhost_cli.invoice import Invoice, covers, invoice
from selfhost_cli.ledger import Ledger, LedgerBroken, Usage
from selfhost_cli.lifecycle.world import Books
from selfhost_cli.model import Event, Rental, State

ASKED_FOR_S = 60 * 86_400.0
"""Older ones stay estimates: every question reads all charges since then."""


def bill(books: Books, rental: Rental) -> Invoice:
    """The invoice of one that has ended. Not being able to ask the market is a note, and no reason to fail."""
    usage = Usage()
    try:
        rental = books.ledger.get(rental.label) or rental
        usage = books.ledger.usage(rental.label)
        rental = _ask(books, rental)
    except (LedgerBroken, MarketError) as error:
        books.report(Event("down", "note", f"the invoice is an estimate: {error.message}"))
    if rental.charges:  # it answers, and has figures: one that it had none for may be settled, too
        with suppress(LedgerBroken, MarketError):
            reconcile(books, most=1)
    return invoice(rental, usage, now=books.clock.time())


def unsettled(settings: Settings, ledger: Ledger, *, now: float) -> list[Rental]:
    """Ended rentals of this market whose invoice is an estimate, the last one first."""
    since, here = now - ASKED_FOR_S, f"{settings.market_url} account "
    return [
        rental
        for rental in reversed(ledger.all())
        if rental.state is State.ENDED
        and rental.instance_id is not None
        and rental.charges is None
        and rental.created_at > since
        and rental.market.startswith(here)
    ]


def reconcile(books: Books, *, most: int) -> None:
    """Ask again for at most so many of them. Raises MarketError when the market cannot be asked."""
    for rental in unsettled(books.settings, books.ledger, now=books.clock.time())[:most]:
        _ask(books, rental)


def _ask(books: Books, rental: Rental) -> Rental:
    """The rental with the market's figures, in the ledger too, once they are about all of it."""
    if rental.instance_id is None or rental.charges is not None:
        return rental
    charges = books.provider.charges(rental.instance_id, rental.sent_at or rental.created_at)
    now = books.clock.time()
    if charges is None or not covers(charges, rental, now=now):
        return rental
    estimated = invoice(rental, Usage(), now=now).total
    try:
        return books.ledger.amend(rental.label, charges=charges, estimated=estimated)
    except (LedgerBroken, Superseded):  # the figures count all the same
        return replace(rental, charges=charges, estimated=estimated)
