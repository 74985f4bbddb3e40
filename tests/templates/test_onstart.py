"""The shipped onstart text, run as the market runs it: at every start of the container."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from selfhost_cli import payload
from tests.templates.box import Box, Files, Market, command_line, eventually, key_pair


@pytest.fixture(scope="module")
def keys() -> tuple[str, str, str]:
    private, public = key_pair()
    return private, public, key_pair()[1]


@pytest.fixture
def onstart(keys: tuple[str, str, str]) -> str:
    return payload.onstart(*keys)


@pytest.fixture
def sshd(box: Box) -> Iterator[subprocess.Popen[bytes]]:
    """Stands where the box's sshd would: counts the times it is asked to read its keys again."""
    process = subprocess.Popen(
        ["sh", "-c", f"trap 'echo hup >>{box.path}/hups' HUP; : >{box.path}/up; while :; do sleep 0.05; done"],
        env={**box.env},
    )
    eventually((box.path / "up").exists)
    (box.root / "run").mkdir()
    (box.root / "run/sshd.pid").write_text(f"{process.pid}\n")
    yield process
    process.kill()
    process.wait()


def watchdogs(box: Box) -> list[int]:
    """The shells that run the watchdog; its short-lived subshells look the same, but not twice."""
    return [pid for pid in box.processes() if command_line(pid) == "sh bin/watchdog.sh - "]


def test_onstart_returns_at_once_and_leaves_nothing_that_holds_its_output(box: Box, onstart: str) -> None:
    began = time.monotonic()
    result = box.start(onstart)
    assert time.monotonic() - began < 2
    assert (result.stdout, result.stderr) == ("", "")
    eventually(lambda: box.text("run/armed"))


def test_a_start_as_it_should_be_leaves_no_complaint_in_the_logs(box: Box, onstart: str) -> None:
    box.start(onstart)
    eventually(lambda: box.text("run/armed"))
    eventually(lambda: "sshd.pid" in box.text("log/onstart.log"))
    told = [line for path in (box.dir / "log").glob("*.log") for line in path.read_text().splitlines()]
    assert [line for line in told if "sshd.pid" not in line] == [], (
        "there was no sshd to be told of its key, and that's all"
    )


def test_it_is_dash_clean_and_runs_under_bash_too(box: Box, onstart: str) -> None:
    file = box.path / "onstart.sh"
    file.write_text(onstart)
    subprocess.run(["bash", str(file)], env=box.env, cwd=box.home, check=True, timeout=10)
    assert eventually(lambda: box.text("run/armed")) == "ok"


def test_box_env_is_private_and_survives_any_value(box: Box, onstart: str) -> None:
    nasty = "it's $HOME `id` \"x\" \\ \\1 & #\n  second line '' "
    box.start(onstart, SELFHOST_FETCH_SHA256=nasty, UNRELATED="x", SELFHOST_lower="x")
    file = box.run / "box.env"
    assert file.stat().st_mode & 0o777 == 0o600
    assert box.dir.stat().st_mode & 0o777 == 0o700
    script = f'. {file}; printf %s "$SELFHOST_FETCH_SHA256"'
    clean = {"PATH": box.env["PATH"]}
    read = subprocess.run(["sh", "-c", script], env=clean, capture_output=True, text=True, check=True)
    assert read.stdout == nasty
    text = file.read_text()
    assert "CONTAINER_ID='4711'" in text
    assert "CONTAINER_API_KEY='box-key-0123456789'" in text
    assert "UNRELATED" not in text
    assert "HOST_KEY" not in text


def test_run_by_hand_later_it_keeps_what_the_market_gave(box: Box, onstart: str) -> None:
    box.start(onstart)
    before = box.text("run/box.env")
    by_hand = {k: v for k, v in box.env.items() if not k.startswith(("CONTAINER", "SELFHOST"))}
    box.env = by_hand
    box.start(onstart)
    assert box.text("run/box.env") == before


def test_the_bootstrap_host_key_is_installed_and_sshd_told(
    box: Box, onstart: str, keys: tuple[str, str, str], sshd: subprocess.Popen[bytes]
) -> None:
    box.start(onstart)
    key = box.root / "etc/ssh/ssh_host_ed25519_key"
    assert key.read_text() == keys[0]
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.with_suffix(".pub").read_text().strip() == keys[1]
    eventually((box.path / "hups").exists)
    assert sshd.poll() is None


def test_an_sshd_that_comes_up_a_little_later_is_told_too(box: Box, onstart: str) -> None:
    box.start(onstart)
    told = box.path / "told"
    process = subprocess.Popen(
        ["sh", "-c", f"trap ': >{told}' HUP; mkdir {box.root}/run; echo $$ >{box.root}/run/sshd.pid;"
         f" while [ ! -e {told} ]; do sleep 0.05; done"],
        env=box.env,
    )  # fmt: skip
    assert process.wait(15) == 0


