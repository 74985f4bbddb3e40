"""The engine that people rent a GPU for: the real Ollama on a box, from the release archive to Claude's answer.

Built once by scripts/ollama; run by scripts/test-ollama. What is served differs from a live box in names and URLs only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from selfhost_cli import install
from selfhost_cli.archive import Archive
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Event
from selfhost_cli.remote import Result
from selfhost_cli.remote.ssh import connect
from selfhost_cli.sandbox import assets, demo
from tests.e2e.stage import Stage
from tests.waiting import until

pytestmark = [pytest.mark.ollama, pytest.mark.timeout(400)]

SHORT = ["--tools", "", "--system-prompt", demo.SYSTEM_PROMPT]
ANEW = {"SELFHOST_CACHE": "off"}
"""Where it is the engine that has to answer, whatever was asked before."""
MODEL = demo.OLLAMA_MODEL
LAYER = 491_400_064
"""Bytes of the model's one big file."""


def new_stage(cache: Path, home: Path) -> Stage:
    home.mkdir(exist_ok=True)
    return Stage(home, cache, ollama=True)


@pytest.fixture
def stage(cache: Path, tmp_path: Path) -> Iterator[Stage]:
    made = new_stage(cache, tmp_path / "home")
    yield made
    made.close()


@pytest.fixture(scope="module")
def box(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A box that is up, for all tests below; each leaves it healthy."""
    stage = new_stage(cache, tmp_path_factory.mktemp("ollama"))
    try:
        stage.up("--engine", "ollama")
        yield stage
        assert "nothing is billed any more" in stage.ask("down").out
    finally:
        stage.close()


def selfhost_dir(stage: Stage) -> Path:
    return stage.box() / "root" / ".selfhost"


def facts(stage: Stage) -> dict[str, object]:
    """What `status --json` says of the engine, {} while it is not healthy."""
    (row,) = stage.ask("status", "--json").json
    part = row["box"].get("components", {}).get("ollama", {})
    return part if part.get("status") == "healthy" else {}


def ollama_url(stage: Stage) -> str:
    return f"http://127.0.0.1:{(selfhost_dir(stage) / 'run' / 'engine.port').read_text().strip()}"


def processes(stage: Stage, *words: str) -> list[int]:
    """Those of this box in whose command line the words stand."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            mine = str(selfhost_dir(stage)).encode() in (entry / "environ").read_bytes()
        except OSError:
            continue
        if mine and all(word in command for word in words):
            found.append(int(entry.name))
    return found


def llama_server(stage: Stage) -> int:
    (pid,) = processes(stage, "/llama-server ")
    return pid


def run_install(stage: Stage, *words: str) -> tuple[Result, list[Event]]:
    """install.sh once more on the box, over ssh, as `selfhost up` runs it."""
    ledger = Ledger(stage.paths.ledger)
    (rental,) = ledger.live()
    ledger.close()
    assert rental.endpoint
    events: list[Event] = []

    def note(line: str) -> None:
        if event := install.parse(line):
            events.append(event)

    remote = connect(rental.endpoint, rental.host_key, stage.paths.login_key)
    try:
        return remote.run(" ".join([install.INSTALL, *words]), timeout=120, on_line=note), events
    finally:
        remote.close()


def received(stage: Stage) -> int:
    """Bytes that came over the box's network."""
    (line,) = re.findall(r"eth0: *(\d+)", (stage.box() / "net_dev").read_text())
    return int(line)


def forget_the_model(stage: Stage) -> None:
    """As if it had never been pulled."""
    assert httpx.request("DELETE", f"{ollama_url(stage)}/api/delete", json={"model": MODEL}).status_code == 200
    assert blobs(stage) == []
    (selfhost_dir(stage) / "steps" / "model").unlink()


def blobs(stage: Stage) -> list[str]:
    return sorted(path.name for path in (selfhost_dir(stage) / "engine" / "models" / "blobs").iterdir())


@pytest.fixture
def sound(box: Stage) -> Iterator[None]:
    """Afterwards the disk, the mirror and the model are as they were, however the test ended."""
    df = box.box() / "bin" / "df"
    real = df.resolve()
    yield
    box.control("mirror")
    df.unlink()
    df.symlink_to(real)
    assert run_install(box)[0].code == 0
    until(lambda: facts(box), 30)


# --- a box that is up ---


def test_claude_answers(box: Stage) -> None:
    answer = box.ask("claude", "-p", "Say hi.", "--output-format", "json", *SHORT)
    result = json.loads(answer.out)
    assert result["is_error"] is False
    assert result["result"].strip()
    assert result["modelUsage"][MODEL]["outputTokens"] > 0


def test_claude_calls_a_tool(box: Stage) -> None:
    task = demo.make_task(box.paths)
    assert task.solved_by(box.ask(*task.arguments, cwd=task.folder).out)


def test_status_tells_engine_model_and_context(box: Stage) -> None:
    told = facts(box)
    assert told["version"] == demo.find_ollama(box.cache).version()
    assert told["context"] == demo.CONTEXT
    assert "tools" in str(told["capabilities"])
    assert told["quantization"] == "Q4_K_M"
    assert told["size_vram"] == 0  # no GPU here; `up` asks for one only where it is not simulated
    assert f"ollama {told['version']}, {MODEL}" in box.ask("status").out


def test_it_is_set_up_as_promised_and_for_itself_alone(box: Stage) -> None:
    (serve,) = processes(box, "ollama serve")
    environment = Path(f"/proc/{serve}/environ").read_text()
    for wanted in ("OLLAMA_FLASH_ATTENTION=1", "OLLAMA_KV_CACHE_TYPE=q8_0", "OLLAMA_NUM_PARALLEL=1"):
        assert wanted in environment
    for wanted in ("OLLAMA_KEEP_ALIVE=-1", "OLLAMA_NO_CLOUD=1", f"OLLAMA_CONTEXT_LENGTH={demo.CONTEXT}"):
        assert wanted in environment
    assert "TOKEN" not in environment
    assert "API_KEY" not in environment
    words = Path(f"/proc/{llama_server(box)}/cmdline").read_text().replace("\0", " ")
    for wanted in (f"-c {demo.CONTEXT} ", "-np 1 ", "--flash-attn on ", "--cache-type-k q8_0 ", "--host 127.0.0.1 "):
        assert wanted in words
    (loaded,) = httpx.get(f"{ollama_url(box)}/api/ps").json()["models"]
    assert loaded["expires_at"] > "2100"


def test_requests_never_make_it_load_the_model_again(box: Stage) -> None:
    before = llama_server(box)
    box.ask("claude", "-p", "Say hi.", *SHORT, env=ANEW)
    box.up()
    assert llama_server(box) == before


def test_a_rerun_changes_nothing(box: Stage) -> None:
    before, came = llama_server(box), received(box)
    result, events = run_install(box)
    assert result.code == 0, result.err
    # Some of them are looked at side by side.
    assert sorted((event.stage, event.status) for event in events) == [
        (step, "skip") for step in ("engine", "model", "proxy", "start", "tools")
    ]
    assert (llama_server(box), received(box)) == (before, came)
    assert "is already yours" in box.up().err


def test_the_archive_is_remembered_as_it_was_seen_first(box: Stage) -> None:
    ollama = demo.find_ollama(box.cache)
    assert ollama.archive
    size, sha256, version, url = box.paths.archives.read_text().split()
    assert int(size) == ollama.archive.stat().st_size
    assert len(sha256) == 64
    assert version == ollama.version()
    assert url.endswith(f"?version={version}")


@pytest.mark.parametrize("what", ["ollama serve", "/llama-server "])
def test_a_killed_server_comes_back_with_its_model(box: Stage, what: str) -> None:
    (pid,) = processes(box, what)
    os.kill(pid, signal.SIGKILL)
    until(lambda: pid not in processes(box, what))
    until(lambda: processes(box, "/llama-server ") and facts(box), 60)
    assert box.ask("claude", "-p", "Say hi.", *SHORT, env=ANEW).out.strip()


def test_a_pull_whose_downloads_are_cut_arrives_whole(box: Stage, sound: None) -> None:
    forget_the_model(box)
    came = received(box)
    box.control("mirror", cut_after=20_000_000, cuts=5)
    result, events = run_install(box)
    assert result.code == 0, result.err
    progress = [event for event in events if event.stage == "model" and event.done]
    assert [event.done for event in progress] == sorted(event.done or 0 for event in progress)
    assert progress[-1].done == progress[-1].total
    assert LAYER < received(box) - came < 1.5 * LAYER


def test_a_pull_that_was_ended_goes_on_where_it_was(box: Stage, sound: None) -> None:
    forget_the_model(box)
    came = received(box)
    box.control("mirror", rate=20_000_000)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_install, box)
        until(lambda: received(box) - came > LAYER / 4, 60)
        (pull,) = processes(box, "ollama.py pull ")
        os.kill(pull, signal.SIGTERM)
        assert running.result()[0].code == 1
    until(lambda: list((selfhost_dir(box) / "engine" / "models" / "blobs").glob("*-partial-*")))
    box.control("mirror")
    result, events = run_install(box)
    assert result.code == 0, result.err
    first = next(event.done for event in events if event.stage == "model" and event.done)
    assert first > LAYER / 5
    assert LAYER <= received(box) - came < 1.2 * LAYER


