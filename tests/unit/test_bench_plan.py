"""What `selfhost bench` sends, which lengths it takes, and how long it thinks that takes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from selfhost_cli.bench import plan
from selfhost_cli.errors import UsageError

SPEED = plan.Speed(prefill=100.0, decode=25.0, per_word=1.0, around=24.0)


@pytest.mark.parametrize(
    ("context", "lengths"),
    [
        (4096, (1024, 3072)),
        (32_768, (1024, 4096, 16_384, 31_744)),
        (65_536, (1024, 4096, 16_384, 32_768, 63_488)),
        (33_900, (1024, 4096, 16_384, 32_768)),
        (1500, (988,)),
    ],
)
def test_lengths_go_up_to_what_fits_beside_an_answer(context: int, lengths: tuple[int, ...]) -> None:
    assert plan.fitting(context) == lengths
    assert lengths[-1] + plan.LONG_OUT < context


def test_what_was_asked_for_is_measured_whatever_it_takes() -> None:
    assert plan.plan("tiny", 32_768, lengths="16k, 512,4K") == plan.Plan("tiny", 3, (512, 4096, 16_384), None)


def test_quick_is_one_round_of_short_prompts_in_less_time() -> None:
    assert plan.plan("tiny", 32_768, quick=True) == plan.Plan("tiny", 1, (1024, 4096), plan.QUICK_BUDGET_S)
    assert plan.plan("tiny", 32_768, quick=True, rounds=2).rounds == 2
    assert plan.plan("tiny", 32_768).budget_s == plan.BUDGET_S > plan.QUICK_BUDGET_S


@pytest.mark.parametrize(
    ("lengths", "why"),
    [("4k,long", "expected tokens"), (",", "expected tokens"), ("64", "too few"), ("-4k", "too few"), ("32k", "31744")],
)
def test_lengths_that_cannot_be_are_told_before_anything_is_asked(lengths: str, why: str) -> None:
    with pytest.raises(UsageError) as wrong:
        plan.plan("tiny", 32_768, lengths=lengths)
    assert why in f"{wrong.value.message} {wrong.value.remedy}"


def test_two_prefixes_have_nothing_in_common_from_their_first_letter_on() -> None:
    """An engine that finds known pieces further behind would find none either."""
    one, other = (plan.cold("tiny", nonce, 500)["system"].split() for nonce in ("a1", "b2"))
    assert one[0] != other[0]
    runs = {tuple(one[at : at + 6]) for at in range(len(one))}
    assert not any(tuple(other[at : at + 6]) in runs for at in range(len(other) - 5))


def test_a_warm_prompt_has_the_prefix_of_the_cold_one_and_another_question() -> None:
    cold, warm = plan.cold("tiny", "a1", 300), plan.warm("tiny", "a1", 300)
    assert cold["system"] == warm["system"]
    assert len(cold["system"].split()) == 301
    assert cold["messages"] != warm["messages"]


def test_answers_are_bounded_and_sampling_is_the_boxs_own() -> None:
    bodies = [plan.cold("tiny", "a1", 9), plan.warm("tiny", "a1", 9), *plan.turns("tiny", "a1")]
    assert all(body["max_tokens"] <= 64 and body["stream"] and body["model"] == "tiny" for body in bodies)
    assert not any("temperature" in body for body in bodies)


def test_a_session_only_grows_and_answers_every_call_by_script() -> None:
    bodies = list(plan.turns("tiny", "a1"))
    assert len(bodies) == plan.TURNS > 3
    for before, after in pairwise(bodies):
        assert after["messages"][: len(before["messages"])] == before["messages"]
        call, result = after["messages"][len(before["messages"]) :]
        (used,), (told,) = call["content"], result["content"]
        assert (used["type"], told["type"], told["tool_use_id"]) == ("tool_use", "tool_result", used["id"])
        assert used["name"] in {tool["name"] for tool in after["tools"]}
        assert _front(after) == _front(before)
    assert _front(bodies[0]) != _front(next(plan.turns("tiny", "b2")))


def _front(body: dict[str, Any]) -> tuple[Any, Any]:
    return body["system"], body["tools"]


def test_the_words_of_a_length_follow_what_a_word_was_seen_to_have() -> None:
    assert SPEED.words(1024) == 1000
    assert plan.Speed(100.0, 25.0, per_word=2.0, around=24.0).words(1024) == 500


def test_the_time_of_a_length_is_that_of_reading_it_once_and_of_both_answers() -> None:
    took = 4096 / 100 + plan.LONG_OUT / 25 + 24 / 100 + plan.SHORT_OUT / 25
    assert SPEED.of_length(4096) == pytest.approx(took)


def test_the_shorter_lengths_come_first_with_as_many_rounds_as_there_is_time_for() -> None:
    short, long = (SPEED.of_length(length) for length in (1024, 4096))
    lengths = (1024, 4096, 16_384)
    assert plan.affordable(lengths, SPEED, 3, 3 * short + 3 * long + 1) == {1024: 3, 4096: 3}
    assert plan.affordable(lengths, SPEED, 3, 3 * short + 2.5 * long) == {1024: 3, 4096: 2}
    assert plan.affordable(lengths, SPEED, 3, 2.5 * short) == {1024: 2}
    assert plan.affordable(lengths, SPEED, 3, 0.5 * short) == {}
    assert plan.affordable(lengths, SPEED, 3, -1.0, least=1) == {1024: 1}


def test_what_has_no_length_takes_half_of_the_time_at_most_but_one_round() -> None:
    once = SPEED.of_rest()
    rounds = [plan.rounds_of_rest(plan.Plan("tiny", 3, (1024,), many * once), SPEED) for many in (7, 5, 1)]
    assert rounds == [3, 2, 1]
    assert plan.rounds_of_rest(plan.Plan("tiny", 3, (1024,), None), SPEED) == 3
