"""The engine side before Ollama's manners; before the real one: test_real_ollama.py."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.proxy import contract
from selfhost_cli.proxy.answer import PROMPT_MS
from selfhost_cli.proxy.contract import Json
from selfhost_cli.proxy.engines import AnswerEvent, Done, Prompt, Text, Thinking, ToolCall, ToolInput
from selfhost_cli.proxy.engines.ollama import CALL_CUT
from selfhost_cli.proxy.errors import EmptyAnswer, EngineBroke, EngineDown, ProxyError
from tests.proxy.kit import HI, READ, assert_error, asynchronous, check_grammar, eventually, proxied, texts, types
from tests.proxy.ollama_stub import PROMPT, OllamaStub, called, done, engine, events, raw, record, said

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}}
TOOLS: Json = HI | {"tools": [READ]}
OWN_PARSER = "FROM tiny\nRENDERER qwen3-coder\nPARSER qwen3-coder\n"


def user(*blocks: Any) -> Json:
    return {"role": "user", "content": list(blocks)}


def ask(**more: Any) -> Json:
    return HI | more


def told(answer: list[AnswerEvent]) -> str:
    return "".join(event.text for event in answer if isinstance(event, Text))


async def asked(body: Json, **stub: Any) -> Json:
    """The chat that Ollama gets for that request."""
    ollama = OllamaStub(**stub)
    await events(ollama, body)
    return ollama.asked[0]


# --- health ---


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
        "digest": "abc",
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
async def test_it_cannot_count() -> None:
    async with engine(OllamaStub()) as made:
        assert await made.count(contract.parse(json.dumps(HI).encode())) is None


# --- what Ollama gets ---


@asynchronous
async def test_every_request_has_the_options_of_the_load_and_forbids_to_cut_the_prompt() -> None:
    body = await asked(HI, n_ctx=8192)
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "options": {"num_ctx": 8192, "num_predict": 50},
        "truncate": False,
        "shift": False,
        "keep_alive": -1,
    }


@asynchronous
async def test_sampling_passes_and_the_models_own_stops_stay() -> None:
    parameters = 'stop                           "<|im_end|>"\ntemperature                    0\nstop      "a \\" b"'
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "stop_sequences": ["</block>"]}
    options = (await asked(HI | sampling, parameters=parameters))["options"]
    del options["num_ctx"], options["num_predict"]
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "stop": ["<|im_end|>", 'a " b', "</block>"]}
    assert options == wanted


@asynchronous
async def test_without_stop_sequences_the_models_own_are_not_touched() -> None:
    assert "stop" not in (await asked(HI, parameters='stop   "<|im_end|>"'))["options"]


@asynchronous
async def test_a_conversation_with_tools_reaches_it_whole_and_in_order() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "Read", "input": {"b": 1, "a": [True]}}
    other = use | {"id": "t2", "input": {}}
    results: list[Json] = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "42"}]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "no such file", "is_error": True},
    ]
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    body = await asked(
        ask(
            system="Be brief.",
            tools=[READ],
            messages=[
                user({"type": "text", "text": "one"}, {"type": "text", "text": "two"}),
                {"role": "assistant", "content": [thought, {"type": "text", "text": "I read."}, use, other]},
                user(*results, {"type": "text", "text": "go on"}),
            ],
        )
    )
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\n\ntwo"},
        {
            "role": "assistant",
            "content": "I read.",
            "tool_calls": [
                {"id": "t1", "function": {"index": 0, "name": "Read", "arguments": {"b": 1, "a": [True]}}},
                {"id": "t2", "function": {"index": 1, "name": "Read", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "42", "tool_name": "Read", "tool_call_id": "t1"},
        {"role": "tool", "content": "[the tool failed]\nno such file", "tool_name": "Read", "tool_call_id": "t2"},
        {"role": "user", "content": "go on"},
    ]
    assert list(body["messages"][2]["tool_calls"][0]["function"]["arguments"]) == ["b", "a"]


@asynchronous
async def test_images_go_along_also_those_of_a_result() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [IMAGE]}
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "Read", "input": {}}]}
    messages = [user({"type": "text", "text": "look"}, IMAGE), use, user(result)]
    body = await asked(ask(messages=messages), capabilities=["completion", "vision"])
    assert body["messages"][0] == {"role": "user", "content": "look", "images": ["aGVsbG8="]}
    assert body["messages"][3] == {"role": "user", "content": "", "images": ["aGVsbG8="]}


@asynchronous
async def test_an_image_is_refused_when_the_model_has_no_eyes() -> None:
    stub = OllamaStub()
    with pytest.raises(ProxyError, match="tiny cannot see images") as refused:
        await events(stub, ask(messages=[user(IMAGE)]))
    assert (refused.value.status, stub.asked) == (400, [])


@pytest.mark.parametrize(
    ("more", "think"),
    [
        ({}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}, "output_config": {"effort": "xhigh"}}, "high"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low"),
        ({"thinking": {"type": "adaptive"}, "tools": [READ], "tool_choice": {"type": "any"}}, False),
    ],
)
def test_a_model_that_thinks_is_told_whether_to(more: Json, think: object) -> None:
    @asynchronous
    async def look() -> None:
        assert (await asked(HI | more, capabilities=["completion", "tools", "thinking"]))["think"] == think
        assert "think" not in await asked(HI | more, capabilities=["completion", "tools"])

    look()


@asynchronous
async def test_thoughts_of_before_go_to_a_model_that_thinks_only() -> None:
    thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]}
    body = ask(messages=[user({"type": "text", "text": "q"}), thought, user({"type": "text", "text": "r"})])
    assert (await asked(body, capabilities=["completion", "thinking"]))["messages"][1]["thinking"] == "hm"
    assert "thinking" not in (await asked(body))["messages"][1]


@asynchronous
async def test_a_schema_is_the_form_of_the_answer() -> None:
    schema = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    body = await asked(HI | {"output_config": {"format": {"type": "json_schema", "schema": schema}}})
    assert body["format"] == schema


@asynchronous
async def test_of_a_tools_schema_only_that_is_sent_which_ollama_would_not_refuse() -> None:
    properties: Json = {
        "fine": {"type": ["string", "null"], "description": "d", "enum": ["a", None], "pattern": "^a"},
        "any": True,
        "odd": {"type": {"x": 1}, "description": 5, "enum": "a", "required": [1], "anyOf": [True]},
        "deep": {"type": "object", "properties": {"no": False}, "anyOf": [{"type": "string", "format": "uri"}]},
    }
    schema = {"type": ["object"], "properties": properties, "required": ["fine"], "additionalProperties": False}
    body = await asked(ask(tools=[{"name": "T", "description": "d", "input_schema": schema}]))
    assert body["tools"][0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "fine": {"type": ["string", "null"], "description": "d", "enum": ["a", None]},
            "any": {},
            "odd": {},
            "deep": {"type": "object", "properties": {"no": {}}, "anyOf": [{"type": "string"}]},
        },
        "required": ["fine"],
    }


# --- what the client gets ---


@asynchronous
async def test_text_that_comes_in_one_go_is_one_piece_and_the_real_counts_are_at_the_end() -> None:
    records = said("Hel", "lo", prompt=42, cached=30, tokens=3)
    one_go = b"".join(record for record in records if isinstance(record, bytes))
    assert await events(OllamaStub(script=[one_go]), HI) == [Text("Hello"), Prompt(42, 30), Done("end_turn", 3)]


@asynchronous
async def test_thoughts_and_calls_are_what_they_are() -> None:
    script: list[Any] = [
        record(thinking="hm"),
        record("I read."),
        called("Read", {"p": "ü"}),
        called("Read", {}),
        done(tokens=30),
    ]
    answer = await events(OllamaStub(script=script), TOOLS)
    assert answer == [
        Thinking("hm"),
        Text("I read."),
        ToolCall("Read"),
        ToolInput('{"p": "ü"}'),
        ToolCall("Read"),
        ToolInput("{}"),
        Prompt(20),
        Done("tool_use", 30),
    ]


@asynchronous
async def test_a_limit_is_told() -> None:
    answer = await events(OllamaStub(script=said("Hel", reason="length")), HI)
    assert answer[-1] == Done("max_tokens", 2)


@asynchronous
async def test_through_the_proxy_it_is_one_well_formed_answer(tmp_path: Path) -> None:
    stub = OllamaStub(script=said("Hello", prompt=42, cached=30, tokens=7))
    async with proxied(stub, tmp_path) as proxy:
        events = await proxy.stream()
        async with proxy.get("/health") as response:
            used = (await response.json())["usage"]
    usage = {"input_tokens": 12, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 30, "output_tokens": 7}
    told = check_grammar(events)["usage"]
    told.pop(PROMPT_MS, None)  # however long that took
    assert told == usage
    assert used == {"requests": 1, "input_tokens": 42, "output_tokens": 7, "repaired_calls": 0}


@asynchronous
async def test_lines_may_arrive_in_any_pieces_and_be_long() -> None:
    whole = b"".join([record("ä" * 300_000), record("b"), done()]).rstrip(b"\n")  # also without a last line feed
    cuts = sorted(random.Random(5).sample(range(len(whole)), 40))
    script: list[Any] = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
    answer = await events(OllamaStub(script=script), HI)
    assert told(answer) == "ä" * 300_000 + "b"
    assert answer[-1] == Done("end_turn", 7)


# --- tool_choice ---


@asynchronous
async def test_a_call_that_has_to_be_is_asked_for_as_the_form_of_the_answer() -> None:
    schema = {"type": "object", "properties": {"p": {"type": "string"}}, "required": ["p"]}
    body = TOOLS | {"tools": [READ | {"input_schema": schema}], "tool_choice": {"type": "any"}}
    stub = OllamaStub(script=said('{"name": "Read",', ' "arguments": {"p": "/a"}}'))
    answer = await events(stub, body)
    assert answer[:2] == [ToolCall("Read"), ToolInput('{"p": "/a"}')]
    assert answer[-1] == Done("tool_use", 3)
    call = {"type": "object", "properties": {"name": {"const": "Read"}, "arguments": schema}}
    assert stub.asked[0]["format"] == {"anyOf": [call | {"required": ["name", "arguments"]}]}


@asynchronous
async def test_a_call_that_has_to_be_may_also_come_as_one() -> None:
    answer = await events(OllamaStub(script=[called("Read", {}), done()]), TOOLS | {"tool_choice": {"type": "any"}})
    assert answer == [ToolCall("Read"), ToolInput("{}"), Prompt(20), Done("tool_use", 7)]


@asynchronous
async def test_a_call_that_has_to_be_and_was_cut_off_is_no_call() -> None:
    stub = OllamaStub(script=said('{"name": "Read", "argu', reason="length"))
    answer = await events(stub, TOOLS | {"tool_choice": {"type": "any"}})
    assert answer == [Text('{"name": "Read", "argu'), Prompt(20), Done("max_tokens", 2)]


# --- the beginning of the answer is given ---


@asynchronous
async def test_a_prefill_is_gone_on_with_raw_because_not_every_template_does_it() -> None:
    stub = OllamaStub(raw=raw(" 4", ", 5"), capabilities=["completion", "tools", "thinking"])
    body = ask(messages=[user({"type": "text", "text": "Count."}), {"role": "assistant", "content": "1, 2, 3,"}])
    assert told(await events(stub, body)) == " 4, 5"
    assert [message["role"] for message in stub.rendered[0]["messages"]] == ["user"]
    assert stub.asked == []
    assert stub.generated == [
        {
            "model": "tiny",
            "prompt": PROMPT + "1, 2, 3,",
            "raw": True,
            "stream": True,
            "options": {"num_ctx": 4096, "num_predict": 50},
            "think": False,
            "truncate": False,
            "shift": False,
            "keep_alive": -1,
        }
    ]


@asynchronous
async def test_a_version_that_does_not_render_gets_the_prefill_as_a_message() -> None:
    stub = OllamaStub(renders=False)
    await events(stub, ask(messages=[user({"type": "text", "text": "q"}), {"role": "assistant", "content": "a"}]))
    assert stub.asked[0]["messages"][1] == {"role": "assistant", "content": "a"}
    assert stub.measured[0]["options"]["num_predict"] == 1, "it would have generated all of it"


# --- calls that it loses ---

SWALLOWED = '{"name": "Frobnicate", "arguments": {}}'


@asynchronous
async def test_what_its_parser_swallowed_is_generated_once_more_and_told() -> None:
    stub = OllamaStub(script=[done(tokens=23, prompt=157, cached=32)], raw=raw(SWALLOWED, tokens=23, prompt=157))
    answer = await events(stub, TOOLS)
    assert answer == [Text(SWALLOWED), Prompt(157, 32), Done("end_turn", 23)]
    assert (stub.generated[0]["prompt"], "tools" in stub.generated[0]) == (PROMPT, False)


@asynchronous
async def test_what_was_swallowed_behind_text_is_found_too() -> None:
    stub = OllamaStub(script=said("I ", "call: ", tokens=25), raw=raw(SWALLOWED, tokens=23))
    answer = await events(stub, TOOLS)
    assert told(answer) == "I call: " + SWALLOWED
    assert answer[-1] == Done("end_turn", 25)
    assert stub.generated[0]["prompt"] == PROMPT + "I call: "
    assert stub.generated[0]["options"]["num_predict"] == 48


@asynchronous
async def test_a_model_with_a_parser_of_its_own_may_send_several_tokens_at_once() -> None:
    stub = OllamaStub(script=said("a long text in one piece", tokens=25), modelfile=OWN_PARSER)
    assert told(await events(stub, TOOLS)) == "a long text in one piece"
    assert stub.generated == []


@pytest.mark.parametrize("body", [HI, TOOLS | {"max_tokens": 23}], ids=["no tools", "cut off"])
def test_without_a_call_that_could_be_lost_nothing_is_generated_twice(body: Json) -> None:
    @asynchronous
    async def look() -> None:
        stub = OllamaStub(script=said("a", tokens=23, reason="stop" if body is HI else "length"))
        await events(stub, body)
        assert stub.generated == []

    look()


@pytest.mark.parametrize("text", ["", "I call: "])
def test_a_call_that_it_could_not_read_is_generated_once_more_and_told(text: str) -> None:
    error = {"error": "XML syntax error on line 3: unexpected EOF"}

    @asynchronous
    async def look() -> None:
        stub = OllamaStub(raw=raw("<function=Read>", tokens=9, prompt=30, cached=29), modelfile=OWN_PARSER)
        if text:
            stub.script = [record(text), json.dumps(error).encode() + b"\n"]
        else:
            stub.refusal = (500, error)
        answer = await events(stub, TOOLS)
        pieces = bool(text)
        assert told(answer) == text + "<function=Read>"
        assert answer[-2:] == [Prompt(30 - pieces, 29), Done("end_turn", 9 + pieces)]

    look()


@asynchronous
async def test_a_call_that_it_could_not_read_is_an_error_where_it_does_not_render() -> None:
    stub = OllamaStub(refusal=(500, {"error": "XML syntax error on line 3"}), renders=False)
    with pytest.raises(EngineDown, match="could not read the call"):
        await events(stub, TOOLS)


@asynchronous
async def test_tokens_without_an_answer_are_an_error(tmp_path: Path) -> None:
    stub = OllamaStub(script=[done(tokens=23)], raw=[done(tokens=23)])
    async with proxied(stub, tmp_path) as proxy:
        status, body, _ = await proxy.answer(TOOLS)
    assert assert_error(status, body, 400, "api_error") == EmptyAnswer(23).message


@asynchronous
async def test_a_call_that_does_not_end_before_the_limit_ends_the_turn_with_the_reason(tmp_path: Path) -> None:
    stub = OllamaStub(script=[done(tokens=512, reason="length")])
    async with proxied(stub, tmp_path) as proxy:
        answer = await proxy.stream(TOOLS | {"stream": True})
        status, body, _ = await proxy.answer(HI)
    assert check_grammar(answer)["delta"]["stop_reason"] == "end_turn"
    assert texts(answer) == CALL_CUT
    assert assert_error(status, body, 400, "api_error") == EmptyAnswer(512).message
    assert stub.generated == []


@asynchronous
async def test_a_stop_sequence_may_end_the_answer_before_it_began(tmp_path: Path) -> None:
    async with proxied(OllamaStub(script=[done(tokens=3)]), tmp_path) as proxy:
        _, message, _ = await proxy.answer(HI | {"stop_sequences": ["</block>"]})
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], "stop_sequence", "</block>")


# --- the model repeats itself ---


@asynchronous
async def test_a_stream_that_just_stops_is_closed_with_a_word_why_and_its_prompt_is_counted(tmp_path: Path) -> None:
    """As after some thirty equal tokens. Any error, or max_tokens, and Claude Code would have it repeat once more."""
    stub = OllamaStub(script=[record(" no")] * 31)
    async with proxied(stub, tmp_path) as proxy:
        events = await proxy.stream()
    end = check_grammar(events)
    assert texts(events).startswith(" no" * 31)
    assert "repeated itself" in texts(events)
    assert end["delta"]["stop_reason"] == "end_turn"
    assert end["usage"]["output_tokens"] == 31
    assert end["usage"]["input_tokens"] + end["usage"]["cache_read_input_tokens"] == 33
    assert (stub.measured[0]["options"]["num_predict"], stub.generated) == (1, [])


# --- errors ---


def inner(kind: str, message: str, **more: Any) -> Json:
    """llama-server's error, as Ollama passes it on."""
    return {"error": json.dumps({"error": {"code": 400, "message": message, "type": kind, **more}})}


