"""Sessions of the real Claude Code on a box with a real engine; what reached the engine is read in the proxy's log."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from selfhost_cli.sandbox import demo
from tests.e2e.stage import Stage
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("ready")]

SHORT = ["--tools", "", "--system-prompt", demo.SYSTEM_PROMPT]
STREAMED = ["--output-format", "stream-json", "--verbose", "--include-partial-messages"]
LINE = re.compile(
    r"POST '(?P<path>\S+)' class=(?P<cls>\S+) status=(?P<status>\d+) outcome=(?P<outcome>.+?)"
    r" in=(?P<tokens>\d+) cached=(?P<cached>\d+)"
)
CONTROL = re.compile(r"\x1b(\[[0-9;?<>=]*[a-zA-Z]|\][^\x07]*\x07|[()=>78]\w?)")


@dataclass(frozen=True)
class Logged:
    """One request, as the proxy on the box logged it at its end."""

    path: str
    cls: str
    status: int
    outcome: str
    tokens: int
    cached: int


class Log:
    """What the proxy on the box logged since then."""

    def __init__(self, stage: Stage) -> None:
        self._file = stage.box() / "root" / ".selfhost" / "log" / "proxy.log"
        self._before = len(self._file.read_bytes())

    @property
    def requests(self) -> list[Logged]:
        text = self._file.read_bytes()[self._before :].decode(errors="replace")
        found = [Logged(m["path"], m["cls"], *_numbers(m)) for m in LINE.finditer(text)]
        return [request for request in found if request.cls != "probe"]


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


class Terminal:
    """A claude on a pseudo-terminal, as a person sees it."""

    def __init__(self, stage: Stage, *words: str, cwd: Path) -> None:
        self._data = b""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "selfhost_cli", "--profile", demo.PROFILE, "claude", *words],
            cwd=cwd,
            env=stage.env | {"TERM": "xterm-256color"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    @property
    def shown(self) -> str:
        """The words of it without what is between them: a terminal jumps there as often as it writes a space."""
        return "".join(CONTROL.sub("", self._data.decode(errors="replace")).split())

    def watch(self, probe: Callable[[], object], seconds: float = 50) -> None:
        """Read what is shown until `probe` is true."""
        deadline = time.monotonic() + seconds
        while not probe():
            assert time.monotonic() < deadline, self.shown[-3000:]
            if select.select([self._ours], [], [], 0.1)[0]:
                self._data += os.read(self._ours, 65536)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def close(self) -> None:
        self._process.kill()
        self._process.wait(20)
        os.close(self._ours)


def test_an_interactive_session_asks_the_person_and_no_classifier(ready: Stage, tmp_path: Path) -> None:
    """Its own auto mode would have the model judge every such call: 30 thousand tokens each."""
    settings = ready.paths.state / "home" / ".claude" / ".claude.json"
    known = json.loads(settings.read_text()) if settings.exists() else {}
    trusted = {"hasCompletedOnboarding": True, "projects": {str(tmp_path): {"hasTrustDialogAccepted": True}}}
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(json.dumps(known | trusted))
    log, target = Log(ready), tmp_path / "hello.txt"
    words = ["--tools", "Write", "--system-prompt", demo.SYSTEM_PROMPT]
    terminal = Terminal(ready, *words, f"Create the file {target} with the content: hello", cwd=tmp_path)
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
