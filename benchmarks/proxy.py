"""What the proxy costs: time to first byte and requests per second, straight at a stub engine, through us and others.

    .venv/bin/python benchmarks/proxy.py [--json] [--rounds N] [--cache DIR]

The stub answers at once, in the words of llama.cpp's server, so all that is measured is on top of it; it keeps its
connections, as Ollama does and llama.cpp does not. Every way gets the same 80 KB request; the rounds go through all
ways in turn, so that a busy moment meets all of them. Loopback, four processes: the load, the stub, the engine side (as
it is shipped) and the front. Then come the peers that scripts/peers installed, one at a time, before the same stub with
the same request, fewer of them because they are slower.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from figures import Figure, as_json, as_table, figure
from peers import Peer, Site, installed

from selfhost_cli import config

TOKEN = "benchmark-token"
MODEL = "stub"
BODY_KB = 80
ONE, MANY = 1, 64
REQUESTS = {ONE: 60, MANY: 384}
PEER_REQUESTS = {ONE: 20, MANY: 128}
START_S, REQUEST_S = 120.0, 30.0
ADDED_GOAL_MS = 1.0
ENGINE_SIDE_GOAL, BOTH_GOAL = 0.35, 0.25
RSS_GOAL_MB = 80.0

STUB = r"""
import asyncio, json, sys
from aiohttp import web
def wire(name, **data):
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()
usage = {"input_tokens": 20000, "cache_read_input_tokens": 0, "output_tokens": 0}
message = {"id": "x", "type": "message", "role": "assistant", "content": [], "model": "stub", "usage": usage}
pieces = [wire("message_start", message=message),
          wire("content_block_start", index=0, content_block={"type": "text", "text": ""})]
