"""Real servers on loopback for the proxy's tests: a stub with llama.cpp's manners, and the proxy in front of it."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
from aiohttp import web

from selfhost_cli.proxy import sse
from selfhost_cli.proxy.engines.anthropic import AnthropicEngine
from selfhost_cli.proxy.rundir import RunDir
from selfhost_cli.proxy.server import Settings, build_server
from selfhost_cli.proxy.web import runner

Json = dict[str, Any]
TOKEN = "box-token"
AUTH = {"authorization": f"Bearer {TOKEN}"}
HI: Json = {"max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
STREAM: Json = HI | {"stream": True}
READ = {"name": "Read", "description": "d", "input_schema": {"type": "object"}}


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def eventually(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    app_runner = runner(app)
    await app_runner.setup()
    try:
        await web.TCPSite(app_runner, "127.0.0.1", 0).start()
        yield "http://{}:{}".format(*app_runner.addresses[0][:2])
    finally:
        await app_runner.cleanup()


# --- llama.cpp's server, as b11549 behaves ---


def wire(name: str, **data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data}, separators=(',', ':'))}\n\n".encode()


def started(uncached: int = 20, cached: int = 0) -> bytes:
    usage = {"cache_read_input_tokens": cached, "input_tokens": uncached, "output_tokens": 0}
    message: Json = {"id": "chatcmpl-eaO8AwfME3W0uL8nRqiYZ6gt8Q0tcqhi", "type": "message", "role": "assistant"}
    message |= {"content": [], "model": "x", "stop_reason": None, "stop_sequence": None, "usage": usage}
    return wire("message_start", message=message)


def text(*pieces: str, index: int = 0) -> list[bytes]:
    start = wire("content_block_start", index=index, content_block={"type": "text", "text": ""})
    deltas = [wire("content_block_delta", index=index, delta={"type": "text_delta", "text": piece}) for piece in pieces]
    return [start, *deltas]


def call(name: str, *pieces: str, index: int = 0) -> list[bytes]:
    block = {"type": "tool_use", "id": "085514ap3JGtJrqITJma8aXmtSBtyzqj", "name": name}
    deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
    return [
        wire("content_block_start", index=index, content_block=block),
        *(wire("content_block_delta", index=index, delta=delta) for delta in deltas),
    ]


def ended(reason: str = "end_turn", tokens: int = 7, blocks: int = 1, sequence: str | None = None) -> list[bytes]:
    """All stops at the very end, usage with output tokens only."""
    return [
        *(wire("content_block_stop", index=index) for index in range(blocks)),
        wire(
            "message_delta",
            delta={"stop_reason": reason, "stop_sequence": sequence},
            usage={"output_tokens": tokens},
        ),
        wire("message_stop"),
    ]


HELLO = [started(), *text("Hello", " there"), *ended()]
LOADING: Json = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
"""What it says, with a 503, until its model is loaded."""
Step = bytes | asyncio.Event | str


@dataclass(kw_only=True)
class Player:
    """Plays a script as an answer: bytes are sent, events waited for, "die" cuts the connection."""

    gone: int = 0
    running: int = 0

    async def _play(
        self, http: web.Request, script: Iterable[Step], kind: str, headers: dict[str, str] | None = None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": kind, **(headers or {})})
        await response.prepare(http)
        self.running += 1
        try:
            for step in script:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif step == "die":
                    assert http.transport
                    http.transport.abort()
                    return response
                else:
                    assert isinstance(step, bytes)
                    await response.write(step)
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            self.gone += 1
            raise
        finally:
            self.running -= 1
        return response


@dataclass
class LlamaStub(Player):
    """Plays `script` for every generation."""

    kind: ClassVar[type[Any]] = AnthropicEngine
    name: ClassVar[str] = "llamacpp"

    script: list[Step] = field(default_factory=lambda: list(HELLO))
    refusal: tuple[int, Json] | None = None
    tokens: int = 20
    n_ctx: int = 4096
    asked: list[Json] = field(default_factory=list)
    counted: int = 0

    @property
    def healthy(self) -> bool:
        return True

    def application(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/props", self._props)
        app.router.add_post("/v1/messages", self._messages)
        app.router.add_post("/v1/messages/count_tokens", self._count)
        return app

    async def _props(self, http: web.Request) -> web.Response:
        return web.json_response({"default_generation_settings": {"n_ctx": self.n_ctx}, "total_slots": 1})

    async def _count(self, http: web.Request) -> web.Response:
        self.counted += 1
        return web.json_response({"input_tokens": self.tokens})

    async def _messages(self, http: web.Request) -> web.StreamResponse:
        self.asked.append(await http.json())
        if self.refusal:
            return web.json_response(self.refusal[1], status=self.refusal[0])
        # the lie: it promises to keep the connection, and closes it after the stream
        response = await self._play(http, self.script, "text/event-stream", {"Keep-Alive": "timeout=5, max=100"})
        if http.transport:
            http.transport.close()
        return response


# --- the proxy before it ---


@dataclass
class Proxy:
    """A client of a proxy that is up."""

    url: str
    run: Path
    session: aiohttp.ClientSession

    def post(self, body: Any, path: str = "/v1/messages", **headers: str) -> Any:
        return self.session.post(self.url + path, data=as_body(body), headers=AUTH | headers)

    def get(self, path: str) -> Any:
        return self.session.get(self.url + path, headers=AUTH)

    async def stream(self, body: Any = STREAM, **headers: str) -> list[Json]:
        async with self.post(body, **headers) as response:
            assert response.status == 200, await response.text()
            return [event async for event in streamed(response.content.iter_any())]

    async def answer(self, body: Any = HI, **headers: str) -> tuple[int, Json, Any]:
        async with self.post(body, **headers) as response:
            return response.status, await response.json(), response.headers


async def streamed(chunks: AsyncIterable[bytes]) -> AsyncIterator[Json]:
    """The data of a stream's events, as it comes."""
    parser = sse.Parser()
    async for chunk in chunks:
        for event in parser.feed(chunk):
            yield json.loads(event.data)


