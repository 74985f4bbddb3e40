"""A hundred clients that read slowly from a fast engine, and clients that leave: the proxy as a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from selfhost_cli.proxy import web as ours
from tests.proxy.kit import (
    AUTH,
    HELLO,
    HI,
    STREAM,
    TOKEN,
    LlamaStub,
    Step,
    asynchronous,
    ended,
    eventually,
    proxied,
    serving,
    started,
    streamed,
)
from tests.proxy.kit import text as said
from tests.proxy.ollama_stub import OllamaStub, record
from tests.proxy.test_process import ENV, shipped

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux shows it")

READERS = 100
PIECE = "x" * 2**15
PIECES = 128
"""An answer of 4 MB: more than a socket holds, and a hundred of them are more than we may."""
MOST = 150 * 2**20
BUFFER = 2**14


@dataclass
class Running:
    """The engine side in a process of its own."""

    url: str
    pid: int

    @property
    def most_memory(self) -> int:
        """Bytes, the highest it ever was."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found
        return int(found[1]) * 1024


@asynccontextmanager
async def running(stub: LlamaStub, run: Path, slots: int) -> AsyncIterator[Running]:
    env = ENV | {"PYTHONPATH": str(shipped(run)), "PATH": os.environ["PATH"], "SELFHOST_ENGINE": stub.name}
    async with serving(stub.application()) as upstream:
        (run / "engine.port").write_text(upstream.rpartition(":")[2])
        with (run / "log").open("wb") as log:
            args = ["-P", "-m", "selfhost_cli.proxy", "--run-dir", str(run), "--port", "0", "--slots", str(slots)]
            process = await asyncio.create_subprocess_exec(sys.executable, *args, env=env, cwd=run, stderr=log)
        try:
            await eventually((run / "ready").exists, seconds=20)
            yield Running(f"http://127.0.0.1:{(run / 'proxy.port').read_text().strip()}", process.pid)
        finally:
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 10) == 0


