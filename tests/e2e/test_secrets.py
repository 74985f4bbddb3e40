"""One run from `up` to `down`: every artefact of it is searched for every secret of it.

What may hold one is named in ALLOWED, and has to be found there too: or the search would see nothing.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization

from selfhost_cli.ledger import Ledger
from selfhost_cli.sandbox import demo, processes
from tests.e2e.stage import Answer, Stage
from tests.waiting import until

pytestmark = pytest.mark.xdist_group("secrets")

SHORT = ["--tools", "", "--system-prompt", demo.SYSTEM_PROMPT]
LARGE = 4_000_000
"""Bytes. Larger files are downloads and libraries, and are only looked at for where they are."""
PEM = re.compile(r"-----BEGIN OPENSSH PRIVATE KEY-----.*?-----END OPENSSH PRIVATE KEY-----", re.DOTALL)
KEY_OF_HOST = "etc/ssh/ssh_host_ed25519_key"

ALLOWED: Mapping[str, frozenset[str]] = {
    # of the laptop
    "account key": frozenset({"laptop config/demo/config.toml"}),
    "front's token": frozenset({"laptop state/demo/front.token", "environment of claude", "output of env"}),
    "login key": frozenset({"laptop state/demo/login_ed25519"}),
    "cache's key": frozenset({"laptop config/demo/cache.key"}),
    # of the box. The ledger is the laptop's one file for it.
    "box's token": frozenset(
        {"laptop state/demo/ledger.sqlite3", "box root/.selfhost/run/install.env", "environment of the box's proxy"}
    ),
    # The market made it, so its own files and the environment that it starts onstart with are none of our doing.
    "box's own key": frozenset(
        {"market box.json", "box root/.selfhost/run/box.env", "environment of onstart", "environment of the watchdog"}
    ),
    # It has to be in the create call, which the market keeps; the box has forgotten it once it has one of its own.
    "bootstrap host key": frozenset({"market box.json"}),
    "box's host key": frozenset({f"box {KEY_OF_HOST}"}),
}
TOO_SHORT = frozenset({"environment of onstart"})
"""It may have ended between two looks."""
MARKETS = frozenset({"box.json", "root/onstart.sh"})
"""Files of a box that the market writes."""


@dataclass(frozen=True)
class Secret:
    name: str
    value: bytes = field(repr=False)

    def forms(self) -> Iterator[bytes]:
        """As it is, a good part of it, hexadecimal, and in base64 wherever in a text it may begin."""
        yield self.value
        yield from (self.value[:16], self.value[-16:])
        yield self.value.hex().encode()
        for shift, cut in ((0, 0), (1, 2), (2, 3)):
            whole = base64.b64encode(b"\0" * shift + self.value)[cut : (shift + len(self.value)) * 8 // 6]
            yield from (whole, whole.translate(bytes.maketrans(b"+/", b"-_")))


def of_key(name: str, text: str) -> Secret:
    """The 32 bytes that matter of a private key in OpenSSH's format."""
    found = PEM.search(text)
    assert found
    key = serialization.load_ssh_private_key(found[0].encode() + b"\n", None)
    raw = serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    return Secret(name, key.private_bytes(*raw))


class Search:
    """Where which secret was found."""

    def __init__(self, wanted: list[Secret]) -> None:
        self._needles = [(secret.name, form) for secret in wanted for form in set(secret.forms())]
        self.found: dict[str, set[str]] = {secret.name: set() for secret in wanted}

    def look(self, place: str, data: bytes) -> bool:
        flat = data.replace(b"\\n", b"").replace(b"\n", b"")  # keys are written in lines, of a length of their writer's
        names = {name for name, form in self._needles if form in data or form in flat}
        for name in names:
            self.found[name].add(place)
        return bool(names)


