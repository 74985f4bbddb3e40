"""The adapter for OpenAI's API: what it asks, what it makes of answers and refusals, in the dialects that are met."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.proxy import contract
from selfhost_cli.proxy.contract import Request
from selfhost_cli.proxy.engines import AnswerEvent, Done, Prompt, Text, Thinking, ToolCall, ToolInput
from selfhost_cli.proxy.engines.openai import DIALECTS, VLLM
from selfhost_cli.proxy.errors import EngineBroke, EngineDown, ProxyError
from tests.proxy.kit import HI, READ, STREAM, Json, Step, asynchronous, check_grammar, eventually, serving, texts
from tests.proxy.openai_stub import (
    HELLO,
    KEY,
    OpenAIStub,
    answer,
    call,
    chunk,
    ended,
    engine_on,
    proxied,
    sent,
    words,
)

PIXEL = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
SCHEMA = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}


def user(*blocks: Json) -> Json:
    return {"role": "user", "content": list(blocks)}


def text(said: str) -> Json:
    return {"type": "text", "text": said}


async def asked(request: Request, owner: str = "vllm", **options: Any) -> Json:
    """The body that an engine of that kind gets for it."""
    stub = OpenAIStub(owner=owner)
    async with engine_on(stub, **options) as engine:
        async for _ in engine.messages(request):
            pass
    return stub.asked[0]


async def told(script: list[Step], **body: Any) -> list[AnswerEvent]:
    async with engine_on(OpenAIStub(script)) as engine:
        return await answer(engine, HI | body)


async def refused(*refusals: tuple[int, Any], **stub: Any) -> ProxyError:
    async with engine_on(OpenAIStub(refusals=list(refusals), **stub), context=4096) as engine:
        with pytest.raises(ProxyError) as raised:
            await answer(engine, HI)
    return raised.value


# --- what it asks ---


@asynchronous
async def test_a_conversation_is_told_in_the_roles_of_the_api() -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "/ä"}}
    failed = {"type": "tool_use", "id": "toolu_2", "name": "Read", "input": {}}
    results: list[Json] = [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "seen", "images": [PIXEL]},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such file", "is_error": True},
    ]
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    messages = [
        user(text("look"), text("here")),
        {"role": "assistant", "content": [thought, text("Reading."), use, failed]},
        user(*results, text("go on")),
    ]
    body = await asked(Request(messages, system="Be brief."))
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "look\n\nhere"},
        {
            "role": "assistant",
            "content": "Reading.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "Read", "arguments": '{"file_path": "/ä"}'},
                },
                {"id": "toolu_2", "type": "function", "function": {"name": "Read", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "seen"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "The tool failed:\nno such file"},
        {"role": "user", "content": [text("The images that the tools returned:"), URL, text("go on")]},
    ]


@pytest.mark.parametrize(("owner", "known"), [("llamacpp", True), ("vllm", False), ("sglang", False), ("x", False)])
@asynchronous
async def test_the_assistants_thoughts_go_back_where_the_api_has_a_place_for_them(owner: str, known: bool) -> None:
    thoughts = [{"type": "thinking", "thinking": said, "signature": ""} for said in ("hm", " so")]
    turns = [user(text("a")), {"role": "assistant", "content": [*thoughts, text("b")]}, user(text("c"))]
    body = await asked(Request(turns), owner, context=4096)
    assert body["messages"][1] == {"role": "assistant", "content": "b"} | (
        {"reasoning_content": "hm so"} if known else {}
    )


@asynchronous
async def test_the_conversation_so_far_is_told_alike_in_every_turn() -> None:
    turns = [user(text("a")), {"role": "assistant", "content": [text("b")]}, user(PIXEL, text("c"))]
    bodies = [(await asked(Request(turns[:length], system="s")))["messages"] for length in (1, 3)]
    assert bodies[1][: len(bodies[0])] == bodies[0]


@asynchronous
async def test_an_image_stays_where_it_was_among_the_text() -> None:
    body = await asked(Request([user(text("before"), PIXEL, text("after"))]))
    assert body["messages"] == [{"role": "user", "content": [text("before"), URL, text("after")]}]


@pytest.mark.parametrize(
    ("tools", "force", "choice"),
    [
        (2, False, "auto"),
        (2, True, "required"),
        (1, True, {"type": "function", "function": {"name": "Read"}}),
        (0, True, None),
    ],
)
@asynchronous
async def test_tools_and_the_choice_of_them_pass(tools: int, force: bool, choice: Any) -> None:
    offered = [READ, READ | {"name": "Write"}][:tools]
    body = await asked(Request([user(text("hi"))], tools=offered, force_tool=force))
    assert body.get("tool_choice") == choice
    assert [tool["function"]["name"] for tool in body.get("tools", [])] == [tool["name"] for tool in offered]
    if tools:
        function = {"name": "Read", "description": "d", "parameters": {"type": "object"}}
        assert body["tools"][0] == {"type": "function", "function": function}


@pytest.mark.parametrize(
    ("owner", "force", "choice"), [("llamacpp", False, "none"), ("llamacpp", True, "required"), ("vllm", False, "auto")]
)
@asynchronous
async def test_a_grammar_of_the_listed_tools_is_not_put_over_a_call_to_a_deferred_one(
    owner: str, force: bool, choice: str
) -> None:
    offered, late = [READ, READ | {"name": "Write"}], {"Late": READ | {"name": "Late"}}
    body = await asked(Request([user(text("hi"))], tools=offered, deferred=late, force_tool=force), owner)
    assert [tool["function"]["name"] for tool in body["tools"]] == ["Read", "Write"]
    assert body["tool_choice"] == choice


@pytest.mark.parametrize(
    ("offered", "late", "held"), [([], {}, True), ([READ], {}, False), ([], {"Late": READ | {"name": "Late"}}, False)]
)
@asynchronous
async def test_the_grammar_of_a_schema_is_not_put_over_a_call(
    offered: list[Json], late: dict[str, Json], held: bool
) -> None:
    async with engine_on(OpenAIStub()) as engine:
        assert engine.forms(Request([user(text("hi"))], tools=offered, deferred=late, schema=SCHEMA)) is held


@asynchronous
async def test_sampling_schema_and_thinking_pass_in_the_words_of_the_api() -> None:
    sampling = {"temperature": 0, "top_p": 0.5, "top_k": 7, "stop_sequences": ["</x>"]}
    request = Request([user(text("hi"))], sampling=sampling, max_tokens=99, schema=SCHEMA, thinking=False, effort="max")
    body = await asked(request)
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["top_k"]) == (99, 0, 0.5, 7)
    assert body["stop"] == ["</x>"]
    assert body["response_format"]["json_schema"] == {"name": "answer", "schema": SCHEMA, "strict": True}
    assert body["chat_template_kwargs"] == {"enable_thinking": False, "reasoning_effort": "high"}
    assert body["reasoning_effort"] == "high"
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


@pytest.mark.parametrize(
    ("owner", "stops", "asks"), [("llamacpp", ["x"], True), ("llamacpp", [], False), ("vllm", ["x"], False)]
)
@asynchronous
async def test_llamacpp_is_asked_which_stop_sequence_it_met(owner: str, stops: list[str], asks: bool) -> None:
    body = await asked(Request([user(text("hi"))], sampling={"stop_sequences": stops} if stops else {}), owner)
    assert (body.get("verbose"), body.get("response_fields")) == ((True, ["stopping_word"]) if asks else (None, None))


@asynchronous
async def test_an_api_that_may_refuse_what_it_does_not_know_gets_only_what_all_know() -> None:
    request = Request([user(text("hi"))], sampling={"top_k": 7}, thinking=True, effort="high")
    body = await asked(request, "Cerebras", context=65536, extra={"seed": 1})
    assert body.keys() == {"model", "messages", "max_tokens", "stream", "stream_options", "seed"}


@asynchronous
async def test_a_given_dialect_counts_more_than_the_name_of_the_owner() -> None:
    body = await asked(Request([user(text("hi"))], sampling={"top_k": 7}), "runpod", context=4096, dialect=VLLM)
    assert body["top_k"] == 7


@pytest.mark.parametrize(("owner", "resumed"), [("vllm", True), ("sglang", True), ("llamacpp", False), ("x", False)])
@asynchronous
async def test_a_prefill_is_resumed_in_the_way_of_each_and_never_repeated(owner: str, resumed: bool) -> None:
    repeated = [] if resumed else ["1,", " 2"]
    stub = OpenAIStub([*words(*repeated, ", 3"), *ended()], owner=owner)
    body = HI | {"messages": [*HI["messages"], {"role": "assistant", "content": "1, 2"}]}
    body |= {"thinking": {"type": "adaptive"}}
    async with engine_on(stub, context=4096) as engine:
        assert said(await answer(engine, body)) == ", 3"
        stub.script = [*words("1, 2"), *ended()]
        # those that resume do not repeat: what looks like it is the model's own
        assert said(await answer(engine, body)) == ("1, 2" if resumed else "")
        stub.script = [*words("1,"), *ended()]
        assert said(await answer(engine, body)) == "1,"
    assert stub.asked[0].get("continue_final_message", False) is resumed
    assert stub.asked[0].get("chat_template_kwargs", {}).get("enable_thinking", False) is False
    assert stub.asked[0]["messages"][-1] == {"role": "assistant", "content": "1, 2"}


# --- what it hears ---


def said(events: list[AnswerEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def calls(events: list[AnswerEvent]) -> list[tuple[str, Any]]:
    """Name and input of each; the pieces of one must not be torn apart."""
    whole: list[list[str]] = []
    for event in events:
        if isinstance(event, ToolCall):
            whole.append([event.name, ""])
        if isinstance(event, ToolInput):
            whole[-1][1] += event.json
    return [(name, json.loads(given or "{}")) for name, given in whole]


@asynchronous
async def test_words_thoughts_and_counts_come_as_they_are_told() -> None:
    thoughts = [
        chunk({"reasoning_content": "hm"}),
        chunk({"reasoning": " so"}),
        chunk({"content": "", "reasoning": ""}),
    ]
    events = await told([b": keep-alive\n\n", *thoughts, *words("Hello"), *ended(prompt=30, cached=24, output=9)])
    assert events == [
        Thinking("hm"),
        Thinking(" so"),
        Text("Hello"),
        Prompt(30, 24),
        Done("end_turn", 9),
    ]


@asynchronous
async def test_usage_beside_the_last_choice_is_heard_and_nulls_are_none() -> None:
    usage = {"prompt_tokens": 8, "completion_tokens": 2, "prompt_tokens_details": None}
    choice = {"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}
    first = {"choices": [{"index": 0, "delta": {"role": "assistant"}}], "usage": None}
    assert await told([sent(first), sent({"choices": [choice], "usage": usage})]) == [
        Text("hi"),
        Prompt(8, 0),
        Done("end_turn", 2),
    ]


@pytest.mark.parametrize(
    "deltas",
    [
        [call(0, "Read", "", "a"), call(0, None, '{"x"'), call(0, None, ": 1}"), call(1, "Write", "{}", "b")],
        [call(0, "Read", '{"x": 1}'), call(1, "Write")],
        [call(0, "Read", '{"x": 1}', "a"), call(0, "Write", "{}", "b")],
        [call(0, "Read", '{"x"', "a"), call(0, "Read", ": 1}", "a"), call(1, "Write", "{}", "b")],
        [call(None, "Read", '{"x": 1}'), call(None, "Write", "{}")],
        [call(0, "Read", {"x": 1}), chunk({"content": ""}), call(1, "Write", {})],
        [
            chunk(
                {
                    "tool_calls": [
                        {"index": 0, "id": "a", "function": {"name": "Read", "arguments": '{"x": 1}'}},
                        {"index": 1, "id": "b", "function": {"name": "Write", "arguments": "{}"}},
                    ]
                }
            )
        ],
        [
            chunk(
                {
                    "tool_calls": [
                        {"function": {"name": "Read", "arguments": '{"x": 1}'}},
                        {"function": {"name": "Write", "arguments": None}},
                    ]
                }
            )
        ],
    ],
    ids=["pieces", "no ids", "one index", "name repeated", "neither", "objects", "one chunk", "one chunk, neither"],
)
@pytest.mark.parametrize("finish", ["tool_calls", "stop", "function_call"])
@asynchronous
async def test_calls_come_one_after_the_other_however_they_are_cut(deltas: list[Step], finish: str) -> None:
    events = await told([*words("Well."), *deltas, *ended(finish)])
    assert calls(events) == [("Read", {"x": 1}), ("Write", {})]
    assert said(events) == "Well."
    assert events[-1] == Done("tool_use", 7)


@asynchronous
async def test_pieces_of_two_calls_that_come_mixed_are_no_calls() -> None:
    mixed = [call(0, "Read", "{", "a"), call(1, "Write", "{", "b"), call(0, None, "}")]
    with pytest.raises(EngineBroke, match="mixed up"):
        await told([*mixed, *ended("tool_calls")])


def stopped_by(word: str) -> bytes:
    """llama.cpp's last choice, when it was asked for that."""
    return sent({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "__verbose": {"stopping_word": word}})