def test_a_damaged_file_of_the_model_is_noticed_and_pulled_again(box: Stage, sound: None) -> None:
    forget_the_model(box)
    digest = assets.default_sources().model.sha256
    weights = selfhost_dir(box) / "engine" / "models" / "blobs" / f"sha256-{digest}"
    with weights.open("wb") as file:
        file.truncate(LAYER)
    result, events = run_install(box)
    assert result.code == 0, result.err
    assert any("digest mismatch" in event.text for event in events)
    with weights.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digest


def test_a_disk_that_is_too_small_is_said_before_the_pull(box: Stage, sound: None) -> None:
    forget_the_model(box)
    came, df = received(box), box.box() / "bin" / "df"
    df.unlink()
    df.write_text("#!/bin/sh\necho Filesystem 1024-blocks Used Available\necho disk 1000000 500000 500000\n")
    df.chmod(0o755)
    result, events = run_install(box)
    assert result.code == 1
    assert (events[-1].stage, events[-1].status) == ("model", "fail")
    assert re.search(rf"the disk is too small for {MODEL}: 491 MB .* only 512 MB are free", events[-1].text)
    assert blobs(box) == []
    assert received(box) == came


# --- a box that does not come up ---


def test_an_archive_that_is_damaged_is_named_and_nothing_is_billed(stage: Stage) -> None:
    stage.control("mirror", corrupt=True)
    answer = stage.up(code=1)
    assert "failed at the step engine: ollama-linux-amd64.tar.zst is not a whole archive" in answer.err
    assert stage.billed == 0
    assert not stage.paths.archives.exists()


