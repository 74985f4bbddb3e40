"""Answers on their way through: llama.cpp's deviations go in, Anthropic's grammar comes out."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from selfhost_cli.proxy import server
from selfhost_cli.proxy.contract import Request
from selfhost_cli.proxy.engines import upstream
from selfhost_cli.proxy.engines.anthropic import AnthropicEngine
from tests.proxy.kit import (
    HELLO,
    HI,
    LOADING,
    READ,
    STREAM,
    Json,
    LlamaStub,
    Step,
    assert_error,
    asynchronous,
    call,
    check_grammar,
    ended,
    eventually,
    proxied,
    serving,
    started,
    streamed,
    text,
    texts,
    types,
)
from tests.proxy.ollama_stub import OllamaStub


@asynchronous
async def test_overlapping_blocks_leave_one_after_the_other_with_fresh_ids_and_full_usage(tmp_path: Path) -> None:
    stub = LlamaStub(
        [
            b":\n\n",
            started(uncached=5, cached=15),
            *text("\n", "Let me look."),
            *call("Read", '{"file_path":', '"/tmp/a"}', index=1),
            *call("Read", '{"file_path":"/tmp/b"}', index=2),
            *ended("tool_use", tokens=33, blocks=3),
        ]
    )
    async with proxied(stub, tmp_path) as proxy:
        events = await proxy.stream()
        again = await proxy.stream()
    delta = check_grammar(events)
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    usage = delta["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (5, 15, 33)
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in blocks] == ["text", "tool_use", "tool_use"]
    ids = [event["message"]["id"] for run in (events, again) for event in run if event["type"] == "message_start"]
    ids += [block["id"] for block in blocks[1:]]
    assert len(set(ids)) == 4
    assert events[0]["message"]["model"] == "tiny"


@asynchronous
async def test_without_stream_the_same_answer_comes_whole(tmp_path: Path) -> None:
    stub = LlamaStub([started(4, 6), *text("Hm. "), *call("Read", '{"a":', "[1]}", index=1), *ended("tool_use", 9, 2)])
    async with proxied(stub, tmp_path) as proxy:
        status, message, headers = await proxy.answer()
    assert status == 200
    said, used = message["content"]
    assert said == {"type": "text", "text": "Hm. "}
    assert (used["name"], used["input"], used["id"][:6]) == ("Read", {"a": [1]}, "toolu_")
    assert message["stop_reason"] == "tool_use"
    assert (message["usage"]["input_tokens"], message["usage"]["cache_read_input_tokens"]) == (4, 6)
    assert headers["request-id"].startswith("req_")


@asynchronous
async def test_a_socket_closed_after_every_stream_is_never_noticed(tmp_path: Path) -> None:
    async with proxied(LlamaStub(), tmp_path) as proxy:
        for _ in range(10):
            assert texts(await proxy.stream()) == "Hello there"


@asynchronous
async def test_a_stop_sequence_is_the_stop_reason_even_when_nothing_came_before_it(tmp_path: Path) -> None:
    stub = LlamaStub([started(), *text("no"), *ended("end_turn", sequence="</block>")])
    async with proxied(stub, tmp_path) as proxy:
        delta = check_grammar(await proxy.stream())
        assert delta["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "</block>"}
        stub.script = [started(), *ended("end_turn", sequence="</block>", blocks=0)]
        delta = check_grammar(await proxy.stream())
        assert delta["delta"]["stop_reason"] == "stop_sequence"


@asynchronous
async def test_a_call_without_arguments_has_an_empty_object_as_input(tmp_path: Path) -> None:
    stub = LlamaStub([started(), *call("Now"), *ended("tool_use")])
    async with proxied(stub, tmp_path) as proxy:
        events = await proxy.stream()
        _, message, _ = await proxy.answer()
    check_grammar(events)
    assert [e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta"] == ["{}"]
    assert message["content"][0]["input"] == {}


@asynchronous
async def test_a_repeated_prefill_is_taken_off_the_answer(tmp_path: Path) -> None:
    stub = LlamaStub([started(), *text("1,", " 2, 3", ", 4"), *ended()])
    body = {"messages": [*HI["messages"], {"role": "assistant", "content": "1, 2"}], "stream": True}
    async with proxied(stub, tmp_path) as proxy:
        assert texts(await proxy.stream(body)) == ", 3, 4"
        stub.script = [started(), *text("1,", " 5"), *ended()]
        assert texts(await proxy.stream(body)) == "1, 5"


@pytest.mark.parametrize("cut", [ended("max_tokens"), [*call("Read", "{}", index=1), *ended("tool_use", blocks=2)]])
@asynchronous
async def test_what_only_began_like_the_prefill_is_not_lost_at_the_end(tmp_path: Path, cut: list[Step]) -> None:
    stub = LlamaStub([started(), *text("1,"), *cut])
    body = {"messages": [*HI["messages"], {"role": "assistant", "content": "1, 2"}], "stream": True}
    async with proxied(stub, tmp_path) as proxy:
        events = await proxy.stream(body)
    check_grammar(events)
    assert texts(events) == "1,"


@pytest.mark.parametrize("said", [[], text(""), text("\n", "  ")], ids=["no block", "empty text", "blanks"])
@asynchronous
async def test_tokens_without_content_are_an_error_and_not_an_empty_answer(tmp_path: Path, said: list[bytes]) -> None:
    stub = LlamaStub([started(), *said, *ended(tokens=23, blocks=bool(said))])
    async with proxied(stub, tmp_path) as proxy:
        events = await proxy.stream()
        assert types(events) == ["error"]
        assert "23 tokens" in events[0]["error"]["message"]
        status, body, headers = await proxy.answer()
        assert_error(status, body, 400, "api_error")
        assert headers["x-should-retry"] == "false"


@asynchronous
async def test_a_call_cut_off_by_max_tokens_is_never_given_out_whole(tmp_path: Path) -> None:
    cut = call("Write", '{"content": "half', index=1)
    stub = LlamaStub([started(), *text("Writing."), *cut, *ended("max_tokens", blocks=2)])
    async with proxied(stub, tmp_path) as proxy:
        status, message, _ = await proxy.answer()
        assert (status, message["content"]) == (200, [{"type": "text", "text": "Writing."}])
        stub.script = [started(), *call("Write", '{"content": "half'), *ended("max_tokens")]
        status, body, _ = await proxy.answer()
        assert "cut off" in assert_error(status, body, 400, "api_error")


# --- what the engine is asked ---


async def asked(request: Request) -> Json:
    """The body that an engine of Anthropic's dialect gets for it."""
    stub = LlamaStub()
    async with serving(stub.application()) as url:
        engine = AnthropicEngine("llamacpp", "tiny", lambda: url)
        async for _ in engine.messages(request):
            pass
        await engine.close()
    return stub.asked[0]


