"""SSH with paramiko: one connection to one box whose host key is pinned before the first packet of ours."""

from __future__ import annotations

import io
import posixpath
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from selfhost_cli.errors import NotSetUp
from selfhost_cli.model import Endpoint
from selfhost_cli.remote import ConnectionLost, NotYet, OtherKey, Result
from selfhost_cli.remote.knock import knock

CONNECT_S = 10.0
KEEPALIVE_S = 5
PUT_S = 120.0
CLOSE_S = 1.0
PATIENCE = 6
"""A request whose answer waits behind a large upload may take so many times longer, while the box says anything."""
WINDOW = 2**22
"""Bytes of one channel on their way to us: 70 MB/s at a round trip of 60 ms, and what a slow reader may cost."""
PACKET = 2**17
"""Bytes in one packet to us: the fewer packets, the less of Python a byte meets."""


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


def connect(endpoint: Endpoint, host_keys: str | Sequence[str], login_key: Path) -> SshRemote:
    """Knock and log in. Raises what `knock` and `log_in` raise."""
    load_login(login_key)  # ours first: it must not be blamed on the box
    return log_in(knock(endpoint, CONNECT_S), endpoint, host_keys, login_key)


def log_in(sock: socket.socket, endpoint: Endpoint, host_keys: str | Sequence[str], login_key: Path) -> SshRemote:
    """Become root over a connection to `endpoint`, which is closed when that fails.

    `host_keys` is a public key line, or each of those that the box may show. Raises NotYet for everything that a box
    does while it is still coming up, NotSetUp for our key. Any other host key is OtherKey, and we hang up before we
    authenticate: it may be the image's own sshd, or another machine that got the address.
    """
    transport, own = None, _Socket(fileno=sock.detach())
    try:
        lines = [host_keys] if isinstance(host_keys, str) else host_keys
        key, expected = load_login(login_key), [parse_public(line) for line in lines]
        transport = _transport(own, expected[0])
        transport.start_client()
        shown = transport.get_remote_server_key()
        if shown not in expected:
            raise OtherKey(
                f"{endpoint} shows another host key than this box has: {shown.fingerprint},"
                f" not {' or '.join(str(one.fingerprint) for one in expected)}; it was not logged in to"
            )
        transport.auth_publickey("root", key)
        transport.set_keepalive(KEEPALIVE_S)
        return SshRemote(transport, own)
    except BaseException as error:
        if transport is not None:
            transport.close()
        own.close()
        if why := _refusal(endpoint, error):
            raise why from error
        raise


def _transport(sock: socket.socket, host_key: paramiko.PKey) -> paramiko.Transport:
    transport = paramiko.Transport(sock, default_window_size=WINDOW, default_max_packet_size=PACKET)
    transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = CONNECT_S
    options = transport.get_security_options()
    options.key_types = (host_key.get_name(),)
    options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)  # one pass over the bytes, not two
    return transport


def _refusal(endpoint: Endpoint, error: BaseException) -> NotYet | None:
    match error:
        case paramiko.AuthenticationException():
            return NotYet(f"{endpoint} does not accept our login key")
        case IncompatiblePeer() if "host key" in str(error):
            return OtherKey(f"{endpoint} has no host key of the kind this box has: {error}")
        case paramiko.SSHException() | OSError() | EOFError():
            return NotYet(f"{endpoint}: the handshake broke off: {error or type(error).__name__}")
    return None


class _Socket(socket.socket):
    """Knows when it heard something last: while the peer says anything, it is slow and not away."""

    heard_at = float("-inf")

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        data = super().recv(size, flags)
        self.heard_at = time.monotonic()
        return data


class SshRemote:
    """`remote.Remote` over one paramiko transport."""

    port: int | None = None
    """Nothing is forwarded; see `tunnel.Tunnel`."""

    def __init__(self, transport: paramiko.Transport, sock: _Socket) -> None:
        self._transport = transport
        self._sock = sock

    @property
    def alive(self) -> bool:
        """False once the connection is known to be broken; True does not prove that the peer answers."""
        return self._transport.is_active()

    def answers(self, seconds: float) -> bool:
        """Whether the box's sshd says anything at all in time. The connection is closed when it does not."""
        try:
            with self._answer_within(seconds):
                self._transport.global_request("keepalive@openssh.com", wait=True)
        except (paramiko.SSHException, OSError, EOFError):
            pass  # it is closed
        return self.alive

    def run(self, command: str, *, timeout: float = 60.0, on_line: Callable[[str], None] | None = None) -> Result:
        out, err = _Lines(on_line), _Lines(None)
        what = f"`{command[:60]}`"
        try:
            with self._answer_within(timeout):
                channel = self._transport.open_session()
                channel.exec_command(command)
                channel.shutdown_write()
            try:
                _drain(channel, out, err, timeout)
                if not channel.status_event.wait(timeout):
                    raise OSError(f"no exit status within {timeout:.0f} s")
                code = channel.recv_exit_status()
            finally:
                with self._answer_within(CLOSE_S):
                    channel.close()
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

    def forward(self, target: tuple[str, int], source: tuple[str, int]) -> paramiko.Channel:
        """A channel to a port that the box can reach. Raises ConnectionLost, also when nobody listens there."""
        try:
            return self._transport.open_channel("direct-tcpip", target, source, timeout=CONNECT_S)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise ConnectionLost(f"no connection to port {target[1]} of the box: {error}") from error

    @contextmanager
    def _answer_within(self, seconds: float) -> Iterator[None]:
        """Close the connection when nothing was heard of the box for so long, and what happens inside is not over.

        paramiko has no deadline for most requests, and none at all while what is sent does not leave this machine.
        """
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(seconds, over), name="ssh-deadline", daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, seconds: float, over: threading.Event) -> None:
        began = time.monotonic()
        left = seconds
        while not over.wait(left):
            now = time.monotonic()
            left = min(max(began, self._sock.heard_at) + seconds, began + PATIENCE * seconds) - now
            if left <= 0:
                self._transport.close()
                return

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
