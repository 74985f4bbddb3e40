"""What the cache costs and gives: a hit, a miss, a stampede, and a Redis that is dead or does not answer.

    .venv/bin/python benchmarks/cache.py [--json] [--rounds N]

The front is the one that is shipped, with the cache as the settings make it, before a stub of a box that answers at
once with 20 KB of text. Loopback, one process each: the load, the stub, a real redis-server (left out where there is
none), and three fronts: without a cache, with the local file, with Redis. The bodies are about
as large as Claude Code's, and small. A time is from the first byte of a request to the last
byte of its answer, on a connection that is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from figures import Figure, as_json, as_table, figure
from proxy import Broken, free_port, running, say

TOKEN = "benchmark-token"
LARGE, SMALL, UPLOAD = 60_000, 300, 100_000
"""Bytes of a body: what Claude Code sends, a question of one line, a long session."""
HITS, HITS_ON_ONE_CORE, CLIENTS, MISSES = 300, 2000, 8, 60
STAMPEDE = 200
REQUEST_S = 30.0
P50_GOAL_MS, RATE_GOAL, ADDED_GOAL_MS = 1.5, 1000.0, 50.0
"""The last one: `redis_timeout` is 50 ms, and a busy machine wakes later."""
HIT = "hit"

STUB = r"""
import asyncio, json
from aiohttp import web
def wire(name, **data):
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()
usage = {"input_tokens": 15000, "cache_read_input_tokens": 0, "output_tokens": 0}
message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": "stub", "usage": usage,
           "stop_reason": None, "stop_sequence": None}
text = "".join(f"    total_{n} = total_{n - 1} + weights[{n * 7919 % 613}]  # step {n}\n" for n in range(400))[:20000]
pieces = [wire("message_start", message=message),
          wire("content_block_start", index=0, content_block={"type": "text", "text": ""})]
pieces += [wire("content_block_delta", index=0, delta={"type": "text_delta", "text": text[at : at + 96]})
           for at in range(0, len(text), 96)]
pieces += [wire("content_block_stop", index=0),
           wire("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None},
                usage=usage | {"output_tokens": 7000}),
           wire("message_stop")]
asked = 0
async def messages(http):
    global asked
    asked += 1
    await http.read()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(http)
    await response.write(pieces[0])
    await asyncio.sleep(float(http.headers.get("x-pause", 0)))
    await response.write(b"".join(pieces[1:]))
    return response
async def health(http):
    told = dict.fromkeys(("engine", "model", "digest", "version"), "stub")
    return web.json_response({"status": "healthy", "asked": asked, **told})
app = web.Application(client_max_size=2**26)
app.router.add_get("/health", health)
app.router.add_post("/v1/messages", messages)
async def main():
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=512).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""

FRONT = r"""
import asyncio, logging, os, sys
from aiohttp import web
from selfhost_cli import caching, config
from selfhost_cli.proxy.front import Upstream, build_front
from selfhost_cli.proxy.web import runner
async def main():
    settings = config.load("benchmark")
    settings.paths.make()
    logging.basicConfig(filename=settings.paths.state / "front.log", level=logging.INFO)
    cache = caching.cache(settings, os.environ, lambda: "benchmark")
    target = Upstream(sys.argv[1], sys.argv[2], "benchmark")
    app = runner(build_front(sys.argv[2], lambda: target, dict, lambda usage: None, {}, cache))
    await app.setup()
    await web.TCPSite(app, "127.0.0.1", 0, backlog=512).start()
    print(app.addresses[0][1], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@dataclass(frozen=True)
class Front:
    """One that runs."""

    name: str
    port: int
    process: Popen[str]


@dataclass(frozen=True)
class Bench:
    """All that runs. `stub` is its port; `other`: a second laptop's front on the same Redis."""

    stub: int
    engine: Popen[str]
    plain: Front
    cached: list[Front]
    redis: Popen[str] | None
    other: Front | None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of figures")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends with us, as on Ctrl-C
    try:
        with ExitStack() as stack:
            figures = measure(start(stack), options.rounds)
    except Broken as why:
        sys.exit(str(why))
    except KeyboardInterrupt:
        sys.exit(130)
    print(as_json(figures) if options.json else as_table(figures))


