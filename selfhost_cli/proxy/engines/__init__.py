"""The seam to what generates tokens: the few verbs that every engine's adapter has, and the events of an answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from selfhost_cli.proxy.contract import Json, Request

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """How the prompt was counted; `cached` of its `total` tokens were reused. Comes first, when it is known first."""

    total: int
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text. It ends a tool call that is open."""

    text: str


@dataclass(frozen=True, slots=True)
class Thinking:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call begins; its input follows."""

    name: str


@dataclass(frozen=True, slots=True)
class ToolInput:
    """A piece of the JSON of the call that is open."""

    json: str


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is over. Always the last event.

    `cut`: it was ended from outside, so what is open at its end is not whole. `notice`: why, to be read behind its text
    unless it ends in a call; words of ours, which nothing may take for the model's.
    """

    reason: StopReason
    output_tokens: int
    stop_sequence: str | None = None
    cut: bool = False
    notice: str = ""


AnswerEvent = Prompt | Text | Thinking | ToolCall | ToolInput | Done


@dataclass(frozen=True)
class Health:
    """`slots`: how many answers it can generate at once, 0 when it does not tell. `facts`: what else it says of
    itself, for `/health`."""

    context: int
    slots: int = 0
    facts: Json = field(default_factory=dict)


class Engine(Protocol):
    """One engine. Every verb but `close` raises ProxyError: EngineDown when asking again later may help."""

    name: str

    async def health(self) -> Health:
        """Answers only when it can generate. Cheap enough for once a second."""
        ...

    async def context(self) -> int:
        """Its real context in tokens, as the engine itself says."""
        ...

    async def count(self, request: Request) -> int | None:
        """The exact length of the rendered prompt in tokens, None when this engine cannot tell."""
        ...

    def forms(self, request: Request) -> bool:
        """It holds the answer to `request.schema`; for one that does not, it is asked for in words, and checked."""
        ...

    def messages(self, request: Request) -> AsyncGenerator[AnswerEvent]:
        """Generate. Closing the iterator cancels the generation at once.

        Raises EngineDown before the first event, EngineBroke after it, ProxyError 400 for what it will never answer.
        """
        ...

    async def save(self, name: str, tokens: int) -> bool:
        """Put away what it holds of the last prompt, of so many tokens, so that its next start finds it. Never raises.

        False where the engine has no such thing.
        """
        ...

    async def restore(self, name: str) -> bool:
        """Hold again what was put away under that name. Never raises; False when it cannot be had."""
        ...

    async def close(self) -> None: ...
