"""What a service says instead of an answer, as Claude Code hears it: the backend named, the meaning kept, no key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from selfhost_cli.proxy.engines.anthropic import AnthropicAPI
from selfhost_cli.proxy.engines.named import Named
from selfhost_cli.proxy.engines.openai import OpenAIEngine
from selfhost_cli.proxy.engines.upstream import way_out
from selfhost_cli.proxy.rundir import RunDir
from selfhost_cli.proxy.server import Settings, build_server
from tests.proxy.kit import TOKEN, Json, Proxy, asynchronous, serving, texts
from tests.proxy.openai_stub import HELLO, KEY, OpenAIStub, words

ASKED = {"max_tokens": 16, "messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def hosted(url: str, run: Path, head_s: float = 5.0) -> AsyncIterator[Proxy]:
    """As the keeper hosts a service that is sold."""
    engine = Named("sold", OpenAIEngine("sold", "tiny", lambda: url, KEY, context=4096))
    app = build_server(Settings(TOKEN, "tiny", "0.0", head_s=head_s), engine, RunDir(run))
    async with serving(app) as address, aiohttp.ClientSession() as session:
        yield Proxy(address, run, session)


@asynccontextmanager
async def sold(stub: OpenAIStub, run: Path) -> AsyncIterator[Proxy]:
    stub.owner = "sold"
    async with serving(stub.application()) as url, hosted(url, run) as proxy:
        yield proxy


async def refused(proxy: Proxy, *, stream: bool) -> tuple[int, Json, Any]:
    """Status, error and headers."""
    body = ASKED | {"stream": stream}
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with proxy.session.post(f"{proxy.url}/v1/messages", json=body, headers=headers) as answer:
        text = await answer.text()
        assert KEY not in text + str(answer.headers)
        return answer.status, json.loads(text)["error"], answer.headers


CASES = {
    "401": ((401, {"message": f"Wrong API Key {KEY}", "code": "wrong_api_key"}), 403, "selfhost backends key sold"),
    "402": ((402, {"message": "Payment required"}), 402, "selfhost use"),
    "404": ((404, {"message": "Model tiny does not exist", "code": "model_not_found"}), 404, "backends test sold"),
    "408": ((408, {"message": "Request timed out"}), 529, "selfhost use"),
    "429": ((429, {"message": "Requests per minute limit exceeded"}), 429, "selfhost use"),
    "500": ((500, {"message": "Internal"}), 400, "Internal"),
    "502_html": ((502, "<html><h1>502 Bad Gateway</h1></html>"), 529, "selfhost use"),
    "503": ((503, {"message": "Service unavailable"}), 529, "selfhost use"),
}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("case", CASES)
@asynchronous
async def test_a_refusal_names_the_backend_and_keeps_its_meaning(case: str, stream: bool, tmp_path: Path) -> None:
    refusal, status, remedy = CASES[case]
    stub = OpenAIStub(refusals=[refusal, refusal])
    async with sold(stub, tmp_path) as proxy:
        got, error, headers = await refused(proxy, stream=stream)
    assert got == status
    assert error["message"].startswith("backend sold: ")
    assert remedy in error["message"]
    assert ("x-should-retry" in headers) == (status in (402, 403, 404))


@asynchronous
async def test_429_with_retry_after(tmp_path: Path) -> None:
    stub = OpenAIStub(refusals=[(429, {"message": "slow down"})], retry_after="7")
    async with sold(stub, tmp_path) as proxy:
        status, error, headers = await refused(proxy, stream=True)
    assert (status, error["type"], headers["retry-after"]) == (429, "rate_limit_error", "7")


@asynchronous
async def test_network_down(tmp_path: Path) -> None:
    async with serving(web.Application()) as url:
        pass
    async with hosted(url, tmp_path) as proxy:
        status, error, _ = await refused(proxy, stream=True)
    assert status == 529
    assert error["message"].startswith("backend sold: ")


@asynchronous
async def test_model_not_loaded(tmp_path: Path) -> None:
    listed: list[Json] = [{"id": "other"}, {"id": "third"}]
    async with sold(OpenAIStub(listed=listed), tmp_path) as proxy:
        status, error, _ = await refused(proxy, stream=True)
    assert status == 529
    assert "does not serve tiny" in error["message"]


@asynchronous
async def test_a_cut_in_the_middle_is_told_as_an_event(tmp_path: Path) -> None:
    async with sold(OpenAIStub(script=[*words("Hello", " th")]), tmp_path) as proxy:
        events = await proxy.stream(ASKED | {"stream": True})
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["message"].startswith("backend sold: ")


@asynchronous
async def test_what_a_service_says_comes_as_it_comes(tmp_path: Path) -> None:
    async with sold(OpenAIStub(script=list(HELLO)), tmp_path) as proxy:
        events = await proxy.stream(ASKED | {"stream": True})
    assert texts(events) == "Hello there"


@asynchronous
async def test_a_key_goes_to_no_other_host(tmp_path: Path) -> None:
    """Not even when the one that was named says so."""
    thief = OpenAIStub(owner="sold")
    async with serving(thief.application()) as elsewhere:

        async def away(http: web.Request) -> web.Response:
            raise web.HTTPTemporaryRedirect(elsewhere + http.path)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", away)
        async with serving(app) as url, hosted(url, tmp_path) as proxy:
            status, error, _ = await refused(proxy, stream=True)
    assert status >= 400
    assert "backend sold" in error["message"]
    assert thief.asked == []
    assert thief.keys == set()


@asynchronous
async def test_anthropics_own_api_is_asked_in_its_words(tmp_path: Path) -> None:
    asked: list[tuple[Json, Any]] = []

    async def messages(http: web.Request) -> web.Response:
        asked.append((await http.json(), http.headers))
        return web.json_response(
            {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, status=529
        )

    app = web.Application()
    app.router.add_post("/v1/messages", messages)
    async with serving(app) as url:
        engine = Named("sold", AnthropicAPI("sold", "claude-x", lambda: url, KEY, context=9000))
        side = build_server(Settings(TOKEN, "claude-x", "0.0", head_s=5.0), engine, RunDir(tmp_path))
        async with serving(side) as address, aiohttp.ClientSession() as session:
            thought = {"type": "thinking", "thinking": "hm", "signature": ""}
            turns = [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": [thought, {"type": "text", "text": "yes"}]},
                {"role": "user", "content": "go on"},
            ]
            body = {"max_tokens": 16, "system": "Be brief.", "messages": turns, "stream": True}
            headers = {"authorization": f"Bearer {TOKEN}"}
            async with session.post(f"{address}/v1/messages", json=body, headers=headers) as answer:
                assert answer.status == 529
    sent, headers_sent = asked[0]
    assert headers_sent["x-api-key"] == KEY
    assert "authorization" not in headers_sent
    assert sent["model"] == "claude-x"
    assert sent["system"][0]["cache_control"] == {"type": "ephemeral"}
    assert sent["messages"][-1]["content"][-1]["cache_control"] == {"type": "ephemeral"}
    assert "thinking" not in {block["type"] for message in sent["messages"] for block in message["content"]}


class Way:
    """A proxy as companies have them: it notes what it is asked for, and lets nobody through."""

    def __init__(self) -> None:
        self.asked = ""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked += (await reader.readuntil(b"\r\n\r\n")).decode()
        writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()


@asynchronous
async def test_a_service_is_asked_through_the_proxy_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = Way()
    server = await asyncio.start_server(way, "127.0.0.1", 0)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    monkeypatch.delenv("no_proxy", raising=False)
    async with server, hosted("https://api.example", tmp_path) as proxy:
        status, error, _ = await refused(proxy, stream=False)
    assert status == 529
    assert "Forbidden" in error["message"]
    assert way.asked.startswith("CONNECT api.example:443 HTTP/1.1")
    assert KEY not in way.asked


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "http://gpu.lan:8000", "https://inside.example:8443/v1"])
def test_what_is_near_or_excepted_is_asked_directly(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert way_out(url) is None
    assert way_out("https://outside.example") == "http://127.0.0.1:9"