@pytest.mark.parametrize(
    ("end", "done"),
    [
        (ended("length"), Done("max_tokens", 7)),
        (ended("stop", stop_reason="</x>"), Done("stop_sequence", 7, "</x>")),
        (ended("stop", matched_stop="</x>"), Done("stop_sequence", 7, "</x>")),
        ([stopped_by("</x>"), *ended()[1:]], Done("stop_sequence", 7, "</x>")),
        ([stopped_by(""), *ended()[1:]], Done("end_turn", 7)),
        (ended("stop", stop_reason=151645), Done("end_turn", 7)),
        (ended("stop", matched_stop="<|im_end|>"), Done("end_turn", 7)),
        (ended("tool_calls"), Done("end_turn", 7)),
        ([chunk(finish="eos")], Done("end_turn", 0)),
    ],
)
@asynchronous
async def test_the_reason_of_the_end_is_told(end: list[Step], done: Done) -> None:
    assert (await told([*words("hi"), *end], stop_sequences=["</x>"]))[-1] == done


@pytest.mark.parametrize(
    "script",
    [
        words("hi"),
        [*words("hi"), b"data: [DONE]\n\n"],
        [*words("hi"), *ended("abort")],
        [*words("hi"), *ended("error")],
        [*words("hi"), "die"],
        [*words("hi"), b"data: no JSON\n\n"],
        [*words("hi"), sent([])],
        [*words("hi"), sent({"choices": ["odd"]}), *ended()],
        [*words("hi"), chunk({"tool_calls": ["odd"]}), *ended()],
        [*words("hi"), sent({"error": {"message": "busy", "code": 503}}), *ended()],
        [*words("hi"), sent({"error": {"message": "busy", "type": "unavailable_error"}}), *ended()],
        [*words("hi"), sent({"object": "error", "message": "busy", "type": "x", "code": 429}), *ended()],
    ],
)
@asynchronous
async def test_an_answer_without_a_proper_end_is_broken(script: list[Step]) -> None:
    with pytest.raises(EngineBroke):
        await told(script)


