"""How commands find the keeper: only a listener that proves itself is told the token."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from aiohttp import web

from selfhost_cli import attach, config
from selfhost_cli.errors import SelfhostError
from selfhost_cli.proxy.front import Away, build_front
from selfhost_cli.proxy.web import runner
from tests.fakes.front import StubFront

TOKEN = "the-token-of-the-front"


@pytest.fixture
def settings(tmp_path: Path) -> config.Settings:
    settings = config.load("default", env={"SELFHOST_HOME": str(tmp_path)})
    settings.paths.make()
    return settings


@pytest.fixture
def paths(settings: config.Settings) -> config.Paths:
    return settings.paths


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def announce(paths: config.Paths, port: object, token: str = TOKEN) -> None:
    paths.keeper_file.write_text(json.dumps({"pid": 1, "port": port, "version": "0.0.9"}))
    paths.front_token.write_text(token)


def test_a_listener_that_proves_itself_is_found_and_not_told_the_token(paths: config.Paths) -> None:
    with StubFront(TOKEN) as front:
        announce(paths, front.port)
        found = attach.find(paths)
    assert found == attach.Front(f"http://127.0.0.1:{front.port}", front.port, TOKEN)
    assert TOKEN not in repr(found)
    assert [(name, header) for name, header, _body in front.seen] == [("prove", None)]


def test_the_real_front_proves_itself_and_takes_calls(paths: config.Paths) -> None:
    """Both sides of the proof are written apart, because the front also runs where our other modules are not."""

    async def state(body: dict[str, Any]) -> dict[str, Any]:
        return {"rentals": [], "asked": body}

    async def serve() -> tuple[attach.Front | None, dict[str, Any], str]:
        front = build_front(TOKEN, lambda: Away("away", "testing"), dict, lambda usage: None, {"state": state})
        host = runner(front)
        await host.setup()
        site = web.TCPSite(host, "127.0.0.1", 0)
        await site.start()
        announce(paths, host.addresses[0][1])
        try:
            found = await asyncio.to_thread(attach.find, paths)
            assert found
            answer = await asyncio.to_thread(attach.call, found, "state", {"a": 1})
            with pytest.raises(SelfhostError) as caught:
                await asyncio.to_thread(attach.call, replace(found, token="wrong"), "state")
            return found, answer, caught.value.message
        finally:
            await host.cleanup()

    found, answer, refusal = asyncio.run(serve())
    assert found
    assert answer == {"rentals": [], "asked": {"a": 1}}
    assert "refused 'state': 401" in refusal


def test_every_proof_is_asked_for_with_a_new_nonce(paths: config.Paths) -> None:
    with StubFront(TOKEN) as front:
        announce(paths, front.port)
        attach.find(paths)
        attach.find(paths)
    nonces = [body["nonce"] for _name, _header, body in front.seen]
    assert len(set(nonces)) == 2
    assert all(len(bytes.fromhex(nonce)) == 32 for nonce in nonces)


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"proof": "0" * 64}),
        (200, {"proof": "é" * 64}),
        (200, {"proof": None}),
        (200, ["proof"]),
        (200, b"<html>hello</html>"),
        (200, b""),
        (404, {"error": "what?"}),
    ],
)
def test_a_listener_without_the_right_proof_is_not_ours(paths: config.Paths, answer: tuple[int, object]) -> None:
    with StubFront(TOKEN, {"prove": answer}) as front:
        announce(paths, front.port)
        assert attach.find(paths) is None
    assert not any(header for _name, header, _body in front.seen)


def test_a_listener_with_another_token_is_not_ours(paths: config.Paths) -> None:
    with StubFront("another") as front:
        announce(paths, front.port)
        assert attach.find(paths) is None


def test_a_relay_to_the_real_front_on_another_port_is_refused(paths: config.Paths) -> None:
    with StubFront(TOKEN) as front:

        class Relay(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                onward = http.client.HTTPConnection("127.0.0.1", front.port)
                onward.request("POST", self.path, self.rfile.read(int(self.headers["Content-Length"])))
                answer = onward.getresponse()
                self.send_response(answer.status)
                self.end_headers()
                self.wfile.write(answer.read())
                onward.close()

            def log_message(self, format: str, *args: object) -> None:
                pass

        with HTTPServer(("127.0.0.1", 0), Relay) as relay:
            thread = Thread(target=relay.handle_request)
            thread.start()
            announce(paths, relay.server_address[1])
            assert attach.find(paths) is None
            thread.join()
    assert [name for name, _header, _body in front.seen] == ["prove"], "the relay did reach the real front"


class RawListener:
    """Sends every visitor the same bytes, again and again when `endless`."""

    def __init__(self, answer: bytes, *, endless: bool = False) -> None:
        self._answer, self._endless = answer, endless

    def __enter__(self) -> int:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = Thread(target=self._serve)
        self._thread.start()
        return int(self._listener.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        visitor = self._listener.accept()[0]
        with visitor:
            try:
                visitor.recv(65_536)
                visitor.sendall(self._answer)
                while self._endless:
                    visitor.sendall(self._answer)
            except OSError:
                pass  # the visitor has left


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 2OO OK\r\n\r\n{}", b"\xff" * 999]
)
def test_something_that_does_not_speak_http_is_not_ours(paths: config.Paths, answer: bytes) -> None:
    with RawListener(answer) as port:
        announce(paths, port)
        assert attach.find(paths) is None
    with RawListener(answer) as port, pytest.raises(SelfhostError, match="does not answer 'state': the answer is not"):
        attach.call(attach.Front("http://x", port, TOKEN), "state")


def test_an_answer_without_end_is_given_up(paths: config.Paths) -> None:
    with RawListener(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 65_536, endless=True) as port:
        announce(paths, port)
        assert attach.find(paths) is None


def test_a_listener_that_never_answers_is_given_up(paths: config.Paths) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        announce(paths, listener.getsockname()[1])
        assert attach.find(paths, timeout=0.05) is None


def test_without_a_listener_nothing_is_found(paths: config.Paths, free_port: int) -> None:
    announce(paths, free_port)
    assert attach.find(paths) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "{}", '{"port": "8001"}', '{"port": 0}', '{"port": 70000}', "\xff"]
)
def test_a_strange_keeper_file_means_no_keeper(paths: config.Paths, text: str) -> None:
    paths.keeper_file.write_text(text, encoding="latin-1")
    paths.front_token.write_text(TOKEN)
    assert attach.find(paths) is None


def test_finding_makes_neither_files_nor_directories(tmp_path: Path) -> None:
    assert attach.find(config.paths("default", {"SELFHOST_HOME": str(tmp_path / "home")})) is None
    assert list(tmp_path.iterdir()) == []


def test_the_token_is_made_once_and_for_the_owner_only(paths: config.Paths) -> None:
    before = os.umask(0)
    try:
        token = attach.front_token(paths)
    finally:
        os.umask(before)
    assert len(token) >= 40
    assert stat.S_IMODE(paths.front_token.stat().st_mode) == 0o600
    assert attach.front_token(paths) == token
    assert [path.name for path in paths.state.iterdir()] == [paths.front_token.name]


def test_an_empty_token_file_is_an_error_and_never_a_token(paths: config.Paths) -> None:
    paths.front_token.write_text("\n")
    assert attach.find(paths) is None
    with pytest.raises(SelfhostError, match=r"front\.token holds no token"):
        attach.front_token(paths)


def test_a_call_carries_the_token_and_returns_the_answer() -> None:
    with StubFront(TOKEN, {"state": (200, {"rentals": []})}) as front:
        answer = attach.call(attach.Front("http://x", front.port, TOKEN), "state", {"label": "a"})
    assert answer == {"rentals": []}
    assert front.seen == [("state", f"Bearer {TOKEN}", {"label": "a"})]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            (401, {"type": "error", "error": {"type": "authentication_error", "message": "wrong token"}}),
            "401 wrong token",
        ),
        ((500, b"oops"), "500"),
        ((200, []), "200"),
        ((200, b"oops"), "200"),
    ],
)
def test_a_refused_call_says_what_was_answered(answer: tuple[int, object], said: str) -> None:
    with (
        StubFront(TOKEN, {"state": answer}) as front,
        pytest.raises(SelfhostError, match=f"refused 'state': {said}$"),
    ):
        attach.call(attach.Front("http://x", front.port, TOKEN), "state")


def test_a_call_to_nobody_is_an_error(free_port: int) -> None:
    with pytest.raises(SelfhostError, match="does not answer 'state'"):
        attach.call(attach.Front("http://x", free_port, TOKEN), "state")


def test_a_call_uses_no_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port}")
    with StubFront(TOKEN, {"state": (200, {})}) as front:
        assert attach.call(attach.Front("http://x", front.port, TOKEN), "state") == {}


KEEPER = """
import hashlib, hmac, json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
state = {state!r}
print("the keeper speaks", flush=True)
print(json.dumps({{
    "argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), "pid": os.getpid(), "ppid": os.getppid(),
    "sid": os.getsid(0), "stdin": os.readlink("/proc/self/fd/0"), "fds": sorted(map(int, os.listdir("/proc/self/fd"))),
}}), file=open(state + "/seen.json", "w"), flush=True)
{then}
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        nonce = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["nonce"]
        key = open(state + "/front.token").read().encode()
        signed = f"selfhost-prove\\n{{nonce}}\\n{{port}}".encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"proof": hmac.new(key, signed, hashlib.sha256).hexdigest()}}).encode())
