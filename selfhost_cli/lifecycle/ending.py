"""The end of a box, and the proof of it: asked of the market, not of our memory."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from selfhost_cli import config, cost, fleet
from selfhost_cli.cost import Sold
from selfhost_cli.errors import (
    KeyRefused,
    MarketError,
    MayBeBilling,
    TooOften,
    UsageError,
)
from selfhost_cli.invoice import Invoice, ended
from selfhost_cli.ledger import LedgerBroken
from selfhost_cli.lifecycle.billing import bill
from selfhost_cli.lifecycle.world import ANY_INSTALLATION, Books, Ended, market_of
from selfhost_cli.lock import ProcessLock
from selfhost_cli.model import Account, BoxState, Event, Instance, Rental
from selfhost_cli.wait import Clock, Pending, TimedOut, until

STOP_UP_S = 30.0
AGAIN_S = 20.0
"""Until a box that is still listed is destroyed once more."""


def down(books: Books, *, everything: bool = False) -> Ended:
    """End every box of this installation and prove it. Raises MayBeBilling when that cannot be proven.

    Works without a usable ledger, from the labels alone. `everything` also ends boxes of other installations of
    selfhost on this account; nothing else is ever touched.
    """
    with ProcessLock(books.settings.paths.down_lock) as lock:
        try:
            lock.acquire()  # a second `down` beside us does no harm: everything here may be done twice
        except OSError as error:  # a disk that is full or gone must not keep the bill running
            books.report(Event("down", "note", f"{lock.path} cannot be written: {error.strerror}"))
        with suppress(OSError):
            fleet.forget(books.settings.paths)
        rentals, broken = _record_ending(books)
        check_market(books, rentals)
        lost = lost_ledger(books)
        stopped = _stop_up(books)
        if stopped or not broken:  # an `up` may have been in the middle of a write, or have rented meanwhile
            known = {rental.label for rental in rentals}
            rentals, broken = _record_ending(books, rentals)
            check_market(books, [rental for rental in rentals if rental.label not in known])
        distrust = bool(broken) or lost or (stopped and not rentals)
        proof = prove(books, rentals, everything=everything, distrust=distrust)
        with suppress(LedgerBroken):
            books.ledger.vouch()
        foreign = tuple(box for box in proof.others if box.label.startswith(ANY_INSTALLATION))
        bills = tuple(bill(books, rental) for rental in rentals)
        return Ended(bills, proof.unknown, foreign, broken, alone=not proof.others, sold=_sold(books, rentals))


def _sold(books: Books, rentals: Sequence[Rental]) -> tuple[Sold, ...]:
    if not rentals:
        return ()
    with suppress(LedgerBroken, UsageError):  # the boxes are gone, and that is the news
        since = min(rental.created_at for rental in rentals)
        return cost.sold(books.settings.paths, books.ledger.usages(since=since))
    return ()


def finish(books: Books, rental: Rental, account: Account | None = None) -> Invoice:
    """End one rental that is recorded as ENDING: destroy, prove, record. Repeatable, by whoever gets to it.

    `account`: as it was just told; else it is asked for.
    """
    check_market(books, [rental], account)
    prove(books, [books.ledger.get(rental.label) or rental], only=rental.label)
    return bill(books, rental)


def settle(
    books: Books, rental: Rental, account: Account | None = None, listed: Iterable[Instance] | None = None
) -> bool:
    """Whether a box has ended by itself (its watchdog, its host): recorded only when the market's list proves it.

    `account` and `listed` (what the market has at least with our label or this number): as they were just told.
    """
    check_market(books, [rental], account)
    if young(rental, books.settings.listing_lag, books.clock.time()):
        return False  # not being listed proves nothing yet
    numbers = [rental.instance_id] if rental.instance_id else []
    if listed is None:
        listed = books.provider.instances(rental.label, numbers)
    if any(box.label == rental.label or box.id in numbers for box in listed) or any(map(books.provider.get, numbers)):
        return False
    books.ledger.end(rental.label, "the box ended by itself")
    finish(books, rental, account)
    return True


def lost_ledger(books: Books) -> bool:
    """Whether there was a ledger before this one, which nobody could ask. Ask before anything asks for the prefix."""
    try:
        if not config.installed(books.settings.paths):
            books.ledger.vouch()  # no box can carry a prefix that was never made
        return not books.ledger.vouches()
    except LedgerBroken:
        return True


def _record_ending(books: Books, known: Iterable[Rental] = ()) -> tuple[list[Rental], str]:
    """ENDING for every live rental: those and what was `known` before; and why that could not be written, if so.

    What can be read counts even where nothing can be written: on a full disk it is all that is known of a box.
    """
    rentals = {rental.label: rental for rental in known}
    try:
        live = books.ledger.live()
        rentals |= {rental.label: rental for rental in live}
        for rental in live:
            rentals[rental.label] = books.ledger.end(rental.label, "down")
    except LedgerBroken as error:
        books.report(Event("down", "note", f"{error.message}; asking the market itself"))
        return list(rentals.values()), error.message
    return list(rentals.values()), books.ledger.broken


def check_market(books: Books, rentals: Sequence[Rental], account: Account | None = None) -> None:
    """Another market or account knows nothing of our boxes, and its silence would prove nothing.

    `account`: as it was just told; else it is asked for.
    """
    if not rentals:
        return
    try:
        here = market_of(books.settings, account or _account(books))
    except MarketError as error:
        raise headline(rentals, (), error.message) from error
    for rental in rentals:
        if rental.market and rental.market != here:
            raise headline([rental], (), f"it was rented at {rental.market}, and this is {here}")


def _account(books: Books) -> Account:
    """Who pays. Silence that the market wants, maybe of another process, is kept: nobody else ends what is billed."""
    try:
        return books.provider.account()
    except TooOften as error:
        books.report(Event("down", "progress", error.message))
        books.clock.sleep(error.seconds)
    return books.provider.account()


def _stop_up(books: Books) -> bool:
    """End an `up` that is still running; whether there was one."""
    lock = ProcessLock(books.settings.paths.up_lock)
    holder = _sure_holder(lock, books.clock)
    if holder is None or holder == os.getpid():
        return False
    books.report(Event("down", "note", f"ending the `selfhost up` that is running (process {holder})"))
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(holder, sign)
            until(
                lambda: Pending("still running") if lock.holder() == holder else True,
                what="the running `selfhost up`",
                seconds=STOP_UP_S,
                every=0.1,
                clock=books.clock,
            )
        except ProcessLookupError:
            break
        except TimedOut:
            continue
        break
    return True


def _sure_holder(lock: ProcessLock, clock: Clock) -> int | None:
    """The same process id twice: for a moment a lock's file may still hold the one of an owner that was killed."""
    for _ in range(20):
        first = lock.holder()
        if first is None:
            return None
        clock.sleep(0.05)
        if first and lock.holder() == first:
            return first
    return None