pieces += [wire("content_block_delta", index=0, delta={"type": "text_delta", "text": "word "}) for _ in range(20)]
pieces += [wire("content_block_stop", index=0),
           wire("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 20}),
           wire("message_stop")]
async def messages(http):
    await http.read()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(http)
    for piece in pieces:
        await response.write(piece)
    await response.write_eof()
    return response
async def props(http):
    return web.json_response({"default_generation_settings": {"n_ctx": 262144}, "total_slots": 64})
async def count(http):
    await http.read()
    return web.json_response({"input_tokens": 20000})
app = web.Application(client_max_size=2**26)
app.router.add_get("/props", props)
app.router.add_post("/v1/messages", messages)
app.router.add_post("/v1/messages/count_tokens", count)
async def main():
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""

FRONT = r"""
import asyncio, sys
from aiohttp import web
from selfhost_cli.proxy.front import Upstream, build_front
from selfhost_cli.proxy.web import runner
async def main():
    target = Upstream(sys.argv[1], sys.argv[2], "benchmark")
    app = runner(build_front(sys.argv[2], lambda: target, dict, lambda usage: None, {}))
    await app.setup()
    await web.TCPSite(app, "127.0.0.1", 0).start()
    print(app.addresses[0][1], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


class Broken(Exception):
    """A process did not come up, or did not answer as it should."""


@dataclass
class Way:
    """One way to the stub. Per number of clients: p50 and p99 of the first byte (ms) and requests/s, a row a round."""

    name: str
    port: int
    process: subprocess.Popen[str] | None = None
    requests: Mapping[int, int] = field(default_factory=lambda: REQUESTS)
    rows: dict[int, list[tuple[float, float, float]]] = field(default_factory=lambda: {ONE: [], MANY: []})
    failures: list[str] = field(default_factory=list)

    def column(self, clients: int, which: int) -> list[float]:
        return [row[which] for row in self.rows[clients]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of figures")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cache", type=Path, default=config.paths("default", os.environ).cache)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends with us, as on Ctrl-C
    try:
        figures = bench(options.rounds, options.cache)
    except Broken as why:
        sys.exit(str(why))
    except KeyboardInterrupt:
        sys.exit(130)
    print(as_json(figures) if options.json else as_table(figures))


def bench(rounds: int, cache: Path) -> list[Figure]:
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="selfhost-proxy-")))
        ways = list(start(stack, place))
        idle = {way.name: rss_mb(way) for way in ways if way.process}
        measure(ways, rounds)
        for way in ways:
            if way.failures:
                raise Broken(failed(way))
        figures = summary(ways, idle)
        for peer in installed(cache, lambda name: say(f"{name} is left out: run scripts/peers")):
            figures += beside(peer, ways[0], place, rounds)
        return figures


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(ways: Sequence[Way], rounds: int) -> None:
    for clients in (ONE, MANY):
        for number in range(rounds + 1):
            for way in ways[:: -1 if number % 2 else 1]:
                row = asyncio.run(load(way.port, clients, way.requests[clients], way.failures))
                if number:  # the first round fills caches
                    way.rows[clients].append(row)


def start(stack: ExitStack, place: Path) -> Iterator[Way]:
    _, port = stack.enter_context(running([sys.executable, "-c", STUB]))
    yield Way("direct", port)
    (place / "engine.port").write_text(str(port))
    env = {"SELFHOST_TOKEN": TOKEN, "SELFHOST_MODEL": MODEL, "SELFHOST_ENGINE": "llamacpp"}
    command = [sys.executable, "-m", "selfhost_cli.proxy", "--run-dir", str(place), "--slots", str(MANY)]
    proxy, _ = stack.enter_context(running([*command, "--port", "0"], env, ready=(place / "ready").exists))
    box = int((place / "proxy.port").read_text())
    yield Way("engine side", box, proxy)
    front, port = stack.enter_context(running([sys.executable, "-c", FRONT, f"http://127.0.0.1:{box}", TOKEN]))
    yield Way("engine side and front", port, front)


@contextmanager
def running(
    command: Sequence[str], env: Mapping[str, str] | None = None, ready: Callable[[], bool] | None = None
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that prints its port once it serves; with `ready`, until when to wait."""
    process = subprocess.Popen(
        command,
        env={"PATH": os.environ.get("PATH", os.defpath), **(env or {})},
        cwd=(env or {}).get("HOME", Path(__file__).parent.parent),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if ready else subprocess.PIPE,
        stderr=subprocess.DEVNULL if ready else None,
        text=True,
    )
    try:
        if ready is None:
            assert process.stdout
            yield process, int(process.stdout.readline())
            return
        deadline = time.monotonic() + START_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise Broken(f"{' '.join(command)} did not come up")
            time.sleep(0.05)
        yield process, 0
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            for pid in [*family(process.pid)]:
                os.kill(pid, signal.SIGKILL)
            process.wait()


def beside(peer: Peer, direct: Way, place: Path, rounds: int) -> list[Figure]:
    """The peer in front of the same stub, alone, so that nothing of it disturbs what is measured of us."""
    port = free_port()
    home = place / peer.name
    home.mkdir()
    arguments, env = peer.settle(Site(home, port, f"http://127.0.0.1:{direct.port}", MODEL, TOKEN))
    command = [str(peer.program), *arguments]
    try:
        with running(command, {"HOME": str(home), **env}, lambda: answers(port)) as (process, _):
            way = Way(peer.name, port, process, PEER_REQUESTS)
            idle = rss_mb(way)
            measure([way], rounds)
            return peer_summary(way, direct, idle, rounds)
    except Broken as why:
        say(f"{peer.name} is left out: {why}")
        return []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def answers(port: int) -> bool:
    try:
        httpx.get(f"http://127.0.0.1:{port}/", timeout=REQUEST_S, trust_env=False)
    except httpx.TransportError:
        return False
    return True


# --- the load: plain sockets, so that little of what is measured is its own -------------------------------------------


def request_bytes(port: int) -> bytes:
    text = "def f(x):\n    return x + 1  # some code as it comes in a prompt\n" * (BODY_KB * 1000 // 64)
    body = json.dumps(
        {"model": MODEL, "max_tokens": 64, "stream": True, "messages": [{"role": "user", "content": text}]}
    )
    head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {TOKEN}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


async def load(port: int, clients: int, requests: int, failures: list[str]) -> tuple[float, float, float]:
    """p50 and p99 of the time to the first event in ms, and requests per second, of those that were answered.

    Why the others failed is added to `failures`. Raises Broken when none was answered.
    """
    sent = request_bytes(port)
    left = iter(range(requests))
    firsts: list[float] = []

    async def client() -> None:
        for _ in left:
            try:
                async with asyncio.timeout(REQUEST_S):
                    firsts.append(await ask(port, sent))
            except (Broken, OSError, EOFError) as why:  # a TimeoutError is an OSError
                failures.append(str(why) or repr(why))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.perf_counter() - began
    if not firsts:
        raise Broken(f"none of {requests} requests was answered: {failures[-1]}")
    firsts.sort()
    return statistics.median(firsts), firsts[min(len(firsts) - 1, int(len(firsts) * 0.99))], len(firsts) / took


async def ask(port: int, sent: bytes) -> float:
    """One request, to the end of its answer. Returns the ms to the first event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        began = time.perf_counter()
        writer.write(sent)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.partition(b"\r\n")[0]:
            raise Broken(f"answered {status[:200]!r}")
        seen = b""
        while b"event: message_start" not in seen:
            seen += await some(reader)
        first = (time.perf_counter() - began) * 1000
        while b"message_stop" not in seen[-400:]:
            seen = seen[-400:] + await some(reader)
        return first
    finally:
        writer.close()


async def some(reader: asyncio.StreamReader) -> bytes:
    data = await reader.read(65536)
    if not data:
        raise Broken("the answer broke off")
    return data


# --- figures ----------------------------------------------------------------------------------------------------------


def summary(ways: Sequence[Way], idle: dict[str, float]) -> list[Figure]:
    direct, engine, both = ways
    figures = []
    for before, way in ((direct, engine), (engine, both)):
        added = [b - a for a, b in zip(before.column(ONE, 0), way.column(ONE, 0), strict=True)]
        figures.append(figure(f"added at p50, 1 client, by {hop(way)}", added, "ms", ADDED_GOAL_MS))
    for way, goal in ((engine, ENGINE_SIDE_GOAL), (both, BOTH_GOAL)):
        share = [b / a for a, b in zip(direct.column(MANY, 2), way.column(MANY, 2), strict=True)]
        figures.append(figure(f"throughput of direct, 64 clients, {way.name}", share, "×", goal, more=True))
    figures += [figure(f"RSS idle, {hop(way)}", [idle[way.name]], "MB", RSS_GOAL_MB) for way in (engine, both)]
    for way in ways:
        figures += raw(way)
        if way.process:
            figures.append(figure(f"RSS after the load, {hop(way)}", [rss_mb(way)], "MB"))
    return figures


def peer_summary(way: Way, direct: Way, idle: float, rounds: int) -> list[Figure]:
    """What others reached is nobody's goal. They are far from direct, so its median is near enough to compare with."""
    added = [value - statistics.median(direct.column(ONE, 0)) for value in way.column(ONE, 0)]
    share = [value / statistics.median(direct.column(MANY, 2)) for value in way.column(MANY, 2)]
    if way.failures:
        say(failed(way))
    asked = (rounds + 1) * sum(way.requests.values())
    return [
        figure(f"added at p50, 1 client, by {way.name}", added, "ms"),
        figure(f"throughput of direct, 64 clients, {way.name}", share, "×"),
        figure(f"RSS idle, {way.name}", [idle], "MB"),
        *raw(way),
        figure(f"RSS after the load, {way.name}", [rss_mb(way)], "MB"),
        figure(f"failed of {asked}, {way.name}", [len(way.failures)], "requests"),
    ]


def failed(way: Way) -> str:
    return f"{way.name}: {len(way.failures)} requests failed, the first: {way.failures[0]}"


def raw(way: Way) -> Iterator[Figure]:
    for clients in (ONE, MANY):
        yield figure(f"first event p50, {clients} clients, {way.name}", way.column(clients, 0), "ms")
        yield figure(f"first event p99, {clients} clients, {way.name}", way.column(clients, 1), "ms")
        yield figure(f"requests/s, {clients} clients, {way.name}", way.column(clients, 2), "1/s")


def hop(way: Way) -> str:
    return "the front" if way.name.endswith("front") else "the engine side"


def rss_mb(way: Way) -> float:
    assert way.process
    return sum(map(process_rss_mb, family(way.process.pid)))


def family(pid: int) -> Iterator[int]:
    """The process and those that it started, at any depth."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            started = children.read_text().split()
        except OSError:  # that thread has ended
            continue
        for child in started:
            yield from family(int(child))


def process_rss_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1000


if __name__ == "__main__":
    main()
