"""The official Python SDK as a client of the engine side: it knows nothing of us, and must not have to."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from anthropic import (
    APIStatusError,
    AsyncAnthropic,
    AuthenticationError,
    BadRequestError,
    ContentTooLargeError,
    NotFoundError,
    OverloadedError,
)
from anthropic.types import Message

from selfhost_cli.proxy.answer import PROMPT_MS
from selfhost_cli.proxy.web import MAX_BODY
from tests.proxy.kit import HELLO, TOKEN, LlamaStub, asynchronous, call, ended, proxied, started, text
from tests.proxy.ollama_stub import OllamaStub, called, done, said

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"name": "weather", "description": "of a city", "input_schema": SCHEMA}
WHERE = {"city": "Zürich"}
ASK: Any = {"model": "claude-of-any-name", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
FULL = {"type": "exceed_context_size_error", "message": "too much", "n_prompt_tokens": 9009, "n_ctx": 8192}
REFUSAL: Any = (400, {"error": json.dumps({"error": FULL})})

HELLOS = {"llamacpp": LlamaStub, "ollama": OllamaStub}
CALLS = {
    "llamacpp": lambda: LlamaStub(
        [
            started(),
            *text("Let me look."),
            *call("weather", '{"city": "Zü', 'rich"}', index=1),
            *ended("tool_use", 7, 2),
        ]
    ),
    "ollama": lambda: OllamaStub(script=[*said("Let me", " look.")[:-1], called("weather", WHERE), done()]),
}
engines = pytest.mark.parametrize("engine", ["llamacpp", "ollama"])


@asynccontextmanager
async def client(stub: LlamaStub | None, run: Path, token: str = TOKEN) -> AsyncIterator[AsyncAnthropic]:
    """It asks once, so that what it raises is the first answer."""
    async with (
        proxied(stub, run) as proxy,
        AsyncAnthropic(auth_token=token, base_url=proxy.url, max_retries=0) as made,
    ):
        yield made


def without_ids(message: Message) -> Any:
    """Those of the message and its calls are made anew for every answer, and everything else is compared."""
    content = [block.model_dump(mode="json", exclude={"id"}) for block in message.content]
    told = message.model_dump(mode="json", include={"type", "role", "model", "stop_reason", "usage"})
    told["usage"].pop(PROMPT_MS, None)
    return told, content


@engines
@asynchronous
async def test_create_gives_a_whole_message_of_the_model_that_is_served(tmp_path: Path, engine: str) -> None:
    async with client(HELLOS[engine](), tmp_path) as anthropic:
        message = await anthropic.messages.create(**ASK)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Hello there"}]
    assert (message.model, message.role, message.stop_reason) == ("tiny", "assistant", "end_turn")
    assert message.usage.input_tokens == 20
    assert message.usage.output_tokens > 0
    assert message._request_id is not None
    assert message._request_id.startswith("req_")


@pytest.mark.parametrize("stubs", [HELLOS, CALLS], ids=["text", "call"])
@engines
@asynchronous
async def test_what_the_sdk_makes_of_a_stream_is_what_create_gives(tmp_path: Path, engine: str, stubs: Any) -> None:
    async with client(stubs[engine](), tmp_path) as anthropic:
        whole = await anthropic.messages.create(**ASK, tools=[WEATHER])
        async with anthropic.messages.stream(**ASK, tools=[WEATHER]) as stream:
            deltas = [event.text async for event in stream if event.type == "text"]
            streamed = await stream.get_final_message()
    assert without_ids(streamed) == without_ids(whole)
    assert "".join(deltas) == streamed.content[0].text  # type: ignore[union-attr]


@engines
@asynchronous
async def test_a_tool_goes_round_call_out_and_result_back_in(tmp_path: Path, engine: str) -> None:
    stub = CALLS[engine]()
    async with client(stub, tmp_path) as anthropic:
        first = await anthropic.messages.create(**ASK, tools=[WEATHER])
        use = first.content[-1]
        assert use.type == "tool_use"
        assert (first.stop_reason, use.name, use.input) == ("tool_use", "weather", WHERE)
        stub.script = HELLOS[engine]().script
        result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "rain"}]}
        turns: Any = [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = await anthropic.messages.create(**ASK | {"messages": ASK["messages"] + turns}, tools=[WEATHER])
    assert second.stop_reason == "end_turn"
    call_back, result_back = stub.asked[1]["messages"][-2:]
    if engine == "llamacpp":
        assert call_back["content"][-1] == {"type": "tool_use", "id": use.id, "name": "weather", "input": WHERE}
        assert result_back["content"] == [result | {"content": "rain"}]
    else:
        assert call_back["tool_calls"][0]["function"] == {"index": 0, "name": "weather", "arguments": WHERE}
        assert (result_back["role"], result_back["content"]) == ("tool", "rain")


@asynchronous
async def test_tokens_are_counted_by_the_engine_or_guessed(tmp_path: Path) -> None:
    ask = {"model": ASK["model"], "messages": ASK["messages"]}
    async with client(LlamaStub(tokens=1234), tmp_path) as anthropic:
        assert (await anthropic.messages.count_tokens(**ask)).input_tokens == 1234
    async with client(OllamaStub(), tmp_path) as anthropic:
        guess = (await anthropic.messages.count_tokens(**ask, system="word " * 1000)).input_tokens
    assert 500 < guess < 5000


@asynchronous
async def test_the_models_are_listed(tmp_path: Path) -> None:
    async with client(LlamaStub(), tmp_path) as anthropic:
        assert [model.id async for model in anthropic.models.list()] == ["tiny"]
        assert (await anthropic.models.retrieve("tiny")).id == "tiny"


# --- errors, as the SDK's own classes ---


def long_ago(words: int) -> Any:
    return ASK | {"messages": [{"role": "user", "content": "word " * words}]}


async def failure(stub: LlamaStub | None, run: Path, kind: type[APIStatusError], ask: Any = ASK) -> APIStatusError:
    async with client(stub, run) as anthropic:
        with pytest.raises(kind) as raised:
            await anthropic.messages.create(**ask)
    assert type(raised.value) is kind
    assert str(raised.value.request_id).startswith("req_")
    return raised.value


@asynchronous
async def test_a_wrong_token_is_an_authentication_error(tmp_path: Path) -> None:
    async with client(LlamaStub(), tmp_path, token="another") as anthropic:
        with pytest.raises(AuthenticationError) as raised:
            await anthropic.messages.create(**ASK)
    assert raised.value.type == "authentication_error"


@asynchronous
async def test_a_request_that_makes_no_sense_is_a_bad_request_that_says_why(tmp_path: Path) -> None:
    error = await failure(LlamaStub(), tmp_path, BadRequestError, ASK | {"messages": []})
    assert (error.type, error.api_message) == (
        "invalid_request_error",
        "messages: at least one message is required",
    )


@engines
@asynchronous
async def test_a_prompt_that_is_too_long_is_a_bad_request_with_both_numbers(tmp_path: Path, engine: str) -> None:
    stub = LlamaStub(tokens=9009, n_ctx=8192) if engine == "llamacpp" else OllamaStub(refusal=REFUSAL, n_ctx=8192)
    error = await failure(stub, tmp_path, BadRequestError, long_ago(9000))
    assert error.api_message == "prompt is too long: 9009 tokens > 8192 maximum"


@asynchronous
async def test_what_is_not_there_is_a_not_found_error(tmp_path: Path) -> None:
    async with client(LlamaStub(), tmp_path) as anthropic:
        with pytest.raises(NotFoundError) as raised:
            await anthropic.models.retrieve("claude-opus")
    assert raised.value.type == "not_found_error"


@asynchronous
async def test_a_body_beyond_the_limit_is_a_content_too_large_error(tmp_path: Path) -> None:
    error = await failure(LlamaStub(), tmp_path, ContentTooLargeError, long_ago(MAX_BODY // 5 + 1))
    assert error.type == "request_too_large"


@asynchronous
async def test_an_engine_that_is_not_up_is_an_overloaded_error_to_come_back_from(tmp_path: Path) -> None:
    error = await failure(None, tmp_path, OverloadedError)
    assert error.type == "overloaded_error"
    assert 1 <= int(error.response.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("stub", "kind", "says"),
    [
        (OllamaStub(refusal=REFUSAL), "invalid_request_error", "prompt is too long: 9009 tokens > 8192 maximum"),
        (LlamaStub([*HELLO[:3], "die"]), "api_error", "broke off"),
    ],
    ids=["too long", "dies"],
)
@asynchronous
async def test_a_failure_after_the_200_is_raised_out_of_the_stream(
    tmp_path: Path, stub: LlamaStub, kind: str, says: str
) -> None:
    async with client(stub, tmp_path) as anthropic:
        with pytest.raises(APIStatusError) as raised:
            async with anthropic.messages.stream(**ASK) as stream:
                await stream.get_final_message()
    assert raised.value.type == kind
    assert says in str(raised.value.api_message)
