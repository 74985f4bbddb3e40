"""How long a prompt is: exactly when that matters, cheaply when it cannot matter, guessed when nobody can tell.

A token is at least a byte, so bytes bound tokens from above; and what an answer reported of its prompt holds for every
later prompt that begins with it. Only when this bound does not fit is the engine asked to count.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from itertools import accumulate

from selfhost_cli.proxy.contract import Json, Request

PER_MESSAGE = 64
"""Tokens that a template may put around a message or a tool, generously."""
REMEMBERED = 256
TOKENS_PER_BYTE = 0.3
"""Of JSON, before anything was measured; code and English have about 3.5 bytes a token."""
LEAST, MOST = 0.12, 1.0


class Lengths:
    """What is known about prompts that were counted or answered; for one engine and model."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, int] = OrderedDict()
        self._ratio = TOKENS_PER_BYTE

    def bound(self, request: Request) -> int:
        """At most so many tokens."""
        sizes, digests = _measure(request)
        for end in range(len(sizes), 0, -1):
            if (known := self._known.get(digests[end - 1])) is not None:
                return known + sum(sizes[end:])
        return sum(sizes)

    def learn(self, request: Request, tokens: int) -> None:
        """The engine says that this prompt has so many tokens."""
        if tokens <= 0:
            return
        sizes, digests = _measure(request)
        self._known[digests[-1]] = tokens
        self._known.move_to_end(digests[-1])
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        self._ratio = min(MOST, max(LEAST, tokens / sum(sizes)))

    def estimate(self, request: Request) -> int:
        """A guess, by what the last prompt turned out to have; never above the bound."""
        sizes, _ = _measure(request)
        return max(1, min(self.bound(request), round(sum(sizes) * self._ratio)))


def _measure(request: Request) -> tuple[list[int], list[bytes]]:
    """Per part (system and tools, then each message): the most tokens it can have, and the digest up to its end."""
    head: list[Json] = [{"system": request.system, "schema": request.schema}, *request.tools]
    parts = [json.dumps(head, ensure_ascii=False), *(json.dumps(one, ensure_ascii=False) for one in request.messages)]
    data = [part.encode("utf-8", "replace") for part in parts]
    sizes = [len(part) + PER_MESSAGE for part in data]
    sizes[0] += PER_MESSAGE * len(request.tools)
    digests = accumulate(data, lambda before, part: hashlib.sha256(before + part).digest(), initial=b"")
    return sizes, list(digests)[1:]
