"""What the benchmark sends, and how long that takes at a speed that was seen. Pure.

Every prompt begins with a nonce and goes on with words that are drawn after it: no engine has read it before, at any
place. The words are common ones, about a token each.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from selfhost_cli.errors import UsageError

Body = dict[str, Any]

LENGTHS = (1024, 4096, 16_384, 32_768, 65_536, 131_072, 262_144)
"""Tokens of a prompt; those that fit, and beside them the longest that does."""
FEWEST, QUICK = 128, 2
"""Tokens that may be asked for; and so many lengths with --quick."""
ROUNDS, BUDGET_S, QUICK_BUDGET_S = 3, 180.0, 60.0
"""What would take longer than is left of the budget has fewer rounds, or is left out, unless it was asked for."""
REST = 0.5
"""Of the budget at most for what has no length."""
AT_ONCE = (1, 2, 4)
SAMPLE = (32, 512)
"""Words of the two prompts that tell the tokens of a word, and the speed."""
LONG_OUT, SHORT_OUT = 64, 32
"""Tokens that an answer may have: for the rate of its generation, and where only its beginning counts."""
WORDS_AT_ONCE = 64
"""Of each request that is asked at the same time as others."""
TASK_WORDS, RESULT_WORDS = 256, 96
"""Of a session's first message and of what a tool says in it."""
LONG = "Repeat the list of words above from its beginning, word by word."
"""Of what was tried, the one question to which a model of half a billion weights gave as many tokens as it may."""
SHORT = "Answer with the one word yes, and with nothing else."
WORDS = (
    "time year people way day man thing woman life child world school state family group country problem hand part "
    "place case week company system program question work number night point home water room mother area money story "
    "fact month right study book eye job word business issue side kind head house service friend father power hour "
    "game line end member law car city name team minute idea body back parent face level office door health person "
    "art war history party result change morning reason research girl guy moment air teacher force education"
)
TOOLS = [
    {
        "name": "read_file",
        "description": "Read a text file of the project.",
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
    {
        "name": "run",
        "description": "Run a shell command in the project and return its output.",
        "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
]
CALLS: tuple[tuple[str, dict[str, str]], ...] = (
    ("run", {"command": "ls"}),
    ("read_file", {"path": "README.md"}),
    ("read_file", {"path": "src/main.py"}),
    ("run", {"command": "pytest -q"}),
)
"""What the model does in the scripted session, whatever it answers."""
TURNS = len(CALLS) + 1


@dataclass(frozen=True)
class Plan:
    """`lengths` in tokens, ascending. `budget_s`: None for all of them, however long that takes."""

    model: str
    rounds: int
    lengths: tuple[int, ...]
    budget_s: float | None


@dataclass(frozen=True)
class Speed:
    """What a box was seen to do: tokens per second read and generated; tokens of a word, and of all that is around."""

    prefill: float
    decode: float
    per_word: float
    around: float

    def words(self, tokens: int) -> int:
        """So many make a prompt of that length."""
        return max(1, round((tokens - self.around) / self.per_word))

    def seconds(self, words: float, out: int) -> float:
        """For a prompt of which nothing was read before, and an answer that is as long as it may be."""
        return (self.around + words * self.per_word) / self.prefill + out / self.decode

    def of_length(self, tokens: int) -> float:
        """Seconds for a round of one length: cold, and a short answer to the same prefix."""
        return tokens / self.prefill + LONG_OUT / self.decode + self.seconds(0, SHORT_OUT)

    def of_rest(self) -> float:
        """Seconds for a round of what has no length: requests at once, at worst one by one, and the session."""
        at_once = sum(AT_ONCE) * self.seconds(WORDS_AT_ONCE, SHORT_OUT)
        turns = self.seconds(TASK_WORDS, SHORT_OUT) + len(CALLS) * self.seconds(RESULT_WORDS, SHORT_OUT)
        return at_once + turns


def plan(model: str, context: int, *, lengths: str = "", rounds: int | None = None, quick: bool = False) -> Plan:
    """For a box with that context. `lengths` such as "1k,4096", all of which are then measured. Raises UsageError."""
    if lengths:
        wanted, budget = tuple(_parsed(lengths, context)), None
    else:
        wanted, budget = (fitting(context), BUDGET_S) if not quick else (fitting(context)[:QUICK], QUICK_BUDGET_S)
    return Plan(model, rounds or (1 if quick else ROUNDS), wanted, budget)


def longest(context: int) -> int:
    """Tokens of a prompt that surely fits beside its answer: what a word has in tokens is only known about."""
    room = context - max(512, context // 32)
    return room // 1024 * 1024 or room


def fitting(context: int) -> tuple[int, ...]:
    most = longest(context)
    found = tuple(length for length in LENGTHS if length <= most)
    return found if found and most < 1.25 * found[-1] else (*found, most)


def affordable(lengths: Sequence[int], speed: Speed, rounds: int, left_s: float, *, least: int = 0) -> dict[int, int]:
    """Length -> rounds, as many as there is time for, the shorter lengths first; not fewer than `least` lengths."""
    found: dict[int, int] = {}
    for length in lengths:
        each = speed.of_length(length)
        fit = min(rounds, int(left_s // each))
        if fit < 1 and len(found) >= least:
            break
        found[length] = max(fit, 1)
        left_s -= found[length] * each
    return found


def rounds_of_rest(plan: Plan, speed: Speed) -> int:
    if plan.budget_s is None:
        return plan.rounds
    return max(1, min(plan.rounds, int(plan.budget_s * REST // speed.of_rest())))


def short(model: str, nonce: str, words: int) -> Body:
    """A prompt that nobody has asked before, and an answer of which the rate is not asked."""
    return _body(model, _text(nonce, words), [_user(LONG)], SHORT_OUT)


def cold(model: str, nonce: str, words: int) -> Body:
    """The same with an answer that is long enough for its rate."""
    return _body(model, _text(nonce, words), [_user(LONG)], LONG_OUT)


def warm(model: str, nonce: str, words: int) -> Body:
    """The prefix of `cold` with another last message."""
    return _body(model, _text(nonce, words), [_user(SHORT)], SHORT_OUT)


def turns(model: str, nonce: str) -> Iterator[Body]:
    """A session with tools, request by request: each is the one before and what was added to it."""
    system = f"{nonce}\nYou work on a project with tools."
    messages = [_user(f"{_text(nonce, TASK_WORDS)}\nFind out why the tests of this project fail.")]
    yield _body(model, system, messages, SHORT_OUT) | {"tools": TOOLS}
    for number, (name, given) in enumerate(CALLS):
        call = {"type": "tool_use", "id": f"toolu_{nonce}{number}", "name": name, "input": given}
        said = {"type": "tool_result", "tool_use_id": call["id"], "content": _text(f"{nonce}{number}", RESULT_WORDS)}
        messages = [*messages, {"role": "assistant", "content": [call]}, {"role": "user", "content": [said]}]
        yield _body(model, system, messages, SHORT_OUT) | {"tools": TOOLS}


def _body(model: str, system: str, messages: list[Body], max_tokens: int) -> Body:
    return {"model": model, "max_tokens": max_tokens, "stream": True, "system": system, "messages": messages}


def _user(text: str) -> Body:
    return {"role": "user", "content": text}


def _text(nonce: str, words: int) -> str:
    drawn = random.Random(nonce)
    return f"{nonce}\n" + " ".join(drawn.choices(WORDS.split(), k=words))


def _parsed(text: str, context: int) -> Iterable[int]:
    try:
        found = sorted({_tokens(word.strip()) for word in text.split(",")})
    except ValueError:
        raise UsageError(
            f"--lengths {text}: expected tokens, with commas between", "Such as --lengths 1k,4k."
        ) from None
    if found[0] < FEWEST:
        raise UsageError(f"--lengths {text}: {found[0]} tokens are too few to measure", f"At least {FEWEST}.")
    if found[-1] > longest(context):
        raise UsageError(
            f"--lengths {text}: {found[-1]} tokens do not fit beside an answer into the box's context of {context}",
            f"At most {longest(context)}.",
        )
    return found


def _tokens(word: str) -> int:
    return int(word[:-1]) * 1024 if word[-1:] in ("k", "K") else int(word)
