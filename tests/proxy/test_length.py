"""What is known of a prompt's length without asking the engine."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from selfhost_cli.proxy import contract
from selfhost_cli.proxy.contract import Request
from selfhost_cli.proxy.length import REMEMBERED, Lengths


def request(*texts: str, **fields: Any) -> Request:
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(texts)]
    return contract.parse(json.dumps({"messages": messages, **fields}).encode())


@given(st.lists(st.text(min_size=1, max_size=50).filter(str.strip), min_size=1, max_size=6), st.text(max_size=50))
def test_the_bound_is_never_below_the_bytes(texts: list[str], system: str) -> None:
    said = sum(len(text.encode("utf-8", "replace")) for text in [*texts, system])
    assert Lengths().bound(request(*texts, system=system)) >= said


def test_what_was_learned_of_a_beginning_holds_for_what_continues_it() -> None:
    lengths = Lengths()
    lengths.learn(request("word " * 1000), 1005)
    assert lengths.bound(request("word " * 1000)) == 1005
    assert 1005 < lengths.bound(request("word " * 1000, "Fine.", "Go on.")) < 1500


def test_another_system_prompt_or_another_tool_is_another_beginning() -> None:
    lengths = Lengths()
    lengths.learn(request("word " * 1000), 1005)
    tool = {"name": "Read", "description": "", "input_schema": {"type": "object"}}
    assert lengths.bound(request("word " * 1000, system="Be brief.")) > 5000
    assert lengths.bound(request("word " * 1000, tools=[tool])) > 5000
    assert lengths.bound(request("ward " * 1000)) > 5000


def test_the_guess_follows_what_was_measured_and_stays_below_the_bound() -> None:
    lengths = Lengths()
    lengths.learn(request("word " * 1000), 1005)
    guess = lengths.estimate(request("some " * 2000))
    assert 1500 < guess < 2500
    assert lengths.estimate(request("word " * 1000)) == 1005
    assert lengths.estimate(request("x")) >= 1


def test_an_answer_that_was_not_finished_teaches_nothing() -> None:
    lengths = Lengths()
    before = lengths.bound(request("hello"))
    lengths.learn(request("hello"), 0)
    assert lengths.bound(request("hello")) == before


def test_old_prompts_are_forgotten() -> None:
    lengths = Lengths()
    for number in range(REMEMBERED + 10):
        lengths.learn(request(f"number {number}"), 5)
    assert lengths.bound(request("number 0")) > 5
    assert lengths.bound(request(f"number {REMEMBERED + 9}")) == 5
