"""install.sh, whole: real downloads, real venvs from a local wheel; only engine and proxy are stand-ins."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from selfhost_cli import payload
from selfhost_cli.install import InstallSpec, env_file, parse
from selfhost_cli.model import Event
from tests.templates.box import Box, Files, all_pids, command_line, eventually, key_pair, stub_proxy_zip, wheel

MODEL = os.urandom(1_500_000)
STEPS = ["tools", "model", "engine", "proxy", "start"]


@pytest.fixture
def mirror() -> Iterator[Files]:
    server = Files({"/m/tiny.gguf": MODEL})
    yield server
    server.close()


@pytest.fixture
def ready(box: Box, mirror: Files) -> Box:
    """A box on which everything was uploaded and nothing installed. Its parts need no packages, to be quick."""
    box.put_parts()
    configure(box, mirror)
    return box


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, str]:
    """Settings with which both parts do need a package, from a local wheel."""
    wheel(tmp_path / "wheels")
    pinned = dict.fromkeys(("proxy_requirements", "engine_requirements"), "tinypart==1.0")
    return {"pip_args": f"--no-index --find-links {tmp_path / 'wheels'}", **pinned}


def configure(box: Box, mirror: Files, **changes: object) -> None:
    values: dict[str, object] = {
        "engine": "llamacpp",
        "model": "tiny",
        "context": 4096,
        "token": "the token's own",
        "version": "1.2.3",
        "url": f"{mirror.url}/m/tiny.gguf?download=true",
        "sha256": hashlib.sha256(MODEL).hexdigest(),
        "size": len(MODEL),
        "proxy_requirements": "",
        "engine_requirements": "",
    }
    box.run.mkdir(exist_ok=True)
    (box.run / "install.env").write_bytes(env_file(InstallSpec(**{**values, **changes})))  # type: ignore[arg-type]


def install(box: Box, *args: str, **env: str) -> tuple[int, list[Event], str]:
    """Exit status, progress, stderr; stdout must be progress and nothing else."""
    result = box.sh(str(box.dir / "bin/install.sh"), *args, **env)
    events = [parse(line) for line in result.stdout.splitlines()]
    assert None not in events, result.stdout
    return result.returncode, [event for event in events if event], result.stderr


def outcome(events: list[Event]) -> dict[str, str]:
    """Step -> how it ended."""
    return {event.stage: event.status for event in events if event.status in ("done", "skip", "fail")}


def failed(events: list[Event]) -> Event:
    """What runs beside it may still say something."""
    (event,) = (event for event in events if event.status == "fail")
    return event


def snapshot(box: Box) -> dict[str, float]:
    """Every file but logs, with its time of change."""
    files = (path for path in box.home.rglob("*") if path.is_file() and path.parent.name != "log")
    return {str(path): path.stat().st_mtime for path in files}


def test_it_brings_everything_up_and_a_second_run_changes_nothing(
    ready: Box, mirror: Files, packages: dict[str, str]
) -> None:
    configure(ready, mirror, **packages)
    code, events, errors = install(ready)
    assert (code, errors) == (0, "")
    assert outcome(events) == dict.fromkeys(STEPS, "done")
    ends = list(outcome(events))
    assert (ends[0], ends[-1]) == ("tools", "start")
    assert (ready.dir / "downloads/tiny.gguf").read_bytes() == MODEL
    assert not (ready.dir / "downloads/tiny.gguf.part").exists()
    assert any(event.stage == "model" and event.total == len(MODEL) for event in events)

    before, pids = snapshot(ready), ready.text("run/engine.child") + ready.text("run/proxy.child")
    code, events, errors = install(ready)
    assert (code, errors) == (0, "")
    assert outcome(events) == dict.fromkeys(STEPS, "skip")
    assert snapshot(ready) == before
    assert ready.text("run/engine.child") + ready.text("run/proxy.child") == pids
    assert len(mirror.ranges) == 1


def test_force_does_every_step_again_but_keeps_a_verified_download(ready: Box, mirror: Files) -> None:
    install(ready)
    old = ready.text("run/proxy.child")
    code, events, _ = install(ready, "--force", "--skip-redis")
    assert code == 0
    assert outcome(events) == dict.fromkeys(STEPS, "done")
    assert len(mirror.ranges) == 1
    assert ready.text("run/proxy.child") != old
    assert any("the cache lives in the front" in event.text for event in events)


def test_what_vanished_or_changed_is_repaired_and_the_rest_skipped(ready: Box, mirror: Files, tmp_path: Path) -> None:
    install(ready)
    engine = ready.text("run/engine.child")
    (ready.dir / "proxy/venv/bin/python").unlink()
    configure(ready, mirror, token="another")
    code, events, errors = install(ready)
    assert code == 0, (events, errors)
    assert outcome(events) == {**dict.fromkeys(STEPS, "skip"), "proxy": "done", "start": "done"}
    assert ready.text("run/engine.child") == engine


def test_it_keeps_to_its_own_directory_and_settings_of_the_user_cannot_bring_an_index_back(
    ready: Box, mirror: Files, packages: dict[str, str], tmp_path: Path
) -> None:
    configure(ready, mirror, **packages)
    (ready.home / ".config/pip").mkdir(parents=True)
    (ready.home / ".config/pip/pip.conf").write_text("[global]\nrequire-virtualenv = nonsense\n")
    before = {path for path in ready.home.rglob("*") if ready.dir not in path.parents}
    nowhere = str(tmp_path / "nowhere")
    code, events, errors = install(
        ready, TMPDIR=nowhere, PIP_NO_BINARY=":all:", PIP_REQUIRE_HASHES="1", PIP_CACHE_DIR=nowhere, PYTHONPATH="/x"
    )
    assert (code, errors) == (0, ""), events
    assert {path for path in ready.home.rglob("*") if ready.dir not in path.parents} == before
    assert not Path(nowhere).exists()
    assert not (ready.dir / "tmp").exists()


@pytest.mark.parametrize("fault", ["cut_at", "stall_at"])
def test_a_broken_download_goes_on_where_it_ended(fault: str, ready: Box, mirror: Files) -> None:
    setattr(mirror, fault, 600_000)
    code, events, errors = install(ready, SELFHOST_STALL_S="2")
    assert code == 0, (events, errors)
    begins = [int((asked or "bytes=0-")[6:-1]) for asked in mirror.ranges]
    assert begins[0] == 0
    assert 500_000 < begins[1] <= 600_000
    assert len(begins) == 2
    assert (ready.dir / "downloads/tiny.gguf").read_bytes() == MODEL
    assert any("interrupted" in event.text and event.done == begins[1] for event in events)


def test_a_download_that_becomes_slow_goes_on_over_another_connection(ready: Box, mirror: Files) -> None:
    mirror.slow_at = 600_000
    code, events, errors = install(ready, SELFHOST_SLOW_S="1")
    assert code == 0, (events, errors)
    begins = [int((asked or "bytes=0-")[6:-1]) for asked in mirror.ranges]
    assert len(begins) == 2
    assert begins[1] >= 600_000
    assert (ready.dir / "downloads/tiny.gguf").read_bytes() == MODEL
    told = [event for event in events if event.text == "tiny.gguf: interrupted (it became slow), going on"]
    assert [event.done for event in told] == [begins[1]]


def test_a_server_that_is_slow_again_and_again_is_left_in_peace(ready: Box, mirror: Files) -> None:
    mirror.slow_at, mirror.drop, mirror.slows = 600_000, 2_000, 100
    code, events, errors = install(ready, SELFHOST_SLOW_S="1")
    assert code == 0, (events, errors)
    assert sum("it became slow" in event.text for event in events) == 3
    assert len(mirror.ranges) == 4


def test_a_download_that_only_shares_the_link_is_not_slow(ready: Box, mirror: Files) -> None:
    """The rest of it comes with less than a quarter of what it came with before, as long as other bytes come too."""
    mirror.slow_at, mirror.drop = 600_000, 5_000
    came = 0

    def others() -> None:
        nonlocal came
        while not mirror.resume.wait(0.02):
            came += 500_000
            draft = ready.root / "net_dev.new"
            draft.write_text(f"Inter-|   Receive\n face |bytes\n    lo: 9 0\n  eth0: {came} 7 0\n")
            draft.replace(ready.root / "net_dev")

    traffic = threading.Thread(target=others)
    traffic.start()
    code, events, errors = install(ready, SELFHOST_SLOW_S="1")
    mirror.resume.set()
    traffic.join()
    assert code == 0, (events, errors)
    assert len(mirror.ranges) == 1


@contextmanager
def running(box: Box) -> Iterator[subprocess.Popen[str]]:
    command, pipe = ["sh", str(box.dir / "bin/install.sh")], subprocess.PIPE
    with subprocess.Popen(command, env=box.env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_packages_are_installed_while_the_model_comes(ready: Box, mirror: Files, packages: dict[str, str]) -> None:
    configure(ready, mirror, **packages)
    mirror.stall_at = 500_000
    with running(ready) as process:
        eventually(lambda: ready.text("steps/engine") and ready.text("steps/proxy"), 30)
        assert not (ready.dir / "steps/model").exists()
        eventually(lambda: ready.text("run/proxy.port"))
        assert ready.text("run/engine.child") == ""
        mirror.resume.set()
        out, errors = process.communicate(timeout=30)
    assert process.returncode == 0, (out, errors)


def test_a_part_that_fails_ends_what_runs_beside_it_with_its_own_reason(ready: Box, mirror: Files) -> None:
    configure(ready, mirror, proxy_requirements="nothing-of-that-name==1.0", pip_args="--no-index")
    mirror.stall_at = 500_000
    with running(ready) as process:
        out, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    why = failed([event for line in out.splitlines() if (event := parse(line))])
    assert (why.stage, why.text) == ("proxy", "pip could not install nothing-of-that-name==1.0")
    assert errors.strip().endswith(f"install.sh: {why.text}")
    assert ready.processes() == []
    kept = (ready.dir / "downloads/tiny.gguf.part").stat().st_size
    assert kept > 400_000
    mirror.resume.set()
    configure(ready, mirror)
    assert install(ready)[0] == 0
    assert mirror.ranges == [None, f"bytes={kept}-"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_install_that_is_ended_leaves_nothing_of_it_running(
    number: int, ready: Box, mirror: Files, packages: dict[str, str]
) -> None:
    configure(ready, mirror, **packages)
    mirror.stall_at = 500_000
    part = ready.dir / "downloads/tiny.gguf.part"
    with running(ready) as process:
        eventually(lambda: part.exists() and part.stat().st_size > 400_000)
        process.send_signal(number)
        process.communicate(timeout=10)
    assert process.returncode == 130
    assert [line for pid in ready.processes() if "supervise" not in (line := command_line(pid))] == []
    assert not (ready.dir / "tmp").exists()


def test_what_was_read_while_it_came_is_not_taken_for_the_file_that_is_there(ready: Box, mirror: Files) -> None:
    """What is left of another file is too long for this one: the download begins again, in the same file."""
    part = ready.dir / "downloads/tiny.gguf.part"
    part.parent.mkdir()
    part.write_bytes(os.urandom(len(MODEL) + 1000))
    code, events, errors = install(ready)
    assert code == 0, (events, errors)
    assert mirror.ranges == [None]
    assert (ready.dir / "downloads/tiny.gguf").read_bytes() == MODEL


def test_a_head_start_of_onstart_is_waited_for_and_not_repeated(ready: Box, mirror: Files) -> None:
    part = ready.dir / "downloads/tiny.gguf.part"
    part.parent.mkdir()
    part.write_bytes(MODEL[:1_000_000])
    holder = subprocess.Popen(["flock", str(part), "sh", "-c", f"echo held; cat >>{part}"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdout.readline()
    running = subprocess.Popen(
        ["sh", str(ready.dir / "bin/install.sh")], env=ready.env, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    seen = ""
    while "begun at the start of the box" not in seen:
        seen += running.stdout.readline()
    assert "progress\t1000000\t1500000\ttiny.gguf" in seen
    holder.stdin.write(MODEL[1_000_000:1_200_000])
    holder.stdin.close()
    assert holder.wait(10) == 0
    holder.stdout.close()
    seen += running.stdout.read()
    running.stdout.close()
    assert running.wait(20) == 0
    assert mirror.ranges == ["bytes=1200000-"]
    assert (ready.dir / "downloads/tiny.gguf").read_bytes() == MODEL


def test_onstart_and_install_agree_on_the_file(ready: Box, mirror: Files) -> None:
    private, public = key_pair()
    ready.start(payload.onstart(private, public, public), SELFHOST_FETCH_URL=f"{mirror.url}/m/tiny.gguf?download=true")
    part = ready.dir / "downloads/tiny.gguf.part"
    eventually(lambda: part.exists() and part.stat().st_size == len(MODEL))
    code, events, errors = install(ready)
    assert code == 0, (events, errors)
    assert len(mirror.ranges) == 1


def test_a_wrong_file_is_deleted_and_named(ready: Box, mirror: Files) -> None:
    configure(ready, mirror, sha256="0" * 64)
    code, events, errors = install(ready)
    assert code == 1
    assert failed(events).stage == "model"
    assert "tiny.gguf is not the promised file" in failed(events).text
    assert failed(events).text in errors
    assert list((ready.dir / "downloads").iterdir()) == []
    assert not (ready.dir / "steps/model").exists()


def test_a_missing_file_fails_after_a_few_tries(ready: Box, mirror: Files) -> None:
    ready.tool("sleep", "#!/bin/sh\nexit 0\n")
    configure(ready, mirror, url=f"{mirror.url}/m/other.gguf")
    code, events, errors = install(ready)
    assert code == 1
    assert failed(events).text == "the download of other.gguf makes no progress at 0 MB: HTTP status 404"
    assert "404" in errors


def test_a_disk_that_is_too_small_is_said_before_the_download(ready: Box, mirror: Files) -> None:
    ready.tool("df", "#!/bin/sh\nprintf 'Filesystem 1024-blocks Used Available\\nx 1 1 150000 1%% /\\n'\n")
    code, events, _ = install(ready)
    assert code == 1
    assert "the disk is too small for tiny.gguf" in failed(events).text
    assert "only 153 MB are free" in failed(events).text
    assert mirror.ranges == []


def test_a_box_with_a_gpu_refuses_the_cpu_engine_unless_it_is_simulated(ready: Box) -> None:
    ready.tool("nvidia-smi", "#!/bin/sh\n")
    code, events, _ = install(ready)
    assert code == 1
    assert failed(events).stage == "engine"
    assert "CPU only; the engine for GPU boxes is ollama" in failed(events).text
    code, _, _ = install(ready, SELFHOST_SIMULATED_GPU="1")
    assert code == 0


def test_an_unknown_engine_is_named_before_anything_is_downloaded(ready: Box, mirror: Files) -> None:
    code, events, _ = install(ready, "--engine", "vllm")
    assert code == 1
    assert failed(events).text == "no engine 'vllm': there are ollama and llamacpp"
    assert mirror.asked == []


@pytest.mark.parametrize("size", [len(MODEL) - 1000, len(MODEL) + 1000])
def test_a_file_of_another_size_is_deleted_and_not_fetched_again_and_again(
    size: int, ready: Box, mirror: Files
) -> None:
    configure(ready, mirror, size=size)
    code, events, _ = install(ready)
    assert code == 1
    assert f"it has {len(MODEL)} bytes, not {size}; it was deleted" in failed(events).text
    assert len(mirror.ranges) == 1
    assert list((ready.dir / "downloads").iterdir()) == []


def test_a_missing_tool_is_named_when_nobody_can_install_it(ready: Box) -> None:
    (ready.tools / "curl").unlink()
    code, events, _ = install(ready)
    assert code == 1
    assert failed(events).text.startswith("missing on this box: curl")
    assert "apt-get install -y ca-certificates curl" in failed(events).text


def test_apt_is_asked_for_what_is_missing_and_only_then(ready: Box) -> None:
    curl = os.readlink(ready.tools / "curl")
    calls = ready.path / "apt"
    ready.tool(
        "apt-get", f'#!/bin/sh\necho "$*" >>{calls}\n[ "$1" = update ] || /bin/ln -s {curl} {ready.tools}/curl\n'
    )
    ready.tool("id", "#!/bin/sh\necho 0\n")
    assert install(ready)[0] == 0
    assert not calls.exists()
    (ready.tools / "curl").unlink()
    assert install(ready)[0] == 0
    assert calls.read_text() == "update\ninstall -y --no-install-recommends ca-certificates curl\n"


def test_on_a_machine_of_ones_own_apt_is_not_asked_even_by_root(ready: Box) -> None:
    calls = ready.path / "apt"
    ready.tool("apt-get", f'#!/bin/sh\necho "$*" >>{calls}\n')
    ready.tool("id", "#!/bin/sh\necho 0\n")
    settings = ready.dir / "run/install.env"
    settings.write_text(settings.read_text() + "SELFHOST_PACKAGES='no'\n")
    (ready.tools / "curl").unlink()
    code, events, _ = install(ready)
    assert code == 1
    assert failed(events).text.startswith("missing on this box: curl")
    assert not calls.exists()


def test_run_by_hand_from_a_checkout_it_packs_the_proxy_once_there_is_a_python(box: Box, mirror: Files) -> None:
    checkout, python = box.path / "checkout", (box.tools / "python3").read_text()
    box.put_parts()
    shutil.copytree(box.dir / "bin", checkout / "templates")
    shutil.rmtree(box.dir / "bin")
    package = checkout / "selfhost_cli"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "payload.py").write_text(
        "from pathlib import Path\ndef proxy_zip(): return Path(__file__).with_name('packed').read_bytes()\n"
    )
    (checkout / "templates/proxy.zip").rename(package / "packed")
    (box.tools / "python3").unlink()
    (box.path / "python3").write_text(python)
    bring = f"/bin/cp {box.path / 'python3'} {box.tools / 'python3'} && /bin/chmod 755 {box.tools / 'python3'}"
    box.tool("apt-get", f'#!/bin/sh\n[ "$1" = update ] || {{ {bring}; }}\n')
    box.tool("id", "#!/bin/sh\necho 0\n")
    configure(box, mirror)
    for _ in range(2):
        done = box.sh(str(checkout / "templates/install.sh"))
        assert done.returncode == 0, done.stderr
        assert (box.dir / "bin/proxy.zip").read_bytes() == stub_proxy_zip()


def test_an_empty_proxy_is_none(ready: Box, mirror: Files) -> None:
    (ready.dir / "bin/proxy.zip").write_bytes(b"")
    code, events, _ = install(ready)
    assert code == 1
    assert failed(events).text == "proxy.zip is not in ~/.selfhost/bin: `selfhost up` puts it there"
    assert mirror.asked == []


def test_a_part_that_dies_again_and_again_fails_with_its_last_words(ready: Box) -> None:
    ready.tool("sleep", f"#!/bin/sh\nexec {os.readlink(ready.tools / 'sleep')} 0.05\n")
    (ready.dir / "bin/llamacpp.py").write_text("raise SystemExit('these weights are rotten')\n")
    code, events, errors = install(ready)
    assert code == 1
    assert outcome(events)["start"] == "fail"
    assert failed(events).text == "the engine dies again and again"
    assert "these weights are rotten" in errors
    assert not (ready.dir / "steps/start").exists()


def test_the_token_is_never_an_argument_and_never_in_a_log(ready: Box) -> None:
    code, events, errors = install(ready)
    assert code == 0, (events, errors)
    lines = [line for pid in all_pids() if str(ready.dir) in (line := command_line(pid))]
    assert not any("the token" in line for line in lines)
    assert not any("the token" in log.read_text() for log in (ready.dir / "log").iterdir())


def test_an_install_goes_on_when_the_laptop_goes_away_and_the_next_one_waits_for_it(ready: Box, mirror: Files) -> None:
    mirror.stall_at = 500_000
    running = subprocess.Popen(
        ["sh", str(ready.dir / "bin/install.sh")], env=ready.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert running.stdout is not None
    assert running.stderr is not None
    eventually(lambda: mirror.ranges)
    running.stdout.close()
    running.stderr.close()
    second = subprocess.Popen(
        ["sh", str(ready.dir / "bin/install.sh")], env=ready.env, stdout=subprocess.PIPE, text=True
    )
    assert second.stdout is not None
    assert "waiting for an earlier install to end" in second.stdout.readline()
    mirror.resume.set()
    rest = second.stdout.read()
    second.stdout.close()
    assert (running.wait(20), second.wait(20)) == (0, 0)
    events = [event for line in rest.splitlines() if (event := parse(line))]
    assert outcome(events) == dict.fromkeys(STEPS, "skip")
    assert len(mirror.ranges) == 1


def test_by_hand_it_makes_its_own_token_and_remembers_the_flags(ready: Box, mirror: Files) -> None:
    (ready.run / "install.env").unlink()
    by_hand = {
        "SELFHOST_MODEL_URL": f"{mirror.url}/m/tiny.gguf",
        "SELFHOST_PROXY_REQUIREMENTS": "",
        "SELFHOST_ENGINE_REQUIREMENTS": "",
    }
    code, _, errors = install(ready, "--engine", "llamacpp", "--model", "it's mine", "--context", "2048", **by_hand)
    assert code == 0, errors
    file = ready.run / "install.env"
    assert file.stat().st_mode & 0o777 == 0o600
    code, events, _ = install(ready)
    assert outcome(events) == dict.fromkeys(STEPS, "skip")
    script = f'. {file}; printf "%s\\n" "$SELFHOST_MODEL" "$SELFHOST_TOKEN"'
    read = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert read[0] == "it's mine"
    assert len(read[1]) == 48
    port = ready.text("run/proxy.port")
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/health", headers={"Authorization": f"Bearer {read[1]}"})
    with urllib.request.urlopen(asked, timeout=5) as reply:
        assert reply.status == 200


def test_help_changes_nothing(box: Box) -> None:
    box.put_parts()
    before = snapshot(box)
    result = box.sh(str(box.dir / "bin/install.sh"), "--help")
    assert result.returncode == 0
    for option in ("--force", "--skip-redis", "--engine", "--model", "--context"):
        assert option in result.stdout
    assert snapshot(box) == before


@pytest.mark.parametrize("wrong", [["--fast"], ["--context", "many"], ["--model"]])
def test_wrong_usage_ends_with_2_and_the_help(wrong: list[str], box: Box) -> None:
    box.put_parts()
    began = time.monotonic()
    result = box.sh(str(box.dir / "bin/install.sh"), *wrong)
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: sh install.sh" in result.stderr
    assert time.monotonic() - began < 5
