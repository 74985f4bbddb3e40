"""The measurements in their order: short ones first, so that whoever interrupts has something.

What was measured is in `Measured` at every moment. An answer that breaks off is noted and the next one asked; a box
that does not answer at all ends it.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from selfhost_cli.bench import plan as plans
from selfhost_cli.bench.client import HELP, Answer, BrokeOff
from selfhost_cli.bench.plan import Body, Plan, Speed
from selfhost_cli.errors import SelfhostError

Tell = Callable[[str], None]


class Asker(Protocol):
    """`client.Client`. `clock` in seconds, from any beginning."""

    @property
    def wish(self) -> str: ...

    def clock(self) -> float: ...

    async def ask(self, body: Body, *, keep: bool = False) -> Answer: ...


@dataclass(frozen=True)
class Round:
    """One prefix: first asked, asked for something else, and that again. `again`: None when it was no hit."""

    cold: Answer
    warm: Answer
    again: Answer | None


@dataclass(frozen=True)
class Burst:
    """Requests at the same time; `seconds` until the last of them was answered."""

    seconds: float
    answers: tuple[Answer, ...]


@dataclass
class Measured:
    """What there is so far. `lengths` by the tokens wanted, `bursts` by the number of requests."""

    lengths: dict[int, list[Round]] = field(default_factory=dict)
    bursts: dict[int, list[Burst]] = field(default_factory=dict)
    sessions: list[tuple[Answer, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was not measured, and why."""

    def once(self, note: str) -> None:
        """Of what goes for every round alike."""
        if note not in self.notes:
            self.notes.append(note)


