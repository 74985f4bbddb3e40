"""paramiko and sshtunnel against a real OpenSSH sshd."""

from __future__ import annotations

import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from selfhost_cli.model import Endpoint
from selfhost_cli.remote import ConnectionLost, NotYet
from selfhost_cli.remote.ssh import SshRemote, connect, make_key
from selfhost_cli.remote.tunnel import Tunnel
from tests.integration.conftest import Box

pytestmark = pytest.mark.box


@pytest.fixture
def remote(box: Box) -> Iterator[SshRemote]:
    remote = connect(box.endpoint, box.host_key, box.login_key)
    yield remote
    remote.close()


def test_a_command_runs_in_the_box_and_tells_how_it_ended(box: Box, remote: SshRemote) -> None:
    result = remote.run("pwd; echo oops >&2; exit 3")
    assert (result.code, result.out.strip(), result.err.strip()) == (3, str(box.home), "oops")


def test_lines_arrive_while_the_command_still_runs(remote: SshRemote) -> None:
    seen: list[str] = []

    def on_line(line: str) -> None:
        seen.append(line)
        if line == "one":
            remote.run("touch go-on")

    remote.run("echo one; while [ ! -e go-on ]; do sleep 0.05; done; echo two; rm go-on", on_line=on_line)
    assert seen == ["one", "two"]


def test_output_of_both_streams_is_whole_even_when_large(remote: SshRemote) -> None:
    result = remote.run("head -c 3000000 /dev/zero | tr '\\0' x; head -c 3000000 /dev/zero | tr '\\0' y >&2")
    assert (len(result.out), len(result.err)) == (3_000_000, 3_000_000)


def test_silence_beyond_the_timeout_is_a_lost_connection(remote: SshRemote) -> None:
    with pytest.raises(ConnectionLost, match="nothing heard"):
        remote.run("sleep 30", timeout=0.5)


def test_a_frozen_box_is_a_lost_connection_at_every_request(box: Box) -> None:
    remote = connect(box.endpoint, box.host_key, box.login_key)
    with box.frozen(*box.sessions()), pytest.raises(ConnectionLost):
        remote.run("true", timeout=0.5)
    remote.close()


def test_a_file_lands_whole_with_its_mode(box: Box, remote: SshRemote) -> None:
    remote.put(b"one", "secret", mode=0o600)
    remote.put(b"two" * 100_000, "secret", mode=0o600)
    path = box.home / "secret"
    assert path.read_bytes() == b"two" * 100_000
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in box.home.iterdir() if entry.name.startswith("secret")] == ["secret"]


def test_another_host_key_is_hung_up_on_before_we_log_in(box: Box, tmp_path: Path) -> None:
    _, other = make_key("other")
    with pytest.raises(NotYet, match="host key"):
        connect(box.endpoint, other, box.login_key)


def test_a_login_key_that_is_not_there_yet_is_not_yet(box: Box, tmp_path: Path) -> None:
    private, _ = make_key("other")
    key = tmp_path / "key"
    key.write_text(private)
    with pytest.raises(NotYet, match="login key"):
        connect(box.endpoint, box.host_key, key)


def test_a_port_where_nobody_listens_is_not_yet(box: Box) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = Endpoint("127.0.0.1", unused.getsockname()[1])
    with pytest.raises(NotYet, match="refused"):
        connect(nobody, box.host_key, box.login_key)
    with pytest.raises(NotYet, match="refused"):
        Tunnel(nobody, box.host_key, box.login_key, 80)


def test_a_closed_connection_says_so(box: Box) -> None:
    remote = connect(box.endpoint, box.host_key, box.login_key)
    remote.close()
    with pytest.raises(ConnectionLost):
        remote.run("true")


@contextmanager
def echo_server() -> Iterator[int]:
    """Sends back what it gets, on the loopback that laptop and sandbox box share."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(peer,), daemon=True).start()

    def answer(peer: socket.socket) -> None:
        with peer:
            while data := peer.recv(65536):
                peer.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


@pytest.fixture
def make_tunnel(box: Box) -> Iterator[Callable[[int], Tunnel]]:
    made: list[Tunnel] = []

    def make(port: int) -> Tunnel:
        made.append(Tunnel(box.endpoint, box.host_key, box.login_key, port))
        return made[-1]

    yield make
    for tunnel in made:
        tunnel.close()


def test_a_tunnel_carries_bytes_and_commands_over_one_connection(
    make_tunnel: Callable[[int], Tunnel], box: Box
) -> None:
    with echo_server() as port:
        tunnel = make_tunnel(port)
        with socket.create_connection(("127.0.0.1", tunnel.port), timeout=5) as peer:
            peer.sendall(b"hello")
            assert peer.recv(5) == b"hello"
        assert tunnel.run("pwd").out.strip() == str(box.home)


def test_a_tunnel_never_shows_another_host_its_login(box: Box) -> None:
    _, other = make_key("other")
    with pytest.raises(NotYet):
        Tunnel(box.endpoint, other, box.login_key, 80)


def test_a_closed_tunnel_leaves_no_listener(make_tunnel: Callable[[int], Tunnel]) -> None:
    tunnel = make_tunnel(80)
    port = tunnel.port
    tunnel.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    with pytest.raises(ConnectionLost):
        tunnel.run("true")
