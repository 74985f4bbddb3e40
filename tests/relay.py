"""A wire between a client and a port of this machine, which a test can cut, freeze or let swallow everything."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from selfhost_cli.model import Endpoint


class Relay:
    """Forwards connections to 127.0.0.1:`target`, which may change."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint(*self._listener.getsockname())
        self._open = threading.Event()
        self._open.set()
        self._stranded = threading.Event()
        self._ends: set[socket.socket] = set()
        self._closing = False
        self.chunk_s = 0.0
        """How long 64 KB take in each direction."""
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def swallowing(self) -> Iterator[None]:
        """Nothing passes and nobody is told, as when a laptop changes its network; then it goes on."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def strand(self) -> None:
        """Every connection that is there goes silent for good, as when a router forgot it; new ones pass."""
        self._stranded.set()
        self._stranded = threading.Event()

    def forget(self) -> None:
        """End every connection that is there, from both sides."""
        for end in list(self._ends):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # ended already

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        self._open.set()
        self.forget()

    def _accept(self) -> None:
        while not self._closing:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near:
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            with far:
                self._ends |= {near, far}
                stranded = self._stranded
                back = threading.Thread(target=self._pump, args=(far, near, stranded), daemon=True)
                back.start()
                self._pump(near, far, stranded)
                back.join()
                self._ends -= {near, far}

    def _pump(self, source: socket.socket, sink: socket.socket, stranded: threading.Event) -> None:
        try:
            while data := source.recv(65536):
                time.sleep(self.chunk_s)
                self._open.wait()
                if not stranded.is_set():
                    sink.sendall(data)
        except OSError:
            pass
        self._open.wait()
        if stranded.is_set() and not self._closing:
            return
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # ended already
