"""Questions that were put in other words: looked for only where that cannot be wrong by itself, and served as hits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.proxy.cache.key import Served, question
from selfhost_cli.proxy.contract import parse
from tests.proxy.cache.kit import boxed
from tests.proxy.kit import HI, READ, STREAM, LlamaStub, as_body, asynchronous, check_grammar

ASK = {"x-claude-code-request-class": "ask"}
SERVED = Served("llamacpp", "tiny", "d1", "0.1")


@dataclass(frozen=True)
class Known:
    key: str


@dataclass
class Alike:
    """Takes all questions of one scope for the same: the guards are tested elsewhere."""

    known: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    open: bool = False

    async def start(self) -> None:
        self.open = True

    async def find(self, scope: str, text: str) -> Known | None:
        self.asked.append(text)
        return Known(self.known[scope]) if scope in self.known else None

    async def learn(self, scope: str, text: str, key: str) -> None:
        self.known[scope] = key

    async def forget(self, key: str) -> None:
        self.known = {scope: kept for scope, kept in self.known.items() if kept != key}

    async def close(self) -> None:
        self.open = False


def said(text: str, **more: Any) -> dict[str, Any]:
    return HI | {"messages": [{"role": "user", "content": text}]} | more


@asynchronous
async def test_a_similar_question_is_answered_from_the_cache_and_says_so(tmp_path: Path) -> None:
    stub, similar = LlamaStub(), Alike()
    async with boxed(stub, tmp_path, similar=similar) as front:
        assert (await front.answer(said("How are you?"), **ASK))[0] == "miss"
        note, events = await front.answer(said("How do you do?", stream=True), **ASK)
        assert (note, len(stub.asked)) == ("hit;similar", 1)
        check_grammar(events)
        assert (await front.answer(said("How are you?"), **ASK))[0] == "hit"
        assert similar.asked == ["How are you?", "How do you do?"], "not where the very same was answered"
        assert similar.open
    assert not similar.open


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (HI, {}),
        (HI, {"x-claude-code-request-class": "subagent"}),
        (HI | {"tools": [READ]}, ASK),
        (HI | {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}, ASK),
        (HI | {"messages": [*HI["messages"], {"role": "assistant", "content": "a"}, *HI["messages"]]}, ASK),
        (HI, ASK | {"cache-control": "no-cache"}),
        (HI | {"temperature": 0.7}, ASK),
    ],
)
@asynchronous
async def test_nothing_similar_is_looked_for_in_conversations_tools_and_forms(
    tmp_path: Path, body: dict[str, Any], headers: dict[str, str]
) -> None:
    similar = Alike()
    async with boxed(LlamaStub(), tmp_path, similar=similar) as front:
        await front.answer(body, **headers)
    assert similar.asked == []


@asynchronous
async def test_another_model_system_prompt_or_sampling_is_another_scope(tmp_path: Path) -> None:
    similar = Alike()
    async with boxed(LlamaStub(), tmp_path, similar=similar) as front:
        for change in ({}, {"system": "x"}, {"max_tokens": 9}, {"temperature": 0}):
            assert (await front.answer(said("How are you?", **change), **ASK))[0] == "miss"
    assert len(similar.known) == 4


@asynchronous
async def test_an_answer_that_is_no_longer_kept_is_forgotten_and_asked_for(tmp_path: Path) -> None:
    stub, similar = LlamaStub(), Alike()
    async with boxed(stub, tmp_path, similar=similar) as front:
        await front.answer(said("How are you?"), **ASK)
        scope = next(iter(similar.known))
        similar.known[scope] = "selfhost:1:testscope:gone"
        assert (await front.answer(said("How do you do?"), **ASK))[0] == "miss"
    assert len(stub.asked) == 2
    assert similar.known[scope] != "selfhost:1:testscope:gone"


def test_a_question_is_one_text_and_its_scope_all_the_rest() -> None:
    first, second, streamed = (
        question(parse(as_body(body)), SERVED) for body in (said("a"), said("b"), STREAM | said("a"))
    )
    assert first
    assert second
    assert first[1] == "a"
    assert first[0] == second[0]
    assert streamed == first
