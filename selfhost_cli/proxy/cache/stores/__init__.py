"""The seam to where sealed answers are kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Size:
    """What a store holds. `evictions`: entries that had to go for want of room, since it began; None: not known."""

    entries: int
    bytes: int
    evictions: int | None


class Store(Protocol):
    """Sealed answers by name (`selfhost:{schema}:{scope}:{hash}`).

    A request never suffers from it: nothing here raises for what is wrong with the store. What cannot be had is a
    miss, what cannot be kept is not kept; `trouble` says why, "" when all is well. Anybody may have written what it
    gives: whoever reads it checks its seal.
    """

    @property
    def trouble(self) -> str: ...

    async def start(self) -> None:
        """Once, in the loop that uses it. Returns at once: a store that is slow to come is in trouble until then."""
        ...

    async def get(self, name: str) -> bytes | None: ...

    async def put(self, name: str, sealed: bytes, ttl: float) -> None:
        """Keep it for `ttl` seconds at most, in the place of what was there."""
        ...

    async def delete(self, name: str) -> bool:
        """Whether it was there."""
        ...

    def names(self, prefix: str) -> AsyncIterator[str]:
        """Every name that begins so, without leases. Raises StoreDown: who flushes must know that it is not done."""
        ...

    async def size(self, prefix: str) -> Size:
        """Of what begins so. Raises StoreDown."""
        ...

    async def take(self, name: str, owner: str, seconds: float) -> bool:
        """Become the one that asks the engine for it, for so long; False: another one is. True when in trouble.

        By the same owner again: for so long from now.
        """
        ...

    async def leave(self, name: str, owner: str) -> None:
        """Give it back, unless it is another's by now."""
        ...

    async def close(self) -> None: ...


class StoreDown(Exception):
    """A store cannot do what a person asked for; its text says why, and to which store."""
