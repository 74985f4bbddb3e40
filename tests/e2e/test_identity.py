"""The bootstrap host key on a real box with a real sshd: a real `up` that is killed between any two steps."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Rental, State
from selfhost_cli.remote import ConnectionLost, NotYet, OtherKey
from selfhost_cli.remote.ssh import connect, make_key
from tests.e2e.stage import Stage
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

HELD = """#!/bin/sh
doing="$(tr '\\0' ' ' </proc/$PPID/cmdline): {name} $*"
if [ -e '{box}/hold' ] && echo "$doing" | grep -q "$(cat '{box}/hold')"; then
  echo $$ >'{box}/held.new' && mv '{box}/held.new' '{box}/held'
  while [ -e '{box}/held' ]; do sleep 0.02; done
fi
exec '{program}' "$@"
"""

BEFORE_THE_KEY = r"hostkey.sh make .*: ssh-keygen -q"
BEFORE_IT_IS_TOLD = r"hostkey.sh make .*: ssh-keygen -y .*\.next"
BEFORE_THE_RENAME = r"hostkey.sh switch .*: ssh-keygen .*key$"
BEFORE_SSHD_IS_TOLD = r"hostkey.sh switch .*: awk"


def rental(stage: Stage) -> Rental:
    with closing(Ledger(stage.paths.ledger)) as ledger:
        (live,) = ledger.live()
        return live


def accepts(stage: Stage, keys: Sequence[str]) -> bool:
    """Whether the box lets us in when it may show these host keys; AssertionError when it is not even that far."""
    where = rental(stage).endpoint
    assert where
    try:
        connect(where, keys, stage.paths.login_key).close()
    except OtherKey:
        return False
    return True


class Puppet:
    """The box's tools, which stop where they are told to."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.box = until(lambda: next((stage.paths.state / "market" / "boxes").glob("box-*"), None))
        until((self.box / "box.json").exists)  # the last that is made of it
        for name in ("ssh-keygen", "awk"):
            tool, program = self.box / "bin" / name, str(shutil.which(name))
            tool.unlink()
            tool.write_text(HELD.format(name=name, box=self.box, program=program))
            tool.chmod(0o755)

    def hold(self, where: str) -> None:
        (self.box / "hold").write_text(where)

    def reached(self, up: subprocess.Popen[str]) -> bool:
        assert up.poll() is None, up.communicate()
        return (self.box / "held").exists()

    def go_on(self, *, dead: bool) -> None:
        """Let it do its work after all, or end it there."""
        held, pid = self.box / "held", int((self.box / "held").read_text())
        (self.box / "hold").unlink()
        if dead:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            for process in (parent, pid):
                command = Path(f"/proc/{process}/environ").read_bytes()
                assert str(self.box).encode() in command
                os.kill(process, signal.SIGKILL)
        held.unlink()

    def kill_up(self, where: str, *, dead: bool) -> None:
        """Start an `up`, and end it with SIGKILL where it is."""
        self.hold(where)
        up = self.stage.spawn("up", "--yes", "--detach")
        until(lambda: self.reached(up), 60)
        up.kill()
        up.communicate()
        self.go_on(dead=dead)


