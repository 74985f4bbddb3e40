"""A box whose sshd was replaced by what its host likes better: it has our session, and wants more."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Iterator

import paramiko
import pytest

from selfhost_cli.model import Endpoint
from selfhost_cli.remote.ssh import SshRemote, connect, make_key

WANTED: dict[str, Callable[[paramiko.Transport], paramiko.Channel]] = {
    "our agent": lambda ssh: ssh.open_channel("auth-agent@openssh.com", timeout=5),
    "our display": lambda ssh: ssh.open_x11_channel(("127.0.0.1", 6000)),
    "a port that we forward": lambda ssh: ssh.open_forwarded_tcpip_channel(("127.0.0.1", 1), ("127.0.0.1", 8001)),
    "a port of ours": lambda ssh: ssh.open_channel("direct-tcpip", ("127.0.0.1", 8001), ("127.0.0.1", 1), timeout=5),
    "a shell": lambda ssh: ssh.open_session(timeout=5),
}


class Welcome(paramiko.ServerInterface):
    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[paramiko.Transport, SshRemote]]:
    """Both ends: the box's transport, and what we have when we are logged in."""
    (host, public), (login, _) = make_key("host"), make_key("login")
    login_key = tmp_path_factory.mktemp("hostile") / "login"
    login_key.write_text(login)
    listener = socket.create_server(("127.0.0.1", 0))
    served: list[paramiko.Transport] = []

    def serve() -> None:
        while not served:
            connection, _ = listener.accept()
            transport = paramiko.Transport(connection)
            transport.add_server_key(paramiko.Ed25519Key.from_private_key(io.StringIO(host)))
            transport.start_server(server=Welcome())
            served.append(transport)

    box = threading.Thread(target=serve)
    box.start()
    remote = connect(Endpoint(*listener.getsockname()[:2]), public, login_key)
    box.join()
    yield served[0], remote
    remote.close()
    served[0].close()
    listener.close()


@pytest.mark.parametrize("wanted", WANTED)
def test_a_box_gets_nothing_of_ours_through_our_session(
    session: tuple[paramiko.Transport, SshRemote], wanted: str
) -> None:
    box, _ = session
    with pytest.raises(paramiko.ChannelException) as refused:
        WANTED[wanted](box)
    assert refused.value.code in (1, 3), "prohibited, or a kind that is not known"