OVERFLOW = inner("exceed_context_size_error", "too much", n_prompt_tokens=9009, n_ctx=8192)
CRASH = "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error"


@pytest.mark.parametrize(
    ("status", "said", "expected", "words"),
    [
        (400, OVERFLOW, 400, r"^prompt is too long: 9009 tokens > 8192 maximum$"),
        (
            400,
            {"error": "the input length exceeds the context length"},
            400,
            "prompt is too long: 4097 tokens > 4096 m",
        ),
        (404, {"error": "model 'tiny' not found"}, 400, "model 'tiny' not found"),
        (500, inner("server_error", "tools param requires --jinja flag"), 400, "says: tools param requires --jinja"),
        (500, {"error": "model requires more system memory (9 GiB) than is available"}, 400, "more system memory"),
        (500, {"error": CRASH}, 529, "unexpectedly stopped"),
        (503, {"error": "server busy, please try again.  maximum pending requests exceeded"}, 529, "busy"),
        (500, {}, 400, "status 500"),
    ],
)
def test_its_errors_are_told_with_the_status_that_makes_the_client_do_the_right_thing(
    status: int, said: Json, expected: int, words: str
) -> None:
    @asynchronous
    async def look() -> None:
        with pytest.raises(ProxyError, match=words) as raised:
            await events(OllamaStub(refusal=(status, said)), HI)
        assert raised.value.status == expected

    look()


