"""llama.cpp's server, which speaks two dialects: Anthropic's, and OpenAI's for what it does only there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from selfhost_cli.proxy.contract import Request
from selfhost_cli.proxy.engines import AnswerEvent
from selfhost_cli.proxy.engines.anthropic import AnthropicEngine
from selfhost_cli.proxy.engines.openai import LLAMACPP, OpenAIEngine
from selfhost_cli.proxy.engines.upstream import PATIENT, number
from selfhost_cli.proxy.errors import ProxyError


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

    async def save(self, name: str, tokens: int) -> bool:
        """Of its slots it is the one that holds so many."""
        try:
            for slot in range((await self.health()).slots):
                if await self._slot(slot, "save", name) == tokens:
                    return True
        except ProxyError:
            pass
        return False

    async def restore(self, name: str) -> bool:
        """Behind a prompt of no importance: what the slot holds is kept in memory before that, and not before this."""
        try:
            await self._ask("/completion", {"prompt": ".", "n_predict": 1}, PATIENT)
            return await self._slot(0, "restore", name) > 0
        except ProxyError:
            return False

    async def _slot(self, slot: int, action: str, name: str) -> int:
        """Tokens that were put away, or are there again."""
        counts = await self._ask(f"/slots/{slot}?action={action}", {"filename": name})
        return number(counts, "n_saved" if action == "save" else "n_restored")

    async def close(self) -> None:
        await super().close()
        await self._openai.close()