@asynchronous
async def test_results_go_out_in_the_shape_of_the_api_with_their_images_and_failures() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    hint = {"type": "text", "text": "go on"}
    results: list[Json] = [
        {"type": "tool_result", "tool_use_id": "a", "content": "seen", "images": [image]},
        {"type": "tool_result", "tool_use_id": "b", "content": "", "images": [image]},
        {"type": "tool_result", "tool_use_id": "c", "content": "no such file", "is_error": True},
    ]
    body = await asked(Request([{"role": "user", "content": [*results, hint, image]}]))
    told = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "seen"}, image]},
        {"type": "tool_result", "tool_use_id": "b", "content": [image]},
        results[2],
    ]
    assert body["messages"] == [{"role": "user", "content": told}, {"role": "user", "content": [hint, image]}]


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        ({}, {}),
        (
            {"thinking": True, "max_tokens": 5000},
            {
                "thinking": {"type": "enabled", "budget_tokens": 4999},
                "chat_template_kwargs": {"enable_thinking": True},
            },
        ),
        ({"thinking": True, "max_tokens": 1024}, {"chat_template_kwargs": {"enable_thinking": True}}),
        (
            {"thinking": False},
            {"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": False}},
        ),
        (
            {"effort": "max"},
            {"output_config": {"effort": "max"}, "chat_template_kwargs": {"reasoning_effort": "high"}},
        ),
    ],
)
@asynchronous
async def test_thinking_and_effort_go_out_in_the_words_of_the_api(request_: Json, fields: Json) -> None:
    body = await asked(Request([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], **request_))
    assert {key: body[key] for key in body if key not in ("model", "max_tokens", "messages", "stream")} == fields


@asynchronous
async def test_a_prefilled_answer_is_past_its_thoughts() -> None:
    prefilled = [{"role": role, "content": [{"type": "text", "text": "hi"}]} for role in ("user", "assistant")]
    body = await asked(Request(prefilled, thinking=True, max_tokens=5000))
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "thinking" not in body


