"""What the tunnel costs beside OpenSSH's `ssh -L` and bare sshtunnel: latency, throughput, many streams, memory.

    .venv/bin/python benchmarks/tunnel.py [--json] [--rounds N] [--rtt MS]

A real sshd on loopback (a box of the sandbox) behind a relay that delays every byte by half the round trip, and
behind that a server that answers at once. The rounds go through all ways in turn, so that a busy moment meets all of
them. Ours is the keeper's own link, which renews the lease meanwhile. sshtunnel comes twice: bare, and with our windows
and without Nagle's algorithm, set behind its back. It is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import selectors
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from figures import Figure, as_json, as_table, figure

from selfhost_cli.remote.ssh import PACKET, WINDOW, make_key
from selfhost_cli.sandbox import image

RTT_MS = 60.0
SMALL, UPLOAD, DOWNLOAD = 2000, 2**20, 32 * 2**20
STREAMS, EVENT, EVENT_EVERY_S, STREAMS_S = 64, 300, 0.05, 6.0
START_S, ANSWER_S = 30.0, 120.0
SMALL_GOAL, CONNECT_GOAL, UPLOAD_GOAL, DOWNLOAD_GOAL = 1.05, 1.1, 1.1, 0.5
SILENCE_GOAL_MS, GROWTH_GOAL_MB = 1000.0, 4.0
OPENSSH, SSHTUNNEL, TUNED, OURS = "ssh -L", "sshtunnel", "sshtunnel tuned", "selfhost"

# The far end. A request is one line, its size and what is wanted: `small`, `put`, `get BYTES`, `events SECONDS`.
SERVER = r"""
import asyncio, sys
SMALL, EVENT, EVERY = map(float, sys.argv[1:])
async def serve(reader, writer):
    try:
        while line := await reader.readline():
            size, verb, amount = line.split()
            await reader.readexactly(int(size))
            if verb == b"events":
                end = asyncio.get_running_loop().time() + float(amount)
                while asyncio.get_running_loop().time() < end:
                    writer.write(b"e" * int(EVENT))
                    await writer.drain()
                    await asyncio.sleep(EVERY)
                break
            left = int(amount)
            while left > 0:
                writer.write(b"x" * min(left, 262144))
                left -= 262144
                await writer.drain()
    except (OSError, EOFError):
        pass
    finally:
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2**22, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""

# The way there: every chunk is delivered half a round trip after it came, however many are on the way.
RELAY = r"""
import asyncio, sys
PORT, DELAY = int(sys.argv[1]), float(sys.argv[2])
ON_THE_WAY = 2**25
class Side(asyncio.Protocol):
    other = None
    flying = 0
    def __init__(self, ready):
        self.ready = ready
        self.early = []
    def connection_made(self, transport):
        self.transport = transport
        transport.set_write_buffer_limits(high=ON_THE_WAY)
        self.ready(self)
    def data_received(self, data):
        self.flying += len(data)
        if self.flying > ON_THE_WAY:
            self.transport.pause_reading()
        asyncio.get_running_loop().call_later(DELAY, self.deliver, data)
    def deliver(self, data):
        if self.other is None:
            self.early.append(data)
        elif not self.other.transport.is_closing():
            self.other.transport.write(data)
        self.flying -= len(data)
        if self.flying <= ON_THE_WAY and not self.transport.is_closing():
            self.transport.resume_reading()
    def connection_lost(self, error):
        if self.other:
            asyncio.get_running_loop().call_later(DELAY, self.other.transport.close)
async def main():
    loop = asyncio.get_running_loop()
    tasks = set()
    def accepted(near):
        def connected(far):
            far.other, near.other = near, far
            for data in near.early:
                far.transport.write(data)
        tasks.add(loop.create_task(loop.create_connection(lambda: Side(connected), "127.0.0.1", PORT)))
    server = await loop.create_server(lambda: Side(accepted), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""

BARE = r"""
import socket, sys, threading, sshtunnel
port, login, target = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
forwarder = sshtunnel.SSHTunnelForwarder(("127.0.0.1", port), ssh_config_file=None, ssh_username="root", ssh_pkey=login,
    allow_agent=False, host_pkey_directories=[], local_bind_address=("127.0.0.1", 0),
    remote_bind_address=("127.0.0.1", target))
forwarder.start()
if sys.argv[4:]:  # what cannot be asked of it otherwise
    forwarder._transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    forwarder._transport.default_window_size, forwarder._transport.default_max_packet_size = map(int, sys.argv[4:])
print(forwarder.local_bind_port, flush=True)
threading.Event().wait()
"""

KEEPER = r"""
import sys, threading, time
from pathlib import Path
from selfhost_cli.keeper.links import Link
from selfhost_cli.model import Caps, Endpoint, Rental, State
from selfhost_cli.remote.ssh import log_in
from selfhost_cli.remote.tunnel import Tunnel
port, login, target, host_key = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
rental = Rental(label="selfhost-benchmark-1", state=State.READY, created_at=time.time(), offer_id=1, machine_id=1,
    gpu="", place="", dph_base=0.0, dph_total=0.0, storage_dph=0.0, down_per_gb=0.0, up_per_gb=0.0, model="", engine="",
    context=0, caps=Caps(), host_key=host_key, box_token="", instance_id=1, endpoint=Endpoint("127.0.0.1", port),
    proxy_port=target)
