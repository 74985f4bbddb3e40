"""The keeper's links between two machines with a cable: what a kernel does when the other one goes without a word."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selfhost_cli.keeper.links import LinkState
from selfhost_cli.model import Endpoint
from selfhost_cli.sandbox import image
from tests import netns
from tests.integration.conftest import Box, Keep, Watch, Watched
from tests.netns import Machine
from tests.waiting import until

pytestmark = [pytest.mark.box, pytest.mark.long, pytest.mark.allow_hosts(["127.0.0.1", netns.BOX])]

SSHD = Endpoint(netns.BOX, 22)


@pytest.fixture
def cable() -> Iterator[tuple[Machine, Machine]]:
    if reason := netns.why_not():
        pytest.skip(reason)
    with netns.machines() as machines:
        yield machines


@pytest.fixture
def laptop(cable: tuple[Machine, Machine]) -> Machine:
    return cable[0]


@pytest.fixture
def far(cable: tuple[Machine, Machine], box: Box, tmp_path: Path) -> Iterator[Machine]:
    """The box's machine, where the box's sshd listens too."""
    machine = cable[1]
    config = tmp_path / "sshd_config"
    text = (box.root / "etc" / "ssh" / "sshd_config").read_text()
    text = re.sub("(?m)^ListenAddress .*$", f"ListenAddress {SSHD.host}", text)
    text = re.sub("(?m)^Port .*$", f"Port {SSHD.port}", text)
    config.write_text(re.sub("(?m)^PidFile .*$", "PidFile none", text))
    there = [shutil.which("nsenter") or "", "--target", str(box.sshd), "--mount", f"--net={machine.net}"]
    with (tmp_path / "sshd.log").open("wb") as log:
        sshd = subprocess.Popen(
            [*there, image.sshd_path(), "-D", "-e", "-f", str(config)], env=image.environment(box.root), stderr=log
        )
    yield machine
    for pid in (*sessions(sshd), sshd.pid):
        subprocess.run(["kill", "-KILL", str(pid)], check=False, stderr=subprocess.DEVNULL)
    sshd.wait()


def sessions(sshd: subprocess.Popen[bytes]) -> list[str]:
    return Path(f"/proc/{sshd.pid}/task/{sshd.pid}/children").read_text().split()


@pytest.fixture
def up(watch: Watch, laptop: Machine, far: Machine) -> Iterator[Watched]:
    """A link of the laptop, to a port on the box that says what it hears."""
    with far.inside():
        server = socket.create_server(("127.0.0.1", 0))
    with server:
        with laptop.inside():
            watched = watch(SSHD, proxy_port=server.getsockname()[1])
        watched.when(LinkState.UP)
        yield watched


Established = Callable[[], set[str]]


@pytest.fixture
def established(laptop: Machine) -> Established:
    """The local ends of the laptop's connections to the box that its kernel believes in."""

    def look() -> set[str]:
        rows = [row.split() for row in Path(f"/proc/{laptop.pid}/net/tcp").read_text().splitlines()[1:]]
        return {row[1] for row in rows if row[2].endswith(f":{SSHD.port:04X}") and row[3] == "01"}

    return look


def test_a_connection_that_the_network_forgot_is_left_for_a_new_one(
    up: Watched, far: Machine, established: Established
) -> None:
    """Half open: both kernels believe in it, nothing comes back over it, and nobody is told."""
    (old,) = established()
    forgotten = time.monotonic()
    far.ip("rule", "add", "ipproto", "tcp", "dport", str(int(old.rpartition(":")[2], 16)), "blackhole")
    until(lambda: time.monotonic() - forgotten > 2)
    assert established() == {old}
    noticed = up.when(LinkState.RECONNECTING, since=forgotten)
    assert noticed - forgotten <= 10
    assert up.when(LinkState.UP, since=noticed) - noticed <= 3
    assert old not in established()


def test_a_laptop_that_gets_another_address_is_back_at_once(up: Watched, laptop: Machine, far: Machine) -> None:
    port = up.link.port
    assert port
    with laptop.inside(), socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        moved = time.monotonic()
        laptop.ip("address", "delete", f"{netns.LAPTOP}/24", "dev", "wire")
        laptop.ip("address", "add", f"{netns.ELSEWHERE}/24", "dev", "wire")
        noticed = up.when(LinkState.RECONNECTING, since=moved)
        assert noticed - moved <= 10
        with pytest.raises(ConnectionResetError):
            client.recv(1)  # what was under way is told so, instead of waiting for ever
    assert up.when(LinkState.UP, since=noticed) - noticed <= 3


def test_a_laptop_that_wakes_up_in_another_network_is_back_at_once(keep: Keep, laptop: Machine, far: Machine) -> None:
    with laptop.inside():
        keeper = keep(SSHD)
    fell_asleep = time.monotonic()
    with keeper.asleep():
        laptop.ip("address", "delete", f"{netns.LAPTOP}/24", "dev", "wire")
        laptop.ip("address", "add", f"{netns.ELSEWHERE}/24", "dev", "wire")
        until(lambda: time.monotonic() - fell_asleep > 12)
    awake = time.monotonic()
    assert keeper.heard(state=LinkState.UP, since=awake)["at"] - awake <= 4.5
    assert [one["state"] for one in keeper.said(since=awake)] == [LinkState.RECONNECTING, LinkState.UP]


def test_a_cable_that_is_pulled_is_told_and_one_that_is_plugged_in_again_is_used(up: Watched, far: Machine) -> None:
    pulled = time.monotonic()
    far.ip("link", "set", "wire", "down")
    assert up.when(LinkState.RECONNECTING, since=pulled) - pulled <= 10
    until(lambda: time.monotonic() - pulled > 14)  # knocks were sent, and wait for an answer
    far.ip("link", "set", "wire", "up")
    plugged = time.monotonic()
    assert up.when(LinkState.UP, since=plugged) - plugged <= 3


def test_a_short_hole_in_the_network_is_no_loss(up: Watched, far: Machine) -> None:
    port, begun = up.link.port, time.monotonic()
    far.ip("link", "set", "wire", "down")
    until(lambda: time.monotonic() - begun > 2)
    far.ip("link", "set", "wire", "up")
    until(lambda: time.monotonic() - begun > 9)  # a renewal that fell into the hole would have failed
    assert up.link.port == port
    assert [state for _, state, _ in up.changes] == [LinkState.UP]
