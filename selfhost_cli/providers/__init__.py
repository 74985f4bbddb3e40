"""The seam to the market: what `lifecycle` needs of one, in a few verbs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from selfhost_cli.model import Account, BoxSpec, Charges, Instance, Need, Offer


class Provider(Protocol):
    """A market of boxes. Errors are `errors.MarketError`s; every verb but `create` may be repeated freely."""

    def account(self) -> Account:
        """Who pays. Raises KeyRefused when the key is not accepted."""
        ...

    def offers(self, need: Need) -> list[Offer]:
        """What the market says it has. A market may ignore filters: `offers.choose` checks each again."""
        ...

    def create(self, offer: Offer, spec: BoxSpec, sending: Callable[[], None] = lambda: None) -> int:
        """Rent it and return the instance id. Sent at most once, right after `sending`; what that raises stops it.

        Raises OfferGone (try another), NoCredit, KeyRefused, MarketError (nothing was created), or AnswerLost when
        it may have worked: only `instances` by `spec.label` can tell, after the listing's lag.
        An error that carries an instance id is not an error here: the id is returned, because a box exists.
        """
        ...

    def instances(self, label_prefix: str, ids: Collection[int] = ()) -> list[Instance]:
        """Every instance whose label starts so or that is among `ids`, from all pages of a complete, sound listing.

        Raises MarketUnreachable when the listing is missing, malformed or incomplete: that is "unknown", not "none".
        A row with an id that makes no sense beside it is a box all the same, PENDING and with a `message`.
        """
        ...

    def get(self, instance_id: int) -> Instance | None:
        """One instance, None when the market does not know it (which also happens for seconds after a create)."""
        ...

    def destroy(self, instance_id: int) -> None:
        """Ask for its end. An instance that does not exist is success. Proof is a later `instances`."""
        ...

    def register_key(self, public_key: str) -> None:
        """Put the public login key on the account, where new boxes get it from; once is enough."""
        ...

    def attach_key(self, instance_id: int, public_key: str) -> None:
        """Put it on one existing box too; "already there" is success."""
        ...

    def charges(self, ids: Collection[int], since: float) -> dict[int, Charges]:
        """What was billed for each of them since then, by id; without those for which there are no figures yet."""
        ...
