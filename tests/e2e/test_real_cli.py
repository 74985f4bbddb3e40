"""Sessions of the real Claude Code on a box with a real engine; what reached the engine is read in the proxy's log.

Where the model has to say something certain, or nothing for minutes, a scripted engine stands in for the real one.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from selfhost_cli.sandbox import demo
from selfhost_cli.sandbox.assets import Assets
from tests.e2e.stage import Stage, git, talking
from tests.e2e.wire import Wire
from tests.proxy.kit import (
    HELLO,
    Json,
    LlamaStub,
    Step,
    asynchronous,
    call,
    ended,
    eventually,
    proxied,
    started,
    text,
)
from tests.proxy.ollama_stub import OllamaStub
from tests.terminal import Terminal
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("ready")]

SHORT = ["--tools", "", "--system-prompt", demo.SYSTEM_PROMPT]
STREAMED = ["--output-format", "stream-json", "--verbose", "--include-partial-messages"]
LINE = re.compile(
    r"POST '(?P<path>\S+)' class=(?P<cls>\S+) status=(?P<status>\d+) outcome=(?P<outcome>.+?)"
    r" in=(?P<tokens>\d+) cached=(?P<cached>\d+)"
)


@dataclass(frozen=True)
class Logged:
    """One request, as the proxy on the box logged it at its end."""

    path: str
    cls: str
    status: int
    outcome: str
    tokens: int
    cached: int


def logged(text: str) -> list[Logged]:
    found = [Logged(m["path"], m["cls"], *_numbers(m)) for m in LINE.finditer(text)]
    return [request for request in found if request.cls != "probe" and not request.path.startswith("/selfhost/")]


class Log:
    """What Claude Code asked of the proxy on the box since then."""

    def __init__(self, stage: Stage) -> None:
        self._file = stage.box() / "root" / ".selfhost" / "log" / "proxy.log"
        self._before = len(self._file.read_bytes())

    @property
    def requests(self) -> list[Logged]:
        return logged(self._file.read_bytes()[self._before :].decode(errors="replace"))


def _numbers(match: re.Match[str]) -> tuple[int, str, int, int]:
    return int(match["status"]), match["outcome"], int(match["tokens"]), int(match["cached"])


def answering(stage: Stage, prompt: str, cwd: Path) -> subprocess.Popen[str]:
    """A claude whose answer has begun to arrive."""
    process = stage.spawn("claude", "-p", prompt, *STREAMED, *SHORT, cwd=cwd)
    assert process.stdout
    for line in process.stdout:
        if '"content_block_delta"' in line:
            return process
    raise AssertionError("it ended without an answer")


def test_a_second_turn_goes_on_with_the_first_and_the_engine_reads_only_what_is_new(
    ready: Stage, tmp_path: Path
) -> None:
    log = Log(ready)
    ready.ask("claude", "-p", "My favourite word is walnut. Say yes.", *SHORT, cwd=tmp_path)
    answer = ready.ask("claude", "-c", "-p", "What is my favourite word?", *SHORT, cwd=tmp_path)
    assert "walnut" in answer.out.lower()
    until(lambda: len(log.requests) == 2)
    first, second = log.requests
    assert second.tokens > first.tokens
    assert second.cached >= first.tokens - 5


def test_ctrl_c_frees_the_engine_at_once(ready: Stage, tmp_path: Path) -> None:
    log = Log(ready)
    process = answering(ready, "Write a very long story about a harbor.", tmp_path)
    assert log.requests == []
    process.send_signal(signal.SIGINT)
    (gone,) = until(lambda: log.requests, 2)
    assert gone.outcome == "client gone"
    process.communicate(timeout=20)
    began = time.monotonic()
    assert ready.ask("claude", "-p", "Say hi.", *SHORT, cwd=tmp_path).out.strip()
    assert time.monotonic() - began < 15


def test_context_is_counted_by_the_engine(ready: Stage, tmp_path: Path) -> None:
    log = Log(ready)
    answer = ready.ask("claude", "-p", "/context", cwd=tmp_path)
    assert f"/ {demo.CONTEXT / 1000:.1f}k" in answer.out
    counted = [request for request in log.requests if request.path.endswith("count_tokens")]
    assert counted
    assert {request.status for request in counted} == {200}
    assert len(counted) == len(log.requests), "nothing was generated for it"


def test_a_prompt_that_is_too_long_is_said_to_be(ready: Stage, tmp_path: Path) -> None:
    log = Log(ready)
    long = "a " * (demo.CONTEXT + 500)
    answer = ready.ask("claude", "-p", long, "--output-format", "json", *SHORT, cwd=tmp_path, code=1)
    result = json.loads(answer.out)
    assert result["is_error"]
    assert "prompt is too long" in result["result"].lower()
    assert {request.status for request in log.requests} == {400}


def test_an_engine_that_dies_in_the_middle_of_an_answer_costs_a_moment_only(ready: Stage, tmp_path: Path) -> None:
    process = answering(ready, "Count from 1 to 50, one number a line.", tmp_path)
    child = ready.box() / "root" / ".selfhost" / "run" / "engine.child"
    os.kill(int(child.read_text()), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["is_error"] is False
    assert "40" in result["result"]


def test_an_interactive_session_asks_the_person_and_no_classifier(ready: Stage, tmp_path: Path) -> None:
    """Its own auto mode would have the model judge every such call: 30 thousand tokens each."""
    settings = ready.paths.state / "home" / ".claude" / ".claude.json"
    known = json.loads(settings.read_text()) if settings.exists() else {}
    trusted = {"hasCompletedOnboarding": True, "projects": {str(tmp_path): {"hasTrustDialogAccepted": True}}}
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(json.dumps(known | trusted))
    log, target = Log(ready), tmp_path / "hello.txt"
    words = ["--tools", "Write", "--system-prompt", demo.SYSTEM_PROMPT]
    words += [f"Create the file {target} with the content: hello"]
    argv = [sys.executable, "-m", "selfhost_cli", "--profile", demo.PROFILE, "claude", *words]
    terminal = Terminal(argv, env=ready.env, cwd=tmp_path)
    try:
        terminal.watch(lambda: "Doyouwanttocreatehello.txt?" in terminal.shown)
        assert not target.exists()
        terminal.type("\r")
        terminal.watch(lambda: len(log.requests) == 2)
    finally:
        terminal.close()
    assert "hello" in target.read_text()
    assert [(request.path, request.cls, request.status) for request in log.requests] == [
        ("/v1/messages", "main", 200),
        ("/v1/messages", "main", 200),
    ]
    assert max(request.tokens for request in log.requests) < 10_000


# --- answers from the cache ---


def committed(folder: Path, text: str) -> Path:
    """A clean repository with a note."""
    git(folder, "init")
    (folder / "note.txt").write_text(text)
    git(folder, "add", ".")
    git(folder, "commit", "--message=a note")
    return folder


def test_the_same_work_in_the_same_repository_is_done_again_without_the_engine(ready: Stage, tmp_path: Path) -> None:
    repo = committed(tmp_path / "repo", "nothing yet\n")
    target = repo / "hello.txt"
    words = ["claude", "-p", f"Create the file {target} with the content: hello", "--tools", "Write"]
    words += ["--allowedTools", "Write", "--system-prompt", demo.SYSTEM_PROMPT]
    hits = ready.ask("cache", "stats", "--json").json["total"]["hits"]
    log = Log(ready)
    first = ready.ask(*words, cwd=repo)
    written = target.read_bytes()
    asked = len(until(lambda: len(log.requests) > 1 and log.requests))
    assert b"hello" in written

    git(repo, "clean", "-fdq")
    again = Log(ready)
    assert ready.ask(*words, cwd=repo).out == first.out
    assert target.read_bytes() == written
    assert again.requests == []
    until(lambda: ready.ask("cache", "stats", "--json").json["total"]["hits"] == hits + asked, 15)

    git(repo, "clean", "-fdq")
    ready.ask(*words, cwd=repo, env={"SELFHOST_CACHE": "off"})
    assert until(lambda: again.requests)


def test_a_file_that_changed_meanwhile_is_told_as_it_is_now(ready: Stage, tmp_path: Path) -> None:
    repo = committed(tmp_path / "repo", "The secret word is pepper17.\n")
    words = ["claude", "-p", f"Read the file {repo / 'note.txt'} and tell me the secret word in it.", "--tools", "Read"]
    words += ["--allowedTools", "Read", "--system-prompt", demo.SYSTEM_PROMPT]
    log = Log(ready)
    assert "pepper17" in ready.ask(*words, cwd=repo).out.lower()
    until(lambda: len(log.requests) == 2)
    (repo / "note.txt").write_text("The secret word is lantern42.\n")
    again = Log(ready)
    answer = ready.ask(*words, cwd=repo).out.lower()
    assert "lantern42" in answer
    assert "pepper17" not in answer
    (request,) = until(lambda: again.requests)  # the call that reads it came from the cache
    assert request.outcome == "ok"


# --- subagents ---

WORDS = {"a.txt": "walnut", "b.txt": "harbor"}
FOUND = re.compile("|".join(WORDS.values()))


@dataclass
class Delegating(LlamaStub):
    """Sends an agent for each file, which reads it and reports its word; ends with all words that were reported.

    `holds`: agents begin to answer only then. Where they work in the background, when the main conversation waits.
    """

    folder: Path = field(kw_only=True)
    files: list[str] = field(kw_only=True)
    background: bool = True
    holds: asyncio.Event = field(default_factory=asyncio.Event)
    n_ctx: int = demo.CONTEXT
    most: int = 0
    """Answers that were generated at once."""

    async def _play(self, http: web.Request, script: Iterable[Step], *more: Any) -> web.StreamResponse:
        self.most = max(self.most, self.running + 1)
        return await super()._play(http, self._answer(self.asked[-1]), *more)

    def _answer(self, body: Json) -> Iterable[Step]:
        words = sorted(set(FOUND.findall(json.dumps(body["messages"][1:]))))
        if demo.SYSTEM_PROMPT not in body["system"]:
            return self._agent(json.dumps(body["messages"][0]), words)
        if words:
            return [started(), *text(f"The words: {words}."), *ended()]
        if len(body["messages"]) > 1:
            self.holds.set()
            return [started(), *text("Waiting."), *ended()]
        orders = (call("Agent", self._order(name), index=index) for index, name in enumerate(self.files))
        return [started(), *chain.from_iterable(orders), *ended("tool_use", blocks=len(self.files))]

    def _agent(self, order: str, words: list[str]) -> Iterable[Step]:
        if words:
            return [started(), *text(f"The word is {words[0]}."), *ended()]
        path = re.search(r"Read the file (\S+)\.", order)
        assert path
        return [self.holds, started(), *call("Read", json.dumps({"file_path": path[1]})), *ended("tool_use")]

    def _order(self, name: str) -> str:
        ask = {"description": "find a word", "prompt": f"Read the file {self.folder / name}. Report its word."}
        return json.dumps(ask | {"subagent_type": "general-purpose", "run_in_background": self.background})


def delegating(tmp_path: Path, *files: str, **more: Any) -> Delegating:
    folder = tmp_path / "work"
    folder.mkdir()
    for name, word in WORDS.items():
        (folder / name).write_text(f"{word}\n")
    return Delegating(folder=folder, files=list(files), **more)


AGENTS = ["--tools", "Agent,Read", "--system-prompt", demo.SYSTEM_PROMPT]


@asynchronous
async def test_a_subagent_in_the_background_reads_a_file_and_its_report_reaches_the_answer(
    downloads: Assets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Claude Code does it by itself: the main conversation goes on, and hears of the agent when it is done."""
    caplog.set_level("INFO", "selfhost.proxy")
    engine = delegating(tmp_path, "a.txt")
    words = ["-p", "Which word is it?", *AGENTS]
    async with (
        proxied(engine, tmp_path, slots=2) as proxy,
        talking(downloads.claude, proxy.url, engine.folder, *words) as talk,
    ):
        said = await talk
    assert said.split("\n\n") == ["Waiting.", "The words: ['walnut'].\n"]
    requests = logged(caplog.text)
    assert sorted(request.cls for request in requests) == ["main"] * 3 + ["subagent"] * 2
    assert {(request.status, request.outcome) for request in requests} == {(200, "ok")}