class Watcher:
    """Arguments and environment of every process that begins while it watches. Use as a context manager."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, bytes], bytes] = {}
        self.parents: dict[int, tuple[int, int]] = {}
        """Of each the parent, and the leader of its session: one of them may have ended before it was seen."""
        self._before = set(os.listdir("/proc"))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.03):
            for name in set(os.listdir("/proc")) - self._before:
                if name.isdigit():
                    self._look(Path("/proc", name))

    def _look(self, process: Path) -> None:
        try:
            arguments = (process / "cmdline").read_bytes()
            if (key := (int(process.name), arguments)) not in self.seen:
                self.seen[key] = (process / "environ").read_bytes()
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                self.parents[key[0]] = int(fields[1]), int(fields[3])
        except (OSError, ValueError):
            pass  # it has ended

    def lineage(self, pid: int) -> Iterator[bytes]:
        """The arguments of a process and of those that it comes from, as far as they were seen."""
        known, ahead = set[int](), [pid]
        while ahead:
            one = ahead.pop(0)
            if one in self.parents and one not in known:
                known.add(one)
                ahead += self.parents[one]
                yield b"\n".join(arguments for other, arguments in self.seen if other == one)


def whose(watcher: Watcher, pid: int, arguments: bytes, claude: bytes) -> str:
    """Which of our programs a process is, or works for; else its arguments."""
    shown = arguments.replace(b"\0", b" ").decode(errors="replace").strip()
    if b"-m\0selfhost_cli.proxy" in arguments:
        return "the box's proxy"
    for ancestor in watcher.lineage(pid):
        if ancestor.startswith(claude) or b"\n" + claude in ancestor:
            return "claude"
        if b"watchdog.sh" in ancestor:
            return "the watchdog"
        if b"root/onstart.sh" in ancestor:
            return "onstart"
    return shown


def files(folder: Path, *, without: Path | None = None) -> Iterator[Path]:
    """Every regular file below it; links are not followed."""
    for path, folders, names in os.walk(folder):
        if without is not None:
            folders[:] = [name for name in folders if Path(path, name) != without]
        yield from (one for name in names if stat.S_ISREG((one := Path(path, name)).lstat().st_mode))


@dataclass
class Run:
    """What a run leaves, copied when it is asked to. `private`: the modes of what holds a secret."""

    stage: Stage
    search: Search | None = None
    said: list[tuple[str, Answer]] = field(default_factory=list)
    private: dict[str, int] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    listening: dict[str, set[str]] = field(default_factory=dict)
    doors: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, bytes] = field(default_factory=dict)

    def ask(self, *words: str, code: int = 0, env: Mapping[str, str] | None = None) -> Answer:
        answer = self.stage.ask(*words, code=code, env=env)
        self.said.append((words[0], answer))
        return answer

    def look_at_laptop(self) -> None:
        """Everything but the market's files, which stand for another machine, and the shared downloads (a link)."""
        for path in files(self.stage.home, without=self.stage.paths.state / "market"):
            name = str(path.relative_to(self.stage.home))
            # SQLite's companions are one place with their database; another home of this test is one with the first.
            self._look(f"laptop {re.sub('-(wal|shm|journal)$', '', name.removeprefix('echo/'))}", path)

    def look_at_box(self) -> None:
        box = self.stage.box()
        for path in files(box):
            name = str(path.relative_to(box))
            self._look(f"{'market' if name in MARKETS else 'box'} {name}", path)

    def _look(self, place: str, path: Path) -> None:
        assert self.search
        try:
            if path.stat().st_size > LARGE:
                assert re.search("/(venv|downloads)/", str(path)), f"{path} is large, and was not looked into"
                return
            mode, data = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
        except FileNotFoundError:
            return  # replaced while we looked: its successor is looked at as well
        if self.search.look(place, data):
            self.private[place] = self.private.get(place, 0) | mode


def secrets_of(stage: Stage) -> list[Secret]:
    ledger = Ledger(stage.paths.ledger)
    token = ledger.all()[-1].box_token
    ledger.close()
    told = json.loads((stage.box() / "box.json").read_text())
    return [
        Secret("account key", stage.market.api_key.encode()),
        Secret("front's token", stage.paths.front_token.read_bytes().strip()),
        Secret("box's token", token.encode()),
        Secret("box's own key", told["env"]["CONTAINER_API_KEY"].encode()),
        Secret("cache's key", bytes.fromhex(stage.paths.cache_key.read_text())),
        of_key("login key", stage.paths.login_key.read_text()),
        of_key("bootstrap host key", told["onstart"]),
        of_key("box's host key", (stage.box() / KEY_OF_HOST).read_text()),
    ]