server = HTTPServer(("127.0.0.1", 0), Handler)
port = server.server_address[1]
open(state + "/draft", "w").write(json.dumps({{"pid": os.getpid(), "port": port, "version": "9"}}))
os.rename(state + "/draft", state + "/keeper.json")
server.serve_forever()
"""


class KeeperProgram:
    """Puts a program in the keeper's place: `python -m selfhost_cli.keeper` runs it in the processes that we start."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: config.Paths) -> None:
        self.place = tmp_path / "instead"
        self.seen = paths.state / "seen.json"
        self.state = paths.state
        self.place.mkdir()
        hook = f"import sys\nif '--profile' in sys.orig_argv:\n    sys.path.insert(0, {str(self.place)!r})\n"
        (self.place / "sitecustomize.py").write_text(hook)
        (self.place / "selfhost_cli").mkdir()
        (self.place / "selfhost_cli" / "__init__.py").touch()
        monkeypatch.setenv("PYTHONPATH", str(self.place))

    def write(self, then: str = "") -> None:
        (self.place / "selfhost_cli" / "keeper.py").write_text(KEEPER.format(state=str(self.state), then=then))

    def stop(self) -> None:
        if self.seen.exists():
            try:
                os.kill(json.loads(self.seen.read_text())["pid"], signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: config.Paths) -> Iterator[KeeperProgram]:
    program = KeeperProgram(tmp_path, monkeypatch, paths)
    yield program
    program.stop()


