"""The form of an answer, where the engine does not see to it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.proxy.engines import Done, Text
from selfhost_cli.proxy.errors import ProxyError
from selfhost_cli.proxy.form import Form
from tests.proxy.kit import (
    HI,
    READ,
    Json,
    LlamaStub,
    assert_error,
    asynchronous,
    call,
    check_grammar,
    ended,
    proxied,
    started,
    text,
    texts,
)
from tests.proxy.ollama_stub import OllamaStub, said

TITLE = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
ASKED: Json = HI | {"output_config": {"format": {"type": "json_schema", "schema": TITLE}}}


def stub(*said: str, reason: str = "end_turn") -> LlamaStub:
    return LlamaStub(script=[started(), *text(*said), *ended(reason)])


@asynchronous
async def test_it_is_asked_for_in_words_behind_what_the_user_says(tmp_path: Path) -> None:
    engine = stub('{"title": "Cats"}')
    async with proxied(engine, tmp_path) as proxy:
        await proxy.answer(ASKED)
    first, words = engine.asked[0]["messages"][-1]["content"]
    assert first["text"] == HI["messages"][0]["content"]
    assert '{"type": "object", "properties": {"title"' in words["text"]
    assert "output_config" not in engine.asked[0]


@pytest.mark.parametrize(
    "pieces", [('{"title": ', '"Cats"}'), ("```json\n", '{"title": "Cats"}\n', "```"), ("\n", '{"title": "Cats"}\n')]
)
def test_an_answer_that_fits_is_the_bare_json(tmp_path: Path, pieces: tuple[str, ...]) -> None:
    @asynchronous
    async def ask() -> None:
        async with proxied(stub(*pieces), tmp_path) as proxy:
            _, message, _ = await proxy.answer(ASKED)
            events = await proxy.stream(ASKED | {"stream": True})
        assert message["content"] == [{"type": "text", "text": message["content"][0]["text"].strip()}]
        assert texts(events) == message["content"][0]["text"] == '{"title": "Cats"}'
        check_grammar(events)

    ask()


@pytest.mark.parametrize("words", ["Cats", '{"name": "Cats"}', '{"title": 7}', 'Sure: {"title": "Cats"}', "[]"])
def test_one_that_does_not_is_an_error_and_not_given_out(tmp_path: Path, words: str) -> None:
    @asynchronous
    async def ask() -> None:
        async with proxied(stub(words), tmp_path) as proxy:
            status, error, headers = await proxy.answer(ASKED)
            events = await proxy.stream(ASKED | {"stream": True})
        assert "does not fit the schema" in assert_error(status, error, 400, "api_error")
        assert headers["x-should-retry"] == "false"
        assert [event["type"] for event in events if event["type"] != "ping"] == ["error"]

    ask()


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("```\n{}\n```", "{}"),
        (" ```json \r\n\n{}```\n", "{}"),
        ('```json\n{"title": "```"}\n```', '{"title": "```"}'),
        ('"```\\n```"', '"```\\n```"'),
        ("```json\n{}", None),
        ("```two words\n{}\n```", None),
        ("```{}```", None),
        ("```", None),
        ("```\n```", None),
    ],
)
def test_a_fence_is_taken_off_where_it_is_whole(said: str, meant: str | None) -> None:
    form = Form({})
    assert list(form.feed(Text(said))) == []
    done = Done("end_turn", 3)
    if meant is None:
        with pytest.raises(ProxyError):
            list(form.feed(done))
    else:
        assert list(form.feed(done)) == [Text(meant), done]


def test_a_fence_that_is_never_closed_costs_no_more_than_reading_it() -> None:
    form = Form({})
    began = time.process_time()
    list(form.feed(Text("```json" + "\n" * 2000 + "{}")))
    with pytest.raises(ProxyError):
        list(form.feed(Done("end_turn", 3)))
    assert time.process_time() - began < 1


@asynchronous
async def test_what_was_generated_is_counted_also_of_one_that_does_not(tmp_path: Path) -> None:
    async with proxied(stub("Cats"), tmp_path) as proxy:
        await proxy.answer(ASKED)
        async with proxy.get("/health") as response:
            usage = (await response.json())["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (20, 7)


@asynchronous
async def test_one_that_was_cut_passes_as_it_is(tmp_path: Path) -> None:
    async with proxied(stub('{"title": "Ca', reason="max_tokens"), tmp_path) as proxy:
        _, message, _ = await proxy.answer(ASKED)
    assert (message["stop_reason"], message["content"][0]["text"]) == ("max_tokens", '{"title": "Ca')


@asynchronous
async def test_a_call_needs_no_form_and_neither_does_what_is_said_before_it(tmp_path: Path) -> None:
    blocks = [*text("Let me look."), *call("Read", '{"p": "/a"}', index=1)]
    engine = LlamaStub(script=[started(), *blocks, *ended("tool_use", blocks=2)])
    async with proxied(engine, tmp_path) as proxy:
        _, message, _ = await proxy.answer(ASKED | {"tools": [READ]})
    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]


@asynchronous
async def test_a_last_turn_of_the_assistants_is_left_as_it_is(tmp_path: Path) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {}}
    engine = stub('{"title": "Cats"}')
    async with proxied(engine, tmp_path) as proxy:
        await proxy.answer(ASKED | {"messages": [*HI["messages"], {"role": "assistant", "content": [call]}]})
    assert engine.asked[0]["messages"][-1] == {"role": "assistant", "content": [call]}


@pytest.mark.parametrize(
    ("tools", "by_grammar"), [([], True), ([READ], False), ([READ | {"defer_loading": True}], False)]
)
def test_ollamas_grammar_holds_it_unless_there_are_tools_to_call(tmp_path: Path, tools: Any, by_grammar: bool) -> None:
    @asynchronous
    async def ask() -> None:
        engine = OllamaStub(script=said('{"title": "Cats"}'))
        async with proxied(engine, tmp_path) as proxy:
            _, message, _ = await proxy.answer(ASKED | {"tools": tools})
        assert message["content"][0]["text"] == '{"title": "Cats"}'
        assert ("format" in engine.asked[0]) == by_grammar

    ask()
