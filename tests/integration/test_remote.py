"""Commands, files and the tunnel against a real OpenSSH sshd."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import paramiko
import pytest

from selfhost_cli.model import Endpoint
from selfhost_cli.remote import ConnectionLost, NotYet, OtherKey, ssh
from selfhost_cli.remote.knock import knock
from selfhost_cli.remote.ssh import SshRemote, connect, make_key
from selfhost_cli.remote.tunnel import Tunnel
from tests.integration.apart import Apart
from tests.integration.conftest import Box
from tests.relay import Relay
from tests.waiting import until

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


def test_silence_is_noticed_though_the_clock_stands(remote: SshRemote, monkeypatch: pytest.MonkeyPatch) -> None:
    stands = time.time()
    monkeypatch.setattr(time, "time", lambda: stands)
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


def test_a_closed_connection_says_so(box: Box) -> None:
    remote = connect(box.endpoint, box.host_key, box.login_key)
    remote.close()
    with pytest.raises(ConnectionLost):
        remote.run("true")


@contextmanager
def server(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """Serves each connection in a thread, on the loopback that laptop and sandbox box share."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(peer,), daemon=True).start()

    def one(peer: socket.socket) -> None:
        with peer, suppress(OSError):
            answer(peer)

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def echo(peer: socket.socket) -> None:
    while data := peer.recv(65536):
        peer.sendall(data)


def read_all(peer: socket.socket) -> bytes:
    return b"".join(iter(lambda: peer.recv(65536), b""))


def dial(tunnel: Tunnel) -> socket.socket:
    return socket.create_connection(("127.0.0.1", tunnel.port), timeout=20)


@pytest.fixture
def make_tunnel(box: Box) -> Iterator[Callable[..., Tunnel]]:
    made: list[Tunnel] = []

    def make(port: int, endpoint: Endpoint = box.endpoint) -> Tunnel:
        made.append(Tunnel(connect(endpoint, box.host_key, box.login_key), port))
        return made[-1]

    yield make
    for tunnel in made:
        tunnel.close()


MakeTunnel = Callable[..., Tunnel]


def test_a_tunnel_carries_bytes_and_commands_over_one_connection(make_tunnel: MakeTunnel, box: Box) -> None:
    with server(echo) as port:
        tunnel = make_tunnel(port)
        with dial(tunnel) as peer:
            peer.sendall(b"hello")
            assert peer.recv(5) == b"hello"
        assert tunnel.run("pwd").out.strip() == str(box.home)
        assert tunnel.answers(5)


def test_what_is_sent_is_what_arrives(make_tunnel: MakeTunnel) -> None:
    sent = os.urandom(5_000_000)
    with server(lambda peer: peer.sendall(read_all(peer))) as port, dial(make_tunnel(port)) as peer:
        peer.sendall(sent)
        peer.shutdown(socket.SHUT_WR)  # the other direction goes on
        assert read_all(peer) == sent


def test_both_directions_may_be_full_at_once(make_tunnel: MakeTunnel) -> None:
    size = 20_000_000

    def push(peer: socket.socket) -> None:
        peer.sendall(bytes(size))
        peer.shutdown(socket.SHUT_WR)
        read_all(peer)

    with server(push) as port, dial(make_tunnel(port)) as peer:
        sender = threading.Thread(target=peer.sendall, args=(bytes(size),))
        sender.start()
        assert len(read_all(peer)) == size
        sender.join(20)
        assert not sender.is_alive()


def test_one_that_does_not_read_keeps_no_other_waiting(make_tunnel: MakeTunnel) -> None:
    def serve(peer: socket.socket) -> None:
        peer.sendall(bytes(32 * 2**20) if peer.recv(1) == b"L" else b"small")

    with server(serve) as port:
        tunnel = make_tunnel(port)
        with dial(tunnel) as deaf:
            deaf.sendall(b"L")
            for _ in range(5):
                with dial(tunnel) as peer:
                    peer.sendall(b"s")
                    assert read_all(peer) == b"small"
            assert tunnel.run("echo here", timeout=10).out == "here\n"


def test_sixty_four_streams_all_come_to_their_end(make_tunnel: MakeTunnel) -> None:
    with server(lambda peer: peer.sendall(peer.recv(1) * 300_000)) as port:
        tunnel = make_tunnel(port)
        with ExitStack() as stack:
            peers = [stack.enter_context(dial(tunnel)) for _ in range(64)]
            for number, peer in enumerate(peers):
                peer.sendall(bytes([number]))
            for number, peer in enumerate(peers):
                assert read_all(peer) == bytes([number]) * 300_000


def test_what_is_cut_off_ends_in_a_reset_and_never_as_if_it_were_whole(make_tunnel: MakeTunnel, box: Box) -> None:
    with server(lambda peer: (peer.sendall(b"half of"), peer.recv(1))) as port:
        tunnel = make_tunnel(port)
        with dial(tunnel) as peer:
            assert peer.recv(100) == b"half of"
            box.signal_sessions(signal.SIGKILL)
            with pytest.raises(ConnectionResetError):
                peer.recv(100)
        until(lambda: not tunnel.alive)


def test_a_port_where_nothing_listens_on_the_box_is_a_reset(make_tunnel: MakeTunnel) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        tunnel = make_tunnel(unused.getsockname()[1])
        with dial(tunnel) as peer, pytest.raises(ConnectionResetError):
            peer.recv(1)
    assert tunnel.alive


