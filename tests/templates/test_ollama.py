"""install.sh and its parts with the engine ollama: the shipped scripts, and a stand-in archive and model.

The real one is what scripts/test-ollama is for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import payload
from selfhost_cli.model import Event
from tests.templates.box import Box, Files, command_line, eventually, key_pair
from tests.templates.test_install_sh import failed, install, outcome, running, snapshot

pytestmark = pytest.mark.skipif(not shutil.which("zstd"), reason="needs zstd")

STEPS = ["tools", "engine", "model", "proxy", "start"]
ARCHIVE = "ollama-linux-amd64.tar.zst"
STAND_IN = Path(__file__).with_name("stand_in_ollama.py").read_text()
WEIGHTS = os.urandom(3_000_000)


def program(version: str) -> str:
    return f"#!{sys.executable} -IS\n" + STAND_IN.replace('VERSION = "0.34.0"', f'VERSION = "{version}"')


def pack(folder: Path, files: dict[str, str]) -> bytes:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    # So large that it can be cut.
    (folder / "lib/ollama").mkdir(parents=True)
    (folder / "lib/ollama/libggml.so").write_bytes(WEIGHTS[:1_000_000])
    done = subprocess.run(["tar", "-c", "-I", "zstd", "-C", folder, "."], capture_output=True, check=True)
    return done.stdout


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Ollama:
    """A box for the engine ollama, and where it gets everything from."""

    box: Box
    files: Files
    content: dict[str, bytes]

    def configure(self, **changes: object) -> None:
        """Write install.env; names as there, without SELFHOST_ and in lower case."""
        values: dict[str, object] = {
            "engine": "ollama",
            "model": "tiny",
            "context": 4096,
            "token": "the token's own",
            "version": "1.2.3",
            "proxy_requirements": "",
            "ollama_version": "0.34.0",
            "ollama_url": f"{self.files.url}/o/{ARCHIVE}",
            "ollama_sha256": "",
            "ollama_bytes": "",
            "registry": self.files.url,
            **changes,
        }
        lines = [
            f"SELFHOST_{name.upper()}='" + str(value).replace("'", "'\\''") + "'\n" for name, value in values.items()
        ]
        self.box.run.mkdir(exist_ok=True)
        (self.box.run / "install.env").write_text("".join(lines))

    def offer(self, name: str, weights: bytes) -> None:
        """Put a model into the registry."""
        blobs = [weights, b"{{ .Prompt }}", b'{"model_format":"gguf"}']
        described = [{"digest": digest(data), "size": len(data)} for data in blobs]
        manifest = {"schemaVersion": 2, "layers": described[:-1], "config": described[-1]}
        model, _, tag = name.partition(":")
        self.content[f"/v2/{model}/manifests/{tag}"] = json.dumps(manifest).encode()
        self.content.update({f"/v2/{model}/blobs/{digest(data)}": data for data in blobs})

    def archive(self, data: bytes) -> None:
        self.content[f"/o/{ARCHIVE}"] = data

    def ask(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.box.text('run/engine.port')}{path}", timeout=5
            ) as reply:
                return json.load(reply)
        except (OSError, ValueError):
            return {}

    def fetched(self, part: str) -> int:
        return sum(part in path for path in self.files.asked)

    def processes(self, part: str) -> list[int]:
        return [pid for pid in self.box.processes() if part in command_line(pid)]

    @property
    def blobs(self) -> Path:
        return self.box.dir / "engine/models/blobs"

    @property
    def runner(self) -> list[int]:
        """What stands for the llama-server."""
        return self.processes("sleep 1000 ")


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return pack(tmp_path_factory.mktemp("good"), {"bin/ollama": program("0.34.0")})


@pytest.fixture
def ollama(box: Box, good: bytes) -> Iterator[Ollama]:
    """Everything was uploaded, and nothing installed."""
    for tool in ("tar", "zstd"):
        (box.tools / tool).symlink_to(str(shutil.which(tool)))
    box.put_parts()
    content: dict[str, bytes] = {}
    made = Ollama(box, Files(content), content)
    made.archive(good)
    made.offer("library/tiny:latest", WEIGHTS)
    made.configure()
    yield made
    made.files.close()


def failure(ollama: Ollama, step: str, **env: str) -> str:
    """The text with which an install fails, in that step and nothing after it."""
    code, events, errors = install(ollama.box, **env)
    assert code == 1, events
    assert failed(events).stage == step
    assert f"install.sh: {failed(events).text}\n" in errors
    return failed(events).text


def of_model(events: list[Event]) -> list[Event]:
    return [event for event in events if event.stage == "model" and event.status == "progress"]


def test_it_brings_everything_up_and_a_second_run_changes_nothing(ollama: Ollama, good: bytes) -> None:
    code, events, errors = install(ollama.box)
    assert (code, errors) == (0, "")
    assert outcome(events) == dict.fromkeys(STEPS, "done")
    assert [model["name"] for model in ollama.ask("/api/ps")["models"]] == ["tiny:latest"]
    url = f"{ollama.files.url}/o/{ARCHIVE}?version=0.34.0"
    assert ollama.box.text("run/archive") == f"{len(good)} {hashlib.sha256(good).hexdigest()} 0.34.0 {url}"
    assert url.removeprefix(ollama.files.url) in ollama.files.asked
    told = of_model(events)
    total = sum(len(data) for path, data in ollama.content.items() if "/blobs/" in path)
    assert {event.total for event in told} == {total}
    assert told[-1].done == total

    before, asked = snapshot(ollama.box), len(ollama.files.asked)
    # What the laptop remembers comes along the next time.
    ollama.configure(ollama_sha256=hashlib.sha256(good).hexdigest(), ollama_bytes=len(good))
    before[str(ollama.box.run / "install.env")] = (ollama.box.run / "install.env").stat().st_mtime
    code, events, errors = install(ollama.box)
    assert (code, errors) == (0, "")
    assert outcome(events) == dict.fromkeys(STEPS, "skip")
    assert snapshot(ollama.box) == before
    assert len(ollama.files.asked) == asked


def test_a_rerun_on_a_box_whose_engine_is_down_only_starts_it(ollama: Ollama) -> None:
    install(ollama.box)
    asked = len(ollama.files.asked)
    assert ollama.box.sh(str(ollama.box.dir / "bin/stop.sh")).returncode == 0
    assert not ollama.processes("ollama")
    assert not ollama.runner
    code, events, _ = install(ollama.box)
    assert code == 0
    assert outcome(events) == {**dict.fromkeys(STEPS, "skip"), "start": "done"}
    assert len(ollama.files.asked) == asked


def test_force_does_every_step_again_but_keeps_what_was_downloaded(ollama: Ollama) -> None:
    install(ollama.box)
    old = ollama.box.text("run/engine.child")
    code, events, _ = install(ollama.box, "--force")
    assert code == 0
    assert outcome(events) == dict.fromkeys(STEPS, "done")
    assert ollama.fetched(ARCHIVE) == 1
    assert ollama.fetched(digest(WEIGHTS)) == 1
    assert ollama.box.text("run/engine.child") != old


def test_the_server_gets_our_settings_and_no_secret(ollama: Ollama) -> None:
    install(ollama.box, HF_TOKEN="h", OLLAMA_KEEP_ALIVE="5m", OLLAMA_DEBUG="1", KEPT_BY_ALL="1")
    env = json.loads(ollama.box.text("engine/home/environment.json"))
    engine = ollama.box.dir / "engine"
    assert {name: value for name, value in env.items() if name.startswith("OLLAMA_")} == {
        "OLLAMA_HOST": f"127.0.0.1:{ollama.box.text('run/engine.port')}",
        "OLLAMA_MODELS": f"{engine}/models",
        "OLLAMA_CONTEXT_LENGTH": "4096",
        "OLLAMA_FLASH_ATTENTION": "1",
        "OLLAMA_KV_CACHE_TYPE": "q8_0",
        "OLLAMA_NUM_PARALLEL": "1",
        "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NOPRUNE": "1",
    }
    assert env["HOME"] == f"{engine}/home"
    assert env["KEPT_BY_ALL"] == "1"
    assert not {"SELFHOST_TOKEN", "CONTAINER_API_KEY", "HF_TOKEN"} & set(env)
    assert "the token's own" not in env.values()


@pytest.mark.parametrize("fault", ["cut_at", "stall_at"])
def test_a_broken_download_of_the_archive_goes_on_where_it_ended(fault: str, ollama: Ollama) -> None:
    setattr(ollama.files, fault, 600_000)
    code, events, errors = install(ollama.box, SELFHOST_STALL_S="2")
    assert code == 0, (events, errors)
    begins = [asked for asked in ollama.files.ranges if asked]
    assert 500_000 < int(begins[0][6:-1]) <= 600_000
    assert ollama.fetched(ARCHIVE) == 2


def test_onstart_and_install_agree_on_the_archive(ollama: Ollama, good: bytes) -> None:
    private, public = key_pair()
    url = f"{ollama.files.url}/o/{ARCHIVE}?version=0.34.0"
    ollama.box.start(payload.onstart(private, public, public), SELFHOST_FETCH_URL=url)
    part = ollama.box.dir / f"downloads/{ARCHIVE}.part"
    eventually(lambda: part.exists() and part.stat().st_size == len(good))
    code, events, errors = install(ollama.box)
    assert code == 0, (events, errors)
    assert ollama.fetched(ARCHIVE) == 1
    # At the next start of the container nothing is fetched again.
    ollama.box.start(payload.onstart(private, public, public), SELFHOST_FETCH_URL=url)
    eventually(lambda: ollama.ask("/api/version"))
    assert ollama.fetched(ARCHIVE) == 1


def test_an_image_that_brings_ollama_gets_no_head_start(ollama: Ollama) -> None:
    ollama.box.tool("ollama", program("0.34.0"))
    private, public = key_pair()
    ollama.box.start(payload.onstart(private, public, public), SELFHOST_FETCH_URL=f"{ollama.files.url}/o/{ARCHIVE}")
    eventually(lambda: ollama.box.text("run/armed"))
    assert not (ollama.box.dir / f"downloads/{ARCHIVE}.part").exists()


def half_made(ollama: Ollama) -> list[str]:
    names = ["downloads/" + path.name for path in (ollama.box.dir / "downloads").iterdir()]
    return names + [name for name in ("engine/ollama", "engine/ollama.new", "run/archive", "steps/engine")
                    if (ollama.box.dir / name).exists()]  # fmt: skip


def test_an_archive_with_another_checksum_is_deleted_and_named(ollama: Ollama) -> None:
    ollama.configure(ollama_sha256="0" * 64)
    text = failure(ollama, "engine")
    assert (
        text
        == f"{ARCHIVE} is not the promised file: its sha256 differs from {'0' * 64}; it was deleted. If it was "
        + ("released anew, delete its line in the file 'archives' of selfhost's state directory")
    )
    assert half_made(ollama) == []


def test_what_is_no_archive_is_deleted_and_named(ollama: Ollama, good: bytes) -> None:
    for data in (b"<html>the captive portal</html>" * 10, good[:-1000]):
        ollama.archive(data)
        text = failure(ollama, "engine")
        assert text.startswith(f"{ARCHIVE} is not a whole archive: ")
        assert text.endswith("; it was deleted")
        assert half_made(ollama) == []


def test_an_archive_without_ollama_or_with_another_one_is_refused(ollama: Ollama, tmp_path: Path) -> None:
    cases = {
        "has no bin/ollama": {"bin/llama": "x"},
        "holds Ollama 0.33.9, not 0.34.0": {"bin/ollama": program("0.33.9")},
        "does not run on this machine": {"bin/ollama": "#!/bin/sh\nkill -ILL $$\n"},
    }
    for number, (words, files) in enumerate(cases.items()):
        ollama.archive(pack(tmp_path / str(number), files))
        text = failure(ollama, "engine")
        assert words in text
        assert text.endswith("; it was deleted")
        assert half_made(ollama) == []


def test_a_wrong_archive_leaves_the_ollama_that_works(ollama: Ollama) -> None:
    install(ollama.box)
    ollama.archive(b"no archive")
    ollama.configure(ollama_version="0.35.0")
    failure(ollama, "engine")
    assert ollama.ask("/api/version") == {"version": "0.34.0"}
    ollama.configure()
    code, events, _ = install(ollama.box)
    assert code == 0, events[-1]


def test_an_image_with_an_ollama_new_enough_needs_no_archive_and_no_zstd(ollama: Ollama) -> None:
    (ollama.box.tools / "zstd").unlink()
    ollama.box.tool("ollama", program("0.100.0"))
    code, events, _ = install(ollama.box)
    assert code == 0, events[-1]
    assert "Ollama 0.100.0 of the image" in [event.text for event in events]
    assert ollama.fetched(ARCHIVE) == 0
    assert not (ollama.box.run / "archive").exists()
    assert ollama.ask("/api/version") == {"version": "0.100.0"}
    assert outcome(install(ollama.box)[1]) == dict.fromkeys(STEPS, "skip")


def test_an_image_with_an_old_ollama_gets_ours_beside_it(ollama: Ollama) -> None:
    ollama.box.tool("ollama", program("0.9.6"))
    code, events, _ = install(ollama.box)
    assert code == 0, events[-1]
    assert any("the image's Ollama 0.9.6 is too old: 0.34.0 is installed" in event.text for event in events)
    assert ollama.ask("/api/version") == {"version": "0.34.0"}


def test_a_box_without_zstd_is_told_what_to_install(ollama: Ollama) -> None:
    (ollama.box.tools / "zstd").unlink()
    assert failure(ollama, "tools") == "missing on this box: zstd; as root: apt-get install -y zstd"


@pytest.mark.parametrize("fault", ["cut_at", "stall_at"])
def test_a_broken_pull_goes_on_where_it_ended(fault: str, ollama: Ollama) -> None:
    setattr(ollama.files, fault, 2_000_000)
    code, events, errors = install(ollama.box, SELFHOST_STALL_S="1")
    assert code == 0, (events, errors)
    begins = [asked for asked in ollama.files.ranges if asked]
    assert 1_500_000 < int(begins[0][6:-1]) <= 2_000_000
    told = of_model(events)
    assert any("interrupted" in event.text and event.done and event.done > 1_500_000 for event in told)
    assert [event.done for event in told] == sorted(event.done or 0 for event in told)


def test_a_pull_that_becomes_slow_goes_on_over_another_connection(ollama: Ollama) -> None:
    ollama.files.slow_at = 2_000_000
    code, events, errors = install(ollama.box, SELFHOST_SLOW_S="1")
    assert code == 0, (events, errors)
    begins = [int(asked[6:-1]) for asked in ollama.files.ranges if asked]
    assert len(begins) == 1
    assert begins[0] >= 2_000_000
    assert any("interrupted (it became slow), going on" in event.text for event in of_model(events))


def test_an_archive_is_unpacked_while_it_comes_and_used_once_it_is_verified(ollama: Ollama, good: bytes) -> None:
    ollama.configure(ollama_sha256=digest(good).removeprefix("sha256:"), ollama_bytes=len(good))
    ollama.files.stall_at = len(good) - 1000
    folder = ollama.box.dir / "engine"
    with running(ollama.box) as process:
        eventually(lambda: any(path.is_file() for path in (folder / "ollama.new").rglob("*")))
        assert not (folder / "ollama").exists()
        (ollama.box.tools / "tar").unlink()  # nothing is unpacked anew
        ollama.files.resume.set()
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, (out, errors)


def test_what_was_unpacked_of_another_archive_is_never_used(ollama: Ollama, good: bytes, tmp_path: Path) -> None:
    """A whole one came first, was too long for the promise, and the right one after it, over the same file."""
    evil = pack(tmp_path / "evil", {"bin/ollama": program("0.34.0"), "evil": "x"})
    part = ollama.box.dir / "downloads" / f"{ARCHIVE}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(evil + bytes(len(good)))
    ollama.configure(ollama_sha256=digest(good).removeprefix("sha256:"), ollama_bytes=len(good))
    code, events, errors = install(ollama.box)
    assert code == 0, (events, errors)
    assert list((ollama.box.dir / "engine").rglob("evil")) == []


def test_a_pull_that_never_gains_is_given_up_with_its_reason(ollama: Ollama) -> None:
    del ollama.content[f"/v2/library/tiny/blobs/{digest(WEIGHTS)}"]
    ollama.box.dir.joinpath("bin/ollama.py").write_bytes(
        payload.script("ollama.py").replace(b"time.sleep(1 + patience.tries)", b"time.sleep(0.01)")
    )
    text = failure(ollama, "model")
    assert text == "the pull of tiny:latest makes no progress at 0 MB: HTTP Error 404: Not Found"
    assert ollama.fetched(digest(WEIGHTS)) == 5


def test_a_blob_that_was_there_before_is_checked_because_ollama_does_not(ollama: Ollama) -> None:
    blob = ollama.blobs / digest(WEIGHTS).replace(":", "-")
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(len(WEIGHTS)))
    code, events, errors = install(ollama.box)
    assert code == 0, (events, errors)
    assert blob.read_bytes() == WEIGHTS
    assert any("digest mismatch" in event.text for event in of_model(events))


def test_a_file_that_is_another_one_twice_is_given_up(ollama: Ollama) -> None:
    ollama.content[f"/v2/library/tiny/blobs/{digest(WEIGHTS)}"] = bytes(len(WEIGHTS))
    assert failure(ollama, "model").startswith("a file of tiny:latest is not what the registry promised: digest mism")
    assert ollama.fetched(digest(WEIGHTS)) == 2


def test_a_registry_that_hides_its_manifest_is_left_to_ollama(ollama: Ollama) -> None:
    script = payload.script("ollama.py").replace(b"/manifests/{tag}", b"/hidden/{tag}").replace(b"== 404", b"== 418")
    ollama.box.dir.joinpath("bin/ollama.py").write_bytes(script.replace(b"patience.tries)", b"0.01)"))
    code, events, errors = install(ollama.box)
    assert code == 0, (events, errors)
    assert any("no answer of the registry (HTTP status 404)" in event.text for event in of_model(events))
    assert of_model(events)[-1].done == of_model(events)[-1].total


def test_what_no_other_box_could_do_is_refused_and_not_failed(ollama: Ollama) -> None:
    ollama.configure(context=65536)
    out = ollama.box.sh(str(ollama.box.dir / "bin/install.sh")).stdout
    assert "@selfhost\tmodel\trefuse\t\t\ttiny:latest takes at most 32768 tokens" in out


def test_a_server_that_hangs_is_started_again(ollama: Ollama) -> None:
    script = (
        payload.script("ollama.py")
        .replace(b"ASK_S = ", b"ASK_S = 0.1 #")
        .replace(b"timeout: float = 30", b"timeout: float = 0.2")
    )
    ollama.box.dir.joinpath("bin/ollama.py").write_bytes(script)
    assert install(ollama.box)[0] == 0
    (serve,) = ollama.processes("bin/ollama serve")
    os.kill(serve, signal.SIGSTOP)
    eventually(lambda: ollama.runner and ollama.processes("bin/ollama serve") not in ([], [serve]), 30)


def test_a_model_that_the_registry_does_not_have_is_named(ollama: Ollama) -> None:
    ollama.configure(model="tony:7b")
    assert failure(ollama, "model").startswith("the registry has no model tony:7b: ")


@pytest.mark.parametrize("name", ["../tiny", "a/b/c/d", "tiny model", "http://127.0.0.1/library/tiny", ""])
def test_what_cannot_be_the_name_of_a_model_is_refused(name: str, ollama: Ollama) -> None:
    done = run_ollama_py(ollama.box, "have", "--model", name)
    assert done.returncode == 3
    assert done.stderr.strip() == f"{name!r} is no name of a model for Ollama"


@pytest.mark.parametrize("registry", ["http://192.0.2.1:5000", "http://localhost.example"])
def test_a_registry_without_tls_is_refused_outside_of_loopback(registry: str, ollama: Ollama) -> None:
    done = run_ollama_py(ollama.box, "pull", "--model", "tiny", "--context", "1", "--registry", registry)
    assert done.returncode == 3
    assert "may only be on loopback" in done.stderr


def run_ollama_py(box: Box, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-IS", str(box.dir / "bin/ollama.py"), *args]
    return subprocess.run(command, cwd=box.dir, env=box.env, capture_output=True, text=True, timeout=20, check=False)


def test_a_disk_that_is_too_small_is_said_before_anything_is_pulled(ollama: Ollama) -> None:
    ollama.box.tool("df", "#!/bin/sh\nprintf 'Filesystem 1024-blocks Used Available\\nx 1 1 197000 1%% /\\n'\n")
    text = failure(ollama, "model")
    assert text == (
        "the disk is too small for tiny:latest: 3 MB are still to come and 200 MB must stay, but only 201 MB are free"
    )
    assert ollama.fetched("/blobs/") == 0
    assert not ollama.blobs.exists()


def test_a_model_of_a_user_has_its_name_and_no_long_one(ollama: Ollama) -> None:
    ollama.offer("someone/tiny:q4", b"the weights of someone")
    ollama.configure(model="someone/tiny:q4")
    code, events, _ = install(ollama.box)
    assert code == 0, events[-1]
    assert [model["name"] for model in ollama.ask("/api/ps")["models"]] == ["someone/tiny:q4"]
    manifests = ollama.box.dir / "engine/models/manifests"
    kept = [str(path.relative_to(manifests)) for path in manifests.rglob("*") if path.is_file()]
    assert kept == ["registry.ollama.ai/someone/tiny/q4"]


def test_another_model_is_pulled_and_served_instead(ollama: Ollama) -> None:
    install(ollama.box)
    ollama.offer("library/other:1b", b"other weights")
    code, events, _ = install(ollama.box, "--model", "other:1b")
    assert code == 0, events[-1]
    assert outcome(events) == {**dict.fromkeys(STEPS, "skip"), "model": "done", "start": "done"}
    assert [model["name"] for model in ollama.ask("/api/ps")["models"]] == ["other:1b"]
    assert "SELFHOST_REGISTRY='http" in ollama.box.text("run/install.env")


def test_more_context_than_the_model_has_fails_with_both_numbers(ollama: Ollama) -> None:
    words = "tiny:latest takes at most 32768 tokens of context, 65536 were asked for: ask for --context 32768 or less"
    ollama.configure(context=65536)
    assert failure(ollama, "model") == words
    # What was pulled stays, and asking for less is all it takes.
    ollama.configure(context=32768)
    assert install(ollama.box)[0] == 0
    assert ollama.fetched(digest(WEIGHTS)) == 1
    # Later the model is not pulled again, and it still does not go unnoticed.
    ollama.configure(context=65536)
    assert failure(ollama, "start") == words


def test_a_model_that_cannot_be_loaded_fails_with_the_reason(ollama: Ollama) -> None:
    ollama.offer("library/tiny:latest", b"rotten")
    text = failure(ollama, "start")
    assert text.endswith("cannot load tiny:latest: llama runner process has terminated: these weights are rotten")
    assert ollama.box.text("run/engine.problem") == text


@pytest.mark.parametrize("part", ["bin/ollama serve", "ollama.py serve", "sleep 1000 ", "start.sh supervise engine"])
def test_whatever_is_killed_comes_back_with_the_model_and_leaves_nothing_behind(part: str, ollama: Ollama) -> None:
    install(ollama.box)
    (old,) = eventually(lambda: ollama.runner)
    begun = (ollama.box.run / "engine.port").stat().st_mtime_ns
    for pid in ollama.processes(part):
        os.kill(pid, signal.SIGKILL)
    if "supervise" in part:
        # Until the kernel is done with it, it holds its lock.
        eventually(lambda: not ollama.processes(part))
        ollama.box.sh(str(ollama.box.dir / "bin/start.sh"), "engine")
    eventually(lambda: [pid for pid in ollama.runner if pid != old] and ollama.ask("/api/ps").get("models"))
    assert len(ollama.runner) == 1
    assert len(ollama.processes("bin/ollama serve")) == 1
    assert len(ollama.processes("ollama.py serve")) == 1
    # The proxy sees by its date that this is another one, which has read nothing yet.
    eventually(lambda: (ollama.box.run / "engine.port").stat().st_mtime_ns != begun)


def test_stop_ends_all_of_it_soon(ollama: Ollama) -> None:
    install(ollama.box)
    eventually(lambda: ollama.runner)
    began = time.monotonic()
    assert ollama.box.sh(str(ollama.box.dir / "bin/stop.sh"), "engine").returncode == 0
    assert time.monotonic() - began < 10
    assert not ollama.runner
    assert not ollama.processes("ollama")


def test_an_ollama_of_somebody_else_on_the_port_is_never_taken_for_ours(ollama: Ollama) -> None:
    install(ollama.box)
    port = ollama.box.text("run/engine.port")
    ollama.box.sh(str(ollama.box.dir / "bin/stop.sh"), "engine")
    stranger = ollama.box.path / "stranger"
    stranger.mkdir()
    env = {**os.environ, "HOME": str(stranger), "OLLAMA_MODELS": str(stranger), "OLLAMA_HOST": f"127.0.0.1:{port}"}
    with subprocess.Popen([ollama.box.dir / "engine/bin/ollama", "serve"], env=env) as other:
        eventually((stranger / "environment.json").exists)
        eventually(lambda: ollama.ask("/api/version"))
        code, events, _ = install(ollama.box, "--model", "other:1b")
        other.kill()
    assert (code, failed(events).stage) == (1, "model")
    assert ollama.box.text("run/engine.port") != port


def test_an_ollama_that_takes_the_port_while_ours_is_started_again_is_not_taken_for_ours(ollama: Ollama) -> None:
    install(ollama.box)
    port = ollama.box.text("run/engine.port")
    stranger = ollama.box.home / "stranger"
    stranger.mkdir()
    # It is there as soon as our server has been stopped.
    settings = f"HOME={stranger} OLLAMA_MODELS={stranger} OLLAMA_HOST=127.0.0.1:{port}"
    serve = f"{settings} setsid engine/bin/ollama serve </dev/null >/dev/null 2>&1 3>&- 4>&- 7>&- &"
    answer = f"until curl -s http://127.0.0.1:{port}/api/version; do sleep 0.05; done"
    stop = ollama.box.dir / "bin/stop.sh"
    stop.write_text(f"{stop.read_text()}\n{serve}\n{answer}\n")
    ollama.offer("library/other:1b", b"other weights")
    code, events, _ = install(ollama.box, "--model", "other:1b")
    assert code == 0, events[-1]
    assert [model["name"] for model in ollama.ask("/api/ps")["models"]] == ["other:1b"]
    assert ollama.box.text("run/engine.port") != port


def card(ollama: Ollama, tokens: int) -> None:
    """A GPU with room for so many tokens beside the weights."""
    home = ollama.box.dir / "engine/home"
    home.mkdir(parents=True, exist_ok=True)
    (home / "room").write_text(str(tokens))


def served(ollama: Ollama) -> tuple[int, int]:
    """Context and slots, once the launcher has settled on them."""
    eventually(lambda: json.loads(ollama.box.text("run/engine.fit"))["loaded"])
    fit = json.loads(ollama.box.text("run/engine.fit"))
    (model,) = ollama.ask("/api/ps")["models"]
    assert fit["context"] == model["context_length"]
    return fit["context"], fit["slots"]


def test_slots_and_the_type_of_what_is_kept_reach_the_server(ollama: Ollama) -> None:
    ollama.configure(slots=2, kv_cache_type="q4_0")
    assert install(ollama.box)[0] == 0
    told = json.loads(ollama.box.text("engine/home/environment.json"))
    assert (told["OLLAMA_NUM_PARALLEL"], told["OLLAMA_KV_CACHE_TYPE"]) == ("2", "q4_0")
    assert served(ollama) == (4096, 2)  # without a card nothing is taken away
    server = ollama.processes("bin/ollama serve")
    ollama.configure(slots=1, kv_cache_type="q4_0")
    assert install(ollama.box)[0] == 0
    assert ollama.processes("bin/ollama serve") != server
    assert served(ollama) == (4096, 1)


@pytest.mark.parametrize(
    ("room", "slots", "held"),
    [
        (16384, 2, (8192, 2)),
        (8192, 3, (8192, 1)),  # fewer slots before less context
        (6500, 1, (6144, 1)),
        (4096, 2, (4096, 1)),
    ],
)
def test_what_does_not_fit_into_the_card_is_loaded_with_less(
    room: int, slots: int, held: tuple[int, int], ollama: Ollama
) -> None:
    card(ollama, room)
    ollama.configure(context=8192, slots=slots)
    install(ollama.box)
    assert served(ollama) == held
    assert not (ollama.box.run / "engine.problem").exists()


def test_a_card_that_is_too_small_to_load_it_at_all_is_no_other_case(ollama: Ollama) -> None:
    card(ollama, 6500)
    (ollama.box.dir / "engine/home/strict").touch()
    ollama.configure(context=8192)
    assert install(ollama.box)[0] == 0
    assert served(ollama) == (6144, 1)


def test_a_launcher_that_is_killed_begins_where_it_came_to(ollama: Ollama) -> None:
    card(ollama, 6500)
    ollama.configure(context=8192)
    install(ollama.box)
    assert served(ollama) == (6144, 1)
    card(ollama, 100_000)
    os.kill(int(ollama.box.text("run/engine.child")), signal.SIGKILL)
    eventually(lambda: not json.loads(ollama.box.text("run/engine.fit"))["loaded"])
    assert served(ollama) == (6144, 1)
    # Asked for something else, it tries that.
    ollama.configure(context=7168)
    install(ollama.box)
    assert served(ollama) == (7168, 1)


def test_a_launcher_that_stepped_down_still_ends_when_it_is_told_to(ollama: Ollama) -> None:
    card(ollama, 6500)
    ollama.configure(context=8192)
    install(ollama.box)
    served(ollama)
    launcher = int(ollama.box.text("run/engine.child"))
    os.kill(launcher, signal.SIGTERM)  # stop.sh would kill it in the end
    eventually(lambda: not Path(f"/proc/{launcher}").exists(), 5)
    assert ollama.box.sh(str(ollama.box.dir / "bin/stop.sh")).returncode == 0
    assert not ollama.processes("ollama")
    assert not ollama.runner


def test_a_card_that_has_no_room_for_half_of_it_is_a_failure(ollama: Ollama) -> None:
    card(ollama, 1000)
    ollama.configure(context=8192)
    install(ollama.box)
    eventually(lambda: (ollama.box.run / "engine.problem").exists())
    said = ollama.box.text("run/engine.problem")
    assert said == (
        "tiny:latest does not fit into the GPU's memory: 0 of 0 MB are there, and there is nothing less to try"
    )
    assert json.loads(ollama.box.text("run/engine.fit"))["context"] == 4096


def test_each_step_down_has_a_port_of_its_own_so_that_the_proxy_asks_for_the_context_anew(ollama: Ollama) -> None:
    card(ollama, 6500)
    ollama.configure(context=8192)
    install(ollama.box)
    served(ollama)
    starts = [line.split() for line in ollama.box.text("engine/home/hosts").splitlines()]
    # A server whose port somebody else took just then is started once more, with the same context.
    steps = [[host for host, _ in group] for _, group in itertools.groupby(starts, key=lambda start: start[1])]
    assert [int(context) for context, _ in itertools.groupby(context for _, context in starts)] == [8192, 7168, 6144]
    assert all(before[-1] != after[0] for before, after in itertools.pairwise(steps))
