"""What a box, or whoever answers in its place, can make us wait for, keep or believe: servers that do not behave."""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import paramiko
import pytest

from selfhost_cli import config
from selfhost_cli.cli import ssh as command
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Endpoint
from selfhost_cli.remote import ConnectionLost, NotYet, ssh, tunnel
from selfhost_cli.remote.ssh import SshRemote, connect, make_key
from selfhost_cli.remote.tunnel import Tunnel
from tests.fakes.rental import make_rental
from tests.waiting import until

HOST, HOST_PUBLIC = make_key("host")
Answer = Callable[[paramiko.Channel], object]


@pytest.fixture(scope="module")
def login_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("login") / "key"
    path.write_text(make_key("login")[0])
    return path


@contextmanager
def server(serve: Callable[[socket.socket], object]) -> Iterator[Endpoint]:
    """Serves one connection in a thread, which ends with its peer."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with listener.accept()[0] as peer, suppress(OSError, EOFError, paramiko.SSHException):
            serve(peer)

    thread = threading.Thread(target=accept)
    thread.start()
    yield Endpoint(*listener.getsockname())
    listener.close()
    thread.join(20)
    assert not thread.is_alive()


class Box(paramiko.ServerInterface):
    """Lets everybody in, and answers every command and every stream in the same way."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.streams: set[int] = set()

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_direct_tcpip_request(self, chanid: int, origin: Any, destination: Any) -> int:
        self.streams.add(chanid)
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self.begin(channel, lambda: channel.recv(1))  # until the asker, who was told that it began, says no more
        return True

    def begin(self, channel: paramiko.Channel, wait: Callable[[], object] = lambda: None) -> None:
        threading.Thread(target=self._say, args=(channel, wait), daemon=True).start()

    def _say(self, channel: paramiko.Channel, wait: Callable[[], object]) -> None:
        with suppress(OSError, EOFError, paramiko.SSHException):
            wait()
            self._answer(channel)
            channel.send_exit_status(0)
            channel.close()


@contextmanager
def logged_in(login_key: Path, answer: Answer = lambda channel: None) -> Iterator[tuple[SshRemote, paramiko.Transport]]:
    """Both ends: what we have when we are logged in, and the box's transport."""
    served: list[paramiko.Transport] = []
    box = Box(answer)

    def serve(peer: socket.socket) -> None:
        transport = _server(peer)
        transport.packetizer.REKEY_BYTES = 2**40
        transport.start_server(server=box)
        served.append(transport)
        while transport.is_active():
            channel = transport.accept(0.1)
            if channel and channel.get_id() in box.streams:
                box.begin(channel)

    with server(serve) as endpoint:
        remote = connect(endpoint, HOST_PUBLIC, login_key)
        until(lambda: served)
        yield remote, served[0]
        remote.close()
        served[0].close()


def _server(peer: socket.socket, kind: type[paramiko.Transport] = paramiko.Transport) -> paramiko.Transport:
    transport = kind(peer)
    transport.add_server_key(paramiko.Ed25519Key.from_private_key(io.StringIO(HOST)))
    return transport


