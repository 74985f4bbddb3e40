"""SSH with paramiko: one connection to one box whose host key is pinned before the first packet of ours."""

from __future__ import annotations

import io
import posixpath
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import paramiko
from paramiko.common import MSG_CHANNEL_DATA, MSG_CHANNEL_EXTENDED_DATA
from paramiko.ssh_exception import IncompatiblePeer

from selfhost_cli.errors import NotSetUp
from selfhost_cli.model import Endpoint
from selfhost_cli.remote import ConnectionLost, NotYet, OtherKey, Result
from selfhost_cli.remote.knock import knock

CONNECT_S = 10.0
"""A greeting may take so long, and a login after it in all, however busy whoever answers seems."""
KEEPALIVE_S = 5
PUT_S = 120.0
CLOSE_S = 1.0
LISTEN_S = 0.25
PAUSE_S = 1.0
"""Longer than that nobody here waits in one go: this machine slept, or this process was stopped."""
PATIENCE = 6
"""A request whose answer waits behind a large upload may take so many times longer, while the box says anything."""
WINDOW = 2**22
"""Bytes of one channel on their way to us: 70 MB/s at a round trip of 60 ms, and what a slow reader may cost."""
PACKET = 2**17
"""Bytes in one packet to us: the fewer packets, the less of Python a byte meets."""
LONGEST_PACKET = 2**20
"""What is announced as longer is not read: paramiko would gather 4 GB of it, from whoever answers."""
LONGEST_ANSWER = 2**24
"""Bytes that a command may say, on both streams."""
REKEY_BYTES = 2**36
"""As OpenSSH for AES. A stream that ends while keys are exchanged holds up paramiko's own thread, which exchanges them,
and by itself paramiko does that every 512 MB."""


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
        remote = SshRemote(transport, own)
        with remote.answer_within(CONNECT_S, in_all=CONNECT_S):
            transport.start_client()
            shown = transport.get_remote_server_key()
            if shown not in expected:
                raise OtherKey(
                    f"{endpoint} shows another host key than this box has: {shown.fingerprint},"
                    f" not {' or '.join(str(one.fingerprint) for one in expected)}; it was not logged in to"
                )
            transport.auth_publickey("root", key)
        transport.set_keepalive(KEEPALIVE_S)
        return remote
    except BaseException as error:
        own.hang_up()
        if transport is not None:
            transport.close()
        own.close()
        if why := _refusal(endpoint, error):
            raise why from error
        raise


def _transport(sock: socket.socket, host_key: paramiko.PKey) -> paramiko.Transport:
    transport = _Transport(sock, default_window_size=WINDOW, default_max_packet_size=PACKET)
    transport.packetizer.REKEY_BYTES = REKEY_BYTES
    transport.banner_timeout = transport.auth_timeout = float("inf")  # by the wall clock; `log_in` has a better one
    transport.handshake_timeout = CONNECT_S
    options = transport.get_security_options()
    options.key_types = (host_key.get_name(),)
    options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)  # one pass over the bytes, not two
    return transport


def _refusal(endpoint: Endpoint, error: BaseException) -> NotYet | None:
    match error:
        case paramiko.AuthenticationException() if not re.search("timeout|EOF", str(error)):
            return NotYet(f"{endpoint} does not accept our login key")
        case IncompatiblePeer() if "host key" in str(error):
            return OtherKey(f"{endpoint} has no host key of the kind this box has: {error}")
        case paramiko.SSHException() | OSError() | EOFError():
            return NotYet(f"{endpoint}: the handshake broke off: {error or type(error).__name__}")
    return None


def _bounded(feed: Callable[[paramiko.Channel, paramiko.Message], None]) -> Callable[..., None]:
    """paramiko itself keeps whatever comes, also beyond the window that it announced."""

    def handle(channel: paramiko.Channel, message: paramiko.Message) -> None:
        if len(channel.in_buffer) + len(channel.in_stderr_buffer) > WINDOW:
            raise paramiko.SSHException("the box sends more than it may")
        feed(channel, message)

    return handle


class _Transport(paramiko.Transport):
    _channel_handler_table: ClassVar = {
        kind: _bounded(handle) if kind in (MSG_CHANNEL_DATA, MSG_CHANNEL_EXTENDED_DATA) else handle
        for kind, handle in vars(paramiko.Transport)["_channel_handler_table"].items()
    }


