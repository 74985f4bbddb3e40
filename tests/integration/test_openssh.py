"""The system's own ssh to a real sshd: what the user's configuration and known_hosts say is what counts."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfhost_cli.errors import NotSetUp, UsageError
from selfhost_cli.remote import ConnectionLost
from selfhost_cli.remote.openssh import OpenSsh, checked, forward
from selfhost_cli.remote.ssh import make_key
from tests.integration.conftest import Box
from tests.waiting import until


def configure(box: Box, folder: Path, host_key: str = "", login: Path | None = None) -> str:
    """A user's ssh configuration, in which the box is called `own`."""
    port = box.endpoint.port
    known = folder / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {' '.join(host_key.split()[:2])}\n" if host_key else "")
    config = folder / "config"
    config.write_text(
        f"Host own\n HostName 127.0.0.1\n Port {port}\n User root\n IdentitiesOnly yes\n"
        f" IdentityFile {login or box.login_key}\n IdentityAgent none\n"
        f" UserKnownHostsFile {known}\n GlobalKnownHostsFile /dev/null\n"
    )
    return str(config)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def connected(port: int) -> socket.socket | None:
    try:
        return socket.create_connection(("127.0.0.1", port))
    except ConnectionRefusedError:
        return None


@pytest.fixture
def own(box: Box, tmp_path: Path) -> Iterator[OpenSsh]:
    remote = OpenSsh("own", configure(box, tmp_path, box.host_key))
    yield remote
    remote.close()


def test_a_command_runs_and_tells_how_it_ended(own: OpenSsh) -> None:
    result = own.run("echo out; echo err >&2; exit 3")
    assert (result.code, result.out, result.err) == (3, "out\n", "err\n")


def test_lines_arrive_while_the_command_still_runs(own: OpenSsh, box: Box) -> None:
    lines: list[str] = []
    go = box.home / "go"

    def on_line(line: str) -> None:
        lines.append(line)
        go.touch()  # it would wait for ever if lines came at the end only

    own.run("rm -f go; echo one; while [ ! -e go ]; do sleep 0.05; done; echo two", timeout=20, on_line=on_line)
    assert lines == ["one", "two"]


def test_large_output_of_both_streams_is_whole(own: OpenSsh) -> None:
    result = own.run("head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2")
    assert (len(result.out), len(result.err)) == (3_000_000, 3_000_000)


def test_silence_beyond_the_timeout_is_a_lost_connection(own: OpenSsh) -> None:
    with pytest.raises(ConnectionLost, match="said nothing"):
        own.run("sleep 30", timeout=0.3)


def test_a_file_lands_whole_with_its_mode(own: OpenSsh, box: Box) -> None:
    data = bytes(range(256)) * 4000
    own.put(data, "a file", mode=0o640)
    assert (box.home / "a file").read_bytes() == data
    assert stat.S_IMODE((box.home / "a file").stat().st_mode) == 0o640
    assert not (box.home / "a file.new").exists()


def test_what_cannot_be_written_is_told(own: OpenSsh) -> None:
    with pytest.raises(NotSetUp, match="nowhere/file cannot be written"):
        own.put(b"", "nowhere/file")


def test_one_login_serves_all_of_it(own: OpenSsh) -> None:
    assert own.run("echo $PPID").out == own.run("echo $PPID").out  # one sshd


def test_a_host_that_known_hosts_does_not_know_is_not_logged_in_to(box: Box, tmp_path: Path) -> None:
    with pytest.raises(NotSetUp, match="known_hosts does not know own") as error:
        OpenSsh("own", configure(box, tmp_path))
    assert "`ssh own`" in error.value.remedy


def test_another_host_key_is_not_logged_in_to(box: Box, tmp_path: Path) -> None:
    with pytest.raises(NotSetUp, match="another host key than your known_hosts has"):
        OpenSsh("own", configure(box, tmp_path, make_key("x")[1]))


def test_a_key_that_does_not_open_is_told(box: Box, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch(mode=0o600)
    other.write_text(make_key("x")[0])
    with pytest.raises(NotSetUp, match=r"does not let you in: .*Permission denied"):
        OpenSsh("own", configure(box, tmp_path, box.host_key, other))


def test_a_machine_that_is_not_there_is_told(box: Box, tmp_path: Path) -> None:
    config = Path(configure(box, tmp_path, box.host_key))
    config.write_text(config.read_text().replace(f"Port {box.endpoint.port}", "Port 1"))
    with pytest.raises(NotSetUp, match=r"own cannot be reached: .*refused"):
        OpenSsh("own", str(config))


def test_a_connection_that_is_cut_is_lost_at_once_and_afterwards(own: OpenSsh, box: Box) -> None:
    begun = box.home / "begun"
    begun.unlink(missing_ok=True)

    def cut() -> None:
        until(begun.exists)
        box.signal_sessions(signal.SIGKILL)

    cutter = threading.Thread(target=cut)
    cutter.start()
    with pytest.raises(ConnectionLost):
        own.run("touch begun; sleep 30")
    cutter.join()
    with pytest.raises(ConnectionLost):
        own.run("true")


def test_nothing_is_left_of_a_login_that_was_closed(own: OpenSsh) -> None:
    holder, folder = own._holder.pid, own._folder
    own.close()
    with pytest.raises(ProcessLookupError):
        os.kill(holder, 0)
    assert not folder.exists()


def test_a_tunnel_ends_with_its_holder_but_not_before_its_last_connection(box: Box, tmp_path: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as there:
        words = forward("own", configure(box, tmp_path, box.host_key), port, there.getsockname()[1])
        tunnel = subprocess.Popen(words, stdin=subprocess.PIPE)
        assert tunnel.stdin
        here = until(lambda: connected(port))
        there.settimeout(10)
        peer, _ = there.accept()
        tunnel.stdin.close()
        with here, peer:
            here.settimeout(10)
            for _ in range(20):  # each takes the whole way, so that it had its time to end
                peer.sendall(b"still here")
                assert here.recv(10, socket.MSG_WAITALL) == b"still here"
            assert tunnel.poll() is None
        assert tunnel.wait(10) == 0


@pytest.mark.parametrize("destination", ["", "-oProxyCommand=x", "root@-x", "a b", "a'b", "a\nb"])
def test_what_is_no_destination_is_refused(destination: str) -> None:
    with pytest.raises(UsageError):
        checked(destination)
