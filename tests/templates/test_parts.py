"""start.sh and stop.sh: supervised parts that come back, and end when told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.templates.box import Box, command_line, eventually


@pytest.fixture
def parts(box: Box) -> Box:
    """A box with both parts installed; the venvs are this interpreter, the parts are stand-ins."""
    box.put_parts()
    for part in ("engine", "proxy"):
        (box.dir / part / "venv/bin").mkdir(parents=True)
        python = box.dir / part / "venv/bin/python"
        python.write_text(f'#!/bin/sh\nexport PYTHONPATH="$PYTHONPATH:{box.path}"\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
    (box.path / "tinypart.py").touch()
    for folder in ("run", "log", "downloads"):
        (box.dir / folder).mkdir()
    (box.dir / "downloads/tiny.gguf").write_bytes(b"weights")
    (box.run / "install.env").write_text(
        "SELFHOST_ENGINE='llamacpp'\nSELFHOST_MODEL='tiny model'\nSELFHOST_CONTEXT='8192'\nSELFHOST_TOKEN='t'\n"
        "SELFHOST_MODEL_URL='http://127.0.0.1:9/x/tiny.gguf?download=true'\nSELFHOST_PROXY_REQUIREMENTS=''\n"
    )
    return box


def start(box: Box, *args: str) -> None:
    result = box.sh(str(box.dir / "bin/start.sh"), *args)
    assert result.returncode == 0, result.stderr


def stop(box: Box, *args: str) -> None:
    result = box.sh(str(box.dir / "bin/stop.sh"), *args)
    assert result.returncode == 0, result.stderr


def engine_answer(box: Box) -> bytes:
    port = box.text("run/engine.port")
    if not port:
        return b""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as reply:
            return bytes(reply.read())
    except OSError:
        return b""


def listens(box: Box, part: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", int(box.text(f"run/{part}.port"))), timeout=5):
            return True
    except OSError:
        return False


def test_start_returns_at_once_and_runs_both_parts_with_their_settings(parts: Box) -> None:
    began = time.monotonic()
    start(parts)
    assert time.monotonic() - began < 2
    assert b'"--alias": "tiny model", "--context": "8192"' in eventually(lambda: engine_answer(parts))
    eventually(lambda: parts.text("run/proxy.port"))


def test_starting_again_changes_nothing(parts: Box) -> None:
    start(parts)
    eventually(lambda: engine_answer(parts))
    pids = {part: parts.text(f"run/{part}.pid") for part in ("engine", "proxy")}
    children = parts.text("run/engine.child")
    start(parts)
    start(parts, "engine")
    assert {part: parts.text(f"run/{part}.pid") for part in pids} == pids
    assert parts.text("run/engine.child") == children


def test_two_starts_at_once_run_one_of_each(parts: Box) -> None:
    command = ["sh", str(parts.dir / "bin/start.sh")]
    both = [subprocess.Popen(command, env=parts.env) for _ in range(2)]
    assert [process.wait(10) for process in both] == [0, 0]
    eventually(lambda: engine_answer(parts))

    def loops() -> list[str]:
        lines = [command_line(pid) for pid in parts.processes()]
        return sorted(line.split()[-1] for line in lines if "llamacpp.py" in line or "selfhost_cli.proxy" in line)

    eventually(lambda: len(loops()) == 2)


@pytest.mark.parametrize("part", ["engine", "proxy"])
def test_a_killed_part_comes_back_on_its_port(part: str, parts: Box) -> None:
    start(parts)
    port = eventually(lambda: parts.text(f"run/{part}.port"))
    old = int(parts.text(f"run/{part}.child"))
    os.kill(old, signal.SIGKILL)
    eventually(lambda: parts.text(f"run/{part}.child") != str(old) and listens(parts, part))
    assert parts.text(f"run/{part}.port") == port
    assert f"{part} ended with status 137" in parts.text(f"log/{part}.log")


def test_stop_ends_one_part_with_its_loop_and_leaves_the_other(parts: Box) -> None:
    start(parts)
    eventually(lambda: engine_answer(parts))
    proxy = eventually(lambda: parts.text("run/proxy.child"))
    stop(parts, "engine")
    assert not [pid for pid in parts.processes() if "llamacpp.py" in command_line(pid)]
    assert not parts.text("run/engine.pid")
    assert command_line(int(proxy))
    stop(parts)
    assert not [pid for pid in parts.processes() if "start.sh" in command_line(pid)]
    stop(parts)


def test_a_part_that_does_not_listen_is_killed(parts: Box) -> None:
    deaf = "import signal, time, pathlib\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    deaf += "pathlib.Path('run/deaf').touch()\nwhile True: time.sleep(1)\n"
    (parts.dir / "bin/llamacpp.py").write_text(deaf)
    start(parts, "engine")
    eventually((parts.run / "deaf").exists)
    parts.tool("sleep", f"#!/bin/sh\nexec {os.readlink(parts.tools / 'sleep')} 0.01\n")
    stop(parts, "engine")
    assert not parts.processes()


def test_a_stale_pid_file_never_hits_a_stranger(parts: Box) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        (parts.run / "engine.pid").write_text(str(stranger.pid))
        (parts.run / "engine.lock").touch()
        (parts.run / "engine.child").write_text(str(stranger.pid))
        stop(parts, "engine")
        start(parts, "engine")
        eventually(lambda: engine_answer(parts))
        assert stranger.poll() is None
        stranger.kill()


def test_a_part_left_behind_by_a_killed_loop_gives_its_port_back(parts: Box) -> None:
    start(parts, "engine")
    eventually(lambda: engine_answer(parts))
    port, orphan = parts.text("run/engine.port"), parts.text("run/engine.child")
    loop = int(parts.text("run/engine.pid"))
    os.kill(loop, signal.SIGKILL)
    # Until the kernel is done with it, it holds its lock.
    eventually(lambda: not command_line(loop))
    start(parts, "engine")
    eventually(lambda: parts.text("run/engine.child") != orphan and engine_answer(parts))
    assert parts.text("run/engine.port") == port


def test_a_log_does_not_grow_for_ever(parts: Box) -> None:
    (parts.dir / "log/engine.log").write_bytes(b"old line\n" * 700_000)
    start(parts, "engine")
    eventually(lambda: engine_answer(parts))
    eventually(lambda: (parts.dir / "log/engine.log").stat().st_size <= 1_000_100)


def test_a_part_that_is_not_installed_is_refused(box: Box) -> None:
    box.put_parts()
    result = box.sh(str(box.dir / "bin/start.sh"), "engine")
    assert (result.returncode, result.stderr) == (1, "start.sh: the engine is not installed: run install.sh first\n")


@pytest.mark.parametrize("script", ["start.sh", "stop.sh"])
def test_an_unknown_part_is_a_usage_error(script: str, box: Box) -> None:
    box.put_parts()
    result = box.sh(str(box.dir / "bin" / script), "watchdog")
    assert (result.returncode, result.stderr) == (2, f"usage: {script} [engine|proxy]\n")
