"""Logins at a real sshd over a wire that fails in the middle of one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from selfhost_cli.keeper.links import LinkState
from selfhost_cli.model import Endpoint
from tests.integration.conftest import Box, Watch
from tests.waiting import until

pytestmark = pytest.mark.box


class Mute:
    """A wire to sshd. Of the first `count` connections it carries our greeting and nothing more, but all of theirs."""

    def __init__(self, target: Endpoint, count: float) -> None:
        self.carried = 0
        self._target, self._count = target, count
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint(*self._listener.getsockname())
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for end in (self._listener, *self._ends):
            shut(end)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.carried += 1
            threading.Thread(target=self._carry, args=(near, self.carried <= self._count), daemon=True).start()

    def _carry(self, near: socket.socket, mute: bool) -> None:
        with near, socket.create_connection(self._target) as far:
            self._ends += [near, far]
            back = threading.Thread(target=self._pump, args=(far, near), daemon=True)
            back.start()
            greeting, end, rest = near.recv(65536).partition(b"\n")
            far.sendall(greeting + end + (b"" if mute else rest))
            self._pump(near, None if mute else far)
            shut(far)
            back.join()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket | None) -> None:
        try:
            while data := source.recv(65536):
                if sink:
                    sink.sendall(data)
        except OSError:
            pass  # ended already
        if sink:
            shut(sink)


def shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # ended already


@pytest.fixture
def mute(box: Box, request: pytest.FixtureRequest) -> Iterator[Mute]:
    wire = Mute(box.endpoint, request.param)
    yield wire
    wire.close()


@pytest.mark.parametrize("mute", [1], indirect=True)
def test_a_login_that_is_swallowed_is_left_for_another_one(watch: Watch, mute: Mute) -> None:
    began = time.monotonic()
    assert watch(mute.endpoint).when(LinkState.UP) - began <= 4
    assert mute.carried == 2


@pytest.mark.parametrize("mute", [float("inf")], indirect=True)
def test_a_link_is_stopped_though_its_login_is_not_answered(watch: Watch, mute: Mute) -> None:
    link = watch(mute.endpoint).link
    until(lambda: mute.carried)
    link.stop()
    link.join(2)
    assert link.state is LinkState.STOPPED
