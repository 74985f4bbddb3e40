"""How much of every prompt the engine need not read again: a session of the real Claude Code, raw and through us.

    .venv/bin/python benchmarks/prefix.py [--json] [--cache DIR] [--ollama]

The session is recorded first, against scripted answers: turns, tool calls, a second conversation, a subagent, a
compaction. Then the recorded requests go to llama.cpp's real server with a small model, each way to a fresh one with
one slot, as a box runs it: `raw` to its own /v1/messages; `ours` the same bytes through the proxy; `launched` through
the proxy too, recorded anew from a Claude Code that `selfhost claude` launched. Nothing of the recording is kept.

A prompt's shared tokens are its longest common prefix with any earlier prompt of the same way, as the server itself
rendered them. Of these, the share that it reused is the goal; what it had to read in all is the price.

With --ollama the two ways through the proxy go to the real Ollama (built by scripts/ollama) instead. It says itself how
much it reused, and the prompts are those that the proxy sends it, counted by llama.cpp's server with the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
from figures import Figure, as_json, columns
from losses import child, engine_python, say, wait_for

import selfhost_cli
from selfhost_cli import claude, config
from selfhost_cli.sandbox import assets, demo, registry

Json = dict[str, Any]

TOKEN = "prefix-token"
MODEL = "tiny"
CONTEXT = 16_384
GOAL = 99.0
ANSWER_TOKENS = 2
"""In the replay: what is answered does not matter, nor that a call which is cut off is refused."""
CLASS = "x-claude-code-request-class"
OF_THE_REQUEST = ("anthropic-", "x-claude-code-", "x-app", "user-agent")
"""How the headers begin that an upstream may go by."""
ALLOWED = "Agent,Bash,Edit,Read,WebSearch"
LAUNCHER = Path(selfhost_cli.__file__).parent / "templates" / "llamacpp.py"


@dataclass(frozen=True)
class Recorded:
    """One request of Claude Code's. `step`: which command it was a part of. `headers`: those about the request."""

    step: str
    cls: str
    headers: Mapping[str, str] = field(repr=False)
    body: Json = field(repr=False)


@dataclass(frozen=True)
class Replayed:
    """What became of it. In tokens; `shared` with an earlier prompt, `reused` by the engine's own account."""

    total: int
    shared: int
    reused: int


