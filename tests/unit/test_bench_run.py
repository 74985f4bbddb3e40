"""What `selfhost bench` measures, in which order, what it leaves out, and the numbers that it makes of it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from selfhost_cli.bench import plan as plans
from selfhost_cli.bench.client import Answer, BrokeOff
from selfhost_cli.bench.figures import Figure, figures, number_of, per_million, report
from selfhost_cli.bench.plan import Body, Plan
from selfhost_cli.bench.run import Measured, Run
from selfhost_cli.errors import SelfhostError

PREFILL, DECODE, HIT_S = 1000.0, 50.0, 0.001
AROUND = 10
"""Tokens that every prompt has beside its words."""
PRICE = 0.36


@dataclass
class Box:
    """An engine behind a front with a cache: it takes its time on `now`, and reads again only what is new.

    A word is a token. Requests at the same time are answered one after the other. `slower` with the tokens of a prompt;
    `hook` is called ahead of every answer and may raise.
    """

    wish: str = ""
    cache: str = "miss"
    stop: str = "end_turn"
    slower: Callable[[int], float] = lambda tokens: 1.0
    hook: Callable[[int, Body], None] = lambda number, body: None
    now: float = 0.0
    asked: list[tuple[Body, bool]] = field(default_factory=list)
    _read: list[list[str]] = field(default_factory=list)
    _kept: list[Body] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    async def ask(self, body: Body, *, keep: bool = False) -> Answer:
        self.asked.append((body, keep))
        self.hook(len(self.asked), body)
        if keep and body in self._kept:
            self.now += 2 * HIT_S
            return Answer(0, 0, 3, HIT_S, 2 * HIT_S, 2, "end_turn", "hit")
        words = _words(body)
        shared = max((_shared(words, known) for known in self._read), default=0)
        self._read.append(words)
        fresh, out = AROUND + len(words) - shared, body["max_tokens"]
        first = fresh / PREFILL * self.slower(len(words))
        total = first + (out - 1) / DECODE
        self.now += total
        if keep and self.cache == "miss" and self.stop != "max_tokens":
            self._kept.append(body)
        return Answer(fresh, shared, out, first, total, out, self.stop, self.cache if keep else "bypass;no-store")


def _words(body: Body) -> list[str]:
    return f"{body['system']} {body.get('tools')} {body['messages']}".split()


def _shared(one: list[str], other: list[str]) -> int:
    same = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        same += 1
    return same


def measured(box: Box, plan: Plan) -> tuple[Measured, list[str]]:
    seen, told = Measured(), []
    asyncio.run(Run(box, plan, seen, PRICE, told.append).all())
    return seen, told


def named(seen: Measured) -> dict[str, Figure]:
    return {one.figure: one for one in figures(report(seen, PRICE))}


def plan_of(*lengths: int, rounds: int = 2, budget_s: float | None = None) -> Plan:
    return Plan("tiny", rounds, lengths, budget_s)


def test_cold_is_read_whole_warm_but_for_its_end_and_cached_not_at_all() -> None:
    found = named(measured(Box(), plan_of(1024))[0])
    prompt = found["prompt, 1024 tokens"].value
    assert prompt == pytest.approx(1024, rel=0.02)
    assert found["read of it, cold, 1024 tokens"].value == prompt
    assert 0 < found["read of it, warm, 1024 tokens"].value < 60
    assert found["read of it, cached, 1024 tokens"].value == 0
    assert found["time to first token, cold, 1024 tokens"].value == pytest.approx(prompt / PREFILL, rel=0.001)
    assert found["time to first token, warm, 1024 tokens"].value < 0.06
    assert found["time to first token, cached, 1024 tokens"].value == HIT_S


def test_rates_are_the_boxs_and_dollars_are_the_rent_of_the_time_that_they_take() -> None:
    found = named(measured(Box(), plan_of(1024))[0])
    assert found["prefill, 1024 tokens"].value == PREFILL
    assert found["decode, 1024 tokens"].value == DECODE
    assert per_million(PRICE, PREFILL) == pytest.approx(0.1), "1000 s of a box at $0.36/h"
    assert found["a million tokens read, 1024 tokens"].value == pytest.approx(0.1)
    assert found["a million tokens generated, 1024 tokens"].value == 2


def test_requests_at_once_are_counted_together_and_each_waits() -> None:
    found = named(measured(Box(), plan_of(1024))[0])
    for number in (1, 2, 4):
        out, both = (found[f"{what} together, {number} at once"].value for what in ("generated", "read and generated"))
        assert 0 < out < DECODE < both


def test_a_session_is_timed_turn_by_turn_and_tells_what_was_read_again() -> None:
    found = named(measured(Box(), plan_of(1024))[0])
    assert found["tool session, first turn"].value > found["tool session, each later turn"].value
    assert found["tool session, reused of the prompt before"].value > 90

    forgetful = Box()
    forgetful.hook = lambda number, body: forgetful._read.clear()
    assert named(measured(forgetful, plan_of(1024))[0])["tool session, reused of the prompt before"].value == 0


def test_only_what_measures_the_cache_may_be_answered_from_it() -> None:
    box = Box()
    measured(box, plan_of(1024, rounds=1))
    kept = [body for body, keep in box.asked if keep]
    assert len(kept) == 2
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("box", "why"),
    [
        (Box(wish="no-store"), "cache-control: no-store"),
        (Box(cache=""), "the cache is off"),
        (Box(cache="bypass;no temperature"), "bypass;no temperature"),
        (Box(stop="max_tokens"), "the answer was cut"),
    ],
)
def test_without_a_hit_it_is_said_why_and_nothing_is_made_up(box: Box, why: str) -> None:
    seen, _ = measured(box, plan_of(1024))
    assert not [name for name in named(seen) if "cached" in name]
    (note,) = seen.notes
    assert why in note


def test_it_says_first_what_it_will_take() -> None:
    box = Box()
    seen, told = measured(box, plan_of(1024, 4096))
    words = told[0].split()
    assert float(words[3]) == pytest.approx(box.now, rel=0.5), told[0]
    assert told[0] == f"this takes about {words[3]} s and {words[6]} with prompts of 1024, 4096 tokens"
    assert float(words[6].strip("$,")) == pytest.approx(PRICE / 3600 * float(words[3]), rel=0.1)
    assert "Ctrl-C" in told[1]
    assert seen.notes == []


def test_lengths_that_take_too_long_are_left_out_and_named() -> None:
    seen, told = measured(Box(), plan_of(1024, 4096, 131_072, 262_144, budget_s=60))
    assert told[1].startswith("131072, 262144 would take 7 min more, and are left out")
    assert sorted(seen.lengths) == [1024, 4096]
    assert [note.split(":")[0] for note in seen.notes] == ["131072 tokens", "262144 tokens"]
    assert "--lengths 131072 measures it" in seen.notes[0]
    assert "about 2 min more" in seen.notes[0]


def test_a_box_that_gets_slower_with_the_length_is_judged_by_the_last_one() -> None:
    """It was promised 131 s for the longest by the first prompts, and would take 39 minutes."""
    slow = Box(slower=lambda tokens: 1 + (tokens / 1000) ** 2)
    seen, _ = measured(slow, plan_of(1024, 4096, 131_072, rounds=1, budget_s=300))
    assert sorted(seen.lengths) == [1024, 4096]
    assert seen.notes[0].startswith("131072 tokens: left out, about 39 min more")


def test_a_box_that_turns_out_faster_has_time_for_more() -> None:
    """As one has that others used while its speed was looked at."""
    box = Box()
    box.slower = lambda tokens: 30.0 if len(box.asked) <= 2 else 1.0
    seen, told = measured(box, plan_of(1024, 4096, rounds=1, budget_s=60))
    assert told[1].startswith("4096 would take")
    assert sorted(seen.lengths) == [1024, 4096]
    assert seen.notes == []


def test_one_length_is_measured_however_slow_the_box_is() -> None:
    seen, _ = measured(Box(slower=lambda tokens: 100.0), plan_of(1024, 4096, rounds=1, budget_s=10))
    assert sorted(seen.lengths) == [1024]


def test_where_there_is_no_time_for_all_rounds_there_are_fewer_and_that_is_told() -> None:
    box = Box()
    seen, _ = measured(box, plan_of(1024, 16_384, rounds=3, budget_s=50))
    assert (len(seen.sessions), len(seen.bursts[4]), len(seen.lengths[1024])) == (2, 2, 3)
    assert len(seen.lengths[16_384]) < 3
    assert seen.notes[0] == "at once and with tools: 2 of 3 rounds, because they take long"
    assert seen.notes[1].startswith("16384 tokens: ")
    assert box.now < 50


def test_what_was_asked_for_is_measured_however_long_it_takes() -> None:
    seen, _ = measured(Box(), plan_of(1024, 262_144, rounds=1))
    assert sorted(seen.lengths) == [1024, 262_144]


def breaking(when: Callable[[Body], bool], error: SelfhostError, times: int = 1) -> Callable[[int, Body], None]:
    left = times

    def hook(number: int, body: Body) -> None:
        nonlocal left
        if left and when(body):
            left -= 1
            raise error

    return hook


WHERE: list[tuple[str, Callable[[Body], bool]]] = [
    ("1 at once", lambda body: len(body["system"].split()) == plans.WORDS_AT_ONCE + 1),
    ("the session", lambda body: "tools" in body),
    ("1024 tokens", lambda body: body["max_tokens"] == plans.LONG_OUT),
]


@pytest.mark.parametrize(("part", "when"), WHERE)
def test_an_answer_that_breaks_off_costs_its_round_and_is_told(part: str, when: Callable[[Body], bool]) -> None:
    seen, _ = measured(Box(hook=breaking(when, BrokeOff("an answer broke off: it fell over"))), plan_of(1024))
    assert seen.notes == [f"{part}, one round: an answer broke off: it fell over"]
    rounds = {
        "1 at once": len(seen.bursts[1]),
        "the session": len(seen.sessions),
        "1024 tokens": len(seen.lengths[1024]),
    }
    assert rounds.pop(part) == 1
    assert set(rounds.values()) == {2}


@pytest.mark.parametrize("part", range(3))
def test_a_box_that_is_gone_ends_it_and_what_was_measured_stays(part: int) -> None:
    seen = Measured()
    box = Box(hook=breaking(WHERE[part][1], SelfhostError("the box answers 529: it is away")))
    with pytest.raises(SelfhostError, match="529"):
        asyncio.run(Run(box, plan_of(1024), seen, PRICE, lambda text: None).all())
    assert (bool(seen.bursts), bool(seen.sessions), bool(seen.lengths)) == (part > 0, part > 1, False)
    assert bool(figures(report(seen, PRICE))) == (part > 0)


def test_a_length_of_which_no_round_came_to_its_end_has_no_figures() -> None:
    broken = BrokeOff("an answer broke off: it fell over")
    seen, _ = measured(Box(hook=breaking(WHERE[2][1], broken, times=2)), plan_of(1024))
    assert not [name for name in named(seen) if "1024" in name]


@dataclass
class Silent(Box):
    """Tells no numbers, after so many answers."""

    after: int = 0

    async def ask(self, body: Body, *, keep: bool = False) -> Answer:
        answer = await super().ask(body, keep=keep)
        return answer if len(self.asked) <= self.after else dataclasses.replace(answer, fresh=0, reused=0, out=0)


def test_a_box_that_does_not_tell_what_it_read_is_not_measured() -> None:
    with pytest.raises(SelfhostError, match="does not tell how many tokens"):
        measured(Silent(), plan_of(1024))


def test_one_that_ceases_to_tell_has_its_times_and_no_rates() -> None:
    found = named(measured(Silent(after=2), plan_of(1024, 4096))[0])
    assert found["time to first token, cold, 4096 tokens"].value > 0
    assert not [name for name in found if name.startswith(("prefill", "decode", "a million"))]


def test_nothing_measured_is_no_figure() -> None:
    assert figures(report(Measured(), PRICE)) == []


def test_a_number_is_the_median_with_the_range_of_the_middle_half() -> None:
    assert dataclasses.astuple(number_of([5.0, 1.0, 3.0])) == (3.0, 2.0)
    assert dataclasses.astuple(number_of([5.0])) == (5.0, None), "of one value there is no spread"


def test_a_figure_has_no_goal_because_nobody_promised_one() -> None:
    one: Any = named(measured(Box(), plan_of(1024, rounds=1))[0])["prefill, 1024 tokens"]
    assert dataclasses.asdict(one) == {
        "figure": "prefill, 1024 tokens",
        "value": PREFILL,
        "unit": "tokens/s",
        "spread": None,
        "goal": None,
        "met": None,
    }