class Run:
    """One benchmark. `dollars_per_hour`: what the box costs; `tell`: what a person reads meanwhile."""

    def __init__(self, asker: Asker, plan: Plan, seen: Measured, dollars_per_hour: float, tell: Tell) -> None:
        self._asker = asker
        self._plan = plan
        self._seen = seen
        self._price = dollars_per_hour
        self._tell = tell

    async def all(self) -> None:
        """Raises SelfhostError when the box does not answer."""
        speed = await self._speed()
        began = self._asker.clock()
        rounds = plans.rounds_of_rest(self._plan, speed)
        self._announce(speed, rounds)
        self._fewer("at once and with tools", rounds)
        await self._at_once(rounds)
        await self._sessions(rounds)
        await self._lengths(speed, began)

    async def _speed(self) -> Speed:
        """Of two short prompts. The first may have had to wait until the model was loaded: its time says nothing."""
        few, many = plans.SAMPLE
        small = await self._asker.ask(plans.short(self._plan.model, _nonce(), few))
        large = await self._asker.ask(plans.short(self._plan.model, _nonce(), many))
        if not large.prefill or not large.out:
            raise SelfhostError("the box does not tell how many tokens it read and generated", HELP)
        per_word = max((large.prompt - small.prompt) / (many - few), 0.1)
        around = max(small.prompt - few * per_word, 0.0)
        longer = max(small, large, key=lambda one: one.out)
        return Speed(large.prefill, longer.decode or longer.out / longer.total_s, per_word, around)

    def _announce(self, speed: Speed, rounds: int) -> None:
        rest = rounds * speed.of_rest()
        chosen = self._chosen(self._plan.lengths, speed, rest)
        seconds = rest + sum(times * speed.of_length(length) for length, times in chosen.items())
        dollars = seconds / 3600 * self._price
        self._tell(f"this takes about {_minutes(seconds)} and ${dollars:.2g}, with prompts of {_list(chosen)} tokens")
        if left_out := self._plan.lengths[len(chosen) :]:
            more = _minutes(sum(speed.of_length(length) for length in left_out))
            self._tell(f"{_list(left_out)} would take {more} more, and are left out unless the box turns out faster")
        self._tell("Ctrl-C ends it and shows what there is")

    def _chosen(self, lengths: Sequence[int], speed: Speed, spent_s: float) -> dict[int, int]:
        """Length -> rounds, as the time is enough: one at least, because without any there is nothing to see."""
        if self._plan.budget_s is None:
            return dict.fromkeys(lengths, self._plan.rounds)
        left_s, least = self._plan.budget_s - spent_s, 0 if self._seen.lengths else 1
        return plans.affordable(lengths, speed, self._plan.rounds, left_s, least=least)

    def _fewer(self, what: str, rounds: int) -> None:
        if rounds < self._plan.rounds:
            self._seen.notes.append(f"{what}: {rounds} of {self._plan.rounds} rounds, because they take long")

    async def _at_once(self, rounds: int) -> None:
        for number in plans.AT_ONCE:
            self._tell(f"{number} at once")
            for _ in range(rounds):
                bodies = [plans.short(self._plan.model, _nonce(), plans.WORDS_AT_ONCE) for _ in range(number)]
                began = self._asker.clock()
                try:
                    answers = await self._together(bodies)
                except BrokeOff as error:
                    self._seen.notes.append(f"{number} at once, one round: {error.message}")
                    continue
                burst = Burst(self._asker.clock() - began, answers)
                self._seen.bursts.setdefault(number, []).append(burst)

    async def _together(self, bodies: Iterable[Body]) -> tuple[Answer, ...]:
        """All of them, or, when all have ended, the first error."""
        ended = await asyncio.gather(*(self._asker.ask(body) for body in bodies), return_exceptions=True)
        for one in ended:
            if isinstance(one, BaseException):
                raise one
        return tuple(one for one in ended if isinstance(one, Answer))

    async def _sessions(self, rounds: int) -> None:
        self._tell(f"a session of {plans.TURNS} turns with tools")
        for _ in range(rounds):
            try:
                answers = [await self._asker.ask(body) for body in plans.turns(self._plan.model, _nonce())]
            except BrokeOff as error:
                self._seen.notes.append(f"the session, one round: {error.message}")
                continue
            self._seen.sessions.append(tuple(answers))

    async def _lengths(self, speed: Speed, began: float) -> None:
        for place, length in enumerate(self._plan.lengths):
            left = self._plan.lengths[place:]
            rounds = self._chosen(left, speed, self._asker.clock() - began).get(length)
            if rounds is None:
                self._leave_out(left, speed)
                break
            self._fewer(f"{length} tokens", rounds)
            self._tell(f"{length} tokens, about {_minutes(rounds * speed.of_length(length))}")
            done = [one for _ in range(rounds) if (one := await self._round(length, speed))]
            if done:
                speed = _seen(speed, done)

    def _leave_out(self, lengths: Iterable[int], speed: Speed) -> None:
        for length in lengths:
            more = _minutes(speed.of_length(length))
            self._seen.notes.append(f"{length} tokens: left out, about {more} more; --lengths {length} measures it")

    async def _round(self, length: int, speed: Speed) -> Round | None:
        nonce, words = _nonce(), speed.words(length)
        try:
            cold = await self._asker.ask(plans.cold(self._plan.model, nonce, words))
            question = plans.warm(self._plan.model, nonce, words)
            warm = await self._asker.ask(question, keep=True)
            again = await self._again(question, warm)
        except BrokeOff as error:
            self._seen.notes.append(f"{length} tokens, one round: {error.message}")
            return None
        done = Round(cold, warm, again)
        self._seen.lengths.setdefault(length, []).append(done)
        return done

    async def _again(self, question: Body, warm: Answer) -> Answer | None:
        """From the cache of answers, if that has it."""
        if self._asker.wish:
            self._seen.once(f"cached: not measured, it was asked for with cache-control: {self._asker.wish}")
        elif not warm.cache:
            self._seen.once("cached: not measured, the cache is off (`selfhost config set cache_enabled on`)")
        elif not warm.cache.startswith("miss"):
            self._seen.once(f"cached: not measured, the cache keeps out of it ({warm.cache})")
        elif warm.stop == "max_tokens":
            self._seen.once("cached: not measured where the answer was cut, because such a one is not kept")
        elif (again := await self._asker.ask(question, keep=True)).hit:
            return again
        else:
            self._seen.once(f"cached: asked again and not answered from the cache ({again.cache})")
        return None


def _seen(speed: Speed, rounds: list[Round]) -> Speed:
    """With what the last length showed: prompts are read, and answers generated, slower the longer they are."""
    prefills = [rate for one in rounds if (rate := one.cold.prefill)]
    decodes = [rate for one in rounds if (rate := one.cold.decode)]
    return replace(
        speed,
        prefill=statistics.median(prefills or [speed.prefill]),
        decode=statistics.median(decodes or [speed.decode]),
    )


def _list(lengths: Iterable[int]) -> str:
    return ", ".join(map(str, lengths))


def _nonce() -> str:
    return secrets.token_hex(8)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