def measure(bench: Bench, rounds: int) -> list[Figure]:
    figures = [
        *hits(bench, rounds),
        *hits_on_one_core(bench, rounds),
        *stampedes(bench, rounds),
        *misses(bench, rounds),
    ]
    if bench.redis:
        figures += [*stopped(bench, bench.redis, rounds), *dead(bench, bench.redis, rounds)]
    return figures


# --- what is measured ---------------------------------------------------------------------------------------------


def hits(bench: Bench, rounds: int) -> Iterator[Figure]:
    for size in (LARGE, SMALL):
        times: dict[str, list[list[float]]] = {front.name: [] for front in bench.cached}
        sent = request(size)
        for _ in range(rounds):
            for front in bench.cached:
                ready(front, sent)
                times[front.name].append(sorted(load(front.port, [sent] * HITS, wanted=HIT)))
        for name, rows in times.items():
            yield figure(f"hit p50, {name}, {kb(size)}", [statistics.median(row) for row in rows], "ms", P50_GOAL_MS)
            yield figure(f"hit p99, {name}, {kb(size)}", [row[int(len(row) * 0.99)] for row in rows], "ms")


def hits_on_one_core(bench: Bench, rounds: int) -> Iterator[Figure]:
    """The front has one core to itself; everybody else is on the others."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        say("hits/s on one core are left out: there is no second one for the clients")
        return
    for size in (LARGE, SMALL):
        for front in bench.cached:
            sent, rates = request(size), []
            with alone(front, bench, cores):
                for _ in range(rounds):
                    ready(front, sent)
                    began = time.perf_counter()
                    load(front.port, [sent] * HITS_ON_ONE_CORE, CLIENTS, wanted=HIT)
                    rates.append(HITS_ON_ONE_CORE / (time.perf_counter() - began))
            name = f"hits/s on one core, {front.name}, {kb(size)}"
            yield figure(name, rates, "1/s", RATE_GOAL, more=True)


def stampedes(bench: Bench, rounds: int) -> Iterator[Figure]:
    for front in bench.cached:
        asked, took = [], []
        for _ in range(rounds):
            before, began = engine_requests(bench), time.perf_counter()
            load(front.port, [request(LARGE, pause=0.3)] * STAMPEDE, STAMPEDE)
            took.append((time.perf_counter() - began) * 1000)
            asked.append(float(engine_requests(bench) - before))
        yield figure(f"engine requests of a stampede of {STAMPEDE}, {front.name}", asked, "requests", 1)
        yield figure(f"the last of {STAMPEDE} is answered (the engine takes 300 ms), {front.name}", took, "ms")
    if not bench.other:
        return
    asked = []
    for _ in range(rounds):
        before, sent = engine_requests(bench), request(LARGE, pause=0.3)
        ports = [bench.cached[-1].port, bench.other.port]
        load(ports, [sent] * STAMPEDE, STAMPEDE)
        asked.append(float(engine_requests(bench) - before))
    yield figure(f"engine requests of a stampede of {STAMPEDE} on two laptops, Redis", asked, "requests", 1)


def misses(bench: Bench, rounds: int) -> Iterator[Figure]:
    for size in (SMALL, UPLOAD):
        times: dict[str, list[float]] = {front.name: [] for front in (bench.plain, *bench.cached)}
        for _ in range(rounds):
            for front in (bench.plain, *bench.cached):
                times[front.name].append(missed(front, size, MISSES))
        plain = times[bench.plain.name]
        yield figure(f"without a cache p50, {kb(size)}", plain, "ms")
        for front in bench.cached:
            yield figure(f"miss p50, {front.name}, {kb(size)}", times[front.name], "ms")
            yield figure(f"miss of no cache, {front.name}, {kb(size)}", ratios(times[front.name], plain), "×")


def stopped(bench: Bench, redis: Popen[str], rounds: int) -> Iterator[Figure]:
    """It takes requests and answers none, as one behind a network that swallows everything."""
    added, behind = [], []
    for _ in range(rounds):
        usual = usual_miss(bench)
        redis.send_signal(signal.SIGSTOP)
        try:
            added.append(missed(bench.cached[-1], SMALL, 1) - usual)
            behind.append(of_no_cache(bench))
        finally:
            redis.send_signal(signal.SIGCONT)
    yield from without("a stopped Redis", added, behind)


def dead(bench: Bench, redis: Popen[str], rounds: int) -> Iterator[Figure]:
    """Killed for good, so there is one first request."""
    usual = usual_miss(bench)
    redis.kill()
    redis.wait()
    added = missed(bench.cached[-1], SMALL, 1) - usual
    yield from without("a dead Redis", [added], [of_no_cache(bench) for _ in range(rounds)])


def without(what: str, added: Sequence[float], behind: Sequence[float]) -> Iterator[Figure]:
    yield figure(f"{what} adds to the first miss, at worst", [max(added)], "ms", ADDED_GOAL_MS)
    yield figure(f"requests behind it of no cache, {what}", behind, "×")


def usual_miss(bench: Bench) -> float:
    """With a Redis that is well."""
    ready(bench.cached[-1], request(SMALL))
    return missed(bench.cached[-1], SMALL, MISSES)


def of_no_cache(bench: Bench) -> float:
    return missed(bench.cached[-1], SMALL, MISSES) / missed(bench.plain, SMALL, MISSES)


def missed(front: Front, size: int, number: int) -> float:
    """The p50 of so many requests that nobody has asked before, in ms."""
    return statistics.median(load(front.port, [request(size) for _ in range(number)]))


def ratios(values: Sequence[float], of: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(values, of, strict=True)]


def ready(front: Front, sent: bytes) -> None:
    """It is answered from the cache. Raises Broken."""
    deadline = time.monotonic() + REQUEST_S
    while time.monotonic() < deadline:
        with suppress(Broken):
            load(front.port, [sent], wanted=HIT)
            return
        time.sleep(0.05)
    raise Broken(f"{front.name}: what was asked twice is not answered from the cache")


def kb(size: int) -> str:
    return f"{size // 1000} KB request" if size >= 1000 else "small request"


# --- the load: plain sockets and one thread, so that little of what is measured is its own ----------------------------


def request(size: int, pause: float = 0) -> bytes:
    """One that nobody has sent before."""
    code = "def f(x):\n    return x + 1  # some code as it comes in a prompt\n"
    text = secrets.token_hex(16) + code * (max(0, size - 300) // len(code))
    system = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]
    asked = {"model": "stub", "max_tokens": 32000, "stream": True, "system": system}
    body = json.dumps(asked | {"messages": [{"role": "user", "content": "Go on."}]}).encode()
    head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\nx-pause: {pause}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Client:
    """One connection with one request on its way."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), REQUEST_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._began = 0.0
        self._head = b""
        self._got = bytearray()

    def send(self, data: bytes) -> None:
        self._head, self._got = b"", bytearray()
        self._began = time.perf_counter()
        self.sock.sendall(data)

    def read(self, wanted: str) -> float | None:
        """The ms that it took, when the answer is whole. Raises Broken for one that is not as `wanted`."""
        data = self.sock.recv(2**18)
        if not data:
            raise Broken("an answer broke off")
        self._got += data
        if not self._head:
            head, found, rest = bytes(self._got).partition(b"\r\n\r\n")
            if not found:
                return None
            self._head, self._got = head.lower(), bytearray(rest)
        if not self._whole():
            return None
        took = (time.perf_counter() - self._began) * 1000
        note = self._head.partition(b"x-selfhost-cache: ")[2].partition(b"\r\n")[0].decode()
        if b" 200 " not in self._head.partition(b"\r\n")[0] or b"event: message_stop" not in self._got[-200:]:
            raise Broken(f"answered {self._head[:200]!r} {bytes(self._got[-200:])!r}")
        if wanted and note != wanted:
            raise Broken(f"answered as {note or 'nothing'}, not as {wanted}")
        return took

    def _whole(self) -> bool:
        length = self._head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return len(self._got) >= int(length) if length else self._got.endswith(b"\r\n0\r\n\r\n")


