"""The way to a box that is known: where it was last, then where the market says it is now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfhost_cli.errors import SelfhostError
from selfhost_cli.model import Endpoint, Rental
from selfhost_cli.remote import NotYet, Remote


@dataclass(frozen=True)
class Reach:
    """How to get to a box. `endpoints` asks the market, for one that has moved."""

    connect: Callable[[Endpoint, Sequence[str], Path], Remote]
    login_key: Path
    endpoints: Callable[[Rental], Sequence[Endpoint]]


def meet(rental: Rental, reach: Reach, *, then: str = "") -> tuple[Remote, Endpoint]:
    """A connection to the first address where the box lets us in and shows a pinned host key, and that address.

    Raises SelfhostError with what each of them said. `then`: what that means, for its message.
    """
    reasons: list[str] = []
    try:
        for endpoint in _endpoints(rental, reach):
            try:
                return reach.connect(endpoint, rental.host_keys, reach.login_key), endpoint
            except NotYet as error:
                reasons.append(error.message)
    except SelfhostError as error:  # our login key, or the market
        reasons.append(error.message)
    why = "; ".join(dict.fromkeys(reasons)) or "no address is known"
    raise SelfhostError(f"it cannot be reached{then}: {why}", "`selfhost status` tells how the tunnel is.")


def _endpoints(rental: Rental, reach: Reach) -> Iterator[Endpoint]:
    if rental.endpoint:
        yield rental.endpoint
    yield from (end for end in reach.endpoints(rental) if end != rental.endpoint)