def test_another_archive_than_the_one_seen_first_is_refused(stage: Stage) -> None:
    ollama = demo.find_ollama(stage.cache)
    assert ollama.archive
    url = f"{stage.market.mirror}/ollama/{ollama.archive.parent.name}/{ollama.archive.name}?version={ollama.version()}"
    seen = Archive(ollama.archive.stat().st_size, "ab" * 32, ollama.version(), url)
    stage.paths.archives.write_text(f"{seen}\n")
    answer = stage.up(code=1)
    assert "failed at the step engine" in answer.err
    assert f"its sha256 differs from {seen.sha256}" in answer.err
    assert "delete its line in the file 'archives'" in answer.err
    assert stage.billed == 0
    assert stage.paths.archives.read_text() == f"{seen}\n"


def test_a_model_that_the_registry_does_not_have_is_refused_before_money_is_spent(stage: Stage) -> None:
    answer = stage.up("--model", "qwen2.5-codr:0.5b", code=2)
    assert "has no model 'qwen2.5-codr:0.5b'" in answer.err
    assert stage.control("boxes", "GET") == []


# --- the demo ---


def demonstrate(home: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-B", "-m", "selfhost_cli", "demo", "--engine", "ollama"],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "SELFHOST_HOME": str(home), **env},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_does_the_whole_job_with_ollama(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(cache)
    said = demonstrate(tmp_path)
    assert "nothing is billed any more" in said


def test_an_ollama_on_the_path_is_what_the_image_of_the_box_brings(cache: Path, tmp_path: Path) -> None:
    built = assets.built_ollama(cache)
    assert built
    (tmp_path / "cache").mkdir()
    for name in ("models", "wheels", "claude"):
        (tmp_path / "cache" / name).symlink_to(cache / name)
    said = demonstrate(tmp_path, PATH=f"{built / 'bin'}:{os.environ['PATH']}")
    assert "nothing is billed any more" in said
    assert not (tmp_path / "state" / "demo" / "archives").exists()