# --- failures ---


@asynchronous
async def test_an_engine_that_dies_in_the_middle_ends_in_an_error_event(tmp_path: Path) -> None:
    stub = LlamaStub([started(), *text("Hel"), "die"])
    async with proxied(stub, tmp_path) as proxy:
        events = await proxy.stream()
        assert texts(events) == "Hel"
        assert events[-1]["error"]["type"] == "api_error"
        assert "message_stop" not in types(events)
        status, body, _ = await proxy.answer()
        assert_error(status, body, 500, "api_error")


@asynchronous
async def test_an_engine_that_dies_before_its_first_word_is_worth_another_try(tmp_path: Path) -> None:
    async with proxied(LlamaStub([started(), "die"]), tmp_path) as proxy:
        events = await proxy.stream()
    assert types(events) == ["error"]
    assert events[0]["error"]["type"] == "overloaded_error"


@asynchronous
async def test_a_clean_end_in_the_middle_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    async with proxied(LlamaStub([started(), *text("Hel")]), tmp_path) as proxy:
        assert (await proxy.stream())[-1]["error"]["type"] == "api_error"


@asynchronous
async def test_an_error_in_the_stream_is_passed_on_as_one(tmp_path: Path) -> None:
    error = {"error": {"code": 500, "message": "out of memory", "type": "server_error"}}
    stub = LlamaStub([started(), *text("Hel"), f"data: {json.dumps(error)}\n\n".encode()])
    async with proxied(stub, tmp_path) as proxy:
        events = await proxy.stream()
    assert "out of memory" in events[-1]["error"]["message"]


@asynchronous
async def test_a_permanent_500_becomes_a_400_with_its_reason(tmp_path: Path) -> None:
    refusal = {"error": {"code": 500, "message": "image input is not supported", "type": "server_error"}}
    async with proxied(LlamaStub(refusal=(500, refusal)), tmp_path) as proxy:
        status, body, _ = await proxy.answer()
        assert "image input is not supported" in assert_error(status, body, 400, "invalid_request_error")
        events = await proxy.stream()
        assert events[0]["error"]["type"] == "invalid_request_error"


@asynchronous
async def test_a_loading_engine_is_overloaded_and_says_when_to_come_back(tmp_path: Path) -> None:
    async with proxied(LlamaStub(refusal=(503, LOADING)), tmp_path) as proxy:
        status, body, headers = await proxy.answer()
    assert_error(status, body, 529, "overloaded_error")
    assert 1 <= int(headers["retry-after"]) <= 60


@pytest.mark.parametrize("known", [False, True])
@asynchronous
async def test_a_stream_waits_behind_pings_while_the_model_loads(tmp_path: Path, known: bool) -> None:
    """Refused, Claude Code would give up after 80 seconds; `known`: the engine answered before, and was restarted."""
    stub = LlamaStub() if known else OllamaStub(loaded="")
    async with proxied(stub, tmp_path, ping_every=0.02) as proxy:
        if known:
            stub.refusal = (503, LOADING)
        async with proxy.post(STREAM) as response:
            assert await response.content.readline() == b"event: ping\n"
            stub.refusal = None
            if isinstance(stub, OllamaStub):
                stub.loaded = "tiny:latest"
            events = [event async for event in streamed(response.content.iter_any())]
    assert texts(events) == "Hello there"


@asynchronous
async def test_who_waits_for_the_model_holds_no_slot(tmp_path: Path) -> None:
    """Else who wants no stream, and is told at once to come back, would wait behind it."""
    stub = LlamaStub()
    async with proxied(stub, tmp_path) as proxy, asyncio.timeout(10):
        stub.refusal = (503, LOADING)
        async with proxy.post(STREAM) as waiting:
            await eventually(lambda: bool(stub.asked))
            status, body, _ = await proxy.answer()
            assert_error(status, body, 529, "overloaded_error")
            stub.refusal = None
            assert b"message_stop" in await waiting.read()


@asynchronous
async def test_waits_for_the_model_do_not_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LOADING_S", 1.0)
    stub = LlamaStub()
    async with proxied(stub, tmp_path) as proxy:
        stub.refusal = (503, LOADING)
        began = time.monotonic()
        ends = await asyncio.gather(*(proxy.stream() for _ in range(5)))
    assert [end[-1]["error"]["type"] for end in ends] == ["overloaded_error"] * 5
    assert 1 <= time.monotonic() - began < 3