@asynchronous
async def test_an_engine_that_dies_in_the_middle_broke_and_one_that_dies_before_is_down() -> None:
    crash = json.dumps({"error": "an error was encountered while running the model: unexpected EOF"}).encode() + b"\n"
    for last in ("die", crash):
        with pytest.raises(EngineBroke):
            await events(OllamaStub(script=[record("Hel"), last]), HI)
        with pytest.raises(EngineDown):
            await events(OllamaStub(script=[last]), HI)


@asynchronous
async def test_a_broken_answer_ends_in_an_error_event(tmp_path: Path) -> None:
    async with proxied(OllamaStub(script=[record("Hel"), "die"]), tmp_path) as proxy:
        assert types(await proxy.stream())[-1] == "error"


@asynchronous
async def test_a_line_that_is_no_json_is_an_error_too() -> None:
    with pytest.raises(EngineBroke):
        await events(OllamaStub(script=[record("Hel"), b"<html>\n"]), HI)


@asynchronous
async def test_the_generation_ends_when_nobody_listens_any_more() -> None:
    stub = OllamaStub(script=[record("Hel"), asyncio.Event()])
    async with engine(stub) as made:
        async with aclosing(made.messages(contract.parse(json.dumps(HI).encode()))) as answer:
            assert await anext(answer) == Text("Hel")
        await eventually(lambda: stub.gone == 1, 1)