@dataclass(frozen=True)
class Proof:
    """None of ours is listed any more. `unknown`: what the ledger did not know; `others`: all that the account has."""

    unknown: tuple[Instance, ...]
    others: tuple[Instance, ...]


def prove(
    books: Books,
    rentals: list[Rental],
    *,
    only: str = "",
    everything: bool = False,
    distrust: bool = False,
    these: Collection[str] | None = None,
) -> Proof:
    """Destroy until a complete listing shows none of ours.

    Ours is what carries the label, and every box that a rental knows by number: labels can be changed at the market.
    What the listing says decides; a destroy that fails is told and tried again. Absence counts only once the listing
    can no longer lag behind the last possible create: of a rental without an id, of a young one, or, when the ledger
    cannot be trusted, of any. `these`: only what carries one of these labels, whoever's it is. Raises MayBeBilling
    naming what may be left.
    """
    prefix = only or (ANY_INSTALLATION if everything or these is not None else books.prefix)
    known = {rental.label for rental in rentals}
    numbers = [rental.instance_id for rental in rentals if rental.instance_id is not None]
    listed: dict[int, Instance] = {}
    asked: dict[int, float] = {}
    gone: dict[int, float] = {}
    ran: dict[int, float] = {}
    problems: dict[int, str] = {}
    others: tuple[Instance, ...] = ()
    lag, began = books.settings.listing_lag, books.clock.monotonic()
    may_appear = distrust or any(young(rental, lag, books.clock.time()) for rental in rentals)

    def destroy(number: int) -> None:
        asked[number] = books.clock.monotonic()
        try:
            books.provider.destroy(number)
            gone.setdefault(number, books.clock.time())  # if the proof comes: the bill ended here
        except MarketError as error:
            problems[number] = error.message
            asked.pop(number)
            gone.pop(number, None)

    def wait(why: str) -> Pending:
        books.report(Event("down", "progress", why))
        return Pending(why)

    def look() -> bool | Pending:
        nonlocal may_appear, others
        try:
            rows = books.provider.instances("")
        except KeyRefused:
            raise
        except MarketError as error:
            if not rentals and not listed and not distrust:
                raise  # nothing speaks for a box of ours; this is about the network
            return wait(error.message)
        boxes = [
            box
            for box in rows
            if box.id in numbers or (box.label.startswith(prefix) and (these is None or box.label in these))
        ]
        others = tuple(box for box in rows if box not in boxes)
        for box in boxes:
            listed[box.id] = box
            if books.clock.monotonic() - asked.get(box.id, float("-inf")) > AGAIN_S:
                destroy(box.id)
        if boxes:
            return wait(problems.get(boxes[0].id) or f"the market still lists box {boxes[0].id}")
        if may_appear and books.clock.monotonic() - began < lag:
            return wait(f"a box may still appear in the market's list, for {lag:.0f} s")
        if may_appear and numbers:
            may_appear = False
            for number in numbers:
                destroy(number)  # the first time it may have been too young to be known
            return Pending("asked once more")
        return True

    for rental in rentals:
        if rental.instance_id is not None:
            books.report(Event("down", "start", f"destroying {rental}"))
            if _runs_on(books, rental):
                ran[rental.instance_id] = books.clock.time()
            destroy(rental.instance_id)

    def strangers() -> tuple[Instance, ...]:
        return tuple(box for box in listed.values() if box.label not in known and box.id not in numbers)

    try:
        until(
            look, what="proof that nothing is left", seconds=lag * 3 + 60, every=books.settings.poll, clock=books.clock
        )
    except (MarketError, TimedOut, KeyboardInterrupt) as error:
        if not rentals and not listed and isinstance(error, MarketError):
            raise  # no sign of a box anywhere: this is about the key or the network
        raise headline(rentals, strangers(), str(error) or "interrupted") from error
    _record_ended(books, rentals, gone, ran)
    books.report(Event("down", "done", "the market lists none of our boxes"))
    return Proof(strangers(), others)