@asynchronous
async def test_an_error_in_the_stream_and_a_filter_say_their_reason() -> None:
    for last, reason in [
        ([sent({"error": {"message": "out of memory", "code": 500}})], "out of memory"),
        (ended("content_filter"), "content filter"),
    ]:
        with pytest.raises(ProxyError, match=reason) as raised:
            await told([*words("hi"), *last])
        assert raised.value.status == 400


# --- refusals ---

FLAT = {"object": "error", "type": "BadRequestError", "param": None, "code": 400}
MAXIMUM = "This model's maximum context length is 4096 tokens. "


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 5000, "n_ctx": 4096, "message": "…"}},
        FLAT
        | {"message": MAXIMUM + "However, you requested 5100 tokens (5000 in the messages, 100 in the completion)."},
        {"error": {"message": MAXIMUM + "However, your request has 5000 input tokens. Please reduce …", "code": 400}},
        {
            "error": {
                "message": "You passed 5000 input tokens and requested 10 output tokens. However, the model's context "
                "length is only 4096 tokens, resulting in a maximum input length of 4086 tokens.",
                "code": 400,
            }
        },
        FLAT | {"message": "The input (5000 tokens) is longer than the model's context length (4096 tokens)."},
        FLAT
        | {
            "message": "Requested token count exceeds the model's maximum context length of 4096 tokens. You requested "
            "a total of 5100 tokens: 5000 tokens from the input messages and 100 tokens for the completion."
        },
        {"error": {"message": MAXIMUM + "However, your messages resulted in 5000 tokens.", "type": "x"}},
        {"error": {"message": MAXIMUM + "However, you requested 5000 tokens.", "type": "x"}},
        {
            "message": "Please reduce the length of the messages or completion. Current length is 5000 while limit is "
            "4096",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        },
    ],
    ids=[
        "llama.cpp",
        "vLLM 0.9",
        "vLLM 0.12",
        "vLLM 0.16",
        "SGLang",
        "SGLang, total",
        "OpenAI",
        "OpenAI, total",
        "Cerebras",
    ],
)
@asynchronous
async def test_too_long_is_said_in_the_words_that_make_claude_compact(body: Json) -> None:
    error = await refused((400, body))
    assert (error.status, error.message) == (400, "prompt is too long: 5000 tokens > 4096 maximum")