def test_a_clock_that_is_set_forward_ends_no_stream_that_begins(
    make_tunnel: MakeTunnel, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked = time.time, threading.Event()

    def later() -> float:
        asked.set()
        return now() + 3600 * 5

    with server(echo) as port:
        tunnel = make_tunnel(port)
        with box.frozen(*box.sessions()):
            peer = dial(tunnel)
            until(lambda: any(thread.name.startswith("up-") for thread in threading.enumerate()))
            began = time.monotonic()
            until(lambda: time.monotonic() - began > 0.3)  # it waits for the box's answer
            monkeypatch.setattr(time, "time", later)
            asked.clear()
            assert asked.wait(5)
        with peer:
            peer.sendall(b"hello")
            assert peer.recv(5) == b"hello"


def test_one_that_hangs_up_in_the_middle_of_an_answer_ends_it_on_the_box(make_tunnel: MakeTunnel) -> None:
    ended = threading.Event()

    def stream(peer: socket.socket) -> None:
        try:
            while True:
                peer.sendall(b"word ")
                time.sleep(0.01)
        finally:
            ended.set()

    with server(stream) as port:
        with dial(make_tunnel(port)) as peer:
            peer.recv(1)
        assert ended.wait(10)


def test_a_closed_tunnel_leaves_no_listener_no_thread_and_no_descriptor(make_tunnel: MakeTunnel) -> None:
    def flood(peer: socket.socket) -> None:
        peer.sendall(bytes(64 * 2**20))

    with server(flood) as port:
        threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
        tunnel = make_tunnel(port)
        with dial(tunnel), dial(tunnel) as peer:  # neither reads on, one never did
            peer.recv(1)
            tunnel.close()
            with pytest.raises(ConnectionRefusedError):
                dial(tunnel)
            with pytest.raises(ConnectionLost):
                tunnel.run("true")
            until(lambda: threading.active_count() <= threads)
        until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)


def test_a_command_behind_a_slow_upload_is_waited_for(make_tunnel: MakeTunnel, relay: Relay) -> None:
    """While the box says anything it is slow and not away: more than a second of upload lies before some question."""
    with server(read_all) as port:
        tunnel = make_tunnel(port, relay.endpoint)
        with dial(tunnel) as peer:
            relay.chunk_s = 0.05
            sender = threading.Thread(target=_send, args=(peer, bytes(8_000_000)))
            sender.start()
            took = []
            while sender.is_alive():
                began = time.monotonic()
                assert tunnel.run("echo here", timeout=1.0).out == "here\n"
                took.append(time.monotonic() - began)
            assert max(took) > 1.0
            relay.chunk_s = 0.0


def test_silence_with_an_upload_under_way_is_a_lost_connection(make_tunnel: MakeTunnel, relay: Relay) -> None:
    with server(read_all) as port:
        tunnel = make_tunnel(port, relay.endpoint)
        with dial(tunnel) as peer, relay.swallowing():
            sender = threading.Thread(target=_send, args=(peer, bytes(64 * 2**20)))
            sender.start()
            with pytest.raises(ConnectionLost):
                tunnel.run("true", timeout=1.0)
            sender.join(20)
            assert not sender.is_alive()


def _send(peer: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        peer.sendall(data)


def test_another_host_key_is_named_with_both_fingerprints(box: Box) -> None:
    _, other = make_key("other")
    with pytest.raises(OtherKey, match=r"another host key .*SHA256:\S+, not SHA256:"):
        connect(box.endpoint, other, box.login_key)


def test_a_server_that_never_greets_is_not_yet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(NotYet, match="says nothing within 1 s"):
        knock(Endpoint(*silent.getsockname()), 1)


def test_a_server_that_hangs_up_at_once_is_not_yet() -> None:
    with server(lambda peer: None) as port, pytest.raises(NotYet, match="hangs up without a word"):
        knock(Endpoint("127.0.0.1", port), 5)


def test_a_server_that_greets_and_then_says_nothing_is_not_yet(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CONNECT_S", 1.0)

    def greet(peer: socket.socket) -> None:
        peer.sendall(b"SSH-2.0-box\r\n")
        read_all(peer)

    with server(greet) as port, pytest.raises(NotYet, match="the handshake broke off"):
        connect(Endpoint("127.0.0.1", port), box.host_key, box.login_key)


def test_a_login_that_is_not_answered_is_not_yet_though_the_clock_stands(
    box: Box, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    private, public = make_key("host")
    key, over, stands = tmp_path / "key", threading.Event(), time.time()
    key.write_text(private)

    class Silent(paramiko.ServerInterface):
        def get_allowed_auths(self, username: str) -> str:
            return "publickey"

        def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
            over.wait(60)
            return paramiko.AUTH_FAILED

    def serve(peer: socket.socket) -> None:
        transport = paramiko.Transport(peer)
        transport.add_server_key(ssh.load_login(key))
        transport.start_server(threading.Event(), Silent())
        over.wait(60)
        transport.close()

    monkeypatch.setattr(ssh, "CONNECT_S", 1.0)
    with server(serve) as port:
        sock = knock(Endpoint("127.0.0.1", port), 5)
        monkeypatch.setattr(time, "time", lambda: stands)
        with pytest.raises(NotYet, match="the handshake broke off"):
            ssh.log_in(sock, Endpoint("127.0.0.1", port), public, box.login_key)
        over.set()


def test_the_port_outlives_a_shortage_of_descriptors(box: Box) -> None:
    """In a process of its own: nobody else there opens or closes any, or has its logging turned off."""
    with server(echo) as port:
        facts = {"host_key": box.host_key, "login_key": str(box.login_key), "endpoint": box.endpoint, "port": port}
        starving = Apart("tunnel", **facts)
        port = starving.heard_of("port")
        starving.tell("hoard")
        starving.heard(done="hoard")
        with socket.create_connection(("127.0.0.1", port), timeout=20) as peer:
            starving.heard(log=f"port {port}: [Errno 24] Too many open files")
            starving.tell("release")
            peer.sendall(b"hello")
            assert peer.recv(5) == b"hello"
        starving.close()
