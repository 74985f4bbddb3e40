"""What llama.cpp's real server has read ahead survives its restart, in a file that is the next one's to find."""

from __future__ import annotations

import asyncio
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.proxy.engines.llamacpp import LlamaCppEngine
from selfhost_cli.sandbox.assets import Assets
from tests.proxy import test_real_engine
from tests.proxy.kit import asynchronous, proxied
from tests.proxy.test_prewarm import is_, until, wish
from tests.proxy.test_real_engine import LAUNCHER, TASK
from tests.waiting import until as waited

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

engine_python = test_real_engine.engine_python
WISHES: dict[str, dict[str, Any]] = {
    "cli": TASK | {"system": "You are a coding assistant. " + "Use the tools. " * 40},
    "sdk-cli": TASK | {"system": "You are another assistant. " + "Use the tools. " * 40},
}


@contextmanager
def launched(python: Path, model: Path, run: Path) -> Iterator[None]:
    port = run / "engine.port"
    port.unlink(missing_ok=True)
    words = ["--model", model, "--alias", "tiny", "--context", 2048, "--port-file", port]
    with (run / "engine.log").open("ab") as output:
        process = subprocess.Popen([python, LAUNCHER, *map(str, words)], stdout=output, stderr=output)
    try:
        waited(lambda: port.exists() or process.poll() is not None, 60)
        yield
    finally:
        process.terminate()
        process.wait(10)


@asynchronous
async def test_a_new_server_is_warm_without_reading(downloads: Assets, engine_python: Path, tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        with launched(engine_python, downloads.model, tmp_path):
            async with proxied(None, tmp_path, LlamaCppEngine) as proxy, asyncio.timeout(110):
                for name, body in WISHES.items():
                    await wish(proxy, body, name)
                seen.append((await until(proxy, is_("warm"), 90))["wishes"])
                for body in WISHES.values():
                    _, answer, _ = await proxy.answer(body | {"messages": [{"role": "user", "content": "Hello."}]})
                    assert answer["usage"]["input_tokens"] < 40 < answer["usage"]["cache_read_input_tokens"]
    for name in WISHES:
        first, second = (wishes[name] for wishes in seen)
        assert first["digest"] == second["digest"]
        assert (first["reused"] < 10, second["reused"]) == (True, first["tokens"] - 1)
    kept = tmp_path / "prompts"
    assert {file.name for file in kept.iterdir()} == {one["digest"] for one in seen[0].values()}
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
