"""The connections to an engine: kept where it keeps them, and no request is lost on one that it has closed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from tests.proxy.kit import HI, STREAM, Json, LlamaStub, assert_error, asynchronous, proxied


@dataclass
class Watched(LlamaStub):
    """Keeps its connections, and writes down from which port each request came."""

    ports: list[int] = field(default_factory=list)

    async def _messages(self, http: web.Request) -> web.StreamResponse:
        self.asked.append(await http.json())
        self.ports.append(http.get_extra_info("peername")[1])
        burst = b"".join(step for step in self.script if isinstance(step, bytes))
        return web.Response(body=burst, content_type="text/event-stream")


@dataclass
class Closing(Watched):
    """Ends every connection when the second request comes on it, without an answer."""

    async def _messages(self, http: web.Request) -> web.StreamResponse:
        port = http.get_extra_info("peername")[1]
        if port in self.ports:
            assert http.transport
            http.transport.abort()
        return await super()._messages(http)


@dataclass
class Hopeless(LlamaStub):
    """Takes every connection and ends it, without an answer."""

    async def _messages(self, http: web.Request) -> web.StreamResponse:
        self.asked.append(await http.json())
        assert http.transport
        http.transport.abort()
        return web.Response()


@pytest.mark.parametrize("body", [HI, STREAM])
@asynchronous
async def test_a_connection_that_the_engine_keeps_is_used_again(tmp_path: Path, body: Json) -> None:
    stub = Watched()
    async with proxied(stub, tmp_path) as proxy:
        for _ in range(3):
            async with proxy.post(body) as response:
                assert b"there" in await response.read()
    assert len(stub.ports) == 3
    assert len(set(stub.ports)) == 1


@asynchronous
async def test_a_request_on_a_connection_that_is_closed_goes_out_on_a_new_one(tmp_path: Path) -> None:
    stub = Closing()
    async with proxied(stub, tmp_path) as proxy:
        for _ in range(3):
            assert (await proxy.answer())[0] == 200
    assert len(set(stub.ports)) == 3


@asynchronous
async def test_an_engine_that_ends_every_connection_is_asked_twice_and_is_down(tmp_path: Path) -> None:
    stub = Hopeless()
    async with proxied(stub, tmp_path) as proxy:
        status, body, _ = await proxy.answer()
    assert_error(status, body, 529, "overloaded_error")
    assert len(stub.asked) == 2
