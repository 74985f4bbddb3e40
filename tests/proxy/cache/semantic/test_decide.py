"""Looking for a question that was answered before: what is found, what is counted, what survives, what is not told."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import Literal

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from selfhost_cli.proxy.cache.seal import Seal
from selfhost_cli.proxy.cache.semantic.decide import LONGEST, Found, Semantic
from selfhost_cli.proxy.cache.semantic.embed import Embedder, EmbedError, EngineEmbedder, Vector, unit
from selfhost_cli.proxy.cache.semantic.index import Index, Known
from tests.proxy.kit import asynchronous, serving

KEY = bytes(range(32))
LIST, TUPLE = "How do I convert a list to a tuple?", "How do I convert a tuple to a list?"
LIST_AGAIN = "how can i convert a list to a tuple"


class Alike:
    """Finds every two texts with a first word in common near to each other, as a bad embedder does."""

    name = "alike"
    lexicon: Container[str] = ()

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken = ""

    async def embed(self, text: str) -> Vector:
        if self.broken:
            raise EmbedError(self.broken)
        self.asked.append(text)
        numbers = [0.0] * 27
        numbers[ord(text.strip().lower()[0]) % 27] = 1.0
        return unit(numbers)

    async def close(self) -> None: ...


class Noted(Semantic):
    """Keeps what it notes in `notes`."""

    def __init__(self, embedder: Embedder, index: Index, mode: Literal["shadow", "on"]) -> None:
        self.notes = Counter[str]()
        super().__init__(embedder, index, mode, lambda name: self.notes.update([name]))


def semantic(mode: Literal["shadow", "on"] = "on", index: Index | None = None) -> Noted:
    return Noted(Alike(), Index("alike") if index is None else index, mode)


async def learnt(index: Index, *texts: str, scope: str = "s") -> None:
    for number, text in enumerate(texts):
        await index.learn(Known(scope, text, f"key {number}"), await Alike().embed(text))


@asynchronous
async def test_a_question_in_other_words_finds_the_key_of_its_answer() -> None:
    cache = semantic()
    await cache.learn("s", LIST, "key")
    assert await cache.find("s", LIST_AGAIN) == Found("key", LIST, 1.0)
    assert cache.notes == {"asked": 1, "served": 1}


@asynchronous
async def test_what_is_near_is_not_found_when_a_guard_speaks_against_it() -> None:
    cache = semantic()
    await cache.learn("s", LIST, "key")
    assert await cache.find("s", TUPLE) is None
    assert cache.notes == {"asked": 1, "vetoed.direction": 1}


@asynchronous
async def test_a_farther_one_is_found_behind_a_nearer_one_that_is_refused() -> None:
    cache = semantic()
    await cache.learn("s", TUPLE, "wrong")
    await cache.learn("s", LIST, "right")
    found = await cache.find("s", LIST_AGAIN)
    assert found
    assert found.key == "right"


@asynchronous
async def test_what_is_too_far_is_unknown_whatever_its_words() -> None:
    cache = semantic()
    await cache.learn("s", LIST, "key")
    assert await cache.find("s", f"please {LIST}") is None
    assert cache.notes == {"asked": 1, "unknown": 1}


@asynchronous
async def test_nothing_is_found_in_another_scope() -> None:
    cache = semantic()
    await cache.learn("one model", LIST, "key")
    assert await cache.find("another model", LIST) is None


@asynchronous
async def test_in_shadow_mode_nothing_is_served_and_what_would_be_is_counted() -> None:
    cache = semantic("shadow")
    await cache.learn("s", LIST, "key")
    assert await cache.find("s", LIST_AGAIN) is None
    assert await cache.find("s", TUPLE) is None
    assert cache.notes == {"asked": 2, "would_serve": 1, "vetoed.direction": 1}


@pytest.mark.parametrize("text", ["", "  ", f"How {'long ' * LONGEST}", "What does this do?\nprint(1)"])
@asynchronous
async def test_what_is_no_question_is_neither_looked_for_nor_learnt(text: str) -> None:
    cache = semantic()
    await cache.learn("s", text, "key")
    assert await cache.find("s", text) is None
    assert cache.notes == {}


@asynchronous
async def test_an_embedder_that_fails_finds_nothing_and_says_why() -> None:
    embedder = Alike()
    cache = Noted(embedder, Index("alike"), "on")
    await cache.learn("s", LIST, "key")
    embedder.broken = "no engine"
    assert await cache.find("s", LIST_AGAIN) is None
    await cache.learn("s", TUPLE, "key")
    assert cache.trouble == "no engine"
    assert cache.notes == {"asked": 1, "failed": 1}
    embedder.broken = ""
    assert await cache.find("s", LIST_AGAIN)
    assert cache.trouble == ""


@asynchronous
async def test_a_question_that_was_not_found_is_embedded_once() -> None:
    embedder = Alike()
    cache = Noted(embedder, Index("alike"), "on")
    await cache.find("s", LIST)
    await cache.learn("s", LIST, "key")
    assert embedder.asked == [LIST]


@asynchronous
async def test_what_is_forgotten_is_not_found() -> None:
    cache = semantic()
    await cache.learn("s", LIST, "one")
    await cache.learn("s", TUPLE, "other")
    await cache.forget("one")
    assert await cache.find("s", LIST) is None
    assert await cache.find("s", TUPLE)
    await cache.learn("s", LIST, "again")
    assert await cache.find("s", LIST) == Found("again", LIST, 1.0)


# --- the index ----------------------------------------------------------------------------------------------------


@asynchronous
async def test_it_is_bounded_and_what_was_not_asked_for_longest_goes(tmp_path: Path) -> None:
    index = Index("alike", tmp_path / "q", Seal(KEY), size=3)
    await index.start()
    await learnt(index, "a", "b", "c")
    index.use(Known("s", "a", "key 0"))
    await learnt(index, "d")
    vectors = {text: await Alike().embed(text) for text in "abcd"}
    assert [text for text in "abcd" if index.near("s", vectors[text], 0.9, 5)] == ["a", "c", "d"]
    await index.close()
    with sqlite3.connect(tmp_path / "q") as db:
        assert db.execute("SELECT count(*) FROM questions").fetchone() == (3,)


@asynchronous
async def test_a_place_that_was_forgotten_is_used_again() -> None:
    index = Index("alike", size=2)
    await learnt(index, "a", "b")
    await index.forget("key 0")
    await learnt(index, "c")
    assert len(index) == 2
    assert index.near("s", await Alike().embed("b"), 0.9, 5)
    assert index.near("s", await Alike().embed("c"), 0.9, 5)


@asynchronous
async def test_the_nearest_come_first_and_no_more_than_asked_for() -> None:
    index = Index("angles")
    for degrees in (40, 0, 20, 60):
        turned = unit([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
        await index.learn(Known("s", f"{degrees}", ""), turned)
    found = index.near("s", unit([1, 0]), 0.7, 2)
    assert [near.known.text for near in found] == ["0", "20"]
    assert [near.known.text for near in index.near("s", unit([1, 0]), 0.7, 9)] == ["0", "20", "40"]


@asynchronous
async def test_it_survives_a_restart(tmp_path: Path) -> None:
    for attempt in ("first", "second"):
        index = Index("alike", tmp_path / "q", Seal(KEY))
        await index.start()
        cache = semantic("on", index)
        if attempt == "first":
            await cache.learn("s", LIST, "old")
            await cache.learn("s", LIST, "new")
        assert await cache.find("s", LIST_AGAIN) == Found("new", LIST, 1.0)
        assert len(index) == 1
        await cache.close()


@asynchronous
async def test_its_file_is_its_owners_alone_and_tells_no_question(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        index = Index("alike", tmp_path / "q", Seal(KEY))
        await index.learn(Known("the scope", LIST, "the key"), await Alike().embed(LIST))
        await index.close()
    finally:
        os.umask(before)
    files = [file for file in tmp_path.iterdir() if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    told = b"".join(file.read_bytes() for file in files)
    for secret in (LIST, "the scope", "the key", "alike"):
        assert secret.encode() not in told


@pytest.mark.parametrize("other", ["another key", "another embedder", "moved"])
@asynchronous
async def test_what_does_not_open_or_is_another_embedders_is_dropped(tmp_path: Path, other: str) -> None:
    index = Index("alike", tmp_path / "q", Seal(KEY))
    await learnt(index, "a")
    await index.close()
    if other == "moved":
        with sqlite3.connect(tmp_path / "q") as db:
            db.execute("UPDATE questions SET id = 'x'")
    name = "different" if other == "another embedder" else "alike"
    again = Index(name, tmp_path / "q", Seal(KEY[::-1] if other == "another key" else KEY))
    await again.start()
    assert len(again) == 0
    await again.close()
    with sqlite3.connect(tmp_path / "q") as db:
        assert db.execute("SELECT count(*) FROM questions").fetchone() == (0,)


@asynchronous
async def test_a_file_that_cannot_be_used_costs_only_what_is_in_it(tmp_path: Path) -> None:
    index = Index("alike", tmp_path / "no such folder" / "q", Seal(KEY))
    await index.start()
    cache = semantic("on", index)
    await cache.learn("s", LIST, "key")
    assert await cache.find("s", LIST_AGAIN)
    assert "no such folder" in cache.trouble
    await cache.close()


def test_a_file_is_not_written_without_a_seal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sealed"):
        Index("alike", tmp_path / "q")


# --- an engine's vectors ------------------------------------------------------------------------------------------


@asynchronous
async def test_an_engines_vectors_are_asked_for_as_openai_has_it() -> None:
    seen: list[object] = []

    async def embeddings(request: web.Request) -> web.Response:
        seen.append((request.headers["authorization"], await request.json()))
        return web.json_response({"data": [{"embedding": [3, 4]}]})

    app = web.Application()
    app.router.add_post("/v1/embeddings", embeddings)
    async with serving(app) as url, aiohttp.ClientSession() as session:
        embedder = EngineEmbedder(session, url, "minilm", {"authorization": "Bearer t"})
        vector = await embedder.embed("hello")
    assert vector.tolist() == pytest.approx([0.6, 0.8])
    assert seen == [("Bearer t", {"model": "minilm", "input": ["hello"], "encoding_format": "float"})]


@pytest.mark.parametrize(
    "answer",
    ["no json", "[]", '{"data": []}', '{"data": [{"embedding": [0, 0]}]}', '{"data": [{"embedding": "x"}]}', "404"],
)
@asynchronous
async def test_an_engine_that_has_no_vectors_is_an_error_with_its_place(answer: str) -> None:
    async def embeddings(request: web.Request) -> web.Response:
        return web.Response(text=answer, status=404 if answer == "404" else 200)

    app = web.Application()
    app.router.add_post("/v1/embeddings", embeddings)
    async with serving(app) as url, aiohttp.ClientSession() as session:
        with pytest.raises(EmbedError, match="/v1/embeddings answered"):
            await EngineEmbedder(session, url, "minilm").embed("hello")


@asynchronous
async def test_an_engine_that_is_gone_is_an_error() -> None:
    async with serving(web.Application()) as url:
        pass
    async with aiohttp.ClientSession() as session:
        with pytest.raises(EmbedError, match="does not answer"):
            await asyncio.wait_for(EngineEmbedder(session, url, "minilm").embed("hello"), 5)
