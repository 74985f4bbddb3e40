"""llama.cpp's server, which speaks two dialects: Anthropic's, and OpenAI's for what it does only there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from selfhost_cli.proxy.contract import Request
from selfhost_cli.proxy.engines import AnswerEvent
from selfhost_cli.proxy.engines.anthropic import AnthropicEngine
from selfhost_cli.proxy.engines.openai import LLAMACPP, OpenAIEngine


class LlamaCppEngine(AnthropicEngine):
    """Its grammar knows the listed tools only: a call to a deferred one would come out as a call to another (b11549).

    So as long as there are deferred tools its answers are plain text, and calls are found in that.
    Schemas of answers it heeds in OpenAI's dialect only.
    """

    def __init__(self, name: str, model: str, base_url: Callable[[], str]) -> None:
        super().__init__(name, model, base_url)
        self._openai = OpenAIEngine(name, model, base_url, dialect=LLAMACPP)

    def forms(self, request: Request) -> bool:
        return self._openai.forms(request)

    def messages(self, request: Request) -> AsyncGenerator[AnswerEvent]:
        if (request.deferred and not request.force_tool) or request.schema is not None:
            return self._openai.messages(request)
        return super().messages(request)

    async def close(self) -> None:
        await super().close()
        await self._openai.close()