def test_a_greeting_that_comes_letter_by_letter_is_given_up(login_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CONNECT_S", 0.5)

    def drip(peer: socket.socket) -> None:
        while True:
            peer.sendall(b"x")
            time.sleep(0.05)

    with server(drip) as endpoint, pytest.raises(NotYet, match=r"the handshake broke off: not over within 0\.5 s"):
        connect(endpoint, HOST_PUBLIC, login_key)


def test_who_goes_silent_while_keys_are_exchanged_is_given_up(login_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """paramiko's own deadline for the handshake ends with the first packet."""
    monkeypatch.setattr(ssh, "CONNECT_S", 0.5)
    over = threading.Event()

    class Mute(paramiko.Transport):
        def _negotiate_keys(self, message: paramiko.Message) -> None:
            over.wait(20)

    def serve(peer: socket.socket) -> None:
        transport = _server(peer, Mute)
        transport.start_server(threading.Event(), Box(lambda channel: None))
        over.wait(20)
        transport.close()

    with server(serve) as endpoint:
        with pytest.raises(NotYet, match=r"the handshake broke off: not over within 0\.5 s"):
            connect(endpoint, HOST_PUBLIC, login_key)
        over.set()


def test_a_packet_of_two_gigabytes_is_not_gathered(login_key: Path) -> None:
    def serve(peer: socket.socket) -> None:
        peer.sendall(b"SSH-2.0-box\r\n" + (2**31 - 4).to_bytes(4) + bytes(60_000))
        while peer.recv(65536):
            pass

    with server(serve) as endpoint, pytest.raises(NotYet, match=r"a packet of \d+ bytes was announced"):
        connect(endpoint, HOST_PUBLIC, login_key)


@pytest.mark.parametrize("stream", ["sendall", "sendall_stderr"])
def test_an_answer_without_end_is_not_gathered(login_key: Path, monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    monkeypatch.setattr(ssh, "LONGEST_ANSWER", 2**20)

    def flood(channel: paramiko.Channel) -> None:
        for _ in range(64):
            getattr(channel, stream)(bytes(2**17))

    with logged_in(login_key, flood) as (remote, _), pytest.raises(ConnectionLost, match="it said more than 1 MB"):
        remote.run("renew the lease", timeout=5)


def drip(channel: paramiko.Channel) -> None:
    for _ in range(40):
        channel.sendall(b"x\n")
        time.sleep(0.05)


def test_an_answer_that_comes_letter_by_letter_is_given_up(login_key: Path) -> None:
    with logged_in(login_key, drip) as (remote, _):
        with pytest.raises(ConnectionLost, match=r"not over within 1\.2 s"):
            remote.run("renew the lease", timeout=0.2)
        assert remote.alive  # requests that are under way must not be cut for that


def test_what_is_read_line_by_line_may_take_its_time(login_key: Path) -> None:
    lines: list[str] = []
    with logged_in(login_key, drip) as (remote, _):
        assert remote.run("install", timeout=0.2, on_line=lines.append).code == 0
    assert len(lines) == 40


def test_a_box_that_sends_more_than_it_may_is_hung_up_on(login_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """paramiko would keep all of it for a stream whose reader is slow."""
    monkeypatch.setattr(ssh, "WINDOW", 2**20)

    def flood(channel: paramiko.Channel) -> None:
        channel.out_window_size = 2**40
        for _ in range(100):
            channel.sendall(bytes(2**17))

    with logged_in(login_key, flood) as (remote, _):
        channel = remote.forward(("127.0.0.1", 80), ("127.0.0.1", 1))
        until(lambda: not remote.alive, 5)
        assert len(channel.in_buffer) <= 2 * 2**20


@pytest.mark.parametrize("ask", [lambda remote: remote.run("true", timeout=0.5), lambda remote: remote.put(b"x", "x")])
def test_a_request_that_begins_just_as_the_connection_ends_is_woken(
    login_key: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[SshRemote], object]
) -> None:
    monkeypatch.setattr(ssh, "PUT_S", 0.5)
    with logged_in(login_key) as (remote, box):
        pending = paramiko.Channel._event_pending  # type: ignore[attr-defined]

        def late(channel: paramiko.Channel) -> None:
            if channel.get_transport() is not box:
                box.close()
                until(lambda: channel.closed)
            pending(channel)

        monkeypatch.setattr(paramiko.Channel, "_event_pending", late)
        with pytest.raises(ConnectionLost):
            ask(remote)


def test_what_lies_here_unread_is_no_silence_yet() -> None:
    """This process was stopped or starved: who reads had no turn, and gets one."""
    ours, theirs = socket.socketpair()
    closed, read = threading.Event(), threading.Event()

    class Late(ssh._Socket):
        def has_more(self) -> bool:
            more = super().has_more()
            if more:
                self.recv(1)
                read.set()
            return more

    with theirs, Late(fileno=ours.detach()) as sock:
        theirs.sendall(b"x")
        deadline = ssh._Deadline(sock, closed.set, 0.2, 60.0)
        began = time.monotonic()
        deadline.start()
        assert closed.wait(10)
        assert read.is_set()
        assert time.monotonic() - began >= 0.55  # twice 0.2 s of silence, looked for every 0.2 s
        deadline.over.set()
        deadline.join(10)


def test_keys_are_not_exchanged_again_every_half_gigabyte(login_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paramiko.packet.Packetizer, "REKEY_BYTES", 2**17)  # type: ignore[attr-defined]
    with logged_in(login_key, lambda channel: channel.sendall(bytes(2**20))) as (remote, _):
        first = remote._transport.H  # type: ignore[attr-defined]
        remote.run("say a lot")
        remote.run("say a lot")
        assert first == remote._transport.H  # type: ignore[attr-defined]


def test_a_stream_that_cannot_begin_for_want_of_threads_ends_in_a_reset(
    login_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def starve(thread: threading.Thread) -> None:
        if thread.name.startswith("down-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with logged_in(login_key) as (remote, _), closing(Tunnel(remote, 80)) as line:
        monkeypatch.setattr(tunnel.threading.Thread, "start", starve)
        with (
            socket.create_connection(("127.0.0.1", line.port), timeout=10) as peer,
            pytest.raises(ConnectionResetError),
        ):
            peer.recv(1)


def test_what_a_killed_ssh_left_is_deleted_and_what_another_one_writes_is_not(tmp_path: Path) -> None:
    paths = config.paths("default", {"SELFHOST_HOME": str(tmp_path)})
    paths.make()
    left, fresh = (paths.state / f"new.{pid}.known_hosts.selfhost-old" for pid in (1, 2))
    for path in (left, fresh):
        path.touch()
    long_ago = time.time() - 3600
    os.utime(left, (long_ago, long_ago))
    with closing(Ledger(paths.ledger)) as ledger:
        assert command._pin(paths, ledger, make_rental(host_key=HOST_PUBLIC)).exists()
    assert (left.exists(), fresh.exists()) == (False, True)
