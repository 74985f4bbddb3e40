"""How long a prompt is: exactly when that matters, cheaply when it cannot matter, guessed when nobody can tell.

A token is at least a byte, so bytes bound tokens from above, with something for what a template puts around the
parts. It could fail only for a prompt of little but names and images, which the engine then refuses itself. What an
answer reported of its prompt holds for every later prompt that begins with it. Only when this bound does not fit is the
engine asked to count.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from functools import cached_property
from itertools import accumulate

from selfhost_cli.proxy.codec import encode
from selfhost_cli.proxy.contract import Json, Request

PER_PART = 64
"""Tokens that a template may put around a message, a tool or a parameter, generously."""
PER_IMAGE = 2048
REMEMBERED = 256
TOKENS_PER_BYTE = 0.3
"""Of a body, before anything was measured; code and English have about 3.5 bytes a token."""
LEAST, MOST = 0.1, 1.0


class Lengths:
    """What is known about prompts that were counted or answered; for one engine and model."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, int] = OrderedDict()
        self._ratio = TOKENS_PER_BYTE

    def of(self, request: Request, size: int) -> Length:
        """For one request, whose body has `size` bytes."""
        return Length(self, request, size)


class Length:
    """One prompt's. Reading it all again is put off until the size of its body no longer says enough."""

    def __init__(self, lengths: Lengths, request: Request, size: int) -> None:
        self._lengths = lengths
        self._request = request
        self._size = size
        self.limit = 0
        """The engine's context, once it is known."""

    def fits(self, limit: int) -> bool:
        """As good as certainly; False says nothing yet."""
        return self._size + self._around <= limit or self.bound <= limit

    @property
    def bound(self) -> int:
        """At most so many tokens."""
        sizes, digests = self._parts
        for end in range(len(sizes), 0, -1):
            if (known := self._lengths._known.get(digests[end - 1])) is not None:
                return known + sum(sizes[end:])
        return sum(sizes)

    @property
    def estimate(self) -> int:
        """A guess, by what the last prompt turned out to have; never above the bound."""
        return max(1, min(self.bound, round(self._size * self._lengths._ratio)))

    def learn(self, tokens: int) -> None:
        """The engine says that this prompt has so many tokens. Short ones are not kept: they and what follows fit."""
        if tokens <= 0:
            return
        self._lengths._ratio = min(MOST, max(LEAST, tokens / self._size))
        if self._size < self.limit // 2:
            return
        known, digest = self._lengths._known, self._parts[1][-1]
        known[digest] = tokens
        known.move_to_end(digest)
        while len(known) > REMEMBERED:
            known.popitem(last=False)

    @property
    def _around(self) -> int:
        return self._around_tools + PER_PART + sum(_around(message) for message in self._request.messages)

    @property
    def _around_tools(self) -> int:
        schemas = [tool["input_schema"].get("properties") for tool in self._request.tools]
        return PER_PART * sum(1 + (len(one) if isinstance(one, dict) else 0) for one in schemas)

    @cached_property
    def _parts(self) -> tuple[list[int], list[bytes]]:
        """Per part (system and tools, then each message): the most tokens it can have, and the digest up to its end."""
        request = self._request
        head: list[Json] = [{"system": request.system, "schema": request.schema}, *request.tools]
        parts = [encode(part) for part in (head, *request.messages)]
        around = [PER_PART + self._around_tools, *(_around(message) for message in request.messages)]
        sizes = [len(part) + more for part, more in zip(parts, around, strict=True)]
        digests = accumulate(parts, lambda before, part: hashlib.sha256(before + part).digest(), initial=b"")
        return sizes, list(digests)[1:]


def _around(message: Json) -> int:
    images: int = sum((block["type"] == "image") + len(block.get("images", ())) for block in message["content"])
    return PER_PART + PER_IMAGE * images