def load(ports: int | Sequence[int], requests: Iterable[bytes], clients: int = 1, wanted: str = "") -> list[float]:
    """Every request's ms. Every client sends its next one when it has its answer. Raises Broken."""
    ports = [ports] if isinstance(ports, int) else ports
    left, times = iter(requests), []
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        made = [Client(ports[number % len(ports)]) for number in range(clients)]
        for client in made:
            stack.enter_context(closing(client.sock))
        busy = 0
        for client, sent in zip(made, left, strict=False):
            selector.register(client.sock, selectors.EVENT_READ, client)
            client.send(sent)
            busy += 1
        while busy:
            ready = selector.select(REQUEST_S)
            if not ready:
                raise Broken(f"{busy} requests were not answered within {REQUEST_S:g} s")
            for key, _ in ready:
                took = key.data.read(wanted)
                if took is None:
                    continue
                times.append(took)
                if sent := next(left, b""):
                    key.data.send(sent)
                else:
                    selector.unregister(key.fileobj)
                    busy -= 1
    return times


# --- what runs ----------------------------------------------------------------------------------------------------


def start(stack: ExitStack) -> Bench:
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="selfhost-cache-")))
    engine, stub = stack.enter_context(running([sys.executable, "-c", STUB]))
    plain = front(stack, place, "no cache", stub, CACHE_ENABLED="off")
    cached = [front(stack, place, "local file", stub)]
    if not (program := shutil.which("redis-server")):
        say("Redis is left out: there is no redis-server")
        return Bench(stub, engine, plain, cached, None, None)
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(place)]
    redis, _ = stack.enter_context(running(command, ready=lambda: listens(port)))
    how = {"CACHE_STORE": "redis", "REDIS_URL": f"redis://127.0.0.1:{port}"}
    team = {"CACHE_SCOPE": "team", "CACHE_KEY": secrets.token_hex(32)}
    one, other = (front(stack, place, name, stub, **how, **team) for name in ("Redis", "Redis, another laptop"))
    return Bench(stub, engine, plain, [*cached, one], redis, other)


