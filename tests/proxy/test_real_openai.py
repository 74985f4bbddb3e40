"""The adapter for OpenAI's API before llama.cpp's real server with a real model, directly and through the proxy."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from selfhost_cli.proxy import contract
from selfhost_cli.proxy.engines import Done, Prompt, Text, ToolCall
from selfhost_cli.proxy.engines.openai import OpenAIEngine
from selfhost_cli.proxy.errors import ProxyError
from tests.proxy.kit import HI, Json, asynchronous, check_grammar, texts
from tests.proxy.openai_stub import answer, proxied
from tests.proxy.test_real_engine import CONTEXT, TASK, engine, engine_python

__all__ = ["engine", "engine_python"]
pytestmark = pytest.mark.e2e


def address(engine: Path) -> str:
    return f"http://127.0.0.1:{int(engine.read_text())}"


@asynccontextmanager
async def speaking(engine: Path) -> AsyncIterator[OpenAIEngine]:
    adapter = OpenAIEngine("llamacpp", "tiny", lambda: address(engine))
    try:
        yield adapter
    finally:
        await adapter.close()


@asynchronous
async def test_it_is_recognised_and_tells_its_context(engine: Path) -> None:
    async with speaking(engine) as adapter:
        health = await adapter.health()
    assert (health.context, health.slots, health.facts) == (CONTEXT, 1, {"server": "llamacpp"})


@asynchronous
async def test_a_plain_question_is_answered_streaming_and_whole(engine: Path, tmp_path: Path) -> None:
    async with proxied(address(engine), tmp_path) as proxy:
        events = await proxy.stream(HI | {"stream": True})
        status, message, _ = await proxy.answer(HI)
    usage = check_grammar(events)["usage"]
    assert status == 200
    assert texts(events).strip()
    assert texts(events) == message["content"][0]["text"]
    assert usage["output_tokens"] > 1
    assert message["usage"]["cache_read_input_tokens"] > 0


@asynchronous
async def test_a_tool_is_called_and_its_result_answered_in_words(engine: Path, tmp_path: Path) -> None:
    async with proxied(address(engine), tmp_path) as proxy:
        events = await proxy.stream(TASK | {"stream": True})
        _, message, _ = await proxy.answer(TASK)
        assert check_grammar(events)["delta"]["stop_reason"] == message["stop_reason"] == "tool_use"
        call = message["content"][-1]
        assert (call["name"], call["input"]) == ("Read", {"file_path": "/tmp/a.txt"})
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "1\tthe answer is 42\n"}
        turns = [{"role": "assistant", "content": message["content"]}, {"role": "user", "content": [result]}]
        events = await proxy.stream(TASK | {"messages": TASK["messages"] + turns, "stream": True})
    delta = check_grammar(events)
    assert delta["delta"]["stop_reason"] == "end_turn"
    assert "42" in texts(events)
    # the prompt of the second turn extends that of the first
    assert delta["usage"]["cache_read_input_tokens"] > delta["usage"]["input_tokens"]


@asynchronous
async def test_a_tool_that_was_asked_for_by_name_is_called_though_nothing_needs_it(engine: Path) -> None:
    body = TASK | {"messages": HI["messages"], "tool_choice": {"type": "tool", "name": "Read"}}
    async with speaking(engine) as adapter:
        events = await answer(adapter, body)
    assert [event.name for event in events if isinstance(event, ToolCall)] == ["Read"]
    assert isinstance(events[-1], Done)
    assert events[-1].reason == "tool_use"


@asynchronous
async def test_an_answer_that_was_asked_for_as_json_is_that_json(engine: Path) -> None:
    schema: Json = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    schema |= {"additionalProperties": False}
    asked = {"messages": [{"role": "user", "content": "A title for a talk on cats."}], "max_tokens": 60}
    async with speaking(engine) as adapter:
        request = replace(contract.parse(json.dumps(asked).encode()), schema=schema)
        said = "".join([event.text async for event in adapter.messages(request) if isinstance(event, Text)])
    assert json.loads(said).keys() == {"title"}


@asynchronous
async def test_a_prefill_goes_on_and_is_not_repeated(engine: Path) -> None:
    asked = [{"role": "user", "content": "Count from 1 to 6, digits and commas only."}]
    async with speaking(engine) as adapter:
        events = await answer(adapter, {"messages": [*asked, {"role": "assistant", "content": "1, 2, 3"}]})
    said = "".join(event.text for event in events if isinstance(event, Text))
    assert said.startswith(", 4")


@asynchronous
async def test_a_stop_sequence_is_named(engine: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "Count from 1 to 6, digits and commas only."}], "max_tokens": 30}
    async with speaking(engine) as adapter:
        events = await answer(adapter, asked | {"stop_sequences": ["7", "4"]})
        plain = await answer(adapter, asked | {"stop_sequences": ["seven"]})
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.reason, done.stop_sequence) == ("stop_sequence", "4")
    assert "3" in "".join(event.text for event in events if isinstance(event, Text))
    assert isinstance(plain[-1], Done)
    assert (plain[-1].reason, plain[-1].stop_sequence) == ("end_turn", None)


@asynchronous
async def test_the_count_is_the_prompt_that_is_then_used(engine: Path) -> None:
    async with speaking(engine) as adapter:
        for body in (HI, TASK):
            counted = await adapter.count(contract.parse(json.dumps(body).encode()))
            (prompt,) = [event for event in await answer(adapter, body) if isinstance(event, Prompt)]
            assert prompt.total == counted


@asynchronous
async def test_too_long_a_prompt_is_refused_in_the_words_that_make_claude_compact(engine: Path) -> None:
    async with speaking(engine) as adapter:
        with pytest.raises(ProxyError, match=r"^prompt is too long: (\d+) tokens > 2048 maximum$") as raised:
            await answer(adapter, {"messages": [{"role": "user", "content": "a " * 3 * CONTEXT}]})
    assert raised.value.status == 400


@asynchronous
async def test_an_image_for_a_model_that_cannot_see_is_a_400_with_the_reason(engine: Path) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    async with speaking(engine) as adapter:
        with pytest.raises(ProxyError, match="image input is not supported") as raised:
            await answer(adapter, {"messages": [{"role": "user", "content": [image]}]})
    assert raised.value.status == 400


@asynchronous
async def test_whoever_stops_listening_frees_the_slot(engine: Path, tmp_path: Path) -> None:
    story = {"messages": [{"role": "user", "content": "Write a very long story."}], "max_tokens": 1500}
    async with speaking(engine) as adapter, proxied(address(engine), tmp_path) as client:

        async def busy() -> bool:
            async with client.session.get(f"{address(engine)}/slots") as response:
                return any(slot["is_processing"] for slot in await response.json())

        async with aclosing(adapter.messages(contract.parse(json.dumps(story).encode()))) as events:
            async for event in events:
                if isinstance(event, Text):
                    break
            assert await busy()
        began = time.monotonic()
        while await busy():
            assert time.monotonic() < began + 1, "still generating a second later"
            await asyncio.sleep(0.02)
