"""llama.cpp's server, which speaks two dialects: Anthropic's, and OpenAI's where only that can do without a grammar."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from selfhost_cli.proxy.contract import Request
from selfhost_cli.proxy.engines import AnswerEvent
from selfhost_cli.proxy.engines.anthropic import AnthropicEngine
from selfhost_cli.proxy.engines.openai import LLAMACPP, OpenAIEngine


class LlamaCppEngine(AnthropicEngine):
    """Its grammar knows the listed tools only: a call to a deferred one would come out as a call to another (b11549).

    So as long as there are deferred tools its answers are plain text, and calls are found in that.
    """

    def __init__(self, name: str, model: str, base_url: Callable[[], str]) -> None:
        super().__init__(name, model, base_url)
        self._without_grammar = OpenAIEngine(name, model, base_url, dialect=LLAMACPP)

    def messages(self, request: Request) -> AsyncGenerator[AnswerEvent]:
        if request.deferred and not request.force_tool:
            return self._without_grammar.messages(request)
        return super().messages(request)

    async def close(self) -> None:
        await super().close()
        await self._without_grammar.close()
