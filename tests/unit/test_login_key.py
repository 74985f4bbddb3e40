from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from selfhost_cli.errors import NotSetUp
from selfhost_cli.keeper.links import Link
from selfhost_cli.model import Endpoint
from selfhost_cli.remote.ssh import connect, log_in, make_key, public_half
from tests.fakes.rental import make_rental
from tests.waiting import until

NOBODY = Endpoint("127.0.0.1", 9)  # the discard port: nothing listens there


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_the_public_half_is_the_one_that_was_made_with_it(tmp_path: Path) -> None:
    private, public = make_key("me")
    assert f"{public_half(write(tmp_path / 'key', private.encode()))} me" == public


@pytest.mark.parametrize("place", range(40, 400, 30))
def test_a_key_with_a_damaged_byte_is_named(tmp_path: Path, place: int) -> None:
    private = bytearray(make_key("me")[0].encode())
    private[place] ^= 0x80
    with pytest.raises(NotSetUp, match=f"the login key {tmp_path / 'key'} cannot be used"):
        public_half(write(tmp_path / "key", private))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotSetUp, match="No such file"):
        public_half(tmp_path / "key")


def greet(listener: socket.socket) -> None:
    with listener.accept()[0] as peer:
        peer.sendall(b"SSH-2.0-box\r\n")


def test_a_damaged_key_is_not_blamed_on_the_box(tmp_path: Path) -> None:
    key, (_, host) = write(tmp_path / "key", b"garbage"), make_key("host")
    with pytest.raises(NotSetUp):
        connect(NOBODY, host, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        greeting = threading.Thread(target=greet, args=(listener,))
        greeting.start()
        rental = make_rental(endpoint=Endpoint(*listener.getsockname()))
        link = Link(rental, lambda rental, endpoint, sock: log_in(sock, endpoint, host, key), lambda rental: ())
        link.start()
        try:
            until(lambda: "login key" in link.reason)
        finally:
            link.stop()
            link.join(20)
            greeting.join()
