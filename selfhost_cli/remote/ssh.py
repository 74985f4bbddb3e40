"""SSH with paramiko: one connection to one box whose host key is pinned before the first packet of ours."""

from __future__ import annotations

import io
import posixpath
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import paramiko

from selfhost_cli.errors import NotSetUp
from selfhost_cli.model import Endpoint
from selfhost_cli.remote import ConnectionLost, NotYet, Result

CONNECT_S = 10.0
KEEPALIVE_S = 5
PUT_S = 120.0


def make_key(comment: str) -> tuple[str, str]:
    """A new ed25519 pair: (OpenSSH private key text, public key line)."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()).decode()
    public = key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH).decode()
    return private, f"{public} {comment}"


def parse_public(line: str) -> paramiko.PKey:
    """The key of a public key line such as `ssh-ed25519 AAAA… comment`."""
    import base64

    return paramiko.Ed25519Key(data=base64.b64decode(line.split()[1]))


def load_login(path: Path) -> paramiko.PKey:
    """Our private login key. Raises NotSetUp when the file cannot be read or is damaged."""
    try:
        return paramiko.Ed25519Key.from_private_key_file(str(path))
    except Exception as error:  # for a damaged file SSHException, ValueError, IndexError and AssertionError were seen
        raise NotSetUp(
            f"the login key {path} cannot be used: {error or type(error).__name__}",
            "Restore it, or end its box with `selfhost down` and delete it: `selfhost up` makes another.",
        ) from error


def public_half(path: Path) -> str:
    """What belongs to our private login key, as in a public key line without a comment. Raises NotSetUp."""
    key = load_login(path)
    return f"{key.get_name()} {key.get_base64()}"


def connect(endpoint: Endpoint, host_key: str, login_key: Path) -> SshRemote:
    """Log in as root. Raises NotYet for everything that a box does while it is still coming up, NotSetUp for our key.

    A host key other than `host_key` hangs up before we authenticate: it may be the image's own sshd, or another
    machine that got the address.
    """
    transport, key = None, load_login(login_key)
    try:
        sock = socket.create_connection(endpoint, timeout=CONNECT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport = paramiko.Transport(sock)
        transport.banner_timeout = CONNECT_S
        transport.auth_timeout = CONNECT_S
        transport.connect(hostkey=parse_public(host_key), username="root", pkey=key)
        transport.set_keepalive(KEEPALIVE_S)
        return SshRemote(transport)
    except paramiko.AuthenticationException as error:
        _close(transport)
        raise NotYet(f"{endpoint} does not accept our login key") from error
    except paramiko.SSHException as error:
        _close(transport)
        raise NotYet(f"{endpoint} does not show the expected host key: {error}") from error
    except (OSError, EOFError) as error:
        _close(transport)
        raise NotYet(f"{endpoint}: {error}") from error


class SshRemote:
    """`remote.Remote` over one paramiko transport."""

    port: int | None = None
    """Nothing is forwarded; see `tunnel.Tunnel`."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = transport

    def run(self, command: str, *, timeout: float = 60.0, on_line: Callable[[str], None] | None = None) -> Result:
        out, err = _Lines(on_line), _Lines(None)
        what = f"`{command[:60]}`"
        try:
            with self._transport.open_session(timeout=timeout) as channel:
                with self._answer_within(timeout):
                    channel.exec_command(command)
                    channel.shutdown_write()
                _drain(channel, out, err, timeout)
                if not channel.status_event.wait(timeout):
                    raise OSError(f"no exit status within {timeout:.0f} s")
                code = channel.recv_exit_status()
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise ConnectionLost(f"the connection to the box broke during {what}: {error}") from error
        if code < 0:
            raise ConnectionLost(f"the connection to the box broke during {what}")
        return Result(code, out.finish(), err.finish())

    def put(self, data: bytes, path: str, *, mode: int = 0o600) -> None:
        draft = f"{path}.{secrets.token_hex(4)}"
        try:
            with self._answer_within(PUT_S):
                sftp = paramiko.SFTPClient.from_transport(self._transport)
                assert sftp is not None
                with sftp:
                    with sftp.open(draft, "wx") as file:
                        file.chmod(mode)
                        file.set_pipelined(True)
                        file.write(data)
                    sftp.posix_rename(draft, path)
        except FileNotFoundError as error:
            raise ConnectionLost(f"the box has no directory {posixpath.dirname(path)}") from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise ConnectionLost(f"the connection to the box broke while sending {path}: {error}") from error

    @contextmanager
    def _answer_within(self, seconds: float) -> Iterator[None]:
        """Close the connection when what happens inside takes longer: paramiko has no deadline for these requests."""
        timer = threading.Timer(seconds, self._transport.close)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close(self) -> None:
        self._transport.close()


class _Lines:
    """Collects a stream's text and hands out its lines as they become whole."""

    def __init__(self, on_line: Callable[[str], None] | None) -> None:
        self._on_line = on_line
        self._bytes = io.BytesIO()
        self._rest = b""

    def feed(self, data: bytes) -> None:
        self._bytes.write(data)
        if self._on_line is None:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._on_line(line.decode(errors="replace"))

    def finish(self) -> str:
        if self._on_line is not None and self._rest:
            self._on_line(self._rest.decode(errors="replace"))
        return self._bytes.getvalue().decode(errors="replace")


def _drain(channel: paramiko.Channel, out: _Lines, err: _Lines, timeout: float) -> None:
    """Read both streams until the command has ended. `timeout` is for silence, not for the whole."""
    last = time.monotonic()
    channel.settimeout(0.2)
    while True:
        quiet = True
        try:
            if data := channel.recv(65536):
                out.feed(data)
                quiet = False
            elif not channel.recv_stderr_ready():
                while data := channel.recv_stderr(65536):
                    err.feed(data)
                return
        except TimeoutError:
            pass
        while channel.recv_stderr_ready():
            err.feed(channel.recv_stderr(65536))
            quiet = False
        if not quiet:
            last = time.monotonic()
        elif time.monotonic() - last > timeout:
            raise OSError(f"nothing heard for {timeout:.0f} s")


def _close(transport: paramiko.Transport | None) -> None:
    if transport is not None:
        transport.close()
