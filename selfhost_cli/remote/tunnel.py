"""A forwarded port over paramiko's channels, and commands over the very same connection.

sshtunnel does this too, but shuts both directions when one ends, stands still when both are full, ends what was cut off
as if it were whole, and leaves Nagle's algorithm on (`docs/tunnel.md` has the figures).
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from typing import Any

import paramiko

from selfhost_cli.remote import ConnectionLost, Result
from selfhost_cli.remote.ssh import SshRemote

DOWN, UP = 2**18, 2**15
"""Bytes moved at once: down what has gathered, up what sshd takes in one packet."""
POLL_S = 0.5
CLOSE_S = 0.5
RESET = struct.pack("ii", 1, 0)

log = logging.getLogger("selfhost.tunnel")


class Tunnel:
    """127.0.0.1:`port` here is 127.0.0.1:`remote_port` on the box, until `close`. Takes `remote` over."""

    def __init__(self, remote: SshRemote, remote_port: int) -> None:
        self._remote = remote
        self._target = ("127.0.0.1", remote_port)
        self._closing = False
        self._lock = threading.Lock()
        self._streams: dict[threading.Thread, _Stream] = {}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.settimeout(POLL_S)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name=f"tunnel-{self.port}", daemon=True)
        self._acceptor.start()

    @property
    def alive(self) -> bool:
        """False once the connection is known to be broken; True does not prove that the peer answers."""
        return self._remote.alive

    def run(self, command: str, *, timeout: float = 8.0) -> Result:
        """Run a command over the tunnel's own connection. Raises ConnectionLost when no answer comes in time."""
        return self._remote.run(command, timeout=timeout)

    def answers(self, seconds: float) -> bool:
        """Whether the box's sshd says anything at all in time. The tunnel is of no use any more when it does not."""
        return self._remote.answers(seconds)

    def close(self) -> None:
        """Refuse new streams and reset the open ones."""
        self._closing = True
        self._remote.close()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the acceptor, on Linux at once
        except OSError:
            pass
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            left = dict(self._streams)
        deadline = time.monotonic() + CLOSE_S
        for thread, stream in left.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                stream.abandon()

    def _accept(self) -> None:
        while not self._closing:
            try:
                peer, source = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                self._falter(error)
                continue
            stream = _Stream(peer, source)
            thread = threading.Thread(target=self._serve, args=(stream,), name=f"up-{source[1]}", daemon=True)
            with self._lock:
                self._streams[thread] = stream
            try:
                thread.start()
            except RuntimeError as error:
                with self._lock:
                    del self._streams[thread]
                peer.close()
                self._falter(error)

    def _falter(self, error: Exception) -> None:
        """Out of descriptors or threads: those that come later may be luckier, so the port stays."""
        if not self._closing:
            log.warning("port %s: %s", self.port, error)
            time.sleep(POLL_S)

    def _serve(self, stream: _Stream) -> None:
        try:
            stream.run(self._remote, self._target)
        except ConnectionLost as error:
            log.info("%s", error.message)
        finally:
            with self._lock:
                del self._streams[threading.current_thread()]


class _Stream:
    """One forwarded connection. Each direction ends by itself; what is cut off ends in a reset, never as if whole."""

    def __init__(self, peer: socket.socket, source: tuple[str, int]) -> None:
        self._peer = peer
        self._source = source

    def run(self, remote: SshRemote, target: tuple[str, int]) -> None:
        """Forward until both directions have ended. Raises ConnectionLost when it cannot begin."""
        with self._peer:
            try:
                self._peer.settimeout(None)
                self._peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                channel = remote.forward(target, self._source)
            except OSError:
                return  # the peer has left already
            except ConnectionLost:
                self._cut()
                raise
            try:
                down = threading.Thread(target=self._down, args=(channel,), name=f"down-{self._source[1]}", daemon=True)
                down.start()
                self._up(channel)
                down.join()
            except RuntimeError as error:  # out of threads
                self._cut()
                raise ConnectionLost(f"a stream could not begin: {error}") from error
            finally:
                _close(channel)

    def abandon(self) -> None:
        """Wake also who waits for a local peer that does not read."""
        self._cut()
        _shut(self._peer, socket.SHUT_RDWR)

    def _up(self, channel: paramiko.Channel) -> None:
        try:
            while data := self._peer.recv(UP):
                channel.sendall(data)
            channel.shutdown_write()
        except (paramiko.SSHException, OSError, EOFError):
            _close(channel)

    def _down(self, channel: Any) -> None:
        try:
            while data := channel.recv(DOWN):
                self._peer.sendall(data)
        except (paramiko.SSHException, OSError, EOFError):
            _close(channel)
        if channel.eof_received:
            _shut(self._peer, socket.SHUT_WR)
        else:
            self._cut()

    def _cut(self) -> None:
        """Make the coming close a reset, and wake whoever waits for the local peer."""
        try:
            self._peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._peer.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # it is gone


def _shut(peer: socket.socket, how: int) -> None:
    try:
        peer.shutdown(how)
    except OSError:
        pass  # it is gone


def _close(channel: paramiko.Channel) -> None:
    try:
        channel.close()
    except (paramiko.SSHException, OSError, EOFError):
        pass  # its connection is gone