def open_line(rental, endpoint, sock):
    return Tunnel(log_in(sock, endpoint, host_key, login), target)
link = Link(rental, open_line, lambda rental: ())
link.start()
while not link.port:
    time.sleep(0.01)
print(link.port, flush=True)
threading.Event().wait()
"""


class Broken(Exception):
    """A process did not come up, or did not answer as it should."""


@dataclass
class Way:
    """One way to the server: a local port, the process behind it, and what was measured of it, a value a round."""

    name: str
    port: int
    process: subprocess.Popen[str]
    connect_ms: list[float] = field(default_factory=list)
    small_ms: list[float] = field(default_factory=list)
    upload_ms: list[float] = field(default_factory=list)
    download_mb_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    silence_ms: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of figures")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rtt", type=float, default=RTT_MS, help="milliseconds (default: %(default)g)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends with us, as on Ctrl-C
    try:
        figures = bench(options.rounds, options.rtt)
    except Broken as why:
        sys.exit(str(why))
    except KeyboardInterrupt:
        sys.exit(130)
    print(as_json(figures) if options.json else as_table(figures))


def bench(rounds: int, rtt_ms: float) -> list[Figure]:
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="selfhost-tunnel-")))
        ways = list(start(stack, place, rtt_ms))
        for number in range(rounds + 1):
            for way in ways[:: -1 if number % 2 else 1]:
                measure(way, keep=number > 0)  # the first round opens windows and fills caches
        for number in range(3):
            for way in ways[:: -1 if number % 2 else 1]:
                way.silence_ms.append(many(way))
        return summary(ways)


def start(stack: ExitStack, place: Path, rtt_ms: float) -> Iterator[Way]:
    login, host_key, sshd = stack.enter_context(box(place))
    _, target = stack.enter_context(running([sys.executable, "-c", SERVER, *map(str, (SMALL, EVENT, EVENT_EVERY_S))]))
    _, port = stack.enter_context(running([sys.executable, "-c", RELAY, str(sshd), str(rtt_ms / 2000)]))
    yield Way(OPENSSH, *stack.enter_context(openssh(place, login, host_key, port, target)))
    ours = [sys.executable, "-c", KEEPER, str(port), str(login), str(target), host_key]
    process, local = stack.enter_context(running(ours))
    yield Way(OURS, local, process)
    if importlib.util.find_spec("sshtunnel"):
        for name, tuning in ((SSHTUNNEL, ()), (TUNED, (WINDOW, PACKET))):
            bare = [sys.executable, "-c", BARE, str(port), str(login), str(target), *map(str, tuning)]
            process, local = stack.enter_context(running(bare))
            yield Way(name, local, process)
    else:
        print("sshtunnel is left out: it is not installed", file=sys.stderr)


@contextmanager
def box(place: Path) -> Iterator[tuple[Path, str, int]]:
    """A sandbox box: our login key's file, the public half of its host key, the port of its sshd."""
    private, public = make_key("benchmark")
    login = place / "login"
    login.touch(mode=0o600)
    login.write_text(private)
    root, port = place / "box", free_port()
    image.build(root, image.BoxConfig(1, port, authorized_keys=(public,), onstart="true", gap_s=0))
    (root / "root" / ".selfhost" / "run").mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-m", "selfhost_cli.sandbox.box", str(root)], stderr=subprocess.DEVNULL)
    try:
        until(lambda: listens(port), "sshd")
        yield login, (root / "etc/ssh/ssh_host_ed25519_key.pub").read_text(), port
    finally:
        end(process)


