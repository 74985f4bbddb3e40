"""Which requests share an answer: exactly those of which an engine would see the same."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from selfhost_cli.proxy.cache.key import Served, digest, prefix
from selfhost_cli.proxy.contract import Request, parse
from selfhost_cli.proxy.engines.anthropic import AnthropicEngine
from tests.proxy.test_contract import LATE, READ, assistant, conversations, result, rewritten, said, short, user

SERVED = Served("llamacpp", "tiny", "d1", "0.1")
Json = dict[str, Any]
fields = st.fixed_dictionaries(
    {},
    optional={
        "system": short,
        "max_tokens": st.integers(1, 3),
        "temperature": st.sampled_from([0, 0.0, 1, 1.0, 0.5]),
        "top_k": st.integers(1, 3),
        "top_p": st.sampled_from([0.5, 1, 1.0]),
        "stop_sequences": st.lists(short, max_size=2),
        "tools": st.lists(
            st.sampled_from([READ, READ | {"name": "Write"}]), max_size=2, unique_by=lambda one: one["name"]
        ),
        "tool_choice": st.sampled_from([{"type": "auto"}, {"type": "any"}, {"type": "none"}]),
    },
)
meaningless = st.fixed_dictionaries(
    {},
    optional={
        "metadata": st.fixed_dictionaries({"user_id": short}),
        "stream": st.booleans(),
        "model": short,
        "cache_control": st.just({"type": "ephemeral"}),
        "context_management": st.just({"edits": []}),
    },
)


def named(body: Json) -> str:
    return digest(parse(json.dumps(body).encode()), SERVED)


def seen(request: Request) -> str:
    """What goes to the engine, with calls numbered: their ids are ours, and no prompt shows them."""
    body = AnthropicEngine._body(SimpleNamespace(_model="tiny"), request)  # type: ignore[arg-type]
    body.pop("stream", None)
    known: dict[str, str] = {}
    for message in body["messages"]:
        for block in message["content"]:
            for name in ("id", "tool_use_id"):
                if name in block:
                    block[name] = known.setdefault(block[name], f"call{len(known)}")
    for key, value in body.items():
        if type(value) is int:
            body[key] = float(value)
    return json.dumps(body)


def renumbered(messages: list[Any], mark: str) -> list[Any]:
    """With other ids."""
    return json.loads(
        re.sub(r'"(id|tool_use_id)": "', lambda key: key[0] + json.dumps(mark)[1:-1], json.dumps(messages))
    )


@given(conversations(), conversations(), fields, fields, st.data())
def test_two_requests_share_a_name_exactly_when_the_engine_would_see_the_same(
    one: list[Any], two: list[Any], these: Json, those: Json, data: st.DataObject
) -> None:
    """Two that have much in common, and that differ in what is drawn."""
    first = these | {"messages": one[-1]}
    second = data.draw(st.sampled_from([these, those])) | {"messages": data.draw(st.sampled_from([*one, two[-1]]))}
    requests = [parse(json.dumps(body).encode()) for body in (first, second)]
    same = seen(requests[0]) == seen(requests[1])
    assert (digest(requests[0], SERVED) == digest(requests[1], SERVED)) is same


@given(conversations(), fields, meaningless, st.data())
def test_it_does_not_matter_how_it_is_written(
    requests: list[Any], body: Json, noise: Json, data: st.DataObject
) -> None:
    plain = body | {"messages": requests[-1]}
    noisy = body | noise | {"messages": [rewritten(one, data) for one in renumbered(requests[-1], data.draw(short))]}
    assert named(noisy) == named(plain)


@given(conversations(), fields)
def test_what_is_canonical_stays_as_it_is(requests: list[Any], body: Json) -> None:
    """Read, told to a proxy as it was read, and read again: the same request."""
    request = parse(json.dumps(body | {"messages": requests[-1]}).encode())
    assume(not request.deferred)
    again = {
        "messages": request.messages,
        "system": request.system,
        "tools": request.tools,
        "tool_choice": {"type": "any"} if request.force_tool else None,
        "max_tokens": request.max_tokens,
        "thinking": None if request.thinking is None else {"type": "enabled" if request.thinking else "disabled"},
        **request.sampling,
    }
    with_images = any("images" in block for message in request.messages for block in message["content"])
    assume(not with_images)
    assert parse(json.dumps(again).encode()) == request
    assert named(again) == digest(request, SERVED)


def test_which_result_belongs_to_which_call_is_not_lost_with_the_ids() -> None:
    calls = assistant(*({"type": "tool_use", "id": name, "name": "Read", "input": {}} for name in "ab"))
    straight, crossed = (
        [user("x"), calls, user([result("one") | {"tool_use_id": first}, result("two") | {"tool_use_id": second}])]
        for first, second in ("ab", "ba")
    )
    assert named({"messages": straight}) != named({"messages": crossed})


def test_the_order_of_a_schemas_keys_is_part_of_the_prompt() -> None:
    straight, turned = (
        {"messages": [user("x")], "tools": [READ | {"input_schema": {"type": "object", "properties": order}}]}
        for order in ({"a": {}, "b": {}}, {"b": {}, "a": {}})
    )
    assert named(straight) != named(turned)


def test_deferred_tools_count_because_calls_to_them_are_checked_against_them() -> None:
    body: Json = {"messages": [user("x")], "tools": [READ]}
    assert named(body) != named(body | {"tools": [READ, LATE]})


@pytest.mark.parametrize("change", [{"engine": "ollama"}, {"model": "large"}, {"digest": "d2"}, {"version": "0.2"}])
def test_what_serves_counts(change: dict[str, str]) -> None:
    request = parse(json.dumps({"messages": [user([said("x")])]}).encode())
    assert digest(request, replace(SERVED, **change)) != digest(request, SERVED)


def test_what_the_client_wants_of_its_thinking_counts() -> None:
    body: Json = {"messages": [user("x")]}
    wishes: list[Json] = [{}, {"thinking": {"type": "enabled"}}, {"thinking": {"type": "disabled"}}]
    assert len({named(body | wish) for wish in [*wishes, {"output_config": {"effort": "low"}}]}) == 4


def test_a_name_says_which_schema_and_whose() -> None:
    assert prefix("abc") == "selfhost:1:abc:"