LEAK = ["<function=Write>\n<parameter=path>\n/x\n</parameter>\n<parameter=content>\n", "0,0,0,0,"]
WRITE = {"name": "Write", "input_schema": {"type": "object", "properties": {"path": {}, "content": {}}}}


@asynchronous
async def test_a_leaked_call_that_is_stopped_in_its_middle_stays_text_and_our_notice_is_no_part_of_it(
    tmp_path: Path,
) -> None:
    stub = OllamaStub(script=[record(piece) for piece in LEAK])
    async with proxied(stub, tmp_path) as proxy:
        status, message, _ = await proxy.answer(HI | {"tools": [WRITE]})
    assert (status, message["stop_reason"]) == (200, "end_turn")
    said_ = "".join(block["text"] for block in message["content"])
    assert said_.startswith("".join(LEAK))
    assert said_.endswith("because it only repeated itself.]")


@asynchronous
async def test_a_leaked_call_that_a_stop_sequence_cut_stays_text(tmp_path: Path) -> None:
    async with proxied(OllamaStub(script=said(*LEAK)), tmp_path) as proxy:
        _, message, _ = await proxy.answer(HI | {"tools": [WRITE], "stop_sequences": ["END"]})
    assert [block["type"] for block in message["content"]] == ["text"]


@asynchronous
async def test_a_call_before_an_end_that_never_came_is_one() -> None:
    answer = await events(OllamaStub(script=[called("Read", {"p": "/a"})]), TOOLS)
    assert answer[-1] == Done("tool_use", 1, cut=True)


