"""One Claude Code that is switched from one real engine to another in the middle of its session."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.sandbox import demo
from selfhost_cli.sandbox.assets import Assets
from tests.e2e.stage import Stage
from tests.proxy import test_real_engine
from tests.proxy.test_real_engine import LAUNCHER
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

engine_python = test_real_engine.engine_python
QUIET = {"SELFHOST_CACHE": "off"}


class Engine:
    """llama.cpp's server with the demo's model under a name of its own."""

    def __init__(self, python: Path, model: Path, run: Path, name: str) -> None:
        run.mkdir()
        self.name, self._port, self._log = name, run / "engine.port", run / "engine.log"
        words = ["--model", model, "--alias", name, "--context", demo.CONTEXT, "--port-file", self._port]
        with self._log.open("wb") as output:
            self.process = subprocess.Popen([python, LAUNCHER, *map(str, words)], stdout=output, stderr=output)

    @property
    def url(self) -> str:
        until(self._port.exists, 60)
        return f"http://127.0.0.1:{self._port.read_text().strip()}"

    @property
    def answers(self) -> int:
        """How many it began."""
        return self._log.read_text(errors="replace").count("launch_slot_")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def engines(downloads: Assets, engine_python: Path, tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    with ExitStack() as both:
        made = [Engine(engine_python, downloads.model, tmp_path / name, name) for name in ("first", "second")]
        for engine in made:
            both.enter_context(engine)
        yield made[0], made[1]


class Session:
    """One `selfhost claude -p` that takes turn after turn."""

    def __init__(self, stage: Stage, cwd: Path) -> None:
        words = ["claude", "-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose"]
        words += ["--tools", "", "--system-prompt", demo.SYSTEM_PROMPT]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "selfhost_cli", "--profile", demo.PROFILE, *words],
            cwd=cwd,
            env=stage.env | QUIET,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stage.started.append(self._process)

    def say(self, text: str) -> str:
        """What it answers, once that is whole."""
        assert self._process.stdin
        assert self._process.stdout
        message = {"role": "user", "content": text}
        self._process.stdin.write(json.dumps({"type": "user", "message": message}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["type"] == "result":
                assert not event["is_error"], event
                return str(event["result"])
        raise AssertionError("it ended without an answer")

    def end(self) -> int:
        self._process.communicate(timeout=20)
        return self._process.returncode


def test_a_session_goes_on_at_another_engine(
    make_stage: Callable[..., Stage], engines: tuple[Engine, Engine], tmp_path: Path
) -> None:
    stage = make_stage()
    first, second = engines
    for engine in engines:
        stage.ask("backends", "add", engine.name, "--url", engine.url)
    tested = stage.ask("backends", "test", "first", "--json").json
    assert (tested["model"], tested["context"]) == ("first", demo.CONTEXT)
    stage.ask("use", "first")
    before = second.answers
    session = Session(stage, tmp_path)
    session.say("My favourite word is walnut. Say yes.")
    assert second.answers == before
    stage.ask("use", "second")
    asked = first.answers
    assert "walnut" in session.say("What is my favourite word?").lower()
    assert first.answers == asked
    assert second.answers > before
    assert session.end() == 0
    rows = {row["name"]: row["place"] for row in stage.ask("use", "--json").json}
    assert rows == {"second": 1, "vast": None, "first": None}
    stage.ask("use", "vast")
    stage.wait_for_keeper_to_end()


def test_a_session_survives_its_box(
    make_stage: Callable[..., Stage], engines: tuple[Engine, Engine], tmp_path: Path
) -> None:
    stage = make_stage()
    _, second = engines
    stage.up()
    stage.ask("backends", "add", "second", "--url", second.url)
    stage.ask("use", "vast", "--then", "second")
    before = second.answers
    session = Session(stage, tmp_path)
    session.say("My favourite word is walnut. Say yes.")
    assert second.answers == before, "the box is there"
    (box,) = stage.control("boxes", "GET")
    stage.control("kill", instance=box["id"])
    assert "walnut" in session.say("What is my favourite word?").lower()
    assert second.answers > before
    assert session.end() == 0
    assert "then second (up)" in stage.ask("status").out
    log = stage.paths.keeper_log.read_text()
    assert "backend second serves now, after vast" in log
    stage.ask("down")
    stage.ask("use", "vast")
    stage.wait_for_keeper_to_end()


def test_a_session_goes_on_with_another_model_on_its_box(make_stage: Callable[..., Stage], tmp_path: Path) -> None:
    stage = make_stage()
    stage.up()
    session = Session(stage, tmp_path)
    session.say("My favourite word is walnut. Say yes.")
    told = stage.ask("models", "use", "another", "--context", "16384", "--small-context", "--json").json["rental"]
    assert (told["model"], told["context"]) == ("another", 16_384)
    assert "walnut" in session.say("What is my favourite word?").lower()
    assert session.end() == 0
    (status,) = stage.ask("status", "--json").json
    assert (status["box"]["model"], status["box"]["context"]) == ("another", 16_384)
    again = stage.ask("models", "use", "another", "--context", "16384", "--small-context")
    assert "serves another already" in again.err
    stage.ask("down")
