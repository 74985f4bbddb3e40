"""The engine side as it is shipped: a zip, started with `python -m`."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

import selfhost_cli
from tests.proxy.kit import AUTH, TOKEN, LlamaStub, asynchronous, eventually, serving

PACKAGE = Path(selfhost_cli.__file__).parent
ENV = {"SELFHOST_TOKEN": TOKEN, "SELFHOST_MODEL": "tiny", "SELFHOST_ENGINE": "llamacpp", "SELFHOST_VERSION": "9.9"}


def shipped(to: Path) -> Path:
    with zipfile.ZipFile(to / "proxy.zip", "w") as archive:
        for path in [PACKAGE / "__init__.py", *sorted((PACKAGE / "proxy").rglob("*.py"))]:
            archive.write(path, Path("selfhost_cli") / path.relative_to(PACKAGE))
    return to / "proxy.zip"


@asynccontextmanager
async def started(run: Path, port: int, **env: str) -> AsyncIterator[asyncio.subprocess.Process]:
    env = {"PYTHONPATH": str(shipped(run)), "PATH": os.environ["PATH"], **env}
    args = ["-P", "-m", "selfhost_cli.proxy", "--run-dir", str(run), "--port", str(port)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *args, env=env, cwd=run, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynchronous
async def test_it_binds_beside_a_taken_port_writes_it_down_and_comes_back_to_it(tmp_path: Path) -> None:
    port_file = tmp_path / "proxy.port"
    async with serving(LlamaStub().application()) as upstream:
        (tmp_path / "engine.port").write_text(upstream.rpartition(":")[2])
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            preferred = taken.getsockname()[1]
            async with started(tmp_path, preferred, **ENV) as process:
                await eventually((tmp_path / "ready").exists, seconds=20)
                port = int(port_file.read_text())
                assert port != preferred
                url = f"http://127.0.0.1:{port}/health"
                async with aiohttp.ClientSession(headers=AUTH) as session, session.get(url) as response:
                    assert (await response.json())["version"] == "9.9"
                process.send_signal(signal.SIGTERM)
                assert await asyncio.wait_for(process.wait(), 10) == 0
        (tmp_path / "ready").unlink()
        async with started(tmp_path, preferred, **ENV):
            await eventually((tmp_path / "ready").exists, seconds=20)
            assert int(port_file.read_text()) == port


@asynchronous
async def test_without_its_settings_it_says_which_are_missing(tmp_path: Path) -> None:
    async with started(tmp_path, 0, SELFHOST_ENGINE="llamacpp") as process:
        _, said = await process.communicate()
    assert process.returncode == 1
    assert b"not set: SELFHOST_TOKEN, SELFHOST_MODEL" in said
    assert b"Traceback" not in said
