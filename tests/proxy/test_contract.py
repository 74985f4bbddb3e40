"""What engines get to see of what clients send."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfhost_cli.proxy import sse
from selfhost_cli.proxy.answer import Narrator, collect
from selfhost_cli.proxy.contract import Request, parse
from selfhost_cli.proxy.engines import AnswerEvent, Done, Prompt, Text, Thinking, ToolCall, ToolInput
from selfhost_cli.proxy.errors import EmptyAnswer, EngineBroke, ProxyError
from tests.proxy.kit import READ, LlamaStub, asynchronous, check_grammar, proxied, texts


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def result(text: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", "content": text}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def reminder(text: str) -> dict[str, Any]:
    return said(f"<system-reminder>\n{text}\n</system-reminder>")


def image(data: str = "aGk=") -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def document(**source: Any) -> dict[str, Any]:
    return {"type": "document", "source": source}


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": [value]}
    return value


FETCH = {"name": "WebFetch", "description": "gets é", "input_schema": {"type": "object", "required": ["url"]}}
LATE = FETCH | {"defer_loading": True}
FOUND = {"type": "tool_reference", "tool_name": "WebFetch"}
USED = {"type": "tool_use", "id": "t1", "name": "Read", "input": {"file_path": "/a"}}


def parsed(**body: Any) -> Request:
    return parse(json.dumps({"messages": [user("hi")]} | body).encode())


def answered(*content: Any, **body: Any) -> Any:
    """The one result of a conversation whose tool gave `content`."""
    messages = [user("q"), assistant(USED), user([result(list(content))])]
    return parsed(messages=messages, **body).messages[2]["content"][0]


def refused(body: bytes) -> str:
    with pytest.raises(ProxyError) as refusal:
        parse(body)
    assert (refusal.value.status, refusal.value.kind) == (400, "invalid_request_error")
    return refusal.value.message


def test_a_bare_body_gets_defaults() -> None:
    request = parsed()
    assert request.max_tokens == 4096
    assert request.sampling == {}
    assert not request.stream


def test_what_varies_without_meaning_is_gone() -> None:
    cached = said("hi") | {"cache_control": {"type": "ephemeral"}}
    noisy = parsed(
        messages=[user([cached])],
        system=[said("x-anthropic-billing-header: cc_version=1"), said("You help.") | {"cache_control": {}}, said("B")],
        metadata={"user_id": "u"},
        tools=[READ | {"cache_control": {}, "defer_loading": False, "eager": 1}],
        unheard_of=[1],
    )
    assert noisy == parsed(messages=[user("hi")], system="You help.\n\nB", tools=[READ])


def test_what_was_left_out_is_noted_without_its_text() -> None:
    request = parsed(
        messages=[
            user([said("hi"), {"type": "redacted_thinking", "data": "secret"}, 7, {"type": "secret text"}]),
            {"role": "developer", "content": [said("x")]},
        ],
        tools=[{"type": "web_search_20250305", "name": "web_search"}],
        tool_choice={"type": "tool", "name": "secret"},
        safeguards=[{"type": "secret"}],
        thinking={"type": "secret"},
        output_config={"effort": "secret", "format": {"type": "secret"}},
        temperature="secret",
    )
    assert set(request.notes) == {
        *("field safeguards", "role developer", "tool web_search", "tool_choice of a tool that is not there"),
        *("block redacted_thinking", "block of an odd name"),
        *("value of thinking", "value of effort", "value of output_config.format", "value of temperature"),
    }
    many = parsed(**{f"field{number}": 1 for number in range(100)})
    assert len(many.notes) == 20


def test_what_claude_code_always_sends_draws_no_note() -> None:
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    request = parsed(
        model="qwen3-coder",
        messages=[user([said("hi") | {"cache_control": {"type": "ephemeral"}}]), system([said("today")])],
        system=[said("You help.") | {"cache_control": {"type": "ephemeral"}}],
        tools=[READ, LATE],
        metadata={"user_id": "u"},
        max_tokens=32000,
        thinking={"type": "adaptive", "display": "omitted"},
        context_management=edits,
        output_config={"effort": "high"},
        stream=True,
    )
    assert request.notes == ()


def test_the_system_messages_behind_the_first_user_message_go_before_it() -> None:
    request = parsed(messages=[user("first"), system([said("dir"), said("day")]), system("more"), user("second")])
    assert request.messages == [user([reminder("dir\n\nday"), reminder("more"), said("first"), said("second")])]
    led = parsed(messages=[system("led"), user("first"), system("day")])
    assert led.messages == [user([reminder("led"), reminder("day"), said("first")])]


def test_other_system_messages_are_folded_in_place_and_roles_alternate() -> None:
    request = parsed(
        messages=[
            user("first"),
            assistant(said("ok"), USED),
            system("late news"),
            user([result("42"), said("and?")]),
            system("even later"),
            system(""),
        ]
    )
    assert [message["role"] for message in request.messages] == ["user", "assistant", "user"]
    last = request.messages[2]["content"]
    assert last == [result("42"), reminder("late news"), said("and?"), reminder("even later")]


def test_attribution_is_taken_off_and_what_stands_below_it_is_kept() -> None:
    assert parsed(system="x-anthropic-billing-header: cc_version=1;\n\nYou help.").system == "You help."
    assert parsed(system=[said("x-anthropic-billing-header: cc_version=1;")]).system == ""


def test_a_tool_result_is_text_with_its_images_beside_it() -> None:
    given = answered(
        said("a"),
        said(""),
        image(),
        {"type": "image", "source": {"type": "url", "url": "http://x"}},
        document(type="text", data="b"),
        {"type": "search_result", "content": []},
        7,
    )
    words = "a\n[image, not shown]\nb\n[search_result, not shown]"
    assert given == result(words) | {"images": [image()]}
    assert answered(said("only")) == result("only")


def test_a_result_that_is_an_error_says_so() -> None:
    def told(is_error: Any) -> Any:
        messages = [user("q"), assistant(USED), user([result("no") | {"is_error": is_error}])]
        return parsed(messages=messages).messages[2]["content"]

    assert told(True) == [result("no") | {"is_error": True}]
    assert told(False) == told(None) == told("true") == [result("no")]


def test_images_are_kept_when_they_come_with_their_bytes() -> None:
    elsewhere = {"type": "image", "source": {"type": "file", "file_id": "f"}}
    request = parsed(messages=[user([image() | {"cache_control": {}}, elsewhere, image("")])])
    assert request.messages[0]["content"] == [image(), *[said("[image, not shown]")] * 2]
    assert request.notes == ("block image",)


def test_documents_are_text_where_they_are_text() -> None:
    titled = document(type="text", media_type="text/plain", data="body") | {"title": "T", "context": "C"}
    parts = document(type="content", content=[said("one"), image(), said("two")])
    pdf = document(type="base64", media_type="application/pdf", data="JVBERi0=")
    whole = document(type="content", content="all")
    request = parsed(messages=[user([titled, parts, whole, pdf, {"type": "document"}])])
    shown = ["T\nC\nbody", "one\ntwo", "all", "[document, not shown]", "[document, not shown]"]
    assert request.messages[0]["content"] == [said(text) for text in shown]


def test_blocks_are_kept_where_engines_expect_them() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "abc"}
    odd = [thought | {"thinking": ""}, image(), result("x"), {"type": "tool_use", "input": {}}]
    request = parsed(messages=[user([said("q"), thought, USED]), assistant(thought, said("a"), USED | {"x": 1}, *odd)])
    assert request.messages == [
        user([said("q")]),
        assistant(thought | {"signature": ""}, said("a"), USED),
    ]


def test_input_that_is_no_object_is_an_empty_one() -> None:
    request = parsed(messages=[user("q"), assistant(USED | {"input": "x", "id": [1]})])
    assert request.messages[1]["content"] == [USED | {"input": {}, "id": ""}]


@pytest.mark.parametrize(("number", "read"), [(2**64 - 1, 2**64 - 1), (-(2**63), -(2**63)), (2**80 + 1, 2.0**80)])
def test_whole_numbers_are_exact_to_64_bits_and_the_nearest_float_beyond(number: int, read: float) -> None:
    request = parsed(messages=[user("q"), assistant(USED | {"input": {"n": number}})])
    assert repr(request.messages[1]["content"][0]["input"]["n"]) == repr(read)


def test_tools_that_nobody_can_run_are_dropped_and_the_choice_is_kept() -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    other = READ | {"name": "Other"}
    tools = [search, READ, other, "junk", {"input_schema": {}}, READ | {"description": "again"}]
    assert [tool["name"] for tool in parsed(tools=tools).tools] == ["Read", "Other"]
    assert parsed(tools=tools).tools[0] == READ
    assert parsed(tools=tools, tool_choice={"type": "none"}).tools == []
    assert not parsed(tools=tools, tool_choice={"type": "auto"}).force_tool
    assert parsed(tools=tools, tool_choice={"type": "any"}).force_tool
    named = parsed(tools=tools, tool_choice={"type": "tool", "name": "Other"})
    assert ([tool["name"] for tool in named.tools], named.force_tool) == (["Other"], True)


def test_a_call_cannot_be_forced_when_there_is_nothing_to_call() -> None:
    assert not parsed(tools=[], tool_choice={"type": "any"}).force_tool
    assert not parsed(tools=[{"type": "web_search"}], tool_choice={"type": "tool", "name": "web_search"}).force_tool


def test_a_schema_without_a_type_is_that_of_an_object() -> None:
    assert parsed(tools=[READ | {"input_schema": {"required": []}}]).tools[0]["input_schema"] == {
        "type": "object",
        "required": [],
    }


def test_deferred_tools_stay_out_of_the_list_and_are_known() -> None:
    request = parsed(tools=[LATE, READ, LATE | {"name": "Placeholder"}])
    assert request.tools == [READ]
    assert request.deferred == {"WebFetch": FETCH, "Placeholder": FETCH | {"name": "Placeholder"}}
    none = parsed(tools=[LATE, READ], tool_choice={"type": "none"})
    assert (none.tools, none.deferred) == ([], {})
    named = parsed(tools=[LATE, READ], tool_choice={"type": "tool", "name": "WebFetch"})
    assert (named.tools, named.force_tool) == ([FETCH], True)


def test_a_deferred_tool_is_described_where_it_is_first_referred_to() -> None:
    messages = [
        user("q"),
        assistant(USED),
        user([result([FOUND])]),
        assistant(USED),
        user([result([FOUND, said("x")])]),
    ]
    for choice in ("auto", "none"):
        request = parsed(messages=messages, tools=[LATE, READ], tool_choice={"type": choice})
        first, again = (request.messages[turn]["content"][0]["content"] for turn in (2, 4))
        words, definition = first.split("\n")
        assert words.startswith("The tool WebFetch can be used now")
        schema = json.dumps(FETCH["input_schema"])
        assert definition == f'{{"name": "WebFetch", "description": "gets é", "parameters": {schema}}}'
        assert again == "The tool WebFetch can be used now.\nx"


@pytest.mark.parametrize("tools", [[], [FETCH]], ids=["unknown", "in the list"])
def test_a_tool_that_is_not_deferred_is_not_described_again(tools: list[Any]) -> None:
    assert answered(FOUND, tools=tools) == result("The tool WebFetch can be used now.")


def test_how_to_think_and_what_to_answer_are_read() -> None:
    assert [parsed(thinking={"type": kind}).thinking for kind in ("enabled", "adaptive", "disabled", "odd")] == [
        *(True, True, False, None)
    ]
    assert parsed().thinking is None
    assert parsed(output_config={"effort": "high"}).effort == "high"
    assert parsed(output_config={"effort": ["high"]}).effort == parsed(output_config=7).effort == ""
    wanted = {"type": "json_schema", "schema": {"type": "object"}}
    assert parsed(output_config={"format": wanted}).schema == {"type": "object"}
    assert parsed(output_format=wanted).schema == {"type": "object"}
    assert parsed(output_config={"format": wanted | {"schema": 7}}).schema is None


def test_sampling_passes_when_it_makes_sense() -> None:
    request = parsed(temperature=0.5, top_p=1, top_k=40, stop_sequences=["a", "", 3], max_tokens=12.0)
    assert request.sampling == {"temperature": 0.5, "top_p": 1, "top_k": 40, "stop_sequences": ["a"]}
    assert request.max_tokens == 12
    odd = parsed(temperature="hot", top_p=True, top_k=-1, stop_sequences="a", max_tokens=10**400)
    assert (odd.sampling, odd.max_tokens) == ({}, 2**31 - 1)
    beyond = parsed(temperature=10**400, top_p=-0.1, top_k=10**400)
    assert beyond.sampling == {"top_k": 2**31 - 1}


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "1" * 5000, "[" * 100_000, '"\\x"', "", "é\udcff"])
def test_what_is_not_json_is_refused(value: str) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "hi"}}], "x": {value}}}'
    refused(body.encode("utf-8", "surrogateescape"))


def test_what_passes_through_is_not_nested_without_end() -> None:
    tool = READ | {"name": "Deep", "input_schema": nested(40)}
    wanted = {"format": {"type": "json_schema", "schema": nested(40)}}
    bodies: dict[str, Any] = {
        "messages.1.content.1.input": {"messages": [user("q"), assistant(said("x"), USED | {"input": nested(40)})]},
        "tools.1.input_schema": {"messages": [user("q")], "tools": [READ, tool]},
        "output_config.format.schema": {"messages": [user("q")], "output_config": wanted},
    }
    for where, body in bodies.items():
        assert refused(json.dumps(body).encode()).startswith(f"{where}: ")
    call = USED | {"input": nested(30)}
    assert parsed(messages=[user("q"), assistant(call)]).messages[1]["content"] == [call]


def test_what_is_left_out_may_be_nested_as_it_likes() -> None:
    deep = nested(300)
    odd = {"type": deep, "id": deep, "name": deep}
    bodies: list[dict[str, Any]] = [
        {"messages": [user([said("q"), odd, result([odd, deep])]), {"role": deep, "content": [deep, "x"]}]},
        {"messages": [user("q")], "tools": [odd, deep], "tool_choice": deep, "thinking": deep, "system": [deep]},
        {"messages": [user("q")], "output_config": {"effort": deep, "format": deep}, "temperature": deep},
    ]
    for body in bodies:
        assert parsed(**body).messages


@asynchronous
async def test_the_engine_gets_results_and_text_of_one_turn_as_two_messages(tmp_path: Path) -> None:
    stub = LlamaStub()
    messages = [user("q"), {"role": "assistant", "content": [USED]}, user([said("and?"), result("42")])]
    body = {"messages": messages, "model": "claude-opus", "tools": [READ], "stream": True, "metadata": {}, "system": []}
    async with proxied(stub, tmp_path) as proxy:
        await proxy.stream(body)
    sent = stub.asked[0]
    assert [message["content"][0]["type"] for message in sent["messages"]] == [
        "text",
        "tool_use",
        "tool_result",
        "text",
    ]
    assert sent.keys() == {"model", "max_tokens", "messages", "tools", "tool_choice", "stream"}
    assert sent["model"] == "tiny"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
sources = st.fixed_dictionaries(
    {"type": st.sampled_from(["base64", "text", "content", "url"])},
    optional={"media_type": json_values, "data": json_values, "content": json_values},
)
kinds = ["text", "image", "document", "thinking", "tool_use", "tool_result", "tool_reference", "odd"]
fields = ["text", "thinking", "name", "id", "input", "tool_use_id", "tool_name", "is_error", "title"]
flat_blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(kinds)}, optional={"source": sources | json_values} | dict.fromkeys(fields, json_values)
)
blocks = flat_blocks | st.fixed_dictionaries(
    {"type": st.just("tool_result"), "content": st.lists(flat_blocks | json_values, max_size=3)}
)
messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "odd"]),
        "content": json_values | st.lists(blocks, max_size=4),
    }
)
tools = st.fixed_dictionaries(
    {"name": st.sampled_from(["Read", "WebFetch"]) | json_values, "input_schema": json_values},
    optional={"description": json_values, "defer_loading": json_values},
)
choices = st.fixed_dictionaries(
    {"type": st.sampled_from(["auto", "any", "none", "tool", "odd"])}, optional={"name": st.just("Read") | json_values}
)
odd_fields = ["system", "max_tokens", "temperature", "top_p", "stop_sequences", "stream", "thinking", "output_config"]
bodies = st.fixed_dictionaries(
    {"messages": st.lists(messages, max_size=4) | st.lists(json_values, max_size=2)},
    optional={
        "tools": st.lists(tools | json_values, max_size=3),
        "tool_choice": choices | json_values,
        **dict.fromkeys(odd_fields, json_values),
    },
)
STRINGS = {
    "text": ["text"],
    "thinking": ["signature", "thinking"],
    "tool_use": ["id", "name"],
    "tool_result": ["content", "tool_use_id"],
    "image": [],
}
OTHERS = {"tool_use": {"input"}, "tool_result": {"is_error", "images"}, "image": {"source"}}


def check_block(block: dict[str, Any], allowed: tuple[str, ...]) -> None:
    kind = block["type"]
    assert kind in allowed
    assert set(block) <= {"type", *STRINGS[kind], *OTHERS.get(kind, ())}
    assert all(isinstance(block[key], str) for key in STRINGS[kind])
    if kind == "tool_use":
        assert isinstance(block["input"], dict)
    if kind == "image":
        assert block["source"].keys() == {"type", "media_type", "data"}
    if kind == "tool_result":
        assert block.get("is_error", True) is True
        assert block.get("images", True)
        for picture in block.get("images", []):
            check_block(picture, ("image",))


def check_canonical(request: Request) -> None:
    """What the docstring of Request promises to engines."""
    assert request.messages
    assert all(one["role"] != two["role"] for one, two in pairwise(request.messages))
    allowed = {"user": ("tool_result", "text", "image"), "assistant": ("text", "thinking", "tool_use")}
    for message in request.messages:
        assert message.keys() == {"role", "content"}
        assert message["content"]
        for block in message["content"]:
            check_block(block, allowed[message["role"]])
        late = [block["type"] == "tool_result" for block in message["content"]]
        assert late == sorted(late, reverse=True)
    for tool in [*request.tools, *request.deferred.values()]:
        assert tool.keys() == {"name", "description", "input_schema"}
    assert request.tools or not request.force_tool
    assert request.max_tokens >= 1
    assert all(note.isascii() for note in request.notes)
    assert isinstance(request.prefill, str)
    json.dumps(vars(request), allow_nan=False)


@settings(max_examples=400)
@given(bodies)
def test_any_body_is_a_canonical_request_or_a_400(body: Any) -> None:
    data = json.dumps(body).encode()
    try:
        request = parse(data)
    except ProxyError:
        refused(data)
        return
    check_canonical(request)


@given(st.binary(max_size=40) | st.text(alphabet='{}[]":,1e9 messages', max_size=40).map(str.encode))
def test_any_bytes_are_a_400(body: bytes) -> None:
    refused(body)


# --- canonical: one conversation, however it is written, turn after turn ---

short = st.text(min_size=1, max_size=5)
marks = st.sampled_from([{}, {"cache_control": {"type": "ephemeral"}}])
inputs = st.dictionaries(short, short | st.integers() | st.lists(short, max_size=2), max_size=3)


@st.composite
def rounds(draw: st.DrawFn) -> list[Any]:
    """What the assistant said and what came back: the next messages of a conversation."""
    answer: list[Any] = draw(st.lists(short.map(said), max_size=1))
    if not draw(st.booleans()):
        return [assistant(said(draw(short)), *answer), user(draw(short))]
    calls = draw(st.lists(inputs, min_size=1, max_size=2))
    used = [USED | {"id": f"t{number}", "input": given} for number, given in enumerate(calls)]
    parts = st.just(FOUND) | short.map(said) | st.just(image())
    results = [
        result(draw(short | st.lists(parts, max_size=3))) | {"tool_use_id": f"t{number}"} for number in range(len(used))
    ]
    others = draw(st.lists(short.map(said), max_size=1))
    news = draw(st.lists(short.map(system), max_size=1))
    return [assistant(*answer, *used), user([*results, *others]), *news]


@st.composite
def conversations(draw: st.DrawFn) -> list[list[Any]]:
    """The messages of each request of a conversation; every one has those of the last in front."""
    messages = [user(draw(short)), *draw(st.lists(short.map(system), max_size=2))]
    requests = [messages]
    for added in draw(st.lists(rounds(), min_size=1, max_size=3)):
        messages = messages + added
        requests.append(messages)
    return requests


def rewritten(value: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """The same message or block, in another of the ways that clients have of writing it."""
    content = value.get("content")
    if isinstance(content, str):
        content = [said(content)]
    match content:
        case [{"type": "text", "text": text}]:
            content = data.draw(st.sampled_from([content, text]))
    if isinstance(content, list):
        content = [rewritten(block, data) for block in content]
    return value | ({} if content is None else {"content": content}) | (data.draw(marks) if "type" in value else {})


def prompt(request: Request) -> list[str]:
    """What engines render, piece by piece in its order; the order of keys counts."""
    blocks = [[message["role"], block] for message in request.messages for block in message["content"]]
    return [json.dumps(part) for part in [request.system, request.tools, *blocks]]


@given(conversations(), st.data())
def test_it_does_not_matter_how_a_conversation_is_written(requests: list[list[Any]], data: st.DataObject) -> None:
    plain = parsed(messages=requests[-1], system="You help.", tools=[READ, LATE])
    noisy = parsed(
        messages=[rewritten(message, data) for message in requests[-1]],
        system=[said(f"x-anthropic-billing-header: {data.draw(short)!r}"), said("You help.") | data.draw(marks)],
        tools=[READ | data.draw(marks) | {"eager_input_streaming": True}, LATE | data.draw(marks)],
        metadata={"user_id": data.draw(short)},
        betas=[data.draw(short)],
    )
    assert noisy == plain
    assert prompt(noisy) == prompt(plain)


@given(conversations(), st.data())
def test_the_prompt_of_the_next_turn_extends_that_of_this_one(requests: list[list[Any]], data: st.DataObject) -> None:
    """Although marks move, tools that were found turn up in the middle of the list, and attribution changes."""
    tools = [READ, LATE | {"name": "Placeholder"}, READ | {"name": "Write"}]
    prompts = []
    for messages in requests:
        if "tool_reference" in json.dumps(messages):
            tools = [READ, LATE, LATE | {"name": "Placeholder"}, READ | {"name": "Write"}]
        moved = [rewritten(message, data) for message in messages]
        attribution = said(f"x-anthropic-billing-header: {data.draw(st.integers())}")
        prompts.append(prompt(parsed(messages=moved, system=[attribution, said("You help.")], tools=tools)))
    for one, two in pairwise(prompts):
        assert two[: len(one)] == one
        assert len(two) > len(one)


# --- the grammar, whatever an engine says ---

words = st.text(alphabet="ab \n", max_size=4)
answers = st.lists(
    words.map(Text) | words.map(Thinking) | st.just(ToolCall("Read")) | words.map(ToolInput) | st.just(Prompt(9, 3)),
    max_size=12,
)


@given(answers)
def test_whatever_an_engine_says_is_told_in_the_grammar_or_is_an_error(answer: list[AnswerEvent]) -> None:
    narrator = Narrator("tiny")
    try:
        told = [event for said in [*answer, Done("end_turn", 5)] for event in narrator.tell(said)]
    except (EmptyAnswer, EngineBroke):
        return
    check_grammar(told)
    wanted = "".join(event.text for event in answer if isinstance(event, Text))
    assert "".join(texts(told).split()) == "".join(wanted.split())


def test_a_late_piece_of_a_call_that_has_ended_is_an_error() -> None:
    narrator = Narrator("tiny")
    told = [*narrator.tell(ToolCall("Read")), *narrator.tell(Text("hm"))]
    assert told[-2]["type"] == "content_block_start"
    with pytest.raises(EngineBroke):
        list(narrator.tell(ToolInput("{}")))


def test_thinking_comes_as_a_block_of_its_own() -> None:
    narrator = Narrator("tiny")
    events: list[AnswerEvent] = [Prompt(3), Thinking("hm"), Thinking("!"), Text("42"), Done("end_turn", 3)]
    told = [event for said in events for event in narrator.tell(said)]
    check_grammar(told)
    assert collect(told)["content"] == [{"type": "thinking", "thinking": "hm!", "signature": ""}, said("42")]


@given(st.lists(st.integers(0, 200)), st.sampled_from(["\n", "\r\n"]))
def test_events_are_read_alike_wherever_the_chunks_are_cut(cuts: list[int], end: str) -> None:
    lines = [": a comment", "event: one", 'data: {"é":', "data: 1}", "", "", "id: 5", "data:two", "", "event: none", ""]
    stream = end.join([*lines, ""]).encode()
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    parser = sse.Parser()
    events = [event for a, b in pairwise(edges) for event in parser.feed(stream[a:b])]
    assert events == [sse.Event("one", '{"é":\n1}'), sse.Event("message", "two")]
