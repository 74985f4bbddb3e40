"""What an engine tells in one go: whole, in order, in as few pieces as it came in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proxy.kit import (
    Json,
    LlamaStub,
    asynchronous,
    call,
    check_grammar,
    ended,
    proxied,
    started,
    text,
    types,
    wire,
)


def pieces(events: list[Json]) -> list[str]:
    return [event["delta"]["text"] for event in events if event.get("delta", {}).get("type") == "text_delta"]


@asynchronous
async def test_text_that_comes_in_one_go_leaves_in_one_piece(tmp_path: Path) -> None:
    burst = b"".join([started(), *text("Hel", "lo", " there"), *ended()])
    async with proxied(LlamaStub([burst]), tmp_path) as proxy:
        events = await proxy.stream()
    assert pieces(events) == ["Hello there"]
    check_grammar(events)


@asynchronous
async def test_text_keeps_its_place_before_a_call(tmp_path: Path) -> None:
    calls = call("Read", '{"file_path":', '"/tmp/a"}', index=1)
    burst = b"".join([started(), *text("Let me", " look."), *calls, *ended("tool_use", blocks=2)])
    async with proxied(LlamaStub([burst]), tmp_path) as proxy:
        events = await proxy.stream()
    check_grammar(events)
    assert pieces(events) == ["Let me look."]
    deltas = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert deltas == ["text_delta", "input_json_delta", "input_json_delta"]


ERROR = wire("error", error={"type": "api_error", "message": "the device is lost"})
NOT_JSON = b"event: content_block_delta\ndata: {\n\n"


@pytest.mark.parametrize("broken", [ERROR, NOT_JSON])
@asynchronous
async def test_what_was_said_before_an_error_in_the_same_go_is_told(tmp_path: Path, broken: bytes) -> None:
    burst = b"".join([started(), *text("Hel", "lo"), broken])
    async with proxied(LlamaStub([burst]), tmp_path) as proxy:
        events = await proxy.stream()
    assert types(events) == ["message_start", "content_block_start", "content_block_delta", "error"]
    assert pieces(events) == ["Hello"]
