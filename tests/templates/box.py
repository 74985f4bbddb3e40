"""A box for script tests: a temporary home and root, a PATH of chosen tools, and servers on loopback.

The scripts are the shipped ones. Only what they start is a stand-in: small Python programs instead of engine and proxy.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from selfhost_cli import payload

T = TypeVar("T")

TOOLS = (
    "sh bash env id mkdir rm mv cp cat cut date sleep stat sort tail grep sed tr awk mawk gawk df od touch chmod chown"
    " head uname ln find dirname basename base64 gzip tee mkfifo setsid nohup flock curl sha256sum true kill ps ls"
    " readlink"
)


def eventually(look: Callable[[], T], seconds: float = 10.0) -> T:
    """The first true answer of `look`; fails with its last one when the time is over."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s; last seen: {seen!r}"
        time.sleep(0.02)
    return seen


def key_pair() -> tuple[str, str]:
    """A new ed25519 pair in OpenSSH's formats, as the product makes them."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private.decode(), public.decode()


@dataclass
class Box:
    """A directory that acts as a box. `env` is what the market would give the container."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for folder in (self.home, self.root, self.tools):
            folder.mkdir(parents=True)
        for tool in TOOLS.split():
            if found := shutil.which(tool):
                (self.tools / tool).symlink_to(found)
        # The test's own interpreter: it has a recent pip, and no shim in front of it.
        self.tool("python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        self.env = {
            "HOME": str(self.home),
            "PATH": str(self.tools),
            "SELFHOST_ROOT": str(self.root),
            "SELFHOST_TICK_S": "0.1",
            "SELFHOST_PATIENCE_S": "0",
            "SELFHOST_NET_DEV": str(self.root / "net_dev"),
            "CONTAINER_ID": "4711",
            "CONTAINER_API_KEY": "box-key-0123456789",
            **self.env,
        }

    @property
    def home(self) -> Path:
        return self.path / "home"

    @property
    def root(self) -> Path:
        return self.path / "root"

    @property
    def tools(self) -> Path:
        return self.path / "tools"

    @property
    def dir(self) -> Path:
        return self.home / ".selfhost"

    @property
    def run(self) -> Path:
        return self.dir / "run"

    def tool(self, name: str, text: str) -> None:
        path = self.tools / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def text(self, name: str) -> str:
        """The stripped content of a file below ~/.selfhost, "" when it is not there (yet)."""
        try:
            return (self.dir / name).read_text().strip()
        except FileNotFoundError:
            return ""

    def start(self, onstart: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A container start. Returns when onstart ended and nothing holds its output any more."""
        file = self.path / "onstart.sh"
        file.write_text(onstart)
        return self.sh(str(file), **env)

    def sh(self, *args: str, timeout: float = 30, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", *args],
            cwd=self.home,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def put_parts(self) -> None:
        """The scripts as uploaded, and stand-ins for what they start."""
        bin_ = self.dir / "bin"
        bin_.mkdir(parents=True, exist_ok=True)
        for name in ("install.sh", "start.sh", "stop.sh"):
            (bin_ / name).write_bytes(payload.script(name))
        (bin_ / "llamacpp.py").write_text(STUB_ENGINE)
        (bin_ / "ollama.py").write_bytes(payload.script("ollama.py"))
        (bin_ / "proxy.zip").write_bytes(stub_proxy_zip())

    def processes(self) -> list[int]:
        """Everything that still runs with this home, or one inside of it."""
        mark = f"\0HOME={self.home}".encode()
        return [pid for pid in all_pids() if mark in b"\0" + _read(pid, "environ")]

    def kill_all(self) -> None:
        """By pid, again and again, because a loop may just be starting its part."""

        def gone() -> bool:
            for pid in self.processes():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            return not self.processes()

        eventually(gone)


def all_pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != 1]


def command_line(pid: int) -> str:
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


class Server:
    """A real HTTP server on a free loopback port, ended by `close`."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self._thread = threading.Thread(target=self.http.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self._thread.join()
        self.http.server_close()


class Market(Server):
    """Records every call; answers with `status(method, body)`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.auth: set[str | None] = set()
        self.seen_in_ps: list[str] = []
        self.status: Callable[[str, str], int] = lambda method, body: 200
        market = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                market.auth.add(self.headers.get("Authorization"))
                # curl waits for us: whoever looks at the process list now sees what it was called with.
                market.seen_in_ps += [line for pid in all_pids() if "curl" in (line := command_line(pid))]
                market.calls.append((self.command, self.path, body))
                self.send_response(market.status(self.command, body))
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_PUT = do_DELETE = answer

            def log_message(self, *args: object) -> None: ...

        super().__init__(Handler)

    def count(self, method: str, body: str) -> int:
        return sum(1 for call in self.calls if (call[0], call[2]) == (method, body))


class Files(Server):
    """Serves bytes with Range. `cut_at` breaks the first answer so long there, `stall_at` lets it hang there.

    `slow_at`: from there on it comes with `drop` bytes every 20 ms; so do the next ones, `slows` in all.
    """

    def __init__(self, content: dict[str, bytes]) -> None:
        self.ranges: list[str | None] = []
        self.asked: list[str] = []
        self.cut_at: int | None = None
        self.stall_at: int | None = None
        self.slow_at: int | None = None
        self.drop, self.slows = 500, 1
        self.resume = threading.Event()
        files = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                data = content.get(self.path.partition("?")[0])
                self.send_response(200 if data is not None else 404)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()

            def do_GET(self) -> None:
                data = content.get(self.path.partition("?")[0])
                files.asked.append(self.path)
                if data is None:
                    self.send_error(404)
                    return
                asked = self.headers.get("Range")
                files.ranges.append(asked)
                begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                self.send_response(206 if asked else 200)
                if asked:
                    self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - begin))
                self.end_headers()
                end = max(begin, files.cut_at or files.stall_at or files.slow_at or len(data))
                stalls = slow = False
                if end < len(data):
                    stalls, slow = files.stall_at is not None, files.slow_at is not None
                    files.cut_at = files.stall_at = None
                    files.slows -= slow
                    files.slow_at = files.slow_at if files.slows else None
                try:
                    self.wfile.write(data[begin:end])
                    if stalls:
                        files.resume.wait(30)
                        self.wfile.write(data[end:])
                    while slow and end < len(data):
                        self.wfile.write(data[end : end + files.drop])
                        end += files.drop
                        files.resume.wait(0.02)
                except OSError:
                    pass  # the client gave up on us, as it should
                self.close_connection = True

            def log_message(self, *args: object) -> None: ...

        super().__init__(Handler)

    def close(self) -> None:
        self.resume.set()
        super().close()


def wheel(folder: Path, name: str = "tinypart", version: str = "1.0") -> None:
    """A wheel that needs no index: one empty module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": b"",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for path, data in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)


_SERVE = """
import json, os, pathlib, sys, urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer


def serve(port_file, handler):
    file = pathlib.Path(port_file)
    old = int(file.read_text()) if file.exists() else 0
    try:
        server = HTTPServer(("127.0.0.1", old), handler)
    except OSError:
        server = HTTPServer(("127.0.0.1", 0), handler)
    new = file.with_suffix(".new")
    new.write_text(str(server.server_port))
    new.replace(file)
    server.serve_forever()
"""

STUB_ENGINE = (
    _SERVE
    + """
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert set(args) == {"--model", "--alias", "--context", "--slots", "--kv-cache-type", "--port-file"}, args
assert "SELFHOST_TOKEN" not in os.environ and "CONTAINER_API_KEY" not in os.environ
assert pathlib.Path(args["--model"]).read_bytes()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(args).encode())


serve(args["--port-file"], Handler)
"""
)

STUB_PROXY = (
    _SERVE
    + """
if os.environ["SELFHOST_PROXY_REQUIREMENTS"]:
    import tinypart  # only its own venv has it
run = sys.argv[sys.argv.index("--run-dir") + 1]


def engine_is_ready():
    try:
        port = pathlib.Path(run, "engine.port").read_text().strip()
        if os.environ["SELFHOST_ENGINE"] != "ollama":
            return True
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/ps", timeout=5) as reply:
            return json.load(reply)["models"] != []
    except OSError:
        return False


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer " + os.environ["SELFHOST_TOKEN"]
        self.send_response(200 if known else 401)
        self.end_headers()
        status = "healthy" if engine_is_ready() else "degraded"
        self.wfile.write(json.dumps({"status": status, "components": {"x": {"status": "healthy"}}}).encode())


serve(run + "/proxy.port", Handler)
"""
)


def stub_proxy_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path, text in {
            "selfhost_cli/__init__.py": "",
            "selfhost_cli/proxy/__init__.py": "",
            "selfhost_cli/proxy/__main__.py": STUB_PROXY,
        }.items():
            archive.writestr(zipfile.ZipInfo(path), text)
    return out.getvalue()