def test_a_restart_does_not_bring_the_bootstrap_host_key_back(
    box: Box, onstart: str, sshd: subprocess.Popen[bytes]
) -> None:
    box.start(onstart)
    eventually((box.path / "hups").exists)
    key = box.root / "etc/ssh/ssh_host_ed25519_key"
    key.write_text("the key that came after\n")
    box.kill_all()
    (box.path / "hups").unlink()
    restarted = subprocess.Popen(["sh", "-c", "while :; do sleep 1; done"])
    try:
        (box.root / "run/sshd.pid").write_text(str(restarted.pid))
        box.start(onstart)
        eventually(lambda: watchdogs(box))
        assert key.read_text() == "the key that came after\n"
        assert restarted.poll() is None
    finally:
        restarted.kill()
        restarted.wait()


def test_a_sandbox_never_touches_an_sshd_of_the_machine(box: Box, onstart: str) -> None:
    decoy = subprocess.Popen(["bash", "-c", f"exec -a 'sshd: {box.path} [listener] 0 of 10-100 startups' sleep 60"])
    try:
        box.start(onstart)
        eventually(lambda: "sshd.pid" in box.text("log/onstart.log"))
        assert decoy.poll() is None
    finally:
        decoy.kill()
        decoy.wait()


def test_the_login_key_is_added_once_and_keeps_what_was_there(
    box: Box, onstart: str, keys: tuple[str, str, str]
) -> None:
    file = box.home / ".ssh/authorized_keys"
    file.parent.mkdir()
    file.write_text("ssh-ed25519 AAAA without-a-newline")
    file.chmod(0o644)
    box.start(onstart)
    box.start(onstart)
    assert [line for line in file.read_text().splitlines() if line] == [
        "ssh-ed25519 AAAA without-a-newline",
        keys[2],
    ]
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_uid == os.getuid()
    assert (box.home / ".no_auto_tmux").exists()


def test_a_second_start_leaves_the_living_watchdog_alone(box: Box, onstart: str) -> None:
    box.start(onstart)
    pid = eventually(lambda: box.text("run/watchdog.pid"))
    started = eventually(lambda: box.text("run/started"))
    box.start(onstart)
    eventually(lambda: watchdogs(box) == [int(pid)])
    assert box.text("run/watchdog.pid") == pid
    assert box.text("run/started") == started


def test_a_dead_watchdog_is_replaced_even_when_its_pid_is_somebody_elses_now(box: Box, onstart: str) -> None:
    box.start(onstart)
    old = int(eventually(lambda: box.text("run/watchdog.pid")))
    eventually(lambda: box.text("run/armed"))
    started = box.text("run/started")
    os.kill(old, signal.SIGKILL)
    (box.run / "watchdog.pid").write_text(str(os.getpid()))
    box.start(onstart)
    new = int(eventually(lambda: box.text("run/watchdog.pid").replace(str(os.getpid()), "")))
    assert new != old
    assert box.text("run/started") == started


def test_the_download_begins_and_a_missing_curl_is_no_obstacle(box: Box, onstart: str) -> None:
    files = Files({"/m/tiny.gguf": b"x" * 100_000})
    try:
        box.start(onstart, SELFHOST_FETCH_URL=f"{files.url}/m/tiny.gguf?download=true")
        part = box.dir / "downloads/tiny.gguf.part"
        eventually(lambda: part.exists() and part.stat().st_size == 100_000)
        (box.tools / "curl").unlink()
        part.unlink()
        box.start(onstart, SELFHOST_FETCH_URL=f"{files.url}/m/tiny.gguf?download=true")
        assert not part.exists()
    finally:
        files.close()


def test_the_installed_parts_come_back_after_a_restart(box: Box, onstart: str) -> None:
    (box.dir / "bin").mkdir(parents=True)
    (box.dir / "steps").mkdir()
    (box.dir / "bin/start.sh").write_text("echo started >log/parts\n")
    box.start(onstart)
    assert not (box.dir / "log/parts").exists()
    (box.dir / "steps/start").touch()
    box.start(onstart)
    eventually(lambda: box.text("log/parts") == "started")


def test_the_watchdog_arms_itself_with_the_boxs_own_key(box: Box, onstart: str, market: Market) -> None:
    box.start(onstart)
    assert eventually(lambda: box.text("run/armed")) == "ok"
    assert market.calls == [("PUT", "/api/v0/instances/4711/", '{"state":"running"}')]
    assert market.auth == {"Bearer box-key-0123456789"}