def front(stack: ExitStack, place: Path, name: str, stub: int, **settings: str) -> Front:
    home = place / name.replace(" ", "-")
    home.mkdir()
    env = {"HOME": str(home), "SELFHOST_HOME": str(home), "PYTHONPATH": str(Path(__file__).parent.parent)}
    env |= {f"SELFHOST_{key}": value for key, value in settings.items()}
    command = [sys.executable, "-c", FRONT, f"http://127.0.0.1:{stub}", TOKEN]
    process, port = stack.enter_context(running(command, env))
    return Front(name, port, process)


@contextmanager
def alone(front: Front, bench: Bench, cores: Sequence[int]) -> Iterator[None]:
    """The front on the last core, everybody else on the others."""
    others = [os.getpid(), bench.engine.pid, *([bench.redis.pid] if bench.redis else [])]
    try:
        pin(front.process.pid, cores[-1:])
        for pid in others:
            pin(pid, cores[:-1])
        yield
    finally:
        for pid in (front.process.pid, *others):
            pin(pid, cores)


def pin(pid: int, cores: Sequence[int]) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
        sock.sendall(b"PING\r\n")
        return sock.recv(16).startswith(b"+PONG")
    return False


def engine_requests(bench: Bench) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{bench.stub}/health", timeout=REQUEST_S) as answer:
        return int(json.load(answer)["asked"])


if __name__ == "__main__":
    main()
