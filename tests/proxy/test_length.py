"""What is known of a prompt's length without asking the engine."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from selfhost_cli.proxy import contract
from selfhost_cli.proxy.length import REMEMBERED, Length, Lengths


def of(lengths: Lengths, *texts: str, **fields: Any) -> Length:
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(texts)]
    body = json.dumps({"messages": messages, **fields}).encode()
    return lengths.of(contract.parse(body), len(body))


@given(st.lists(st.text(min_size=1, max_size=50).filter(str.strip), min_size=1, max_size=6), st.text(max_size=50))
def test_the_bound_is_never_below_the_bytes(texts: list[str], system: str) -> None:
    said = sum(len(text.encode("utf-8", "replace")) for text in [*texts, system])
    length = of(Lengths(), *texts, system=system)
    assert length.bound >= said
    assert not length.fits(said)
    assert length.fits(length.bound)


def test_what_was_learned_of_a_beginning_holds_for_what_continues_it() -> None:
    lengths = Lengths()
    of(lengths, "word " * 1000).learn(1005)
    assert of(lengths, "word " * 1000).bound == 1005
    assert 1005 < of(lengths, "word " * 1000, "Fine.", "Go on.").bound < 1500
    assert of(lengths, "word " * 1000, "Fine.", "Go on.").fits(1500)


def test_another_system_prompt_or_another_tool_is_another_beginning() -> None:
    lengths = Lengths()
    of(lengths, "word " * 1000).learn(1005)
    tool = {"name": "Read", "description": "", "input_schema": {"type": "object"}}
    assert of(lengths, "word " * 1000, system="Be brief.").bound > 5000
    assert of(lengths, "word " * 1000, tools=[tool]).bound > 5000
    assert of(lengths, "ward " * 1000).bound > 5000


def test_the_guess_follows_what_was_measured_and_stays_below_the_bound() -> None:
    lengths = Lengths()
    of(lengths, "word " * 1000).learn(1005)
    assert 1500 < of(lengths, "some " * 2000).estimate < 2500
    assert of(lengths, "word " * 1000).estimate == 1005
    assert of(lengths, "x").estimate >= 1


def test_an_answer_that_was_not_finished_teaches_nothing() -> None:
    lengths = Lengths()
    before = of(lengths, "hello").bound
    of(lengths, "hello").learn(0)
    assert of(lengths, "hello").bound == before


def test_old_prompts_are_forgotten() -> None:
    lengths = Lengths()
    for number in range(REMEMBERED + 10):
        of(lengths, f"number {number}").learn(5)
    assert of(lengths, "number 0").bound > 5
    assert of(lengths, f"number {REMEMBERED + 9}").bound == 5