@asynchronous
async def test_too_long_without_numbers_is_still_too_long() -> None:
    error = await refused((400, {"error": {"message": "Please reduce it.", "code": "context_length_exceeded"}}))
    assert (error.status, error.message[:19]) == (400, "prompt is too long:")


@asynchronous
async def test_a_prompt_that_fits_without_all_of_max_tokens_is_asked_again_with_what_is_left() -> None:
    body = FLAT | {"message": MAXIMUM + "However, you requested 5000 tokens (1000 in the messages, 4000 in the …)."}
    stub = OpenAIStub(refusals=[(400, body)], owner="vllm")
    async with engine_on(stub) as engine:
        assert said(await answer(engine, HI | {"max_tokens": 4000})) == "Hello there"
        assert [each["max_tokens"] for each in stub.asked] == [4000, 3096]
        stub.refusals = [(400, body), (400, body)]
        with pytest.raises(ProxyError, match="exceed context limit"):
            await answer(engine, HI)


@asynchronous
async def test_a_500_is_tried_once_more_and_then_permanent() -> None:
    body = {"error": {"code": 500, "message": "image input is not supported", "type": "server_error"}}
    stub = OpenAIStub(refusals=[(500, body)])
    async with engine_on(stub) as engine:
        assert said(await answer(engine, HI)) == "Hello there"
    error = await refused((500, body), (500, body))
    assert (error.status, error.message) == (400, "the engine says: image input is not supported")


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, {"message": "Too many", "type": "too_many_requests_error", "param": "queue", "code": "queue_exceeded"}),
        (503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}),
        (502, "<html>Bad gateway</html>"),
        (504, ""),
    ],
)
@asynchronous
async def test_what_may_pass_says_when_to_come_back(status: int, body: Any) -> None:
    error = await refused((status, body), retry_after="17")
    assert isinstance(error, EngineDown)
    assert (error.status, error.retry_after) == (529, 17)
    later = await refused((status, body), retry_after="3600")
    assert later.retry_after == 60
    assert (await refused((status, body))).retry_after == 5


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (400, {"error": {"message": "bad field", "type": "x", "param": None, "code": None}}, "bad field"),
        (404, {"detail": "Not Found"}, "Not Found"),
        (422, "wrong", "wrong"),
        (402, {"error": "pay first"}, "pay first"),
        (429, {"error": {"message": "no money left", "code": "insufficient_quota"}}, "no money left"),
        (400, ["odd"], "odd"),
    ],
)
@asynchronous
async def test_what_will_not_pass_is_a_400_with_its_reason(status: int, body: Any, reason: str) -> None:
    error = await refused((status, body))
    assert (error.status, error.kind) == (400, "invalid_request_error")
    assert reason in error.message


