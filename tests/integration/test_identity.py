"""A host key that changes before the box is ready, shown by a real sshd."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import paramiko
import pytest

from selfhost_cli import config
from selfhost_cli.attach import Front
from selfhost_cli.errors import BoxFailed
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle import World
from selfhost_cli.lifecycle.steps import advance
from selfhost_cli.model import BoxState, Endpoint, Instance, Rental, State
from selfhost_cli.remote import OtherKey
from selfhost_cli.remote.ssh import connect, make_key, public_half
from tests.fakes.box import FakeKeeper
from tests.fakes.clock import FakeClock
from tests.fakes.market import FakeMarket
from tests.fakes.rental import make_rental
from tests.integration.conftest import Box
from tests.waiting import until

pytestmark = pytest.mark.box


@pytest.fixture
def changed(box: Box) -> Iterator[str]:
    """The fingerprint of another host key, which this sshd shows until the test is over."""
    path = box.root / "etc" / "ssh" / "ssh_host_ed25519_key"
    own = path.read_text()
    private, public = make_key("other")
    show(box, path, private)
    until(lambda: fingerprint(public) in shown(box))
    yield fingerprint(public)
    show(box, path, own)
    until(box.lets_us_in)


def show(box: Box, path: Path, private: str) -> None:
    draft = path.with_suffix(".draft")
    draft.touch(mode=0o600)
    draft.write_text(private)
    draft.replace(path)
    os.kill(box.sshd, signal.SIGHUP)


def shown(box: Box) -> str:
    command = ["ssh-keyscan", "-t", "ed25519", "-p", str(box.endpoint.port), box.endpoint.host]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return fingerprint(found.partition(" ")[2]) if "ssh-ed25519" in found else ""


def fingerprint(public: str) -> str:
    done = subprocess.run(["ssh-keygen", "-lf", "-"], input=public, capture_output=True, text=True, check=True)
    return done.stdout.split()[1]


def installing(box: Box, folder: Path) -> tuple[World, Rental]:
    """A process that goes on with this box, whose key it has seen; what it would be ended by is a fake."""
    settings = config.load("default", flags={"market_url": "http://127.0.0.1:9"}, env={"SELFHOST_HOME": str(folder)})
    settings.paths.make()
    settings.paths.login_key.touch(mode=0o600)
    settings.paths.login_key.write_text(box.login_key.read_text())
    clock, ledger = FakeClock(), Ledger(settings.paths.ledger)
    market = FakeMarket(clock)
    market.boxes[5001] = Instance(
        5001, "selfhost-test-1", BoxState.RUNNING, "running", "", 1, "RTX 4090", 0.31, clock.time(), box.endpoint, None
    )
    rental = make_rental(instance_id=5001, host_key=box.host_key, bootstrap=False)
    ledger.intend(rental)
    rental = ledger.advance(rental, State.INSTALLING, endpoint=box.endpoint)
    world = World(
        settings=settings, provider=market, ledger=ledger, report=lambda event: None, clock=clock,
        keeper=FakeKeeper(ledger, Front("http://127.0.0.1:9", 9, "")), connect=connect, make_key=make_key,
        public_half=public_half, find_claude=lambda: Path("/bin/claude"), find_model=lambda: None,
    )  # fmt: skip
    return world, rental


def test_a_key_that_changed_while_it_was_installed_is_refused_at_once_with_both_fingerprints(
    box: Box, changed: str, tmp_path: Path
) -> None:
    world, rental = installing(box, tmp_path)
    began = time.monotonic()
    try:
        with pytest.raises(BoxFailed, match=r"the host key of box 5001 has changed: ") as refused:
            advance(world, rental)
    finally:
        world.ledger.close()
    assert re.findall(r"SHA256:\S+(?=[,;])", refused.value.message) == [changed, fingerprint(box.host_key)]
    assert "not logged in to" in refused.value.message
    assert world.clock.sleeps == []  # type: ignore[attr-defined]
    assert time.monotonic() - began < 10


def test_the_same_before_the_first_contact_is_not_ready(box: Box, changed: str, tmp_path: Path) -> None:
    world, rental = installing(box, tmp_path)
    rental = world.ledger.advance(rental, State.BOOTING, endpoint=None, bootstrap=True)
    hasty = replace(world, settings=replace(world.settings, ssh_timeout=0.5))
    try:
        with pytest.raises(BoxFailed, match=r"'ssh' was not over within 0.5 minutes; .*shows another host key"):
            advance(hasty, rental)
    finally:
        world.ledger.close()
    assert len(world.clock.sleeps) > 3  # type: ignore[attr-defined]


class Guest(paramiko.ServerInterface):
    """Notes whoever wants to log in, and with which key."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get_allowed_auths(self, username: str) -> str:
        self.asked.append(username)
        return "publickey"

    def check_auth_none(self, username: str) -> int:
        self.asked.append(username)
        return paramiko.AUTH_FAILED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.asked.append(str(key.fingerprint))
        return paramiko.AUTH_SUCCESSFUL


@pytest.mark.parametrize("known", [True, False])
def test_who_shows_another_key_never_learns_our_name_nor_our_login_key(tmp_path: Path, known: bool) -> None:
    private, public = make_key("host")
    login = tmp_path / "login"
    login.write_text(make_key("login")[0])
    guest = Guest()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            transport = paramiko.Transport(connection)
            transport.add_server_key(paramiko.Ed25519Key.from_private_key(io.StringIO(private)))
            transport.start_server(event=threading.Event(), server=guest)
            transport.join(20)

        server = threading.Thread(target=serve)
        server.start()
        where = Endpoint(*listener.getsockname()[:2])
        if known:
            connect(where, public, login).close()
        else:
            with pytest.raises(OtherKey):
                connect(where, make_key("other")[1], login)
        server.join(20)
    assert set(guest.asked) == ({fingerprint(public_half(login))} if known else set())