def small(address: Any) -> socket.socket:
    """Nothing hides in a client's own buffer."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    return made


@asynccontextmanager
async def asking(url: str, body: Any = STREAM) -> AsyncIterator[aiohttp.ClientResponse]:
    connector = aiohttp.TCPConnector(socket_factory=small)
    async with (
        aiohttp.ClientSession(connector=connector, headers=AUTH, read_bufsize=BUFFER) as session,
        session.post(url + "/v1/messages", json=body) as response,
    ):
        assert response.status == 200
        yield response


async def settled(value: Callable[[], int]) -> int:
    """What it comes to rest at."""
    before, since = value(), time.monotonic()
    while time.monotonic() - since < 0.5:
        await asyncio.sleep(0.02)
        if value() != before:
            before, since = value(), time.monotonic()
    return before


@dataclass
class FastStub(LlamaStub):
    """Says that many pieces as fast as they are read; `sent` counts those of all answers."""

    pieces: int = PIECES
    sent: int = 0

    async def _messages(self, http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        assert http.transport
        http.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        begin, piece = said(PIECE)
        self.running += 1
        try:
            for part in (started(), begin, *repeat(piece, self.pieces), *ended()):
                await response.write(part)
                self.sent += part is piece
            await response.write_eof()
        finally:
            self.running -= 1
        return response


@asynchronous
async def test_a_hundred_slow_readers_get_whole_answers_and_little_of_our_memory(tmp_path: Path) -> None:
    stub = FastStub()
    async with running(stub, tmp_path, READERS) as proxy, AsyncExitStack() as clients:
        responses = await asyncio.gather(*(clients.enter_async_context(asking(proxy.url)) for _ in range(READERS)))
        assert await settled(lambda: stub.sent) >= READERS  # all are answered, none reads: this is the worst

        async def read(response: aiohttp.ClientResponse) -> int:
            length, last = 0, ""
            async for data in streamed(response.content.iter_any()):
                last = data["type"]
                length += len(data.get("delta", {}).get("text", ""))
            assert last == "message_stop"
            return length

        lengths = await asyncio.gather(*(read(response) for response in responses))
        assert lengths == [len(PIECE) * PIECES] * READERS
        assert proxy.most_memory < MOST


# --- clients that leave ---


async def gone(stub: LlamaStub, client: asyncio.Task[Any]) -> None:
    """The client leaves in the middle of its answer; asserts that the engine knows within a second."""
    await eventually(lambda: stub.running == 1)
    client.cancel()
    await eventually(lambda: stub.running == 0, seconds=1)
    await asyncio.gather(client, return_exceptions=True)
    assert client.cancelled()


@pytest.mark.parametrize(
    ("stub", "word"), [(LlamaStub(), HELLO[:3]), (OllamaStub(), [record("Hello")])], ids=["llamacpp", "ollama"]
)
@asynchronous
async def test_a_client_that_leaves_ends_the_generation_within_a_second(
    tmp_path: Path, stub: LlamaStub, word: list[Step]
) -> None:
    """Whether it was reading, or waited for the first word or the whole answer; the only slot is free again."""
    whole, hold = stub.script, asyncio.Event()

    async def read(url: str, body: Any, heard: asyncio.Event) -> bytes:
        async with asking(url, body) as response:
            first = await response.content.readany()
            heard.set()
            return first + await response.read()

    async with running(stub, tmp_path, slots=1) as proxy:
        stub.script, heard = [*word, hold], asyncio.Event()
        client = asyncio.create_task(read(proxy.url, STREAM, heard))
        await heard.wait()
        await gone(stub, client)
        for body in (STREAM, HI):
            stub.script = [hold]
            await gone(stub, asyncio.create_task(read(proxy.url, body, asyncio.Event())))
        stub.script = whole
        assert b"message_stop" in await asyncio.wait_for(read(proxy.url, STREAM, asyncio.Event()), 5)


@asynchronous
async def test_a_client_that_stopped_reading_and_then_leaves_ends_it_as_well(tmp_path: Path) -> None:
    stub = FastStub(pieces=10**6)
    async with running(stub, tmp_path, slots=1) as proxy:
        async with asking(proxy.url):
            await settled(lambda: stub.sent)
            assert stub.running == 1
        await eventually(lambda: stub.running == 0, seconds=1)


# --- clients that stay ---


@asynchronous
async def test_a_client_that_stays_and_reads_nothing_loses_the_slot_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "UNREAD_S", 0.3)
    stub = FastStub(pieces=10**6)
    async with proxied(stub, tmp_path, ping_every=0.05) as proxy, asking(proxy.url):
        await eventually(lambda: stub.running == 1)
        stub.pieces = 1
        async with asyncio.timeout(15):
            events = await proxy.stream()
    assert events[-1]["type"] == "message_stop"


@asynchronous
async def test_one_that_reads_all_but_the_end_is_not_waited_for_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "UNREAD_S", 0.3)
    left = asyncio.Event()

    async def answer(http: web.Request) -> web.StreamResponse:
        assert http.transport
        try:
            async with ours.EventStream(http) as stream:
                while http.transport.get_write_buffer_size() <= 2**16:
                    await stream.send({"type": "x", "text": "x" * 2**13})
                    await asyncio.sleep(0)
            return stream.response
        finally:
            left.set()

    app = ours.application(TOKEN)
    app.router.add_post("/v1/messages", answer)
    async with serving(app) as url, asking(url):
        await asyncio.wait_for(left.wait(), 10)


@asynchronous
async def test_one_that_reads_slowly_gets_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "UNREAD_S", 1.0)
    stub = FastStub()
    began = time.monotonic()
    async with proxied(stub, tmp_path, ping_every=0.05) as proxy, asking(proxy.url) as response:
        async for _ in response.content.iter_any():
            await asyncio.sleep(0.01)
    assert time.monotonic() - began > 1
