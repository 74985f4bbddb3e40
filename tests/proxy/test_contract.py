"""What engines get to see of what clients send."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
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


USED = {"type": "tool_use", "id": "t1", "name": "Read", "input": {"file_path": "/a"}}


def parsed(**body: Any) -> Request:
    return parse(json.dumps({"messages": [user("hi")]} | body).encode())


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
        tools=[READ | {"cache_control": {}, "defer_loading": True, "eager": 1}],
        unheard_of=[1],
    )
    assert noisy == parsed(messages=[user("hi")], system="You help.\n\nB", tools=[READ])


def test_a_system_message_in_the_middle_is_folded_in_place_and_roles_alternate() -> None:
    request = parsed(
        messages=[
            user("first"),
            {"role": "system", "content": [said("be brief"), said("today is Monday")]},
            {"role": "assistant", "content": [said("ok"), USED]},
            {"role": "system", "content": "late news"},
            user([result("42"), said("and?")]),
            {"role": "system", "content": ""},
        ]
    )
    assert [message["role"] for message in request.messages] == ["user", "assistant", "user"]
    first, _, last = (message["content"] for message in request.messages)
    assert first == [said("first"), said("<system-reminder>\nbe brief\n\ntoday is Monday\n</system-reminder>")]
    assert last == [result("42"), said("<system-reminder>\nlate news\n</system-reminder>"), said("and?")]


def test_tool_results_become_text_whatever_is_in_them() -> None:
    content = [
        said("a"),
        {"type": "tool_reference", "tool_name": "WebFetch"},
        {"type": "image", "source": {}},
        {"type": "document", "source": {"type": "text", "data": "b"}},
        7,
    ]
    request = parsed(messages=[user("q"), {"role": "assistant", "content": [USED]}, user([result(content)])])
    assert request.messages[2]["content"][0]["content"] == (
        "a\nThe tool WebFetch can be used now.\n[image, not shown]\nb\n"
    )


def test_tools_that_nobody_can_run_are_dropped_and_the_choice_is_kept() -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    other = READ | {"name": "Other"}
    tools = [search, READ, other, "junk", {"input_schema": {}}]
    assert [tool["name"] for tool in parsed(tools=tools).tools] == ["Read", "Other"]
    assert parsed(tools=tools, tool_choice={"type": "none"}).tools == []
    assert parsed(tools=tools, tool_choice={"type": "any"}).force_tool
    named = parsed(tools=tools, tool_choice={"type": "tool", "name": "Other"})
    assert ([tool["name"] for tool in named.tools], named.force_tool) == (["Other"], True)


def test_sampling_passes_when_it_makes_sense() -> None:
    request = parsed(temperature=0.5, top_p=1, top_k=40, stop_sequences=["a", "", 3], max_tokens=12.0)
    assert request.sampling == {"temperature": 0.5, "top_p": 1, "top_k": 40, "stop_sequences": ["a"]}
    assert request.max_tokens == 12
    odd = parsed(temperature="hot", top_p=True, top_k=-1, stop_sequences="a", max_tokens=10**400)
    assert (odd.sampling, odd.max_tokens) == ({}, 2**31 - 1)


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
kinds = st.sampled_from(["text", "image", "document", "thinking", "tool_use", "tool_result", "odd"])
fields = ["text", "source", "thinking", "name", "id", "input", "content", "tool_use_id"]
blocks = st.dictionaries(st.sampled_from(fields), json_values, max_size=4).flatmap(
    lambda block: kinds.map(lambda kind: block | {"type": kind})
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "odd"]), "content": json_values | st.lists(blocks)}
)
bodies = st.fixed_dictionaries(
    {"messages": st.lists(messages | json_values, max_size=4)},
    optional=dict.fromkeys(("system", "tools", "tool_choice", "max_tokens", "temperature", "stream"), json_values),
)


@given(bodies)
def test_any_body_is_a_canonical_request_or_a_400(body: Any) -> None:
    data = json.dumps(body).encode()
    try:
        request = parse(data)
    except ProxyError:
        with pytest.raises(ProxyError, match=r"messages|JSON"):
            parse(data)
        return
    roles = [message["role"] for message in request.messages]
    assert all(one != two for one, two in pairwise(roles))
    assert all(message["content"] for message in request.messages)
    assert isinstance(request.prefill, str)


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
