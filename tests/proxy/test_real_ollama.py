"""The engine side before the real Ollama with a real model: built by scripts/ollama, run by scripts/test-ollama."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from selfhost_cli.proxy.engines.ollama import OllamaEngine
from selfhost_cli.proxy.rundir import RunDir
from selfhost_cli.proxy.server import Settings, build_server
from selfhost_cli.sandbox import registry
from selfhost_cli.sandbox.assets import Assets
from tests.proxy.kit import HI, TOKEN, Json, Proxy, assert_error, asynchronous, check_grammar, serving, texts, types
from tests.proxy.test_prewarm import is_, wish
from tests.proxy.test_prewarm import until as told_until
from tests.proxy.test_real_engine import TASK, tool
from tests.waiting import until

pytestmark = [pytest.mark.ollama, pytest.mark.timeout(400)]

CONTEXT = 2048
TINY, NATIVE = "tiny", "native"
WARM: Json = {"keep_alive": -1, "stream": False, "shift": False}
STORY: Json = {"messages": [{"role": "user", "content": "Write a very long story."}], "max_tokens": 1500}
COUNT = [{"role": "user", "content": "Count to five."}, {"role": "assistant", "content": "1, 2, 3,"}]
SCHEMA = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
UNKNOWN = '```json\n{"name": "Frobnicate", "arguments": {"x": 1}}\n```'


@dataclass
class Ollama:
    """A server of our own; `start` again after `kill`."""

    program: Path
    store: Path
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    url: str = ""

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text("utf-8", errors="replace")

    def start(self) -> None:
        environment = {
            "PATH": os.defpath,
            "HOME": str(self.folder),
            "OLLAMA_HOST": "127.0.0.1:0",
            "OLLAMA_MODELS": str(self.store),
            "OLLAMA_CONTEXT_LENGTH": str(CONTEXT),
            "OLLAMA_NUM_PARALLEL": "1",
            "OLLAMA_MAX_LOADED_MODELS": "1",
            "OLLAMA_NO_CLOUD": "1",
            "OLLAMA_NOPRUNE": "1",
        }
        with (self.folder / "serve.log").open("wb") as output:
            self.process = subprocess.Popen([self.program, "serve"], env=environment, stdout=output, stderr=output)
        until(lambda: "Listening on " in self.log, 30)
        self.url = "http://" + self.log.partition("Listening on ")[2].split()[0]

    def runner(self) -> int:
        """The process that has the model."""
        assert self.process
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        children = [int(pid) for tid in path.parents[1].iterdir() for pid in (tid / "children").read_text().split()]
        assert len(children) == 1, children
        return children[0]

    def kill(self) -> None:
        """With its llama-server, which would outlive it."""
        assert self.process
        runner = self.runner()
        self.process.kill()
        self.process.wait()
        os.kill(runner, signal.SIGKILL)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)


@pytest.fixture(scope="module")
def ollama(cache: Path, downloads: Assets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ollama]:
    program = cache / "ollama" / "current" / "bin" / "ollama"
    folder = tmp_path_factory.mktemp("ollama")
    modelfile = folder / "Modelfile"
    modelfile.write_text("FROM ./model.gguf\nPARAMETER temperature 0\n")  # without a TEMPLATE of Ollama's own kind
    for name, file in ((TINY, registry.MODELFILE), (NATIVE, modelfile)):
        made = registry.prepare(folder / "cache", program, downloads.model, name, file)
        shutil.copytree(made, folder / "models", dirs_exist_ok=True, copy_function=_link)
    server = Ollama(program, folder / "models", folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _link(source: str, target: str) -> None:
    if not os.path.exists(target):
        os.link(source, target)


@asynccontextmanager
async def before(ollama: Ollama, run: Path, model: str = TINY) -> AsyncIterator[Proxy]:
    """The proxy before it, with the model loaded as a box loads it."""
    (run / "engine.port").write_text(ollama.url.rpartition(":")[2])
    engine = OllamaEngine("ollama", model, RunDir(run).engine_url)
    app = build_server(Settings(TOKEN, model, "0.0", ready_every=0.1), engine, RunDir(run))
    async with aiohttp.ClientSession() as session:
        await load(session, ollama, model)
        async with serving(app) as url:
            yield Proxy(url, run, session)


async def load(session: aiohttp.ClientSession, ollama: Ollama, model: str) -> None:
    if await listed(session, ollama) == [f"{model}:latest"]:
        return
    # our models have the same weights, so that Ollama would take one for the other, and list the first
    await call(session, ollama, {"model": model, "keep_alive": 0})
    while await listed(session, ollama):
        await asyncio.sleep(0.05)
    await call(session, ollama, WARM | {"model": model})


async def listed(session: aiohttp.ClientSession, ollama: Ollama) -> list[str]:
    async with session.get(ollama.url + "/api/ps") as response:
        return [entry["name"] for entry in (await response.json())["models"]]


async def call(session: aiohttp.ClientSession, ollama: Ollama, body: Json) -> None:
    async with session.post(ollama.url + "/api/generate", json=body) as response:
        assert response.status == 200, await response.text()


def prompt(usage: Json) -> int:
    return int(usage["input_tokens"] + usage["cache_read_input_tokens"])


@asynchronous
async def test_a_plain_question_is_answered_streaming_and_whole(ollama: Ollama, tmp_path: Path) -> None:
    async with before(ollama, tmp_path) as proxy:
        events = await proxy.stream(HI | {"stream": True})
        status, message, _ = await proxy.answer(HI)
    usage, again = check_grammar(events)["usage"], message["usage"]
    assert status == 200
    assert texts(events).strip()
    assert texts(events) == message["content"][0]["text"]
    assert types(events).count("content_block_delta") > 3, "it came at once"
    assert usage["output_tokens"] == again["output_tokens"] > 1
    assert prompt(usage) == prompt(again) > 5


@asynchronous
async def test_a_tool_is_called_and_the_next_turn_reuses_the_prompt(ollama: Ollama, tmp_path: Path) -> None:
    async with before(ollama, tmp_path) as proxy:
        status, message, _ = await proxy.answer(TASK)
        call = message["content"][-1]
        assert (status, message["stop_reason"]) == (200, "tool_use")
        assert (call["name"], call["input"]) == ("Read", {"file_path": "/tmp/a.txt"})
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "1\tthe answer is 42\n"}
        turns = [{"role": "assistant", "content": message["content"]}, {"role": "user", "content": [result]}]
        events = await proxy.stream(TASK | {"messages": TASK["messages"] + turns, "stream": True})
    end = check_grammar(events)
    assert end["delta"]["stop_reason"] == "end_turn"
    assert "42" in texts(events)
    assert end["usage"]["cache_read_input_tokens"] >= prompt(message["usage"]) - 5


@asynchronous
async def test_no_request_makes_it_load_the_model_again(ollama: Ollama, tmp_path: Path) -> None:
    requests: list[Json] = [
        HI,
        HI | {"temperature": 1, "top_p": 0.5, "top_k": 3, "stop_sequences": ["x"], "max_tokens": 9000},
        HI | {"thinking": {"type": "adaptive"}, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        TASK | {"tool_choice": {"type": "any"}},
        {"messages": COUNT},
    ]
    async with before(ollama, tmp_path) as proxy:
        runner = ollama.runner()
        for request in requests:
            status, message, _ = await proxy.answer({"max_tokens": 20} | request)
            assert status == 200, message
        assert ollama.runner() == runner


@asynchronous
async def test_too_long_a_prompt_is_refused_with_its_length_where_raw_ollama_cuts_it(
    ollama: Ollama, tmp_path: Path
) -> None:
    body: Json = {"messages": [{"role": "user", "content": "a " * 3 * CONTEXT}], "max_tokens": 3}
    async with before(ollama, tmp_path) as proxy:
        status, error, _ = await proxy.answer(body)
        async with proxy.session.post(ollama.url + "/v1/messages", json=body | {"model": TINY}) as plain:
            assert (await plain.json())["usage"]["input_tokens"] < CONTEXT
    message = assert_error(status, error, 400, "invalid_request_error")
    tokens = int(message.split()[4])
    assert message == f"prompt is too long: {tokens} tokens > {CONTEXT} maximum"
    assert tokens > 3 * CONTEXT


@asynchronous
async def test_a_call_that_it_swallows_is_told(ollama: Ollama, tmp_path: Path) -> None:
    ask = f'Call the function "Frobnicate" with arguments {{"x": 1}}. Write exactly: {UNKNOWN}'
    body: Json = {"messages": [{"role": "user", "content": ask}], "tools": [tool("Zap", "y")], "max_tokens": 60}
    chat = {"model": TINY, "messages": body["messages"], "tools": [_openai(tool("Zap", "y"))], "stream": False}
    async with before(ollama, tmp_path) as proxy:
        async with proxy.session.post(ollama.url + "/api/chat", json=chat | {"shift": False}) as plain:
            assert (await plain.json())["message"]["content"] == "", "it is not swallowed any more"
        status, message, _ = await proxy.answer(body)
    assert (status, message["content"]) == (200, [{"type": "text", "text": UNKNOWN}])
    assert message["usage"]["output_tokens"] > 20


def _openai(tool: Json) -> Json:
    return {"type": "function", "function": {"name": tool["name"], "parameters": tool["input_schema"]}}


@asynchronous
async def test_a_repetition_ends_with_an_end_and_a_reason(ollama: Ollama, tmp_path: Path) -> None:
    ask = "Write the word no a hundred times, without newlines:" + " no" * 14
    async with before(ollama, tmp_path) as proxy:
        events = await proxy.stream({"messages": [{"role": "user", "content": ask}], "max_tokens": 300, "stream": True})
    end = check_grammar(events)
    assert "repeated itself" in texts(events)
    assert end["delta"]["stop_reason"] == "end_turn"
    assert prompt(end["usage"]) > 20


@pytest.mark.parametrize("model", [TINY, NATIVE])
def test_a_prefill_is_gone_on_with_and_not_repeated(model: str, ollama: Ollama, tmp_path: Path) -> None:
    @asynchronous
    async def look() -> None:
        async with before(ollama, tmp_path, model) as proxy:
            _, message, _ = await proxy.answer({"messages": COUNT, "max_tokens": 20, "temperature": 0})
        assert message["content"][0]["text"].startswith(" 4, 5")

    look()


@asynchronous
async def test_a_call_is_forced_also_where_the_model_would_chat(ollama: Ollama, tmp_path: Path) -> None:
    body = TASK | {"messages": HI["messages"], "tool_choice": {"type": "tool", "name": "Write"}, "stream": True}
    async with before(ollama, tmp_path) as proxy:
        events = await proxy.stream(body | {"max_tokens": 200})
    assert check_grammar(events)["delta"]["stop_reason"] == "tool_use"
    calls = [event["content_block"]["name"] for event in events if event["type"] == "content_block_start"]
    given = "".join(event.get("delta", {}).get("partial_json", "") for event in events)
    assert calls == ["Write"]
    assert json.loads(given).keys() == {"file_path", "content"}


@asynchronous
async def test_a_schema_is_kept_to(ollama: Ollama, tmp_path: Path) -> None:
    form = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    async with before(ollama, tmp_path) as proxy:
        _, message, _ = await proxy.answer(HI | form)
    assert json.loads(message["content"][0]["text"]).keys() == {"title"}


@asynchronous
async def test_what_it_will_never_answer_is_a_400_and_not_tried_for_minutes(ollama: Ollama, tmp_path: Path) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}
    image: Json = {"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}
    async with before(ollama, tmp_path, NATIVE) as proxy:
        await proxy.answer(HI | {"max_tokens": 1})
        await load(proxy.session, ollama, TINY)
        # its llama-server, started for a model with a template of Ollama's, serves this one too, and cannot
        status, error, _ = await proxy.answer(TASK)
        assert "requires --jinja flag" in assert_error(status, error, 400, "invalid_request_error")
        status, error, _ = await proxy.answer(image)
        assert "cannot see images" in assert_error(status, error, 400, "invalid_request_error")


@asynchronous
async def test_a_model_that_was_removed_is_a_400_that_names_it(ollama: Ollama, tmp_path: Path) -> None:
    async with aiohttp.ClientSession(ollama.url) as session:
        await (await session.post("/api/copy", json={"source": TINY, "destination": "gone"})).read()
        async with before(ollama, tmp_path, "gone") as proxy:
            await proxy.answer(HI | {"max_tokens": 1})
            await (await session.delete("/api/delete", json={"model": "gone"})).read()
            status, error, _ = await proxy.answer(HI)
    assert "'gone' not found" in assert_error(status, error, 400, "invalid_request_error")


@asynchronous
async def test_a_client_that_is_gone_frees_the_engine(ollama: Ollama, tmp_path: Path) -> None:
    """Within a second, and the token that is just being made: llama-server looks up after each."""
    async with before(ollama, tmp_path) as proxy:
        stopped = ollama.log.count("stop processing")
        times = []
        async with proxy.post(STORY | {"stream": True}) as response:
            for _ in range(6):
                await response.content.readuntil(b"content_block_delta")
                times.append(time.monotonic())
            assert ollama.log.count("stop processing") == stopped
        slowest = max(after - earlier for earlier, after in itertools.pairwise(times))
        deadline = time.monotonic() + 1 + slowest
        while ollama.log.count("stop processing") == stopped:
            assert time.monotonic() < deadline, f"still generating a second later, at {slowest:.2f} s a token"
            await asyncio.sleep(0.02)


@asynchronous
async def test_its_runner_may_die_and_the_next_answer_is_whole(ollama: Ollama, tmp_path: Path) -> None:
    async with before(ollama, tmp_path) as proxy:
        async with proxy.post(STORY | {"stream": True}) as response:
            await response.content.readuntil(b"content_block_delta")
            os.kill(ollama.runner(), signal.SIGKILL)
            assert b"event: error" in await response.read()
        check_grammar(await proxy.stream(HI | {"stream": True}))


@asynchronous
async def test_the_server_may_die_and_come_back_on_another_port(ollama: Ollama, tmp_path: Path) -> None:
    async with before(ollama, tmp_path) as proxy:
        async with proxy.post(STORY | {"stream": True}) as response:
            await response.content.readuntil(b"content_block_delta")
            ollama.kill()
            assert b"event: error" in await response.read()
        status, error, headers = await proxy.answer(HI)
        assert_error(status, error, 529, "overloaded_error")
        assert 1 <= int(headers["retry-after"]) <= 60
        ollama.start()
        (tmp_path / "engine.port").write_text(ollama.url.rpartition(":")[2])
        status, error, _ = await proxy.answer(HI)
        assert "not loaded yet" in assert_error(status, error, 529, "overloaded_error")
        await call(proxy.session, ollama, WARM | {"model": TINY})
        check_grammar(await proxy.stream(HI | {"stream": True}))


@asynchronous
async def test_what_is_read_ahead_is_reused_and_outlives_another_conversation(ollama: Ollama, tmp_path: Path) -> None:
    head: Json = {"system": "You are a coding assistant. " + "Use the tools. " * 60, "tools": TASK["tools"]}
    async with before(ollama, tmp_path) as proxy:
        await wish(proxy, head | {"messages": [{"role": "user", "content": "."}]})
        prefix = await told_until(proxy, is_("warm"), 120)
        for other in (HI, HI | {"messages": [{"role": "user", "content": "Something else, of other words."}]}):
            await proxy.answer(other)
        _, answer, _ = await proxy.answer(head | {"messages": [{"role": "user", "content": "Say hello."}]})
    assert "usage" in answer, answer
    assert answer["usage"]["cache_read_input_tokens"] >= prefix["tokens"] - 20