@dataclass
class LoadingStub(LlamaStub):
    """Knows its context while it loads, and counts nothing."""

    loading: bool = False

    async def _count(self, http: web.Request) -> web.Response:
        return web.json_response(LOADING, status=503) if self.loading else await super()._count(http)


@asynchronous
async def test_a_prompt_that_could_not_be_counted_while_the_model_loaded_is_counted_then(tmp_path: Path) -> None:
    stub = LoadingStub(tokens=9009, n_ctx=8192)
    long = {"messages": [{"role": "user", "content": "word " * 9000}]}
    async with proxied(stub, tmp_path, ping_every=0.02) as proxy:
        stub.loading = True
        async with proxy.post(STREAM | long) as response:
            assert await response.content.readline() == b"event: ping\n"
            stub.loading = False
            last = [event async for event in streamed(response.content.iter_any())][-1]
    assert last["error"]["message"] == "prompt is too long: 9009 tokens > 8192 maximum"
    assert stub.asked == []


@pytest.mark.parametrize("port", [None, "1"], ids=["not started", "refuses"])
@asynchronous
async def test_an_engine_that_is_down_is_a_status_and_not_a_stream(tmp_path: Path, port: str | None) -> None:
    if port:
        (tmp_path / "engine.port").write_text(port)
    async with proxied(None, tmp_path) as proxy:
        for body in (HI, STREAM):
            status, error, headers = await proxy.answer(body)
            assert_error(status, error, 529, "overloaded_error")
            assert 1 <= int(headers["retry-after"]) <= 60


@asynchronous
async def test_a_prompt_that_is_too_long_is_refused_before_the_stream(tmp_path: Path) -> None:
    stub = LlamaStub(tokens=9009, n_ctx=8192)
    long = {"messages": [{"role": "user", "content": "word " * 9000}]}
    async with proxied(stub, tmp_path) as proxy:
        for body in (HI | long, STREAM | long):
            status, error, _ = await proxy.answer(body)
            message = assert_error(status, error, 400, "invalid_request_error")
            assert message == "prompt is too long: 9009 tokens > 8192 maximum"
    assert stub.asked == []


@asynchronous
async def test_it_is_counted_only_when_a_cheap_bound_does_not_fit(tmp_path: Path) -> None:
    stub = LlamaStub(tokens=2000, n_ctx=8192)
    turns = [{"role": "user", "content": "word " * 1800}]
    async with proxied(stub, tmp_path) as proxy:
        await proxy.answer()
        assert stub.counted == 0
        await proxy.answer({"max_tokens": 9, "messages": turns})
        assert stub.counted == 1
        turns += [{"role": "assistant", "content": "Fine."}, {"role": "user", "content": "And now?"}]
        await proxy.answer({"max_tokens": 9, "messages": turns})
        assert stub.counted == 1, "the answer before told how long its beginning is"


@asynchronous
async def test_too_long_found_by_the_engine_only_is_worded_alike(tmp_path: Path) -> None:
    overflow = {"type": "exceed_context_size_error", "n_prompt_tokens": 4096, "n_ctx": 4096, "message": "request …"}
    async with proxied(LlamaStub(refusal=(400, {"error": overflow})), tmp_path) as proxy:
        status, error, _ = await proxy.answer()
        message = assert_error(status, error, 400, "invalid_request_error")
        assert message == "prompt is too long: 4096 tokens > 4095 maximum"
        assert (await proxy.stream())[0]["error"]["message"] == message


@dataclass
class HaltingLlama(LlamaStub):
    """Refuses in two pieces; `whole`: the second comes."""

    whole: bool = True

    async def _messages(self, http: web.Request) -> web.StreamResponse:
        await http.read()
        return await self._halting(http)

    async def _halting(self, http: web.Request) -> web.StreamResponse:
        assert self.refusal
        raw = json.dumps(self.refusal[1]).encode()
        response = web.StreamResponse(status=self.refusal[0])
        await response.prepare(http)
        await response.write(raw[:20])
        await asyncio.sleep(0.05)
        if self.whole:
            await response.write(raw[20:])
        else:
            await asyncio.Event().wait()
        return response


@dataclass
class HaltingOllama(HaltingLlama, OllamaStub):
    async def _chat(self, http: web.Request) -> web.StreamResponse:
        return await self._halting(http)