@asynchronous
async def test_a_refusal_that_quotes_the_prompt_is_cut() -> None:
    assert len((await refused((400, {"message": "x" * 9999}))).message) < 600


@pytest.mark.parametrize("status", [401, 403])
@asynchronous
async def test_a_refused_key_is_final_and_never_quoted(status: int) -> None:
    error = await refused((status, {"error": {"message": f"Incorrect API key provided: {KEY}"}}))
    assert (error.status, error.final) == (403, True)
    assert KEY not in error.message


# --- health, context, counting ---


@pytest.mark.parametrize(
    ("owner", "slots", "server"),
    [("llamacpp", 2, "llamacpp"), ("vllm", 1, "vllm"), ("sglang", 1, "sglang"), ("Cerebras", 1, "openai")],
)
@asynchronous
async def test_health_tells_context_slots_and_which_server_it_is(owner: str, slots: int, server: str) -> None:
    stub = OpenAIStub(owner=owner, n_ctx=8192)
    async with engine_on(stub, context=777) as engine:
        health = await engine.health()
        context = 8192 if owner in DIALECTS else 777
        assert (health.context, health.slots, health.facts) == (context, slots, {"server": server})
        assert await engine.context() == context
    assert stub.keys == {f"Bearer {KEY}"}


@asynchronous
async def test_a_context_that_nobody_tells_and_a_model_that_is_not_there_are_no_health() -> None:
    async with engine_on(OpenAIStub(owner="Cerebras")) as engine:
        with pytest.raises(EngineDown, match="context"):
            await engine.health()
    async with engine_on(OpenAIStub(listed=[{"id": "a"}, {"id": "b"}]), context=4096) as engine:
        with pytest.raises(EngineDown, match="does not serve tiny"):
            await engine.health()


