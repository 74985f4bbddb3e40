"""What nobody looks after any more: found in the market's list, ended with the same proof as `down`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace

from selfhost_cli import config
from selfhost_cli.config import Paths
from selfhost_cli.errors import KeyRefused, MarketError, MayBeBilling, UsageError
from selfhost_cli.invoice import Invoice
from selfhost_cli.ledger import Ledger, LedgerBroken
from selfhost_cli.lifecycle.billing import bill
from selfhost_cli.lifecycle.ending import headline, prove, young
from selfhost_cli.lifecycle.world import ANY_INSTALLATION, Books, market_of
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Event, Instance, Rental
from selfhost_cli.wait import Pending, until


@dataclass(frozen=True)
class Stray:
    """A box that may be billed and that neither a keeper nor a `selfhost up` of this installation looks after.

    `instance_id`: None while its create call is unresolved. `age_s`: None when the market does not say.
    `profile`: whose it is, "" for another installation's.
    """

    instance_id: int | None
    label: str
    gpu: str
    dph_total: float
    age_s: float | None
    profile: str
    why: str


@dataclass(frozen=True)
class Reaped:
    """What was ended and proven gone, what is left, and the labels of what is `held`: somebody looks after it."""

    ended: tuple[Stray, ...]
    left: tuple[Stray, ...]
    held: tuple[str, ...]
    invoices: tuple[Invoice, ...] = ()


@dataclass(frozen=True)
class _House:
    """One profile of this installation, with what is `live` on this account. `guard`: who lives in it, "" for nobody.

    `problem`: with its ledger; `lost`: the ledger does not know all that was ever rented.
    """

    profile: str
    paths: Paths
    books: Books
    prefix: str
    live: tuple[Rental, ...]
    guard: str
    problem: str
    lost: bool

    def rental(self, box: Instance) -> Rental | None:
        """By label or, should somebody have changed that at the market, by number."""
        known = (rental for rental in self.live if box.label == rental.label or box.id == _number(rental))
        return next(known, None)


@dataclass(frozen=True)
class _Found:
    """A stray with what is known of it: the market's row, its house and that one's record."""

    stray: Stray
    box: Instance | None
    house: _House | None
    rental: Rental | None


@dataclass
class _Survey:
    """The strays, the labels of what is looked after, and of which boxes that could not be told."""

    houses: Sequence[_House]
    found: list[_Found] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    problems: list[MayBeBilling] = field(default_factory=list)
    settled: frozenset[str] = frozenset()
    """Prefixes of lost ledgers that the list was waited for."""


def look(books: Books) -> Reaped:
    """What carries a label of selfhost on this account; ends nothing.

    Raises MayBeBilling when that is unknown, KeyRefused when the account cannot be asked.
    """
    with ExitStack() as opened:
        survey = _survey(books, opened)
        _remember(survey)
    if survey.problems:
        raise survey.problems[0]
    return Reaped((), tuple(one.stray for one in survey.found), tuple(survey.held))


def reap(books: Books, *, everything: bool = False) -> Reaped:
    """End what nobody looks after; with `everything` also what other installations of selfhost have on this account.

    Raises like `look`, and MayBeBilling with what is left unless all that was to end is proven gone.
    """
    ended: list[Stray] = []
    left: list[Stray] = []
    bills: list[Invoice] = []
    with ExitStack() as opened:
        survey = _survey(books, opened)
        problems = list(survey.problems)
        unknown = [dict(row) for error in problems for row in error.left]
        for house in (*survey.houses, None):
            group = [one for one in survey.found if one.house is house]
            if house:
                taken = [one for one in group if _taken(one, house)]
                survey.held += [one.stray.label for one in taken]
                group = [one for one in group if one not in taken]
            try:
                if house or everything:
                    bills += _end(house.books if house else books, group)
                    ended += [one.stray for one in group]
                    continue
            except MayBeBilling as error:
                problems.append(error)
            left += [one.stray for one in group]
        _remember(survey)
    if problems:
        rows = [dict(vars(stray)) for stray in left] + unknown
        raise MayBeBilling("\n".join(error.message for error in problems), problems[0].remedy, left=rows)
    return Reaped(tuple(ended), tuple(left), tuple(survey.held), tuple(bills))


def _houses(books: Books, opened: ExitStack) -> list[_House]:
    own, houses = books.settings.paths, []
    for name, paths in config.neighbours(own):
        try:
            houses.append(_house(books, name, paths, opened))
        except UsageError:
            if paths == own:
                raise
            # While another profile's id is damaged, what carries it is shown as another installation's.
    return houses


def _at(here: str, houses: Sequence[_House]) -> list[_House]:
    """With what is live at this market and account."""
    return [replace(house, live=tuple(one for one in house.live if one.market in ("", here))) for house in houses]


def _here(books: Books, houses: Sequence[_House]) -> str:
    try:
        return market_of(books.settings, books.provider.account())
    except KeyRefused as error:
        if not (live := [rental for house in houses for rental in house.live]):
            raise
        raise headline(live, (), error.message) from error
    except MarketError as error:
        raise _unknown(error) from error


def _number(rental: Rental) -> int | None:
    """Another market may have given the same one to a box that is none of ours."""
    return rental.instance_id if rental.market else None


def _unknown(error: MarketError) -> MayBeBilling:
    return MayBeBilling(f"what is rented is unknown: {error.message}", "Run `selfhost reap` again.")


def _house(books: Books, name: str, paths: Paths, opened: ExitStack) -> _House:
    ledger, problem = books.ledger, books.ledger.broken
    live: list[Rental] = []
    try:
        if paths != books.settings.paths:
            # One that is not there is not made: what it knew, nobody knows.
            ledger = Ledger(paths.ledger) if paths.ledger.exists() else Ledger.in_memory(broken="")
            opened.callback(ledger.close)
        live = ledger.live()
    except LedgerBroken as error:
        ledger, problem = Ledger.in_memory(broken=error.message), error.message
        opened.callback(ledger.close)
    prefix = f"{ANY_INSTALLATION}{config.installation_id(paths)}-"
    lost = not ledger.vouches()
    # Asked after the ledger: whose rental is not in there yet holds its lock until it is.
    guard = _guard(name, paths)
    return _House(name, paths, replace(books, ledger=ledger), prefix, tuple(live), guard, problem, lost)


def _guard(name: str, paths: Paths) -> str:
    for lock, what in ((paths.keeper_lock, "keeper"), (paths.up_lock, "`selfhost up`")):
        if (holder := ProcessLock(lock).holder()) is not None:
            return f"the {what} of profile {name} (process {holder})"
    return ""


def _survey(books: Books, opened: ExitStack) -> _Survey:
    """What the market has, and who looks after it. Ledgers and locks count as they are after the list was read.

    Before that they only say what to ask for: the list may take a minute, in which an `up` rents and a keeper starts.
    """
    houses = _houses(books, opened)
    here = _here(books, houses)
    houses = _at(here, houses)
    numbers = [number for house in houses for rental in house.live if (number := _number(rental)) is not None]
    try:
        boxes, settled = _listed(books, houses, numbers)
    except MarketError as error:
        raise _unknown(error) from error
    houses = _at(here, _houses(books, opened))
    survey = _Survey(houses, settled=settled)
    now = books.clock.time()
    for box in boxes:
        house = next((house for house in houses if box.label.startswith(house.prefix) or house.rental(box)), None)
        rental = house.rental(box) if house else None
        try:
            why = _why(box, house, rental)
        except MayBeBilling as error:
            survey.problems.append(error)
            continue
        if not why:
            survey.held.append(box.label)
            continue
        age = None if box.start is None else max(0.0, now - box.start)
        stray = Stray(box.id, box.label, box.gpu, box.dph_total, age, house.profile if house else "", why)
        survey.found.append(_Found(stray, box, house, rental))
    seen = {box.id for box in boxes} | {box.label for box in boxes}
    survey.found += [
        one
        for house in houses
        if not house.guard
        for one in _unlisted(house, now)
        if seen.isdisjoint({one.stray.instance_id, one.stray.label})
    ]
    return survey


def _taken(one: _Found, house: _House) -> bool:
    """Whether somebody began to look after it since. Who comes later sees that it is recorded as ENDING."""
    try:
        known = one.rental or any(rental.label == one.stray.label for rental in house.books.ledger.live())
    except LedgerBroken:
        return False
    return bool(known and _guard(house.profile, house.paths))


def _remember(survey: _Survey) -> None:
    """That nothing is left of what a lost ledger knew: it was waited for, and who asks next need not wait again."""
    for house in survey.houses:
        nothing = house.prefix in survey.settled and not any(one.house is house for one in survey.found)
        if nothing and not (house.guard or house.problem):
            with suppress(LedgerBroken, OSError):
                house.paths.make()
                with closing(Ledger(house.paths.ledger)) as ledger:
                    ledger.vouch()


def _listed(books: Books, houses: Sequence[_House], numbers: Sequence[int]) -> tuple[list[Instance], frozenset[str]]:
    """What there is now; where nobody knows what was rented last, nothing counts only once the list cannot lag.

    With the prefixes for which that was waited for.
    """
    prefixes = tuple(house.prefix for house in houses if house.lost)
    began, lag = books.clock.monotonic(), books.settings.listing_lag

    def ask() -> tuple[list[Instance], frozenset[str]] | Pending:
        boxes = books.provider.instances(ANY_INSTALLATION, numbers)
        if books.clock.monotonic() - began >= lag:
            return boxes, frozenset(prefixes)
        if not prefixes or any(box.label.startswith(prefixes) for box in boxes):
            return boxes, frozenset()
        why = f"a ledger is lost, and a box of it may still appear in the market's list, for {lag:.0f} s"
        books.report(Event("reap", "progress", why))
        return Pending(why)

    return until(ask, what="the market's list", seconds=lag + 60, every=books.settings.poll, clock=books.clock)


def _unlisted(house: _House, now: float) -> Iterator[_Found]:
    """What a list that lags need not have yet."""
    why = "it may have been rented, and the market's list need not have it yet"
    for rental in house.live:
        if young(rental, house.books.settings.listing_lag, now):
            age = now - (rental.sent_at or rental.created_at)
            stray = Stray(rental.instance_id, rental.label, rental.gpu, rental.dph_total, age, house.profile, why)
            yield _Found(stray, None, house, rental)


def _why(box: Instance, house: _House | None, rental: Rental | None) -> str:
    """Why nobody looks after it, "" when somebody does. Raises MayBeBilling when that cannot be told."""
    if house is None:
        return "another installation's"
    if rental:
        return "" if house.guard else f"no keeper of profile {house.profile} is running"
    if house.problem and house.guard:
        raise MayBeBilling(
            f"whether {house.guard} looks after box {box.id} (${box.dph_total:.2f}/h) is unknown: {house.problem}",
            f"`selfhost down` for profile {house.profile} ends it.",
            left=[{"instance_id": box.id, "label": box.label, "gpu": box.gpu, "dph_total": box.dph_total}],
        )
    return house.problem or f"the ledger of profile {house.profile} does not have it"


def _end(books: Books, group: Sequence[_Found]) -> list[Invoice]:
    """End what belongs to one ledger. Raises MayBeBilling unless it is proven gone."""
    if not group:
        return []
    # Recorded first: a keeper or an `up` that starts now sees it.
    rentals = [books.ledger.end(one.rental.label, "reap", blameless=True) for one in group if one.rental]
    try:
        prove(books, rentals, these={one.stray.label for one in group})
    except MarketError as error:
        raise headline(rentals, [one.box for one in group if one.box], error.message) from error
    return [bill(books, rental) for rental in rentals]