@pytest.mark.parametrize("kind", [HaltingLlama, HaltingOllama])
@asynchronous
async def test_a_refusal_is_read_to_its_end(tmp_path: Path, kind: type[HaltingLlama]) -> None:
    overflow = {"type": "exceed_context_size_error", "n_prompt_tokens": 5000, "n_ctx": 4096, "message": "request …"}
    async with proxied(kind(refusal=(400, {"error": overflow})), tmp_path) as proxy:
        status, error, _ = await proxy.answer()
    message = assert_error(status, error, 400, "invalid_request_error")
    assert message == "prompt is too long: 5000 tokens > 4096 maximum"


@asynchronous
async def test_a_refusal_without_an_end_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "REFUSAL_S", 0.3)
    stub = HaltingLlama(refusal=(400, {"error": {"message": "no"}}), whole=False)
    async with proxied(stub, tmp_path) as proxy, asyncio.timeout(10):
        status, error, _ = await proxy.answer()
    assert '{"error": {"message"' in assert_error(status, error, 400, "invalid_request_error")


# --- time ---


@asynchronous
async def test_pings_fill_the_silence_before_the_first_word_and_inside_the_answer(tmp_path: Path) -> None:
    first, second = asyncio.Event(), asyncio.Event()
    stub = LlamaStub([first, started(), *text("Hel"), second, *ended()])
    seen: list[str] = []
    async with proxied(stub, tmp_path, ping_every=0.02) as proxy, proxy.post(STREAM) as response:
        assert response.status == 200
        async for line in response.content:
            if not line.startswith(b"event: "):
                continue
            seen.append(line.split()[1].decode())
            if seen[-2:] == ["ping", "ping"]:
                (second if "content_block_delta" in seen else first).set()
    assert seen[:2] == ["ping", "ping"]
    told = [name for name in seen if name != "ping"]
    assert told[:3] == ["message_start", "content_block_start", "content_block_delta"]
    assert seen[seen.index("content_block_delta") + 1] == "ping"
    assert told[-1] == "message_stop"


@asynchronous
async def test_a_queued_request_gets_pings_and_its_turn_when_the_one_before_is_done(tmp_path: Path) -> None:
    hold = asyncio.Event()
    stub = LlamaStub([hold, *HELLO])
    async with proxied(stub, tmp_path, ping_every=0.02) as proxy:
        before = asyncio.create_task(proxy.stream())
        await eventually(lambda: stub.running == 1)
        async with proxy.post(STREAM) as queued:
            assert await queued.content.readline() == b"event: ping\n"
            assert stub.running == 1
            hold.set()
            assert b"message_stop" in await queued.content.read()
        assert texts(await before) == "Hello there"


@asynchronous
async def test_a_full_queue_is_refused_with_a_time_to_come_back(tmp_path: Path) -> None:
    hold = asyncio.Event()
    stub = LlamaStub([hold, *HELLO])
    async with proxied(stub, tmp_path) as proxy:
        answers = [await proxy.post(STREAM) for _ in range(33)]
        status, body, headers = await proxy.answer()
        assert_error(status, body, 529, "overloaded_error")
        assert headers["retry-after"] == "5"
        hold.set()
        for answer in answers:
            assert b"message_stop" in await answer.read()


@pytest.mark.parametrize("body", [STREAM, HI], ids=["stream", "whole"])
@asynchronous
async def test_a_client_that_is_gone_ends_the_generation_and_frees_the_slot(tmp_path: Path, body: Any) -> None:
    stub = LlamaStub([started(), *text("Hel"), asyncio.Event()])
    async with proxied(stub, tmp_path) as proxy:
        asking = asyncio.create_task(proxy.answer(body) if body is HI else proxy.stream(body))
        await eventually(lambda: stub.running == 1)
        asking.cancel()
        await eventually(lambda: stub.gone == 1 and stub.running == 0, seconds=1)
        stub.script = list(HELLO)
        assert texts(await proxy.stream()) == "Hello there"


@asynchronous
async def test_a_client_that_is_gone_while_queued_is_never_generated_for(tmp_path: Path) -> None:
    hold = asyncio.Event()
    stub = LlamaStub([hold, *HELLO])
    async with proxied(stub, tmp_path, ping_every=0.02) as proxy:
        before = asyncio.create_task(proxy.stream())
        await eventually(lambda: stub.running == 1)
        async with proxy.post(STREAM) as queued:
            await queued.content.readline()
        hold.set()
        await before
        assert texts(await proxy.stream(STREAM | {"tools": [READ]})) == "Hello there"
    assert len(stub.asked) == 2