def test_ensure_uses_the_keeper_that_runs_whatever_its_version(settings: config.Settings) -> None:
    with StubFront(TOKEN) as front:
        announce(settings.paths, front.port)
        assert attach.ensure(settings).port == front.port


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ensure_starts_a_keeper_that_has_nothing_of_ours(
    settings: config.Settings, keeper: KeeperProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "secret")
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    monkeypatch.setenv("VAST_API_KEY", "needed")
    monkeypatch.setenv("SELFHOST_IDLE", "7")
    keeper.write()
    flags = config.load("default", env={"SELFHOST_HOME": str(settings.paths.state.parents[1])}, flags={"port": 8123})
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        front = attach.ensure(flags)
    finally:
        os.close(reading)
        os.close(writing)
    seen = json.loads(keeper.seen.read_text())
    assert attach.find(settings.paths) == front
    assert seen["argv"] == ["--profile", "default"]
    assert (seen["cwd"], seen["stdin"]) == ("/", "/dev/null")
    assert len(seen["fds"]) <= 5, "stdin, stdout, stderr, its own seen.json and the listing of /proc"
    assert seen["sid"] != os.getsid(0)
    assert seen["ppid"] != os.getpid(), "whom we become would never reap it"
    assert "secret" not in seen["env"].values()
    assert (seen["env"]["VAST_API_KEY"], seen["env"]["SELFHOST_IDLE"], seen["env"]["SELFHOST_PORT"]) == (
        "needed",
        "7",
        "8123",
    )
    assert "the keeper speaks" in settings.paths.keeper_log.read_text()
    assert stat.S_IMODE(settings.paths.keeper_log.stat().st_mode) == 0o600


def test_a_keeper_that_ends_at_once_is_reported_with_its_last_words(
    settings: config.Settings, keeper: KeeperProgram
) -> None:
    keeper.write("sys.exit('the ledger is broken')")
    with pytest.raises(SelfhostError, match="the keeper does not run") as caught:
        attach.ensure(settings, timeout=5)
    assert "the ledger is broken" in caught.value.message
    assert str(settings.paths.keeper_log) in caught.value.remedy


def test_a_keeper_that_hangs_is_named_with_its_process(settings: config.Settings, keeper: KeeperProgram) -> None:
    """Another keeper holds the lock, so ours ends at once; the other one never proves itself."""
    keeper.write("sys.exit(0)")
    holding = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(settings.paths.keeper_lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holding.stdout
    assert holding.stdin
    try:
        holding.stdout.readline()
        with pytest.raises(SelfhostError, match=rf"did not prove itself within 1 s; process {holding.pid} holds"):
            attach.ensure(settings, timeout=1)
    finally:
        holding.stdin.close()
        holding.wait()
        holding.stdout.close()


HOLD = """
import sys
from pathlib import Path
from selfhost_cli.lock import ProcessLock
from selfhost_cli.proxy.front import Away, build_front
from selfhost_cli.proxy.web import runner
lock = ProcessLock(Path(sys.argv[1]))
print(lock.acquire(), flush=True)
sys.stdin.read()
"""


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, selfhost_cli.attach; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"asyncio", "aiohttp", "httpx", "paramiko", "subprocess", "secrets"} & set(loaded)


def test_paths_of_another_profile_have_another_keeper(settings: config.Settings) -> None:
    other = config.paths("demo", {"SELFHOST_HOME": str(settings.paths.state.parents[1])})
    with StubFront(TOKEN) as front:
        announce(settings.paths, front.port)
        assert attach.find(other) is None
        assert attach.find(settings.paths)
