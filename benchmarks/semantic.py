"""How often a cache that answers questions by their meaning is right, and how often it is wrong.

    .venv/bin/python benchmarks/semantic.py [--json] [--embeddings URL --model NAME]

Three ways to decide are asked about pairs of questions, some with one answer for both, some traps that look as if:
cosine of at least 0.8, of at least 0.95, and ours, a threshold and guards. The pairs are fow-cache's 600, read where
its package has them (CC BY 4.0, Mabon ap Gwyn), and ours in semantic-pairs.tsv, as developers ask. Pairs that share a
question are in one half. The threshold is fitted on one half, and the guards were made by looking at that half; every
figure is of the other one, but fow-cache's 240 conversations: those are all asked, nothing was fitted on them.

With --embeddings the vectors come from an engine's /v1/embeddings there, and what is fitted is what to set for it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
from figures import Figure, as_json, as_table
from fow_cache.data import load_conversations, load_questions

from selfhost_cli.proxy.cache.semantic.decide import THRESHOLD
from selfhost_cli.proxy.cache.semantic.embed import Embedder, EngineEmbedder
from selfhost_cli.proxy.cache.semantic.guards import refuse
from selfhost_cli.proxy.cache.semantic.minilm import MiniLM

OURS = Path(__file__).with_name("semantic-pairs.tsv")
MAX_WRONG, MIN_SERVED = 1.0, 40.0
"""Percent; the goals, and the first one is what the threshold is fitted to."""
COSINES = (0.8, 0.95)
GRID = [percent / 100 for percent in range(50, 100)]


@dataclass(frozen=True)
class Pair:
    known: str
    asked: str
    same: bool
    similarity: float
    refused: str
    """By which guard; "" when by none."""

    def near(self, threshold: float) -> bool:
        return self.similarity >= threshold

    def served(self, threshold: float) -> bool:
        return self.near(threshold) and not self.refused


Question = tuple[str, str, bool]
"""What is known, what is asked, and whether one answer is right for both."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of figures")
    parser.add_argument("--embeddings", metavar="URL", help="an engine with /v1/embeddings, in MiniLM's place")
    parser.add_argument("--model", default="", help="its name there")
    options = parser.parse_args()
    figures = asyncio.run(measure(options.embeddings, options.model))
    print(as_json(figures) if options.json else as_table(figures))


async def measure(url: str | None, model: str) -> list[Figure]:
    async with aiohttp.ClientSession() as session:
        embedder = EngineEmbedder(session, url, model) if url else MiniLM()
        theirs = halves([(pair["a"], pair["b"], pair["same_answer"]) for pair in load_questions()])
        ours = halves(own_pairs())
        fitting = await judged(embedder, [*theirs[0], *ours[0]])
        threshold = fitted(fitting)
        say(f"fitted on {len(fitting)} pairs: a threshold of {threshold:g}; the cache's own is {THRESHOLD:g}")
        figures = []
        for name, (_, held) in (("fow-cache", theirs), ("coding", ours)):
            figures += compared(name, await judged(embedder, held), threshold)
        figures += await of_conversations(embedder, threshold)
        await embedder.close()
    return figures


def own_pairs() -> list[Question]:
    lines = [line for line in OURS.read_text("utf-8").splitlines() if not line.startswith("#")]
    return [(known, asked, kind == "same") for kind, known, asked in (line.split("\t") for line in lines)]


def halves(pairs: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """To fit on, and to report. By a hash, so that it stays; pairs with a question in common stay together."""
    first: dict[str, str] = {}

    def root(text: str) -> str:
        while first.setdefault(text, text) != text:
            text = first[text]
        return text

    for known, asked, _ in pairs:
        low, high = sorted((root(known), root(asked)))
        first[high] = low
    fit: list[Question] = []
    held: list[Question] = []
    for pair in pairs:
        (held if hashlib.sha256(root(pair[0]).encode()).digest()[0] % 2 else fit).append(pair)
    return fit, held


async def judged(embedder: Embedder, pairs: Sequence[Question]) -> list[Pair]:
    vectors = {text: await embedder.embed(text) for text in {text for pair in pairs for text in pair[:2]}}
    made = []
    for known, asked, same in pairs:
        similarity = float(np.dot(vectors[known], vectors[asked]))
        made.append(Pair(known, asked, same, similarity, refuse(asked, known, embedder.lexicon)))
    return made


def fitted(pairs: Sequence[Pair]) -> float:
    """With at most so many traps answered wrong, the one that serves most; of these the strictest."""

    def served(threshold: float, *, same: bool) -> float:
        return share(pairs, same=same, served=lambda pair: pair.served(threshold))

    return max(
        (one for one in GRID if served(one, same=False) <= MAX_WRONG), key=lambda one: (served(one, same=True), one)
    )


def compared(name: str, pairs: Sequence[Pair], threshold: float) -> list[Figure]:
    true, traps = (sum(pair.same is same for pair in pairs) for same in (True, False))

    def figures(how: str, served: Callable[[Pair], bool], *, goal: bool = False) -> list[Figure]:
        right = share(pairs, same=True, served=served)
        wrong = share(pairs, same=False, served=served)
        return [
            percent(f"{name}: {traps} traps answered wrong, {how}", wrong, MAX_WRONG if goal else None),
            percent(f"{name}: {true} true pairs served, {how}", right, MIN_SERVED if goal else None, more=True),
        ]

    made = figures(f"ours ({threshold:g} and guards)", lambda pair: pair.served(threshold), goal=True)
    for cosine in COSINES:
        made += figures(f"cosine {cosine:g}", lambda pair, least=cosine: pair.near(least))
    return made


async def of_conversations(embedder: Embedder, threshold: float) -> list[Figure]:
    """Looked up by the last message, as caches do. Ours looks at no conversation: there is nothing to serve."""
    last = [(one["a"][-1]["content"], one["b"][-1]["content"], one["same_answer"]) for one in load_conversations()]
    pairs = await judged(embedder, last)
    made = [
        percent("conversations: traps answered wrong, ours (they are not looked at)", 0.0, MAX_WRONG),
        percent("conversations: true pairs served, ours (they are not looked at)", 0.0, None),
    ]
    ways: list[tuple[str, Callable[[Pair], bool]]] = [
        (f"last message, cosine {cosine:g}", lambda pair, least=cosine: pair.near(least)) for cosine in COSINES
    ]
    ways.append(("last message, our guards", lambda pair: pair.served(threshold)))
    for how, served in ways:
        for what, same in (("traps answered wrong", False), ("true pairs served", True)):
            made.append(percent(f"conversations: {what}, {how}", share(pairs, same=same, served=served), None))
    return made


def share(pairs: Sequence[Pair], *, same: bool, served: Callable[[Pair], bool]) -> float:
    """Percent of the true pairs, or of the traps."""
    of = [pair for pair in pairs if pair.same is same]
    return 100 * sum(map(served, of)) / len(of)


def percent(name: str, value: float, goal: float | None, *, more: bool = False) -> Figure:
    """Nothing in it varies from run to run: no spread."""
    met = None if goal is None else (value >= goal if more else value <= goal)
    return Figure(name, round(value, 1), "%", 0, goal, met)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
