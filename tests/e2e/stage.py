"""A sandbox of one's own for end-to-end tests: market, profile, and the command line as a person types it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfhost_cli import claude, config
from selfhost_cli.config import Paths
from selfhost_cli.lock import ProcessLock
from selfhost_cli.sandbox import assets, demo
from selfhost_cli.sandbox.demo import Market
from tests.proxy.kit import TOKEN
from tests.waiting import until

DEADLINE_S = 100.0


@dataclass
class Stage:
    """One profile on one market. `ask` runs `selfhost …`; `close` asserts that nothing is billed and nothing runs.

    `ollama`: with the real one as engine, which has to be built.
    """

    home: Path
    cache: Path
    settings: dict[str, str] = field(default_factory=dict)
    ollama: bool = False
    market: Market = field(init=False)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.home / "cache").symlink_to(self.cache)
        where = self.paths
        where.make()
        made = assets.ensure(where.cache, lambda line: None)
        ollama = demo.prepare_ollama(where, made) if self.ollama else None
        self.market = demo.start_market(where, keep=False, ollama=ollama)
        self.control("settings", stages={"null": 0.05, "created": 0.05, "loading": 0.05})
        demo.write_config(where, self.market, made, ollama)

    @property
    def paths(self) -> Paths:
        return config.paths(demo.PROFILE, {"SELFHOST_HOME": str(self.home)})

    @property
    def env(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        return kept | {"HOME": str(self.home), "SELFHOST_HOME": str(self.home)} | self.settings

    def spawn(
        self, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `selfhost --profile demo …` and go on."""
        process = subprocess.Popen(
            [sys.executable, "-m", "selfhost_cli", "--profile", demo.PROFILE, *words],
            cwd=cwd or self.home,
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def ask(self, *words: str, code: int = 0, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Answer:
        """Run it to its end and check its exit code."""
        process = self.spawn(*words, cwd=cwd, env=env)
        out, err = finished(process, self.home, DEADLINE_S)
        assert process.returncode == code, f"selfhost {' '.join(words)}: {process.returncode}\n{out}\n{err}"
        return Answer(out, err)

    def up(self, *words: str, code: int = 0) -> Answer:
        return self.ask("up", "--yes", "--detach", *words, code=code)

    def control(self, path: str, method: str = "POST", **body: Any) -> Any:
        return self.market.control(path, method, **body)

    @property
    def billed(self) -> int:
        return self.market.billed()

    @property
    def keeper(self) -> int | None:
        return ProcessLock(self.paths.keeper_lock).holder()

    def box(self) -> Path:
        """The root of the only box."""
        (folder,) = (self.paths.state / "market" / "boxes").glob("box-*")
        return folder

    def wait_for_keeper_to_end(self) -> None:
        until(lambda: self.keeper is None)

    def close(self) -> None:
        """End everything; asserts that no test leaves a billed box behind."""
        lives = self.market.alive()
        billed = self.billed if lives else 0
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.communicate()
        if keeper := self.keeper:
            os.kill(keeper, 15)
            self.wait_for_keeper_to_end()
        self.market.shut_down()
        until(lambda: not self.market.alive())
        assert lives, "the market ended before the test did, with what it may have billed"
        assert billed == 0, "the test left a billed box"


@dataclass(frozen=True)
class Answer:
    """What a command printed."""

    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def finished(process: subprocess.Popen[str], home: Path, seconds: float) -> tuple[str, str]:
    """What it printed. One that does not end in time fails with that and with what the sandbox's parts logged."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as late:
        process.kill()  # what it started may live on and hold the pipes: nothing is read from them any more
        process.wait()
        told = b"\n".join(filter(None, (late.stdout, late.stderr))).decode(errors="replace")
        logs = [log for log in sorted(home.glob("state/**/*.log")) if log.stat().st_size]
        tails = "".join(f"--- {log.relative_to(home)}\n{tail(log)}\n" for log in logs)
        raise AssertionError(f"{process.args!r} did not end in {seconds} s\n{told}\n{tails}") from None


def tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@asynccontextmanager
async def talking(
    binary: Path, url: str, folder: Path, *words: str, token: str = TOKEN, context: int = demo.CONTEXT
) -> AsyncIterator[asyncio.Task[str]]:
    """The real Claude Code in that folder, launched for that server; the task gives what it prints."""
    home = folder.parent / "claude-home"
    home.mkdir(exist_ok=True)
    env = {"PATH": os.defpath}
    launch = claude.launch(binary, words, url=url, token=token, model="tiny", context=context, env=env, home=home)
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *launch.argv, env=dict(launch.env), cwd=folder, stdin=nothing, stdout=pipe, stderr=pipe
    )

    async def said() -> str:
        out, err = await process.communicate()
        assert process.returncode == 0, f"{out.decode()}\n{err.decode()}"
        return out.decode()

    task = asyncio.create_task(said())
    try:
        yield task
    finally:
        if process.returncode is None:
            process.kill()
        await asyncio.wait([task])


def git(folder: Path, *words: str) -> None:
    """Of nobody's settings; the folder is made for `init`."""
    folder.mkdir(exist_ok=True)
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@localhost", "-c", "init.defaultBranch=main"]
    env = {"PATH": os.environ["PATH"], "HOME": str(folder.parent), "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(["git", *who, *words], cwd=folder, env=env, capture_output=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr.decode()
