"""An answer that is kept: read from a box's, told again."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfhost_cli.proxy import sse
from selfhost_cli.proxy.answer import Narrator, collect
from selfhost_cli.proxy.cache.entry import PIECE, Entry, read, unpack
from selfhost_cli.proxy.cache.seal import Seal
from selfhost_cli.proxy.engines import AnswerEvent, Done, Prompt, Text, Thinking, ToolCall, ToolInput
from tests.proxy.cache.test_cache import without_ids
from tests.proxy.kit import check_grammar

Json = dict[str, Any]
words = st.text(min_size=1, max_size=3 * PIECE).filter(str.strip)
inputs = st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.integers(-5, 5) | st.none(), max_size=3)


def cut(whole: str, at: int) -> list[str]:
    return [piece for piece in (whole[:at], whole[at:]) if piece]


@st.composite
def answers(draw: st.DrawFn) -> list[AnswerEvent]:
    """What an engine says, to its end."""
    said: list[AnswerEvent] = [Prompt(draw(st.integers(0, 99)), draw(st.integers(0, 9)))]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from([Text, Thinking, ToolCall]))
        if kind is ToolCall:
            said.append(ToolCall("Read"))
            pieces = cut(json.dumps(draw(inputs), ensure_ascii=False), draw(st.integers(0, 9)))
            said += [ToolInput(piece) for piece in pieces]
        else:
            said += [kind(piece) for piece in cut(draw(words), draw(st.integers(0, 9)))]
    reason = draw(st.sampled_from(["end_turn", "tool_use", "stop_sequence"]))
    said.append(Done(reason, draw(st.integers(1, 99)), "x" if reason == "stop_sequence" else None))
    return said


def told(said: list[AnswerEvent]) -> list[Json]:
    """As the proxy on a box tells it."""
    narrator = Narrator("tiny")
    return list(chain.from_iterable(map(narrator.tell, said)))


def recorded(events: list[Json]) -> Entry:
    entry = read(b"".join(map(sse.encode, events)), streamed=True, cls="main", at=0.0, seconds=1.0)
    assert isinstance(entry, Entry), entry
    return entry


def plainly(events: list[Json]) -> Any:
    """Without ids and cuts; what calls are given by its value, however it is written."""
    plain = without_ids(events)
    for event in plain:
        if event.get("delta", {}).get("type") == "input_json_delta":
            event["delta"]["partial_json"] = json.loads(event["delta"]["partial_json"])
        if event["type"] == "message_start":
            event["message"]["usage"].pop("output_tokens")
    return plain


@given(answers())
def test_a_stream_told_again_is_the_stream_up_to_ids_and_cuts(said: list[AnswerEvent]) -> None:
    events = told(said)
    again = list(recorded(events).events())
    check_grammar(again)
    assert plainly(again) == plainly(events)


@given(answers())
def test_a_whole_answer_told_again_is_the_answer_up_to_ids(said: list[AnswerEvent]) -> None:
    events = told(said)
    whole = collect(told(said))
    entry = read(json.dumps(whole).encode(), streamed=False, cls="main", at=0.0, seconds=1.0)
    assert entry == recorded(events)
    assert isinstance(entry, Entry)
    assert without_ids(entry.message()) == without_ids(whole)


@given(answers())
def test_an_entry_survives_being_packed_and_sealed(said: list[AnswerEvent]) -> None:
    events = told(said)
    entry, seal = recorded(events), Seal(bytes(32))
    opened = seal.open(seal.shut(entry.pack(), "name"), "name", 2**20)
    assert opened is not None
    assert unpack(opened) == entry


@given(answers(), st.data())
def test_a_stream_that_is_not_whole_makes_no_entry(said: list[AnswerEvent], data: st.DataObject) -> None:
    events = told(said)
    lost = data.draw(st.integers(1, len(events)))
    part = b"".join(map(sse.encode, events[:-lost]))
    assert isinstance(read(part, streamed=True, cls="main", at=0.0, seconds=1.0), str)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"blocks": 1}', b"\xff", b'{"type": "error"}'])
def test_nonsense_makes_no_entry(data: bytes) -> None:
    assert unpack(data) is None
    for streamed in (True, False):
        assert isinstance(read(data, streamed=streamed, cls="main", at=0.0, seconds=1.0), str)


@given(st.binary(max_size=60), st.binary(max_size=200))
def test_only_what_was_sealed_opens_and_only_under_its_name(junk: bytes, plain: bytes) -> None:
    seal = Seal(bytes(32))
    sealed = seal.shut(plain, "name")
    assert seal.open(sealed, "name", 1000) == plain
    assert seal.open(sealed, "other", 1000) is None
    assert seal.open(junk, "name", 1000) is None
    assert Seal(bytes([1]) * 32).open(sealed, "name", 1000) is None
    for at in range(0, len(sealed), 7):
        assert seal.open(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :], "name", 1000) is None


def test_what_would_unpack_to_more_than_wanted_does_not_open() -> None:
    seal = Seal(bytes(32))
    assert seal.open(seal.shut(bytes(10**6), "name"), "name", 1000) is None


def test_a_key_of_another_length_is_none() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Seal(b"short")


@pytest.mark.parametrize("nonsense", [-5, 2**63, 1.5, "7", None, True])
def test_what_a_box_says_of_tokens_can_be_added_up(nonsense: Any) -> None:
    usage = {"input_tokens": nonsense, "output_tokens": nonsense}
    entry = Entry([], "end_turn", None, usage, "m", "main", 0.0, 1.0)
    assert 0 <= entry.input_tokens == entry.output_tokens <= 2**31