@asynchronous
async def test_a_single_model_is_ours_whatever_it_is_called() -> None:
    async with engine_on(OpenAIStub(listed=[{"id": "other", "max_model_len": 99, "owned_by": "vllm"}])) as engine:
        assert await engine.context() == 99


@pytest.mark.parametrize(
    ("owner", "path"), [("llamacpp", "/v1/chat/completions/input_tokens"), ("vllm", "/tokenize"), ("sglang", None)]
)
@asynchronous
async def test_prompts_are_counted_where_the_engine_can(owner: str, path: str | None) -> None:
    stub = OpenAIStub(owner=owner, tokens=123)
    request = contract.parse(json.dumps(HI | {"tools": [READ]}).encode())
    async with engine_on(stub) as engine:
        assert await engine.count(request) == (123 if path else None)
        if path:
            async for _ in engine.messages(request):
                pass
            (asked_path, counted), (generated,) = stub.counted[0], stub.asked
            assert asked_path == path
            assert {key: generated[key] for key in counted} == counted


@asynchronous
async def test_a_counter_that_is_not_there_counts_nothing() -> None:
    """As behind a gateway, which passes on /v1 only."""
    async with engine_on(OpenAIStub(owner="sglang"), dialect=VLLM) as engine:
        assert await engine.count(contract.parse(json.dumps(HI).encode())) is None


# --- through the proxy ---


@asynchronous
async def test_the_whole_way_keeps_the_grammar_and_tells_the_usage(tmp_path: Path) -> None:
    script: list[Step] = [
        *words("Let me look."),
        call(0, "Read", '{"a":', "x"),
        call(0, None, " 1}"),
        *ended("tool_calls", 30, 20),
    ]
    async with serving(OpenAIStub(script).application()) as url, proxied(url, tmp_path) as proxy:
        events = await proxy.stream()
        status, message, _ = await proxy.answer()
    delta = check_grammar(events)
    assert delta["delta"]["stop_reason"] == message["stop_reason"] == "tool_use"
    assert (delta["usage"]["input_tokens"], delta["usage"]["cache_read_input_tokens"]) == (10, 20)
    assert (status, message["content"][1]["input"], texts(events)) == (200, {"a": 1}, "Let me look.")


@asynchronous
async def test_a_client_that_is_gone_ends_the_generation(tmp_path: Path) -> None:
    stub = OpenAIStub([*words("Hel"), asyncio.Event()])
    async with serving(stub.application()) as url, proxied(url, tmp_path) as proxy:
        asking = asyncio.create_task(proxy.stream(STREAM))
        await eventually(lambda: stub.running == 1)
        asking.cancel()
        await eventually(lambda: stub.gone == 1 and stub.running == 0, seconds=1)
        stub.script = list(HELLO)
        assert texts(await proxy.stream(STREAM)) == "Hello there"