@asynchronous
async def test_an_answer_without_a_record_is_no_answer() -> None:
    with pytest.raises(EngineDown, match="before it began"):
        await events(OllamaStub(script=[]), HI)


@pytest.mark.parametrize(
    "odd", [{"tool_calls": [{"id": "x"}]}, {"tool_calls": ["x"]}, {"tool_calls": [{"function": 7}]}]
)
def test_a_record_of_an_unknown_shape_is_an_error_in_the_stream(odd: Json, tmp_path: Path) -> None:
    @asynchronous
    async def ask() -> None:
        async with proxied(OllamaStub(script=[record("Hello"), record("", **odd), done()]), tmp_path) as proxy:
            events = await proxy.stream()
        assert events[-1]["type"] == "error"

    ask()


@pytest.mark.parametrize(
    "more", [{"output_config": {"format": {"type": "json_schema", "schema": {}}}}, {"stop_sequences": ["X"]}]
)
def test_nothing_is_generated_behind_an_answer_of_a_given_form_or_end(more: Json) -> None:
    @asynchronous
    async def ask() -> None:
        stub = OllamaStub(script=said("{}", tokens=40))
        await events(stub, TOOLS | more)
        assert stub.generated == []

    ask()


@asynchronous
async def test_characters_of_several_tokens_are_not_taken_for_a_loss() -> None:
    stub = OllamaStub(script=said(*("\N{GRINNING FACE}" * 12), tokens=36))
    await events(stub, TOOLS)
    assert stub.generated == []