def as_body(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


@asynccontextmanager
async def proxied(
    stub: LlamaStub | None, run: Path, kind: type[Any] | None = None, **settings: Any
) -> AsyncIterator[Proxy]:
    """A proxy in front of that stub, through its adapter or that one; with None the engine is not up."""
    quick = replace(Settings(TOKEN, "tiny", "0.0"), touch_every=0.01, ready_every=0.01)
    made = stub or LlamaStub()
    engine = (kind or made.kind)(made.name, "tiny", RunDir(run).engine_url)
    app = build_server(replace(quick, **settings), engine, RunDir(run))
    async with serving(app) as url, aiohttp.ClientSession() as session:
        if stub is None:
            yield Proxy(url, run, session)
            return
        async with serving(stub.application()) as upstream:
            (run / "engine.port").write_text(upstream.rpartition(":")[2])
            if stub.healthy:
                # else a test may end while the proxy still connects, and leave a transport behind
                await eventually((run / "ready").exists)
            yield Proxy(url, run, session)


# --- Anthropic's event grammar ---


def check_grammar(events: Iterable[Json]) -> Json:
    """Asserts that it is one complete, well-formed answer, and returns its message_delta."""
    kinds = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
    said = [event for event in events if event["type"] != "ping"]
    assert said[0]["type"] == "message_start"
    message = said[0]["message"]
    assert message["id"].startswith("msg_")
    assert message["content"] == []
    assert message["usage"].keys() >= {"input_tokens", "output_tokens", "cache_read_input_tokens"}
    *blocks, delta, stop = said[1:]
    opened, kind = -1, ""
    for event in blocks:
        if event["type"] == "content_block_start":
            assert not kind, "the block before is still open"
            opened, kind = opened + 1, event["content_block"]["type"]
            if kind == "tool_use":
                assert event["content_block"]["input"] == {}
                assert event["content_block"]["id"].startswith("toolu_")
        else:
            assert kind, "no block is open"
        assert event["index"] == opened
        if event["type"] == "content_block_delta":
            assert event["delta"]["type"] == kinds[kind]
        if event["type"] == "content_block_stop":
            kind = ""
    assert not kind, "a block was never closed"
    assert delta["type"] == "message_delta"
    assert delta["delta"]["stop_reason"] in ("end_turn", "max_tokens", "stop_sequence", "tool_use")
    assert delta["usage"].keys() >= {"input_tokens", "output_tokens", "cache_read_input_tokens"}
    assert stop == {"type": "message_stop"}
    return dict(delta)


def texts(events: Iterable[Json]) -> str:
    return "".join(event.get("delta", {}).get("text", "") for event in events)


def types(events: Iterable[Json]) -> list[str]:
    return [event["type"] for event in events]


def assert_error(status: int, body: Json, expected: int, kind: str) -> str:
    """Asserts an Anthropic error object, and returns its message."""
    assert (status, body["type"], body["error"]["type"]) == (expected, "error", kind), body
    assert body["request_id"].startswith("req_")
    return str(body["error"]["message"])
