"""Many boxes behind one front: how much of N times one box comes of N boxes, and what choosing among them costs.

    .venv/bin/python benchmarks/boxes.py [--json] [--boxes 1,10,100] [--conversations 20] [--seconds 30]

The front and vllm-router are the real ones, the boxes are loopback servers of a fixed speed: `SLOTS` answers at once,
`TURN_S` seconds each. Each box has as many conversations, and each conversation asks its next question when it has its
answer, so that every box could always be busy. Counted are the answers of `--seconds`, after everything has settled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web
from figures import Figure, as_json, as_table

from selfhost_cli.keeper import router
from selfhost_cli.keeper.boxes import Boxes
from selfhost_cli.proxy.front import BOX, Upstream, build_front
from selfhost_cli.proxy.web import runner

TOKEN = "boxes-token"
SLOTS, TURN_S = 2, 4.0
SETTLE_S = 2 * TURN_S
GOAL = 0.9
PROMPT = "x" * 60_000
"""Of a request with 19 000 tokens, as Claude Code sends them."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Run:
    """One number of boxes. `answers` in `seconds`; `kept`: share of the turns on the box of the turn before."""

    boxes: int
    answers: int
    seconds: float
    kept: float
    choosing_ms: float
    front_cpu: float
    front_mb: float
    router_cpu: float
    router_mb: float

    @property
    def rate(self) -> float:
        return self.answers / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of figures")
    parser.add_argument("--boxes", default="1,10,100", help="how many, one run each; the first is what others go by")
    parser.add_argument("--conversations", type=int, default=20, help="for each box")
    parser.add_argument("--seconds", type=float, default=30.0, help="that are counted of each run")
    parser.add_argument("--role", choices=("engines", "front"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "engines":
        asyncio.run(engines(int(options.boxes)))
    elif options.role == "front":
        asyncio.run(front(json.loads(sys.stdin.readline())))
    else:
        counts = [int(one) for one in options.boxes.split(",")]
        runs = [measure(count, options.conversations, options.seconds) for count in counts]
        found = figures(runs)
        print(as_json(found) if options.json else as_table(found))


def measure(boxes: int, conversations: int, seconds: float) -> Run:
    with child("engines", "--boxes", str(boxes)) as made:
        assert made.stdout
        urls = json.loads(made.stdout.readline())
        with child("front") as facing:
            assert facing.stdin
            assert facing.stdout
            facing.stdin.write(json.dumps(urls).encode() + b"\n")
            facing.stdin.flush()
            url = facing.stdout.readline().decode().strip()
            run = asyncio.run(load(url, boxes, boxes * conversations, seconds, facing.pid))
    print(f"{boxes} boxes: {run.rate:.1f} answers/s, {run.kept:.1%} of the turns kept", file=sys.stderr)
    return run


def figures(runs: Sequence[Run]) -> list[Figure]:
    first = runs[0]
    found = []
    for run in runs:
        name = f"{run.boxes} boxes" if run.boxes > 1 else "1 box"
        share = run.rate / run.boxes / (first.rate / first.boxes)
        if run is not first:
            found.append(
                Figure(f"{name}: answers, of {run.boxes} × one box", round(share, 3), "", 0, GOAL, share >= GOAL)
            )
        rows = [
            ("answers", run.rate, "/s"),
            ("turns on the box of the turn before", 100 * run.kept, "%"),
            ("choosing a box", run.choosing_ms, "ms"),
            ("front: processor per answer", 1000 * run.front_cpu / run.answers, "ms"),
            ("front: memory", run.front_mb, "MB"),
            ("router: processor per answer", 1000 * run.router_cpu / run.answers, "ms"),
            ("router: processor, of one core, per box", 100 * run.router_cpu / run.seconds / run.boxes, "%"),
            ("router: memory", run.router_mb, "MB"),
            ("router: memory per box", run.router_mb / run.boxes, "MB"),
        ]
        found += [Figure(f"{name}: {what}", round(value, 3), unit, 0, None, None) for what, value, unit in rows]
    return found


# --- the load -----------------------------------------------------------------------------------------------------


async def load(url: str, boxes: int, conversations: int, seconds: float, pid: int) -> Run:
    turns: list[tuple[float, str, str]] = []
    headers = {"authorization": f"Bearer {TOKEN}", "x-claude-code-request-class": "main"}
    body = json.dumps({"model": "m", "max_tokens": 8, "stream": True, "system": PROMPT, "messages": []}).encode()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as client:

        async def converse(session: str) -> None:
            while True:
                named = {"x-claude-code-session-id": session}
                async with client.post(f"{url}/v1/messages", data=body, headers=named) as answer:
                    await answer.read()
                    if answer.status != 200:
                        sys.exit(f"{session}: {answer.status} {await answer.text()}")
                    turns.append((time.monotonic(), session, answer.headers[BOX]))

        tasks = [asyncio.create_task(converse(f"s{number}")) for number in range(conversations)]
        # so that each box has answered each of its conversations once
        await asyncio.sleep(SETTLE_S + conversations / boxes / SLOTS * TURN_S)
        began, before = time.monotonic(), usage(pid)
        await asyncio.sleep(seconds)
        ended, after = time.monotonic(), usage(pid)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with client.post(f"{url}/selfhost/choosing", json={}) as answer:
            choosing = float((await answer.json())["ms"])
    return Run(
        boxes,
        sum(1 for at, _, _ in turns if began <= at < ended),
        ended - began,
        kept(turns),
        choosing,
        after[0].cpu - before[0].cpu,
        after[0].mb,
        after[1].cpu - before[1].cpu,
        after[1].mb,
    )


def kept(turns: Sequence[tuple[float, str, str]]) -> float:
    last: dict[str, str] = {}
    seen: Counter[bool] = Counter()
    for _, session, box in turns:
        if session in last:
            seen[last[session] == box] += 1
        last[session] = box
    return seen[True] / max(1, seen.total())


@dataclass(frozen=True)
class Used:
    """Seconds of the processor, and MB of memory."""

    cpu: float = 0.0
    mb: float = 0.0


def usage(pid: int) -> tuple[Used, Used]:
    """The front's, and that of its router with what holds it; nothing where there is none."""
    of_router = [used_by(one) for one in descendants(pid)]
    return used_by(pid), Used(sum(one.cpu for one in of_router), sum(one.mb for one in of_router))


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child_pid in (task / "children").read_text().split():
            found += [int(child_pid), *descendants(int(child_pid))]
    return found


def used_by(pid: int) -> Used:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Used((int(fields[11]) + int(fields[12])) / TICKS, pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


# --- the other processes ------------------------------------------------------------------------------------------


@contextmanager
def child(role: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, __file__, "--role", role, *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


async def engines(count: int) -> None:
    """So many boxes, each on a port of its own; their URLs on stdout."""
    urls = []
    for _ in range(count):
        slots = asyncio.Semaphore(SLOTS)

        async def answer(http: web.Request, slots: asyncio.Semaphore = slots) -> web.Response:
            await http.read()
            async with slots:
                await asyncio.sleep(TURN_S)
            text = 'event: message_stop\ndata: {"type": "message_stop"}\n\n'
            return web.Response(text=text, content_type="text/event-stream")

        app = web.Application(client_max_size=2**24)
        app.router.add_post("/v1/messages", answer)
        hosted = runner(app)
        await hosted.setup()
        await web.TCPSite(hosted, "127.0.0.1", 0).start()
        urls.append(f"http://127.0.0.1:{hosted.addresses[0][1]}")
    print(json.dumps(urls), flush=True)
    await asyncio.Event().wait()


async def front(urls: Sequence[str]) -> None:
    """As the keeper has it; its URL on stdout once the router knows all boxes."""
    reached = [Upstream(url, "token", f"box-{number}") for number, url in enumerate(urls)]
    boxes = Boxes(lambda: reached, router.words)
    took: list[float] = []

    async def assign(target: Upstream, session: str, avoid: Upstream | None) -> Upstream:
        began = time.perf_counter()
        found = await boxes.assign(target, session, avoid)
        took.append(time.perf_counter() - began)
        return found

    async def choosing(_: dict[str, object]) -> dict[str, object]:
        return {"ms": 1000 * statistics.median(took)}

    app = build_front(TOKEN, lambda: reached[0], dict, lambda usage: None, {"choosing": choosing}, assign=assign)
    hosted = runner(app)
    await hosted.setup()
    await web.TCPSite(hosted, "127.0.0.1", 0, backlog=512).start()
    labels = [box.rental for box in reached]
    told = False
    while True:
        await boxes.tick(labels)
        known = len(urls) == 1 or boxes.choices == len(urls)
        if known and not told:
            print(f"http://127.0.0.1:{hosted.addresses[0][1]}", flush=True)
            told = True
        await asyncio.sleep(1.0 if told else 0.1)


if __name__ == "__main__":
    main()
