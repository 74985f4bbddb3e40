"""What may be answered from the cache, and for how long what was answered is good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from selfhost_cli.proxy.contract import Request

DAY_S = 24 * 3600.0


@dataclass(frozen=True)
class Rules:
    """`untempered`: requests that do not name a temperature are cached; `tempered`: those with one above 0 too.

    `ttl` and `ttl_by_class` in seconds.
    """

    untempered: bool = True
    tempered: bool = False
    ttl: float = DAY_S
    ttl_by_class: Mapping[str, float] = field(default_factory=dict)

    def against(self, request: Request) -> str:
        """Why the cache keeps out of it, "" when it does not."""
        temperature = request.sampling.get("temperature")
        if temperature is None:
            return "" if self.untempered else "no temperature"
        return "" if temperature == 0 or self.tempered else "temperature"

    def lifetime(self, cls: str) -> float:
        return self.ttl_by_class.get(cls, self.ttl)


def wish(cache_control: str) -> str:
    """What the client's Cache-Control asks for: "no-store", "no-cache" (answered anew, and kept), or ""."""
    words = {word.strip().lower() for word in cache_control.split(",")}
    return next((word for word in ("no-store", "no-cache") if word in words), "")
