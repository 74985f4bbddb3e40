"""A box and a keeper without processes: scripted answers to the commands that `install` sends, and a real listener."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from selfhost_cli import install
from selfhost_cli.attach import Front
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Endpoint, Rental
from selfhost_cli.remote import ConnectionLost, NotYet, OtherKey, Remote, Result


@dataclass
class FakeBox:
    """What every box of a test answers. `refusals` connections are refused before the first one works."""

    armed: str = "ok"
    archive: str = ""
    install_code: int = 0
    install_status: str = "fail"
    refusals: int = 0
    lines: tuple[str, ...] = ()
    """What install.sh says, one `before("line")` ahead of each."""
    losses: int = 0
    """So often the connection breaks in the middle of the install."""
    connections: list[Endpoint] = field(default_factory=list)
    keys: list[tuple[str, ...]] = field(default_factory=list)
    """The host keys that were accepted at each try to connect."""
    shown: dict[Endpoint, str] = field(default_factory=dict)
    """The host key of each sshd; in the beginning the one that onstart brought."""
    follows: dict[Endpoint, str] = field(default_factory=dict)
    """The one that the box made beside it."""
    deaf: int = 0
    """So often sshd does not hear that it has another host key."""
    makes_keys: bool = True
    uploads: list[bytes] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    """What the engine's launcher has come to, look after look; the last one stays."""
    limits: dict[Endpoint, str] = field(default_factory=dict)
    """What limits.sh was told last."""
    limits_code: int = 0
    before: Callable[[str], None] = lambda verb: None

    def connect(self, endpoint: Endpoint, host_keys: Sequence[str], login_key: Path) -> Remote:
        self.before("connect")
        assert not isinstance(host_keys, str)
        self.keys.append(tuple(host_keys))
        if self.refusals:
            self.refusals -= 1
            raise NotYet(f"{endpoint}: connection refused")
        if self.shown.setdefault(endpoint, bare(host_keys[0])) not in map(bare, host_keys):
            raise OtherKey(f"{endpoint} shows another host key than this box has")
        self.connections.append(endpoint)
        return _Connection(self, endpoint)

    def replace_key(self, endpoint: Endpoint, verb: str, key: str) -> Result:
        """hostkey.sh."""
        self.before(verb)
        if not self.makes_keys:
            return Result(1, "", "hostkey.sh: no host key can be made\n")
        if verb == "make":
            if self.shown[endpoint] != key:
                return Result(0, f"{self.shown[endpoint]}\n", "")
            made = f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{secrets.token_hex(22)[:43]}"
            return Result(0, self.follows.setdefault(endpoint, made) + "\n", "")
        if self.follows.get(endpoint) != key and self.shown[endpoint] != key:
            return Result(1, "", "hostkey.sh: the key that is to follow is another one\n")
        if self.deaf:
            self.deaf -= 1
        else:
            self.shown[endpoint] = key
        return Result(0, "", "")


def bare(key: str) -> str:
    """Without its comment."""
    return " ".join(key.split()[:2])


class _Connection:
    def __init__(self, box: FakeBox, endpoint: Endpoint) -> None:
        self._box = box
        self._endpoint = endpoint
        self._open = True

    def run(self, command: str, *, timeout: float = 60.0, on_line: Callable[[str], None] | None = None) -> Result:
        if not self._open:
            raise ConnectionLost("closed")
        self._box.before("run")
        if command.startswith(install.HOST_KEY):
            verb, key = command.removeprefix(install.HOST_KEY).strip().split(" ", 1)
            return self._box.replace_key(self._endpoint, verb, key.strip("'"))
        if command.startswith(install.LIMITS):
            self._box.before("limits")
            self._box.limits[self._endpoint] = command.removeprefix(install.LIMITS).strip()
            return Result(self._box.limits_code, "", "limits.sh: no\n" if self._box.limits_code else "")
        if command == install.ARMED:
            return Result(0, self._box.armed + "\n", "")
        if command == install.ARCHIVE:
            return Result(0, f"{self._box.archive}\n", "")
        if command == install.SHAPE and self._box.shapes:
            return Result(0, self._box.shapes.pop(0) if len(self._box.shapes) > 1 else self._box.shapes[0], "")
        if command == install.PROXY_PORT:
            return Result(0, "8000\n", "")
        if command.startswith(install.INSTALL):
            for line in self._box.lines:
                self._box.before("line")
                if on_line:
                    on_line(line)
            if self._box.losses:
                self._box.losses -= 1
                raise ConnectionLost("the connection to the box broke")
            if on_line and self._box.install_code:
                on_line(f"@selfhost\tmodel\t{self._box.install_status}\t\t\tthe disk is full")
            return Result(self._box.install_code, "", "")
        return Result(0, "", "")

    def put(self, data: bytes, path: str, *, mode: int = 0o600) -> None:
        self._box.before("put")
        self._box.uploads.append(data)

    def close(self) -> None:
        self._open = False


@dataclass
class FakeKeeper:
    """`lifecycle.Keeper` that reads the ledger as the real one does; `front` is served by `serving()`."""

    ledger: Ledger
    front: Front
    blind: bool = False
    starts: int = 0
    prewarmed: list[str] = field(default_factory=list)

    def start(self) -> Front:
        self.starts += 1
        return self.front

    def watched(self) -> set[str]:
        return set() if self.blind else {rental.label for rental in self.ledger.live()}

    def prewarm(self, rental: Rental) -> None:
        self.prewarmed.append(rental.label)

    def tunnel(self, label: str) -> tuple[str, str]:
        return "up", ""


def healthy(model: str, context: int, engine: str = "llamacpp", **facts: object) -> dict[str, object]:
    """What the proxy on a box answers to /health; `facts` are what its engine says of itself."""
    parts = {"proxy": {"status": "healthy"}, engine: {"status": "healthy", **facts}}
    box = {"status": "healthy", "version": "1", "engine": engine, "model": model, "context": context}
    return {**box, "components": parts}


TOKEN = (200, {"type": "message", "content": [], "usage": {"input_tokens": 5, "output_tokens": 2}})


def serving(model: str, context: int, engine: str = "llamacpp", **facts: object) -> AbstractContextManager[Front]:
    """A front with a healthy box behind it that generates one token; `facts` are what its engine says of itself."""
    return answering(healthy(model, context, engine, **facts))


@contextmanager
def answering(box: object, token: tuple[int, object] = TOKEN) -> Iterator[Front]:
    """A front whose box says that of its health, and answers a message with this status and body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, {"status": "healthy", "keeper": {}, "box": box})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._reply(*token)

        def _reply(self, status: int, body: object) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        port = server.server_address[1]
        yield Front(f"http://127.0.0.1:{port}", port, "front-token")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
