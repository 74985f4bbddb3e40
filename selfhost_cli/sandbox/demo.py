"""The demo: a profile of its own on a sandbox market, driven through the same commands that a person types.

Nothing here reaches into the product: it writes the demo profile's `config.toml`, starts the market, and runs
`selfhost --profile demo up`, `claude` and `down` as processes.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from selfhost_cli import config
from selfhost_cli.config import Paths
from selfhost_cli.errors import NotSetUp, SelfhostError
from selfhost_cli.lock import ProcessLock
from selfhost_cli.sandbox import assets, registry
from selfhost_cli.sandbox.assets import Assets
from selfhost_cli.wait import Pending, until

PROFILE = "demo"
ENGINES = ("llamacpp", "ollama")
MODEL = "qwen2.5-coder-0.5b"
OLLAMA_MODEL = "qwen2.5-coder:0.5b"
CONTEXT = 32_768
SYSTEM_PROMPT = "You are a helpful coding assistant."

Say = Callable[[str], None]


@dataclass(frozen=True)
class Market:
    """A running sandbox market."""

    url: str
    mirror: str
    registry: str
    api_key: str
    control_token: str
    pid: int
    process: subprocess.Popen[bytes] | None = field(default=None, compare=False, repr=False)
    """The child, when it is ours to wait for."""

    def billed(self) -> int:
        """How many boxes cost (simulated) money right now."""
        return int(self.control("billed", "GET")["count"])

    def control(self, path: str, method: str = "POST", **body: Any) -> Any:
        """Ask or switch something below /control/; see sandbox/control.py."""
        answer = httpx.request(
            method,
            f"{self.url}/control/{path}",
            json=body if method == "POST" else None,
            headers=self._headers,
            timeout=10,
            trust_env=False,
        )
        return answer.raise_for_status().json()

    def shut_down(self) -> None:
        """Ask it to end, with everything that it started."""
        try:
            self.control("shutdown")
        except httpx.HTTPError:
            pass  # gone already
        if self.process:
            self.process.wait(30)

    def alive(self) -> bool:
        try:
            self.billed()
        except (httpx.HTTPError, KeyError, ValueError):
            return False
        return True

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.control_token}"}


@dataclass(frozen=True)
class Ollama:
    """What boxes get: the `archive`, for install.sh to unpack; None: their image brings `program`."""

    program: Path
    archive: Path | None

    def version(self) -> str:
        """Of the program; a server that runs somewhere is not asked."""
        done = subprocess.run(
            [self.program, "--version"],
            env={"HOME": "/nonexistent", "OLLAMA_HOST": "127.0.0.1:9"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        found = re.search(r"version is (\d[\w.]*)", done.stdout + done.stderr)
        if not found:
            raise NotSetUp(f"{self.program} does not say its version", "Repair that Ollama, or run scripts/ollama.")
        return found[1]


def paths() -> Paths:
    return config.paths(PROFILE, os.environ)


def prepare(where: Paths, say: Say) -> Assets:
    """Downloads, and a clean slate: what an earlier demo left is ended first."""
    assets.prepare_system(where.cache)
    sandbox_assets = assets.ensure(where.cache, say)
    where.make()
    end_leftovers(where)
    return sandbox_assets


def prepare_ollama(where: Paths, made: Assets) -> Ollama:
    """An Ollama for the boxes, built by scripts/ollama or installed here, and the model in the registry's form."""
    ollama = find_ollama(where.cache)
    registry.prepare(where.cache, ollama.program, made.model, OLLAMA_MODEL)
    return ollama


def find_ollama(cache: Path) -> Ollama:
    """What scripts/ollama built, else the one on PATH. Raises NotSetUp."""
    if built := assets.built_ollama(cache):
        return Ollama(built / "bin" / "ollama", built / assets.OLLAMA_ARCHIVE)
    if found := shutil.which("ollama"):
        return Ollama(Path(found), None)
    raise NotSetUp(
        "there is no Ollama on this machine to put on a box of the sandbox",
        "Build it once with `scripts/ollama` of the checkout (about 8 minutes), install Ollama, or leave out --engine.",
    )


def end_leftovers(where: Paths) -> None:
    """End what an earlier demo left, and forget its rentals. Simulated money only."""
    stop(where)
    shutil.rmtree(where.state, ignore_errors=True)
    where.make()


def stop(where: Paths) -> None:
    """End the demo's market (its boxes die with it) and its keeper, and wait until both are gone."""
    if (market := find_market(where)) is not None:
        market.shut_down()
        until(
            lambda: Pending("still answers") if market.alive() else True, what="the market's end", seconds=30, every=0.1
        )
    lock = ProcessLock(where.keeper_lock)
    if keeper := lock.holder():
        os.kill(keeper, signal.SIGTERM)
        until(lambda: Pending("still there") if lock.holder() else True, what="the keeper's end", seconds=20, every=0.1)


