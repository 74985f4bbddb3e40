"""What was measured -> numbers: medians of the rounds, and the range of the middle half. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from selfhost_cli.bench.client import Answer
from selfhost_cli.bench.run import Measured, Round


@dataclass(frozen=True)
class Number:
    """A median. `spread` is the interquartile range, None of a single value."""

    value: float
    spread: float | None


@dataclass(frozen=True)
class Figure:
    """One line of --json. `goal` and `met` are None: what a rented machine should do, nobody has promised."""

    figure: str
    value: float
    unit: str
    spread: float | None
    goal: float | None = None
    met: bool | None = None


@dataclass(frozen=True)
class AtLength:
    """`wanted` tokens of a prompt, `prompt` as it was counted; None for what could not be measured.

    Seconds to the first token, tokens per second, and dollars per million tokens read and generated. `read_…`: tokens
    of the prompt that the box had to read.
    """

    wanted: int
    prompt: Number
    read_cold: Number
    read_warm: Number
    read_cached: Number | None
    cold: Number
    warm: Number
    cached: Number | None
    prefill: Number | None
    decode: Number | None
    read_dollars: Number | None
    out_dollars: Number | None


@dataclass(frozen=True)
class AtOnce:
    """Tokens per second of all together: `all`, read and generated, and `out`, generated. `first`: seconds to the
    first token of each."""

    number: int
    all: Number
    out: Number
    first: Number
    last_first: Number
    """Of the one that waited longest."""


@dataclass(frozen=True)
class Session:
    """Seconds of the first turn and of each later one. `reused`: per cent of the prompt before, all of which is in the
    next one, that the box did not read again."""

    opening: Number
    turn: Number
    reused: Number


@dataclass(frozen=True)
class Report:
    lengths: tuple[AtLength, ...]
    at_once: tuple[AtOnce, ...]
    session: Session | None


def report(seen: Measured, dollars_per_hour: float) -> Report:
    """Whatever there is: a benchmark may have been interrupted."""
    return Report(
        lengths=tuple(_at_length(length, rounds, dollars_per_hour) for length, rounds in sorted(seen.lengths.items())),
        at_once=tuple(
            AtOnce(
                number,
                number_of(sum(one.fresh + one.out for one in burst.answers) / burst.seconds for burst in bursts),
                number_of(sum(one.out for one in burst.answers) / burst.seconds for burst in bursts),
                number_of(one.first_s for burst in bursts for one in burst.answers),
                number_of(max(one.first_s for one in burst.answers) for burst in bursts),
            )
            for number, bursts in sorted(seen.bursts.items())
        ),
        session=_session(seen.sessions) if seen.sessions else None,
    )


def number_of(values: Iterable[float]) -> Number:
    known = sorted(values)
    if len(known) < 2:
        return Number(known[0], None)
    low, _, high = statistics.quantiles(known, n=4, method="inclusive")
    return Number(statistics.median(known), high - low)


def per_million(dollars_per_hour: float, rate: float) -> float:
    """Dollars, when so many tokens are done in each second of the rent."""
    return dollars_per_hour / 3600 / rate * 1e6


def figures(value: Report) -> list[Figure]:
    """All of a report, one by one."""
    return list(chain(chain.from_iterable(map(_of_length, value.lengths)), _of_bursts(value), _of_session(value)))


def _at_length(length: int, rounds: Sequence[Round], price: float) -> AtLength:
    def median(of: Callable[[Round], float | None]) -> Number | None:
        known = [found for one in rounds if (found := of(one)) is not None]
        return number_of(known) if known else None

    def surely(of: Callable[[Round], float]) -> Number:
        return number_of(of(one) for one in rounds)

    return AtLength(
        wanted=length,
        prompt=surely(lambda one: one.cold.prompt),
        read_cold=surely(lambda one: one.cold.fresh),
        read_warm=surely(lambda one: one.warm.fresh),
        read_cached=median(lambda one: one.again.fresh if one.again else None),
        cold=surely(lambda one: one.cold.first_s),
        warm=surely(lambda one: one.warm.first_s),
        cached=median(lambda one: one.again.first_s if one.again else None),
        prefill=median(lambda one: one.cold.prefill),
        decode=median(lambda one: one.cold.decode),
        read_dollars=median(lambda one: per_million(price, rate) if (rate := one.cold.prefill) else None),
        out_dollars=median(lambda one: per_million(price, rate) if (rate := one.cold.decode) else None),
    )


def _session(sessions: Sequence[Sequence[Answer]]) -> Session:
    later = [answer for session in sessions for answer in session[1:]]
    turns = [turn for session in sessions for turn in pairwise(session)]
    return Session(
        opening=number_of(session[0].total_s for session in sessions),
        turn=number_of(answer.total_s for answer in later),
        reused=number_of(100 * min(1.0, now.reused / max(before.prompt, 1)) for before, now in turns),
    )


def _of_length(one: AtLength) -> Iterator[Figure]:
    told: tuple[tuple[str, Number | None, str], ...] = (
        ("prompt", one.prompt, "tokens"),
        ("read of it, cold", one.read_cold, "tokens"),
        ("read of it, warm", one.read_warm, "tokens"),
        ("read of it, cached", one.read_cached, "tokens"),
        ("time to first token, cold", one.cold, "s"),
        ("time to first token, warm", one.warm, "s"),
        ("time to first token, cached", one.cached, "s"),
        ("prefill", one.prefill, "tokens/s"),
        ("decode", one.decode, "tokens/s"),
        ("a million tokens read", one.read_dollars, "$"),
        ("a million tokens generated", one.out_dollars, "$"),
    )
    for name, number, unit in told:
        if number:
            yield _figure(f"{name}, {one.wanted} tokens", number, unit)


def _of_bursts(value: Report) -> Iterator[Figure]:
    for one in value.at_once:
        yield _figure(f"read and generated together, {one.number} at once", one.all, "tokens/s")
        yield _figure(f"generated together, {one.number} at once", one.out, "tokens/s")
        yield _figure(f"time to first token of each, {one.number} at once", one.first, "s")
        yield _figure(f"time to first token of the last, {one.number} at once", one.last_first, "s")


def _of_session(value: Report) -> Iterator[Figure]:
    if value.session:
        yield _figure("tool session, first turn", value.session.opening, "s")
        yield _figure("tool session, each later turn", value.session.turn, "s")
        yield _figure("tool session, reused of the prompt before", value.session.reused, "%")


def _figure(name: str, number: Number, unit: str) -> Figure:
    return Figure(name, _round(number.value), unit, None if number.spread is None else _round(number.spread))


def _round(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)