def _runs_on(books: Books, rental: Rental) -> bool:
    """Whether a box runs that its own watchdog had to end before: then that one failed, and the bill did not end."""
    now = books.clock.time()
    if ended(rental, now) >= now:
        return False
    with suppress(MarketError):
        box = books.provider.get(rental.instance_id or 0)
        return box is not None and box.state is BoxState.RUNNING
    return False


def young(rental: Rental, lag: float, now: float) -> bool:
    """Whether the listing may not know the box yet."""
    return rental.sent_at is not None and (rental.instance_id is None or now - rental.sent_at < lag)


def _record_ended(books: Books, rentals: list[Rental], gone: Mapping[int, float], ran: Mapping[int, float]) -> None:
    for rental in rentals:
        number = rental.instance_id or 0
        try:
            books.ledger.ended(rental.label, gone.get(number, books.clock.time()), seen=ran.get(number))
        except LedgerBroken as error:
            books.report(Event("down", "note", f"the box is gone, but {error.message}"))


def headline(rentals: Sequence[Rental], strangers: Sequence[Instance], why: str) -> MayBeBilling:
    """Money may still flow: what, how much, and the command that ends it."""
    told = [str(rental) for rental in rentals]
    told += [f"box {box.id} ({box.gpu}, ${box.dph_total:.2f}/h)" for box in strangers]
    rows = [(rental.instance_id, rental.label, rental.gpu, rental.dph_total) for rental in rentals]
    rows += [(box.id, box.label, box.gpu, box.dph_total) for box in strangers]
    return MayBeBilling(
        f"{', '.join(told) or 'a box of this installation'} MAY STILL BE BILLING: {why}",
        "Run `selfhost down` until it says that nothing is billed any more, or end it at "
        "https://cloud.vast.ai/instances/.",
        left=[dict(zip(("instance_id", "label", "gpu", "dph_total"), row, strict=True)) for row in rows],
    )
