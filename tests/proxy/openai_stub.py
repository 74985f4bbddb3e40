"""Servers of OpenAI's API on loopback: llama.cpp's as b11549 behaves, the others as they document themselves.

vLLM: docs.vllm.ai (protocol of chat completions and of tokenize), issues 20409 and 37011, harbor pull 996.
SGLang: QwenLM/Qwen3 issue 1321. Cerebras: inference-docs.cerebras.ai, cline issue 5140.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from selfhost_cli.proxy import contract
from selfhost_cli.proxy.engines import AnswerEvent, Engine
from selfhost_cli.proxy.engines.openai import OpenAIEngine
from selfhost_cli.proxy.rundir import RunDir
from selfhost_cli.proxy.server import Settings, build_server
from tests.proxy.kit import TOKEN, Json, Player, Proxy, Step, serving

KEY = "sk-not-a-real-one"


def chunk(delta: Json | None = None, finish: str | None = None, **more: Any) -> bytes:
    """`more` goes into the choice."""
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish, **more}
    return sent({"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "tiny", "choices": [choice]})


def sent(data: Any) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def words(*pieces: str) -> list[bytes]:
    return [chunk({"role": "assistant", "content": None}), *(chunk({"content": piece}) for piece in pieces)]


def call(index: int | None, name: str | None = None, arguments: Any = "", id: str = "") -> bytes:
    """One delta of a tool call; None and "" leave a field out."""
    function = {key: value for key, value in {"name": name, "arguments": arguments}.items() if value is not None}
    told = {"index": index, "id": id or None, "function": function}
    return chunk({"tool_calls": [{key: value for key, value in told.items() if value is not None}]})


def ended(finish: str = "stop", prompt: int = 20, cached: int = 5, output: int = 7, **more: Any) -> list[bytes]:
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": {"cached_tokens": cached}}
    return [chunk(finish=finish, **more), sent({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


HELLO = [*words("Hello", " there"), *ended()]


@dataclass
class OpenAIStub(Player):
    """Plays `script` for every generation; `refusals` are (status, body) and come before it."""

    script: list[Step] = field(default_factory=lambda: list(HELLO))
    refusals: list[tuple[int, Any]] = field(default_factory=list)
    owner: str = "llamacpp"
    n_ctx: int = 4096
    tokens: int = 20
    listed: list[Json] | None = None
    retry_after: str = ""
    asked: list[Json] = field(default_factory=list)
    counted: list[tuple[str, Json]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        if self.owner == "llamacpp":
            app.router.add_get("/props", self._props)
            app.router.add_post("/v1/chat/completions/input_tokens", self._count)
        if self.owner == "vllm":
            app.router.add_post("/tokenize", self._count)
        return app

    async def _models(self, http: web.Request) -> web.Response:
        self.keys.add(http.headers.get("authorization"))
        model: Json = {"id": "tiny", "object": "model", "created": 0, "owned_by": self.owner}
        model |= {"max_model_len": self.n_ctx} if self.owner in ("vllm", "sglang") else {}
        return web.json_response({"object": "list", "data": [model] if self.listed is None else self.listed})

    async def _props(self, http: web.Request) -> web.Response:
        return web.json_response({"default_generation_settings": {"n_ctx": self.n_ctx}, "total_slots": 2})

    async def _count(self, http: web.Request) -> web.Response:
        self.counted.append((http.path, await http.json()))
        if http.path == "/tokenize":
            return web.json_response({"count": self.tokens, "max_model_len": self.n_ctx, "tokens": [1] * self.tokens})
        return web.json_response({"input_tokens": self.tokens, "object": "response.input_tokens"})

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        self.asked.append(await http.json())
        self.keys.add(http.headers.get("authorization"))
        if self.refusals:
            status, body = self.refusals.pop(0)
            headers = {"retry-after": self.retry_after} if self.retry_after else None
            if isinstance(body, str):
                return web.Response(status=status, text=body, headers=headers)
            return web.json_response(body, status=status, headers=headers)
        return await self._play(http, self.script, "text/event-stream")


@asynccontextmanager
async def engine_on(stub: OpenAIStub, **options: Any) -> AsyncIterator[OpenAIEngine]:
    async with serving(stub.application()) as url:
        engine = OpenAIEngine("engine", "tiny", lambda: url, KEY, **options)
        try:
            yield engine
        finally:
            await engine.close()


async def answer(engine: Engine, body: Json) -> list[AnswerEvent]:
    return [event async for event in engine.messages(contract.parse(json.dumps(body).encode()))]


@asynccontextmanager
async def proxied(url: str, run: Path) -> AsyncIterator[Proxy]:
    """The proxy before the engine at that address."""
    engine = OpenAIEngine("engine", "tiny", lambda: url, KEY)
    app = build_server(Settings(TOKEN, "tiny", "0.0"), engine, RunDir(run))
    async with serving(app) as address, aiohttp.ClientSession() as session:
        yield Proxy(address, run, session)