class _Socket(socket.socket):
    """Knows when it heard something last: while the peer says anything, it is slow and not away."""

    heard_at = float("-inf")

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        if size > LONGEST_PACKET:
            raise paramiko.SSHException(f"a packet of {size} bytes was announced")
        data = super().recv(size, flags)
        self.heard_at = time.monotonic()
        return data

    def has_more(self) -> bool:
        """Whether something lies here that nobody has read yet."""
        try:
            return bool(super().recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def hang_up(self) -> None:
        """Wake whoever reads or writes: paramiko's thread looks for a close only when nothing comes."""
        try:
            self.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is gone


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
            with self.answer_within(seconds):
                self._transport.global_request("keepalive@openssh.com", wait=True)
        except (paramiko.SSHException, OSError, EOFError):
            pass  # it is closed
        return self.alive

    def run(self, command: str, *, timeout: float = 60.0, on_line: Callable[[str], None] | None = None) -> Result:
        out, err = _Lines(on_line), _Lines(None)
        what = f"`{command[:60]}`"
        try:
            with self.answer_within(timeout) as deadline:
                channel = deadline.wakes(self._transport.open_session())
                channel.exec_command(command)
                channel.shutdown_write()
            try:
                _drain(channel, out, err, timeout, in_all=PATIENCE * timeout if on_line is None else float("inf"))
                if not channel.status_event.wait(timeout):
                    raise OSError(f"no exit status within {timeout:.0f} s")
                code = channel.recv_exit_status()
            finally:
                with self.answer_within(CLOSE_S):
                    channel.close()
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise ConnectionLost(f"the connection to the box broke during {what}: {error}") from error
        if code < 0:
            raise ConnectionLost(f"the connection to the box broke during {what}")
        return Result(code, out.finish(), err.finish())

    def put(self, data: bytes, path: str, *, mode: int = 0o600) -> None:
        draft = f"{path}.{secrets.token_hex(4)}"
        try:
            with self.answer_within(PUT_S) as deadline:
                channel = deadline.wakes(self._transport.open_session())
                channel.invoke_subsystem("sftp")
                with paramiko.SFTPClient(channel) as sftp:
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
        began = time.monotonic()
        while True:
            try:
                return self._transport.open_channel("direct-tcpip", target, source, timeout=CONNECT_S)
            except (paramiko.SSHException, OSError, EOFError) as error:
                too_early = "Timeout" in str(error) and time.monotonic() - began < CONNECT_S
                if not too_early:  # paramiko goes by the wall clock, which may be set meanwhile
                    raise ConnectionLost(f"no connection to port {target[1]} of the box: {error}") from error

    @contextmanager
    def answer_within(self, seconds: float, in_all: float | None = None) -> Iterator[_Deadline]:
        """Close the connection when nothing was heard of the box for so long, and what happens inside is not over.

        `in_all` is how long it may take while the box says anything. Raises TimeoutError for what ended by that.
        paramiko has no deadline for most requests, and none at all while what is sent does not leave this machine;
        those that it has go by the wall clock.
        """
        deadline = _Deadline(self._sock, self.close, seconds, PATIENCE * seconds if in_all is None else in_all)
        deadline.start()
        try:
            yield deadline
        except (paramiko.SSHException, OSError, EOFError) as error:
            if deadline.missed:
                raise TimeoutError(deadline.missed) from error
            raise
        finally:
            deadline.over.set()

    def close(self) -> None:
        self._sock.hang_up()
        self._transport.close()


class _Deadline(threading.Thread):
    """Closes a connection that keeps somebody waiting, until `over` is set."""

    def __init__(self, sock: _Socket, close: Callable[[], None], seconds: float, in_all: float) -> None:
        super().__init__(name="ssh-deadline", daemon=True)
        self.over = threading.Event()
        self.missed = ""
        """What was waited for in vain."""
        self._sock, self._close = sock, close
        self._seconds, self._in_all = seconds, in_all
        self._channels: list[paramiko.Channel] = []

    def wakes(self, channel: paramiko.Channel) -> paramiko.Channel:
        """A request on this channel that begins while the connection ends would never be woken by paramiko."""
        self._channels.append(channel)
        return channel

    def run(self) -> None:
        silence, heard_at, spared = _Silence(), self._sock.heard_at, False
        while not self.over.wait(min(LISTEN_S, self._seconds)):
            last, heard_at = heard_at, self._sock.heard_at
            silent = silence.look(heard=heard_at != last) >= self._seconds
            if silence.total >= self._in_all and not silent:
                self._miss(f"not over within {self._in_all:g} s")
            elif silent and (spared or not self._sock.has_more()):
                self._miss(f"nothing heard for {self._seconds:g} s")
            spared = silent  # this process was stopped or starved, and paramiko's thread had no turn yet

    def _miss(self, what: str) -> None:
        self.missed = self.missed or what
        self._close()
        for channel in self._channels:  # at each look: it may begin to wait only now
            channel.event.set()


class _Lines:
    """Collects a stream's text and hands out its lines as they become whole."""

    def __init__(self, on_line: Callable[[str], None] | None) -> None:
        self._on_line = on_line
        self._bytes = io.BytesIO()
        self._rest = b""

    def __len__(self) -> int:
        return self._bytes.tell()

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


class _Silence:
    """For how long we listened and nothing was heard, by a clock that nobody sets.

    What came while this machine slept or this process was stopped is read after that: a pause of ours counts little.
    """

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self.seconds = self.total = 0.0

    def look(self, *, heard: bool) -> float:
        """Seconds of silence, if nothing was heard since the last look; to be called several times a second."""
        now = time.monotonic()
        step, self._looked = min(PAUSE_S, now - self._looked), now
        self.seconds = 0.0 if heard else self.seconds + step
        self.total += step
        return self.seconds


def _drain(channel: paramiko.Channel, out: _Lines, err: _Lines, timeout: float, in_all: float) -> None:
    """Read both streams until the command has ended. `timeout` is for silence; all may last `in_all`."""
    silence, arrived = _Silence(), threading.Event()
    for pipe in (channel.in_buffer, channel.in_stderr_buffer):
        pipe.set_event(arrived)
    while True:
        arrived.wait(LISTEN_S)
        arrived.clear()  # before we look: what comes from now on sets it again
        ended = channel.eof_received or channel.closed
        heard = False
        while channel.recv_ready() or channel.recv_stderr_ready():
            heard = True
            if channel.recv_ready():
                out.feed(channel.recv(65536))
            if channel.recv_stderr_ready():
                err.feed(channel.recv_stderr(65536))
            if len(out) + len(err) > LONGEST_ANSWER:
                raise OSError(f"it said more than {LONGEST_ANSWER >> 20} MB")
        if ended:
            return
        if silence.look(heard=heard) > timeout:
            raise OSError(f"nothing heard for {timeout:.0f} s")
        if silence.total > in_all:
            raise OSError(f"not over within {in_all:g} s")