def own_key_of(box: Path) -> str:
    command = ["ssh-keygen", "-y", "-f", box / "etc/ssh/ssh_host_ed25519_key"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return " ".join(done.stdout.split()[:2])


@pytest.mark.long
def test_killed_between_any_two_steps_up_goes_on_with_the_same_box_and_ends_with_one_key(
    make_stage: Callable[..., Stage],
) -> None:
    stage = make_stage()
    stage.control("settings", sshd_delay_s=2.0)  # time to get at its tools
    first = stage.spawn("up", "--yes", "--detach")
    puppet = Puppet(stage)
    puppet.hold(BEFORE_THE_KEY)
    until(lambda: puppet.reached(first), 60)
    first.kill()
    first.communicate()
    bootstrap = rental(stage).host_key
    puppet.go_on(dead=True)
    assert (rental(stage).host_keys, accepts(stage, [bootstrap])) == ((bootstrap,), True)

    puppet.kill_up(BEFORE_IT_IS_TOLD, dead=False)  # made, and our side does not know it
    assert (rental(stage).host_keys, accepts(stage, [bootstrap])) == ((bootstrap,), True)
    made = (puppet.box / "etc/ssh/ssh_host_ed25519_key.next").read_bytes()

    puppet.kill_up(BEFORE_THE_RENAME, dead=True)  # known, and sshd has the old one
    _, new = keys = rental(stage).host_keys
    assert accepts(stage, keys)
    assert accepts(stage, [bootstrap])
    assert (puppet.box / "etc/ssh/ssh_host_ed25519_key.next").read_bytes() == made

    puppet.kill_up(BEFORE_SSHD_IS_TOLD, dead=True)  # renamed, and sshd shows the old one
    assert own_key_of(puppet.box) == new
    assert rental(stage).host_keys == keys
    assert accepts(stage, keys)

    puppet.hold(BEFORE_SSHD_IS_TOLD)  # sshd shows the new one, and our side never saw it
    up = stage.spawn("up", "--yes", "--detach")
    until(lambda: puppet.reached(up), 60)
    up.send_signal(signal.SIGSTOP)
    puppet.go_on(dead=False)
    until(lambda: shows(stage, new))
    up.kill()
    up.communicate()
    assert rental(stage).host_keys == keys
    assert accepts(stage, keys)

    up = stage.spawn("up", "--yes", "--detach")  # seen, and noted; the install has hardly begun
    until(lambda: not rental(stage).bootstrap, 60)
    up.kill()
    up.communicate()
    assert rental(stage).host_keys == (new,)

    stage.up()
    now = rental(stage)
    assert (now.state, now.host_keys, now.bootstrap) == (State.READY, (new,), False)
    assert (accepts(stage, [new]), accepts(stage, [bootstrap])) == (True, False)
    assert stage.billed == 1
    assert sum("/asks/" in row["path"] and row["method"] == "PUT" for row in stage.control("requests", "GET")) == 1
    check_guard(stage, puppet.box)
    check_restart(stage, puppet.box, new)
    stage.ask("down")


def shows(stage: Stage, key: str) -> bool:
    try:
        return accepts(stage, [key])
    except (NotYet, ConnectionLost):
        return False  # it is just beginning to listen again


def check_guard(stage: Stage, box: Path) -> None:
    """The watchdog is armed, and the keeper renews the lease."""
    run = box / "root" / ".selfhost" / "run"
    assert (run / "armed").read_text().strip() == "ok"
    renewed = (run / "lease").stat().st_mtime
    until(lambda: (run / "lease").stat().st_mtime > renewed)
    assert stage.ask("status", "--json").json[0]["tunnel"] == "up"


def check_restart(stage: Stage, box: Path, key: str) -> None:
    """The container starts again, and runs onstart again: the old key does not come back, and the tunnel does."""
    supervisor = int((box / "run/sshd.pid").read_text())
    for state in ("stopped", "running"):
        httpx.put(
            f"{stage.market.url}/api/v0/instances/{rental(stage).instance_id}/",
            json={"state": state},
            headers={"Authorization": f"Bearer {stage.market.api_key}"},
            trust_env=False,
            timeout=30,
        ).raise_for_status()
    began = time.time()
    until(lambda: (box / "run/sshd.pid").exists() and int((box / "run/sshd.pid").read_text()) != supervisor, 60)
    lease = box / "root" / ".selfhost" / "run" / "lease"
    until(lambda: lease.stat().st_mtime > began, 60)
    assert own_key_of(box) == key
    until(lambda: shows(stage, key))


@pytest.mark.long
def test_a_key_that_changes_before_the_box_is_ready_ends_it_at_once(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(attempts=1)
    first = stage.spawn("up", "--yes", "--detach")
    until(lambda: has_its_own_key(stage), 60)
    first.kill()
    first.communicate()
    now, box = rental(stage), stage.box()
    assert now.state is State.INSTALLING
    stranger = change_key(box)
    until(lambda: shows(stage, stranger))
    began = time.monotonic()
    failed = stage.up(code=1)
    assert f"the host key of box {now.instance_id} has changed" in failed.err
    assert len(set(re.findall(r"SHA256:[\w+/]+", failed.err))) == 2
    assert stage.billed == 0
    assert time.monotonic() - began < 60, "it was waited for"


def has_its_own_key(stage: Stage) -> bool:
    with closing(Ledger(stage.paths.ledger)) as ledger:
        return any(one.state is State.INSTALLING and not one.bootstrap for one in ledger.live())


def change_key(box: Path) -> str:
    """What somebody would show who got the box's address."""
    private, public = make_key("stranger")
    key = box / "etc/ssh/ssh_host_ed25519_key"
    draft = key.with_suffix(".draft")
    draft.touch(mode=0o600)
    draft.write_text(private)
    draft.replace(key)
    os.kill(int((box / "run/sshd.pid").read_text()), signal.SIGHUP)
    return public
