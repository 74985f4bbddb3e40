"""A forwarded port with sshtunnel, and commands over the very same connection.

sshtunnel alone never notices a frozen peer and keeps a dead port open (measured), so whoever holds a Tunnel asks
`run` for an answer now and then: that is the liveness probe. Its private attributes are touched here only.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import paramiko
import sshtunnel

from selfhost_cli.model import Endpoint
from selfhost_cli.remote import ConnectionLost, NotYet, Result
from selfhost_cli.remote.ssh import CONNECT_S, KEEPALIVE_S, SshRemote, load_login, parse_public

_quiet = logging.getLogger("selfhost.sshtunnel")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class Tunnel:
    """127.0.0.1:`port` here is 127.0.0.1:`remote_port` on the box, until `close`."""

    def __init__(self, endpoint: Endpoint, host_key: str, login_key: Path, remote_port: int) -> None:
        """Connect and forward. Raises NotYet when the box cannot be reached or shows another key.

        NotSetUp when our own key is damaged.
        """
        key = load_login(login_key)
        try:
            # sshtunnel hides why a connection failed and has no timeout for connecting: knock first.
            socket.create_connection(endpoint, timeout=CONNECT_S).close()
            self._forwarder = sshtunnel.SSHTunnelForwarder(
                tuple(endpoint),
                ssh_config_file=None,
                ssh_username="root",
                ssh_pkey=key,
                ssh_host_key=parse_public(host_key),
                allow_agent=False,
                host_pkey_directories=[],
                local_bind_address=("127.0.0.1", 0),
                remote_bind_address=("127.0.0.1", remote_port),
                set_keepalive=KEEPALIVE_S,
                logger=_quiet,
            )
            self._forwarder.start()
        except (sshtunnel.BaseSSHTunnelForwarderError, paramiko.SSHException, OSError, EOFError, ValueError) as error:
            raise NotYet(f"{endpoint}: {error}") from error
        self._remote = SshRemote(self._forwarder._transport)

    @property
    def port(self) -> int:
        return int(self._forwarder.local_bind_port)

    @property
    def alive(self) -> bool:
        """False once the connection is known to be broken; True does not prove that the peer answers."""
        return bool(self._forwarder.is_active)

    def run(self, command: str, *, timeout: float = 8.0) -> Result:
        """Run a command over the tunnel's own connection. Raises ConnectionLost when no answer comes in time."""
        if not self.alive:
            raise ConnectionLost("the tunnel's connection is closed")
        return self._remote.run(command, timeout=timeout)

    def close(self) -> None:
        try:
            self._forwarder.stop(force=True)
        except (sshtunnel.BaseSSHTunnelForwarderError, paramiko.SSHException, OSError):
            pass  # it was broken already; its listener is gone with it
        for server in self._forwarder._server_list:
            server.server_close()
