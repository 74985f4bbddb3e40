"""Moves what ends a box by itself: on the box, by its own script and over ssh alone, and in the ledger.

The ledger has the later of both ends before the box is told: the keeper, which ends what its watchdog did not, must
never be stricter than the box.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from selfhost_cli import countdown, install, payload
from selfhost_cli.countdown import Countdown, Measured
from selfhost_cli.errors import NotSetUp, SelfhostError, UsageError
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle.reaching import Reach, meet
from selfhost_cli.model import Caps, Rental, State
from selfhost_cli.remote import ConnectionLost, Remote

ANSWER_S = 20.0
MOST = 99_999.0
"""Of hours, minutes or dollars; the box takes nine digits."""


class _Refused(SelfhostError):
    """The box holds on to what it had."""


@dataclass(frozen=True)
class Amount:
    """A new total, or, when it `adds`, so much more than now."""

    value: float
    adds: bool

    def beside(self, held: float) -> float:
        return held + self.value if self.adds else self.value


@dataclass(frozen=True)
class Wish:
    """The caps to move, in the units of `up`'s options: hours since it was rented, dollars, minutes of idleness."""

    hours: Amount | None = None
    max_spend: Amount | None = None
    idle: Amount | None = None

    def on(self, held: Caps) -> Caps:
        """What shall hold. Raises UsageError when that is more than a box takes."""
        wanted = held
        if self.hours:
            wanted = replace(wanted, max_s=round(_sane(self.hours.beside(held.max_s / 3600)) * 3600))
        if self.max_spend:
            wanted = replace(wanted, max_dollars=round(_sane(self.max_spend.beside(held.max_dollars)), 4))
        if self.idle:
            wanted = replace(wanted, idle_s=round(_sane(self.idle.beside(held.idle_s / 60)) * 60))
        return wanted


@dataclass(frozen=True)
class Extended:
    """The rental with what holds now, what held before, and when that ends the box."""

    rental: Rental
    before: Caps
    ends: tuple[Countdown, ...]


def amount(option: str, text: str | None) -> Amount | None:
    """`8` or `+2`. Raises UsageError."""
    if text is None:
        return None
    number = text.strip()
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST:
        raise UsageError(
            f"{option} {text}: expected a number above zero", f"Such as {option} 8, or {option} +2 for 2 more."
        )
    return Amount(value, adds=number.startswith("+"))


def extend(ledger: Ledger, reach: Reach, wish: Wish, *, now: float) -> Extended:
    """Move the caps of the box. Whatever is raised, it ends when it did before; ConnectionLost: that is not known.

    Raises NotSetUp when there is no box, UsageError for caps that would end it at once, SelfhostError when it cannot
    be reached or does not take them.
    """
    if wish == Wish():
        raise UsageError("nothing to move", "Pass --hours, --max-spend or --idle.")
    rental = _reachable(ledger)
    remote, _ = meet(rental, reach, then=", and its caps are as they were")
    try:
        remote.put(payload.script("limits.sh"), f"{install.ROOT}/bin/limits.sh", mode=0o700)
        before, measured = _limits(remote)
        wanted = wish.on(before)
        _check_not_over(rental, before, wanted, measured, now)
        moved = {name: value for name, value in asdict(wanted).items() if value != getattr(before, name)}
        ledger.note(_checked(ledger.get(rental.label) or rental), caps=_later(before, wanted))
        try:
            held, measured = _limits(remote, *(f"{name.upper()}={value:.12g}" for name, value in moved.items()))
        except ConnectionLost as error:
            raise ConnectionLost(
                f"{error.message}; whether the caps were moved is not known",
                "Run it again, with a total rather than with +: that can be repeated.",
            ) from error
        except _Refused:
            ledger.note(_checked(ledger.get(rental.label) or rental), caps=before)
            raise
    finally:
        remote.close()
    if any(getattr(held, name) != value for name, value in moved.items()):
        raise SelfhostError(f"{rental} was told {moved}, and says that {held} hold", "Run it again.")
    rental = ledger.note(_checked(ledger.get(rental.label) or rental), caps=held)
    return Extended(rental, before, countdown.countdowns(rental, measured, now=now))


def _reachable(ledger: Ledger) -> Rental:
    live = ledger.live()
    if not live:
        raise NotSetUp("there is no box to extend", "Rent one: `selfhost up`.")
    return _checked(live[-1])


def _checked(rental: Rental) -> Rental:
    if rental.state not in (State.INSTALLING, State.READY):
        raise SelfhostError(f"{rental} is {rental.state}: it cannot be told anything now")
    return rental


def _limits(remote: Remote, *moved: str) -> tuple[Caps, Measured | None]:
    """Ask the box's script, or tell it; what holds."""
    result = remote.run(" ".join([install.LIMITS, *moved]), timeout=ANSWER_S)
    if result.code:
        raise _Refused(f"the box did not take new caps: {result.err.strip() or f'status {result.code}'}")
    told = dict(line.partition("=")[::2] for line in result.out.splitlines())
    try:
        seconds = {name: round(float(told[name.upper()])) for name in ("lease_s", "idle_s", "max_s")}
        caps = Caps(**seconds, max_dollars=float(told["MAX_DOLLARS"]))
    except (KeyError, ValueError) as error:
        raise SelfhostError(f"the box does not tell its caps: {result.out.strip()[:200]}") from error
    return caps, countdown.parse(told.get("WATCH", ""))


def _later(one: Caps, other: Caps) -> Caps:
    values = asdict(one)
    return Caps(**{name: max(value, getattr(other, name)) for name, value in values.items()})


def _check_not_over(rental: Rental, before: Caps, wanted: Caps, measured: Measured | None, now: float) -> None:
    """Refuse what would end the box at its next look."""
    caps = {"hours": "max_s", "dollars": "max_dollars", "idle": "idle_s"}
    for one in countdown.countdowns(replace(rental, caps=wanted), measured, now=now):
        name = caps.get(one.why)
        if name and one.seconds <= 0 and getattr(wanted, name) != getattr(before, name):
            raise UsageError(f"that would end {rental} at once: it is past that", "To end it: `selfhost down`.")


def _sane(value: float) -> float:
    if value > MOST:
        raise UsageError(f"{value:g} is more than a box takes", f"The most is {MOST:g}.")
    return value
