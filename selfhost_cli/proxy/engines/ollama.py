"""Ollama: its own Anthropic endpoint for answers, its own API for everything else.

What it answers was read from 0.34.0. Its Anthropic endpoint cannot count, and cannot be told not to cut a prompt that
does not fit.
"""

from __future__ import annotations

from typing import Any

from selfhost_cli.proxy.contract import Json, Request
from selfhost_cli.proxy.engines import Health
from selfhost_cli.proxy.engines.anthropic import AnthropicEngine
from selfhost_cli.proxy.errors import EngineDown


class OllamaEngine(AnthropicEngine):
    """Healthy while the model is loaded. `facts`: version, capabilities, parameters, quantization, size, size_vram."""

    _shown: tuple[str, Json] | None = None

    async def health(self) -> Health:
        base = self._base_url()
        running = (await self._ask(base, "/api/ps")).get("models") or []
        loaded = next((entry for entry in running if _same(entry.get("name"), self._model)), None)
        if loaded is None:
            raise EngineDown(f"{self._model} is not loaded yet")
        context = loaded.get("context_length")
        if not isinstance(context, int):
            raise EngineDown(f"{self.name} does not tell its context")
        self._context = {base: context}
        version = (await self._ask(base, "/api/version")).get("version")
        sizes = {name: loaded.get(name) for name in ("size", "size_vram")}
        facts = {"version": version, **sizes, **await self._show(base, str(loaded.get("digest")))}
        return Health(context, facts={name: value for name, value in facts.items() if value is not None})

    async def count(self, request: Request) -> int | None:
        return None

    async def _show(self, base: str, digest: str) -> Json:
        """What the model is; asked once, because it takes Ollama longer than all the rest."""
        if self._shown is None or self._shown[0] != digest:
            said = await self._ask(base, "/api/show", {"model": self._model})
            details: Any = said.get("details") or {}
            self._shown = (
                digest,
                {
                    "capabilities": said.get("capabilities"),
                    "parameters": details.get("parameter_size"),
                    "quantization": details.get("quantization_level"),
                },
            )
        return self._shown[1]


def _same(name: object, model: str) -> bool:
    """Ollama adds the tag that a name without one stands for."""
    return name in (model, f"{model}:latest")
