"""What an error of the market becomes: one line, and never our key, whatever call it answers."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from selfhost_cli.errors import MarketError
from selfhost_cli.model import BoxSpec, Need
from selfhost_cli.providers.vast import VastProvider
from tests.fakes.clock import FakeClock
from tests.fakes.market import make_offer

KEY = "an-account-key-of-ours"
SPEC = BoxSpec(label="selfhost-a-1", image="i", disk_gb=30.0, onstart="true", env={})


class Echo(BaseHTTPRequestHandler):
    """Says in its error what it was sent, in two lines, or in so many characters that the key is at their limit."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        status, wide, shape = self.server.says  # type: ignore[attr-defined]
        told = f"{'x' * wide} {self.headers['authorization']}\n✓ nothing is billed any more"
        body = {"json": json.dumps({"success": False, "error": "bad_request", "msg": told}), "text": told}[
            shape
        ].encode()
        self.send_response(status)
        self.send_header("content-type", "application/json" if shape == "json" else "text/plain")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield server
    server.shutdown()
    server.server_close()


CALLS: dict[str, Callable[[VastProvider], object]] = {
    "account": lambda market: market.account(),
    "offers": lambda market: market.offers(Need(disk_gb=10.0, hours=1.0)),
    "create": lambda market: market.create(make_offer(), SPEC),
    "instances": lambda market: market.instances("selfhost-"),
    "get": lambda market: market.get(7),
    "destroy": lambda market: market.destroy(7),
    "register_key": lambda market: market.register_key("ssh-ed25519 AAAA"),
    "attach_key": lambda market: market.attach_key(7, "ssh-ed25519 AAAA"),
    "charges": lambda market: market.charges([7], 0.0),
}


class Parrot(Echo):
    """Lists a box and an offer that hold what it was sent in every text, and as a number."""

    def answer(self) -> None:
        said = self.headers["authorization"]
        row = {"id": 7, "label": "selfhost-1", "status_msg": said, "gpu_name": said, "actual_status": said}
        rows = [row, row | {"id": 8, "machine_id": said}]
        told = {"success": True, "instances": rows, "next_token": None, "credit": 1.0, "offers": [{"gpu_name": said}]}
        told |= {"results": [{"source": "instance-7", "items": [{"type": "gpu", "amount": said}]}]}
        if self.path.startswith("/api/v0/users"):
            told["id"] = said
        elif "/instances/7/" in self.path:
            told["instances"] = rows[0]
        self.rfile.read(int(self.headers.get("content-length") or 0))
        deep = self.server.deep  # type: ignore[attr-defined]
        body = b"[" * 200_000 if deep else json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = answer


@pytest.fixture(params=[False, True], ids=["everywhere", "deep"])
def parrot(request: pytest.FixtureRequest) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Parrot)
    server.deep = request.param  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("call", CALLS)
def test_a_market_that_repeats_our_key_in_a_list_does_not_get_it_shown(parrot: ThreadingHTTPServer, call: str) -> None:
    market = VastProvider(KEY, f"http://127.0.0.1:{parrot.server_port}", env=dict(os.environ), clock=FakeClock())
    try:
        said = repr(CALLS[call](market))
    except MarketError as error:
        said = f"{error.message} {error.remedy}"
    assert KEY[:8] not in said


@pytest.mark.parametrize(
    "says", [(400, 0, "json"), (401, 0, "json"), (500, 0, "text"), (400, 262, "text"), (200, 0, "json")]
)
@pytest.mark.parametrize("call", CALLS)
def test_an_error_is_one_line_without_our_key(echo: ThreadingHTTPServer, call: str, says: tuple[int, int, str]) -> None:
    echo.says = says  # type: ignore[attr-defined]
    market = VastProvider(KEY, f"http://127.0.0.1:{echo.server_port}", env=dict(os.environ), clock=FakeClock())
    with pytest.raises(MarketError) as caught:
        CALLS[call](market)
    for said in (caught.value.message, caught.value.remedy):
        assert KEY[:8] not in said
        assert "\n" not in said
