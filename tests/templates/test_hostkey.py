"""The shipped hostkey.sh: killed anywhere and run again, and what a restart of the container does after it."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfhost_cli import payload
from tests.templates.box import Box, eventually, key_pair


@pytest.fixture(scope="module")
def keys() -> tuple[str, str, str]:
    private, public = key_pair()
    return private, public, key_pair()[1]


@pytest.fixture
def started(box: Box, keys: tuple[str, str, str]) -> Iterator[Box]:
    """A box after onstart, with the copy of it that the market keeps there, and something that looks like its sshd."""
    box.tool("ssh-keygen", f'#!/bin/sh\nexec {shutil.which("ssh-keygen")} "$@"\n')
    onstart = payload.onstart(*keys)
    (box.home / "onstart.sh").write_text(onstart)
    (box.home / "onstart.sh").chmod(0o700)
    box.start(onstart)
    (box.dir / "bin/hostkey.sh").write_bytes(payload.script("hostkey.sh"))
    box.tool("sshd", "#!/bin/sh\ntrap 'echo hup >>hups' HUP; : >up; while :; do sleep 0.05; done\n")
    sshd = subprocess.Popen([box.tools / "sshd"], cwd=box.path, env=box.env)
    eventually((box.path / "up").exists)
    (box.root / "run").mkdir(exist_ok=True)
    (box.root / "run/sshd.pid").write_text(f"{sshd.pid}\n")
    yield box
    sshd.kill()
    sshd.wait()


def ask(box: Box, *words: str) -> subprocess.CompletedProcess[str]:
    return box.sh(str(box.dir / "bin/hostkey.sh"), *words)


def make(box: Box, old: str) -> str:
    done = ask(box, "make", old)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.strip()


def sshd_reads(box: Box) -> str:
    """Our public half of the private key that is in sshd's place."""
    command = ["ssh-keygen", "-y", "-f", box.root / "etc/ssh/ssh_host_ed25519_key"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return " ".join(done.stdout.split()[:2])


def files(box: Box) -> set[str]:
    return {path.name for path in (box.root / "etc/ssh").iterdir()}


def hups(box: Box) -> int:
    path = box.path / "hups"
    return len(path.read_text().split()) if path.exists() else 0


def test_the_new_key_waits_beside_the_old_one_until_it_is_switched_to(started: Box, keys: tuple[str, str, str]) -> None:
    old = keys[1]
    new = make(started, old)
    assert new != old
    assert (make(started, old), sshd_reads(started), hups(started)) == (new, old, 0)
    done = ask(started, "switch", new)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sshd_reads(started) == new == make(started, old)
    eventually(lambda: hups(started) == 1)
    key = started.root / "etc/ssh/ssh_host_ed25519_key"
    assert files(started) == {key.name, f"{key.name}.pub"}
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert (key.with_suffix(".pub")).read_text() == f"{new} selfhost\n"


def test_switching_again_only_tells_sshd_again(started: Box, keys: tuple[str, str, str]) -> None:
    new = make(started, keys[1])
    for times in (1, 2):
        assert ask(started, "switch", new).returncode == 0
        eventually(lambda times=times: hups(started) == times)  # type: ignore[misc]
    assert sshd_reads(started) == new


def test_the_old_private_half_is_nowhere_on_the_box(started: Box, keys: tuple[str, str, str]) -> None:
    secret = keys[0].splitlines()[2]

    def holding() -> list[Path]:
        return [path for path in started.path.rglob("*") if path.is_file() and secret in path.read_text("latin-1")]

    (started.path / "onstart.sh").unlink()  # the test's own
    assert len(holding()) == 2
    ask(started, "switch", make(started, keys[1]))
    assert holding() == []
    assert stat.S_IMODE((started.home / "onstart.sh").stat().st_mode) == 0o700


def test_no_restart_brings_the_old_key_back(started: Box, keys: tuple[str, str, str]) -> None:
    new = make(started, keys[1])
    ask(started, "switch", new)
    for onstart in (payload.onstart(*keys), (started.home / "onstart.sh").read_text()):
        started.kill_all()
        (started.run / "armed").unlink(missing_ok=True)
        started.start(onstart)
        assert sshd_reads(started) == new
        eventually(lambda: started.text("run/armed"))  # the watchdog came back with it


def test_another_key_than_the_one_that_was_made_is_not_switched_to(started: Box, keys: tuple[str, str, str]) -> None:
    make(started, keys[1])
    done = ask(started, "switch", key_pair()[1])
    assert done.returncode == 1
    assert "another one" in done.stderr
    assert (sshd_reads(started), hups(started)) == (keys[1], 0)


@pytest.mark.parametrize(
    ("verb", "number"), [*(("make", n) for n in range(1, 9)), *(("switch", n) for n in range(1, 14))]
)
def test_killed_anywhere_it_is_run_again_and_the_ledger_still_knows_the_box(
    started: Box, keys: tuple[str, str, str], verb: str, number: int
) -> None:
    """Killed after the work of each program that it starts, one after the other."""
    old = keys[1]
    promised = make(started, old) if verb == "switch" else ""
    plain = {name: os.path.realpath(started.tools / name) for name in ("mv", "rm", "cp", "chmod", "awk", "grep", "cut")}
    plain["ssh-keygen"] = str(shutil.which("ssh-keygen"))
    count, script = started.path / "count", started.path / "script"
    plain["flock"] = str(shutil.which("flock"))
    started.tool("flock", f'#!/bin/sh\necho $PPID >{script}\nexec {plain["flock"]} "$@"\n')
    started.tool("wc", f'#!/bin/sh\nexec {shutil.which("wc")} "$@"\n')
    for name in plain.keys() - {"flock"}:
        turn = f'printf . >>{count}; [ "$(wc -c <{count})" -ge {number} ] && kill -9 $(cat {script})\n'
        started.tool(name, f'#!/bin/sh\n{plain[name]} "$@"\ncode=$?\n{turn}exit $code\n')
    code = ask(started, verb, promised or old).returncode
    # How many programs it starts at its end depends on how soon sshd is found.
    assert code == -signal.SIGKILL or (code == 0 and number > 8)
    for name, program in plain.items():
        started.tool(name, f'#!/bin/sh\nexec {program} "$@"\n')
    assert sshd_reads(started) in (old, promised)
    new = make(started, old)
    assert new == (promised or new) != old
    assert ask(started, "switch", new).returncode == 0
    assert sshd_reads(started) == new


def test_a_process_that_got_the_old_number_of_sshd_is_left_alone(started: Box, keys: tuple[str, str, str]) -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        (started.root / "run/sshd.pid").write_text(f"{stranger.pid}\n")
        new = make(started, keys[1])
        assert ask(started, "switch", new).returncode != 0
        assert stranger.poll() is None
        assert sshd_reads(started) == new  # the next sshd shows it
    finally:
        stranger.kill()
        stranger.wait()


def test_a_disk_that_takes_nothing_keeps_the_old_key(started: Box, keys: tuple[str, str, str]) -> None:
    started.tool("ssh-keygen", '#!/bin/sh\ncase $* in *" -t "*) echo "No space left on device" >&2; exit 1 ;; esac\n'
                 f'exec {shutil.which("ssh-keygen")} "$@"\n')  # fmt: skip
    done = ask(started, "make", keys[1])
    assert done.returncode == 1
    assert "no host key can be made" in done.stderr
    assert sshd_reads(started) == keys[1]