def find_market(where: Paths) -> Market | None:
    """The market of an earlier or `--keep` demo, None when none answers."""
    try:
        text = json.loads((where.state / "market" / "market.json").read_text())
        market = Market(
            text["url"], text["mirror"], text["registry"], text["api_key"], text["control_token"], text["pid"]
        )
    except (OSError, ValueError, KeyError):
        return None
    return market if market.alive() else None


def start_market(where: Paths, *, keep: bool, ollama: Ollama | None = None) -> Market:
    """Start one and wait until it answers. Without `keep` it dies with this process, and its boxes with it."""
    state = where.state / "market"
    state.mkdir(mode=0o700, exist_ok=True)
    brought = ["--ollama", str(ollama.program)] if ollama and not ollama.archive else []
    with open(state / "market.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "selfhost_cli.sandbox.market", "--state", str(state), "--cache", str(where.cache)]
            + brought
            + ([] if keep else ["--die-with", str(os.getpid())]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=clean_environment(os.environ),
        )

    def look() -> Market | Pending:
        if process.poll() is not None:
            tail = (state / "market.log").read_text(errors="replace")[-600:]
            raise SelfhostError(f"the sandbox market ended at once:\n{tail}")
        market = find_market(where)
        return replace(market, process=process) if market and market.pid == process.pid else Pending("no answer")

    return until(look, what="the sandbox market", seconds=30, every=0.05)


def write_config(where: Paths, market: Market, made: Assets, ollama: Ollama | None = None) -> None:
    """The demo profile's settings: only data differ from a live rental. Without `ollama` the engine is llamacpp."""
    engine = _ollama_settings(market, ollama) if ollama else _llamacpp_settings(market, made)
    settings: dict[str, str | int | float] = {
        "market_url": market.url,
        "api_key": market.api_key,
        "poll": 0.3,
        "pace": 0,
        "listing_lag": 2.0,
        **engine,
        "model_bytes": made.model.stat().st_size,
        "context": CONTEXT,
        "pip_args": f"--no-index --find-links {market.mirror}/wheels/{made.wheels.name}/",
        "proxy_requirements": assets.BOX_REQUIREMENTS["proxy"],
        "disk": 30.0,
        "hours": 2.0,
        "max_spend": 1.0,
        "claude": str(made.claude),
        "claude_home": str(where.state / "home"),
    }
    text = "# Written by `selfhost demo`; every run writes it again.\n"
    text += "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    with os.fdopen(os.open(where.config_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    (where.state / "home").mkdir(mode=0o700, exist_ok=True)


def _llamacpp_settings(market: Market, made: Assets) -> dict[str, str]:
    return {
        "engine": "llamacpp",
        "model": MODEL,
        "model_url": f"{market.mirror}/models/{made.model.name}",
        "model_sha256": assets.default_sources().model.sha256,
        "engine_requirements": assets.BOX_REQUIREMENTS["engine"],
        "kv_cache_type": "f16",  # memory is no matter here, and its small model loses most by less
    }


def _ollama_settings(market: Market, ollama: Ollama) -> dict[str, str]:
    settings = {"engine": "ollama", "model": OLLAMA_MODEL, "registry": market.registry}
    settings["ollama_version"] = ollama.version()
    if archive := ollama.archive:
        settings["ollama_url"] = f"{market.mirror}/ollama/{archive.parent.name}/{archive.name}"
    return settings


def clean_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without what would steer a profile that is not the demo's, or leak a key into it."""
    drop = ("SELFHOST_", "VAST_", "ANTHROPIC_", "CLAUDE", "PYTHON")
    kept = {name: value for name, value in env.items() if not name.startswith(drop)}
    if home := env.get("SELFHOST_HOME"):
        kept["SELFHOST_HOME"] = home
    return kept


@dataclass(frozen=True)
class Task:
    """A one-step job whose right answer only the file can tell."""

    folder: Path
    word: str

    @property
    def arguments(self) -> list[str]:
        prompt = f"Read the file {self.folder / 'note.txt'} and tell me the secret word in it."
        return [
            *("claude", "-p", prompt),
            *("--tools", "Read", "--allowedTools", "Read", "--system-prompt", SYSTEM_PROMPT),
        ]

    def solved_by(self, answer: str) -> bool:
        return self.word in answer.lower()  # it likes to begin with a capital


def make_task(where: Paths) -> Task:
    folder = where.state / "task"
    folder.mkdir(mode=0o700, exist_ok=True)
    word = secrets.choice(("walnut", "lantern", "harbor", "pepper", "marble", "thunder")) + str(
        secrets.randbelow(90) + 10
    )
    (folder / "note.txt").write_text(f"The secret word is {word}.\n")
    return Task(folder, word)


def shown(arguments: Sequence[str]) -> str:
    """A command as one would type it."""
    return "selfhost --profile demo " + " ".join(shlex.quote(word) for word in arguments)


def run(arguments: Sequence[str], *, cwd: Path | None = None, capture: bool = False) -> tuple[int, str]:
    """Run `selfhost --profile demo …` as a person would; its talk goes to our stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "selfhost_cli", "--profile", PROFILE, *arguments],
        cwd=cwd,
        env=clean_environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if capture else None,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout or ""