class Echo(BaseHTTPRequestHandler):
    """A market, or what stands before it, that says in its error what it was sent."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        told = f"{self.path} {self.headers['authorization']}"
        body = json.dumps({"success": False, "error": "bad_request", "msg": told}).encode()
        self.send_response(400)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


def ask_an_echo(run: Run) -> None:
    """The failing commands: what the vendor's exceptions hold must not come through."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    home = run.stage.home / "echo"
    config = home / "config" / demo.PROFILE / "config.toml"
    config.parent.mkdir(parents=True)
    config.touch(mode=0o600)
    url = f"http://127.0.0.1:{server.server_port}"
    config.write_text(f'market_url = "{url}"\napi_key = "{run.stage.market.api_key}"\npace = 0\n')
    config.with_name("installation").write_text("0123456789")
    try:
        for words in (("up", "--yes", "--detach"), ("reap",)):  # `down` would ask for minutes
            answer = run.ask(*words, code=5, env={"SELFHOST_HOME": str(home)})
            assert "Bearer <the key>" in answer.out + answer.err
    finally:
        server.shutdown()
        server.server_close()


def listening(pids: Iterable[int]) -> dict[str, set[str]]:
    """The program -> local addresses (as the kernel writes them: hexadecimal, address:port) where it can be reached."""
    names: dict[str, str] = {}
    for pid in pids:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                names[os.readlink(descriptor)] = name
            except FileNotFoundError:
                pass  # closed meanwhile
    found: dict[str, set[str]] = {}
    for table, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for row in map(str.split, Path(f"/proc/net/{table}").read_text().splitlines()[1:]):
            if row[3] == state and (name := names.get(f"socket:[{row[9]}]")):
                found.setdefault(name, set()).add(row[1])
    return found


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """All of it, once; the tests look at what it left."""
    stage = Stage(tmp_path_factory.mktemp("secrets"), cache)
    try:
        yield from_up_to_down(stage)
    finally:
        stage.close()


def from_up_to_down(stage: Stage) -> Run:
    run = Run(stage)
    with Watcher() as watcher:
        run.ask("up", "--yes", "--detach", "--json")
        secret = secrets_of(stage)
        run.tokens = {one.name: one.value for one in secret if one.name.endswith("token")}
        run.search = search = Search(secret)
        run.look_at_laptop()
        run.look_at_box()
        run.listening = listening(processes.boxes_of_processes()[str(stage.box())])
        run.ask("claude", "-p", "Say hi.", *SHORT)
        run.ask("env")
        front = run.ask("env", "--json").json["ANTHROPIC_BASE_URL"]
        for name, headers in (("large", {"x-large": "a" * 20_000}), ("foreign", {"host": "evil.example"})):
            run.doors[name] = httpx.get(f"{front}/", headers=headers, trust_env=False).status_code
        run.ask("status")
        run.ask("status", "--json")
        run.ask("extend", "--idle", "+5")
        stage.control("faults", fault="answer_lost", call="list", how="502", calls=4)
        run.ask("reap", code=5)
        run.look_at_laptop()
        run.look_at_box()
        run.ask("down")
        ask_an_echo(run)
        stage.wait_for_keeper_to_end()
        run.look_at_laptop()
    for command, answer in run.said:
        search.look(f"output of {command}", f"{answer.out}\0{answer.err}".encode())
    claude = (re.search('claude = "(.+)"', stage.paths.config_file.read_text()) or [""])[1].encode()
    for (pid, arguments), environment in watcher.seen.items():
        search.look(f"arguments of {whose(watcher, pid, arguments, claude)}", arguments)
        search.look(f"environment of {whose(watcher, pid, arguments, claude)}", environment)
    run.requests = stage.control("requests", "GET")
    search.look("requests to the market", json.dumps(run.requests).encode())
    search.look("market's log", (stage.paths.state / "market" / "market.log").read_bytes())
    return run


