"""The engine side before llama.cpp's real server with a real model."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import selfhost_cli
from selfhost_cli.proxy.engines.llamacpp import LlamaCppEngine
from selfhost_cli.sandbox import assets
from selfhost_cli.sandbox.assets import Assets
from tests.proxy.kit import HI, Proxy, assert_error, asynchronous, check_grammar, proxied, texts

pytestmark = pytest.mark.e2e

LAUNCHER = Path(selfhost_cli.__file__).parent / "templates" / "llamacpp.py"
CONTEXT = 2048


def tool(name: str, *keys: str) -> dict[str, Any]:
    properties = {key: {"type": "string"} for key in keys}
    schema = {"type": "object", "properties": properties, "required": list(keys)}
    return {"name": name, "description": f"{name} a file", "input_schema": schema}


TASK: dict[str, Any] = {
    "system": "You are a coding assistant. Use the tools.",
    "tools": [tool("Read", "file_path"), tool("Write", "file_path", "content")],
    "messages": [{"role": "user", "content": "Read the file /tmp/a.txt and tell me what it says."}],
    "max_tokens": 80,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def engine_python(downloads: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the engine's wheel, installed as install.sh does it on a box."""
    venv = tmp_path_factory.mktemp("engine-venv")
    subprocess.run([downloads.python, "-m", "venv", venv], check=True)
    offline = ["--no-index", "--find-links", downloads.wheels, "--no-cache-dir", "--disable-pip-version-check"]
    pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", *offline]
    subprocess.run([*pip, assets.BOX_REQUIREMENTS["engine"]], check=True)
    return venv / "bin" / "python"


@pytest.fixture(scope="module")
def engine(downloads: Assets, engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The port file of an engine that is up."""
    folder = tmp_path_factory.mktemp("engine")
    port, log = folder / "engine.port", folder / "engine.log"
    args = ["--model", str(downloads.model), "--alias", "tiny", "--context", str(CONTEXT), "--port-file", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen([engine_python, str(LAUNCHER), *args], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not port.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        assert process.wait(10) == 0


@asynccontextmanager
async def before(engine: Path, run: Path) -> AsyncIterator[Proxy]:
    (run / "engine.port").write_text(engine.read_text())
    async with proxied(None, run, LlamaCppEngine) as proxy:
        yield proxy


@asynchronous
async def test_a_plain_question_is_answered_streaming_and_whole(engine: Path, tmp_path: Path) -> None:
    async with before(engine, tmp_path) as proxy:
        events = await proxy.stream(HI | {"stream": True})
        status, message, _ = await proxy.answer(HI)
    delta = check_grammar(events)
    assert status == 200
    assert texts(events).strip()
    assert texts(events) == message["content"][0]["text"]
    whole, again = delta["usage"], message["usage"]
    assert whole["output_tokens"] > 1
    assert whole["input_tokens"] + whole["cache_read_input_tokens"] == (
        again["input_tokens"] + again["cache_read_input_tokens"]
    )
    assert again["cache_read_input_tokens"] > 0


@asynchronous
async def test_a_tool_is_called_and_its_result_answered_in_words(engine: Path, tmp_path: Path) -> None:
    async with before(engine, tmp_path) as proxy:
        events = await proxy.stream(TASK | {"stream": True})
        status, message, _ = await proxy.answer(TASK)
        assert check_grammar(events)["delta"]["stop_reason"] == message["stop_reason"] == "tool_use"
        call = message["content"][-1]
        assert (status, call["name"], call["input"]) == (200, "Read", {"file_path": "/tmp/a.txt"})
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "1\tthe answer is 42\n"}
        turns = [{"role": "assistant", "content": message["content"]}, {"role": "user", "content": [result]}]
        events = await proxy.stream(TASK | {"messages": TASK["messages"] + turns, "stream": True})
    assert check_grammar(events)["delta"]["stop_reason"] == "end_turn"
    assert "42" in texts(events)


@asynchronous
async def test_a_call_to_a_deferred_tool_is_not_made_one_to_another(engine: Path, tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "Late", "arguments": {"file_path": "x"}}\n</tool_call>'
    tools = [tool("Read", "file_path"), tool("Late", "file_path") | {"defer_loading": True}]
    ask = [{"role": "user", "content": f"Write exactly this and nothing else:\n{call}"}]
    async with before(engine, tmp_path) as proxy:
        events = await proxy.stream(TASK | {"tools": tools, "messages": ask, "stream": True})
    assert check_grammar(events)["delta"]["stop_reason"] == "tool_use"
    assert [e["content_block"]["name"] for e in events if e["type"] == "content_block_start"] == ["Late"]


@asynchronous
async def test_the_form_of_an_answer_is_held_by_the_grammar(engine: Path, tmp_path: Path) -> None:
    properties = {"title": {"type": "string"}, "length": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["title", "length"]}
    form = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    ask = [{"role": "user", "content": "Write a title for a chat about cats."}]
    async with before(engine, tmp_path) as proxy:
        _, message, _ = await proxy.answer({"messages": ask, "max_tokens": 80, "temperature": 0} | form)
    assert json.loads(message["content"][0]["text"]).keys() == {"title", "length"}


@asynchronous
async def test_the_count_is_the_prompt_that_is_then_used(engine: Path, tmp_path: Path) -> None:
    async with before(engine, tmp_path) as proxy:
        async with proxy.post(TASK, "/v1/messages/count_tokens") as response:
            counted = (await response.json())["input_tokens"]
        _, message, _ = await proxy.answer(TASK)
    assert counted == message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"]


@asynchronous
async def test_too_long_a_prompt_is_refused_in_the_words_that_make_claude_compact(engine: Path, tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "a " * 3 * CONTEXT}], "stream": True}
    async with before(engine, tmp_path) as proxy:
        status, error, _ = await proxy.answer(body)
    message = assert_error(status, error, 400, "invalid_request_error")
    tokens = int(message.split()[4])
    assert message == f"prompt is too long: {tokens} tokens > {CONTEXT} maximum"
    assert tokens > 3 * CONTEXT


@asynchronous
async def test_a_client_that_is_gone_frees_the_slot(engine: Path, tmp_path: Path) -> None:
    story = {"messages": [{"role": "user", "content": "Write a very long story."}], "max_tokens": 1500, "stream": True}
    slots = f"http://127.0.0.1:{int(engine.read_text())}/slots"
    async with before(engine, tmp_path) as proxy:

        async def busy() -> bool:
            async with proxy.session.get(slots) as response:
                return any(slot["is_processing"] for slot in await response.json())

        async with proxy.post(story) as response:
            await response.content.readuntil(b"content_block_delta")
            assert await busy()
        deadline = time.monotonic() + 1
        while await busy():
            assert time.monotonic() < deadline, "still generating a second later"
            await asyncio.sleep(0.02)