@dataclass(frozen=True)
class Way:
    name: str
    requests: Sequence[Replayed]

    @property
    def total(self) -> int:
        return sum(one.total for one in self.requests)

    @property
    def shared(self) -> int:
        return sum(one.shared for one in self.requests)

    @property
    def reused(self) -> int:
        return sum(one.reused for one in self.requests)

    @property
    def kept(self) -> float:
        """Of the shared tokens, the share that was reused; more than is shared does not count."""
        return 100 * sum(min(one.reused, one.shared) for one in self.requests) / self.shared

    def figures(self) -> list[Figure]:
        goal = None if self.name == "raw" else GOAL
        met = None if goal is None else self.kept >= goal
        rows = [
            ("tokens of all prompts", self.total, "tokens"),
            ("of these, shared with an earlier prompt", 100 * self.shared / self.total, "%"),
            ("of all, reused", 100 * self.reused / self.total, "%"),
            ("read by the engine", self.total - self.reused, "tokens"),
        ]
        first = Figure(f"{self.name}: of the shared tokens, reused", round(self.kept, 2), "%", 0, goal, met)
        return [first, *(Figure(f"{self.name}: {name}", round(n, 2), unit, 0, None, None) for name, n, unit in rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of figures")
    parser.add_argument("--ollama", action="store_true", help="the real Ollama as engine")
    parser.add_argument("--cache", type=Path, default=config.paths("default", os.environ).cache)
    options = parser.parse_args()
    made = assets.ensure(options.cache, lambda line: None)
    with tempfile.TemporaryDirectory(prefix="selfhost-prefix-") as place:
        if options.ollama:
            ways = measure_ollama(Path(place), made, options.cache / "ollama" / "current" / "bin" / "ollama")
        else:
            ways = measure(Path(place), made)
    print(as_json([figure for way in ways for figure in way.figures()]) if options.json else table(ways))


def measure(place: Path, made: assets.Assets) -> list[Way]:
    python = engine_python(place, made)
    ways = []
    for name, launched in (("raw", False), ("ours", False), ("launched", True)):
        if name != "ours":
            requests = record(place / name, made.claude, launched=launched)
        folder = place / f"engine-{name}"
        folder.mkdir()
        with engine(folder, python, made.model) as server:
            if name == "raw":
                ways.append(replay(name, requests, server, server))
            else:
                with proxied(folder, server) as proxy:
                    ways.append(replay(name, requests, proxy, server))
    return ways


def measure_ollama(place: Path, made: assets.Assets, program: Path) -> list[Way]:
    if not program.exists():
        sys.exit(f"{program} is not there: build it with scripts/ollama")
    store = registry.prepare(place / "models", program, made.model, MODEL, registry.MODELFILE)
    ways = []
    counter = place / "counter"
    counter.mkdir()
    with engine(counter, engine_python(place, made), made.model) as tokenizer:
        for name, launched in (("ours", False), ("launched", True)):
            requests = record(place / name, made.claude, launched=launched)
            folder = place / f"engine-{name}"
            folder.mkdir()
            with ollama(folder, program, store) as server, Listening(server) as listening:
                (folder / "engine.port").write_text(listening.url.rpartition(":")[2])
                with proxied(folder, server, "ollama") as proxy:
                    ways.append(replay_ollama(name, requests, proxy, listening, tokenizer))
    return ways


def table(ways: Sequence[Way]) -> str:
    rows: list[tuple[str, ...]] = [("", *(way.name for way in ways))]
    for figures in zip(*(way.figures() for way in ways), strict=True):
        cells = (f"{one.value:.1f} %" if one.unit == "%" else f"{one.value:.0f}" for one in figures)
        rows.append((figures[0].figure.partition(": ")[2], *cells))
    verdicts = ("" if (met := way.figures()[0].met) is None else "met" if met else "MISSED" for way in ways)
    return columns([*rows, (f"goal: ≥ {GOAL:g} % of the shared tokens", *verdicts)])


# --- the session --------------------------------------------------------------------------------------------------


def text(words: str) -> Json:
    return {"type": "text", "text": words}


def call(name: str, **arguments: Any) -> Json:
    return {"type": "tool_use", "name": name, "input": arguments}


@dataclass(frozen=True)
class Step:
    """One command and what the model answers to its requests, in order. `goes_on`: with the first conversation."""

    name: str
    prompt: str
    answers: Sequence[Json]
    tools: str = "Read"
    goes_on: bool = False


READ = call("Read", file_path="{folder}/note.txt")
READ_PLAN = call("Read", file_path="{folder}/plan.md")
AGENT = call(
    "Agent",
    description="Read a file",
    prompt="Read {folder}/note.txt and report the secret word.",
    subagent_type="general-purpose",
    run_in_background=False,
)
SESSION = [
    Step("a turn", "Read note.txt.", [READ, text("The secret word is walnut.")]),
    Step("the next turn", "Read plan.md.", [READ_PLAN, text("The plan is to sail.")], goes_on=True),
    Step("another conversation", "How many lines has note.txt?", [READ, text("It has three lines.")]),
    Step("back in the first", "What was the secret word?", [text("It was walnut.")], goes_on=True),
    Step(
        "a subagent",
        "Let an agent read note.txt.",
        [AGENT, READ, text("The secret word is walnut."), text("The agent says walnut.")],
        tools="Agent,Read",
    ),
    Step("back once more", "And what was the plan?", [text("To sail.")], goes_on=True),
    Step("a compaction", "/compact", [text("<summary>A file was read, its word is walnut.</summary>")], goes_on=True),
    Step("after it", "Say the word again.", [text("Walnut.")], goes_on=True),
]


class Recorder:
    """A server that answers from a script and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Recorded] = []
        self.step = ""
        self.answers: list[Json] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(200)
                self.end_headers()

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                kept = {name: value for name, value in headers.items() if name.startswith(OF_THE_REQUEST)}
                recorder.requests.append(Recorded(recorder.step, headers.get(CLASS, "unnamed"), kept, body))
                block = recorder.answers.pop(0) if recorder.answers else text("There is nothing more to say.")
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                for event in events(block, len(recorder.requests)):
                    self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Recorder:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def events(block: Json, number: int) -> Iterator[Json]:
    """An answer of that one block."""
    usage = {"input_tokens": 100, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 1}
    message = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": MODEL, "content": []}
    yield {"type": "message_start", "message": message | {"stop_reason": None, "stop_sequence": None, "usage": usage}}
    if calls := block["type"] == "tool_use":
        start = block | {"id": f"toolu_{number:04d}", "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
    else:
        start, delta = text(""), {"type": "text_delta", "text": block["text"]}
    yield {"type": "content_block_start", "index": 0, "content_block": start}
    yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    end = {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}
    yield {"type": "message_delta", "delta": end, "usage": {"output_tokens": 9}}
    yield {"type": "message_stop"}


def record(
    place: Path,
    program: Path,
    *,
    launched: bool,
    session: Sequence[Step] = SESSION,
    system: Sequence[str] = ("--system-prompt", demo.SYSTEM_PROMPT),
    context: int = CONTEXT,
) -> list[Recorded]:
    """`system`: arguments of every command. A folder `project` that is there is used as it is."""
    folder, home = place / "project", place / "home"
    folder.mkdir(parents=True, exist_ok=True)
    (home / ".claude").mkdir(parents=True)
    (folder / "note.txt").write_text("The secret word is walnut.\n" * 3)
    (folder / "plan.md").write_text("We sail at dawn.\n")
    first = ""
    with Recorder() as recorder:
        for step in session:
            recorder.step = step.name
            recorder.answers = json.loads(json.dumps(step.answers).replace("{folder}", str(folder)))
            words = ["-p", step.prompt, *(["--resume", first] if step.goes_on else []), "--output-format", "json"]
            words += ["--tools", step.tools, "--allowedTools", ALLOWED, *system]
            said = run_claude(program, words, folder, home, recorder.url, launched=launched, context=context)
            first = first or said["session_id"]
            if recorder.answers:
                sys.exit(f"Claude Code did not ask as often as expected for: {step.name}: {said.get('result')!r}")
    return recorder.requests


def run_claude(
    program: Path, words: Sequence[str], folder: Path, home: Path, url: str, *, launched: bool, context: int = CONTEXT
) -> Json:
    """As `selfhost claude` launches it, or with no more than it needs to find the server."""
    argv, env = (str(program), *words), plain(home, url)
    if launched:
        launch = claude.launch(
            program, words, url=url, token=TOKEN, model=MODEL, context=context, env={"PATH": os.defpath}, home=home
        )
        argv, env = launch.argv, dict(launch.env)
    done = subprocess.run(
        argv, env=env, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        sys.exit(f"Claude Code ended with {done.returncode}: {done.stdout[-300:]} {done.stderr[-300:]}")
    said: Json = json.loads(done.stdout)
    return said


def plain(home: Path, url: str) -> dict[str, str]:
    return {
        "PATH": os.defpath,
        "HOME": str(home),
        "CLAUDE_CONFIG_DIR": str(home / ".claude"),
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": TOKEN,
        "ANTHROPIC_MODEL": MODEL,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",  # a test machine may not talk to anybody else
    }


# --- the replay ---------------------------------------------------------------------------------------------------


def replay(name: str, requests: Sequence[Recorded], way: str, server: str) -> Way:
    """One after the other, `server` being where the engine itself is."""
    before: list[list[int]] = []
    replayed = []
    for number, request in enumerate(requests, 1):
        headers = {"authorization": f"Bearer {TOKEN}", CLASS: request.cls}
        body = request.body | {"max_tokens": ANSWER_TOKENS, "stream": False}
        before_it = counters(server)
        answer = httpx.post(f"{way}/v1/messages", json=body, headers=headers, timeout=300, trust_env=False)
        read, reused = (now - then for now, then in zip(counters(server), before_it, strict=True))
        tokens = last_prompt(server)
        if len(tokens) != read + reused:
            sys.exit(f"{name} {number}: {read} tokens read and {reused} reused, of {len(tokens)}: {answer.text[:300]}")
        shared = max((common(tokens, other) for other in before), default=0)
        before.append(tokens)
        replayed.append(Replayed(len(tokens), shared, reused))
        say(f"{name} {number:2} {request.step}, {request.cls}: {len(tokens)} tokens, {shared} shared, {reused} reused")
    return Way(name, replayed)


def replay_ollama(name: str, requests: Sequence[Recorded], way: str, listening: Listening, tokenizer: str) -> Way:
    """Like `replay`, with Ollama's own word for what it reused."""
    before: list[list[int]] = []
    replayed = []
    for number, request in enumerate(requests, 1):
        headers = {"authorization": f"Bearer {TOKEN}", CLASS: request.cls}
        body = request.body | {"max_tokens": ANSWER_TOKENS, "stream": False}
        listening.heard.clear()
        answer = httpx.post(f"{way}/v1/messages", json=body, headers=headers, timeout=300, trust_env=False)
        if not listening.heard:
            sys.exit(f"{name} {number}: {answer.status_code} {answer.text[:300]}")
        chat, end = listening.heard[0]
        total, reused = end["prompt_eval_count"], end.get("prompt_eval_cached_count", 0)
        tokens = tokenized(tokenizer, as_rendered(listening.server, chat))
        if len(tokens) != total:
            sys.exit(f"{name} {number}: Ollama counts {total} tokens of a prompt that has {len(tokens)}")
        shared = max((common(tokens, other) for other in before), default=0)
        before.append(tokens)
        replayed.append(Replayed(len(tokens), shared, reused))
        say(f"{name} {number:2} {request.step}, {request.cls}: {len(tokens)} tokens, {shared} shared, {reused} reused")
    return Way(name, replayed)


def as_rendered(server: str, chat: Json) -> str:
    """The prompt that Ollama makes of it; nothing is generated."""
    asked = chat | {"stream": False, "_debug_render_only": True}
    answer = httpx.post(f"{server}/api/chat", json=asked, timeout=60, trust_env=False)
    prompt: str = answer.raise_for_status().json()["_debug_info"]["rendered_template"]
    return prompt


class Listening:
    """Between proxy and Ollama: passes everything on, and keeps each chat with the last record of its answer."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.heard: list[tuple[Json, Json]] = []
        listening = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._pass_on(b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                self._pass_on(body)

            def _pass_on(self, body: bytes) -> None:
                url = f"{server}{self.path}"
                with httpx.stream(self.command, url, content=body, timeout=300, trust_env=False) as answer:
                    self.send_response(answer.status_code)
                    self.send_header("content-type", answer.headers.get("content-type", "application/json"))
                    self.end_headers()
                    for line in answer.iter_lines():
                        if self.path == "/api/chat" and "prompt_eval_count" in (record := json.loads(line)):
                            listening.heard.append((json.loads(body), record))
                        self.wfile.write(f"{line}\n".encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Listening:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def counters(server: str) -> tuple[int, int]:
    """Tokens of prompts that the engine read, and that it reused, since it began."""
    page = httpx.get(f"{server}/metrics", timeout=30, trust_env=False).raise_for_status().text
    found = dict(re.findall(r"^llamacpp:(\w+) (\d+)", page, re.MULTILINE))
    return int(found["prompt_tokens_total"]), int(found["prompt_tokens_cached_total"])


def last_prompt(server: str) -> list[int]:
    return tokenized(server, rendered(server))


def rendered(server: str) -> str:
    """What the only slot read last, as the chat template rendered it."""
    [slot] = httpx.get(f"{server}/slots", timeout=30, trust_env=False).raise_for_status().json()
    prompt: str = slot["prompt"]
    return prompt


def tokenized(server: str, prompt: str) -> list[int]:
    asked = {"content": prompt, "parse_special": True, "add_special": False}
    answer = httpx.post(f"{server}/tokenize", json=asked, timeout=30, trust_env=False)
    tokens: list[int] = answer.raise_for_status().json()["tokens"]
    return tokens


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


# --- servers ------------------------------------------------------------------------------------------------------


@contextmanager
def engine(folder: Path, python: Path, model: Path, context: int = CONTEXT) -> Iterator[str]:
    port = folder / "engine.port"
    words = ["--model", str(model), "--alias", MODEL, "--context", str(context), "--port-file", str(port)]
    # so that /slots shows the prompt
    env = {"PATH": os.defpath, "LLAMA_SERVER_SLOTS_DEBUG": "1"}
    with child([str(python), str(LAUNCHER), *words], env, folder / "engine.log"):
        wait_for(port.exists, 120)
        yield f"http://127.0.0.1:{port.read_text().strip()}"


@contextmanager
def ollama(folder: Path, program: Path, store: Path) -> Iterator[str]:
    """Set up as a box has it, see templates/ollama.py."""
    env = {"PATH": os.defpath, "HOME": str(folder), "OLLAMA_HOST": "127.0.0.1:0", "OLLAMA_MODELS": str(store)}
    env |= {"OLLAMA_CONTEXT_LENGTH": str(CONTEXT), "OLLAMA_NUM_PARALLEL": "1", "OLLAMA_KEEP_ALIVE": "-1"}
    env |= {"OLLAMA_NO_CLOUD": "1", "OLLAMA_NOPRUNE": "1", "OLLAMA_FLASH_ATTENTION": "1"}
    log = folder / "ollama.log"
    with child([str(program), "serve"], env, log):
        wait_for(lambda: "Listening on " in log.read_text(errors="replace"), 60)
        server = "http://" + log.read_text(errors="replace").partition("Listening on ")[2].split()[0]
        load = {"model": MODEL, "keep_alive": -1, "stream": False, "shift": False}
        httpx.post(f"{server}/api/generate", json=load, timeout=120, trust_env=False).raise_for_status()
        yield server


@contextmanager
def proxied(folder: Path, server: str, kind: str = "llamacpp") -> Iterator[str]:
    """The engine side as a box starts it, beside that engine's port file."""
    env = {"PATH": os.defpath, "SELFHOST_TOKEN": TOKEN, "SELFHOST_MODEL": MODEL, "SELFHOST_ENGINE": kind}
    command = [sys.executable, "-m", "selfhost_cli.proxy", "--run-dir", str(folder), "--port", "0"]
    with child(command, env, folder / "proxy.log"):
        wait_for((folder / "ready").exists)
        yield f"http://127.0.0.1:{(folder / 'proxy.port').read_text().strip()}"


if __name__ == "__main__":
    main()