@pytest.mark.e2e
def test_no_secret_of_a_run_is_where_it_does_not_belong(run: Run) -> None:
    assert run.search
    for name, places in run.search.found.items():
        assert places <= ALLOWED[name], name
        assert ALLOWED[name] - TOO_SHORT <= places, f"{name}: the search is blind"
    assert run.search.found.keys() == ALLOWED.keys()


@pytest.mark.e2e
def test_what_holds_a_secret_is_its_owners_alone(run: Run) -> None:
    ours = {place: oct(mode) for place, mode in run.private.items() if not place.startswith("market ")}
    assert ours == dict.fromkeys(ours, "0o600")


@pytest.mark.e2e
def test_the_only_private_key_that_the_market_is_sent_is_in_the_create_call(run: Run) -> None:
    (create,) = (one for one in run.requests if one["method"] == "PUT" and "/asks/" in one["path"])
    assert json.dumps(run.requests).count("<private key>") == json.dumps(create).count("<private key>") == 1


@pytest.mark.e2e
def test_everything_on_the_box_listens_on_loopback_only(run: Run) -> None:
    everywhere = {address for addresses in run.listening.values() for address in addresses}
    assert len(everywhere) >= 3, "sshd, the proxy and the engine"
    assert {address.partition(":")[0] for address in everywhere} == {"0100007F"}


@pytest.mark.e2e
def test_a_keepers_front_has_the_doors_of_the_proxy(run: Run) -> None:
    """See tests/proxy/test_doors.py. aiohttp's own limit for a header is 8 KB."""
    assert run.doors == {"large": 200, "foreign": 403}


@pytest.mark.e2e
def test_every_token_is_another_one_of_256_bits(run: Run) -> None:
    random = [base64.urlsafe_b64decode(token + b"=") for token in run.tokens.values()]
    assert [len(one) for one in random] == [32, 32]
    assert random[0] != random[1]


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "::"])
def test_a_listener_is_seen_with_its_address(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        port = f"{listener.getsockname()[1]:04X}"
        addresses = {address for found in listening([os.getpid()]).values() for address in found}
    kernels = {"0.0.0.0": "00000000", "127.0.0.1": "0100007F", "::": "0" * 32}[host]
    assert f"{kernels}:{port}" in addresses


@pytest.mark.parametrize(
    "written",
    [
        lambda value: b"token=" + value,
        lambda value: value[:16] + b"...",
        lambda value: value.hex().encode(),
        lambda value: base64.b64encode(b"x:" + value),
        lambda value: base64.urlsafe_b64encode(b"user:" + value + b"\n"),
        lambda value: json.dumps({"text": value.decode()}).encode(),
    ],
    ids=["raw", "cut", "hex", "base64", "urlsafe", "json"],
)
def test_the_search_sees_a_secret_however_it_is_written(written: Callable[[bytes], bytes]) -> None:
    value = secrets.token_urlsafe(32).encode()
    search = Search([Secret("it", value)])
    assert search.look("here", written(value))
    assert search.found == {"it": {"here"}}
    assert not search.look("there", written(b"another one, just as long as the first one!"))


@pytest.mark.parametrize("width", [64, 70, 76])
def test_the_search_sees_a_private_key_however_its_lines_are_cut(tmp_path: Path, width: int) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    text = (tmp_path / "key").read_text()
    body = "".join(text.splitlines()[1:-1])
    search = Search([of_key("it", text)])
    assert search.look("here", "\n".join(body[at : at + width] for at in range(0, len(body), width)).encode())
    assert not search.look("there", (tmp_path / "key.pub").read_bytes())


def test_the_watcher_sees_arguments_and_environment_of_a_process_that_is_short() -> None:
    with Watcher() as watcher:
        pid = os.spawnve(os.P_NOWAIT, "/bin/sleep", ["sleep", "0.2"], {"SECRET": "seen"})
        until(lambda: (pid, b"sleep\x000.2\x00") in watcher.seen)
        os.waitpid(pid, 0)
    assert watcher.seen[pid, b"sleep\x000.2\x00"] == b"SECRET=seen\0"
    assert watcher.parents[pid] == (os.getpid(), os.getsid(0))