@pytest.mark.parametrize("slots", [1, 2])
@asynchronous
async def test_two_subagents_share_the_slots_and_who_waits_gets_pings(
    downloads: Assets, tmp_path: Path, caplog: pytest.LogCaptureFixture, slots: int
) -> None:
    caplog.set_level("INFO", "selfhost.proxy")
    engine = delegating(tmp_path, "a.txt", "b.txt", background=False)
    async with proxied(engine, tmp_path, slots=slots, ping_every=0.05) as proxy:
        wire = Wire(proxy.url)
        words = ["-p", "Which words?", *AGENTS]
        async with wire.laid() as url, talking(downloads.claude, url, engine.folder, *words) as talk:
            await eventually(lambda: talk.done() or (wire.requests == 3 and sorted(wire.pings)[-2] > 3), seconds=30)
            assert engine.running == slots
            engine.holds.set()
            said = await talk
    assert said.strip() == "The words: ['harbor', 'walnut']."
    assert engine.most == slots
    requests = logged(caplog.text)
    assert sorted(request.cls for request in requests) == ["main"] * 2 + ["subagent"] * 4
    assert {(request.status, request.outcome) for request in requests} == {(200, "ok")}


# --- an engine that has to load its model first ---


@dataclass
class Reading(LlamaStub):
    """llama.cpp: the head of the answer at once, then nothing until it has read the prompt."""

    n_ctx: int = demo.CONTEXT
    loaded_now: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.script = [self.loaded_now, *HELLO]


