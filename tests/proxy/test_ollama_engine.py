"""The engine side before Ollama's manners; before the real one: tests/ollama."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proxy.kit import (
    HI,
    OllamaStub,
    Step,
    assert_error,
    asynchronous,
    check_grammar,
    ended,
    proxied,
    started,
    text,
    texts,
    wire,
)


@asynchronous
async def test_health_says_what_ollama_says_of_itself_and_of_the_model(tmp_path: Path) -> None:
    stub = OllamaStub(n_ctx=8192)
    async with proxied(stub, tmp_path) as proxy:
        for _ in range(3):
            async with proxy.get("/health") as response:
                health = await response.json()
    assert (response.status, health["engine"], health["context"]) == (200, "ollama", 8192)
    assert health["components"]["ollama"] == {
        "status": "healthy",
        "context": 8192,
        "slots": 1,
        "version": "0.34.0",
        "size": 1000,
        "size_vram": 900,
        "capabilities": ["completion", "tools"],
        "parameters": "494.03M",
        "quantization": "Q4_K_M",
    }
    assert stub.shown == 1


@pytest.mark.parametrize("loaded", ["", "other:latest", "tiny:7b"])
def test_it_is_down_while_the_model_is_not_loaded(loaded: str, tmp_path: Path) -> None:
    @asynchronous
    async def look() -> None:
        async with proxied(OllamaStub(loaded=loaded), tmp_path) as proxy, proxy.get("/health") as response:
            health = await response.json()
        assert response.status == 503
        assert "tiny is not loaded" in health["components"]["ollama"]["reason"]

    look()


@asynchronous
async def test_the_prompt_is_counted_by_what_it_says_at_the_end(tmp_path: Path) -> None:
    end = {"input_tokens": 12, "cache_read_input_tokens": 30, "output_tokens": 7}
    delta = wire("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage=end)
    script: list[Step] = [started(99), *text("Hello"), wire("content_block_stop", index=0), delta, wire("message_stop")]
    async with proxied(OllamaStub(script=script), tmp_path) as proxy:
        events = await proxy.stream()
        async with proxy.get("/health") as response:
            used = (await response.json())["usage"]
    assert check_grammar(events)["usage"] == end | {"cache_creation_input_tokens": 0}
    assert used == {"requests": 1, "input_tokens": 42, "output_tokens": 7}


@asynchronous
async def test_it_cannot_count(tmp_path: Path) -> None:
    async with (
        proxied(OllamaStub(), tmp_path) as proxy,
        proxy.post(HI, "/v1/messages/count_tokens") as response,
    ):
        assert_error(response.status, await response.json(), 404, "not_found_error")


@asynchronous
async def test_a_stream_that_just_stops_is_an_error_and_no_silence(tmp_path: Path) -> None:
    """As after some thirty equal tokens: no message_delta, no message_stop."""
    async with proxied(OllamaStub(script=[started(), *text("no", " no", " no")]), tmp_path) as proxy:
        events = await proxy.stream()
    assert texts(events) == "no no no"
    assert events[-1]["type"] == "error"


@asynchronous
async def test_tokens_without_an_answer_are_an_error(tmp_path: Path) -> None:
    """As when Ollama's parser swallows the call of a tool that it does not know."""
    async with proxied(OllamaStub(script=[started(), *ended(tokens=23, blocks=0)]), tmp_path) as proxy:
        status, body, _ = await proxy.answer()
    assert status >= 400, body
    assert "23" in body["error"]["message"]
