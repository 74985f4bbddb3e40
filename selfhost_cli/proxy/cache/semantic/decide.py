"""Whether a question was answered before in other words: near by its vector, and nothing that speaks against it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from selfhost_cli.proxy.cache.semantic.embed import Embedder, EmbedError, Vector
from selfhost_cli.proxy.cache.semantic.guards import refuse
from selfhost_cli.proxy.cache.semantic.index import Index, Known

Mode = Literal["shadow", "on"]

THRESHOLD = 0.75
"""Of MiniLM's cosine: fitted by benchmarks/semantic.py, on one half of its pairs (docs/semantic.md)."""
LONGEST = 500
"""Characters. A longer text is more than a question, and MiniLM sees only its beginning."""
CANDIDATES = 5
"""The nearest ones that are looked at."""
REMEMBERED = 64
"""Vectors of what was just looked for: what is not found is learnt a moment later."""


@dataclass(frozen=True)
class Found:
    """`key`: under which the exact cache keeps the answer; `text`: the question it was the answer to."""

    key: str
    text: str
    similarity: float


class Semantic:
    """For requests of one turn without tools; who calls it sees to that.

    A scope stands for everything that can change an answer but the user's text: what is served, system prompt,
    sampling. With `shadow` nothing is ever found, and what would have been is noted. Nothing here raises: what does
    not work finds nothing, and `trouble` says why.
    """

    def __init__(
        self,
        embedder: Embedder,
        index: Index,
        mode: Mode,
        note: Callable[[str], None],
        threshold: float = THRESHOLD,
    ) -> None:
        """`note` is told of each question that was "asked", and then that it is "unknown", "served" ("would_serve" in
        shadow mode), "failed", or "vetoed.GUARD", by the guard that refused the nearest one."""
        self._embedder = embedder
        self._index = index
        self._mode = mode
        self._threshold = threshold
        self._note = note
        self._vectors: OrderedDict[str, Vector] = OrderedDict()
        self._trouble = ""

    @property
    def trouble(self) -> str:
        return self._trouble or self._index.trouble

    async def start(self) -> None:
        await self._index.start()

    async def close(self) -> None:
        await self._index.close()
        await self._embedder.close()

    async def find(self, scope: str, text: str) -> Found | None:
        """Known in this very scope. Who looks its key up and finds nothing there says so with `forget`."""
        if not is_question(text):
            return None
        self._note("asked")
        vector = await self._vector(text)
        if vector is None:
            self._note("failed")
            return None
        veto = ""
        for near in self._index.near(scope, vector, self._threshold, CANDIDATES):
            against = refuse(text, near.known.text, self._embedder.lexicon)
            if not against:
                return self._serve(near.known, near.similarity)
            veto = veto or against
        self._note(f"vetoed.{veto}" if veto else "unknown")
        return None

    async def learn(self, scope: str, text: str, key: str) -> None:
        """The exact cache keeps an answer to this under `key`."""
        if is_question(text) and (vector := await self._vector(text)) is not None:
            await self._index.learn(Known(scope, text, key), vector)

    async def forget(self, key: str) -> None:
        """The exact cache has no answer under that key any more."""
        await self._index.forget(key)

    def _serve(self, known: Known, similarity: float) -> Found | None:
        self._index.use(known)
        self._note("served" if self._mode == "on" else "would_serve")
        return Found(known.key, known.text, similarity) if self._mode == "on" else None

    async def _vector(self, text: str) -> Vector | None:
        if text not in self._vectors:
            try:
                self._vectors[text] = await self._embedder.embed(text)
            except EmbedError as error:
                self._trouble = str(error)
                return None
            self._trouble = ""
            while len(self._vectors) > REMEMBERED:
                self._vectors.popitem(last=False)
        return self._vectors[text]


def is_question(text: str) -> bool:
    """Whether a text may be compared at all: one paragraph that is not long. Code comes in lines."""
    return 0 < len(text.strip()) <= LONGEST and "\n" not in text.strip()