@dataclass
class Loading(OllamaStub):
    """Ollama: not even the head of an answer before it has loaded the model."""

    n_ctx: int = demo.CONTEXT
    loaded_now: asyncio.Event = field(default_factory=asyncio.Event)

    async def _play(self, *args: Any, **kwargs: Any) -> web.StreamResponse:
        await self.loaded_now.wait()
        return await super()._play(*args, **kwargs)


@dataclass
class Absent(OllamaStub):
    """Ollama, with the model not even listed before it is loaded: a proxy that was just started knows nothing of it."""

    n_ctx: int = demo.CONTEXT
    loaded_now: asyncio.Event = field(default_factory=asyncio.Event)

    async def _ps(self, http: web.Request) -> web.Response:
        self.loaded = "tiny:latest" if self.loaded_now.is_set() else ""
        return await super()._ps(http)

    @property
    def healthy(self) -> bool:
        return False


Silent = Reading | Loading | Absent


async def waits(
    stub: Silent, claude: Path, run: Path, ping_every: float, silence: Callable[[Wire], Awaitable[None]]
) -> Wire:
    """Asserts that the answer is printed although the engine was silent for so long, and was asked for once."""
    async with proxied(stub, run, ping_every=ping_every) as proxy:
        wire = Wire(proxy.url)
        async with wire.laid() as url, talking(claude, url, run, "-p", "Say hello.", *SHORT) as talk:
            await eventually(lambda: talk.done() or wire.requests == 1, seconds=30)
            await silence(wire)
            stub.loaded_now.set()
            said = await talk
    assert said.strip() == "Hello there"
    assert wire.requests == 1
    assert len(stub.asked) == 1
    return wire


@pytest.mark.parametrize("engine", [Reading, Loading, Absent])
@asynchronous
async def test_a_silent_engine_is_waited_for_behind_pings(
    downloads: Assets, tmp_path: Path, engine: type[Silent]
) -> None:
    await waits(engine(), downloads.claude, tmp_path, 0.05, lambda wire: eventually(lambda: sum(wire.pings) > 3))


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", [Reading, Loading, Absent])
@asynchronous
async def test_a_model_that_takes_three_minutes_to_load_is_waited_for_behind_pings(
    downloads: Assets, tmp_path: Path, engine: type[Silent]
) -> None:
    wire = await waits(engine(), downloads.claude, tmp_path, 5, lambda wire: asyncio.sleep(180))
    assert sum(wire.pings) >= 34
