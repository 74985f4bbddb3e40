"""The keeper's links on a real box: what they notice, and how fast they are back."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from selfhost_cli.keeper import links
from selfhost_cli.keeper.links import LinkState
from selfhost_cli.model import Endpoint, Rental
from selfhost_cli.remote.ssh import make_key
from tests import netns
from tests.integration.conftest import Box, Watch, Watched
from tests.relay import Relay
from tests.waiting import until

pytestmark = pytest.mark.box

NOBODY = Endpoint("127.0.0.1", 9)  # the discard port: nothing listens there


def test_a_link_comes_up_and_renews_the_lease(watch: Watch, box: Box) -> None:
    lease = box.home / ".selfhost" / "run" / "lease"
    lease.unlink(missing_ok=True)
    watched = watch()
    watched.when(LinkState.UP)
    assert watched.link.port
    assert lease.exists()
    before = lease.stat().st_mtime_ns
    until(lambda: lease.stat().st_mtime_ns > before)


def test_with_the_lease_comes_what_the_watchdog_measured(watch: Watch, box: Box) -> None:
    (box.home / ".selfhost" / "run" / "watch").write_text("1/2/1/2 3600 4 120 0.4500\n")
    link = watch().link
    until(lambda: link.state is LinkState.UP)
    assert link.heard
    assert (link.heard.up_s, link.heard.idle_s, link.heard.dollars) == (3600, 120, 0.45)


def test_the_lease_is_renewed_while_there_is_no_proxy_to_forward_to(watch: Watch, box: Box) -> None:
    lease = box.home / ".selfhost" / "run" / "lease"
    lease.unlink(missing_ok=True)
    link = watch(proxy_port=None).link
    until(lambda: link.reason == "it is being installed")
    assert link.state is LinkState.WAITING
    assert lease.exists()
    assert link.port is None
    assert link.down_since is None


def test_a_lease_that_cannot_be_renewed_is_told_and_requests_still_pass(watch: Watch, box: Box) -> None:
    run = box.home / ".selfhost" / "run"
    watched = watch()
    watched.when(LinkState.UP)
    run.rename(run.with_name("away"))
    try:
        at = watched.when(LinkState.DEGRADED)
        assert "lease" in watched.link.reason
        assert watched.link.port
        assert watched.link.down_since is None
    finally:
        run.with_name("away").rename(run)
    watched.when(LinkState.UP, since=at)


def test_a_box_whose_disk_is_full_carries_requests_and_says_what_its_lease_lacks(
    watch: Watch, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "RENEW_EVERY_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        watched = watch(proxy_port=server.getsockname()[1])
        watched.when(LinkState.UP)
        with small_disk(box, "nr_inodes=1"):
            at = watched.when(LinkState.DEGRADED)
            assert re.fullmatch("the box cannot renew its lease: .*run/lease.*No space left on.*", watched.link.reason)
            assert passes(watched, server)
        at = watched.when(LinkState.UP, since=at)
        with small_disk(box, "size=4k", "touch lease; head -c 9999 /dev/zero >full; true"):  # no byte, but a lease
            began = time.monotonic()
            until(lambda: time.monotonic() - began > 1)
            assert passes(watched, server)
        assert watched.link.state is LinkState.UP
        assert watched.changes[-1][0] == at


@contextmanager
def small_disk(box: Box, size: str, first: str = "true") -> Iterator[None]:
    """The box's run directory is on a disk of its own meanwhile, which a script may have filled before."""
    run, theirs = box.home / ".selfhost" / "run", ["--target", str(box.sshd), "--mount"]
    if os.getuid() or Path(f"/proc/{box.sshd}/ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink():
        pytest.skip("mounts need root (a directory that is away stands in for them, see the test before)")
    made = run.with_name("small")
    made.mkdir(exist_ok=True)
    netns.run([*theirs, "mount", "-t", "tmpfs", "-o", size, "none", str(made)])
    netns.run([*theirs, "sh", "-c", f"cd '{made}' && {first}"])
    netns.run([*theirs, "mount", "--move", str(made), str(run)])
    try:
        yield
    finally:
        netns.run([*theirs, "umount", str(run)])


def heard_after(watched: Watched, moment: float) -> bool:
    return until(lambda: watched.link.last is not None and watched.link.last.at > moment)


def passes(watched: Watched, server: socket.socket) -> bool:
    assert watched.link.port
    with socket.create_connection(("127.0.0.1", watched.link.port), timeout=20) as client, server.accept()[0] as peer:
        client.sendall(b"hello")
        return peer.recv(5) == b"hello"


@pytest.mark.parametrize("hours", [5, -5])
def test_a_clock_that_is_set_is_no_loss_and_keeps_no_renewal(
    watch: Watch, box: Box, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """Deadlines go by a clock that nobody sets; when something was heard is told by the one that people read."""
    monkeypatch.setattr(links, "RENEW_EVERY_S", 0.1)
    (box.home / ".selfhost" / "run" / "watch").write_text("1/2/1/2 3600 4 120 0.4500\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        watched = watch(proxy_port=server.getsockname()[1])
        watched.when(LinkState.UP)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
        for _ in range(3):
            assert heard_after(watched, time.time())
            assert passes(watched, server)
    assert [state for _, state, _ in watched.changes] == [LinkState.UP]
    assert watched.link.down_since is None


@pytest.mark.long
def test_a_frozen_peer_is_noticed_though_the_clock_stands(
    watch: Watch, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does for who waits by it, when it was set back."""
    watched = watch()
    watched.when(LinkState.UP)
    stands = time.time()
    monkeypatch.setattr(time, "time", lambda: stands)
    with box.frozen(box.sshd, *box.sessions()):
        frozen = time.monotonic()
        assert watched.when(LinkState.RECONNECTING, since=frozen) - frozen <= 10
        thawed = time.monotonic()
    assert watched.when(LinkState.UP, since=thawed) - thawed <= 3


@pytest.mark.long
def test_a_box_whose_disk_hangs_keeps_its_tunnel(watch: Watch, box: Box) -> None:
    """Its sshd answers, the renewal does not end: requests that are under way must not be cut for that."""
    watched = watch()
    watched.when(LinkState.UP)
    port, hangs = watched.link.port, box.home / ".selfhost" / "run" / "watch"
    hangs.unlink(missing_ok=True)
    os.mkfifo(hangs)
    try:
        at = watched.when(LinkState.DEGRADED)
        assert watched.link.reason.startswith("the box is slow")
    finally:
        hangs.unlink()
    watched.when(LinkState.UP, since=at)
    assert watched.link.port == port


def test_a_killed_session_is_noticed_at_once_and_replaced(watch: Watch, box: Box) -> None:
    watched = watch()
    watched.when(LinkState.UP)
    killed = time.monotonic()
    box.signal_sessions(signal.SIGKILL)
    noticed = watched.when(LinkState.RECONNECTING, since=killed)
    assert watched.when(LinkState.UP, since=noticed) - killed < 3


def test_a_frozen_peer_is_noticed_within_ten_seconds_and_used_again_within_three(watch: Watch, box: Box) -> None:
    watched = watch()
    watched.when(LinkState.UP)
    with box.frozen(box.sshd, *box.sessions()):
        frozen = time.monotonic()
        assert watched.when(LinkState.RECONNECTING, since=frozen) - frozen <= 10
        assert watched.link.port is None
        until(lambda: time.monotonic() - frozen > 14)  # older knocks have begun to wait for its sshd
        assert watched.link.reason
        thawed = time.monotonic()
    assert watched.when(LinkState.UP, since=thawed) - thawed <= 3


@pytest.mark.long
def test_a_frozen_session_alone_is_replaced_by_another(watch: Watch, box: Box) -> None:
    watched = watch()
    watched.when(LinkState.UP)
    with box.frozen(*box.sessions()):
        frozen = time.monotonic()
        noticed = watched.when(LinkState.RECONNECTING, since=frozen)
        assert noticed - frozen <= 10
        assert watched.when(LinkState.UP, since=noticed) - noticed <= 3


def test_a_wire_that_swallows_everything_is_noticed_even_with_an_upload_under_way(watch: Watch, relay: Relay) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        watched = watch(relay.endpoint, proxy_port=server.getsockname()[1])
        watched.when(LinkState.UP)
        port = watched.link.port
        assert port
        client = socket.create_connection(("127.0.0.1", port), timeout=60)
        peer, _ = server.accept()
        with client, peer, relay.swallowing():
            sender = threading.Thread(target=send_until_cut, args=(client,))
            sender.start()
            swallowed = time.monotonic()
            assert watched.when(LinkState.RECONNECTING, since=swallowed) - swallowed <= 10
            sender.join(20)
            assert not sender.is_alive()
            passes = time.monotonic()
    assert watched.when(LinkState.UP, since=passes) - passes <= 3


def send_until_cut(client: socket.socket) -> None:
    """Far more than fits between here and a peer that takes nothing."""
    try:
        for _ in range(64):
            client.sendall(bytes(2**20))
    except OSError:
        pass


@pytest.mark.long
def test_a_half_open_connection_is_left_for_a_new_one(watch: Watch, relay: Relay, box: Box) -> None:
    """The box has rebooted, or a router forgot us: the old connection stays silent, a new one works."""
    watched = watch(relay.endpoint, endpoints=lambda rental: (box.endpoint,))
    watched.when(LinkState.UP)
    with relay.swallowing():
        swallowed = time.monotonic()
        noticed = watched.when(LinkState.RECONNECTING, since=swallowed)
        assert noticed - swallowed <= 10
        watched.when(LinkState.UP, since=noticed)  # the market's other address


def test_a_box_that_moved_is_found_through_the_market(watch: Watch, box: Box) -> None:
    watched = watch(NOBODY, endpoints=lambda rental: (box.endpoint,))
    watched.when(LinkState.UP)


def test_a_port_that_moves_while_it_is_up_is_found_through_the_market(watch: Watch, relay: Relay, box: Box) -> None:
    watched = watch(relay.endpoint, endpoints=lambda rental: (box.endpoint,))
    watched.when(LinkState.UP)
    moved = time.monotonic()
    relay.close()
    watched.when(LinkState.UP, since=watched.when(LinkState.RECONNECTING, since=moved))


def test_the_relay_of_the_market_is_used_when_the_direct_way_is_shut_and_remembered(
    watch: Watch, relay: Relay, box: Box
) -> None:
    asked: list[Rental] = []

    def endpoints(rental: Rental) -> Sequence[Endpoint]:
        asked.append(rental)
        return (NOBODY, relay.endpoint)

    watched = watch(None, endpoints=endpoints)
    watched.when(LinkState.UP)
    cut = time.monotonic()
    relay.forget()
    back = watched.when(LinkState.UP, since=watched.when(LinkState.RECONNECTING, since=cut))
    assert back - cut < 3
    assert len(asked) == 1
    assert watched.link._candidates == (relay.endpoint, NOBODY)


@pytest.mark.long
def test_a_market_that_does_not_answer_does_not_keep_us_from_knocking(watch: Watch, relay: Relay, box: Box) -> None:
    answer = threading.Event()

    def endpoints(rental: Rental) -> Sequence[Endpoint]:
        answer.wait(60)
        return ()

    relay.target, right = NOBODY.port, relay.target
    watched = watch(relay.endpoint, endpoints=endpoints)
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 5)  # it was asked meanwhile
    relay.target = right
    there = time.monotonic()
    assert watched.when(LinkState.UP, since=there) - there <= 3
    answer.set()


def test_a_box_that_the_market_does_not_know_is_gone(watch: Watch) -> None:
    watched = watch(NOBODY, endpoints=lambda rental: None)
    watched.when(LinkState.GONE)
    assert watched.link.down_since is not None


def test_a_box_without_an_address_is_waited_for(watch: Watch) -> None:
    watched = watch(None)
    watched.when(LinkState.WAITING)
    assert watched.link.reason == "the market shows no address of it yet"
    assert watched.link.down_since is not None


def test_a_box_that_is_away_says_why(watch: Watch) -> None:
    link = watch(NOBODY).link
    until(lambda: "refused" in link.reason)
    assert link.state is LinkState.CONNECTING
    assert link.down_since is not None


def test_names_that_are_not_found_say_so_and_a_lookup_that_hangs_keeps_nobody_else_waiting(
    watch: Watch, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver, real = threading.Event(), socket.getaddrinfo

    def look_up(host: str, *rest: object) -> object:
        if not host.endswith(".invalid"):
            return real(host, *rest)  # type: ignore[arg-type]
        resolver.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    box_name, not_a_name = Endpoint("box.invalid", 22), Endpoint("box..invalid", 22)
    watched = watch(box_name, endpoints=lambda rental: (box_name, box.endpoint))
    watched.when(LinkState.UP)
    resolver.set()
    link = watch(box_name).link
    until(lambda: link.reason == "box.invalid:22 cannot be reached: [Errno -3] Temporary failure in name resolution")
    other = watch(not_a_name).link
    until(lambda: other.reason.startswith("box..invalid:22 cannot be reached"))


def test_another_key_is_refused_and_named_as_that(watch: Watch) -> None:
    _, other = make_key("other")
    link = watch(host_key=other).link
    until(lambda: "another host key" in link.reason)
    assert link.port is None
    assert link.reason.count("SHA256:") == 2


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_hundred_reconnects_leave_no_thread_and_no_descriptor(watch: Watch, relay: Relay) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        watched = watch(relay.endpoint, proxy_port=server.getsockname()[1])
        at = watched.when(LinkState.UP)
        threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            port = watched.link.port
            assert port
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client, server.accept()[0]:
                relay.forget()
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
            at = watched.when(LinkState.UP, since=watched.when(LinkState.RECONNECTING, since=at))
        until(lambda: threading.active_count() <= threads, 30)
        until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, 30)
