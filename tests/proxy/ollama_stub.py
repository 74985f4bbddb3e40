"""A stub with the manners of Ollama's own API, as 0.34.0 behaves."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from selfhost_cli.proxy import contract
from selfhost_cli.proxy.contract import Json
from selfhost_cli.proxy.engines import AnswerEvent
from selfhost_cli.proxy.engines.ollama import OllamaEngine
from tests.proxy import kit
from tests.proxy.kit import Step, serving

PROMPT = "<|rendered|>"
NDJSON = "application/x-ndjson"


def record(content: str = "", **more: Any) -> bytes:
    """A line of /api/chat; `more` belongs to the message."""
    message = {"role": "assistant", "content": content, **more}
    return json.dumps({"model": "tiny", "message": message, "done": False}).encode() + b"\n"


def called(name: str, arguments: Json) -> bytes:
    return record(tool_calls=[{"id": "call_8xe6ixj1", "function": {"index": 0, "name": name, "arguments": arguments}}])


def done(reason: str = "stop", tokens: int = 7, prompt: int = 20, cached: int = 0) -> bytes:
    counts = {"prompt_eval_count": prompt, "prompt_eval_cached_count": cached, "eval_count": tokens}
    end = {"model": "tiny", "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": reason}
    return json.dumps(end | counts).encode() + b"\n"


def said(*pieces: str, **end: Any) -> list[Step]:
    return [*(record(piece) for piece in pieces), done(**({"tokens": len(pieces) + 1} | end))]


def raw(*pieces: str, **end: Any) -> list[Step]:
    """The same of /api/generate."""
    lines = [json.dumps({"model": "tiny", "response": piece, "done": False}).encode() + b"\n" for piece in pieces]
    last = json.loads(done(**({"tokens": len(pieces) + 1} | end)))
    del last["message"]
    return [*lines, json.dumps(last | {"response": ""}).encode() + b"\n"]


@dataclass
class OllamaStub(kit.LlamaStub):
    """Plays `script` for every chat and `raw` for every raw generation; renders every chat as PROMPT.

    `asked` has the chats, `generated` the raw generations, `measured` what came to count. `refusal` answers chats.
    `loaded` is what /api/ps lists, "" for nothing.
    """

    kind = OllamaEngine
    name = "ollama"

    loaded: str = "tiny:latest"
    capabilities: list[str] = field(default_factory=lambda: ["completion", "tools"])
    shown: int = 0
    script: list[Step] = field(default_factory=lambda: said("Hello", " there"))
    raw: list[Step] = field(default_factory=raw)
    parameters: str = "temperature                    0"
    modelfile: str = "FROM tiny\nTEMPLATE {{ .Prompt }}\n"
    renders: bool = True
    generated: list[Json] = field(default_factory=list)
    rendered: list[Json] = field(default_factory=list)
    measured: list[Json] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return self.loaded == "tiny:latest"

    def application(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/ps", self._ps)
        app.router.add_post("/api/show", self._show)
        app.router.add_post("/api/chat", self._chat)
        app.router.add_post("/api/generate", self._generate)
        return app

    async def _version(self, http: web.Request) -> web.Response:
        return web.json_response({"version": "0.34.0"})

    async def _ps(self, http: web.Request) -> web.Response:
        model = {"name": self.loaded, "digest": "abc", "size": 1000, "size_vram": 900, "context_length": self.n_ctx}
        return web.json_response({"models": [model] if self.loaded else []})

    async def _show(self, http: web.Request) -> web.Response:
        self.shown += 1
        details = {"parameter_size": "494.03M", "quantization_level": "Q4_K_M"}
        more = {"parameters": self.parameters, "modelfile": self.modelfile, "template": "{{ .Prompt }}"}
        return web.json_response({"details": details, "capabilities": self.capabilities, **more})

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        if body.get("_debug_render_only") and self.renders:
            self.rendered.append(body)
            return web.json_response({"model": "tiny", "done": False, "_debug_info": {"rendered_template": PROMPT}})
        if not body["stream"]:
            self.measured.append(body)
            return web.json_response(json.loads(done("length", 1, 33, 32)))
        self.asked.append(body)
        if self.refusal:
            return web.json_response(self.refusal[1], status=self.refusal[0])
        return await self._play(http, self.script, NDJSON)

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        self.generated.append(await http.json())
        return await self._play(http, self.raw, NDJSON)


@asynccontextmanager
async def engine(stub: OllamaStub) -> AsyncIterator[OllamaEngine]:
    """The adapter alone, before that stub."""
    async with serving(stub.application()) as url:
        made = OllamaEngine("ollama", "tiny", lambda: url)
        try:
            yield made
        finally:
            await made.close()


async def events(stub: OllamaStub, body: Json) -> list[AnswerEvent]:
    """What the adapter tells for that request of a client."""
    async with engine(stub) as made:
        return [event async for event in made.messages(contract.parse(json.dumps(body).encode()))]
