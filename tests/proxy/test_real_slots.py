"""llama.cpp's real server with two slots, as the launcher starts it."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from selfhost_cli.proxy.engines.llamacpp import LlamaCppEngine
from selfhost_cli.sandbox.assets import Assets
from tests.proxy import test_real_engine
from tests.proxy.kit import asynchronous, proxied
from tests.proxy.test_real_engine import LAUNCHER

pytestmark = pytest.mark.e2e

engine_python = test_real_engine.engine_python
CONTEXT, SLOTS, KV = 1024, 2, "q8_0"
STORY = {"messages": [{"role": "user", "content": "Write a long story about cats."}], "max_tokens": 30, "stream": True}


@dataclass(frozen=True)
class Server:
    port: Path
    log: Path


@pytest.fixture(scope="module")
def two(downloads: Assets, engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("two-slots")
    server = Server(folder / "engine.port", folder / "engine.log")
    words = ["--model", downloads.model, "--alias", "tiny", "--context", CONTEXT, "--slots", SLOTS]
    words += ["--kv-cache-type", KV, "--port-file", server.port]
    with server.log.open("wb") as output:
        process = subprocess.Popen([engine_python, LAUNCHER, *map(str, words)], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not server.port.exists():
            assert process.poll() is None, server.log.read_text()
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        assert process.wait(10) == 0


@asynchronous
async def test_two_answers_are_generated_at_once_and_each_has_the_whole_context(two: Server, tmp_path: Path) -> None:
    (tmp_path / "engine.port").write_text(two.port.read_text())
    moments: list[str] = []

    async def tell() -> None:
        async with proxy.post(STORY) as response:
            await response.content.readuntil(b"content_block_delta")
            moments.append("begins")
            assert b"message_stop" in await response.content.read()
            moments.append("ends")

    async with proxied(None, tmp_path, LlamaCppEngine, slots=SLOTS) as proxy:
        async with proxy.get("/health") as response:
            health = await response.json()
        await asyncio.gather(tell(), tell())
    facts = health["components"]["llamacpp"]
    assert (health["context"], health["slots"], facts["slots"]) == (CONTEXT, SLOTS, SLOTS)
    assert moments == ["begins", "begins", "ends", "ends"]