@contextmanager
def openssh(
    place: Path, login: Path, host_key: str, port: int, target: int
) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    if not shutil.which("ssh"):
        raise Broken("ssh is not installed: apt-get install -y openssh-client")
    known, local = place / "known_hosts", free_port()
    known.write_text(f"[127.0.0.1]:{port} {host_key}")
    options = {"UserKnownHostsFile": known, "IdentitiesOnly": "yes", "ExitOnForwardFailure": "yes", "BatchMode": "yes"}
    command = ["ssh", "-N", "-F", "none", "-i", str(login), "-p", str(port), "-L", f"{local}:127.0.0.1:{target}"]
    command += [f"-o{name}={value}" for name, value in options.items()]
    process = subprocess.Popen(
        [*command, "root@127.0.0.1"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    try:
        until(lambda: listens(local), shlex.join(command))
        yield local, process
    finally:
        end(process)


@contextmanager
def running(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that prints its port once it serves."""
    process = subprocess.Popen(
        command, cwd=Path(__file__).parent.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise Broken(f"{command[0]} {command[1]} … did not come up")
        yield process, int(line)
    finally:
        end(process)


def end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def until(probe: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_S
    while not probe():
        if time.monotonic() > deadline:
            raise Broken(f"{what} did not come up")
        time.sleep(0.05)


# --- the load ---------------------------------------------------------------------------------------------------------


def measure(way: Way, *, keep: bool) -> None:
    """One round: a new connection with a small request, five more on it, an upload, a download."""
    began = time.perf_counter()
    with connect(way.port) as peer:
        ask(peer, SMALL, "small", SMALL)
        connected = ms_since(began)
        small = statistics.median(timed(lambda: ask(peer, SMALL, "small", SMALL)) for _ in range(5))
        upload = statistics.median(timed(lambda: ask(peer, UPLOAD, "put", 2)) for _ in range(3))
        download = timed(lambda: ask(peer, 0, "get", DOWNLOAD))
    if keep:
        way.connect_ms.append(connected)
        way.small_ms.append(small)
        way.upload_ms.append(upload)
        way.download_mb_s.append(DOWNLOAD / 1000 / download)
        way.rss_mb.append(rss_mb(way.process.pid))


def connect(port: int) -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def ask(peer: socket.socket, size: int, verb: str, amount: int) -> None:
    peer.sendall(f"{size} {verb} {amount}\n".encode() + b"u" * size)
    buffer, left = memoryview(bytearray(2**18)), amount
    while left > 0:
        got = peer.recv_into(buffer)
        if not got:
            raise Broken(f"the answer to {verb} broke off")
        left -= got


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return ms_since(began)


def ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000


def many(way: Way) -> float:
    """Streams of events while a large download passes: the longest that any of them was silent, in ms."""
    with ExitStack() as stack, selectors.DefaultSelector() as ready:
        peers = [stack.enter_context(connect(way.port)) for _ in range(STREAMS)]
        for peer in peers:
            peer.sendall(f"0 events {STREAMS_S}\n".encode())
            ready.register(peer, selectors.EVENT_READ)
        bulk = threading.Thread(target=beside, args=(way.port,))
        bulk.start()
        last, silence = {}, 0.0
        deadline = time.monotonic() + ANSWER_S
        while ready.get_map():
            if time.monotonic() > deadline:
                raise Broken(f"{way.name}: {len(ready.get_map())} of {STREAMS} streams did not end")
            for key, _ in ready.select(1.0):
                now = time.perf_counter()
                silence = max(silence, now - last.get(key.fileobj, now))
                last[key.fileobj] = now
                if not peer_of(key).recv(65536):
                    ready.unregister(key.fileobj)
        bulk.join()
    if len(last) < STREAMS:
        raise Broken(f"{way.name}: {STREAMS - len(last)} of {STREAMS} streams said nothing")
    return silence * 1000


def peer_of(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


def beside(port: int) -> None:
    with contextlib.suppress(OSError, Broken), connect(port) as peer:
        ask(peer, 0, "get", DOWNLOAD)


def rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


# --- figures ----------------------------------------------------------------------------------------------------------


def summary(ways: Sequence[Way]) -> list[Figure]:
    by_name = {way.name: way for way in ways}
    figures: list[Figure] = []
    for way in ways[1:]:
        figures += beside_openssh(way, by_name[OPENSSH], GOALS if way.name == OURS else {})
    for way in ways:
        goals = GOALS if way.name == OURS else {}
        growth = max(way.rss_mb[len(way.rss_mb) // 2 :]) - max(way.rss_mb[: len(way.rss_mb) // 2 + 1])
        figures += [
            figure(f"longest silence of {STREAMS} streams, {way.name}", way.silence_ms, "ms", goals.get("silence")),
            figure(f"memory grown in the later half, {way.name}", [growth], "MB", goals.get("growth")),
            figure(f"small request, {way.name}", way.small_ms, "ms"),
            figure(f"new connection and small request, {way.name}", way.connect_ms, "ms"),
            figure(f"1 MB upload, {way.name}", way.upload_ms, "ms"),
            figure(f"32 MB download, {way.name}", way.download_mb_s, "MB/s"),
            figure(f"RSS, {way.name}", way.rss_mb, "MB"),
        ]
    return figures


GOALS: Mapping[str, float] = {
    "small": SMALL_GOAL,
    "connect": CONNECT_GOAL,
    "upload": UPLOAD_GOAL,
    "download": DOWNLOAD_GOAL,
    "silence": SILENCE_GOAL_MS,
    "growth": GROWTH_GOAL_MB,
}


def beside_openssh(way: Way, openssh: Way, goals: Mapping[str, float]) -> Iterator[Figure]:
    def shares(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
        return [a / b for a, b in zip(ours, theirs, strict=True)]

    of = f"of ssh -L, {way.name}"
    yield figure(f"small request {of}", shares(way.small_ms, openssh.small_ms), "×", goals.get("small"))
    yield figure(f"new connection {of}", shares(way.connect_ms, openssh.connect_ms), "×", goals.get("connect"))
    yield figure(f"1 MB upload {of}", shares(way.upload_ms, openssh.upload_ms), "×", goals.get("upload"))
    download = shares(way.download_mb_s, openssh.download_mb_s)
    yield figure(f"32 MB download {of}", download, "×", goals.get("download"), more=True)


if __name__ == "__main__":
    main()
