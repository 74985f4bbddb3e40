"""What raw Ollama loses between a model and Claude Code, beside what is lost through us: one table.

    .venv/bin/python benchmarks/losses.py [--json] [--only shapes|tasks] [--engine ENGINE] [--model NAME] [--cache DIR]

One server of the real Ollama (scripts/ollama builds it), with a small model at temperature 0, is asked the same things
twice: at its own /v1/messages, and at the proxy's as a box runs it. `shapes` are losses asked for directly; `tasks` are
ten one-step tool tasks of the real Claude Code, launched the same way, in the same folder, on both sides. Takes ten
minutes on two quiet cores; a task is ended after four.

With `--engine llamacpp` the same ten tasks go through us to llama.cpp's server as a box runs it; nothing is asked raw.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from figures import Figure, as_json, as_table, columns, figure

import selfhost_cli
from selfhost_cli import claude, config
from selfhost_cli.sandbox import assets, demo, registry

Json = dict[str, Any]
T = TypeVar("T")

CONTEXT = 8192
PATIENCE = 240
"""Seconds for one task."""
TOKEN = "losses-token"
LAUNCHER = Path(selfhost_cli.__file__).parent / "templates" / "llamacpp.py"
TINY, CODER, NATIVE = "qwen-tiny", "qwen-coder", "qwen-native"

# Ollama's own renderer and parser for qwen3-coder, over a model that leaves out <tool_call> as qwen3-coder itself does.
CODER_MODELFILE = """FROM ./model.gguf
RENDERER qwen3-coder
PARSER qwen3-coder
PARAMETER temperature 0
"""
NATIVE_MODELFILE = "FROM ./model.gguf\nPARAMETER temperature 0\n"
MODELFILES = {TINY: registry.MODELFILE.read_text("utf-8"), CODER: CODER_MODELFILE, NATIVE: NATIVE_MODELFILE}


@dataclass(frozen=True)
class Share:
    lost: int
    of: int

    def __str__(self) -> str:
        return f"{self.lost} of {self.of}"


@dataclass(frozen=True)
class Loss:
    """How much of something was lost on either side. Without a goal it is the model's doing, shown beside the rest."""

    what: str
    raw: Share
    ours: Share
    unit: str = "times"
    goal: bool = True

    def __str__(self) -> str:
        return f"{self.what}: raw {self.raw}, ours {self.ours}"

    @property
    def met(self) -> bool | None:
        return self.ours.lost == 0 if self.goal else None

    def figures(self) -> list[Figure]:
        goal = 0 if self.goal else None
        return [
            Figure(f"{self.what}, of {self.ours.of}: ours", self.ours.lost, self.unit, 0, goal, self.met),
            Figure(f"{self.what}, of {self.raw.of}: raw Ollama", self.raw.lost, self.unit, 0, None, None),
        ]


@dataclass(frozen=True)
class Side:
    """Where to ask. `name` is "raw" or "ours"."""

    name: str
    url: str

    def ask(self, body: Json) -> httpx.Response:
        """POST /v1/messages, to its end."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.post(f"{self.url}/v1/messages", json=body, headers=headers, timeout=300, trust_env=False)

    def message(self, body: Json) -> Json:
        answer: Json = self.ask(body).raise_for_status().json()
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of figures")
    parser.add_argument("--only", choices=("shapes", "tasks"), help="one half of it")
    parser.add_argument("--engine", choices=("ollama", "llamacpp"), default="ollama", help="default: %(default)s")
    parser.add_argument("--model", choices=assets.MODELS, default=assets.DEMO_MODEL, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=config.paths("default", os.environ).cache)
    options = parser.parse_args()
    built = assets.built_ollama(options.cache)
    if options.engine == "llamacpp" and options.only == "shapes":
        parser.error("the shapes are losses of Ollama's")
    if options.engine == "ollama" and not built:
        sys.exit("the real Ollama is not built: run scripts/ollama")
    made = assets.ensure(options.cache, say, assets.default_sources(options.model))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server is left behind
    with tempfile.TemporaryDirectory(prefix="selfhost-losses-") as place:
        if built and options.engine == "ollama":
            losses = measure(Path(place), built / "bin" / "ollama", made, options.only)
            figures = [figure for loss in losses for figure in loss.figures()]
            shown = table(losses)
        else:
            figures = through_llama(Path(place), made, options.model)
            shown = as_table(figures)
    print(as_json(figures) if options.json else shown)


def measure(place: Path, program: Path, made: assets.Assets, only: str | None) -> list[Loss]:
    losses: list[Loss] = []
    with serving(place, program, made.model) as raw:
        if only != "tasks":
            for model, look in SHAPES:
                with proxied(place, raw, model) as ours:
                    losses.append(look(raw, ours))
                    say(f"{losses[-1]}")
        if only != "shapes":
            for model in (TINY, CODER):
                with proxied(place, raw, model) as ours:
                    losses += tasks(place, made.claude, model, raw, ours)
                    for loss in losses[-4:]:
                        say(f"{loss}")
    return losses


def through_llama(place: Path, made: assets.Assets, model: str) -> list[Figure]:
    python = engine_python(place, made)
    with llama(place, python, made.model, model) as raw, engine_side(place, raw, model, "llamacpp") as ours:
        done = outcome(place, made.claude, model, ours)
    count = len(TASKS)
    return [
        figure(f"tasks not solved, of {count}", [done.unsolved], "tasks", 0),
        figure(f"calls made and not executed, of {done.calls}", [done.lost], "calls", 0),
        figure(f"tasks ended empty, without saying why, of {count}", [done.empty], "tasks", 0),
        figure("time for a task", done.took, "s"),
    ]


def table(losses: Sequence[Loss]) -> str:
    rows = [("lost", "raw Ollama", "ours", "")]
    for loss in sorted(losses, key=lambda loss: (loss.met is None, loss.met)):
        verdict = {True: "met", False: "MISSED", None: ""}[loss.met]
        rows.append((loss.what, str(loss.raw), str(loss.ours), verdict))
    return columns(rows)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- what is lost -------------------------------------------------------------------------------------------------


def tool(name: str, *keys: str) -> Json:
    properties = {key: {"type": "string"} for key in keys}
    schema = {"type": "object", "properties": properties, "required": list(keys)}
    return {"name": name, "description": f"{name} a file", "input_schema": schema}


def user(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


TOOLS = [tool("Read", "file_path"), tool("Write", "file_path", "content")]
SYSTEM = "You are a coding assistant. Use the tools."
FILES = ("/tmp/a.txt", "/etc/hosts", "/srv/notes.md", "README.md", "/var/log/app.log")
FROBNICATE = '```json\n{"name": "Frobnicate", "arguments": {"x": 1}}\n```'
NEEDED = {"Read": ["file_path"], "Write": ["file_path", "content"], "Bash": ["command"]}


def body(model: str, messages: list[Json], **more: Any) -> Json:
    return {"model": model, "messages": messages, "max_tokens": 120, "temperature": 0, **more}


def leaked(raw: Side, ours: Side) -> Loss:
    """Calls of an offered tool that arrive as text; nothing is required of them."""
    optional = [one | {"input_schema": one["input_schema"] | {"required": []}} for one in TOOLS]
    return leaks("calls leaked as text", raw, ours, optional)


def leaked_with_more(raw: Side, ours: Side) -> Loss:
    """This model repeats the list of what is required, as its prompt shows it, inside its call."""
    return leaks("calls leaked as text, with <required> in them", raw, ours, TOOLS)


def leaks(what: str, raw: Side, ours: Side, tools: Sequence[Json]) -> Loss:
    needed = {tool["name"]: tool["input_schema"]["required"] for tool in tools}

    def share(side: Side) -> Share:
        asked = (body(CODER, user(f"Read the file {name}."), system=SYSTEM, tools=tools) for name in FILES)
        blocks = [block for request in asked for block in side.message(request)["content"] or []]
        lost = leaked_calls(blocks, needed)
        return Share(lost, lost + sum(block["type"] == "tool_use" for block in blocks))

    return Loss(what, share(raw), share(ours))


def leaked_calls(blocks: Sequence[Json], needed: Mapping[str, Sequence[str]]) -> int:
    """Texts in which a tool that there is is called in some form, with all that it needs, however badly."""

    def called(text: str) -> bool:
        for name, keys in needed.items():
            found = re.search(rf"<function={name}>|\"name\"\s*:\s*\"{name}\"", text)
            if found and all(re.search(rf"\b{key}\b", text[found.end() :]) for key in keys):
                return True
        return False

    return sum(block["type"] == "text" and called(block["text"]) for block in blocks)


def swallowed(raw: Side, ours: Side) -> Loss:
    """Calls of a tool that is not there: tokens were generated, nothing is delivered."""
    ask = f'Call the function "Frobnicate" with arguments {{"x": 1}}. Write exactly: {FROBNICATE}'
    asked = [body(TINY, user(ask), tools=[tool("Zap", "y")])]
    return compare(
        "calls swallowed into an empty end_turn",
        raw,
        ours,
        asked,
        lambda side, request: is_empty(side.message(request)),
    )


def unheard(raw: Side, ours: Side) -> Loss:
    """A system message behind the first one of the user, where Claude Code sends what it knows of the folder."""
    asked = body(CODER, user("Hello."), system=SYSTEM) | {"max_tokens": 1}
    more = asked | {"messages": [*user("Hello."), {"role": "system", "content": "The folder is /srv/app."}]}
    return compare(
        "system messages behind the first message left out of the prompt",
        raw,
        ours,
        [more],
        lambda side, request: prompt(side.message(request)) == prompt(side.message(asked)),
    )


def endless(raw: Side, ours: Side) -> Loss:
    """Streams that stop without saying that they do."""
    ask = "Write the word no a hundred times, without newlines:" + " no" * 14
    asked = [body(TINY, user(ask), stream=True) | {"max_tokens": 300}]
    return compare(
        "repetitions that end without an end",
        raw,
        ours,
        asked,
        lambda side, request: "event: message_stop" not in side.ask(request).text,
    )


def retried(raw: Side, ours: Side) -> Loss:
    """Errors that will stay, sent as ones that Claude Code retries, for minutes."""
    asked = [body(NATIVE, user("Read the file /tmp/a.txt."), tools=TOOLS)]

    def retryable(side: Side, request: Json) -> bool:
        # A llama-server that was started for a model with Ollama's own template serves this one too, and cannot.
        load(raw, TINY, shift=side is raw)
        return side.ask(request).status_code >= 500

    return compare("permanent errors sent as retryable ones", raw, ours, asked, retryable)


def halved(raw: Side, ours: Side) -> Loss:
    """Tokens of a prompt that does not fit and that nobody is told of."""
    request = body(TINY, user("a " * 9000)) | {"max_tokens": 3}
    cut, refused = raw.ask(request), ours.ask(request)
    told = refused.json().get("error", {}).get("message", "")
    if not (found := re.search(r"prompt is too long: (\d+) tokens > \d+ maximum", told)):
        sys.exit(f"too long a prompt was answered with {refused.status_code}: {refused.text[:200]}")
    tokens = int(found[1])
    lost = 0 if cut.status_code >= 400 else tokens - prompt(cut.json())
    say(f"raw {cut.status_code} for {tokens - lost} of {tokens} tokens, ours {refused.status_code} {told!r}")
    what = "tokens of too long a prompt cut without a word"
    return Loss(what, Share(lost, tokens), Share(0, tokens), "tokens")


SHAPES: list[tuple[str, Callable[[Side, Side], Loss]]] = [
    (CODER, leaked),
    (CODER, leaked_with_more),
    (CODER, unheard),
    (TINY, swallowed),
    (TINY, endless),
    (NATIVE, retried),
    (TINY, halved),
]


def compare(what: str, raw: Side, ours: Side, asked: Sequence[Json], lost: Callable[[Side, Json], bool]) -> Loss:
    def share(side: Side) -> Share:
        return Share(sum(lost(side, request) for request in asked), len(asked))

    return Loss(what, share(raw), share(ours))


def is_empty(message: Json) -> bool:
    """Nothing in it, though the model said something."""
    blocks = message["content"] or []
    return not any(block["type"] == "tool_use" or block.get("text") for block in blocks)


def prompt(message: Json) -> int:
    usage = message["usage"]
    return int(usage["input_tokens"] + usage.get("cache_read_input_tokens", 0))


# --- the real Claude Code -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One step with one tool. `solved` looks at the folder it was done in and at what Claude said."""

    tool: str
    prompt: str
    solved: Callable[[Path, str], bool]


@dataclass
class Outcome:
    """What became of the tasks on one side."""

    calls: int = 0
    lost: int = 0
    empty: int = 0
    uncalled: int = 0
    unsolved: int = 0
    took: list[float] = field(default_factory=list)
    """Seconds."""


WORDS = {"note.txt": "walnut42", "plan.md": "harbor17", "config.ini": "pepper88", "list.csv": "thunder63"}


def reading(name: str) -> Task:
    ask = f"Read the file {{folder}}/{name} and tell me the secret word in it."
    return Task("Read", ask, lambda folder, said: WORDS[name] in said.lower())


def writing(name: str, text: str) -> Task:
    ask = f"Create the file {{folder}}/{name} with the content: {text}"
    return Task("Write", ask, lambda folder, said: holds(folder / name, text))


def running(command: str, name: str, text: str) -> Task:
    ask = f"Run this bash command: {command}"
    return Task("Bash", ask, lambda folder, said: holds(folder / name, text))


def holds(path: Path, text: str) -> bool:
    return path.is_file() and text in path.read_text(errors="replace")


TASKS = [
    *(reading(name) for name in WORDS),
    writing("hello.txt", "hello"),
    writing("answer.txt", "forty-two"),
    writing("todo.md", "buy milk"),
    running("echo done > {folder}/done.txt", "done.txt", "done"),
    running("cp {folder}/note.txt {folder}/copy.txt", "copy.txt", "walnut42"),
    running("ls {folder} > {folder}/files.txt", "files.txt", "plan.md"),
]


def tasks(place: Path, program: Path, model: str, raw: Side, ours: Side) -> list[Loss]:
    one, other = (outcome(place, program, model, side) for side in (raw, ours))
    name = {TINY: "the demo's format", CODER: "qwen3-coder's format"}[model]

    def loss(what: str, share: Callable[[Outcome], Share], *, goal: bool = True) -> Loss:
        return Loss(f"tasks in {name}: {what}", share(one), share(other), goal=goal)

    return [
        loss("calls made and not executed", lambda side: Share(side.lost, side.calls)),
        loss("ended empty, without saying why", lambda side: Share(side.empty, len(TASKS))),
        loss("the model made no call", lambda side: Share(side.uncalled, len(TASKS)), goal=False),
        loss("not solved", lambda side: Share(side.unsolved, len(TASKS)), goal=False),
    ]


def outcome(place: Path, program: Path, model: str, side: Side) -> Outcome:
    outcome = Outcome()
    folder = place / "work"
    for task in TASKS:
        folder.mkdir()
        for name, word in WORDS.items():
            (folder / name).write_text(f"The secret word is {word}.\n")
        attempt(outcome, side, program, model, folder, task)
        shutil.rmtree(folder)
    return outcome


def attempt(outcome: Outcome, side: Side, program: Path, model: str, folder: Path, task: Task) -> None:
    began = time.monotonic()
    events = run_claude(side, program, model, folder, task)
    took = time.monotonic() - began
    told = [block for event in events if event["type"] == "assistant" for block in blocks_of(event)]
    answered = [block for event in events if event["type"] == "user" for block in blocks_of(event)]
    made = [block["id"] for block in told if block["type"] == "tool_use"]
    executed = {block["tool_use_id"] for block in answered if block["type"] == "tool_result"}
    leaks = leaked_calls(told, {task.tool: NEEDED[task.tool]})
    results = [event for event in events if event["type"] == "result"]
    said = results[-1].get("result", "") if results else ""
    solved = bool(made) and task.solved(folder, said)
    outcome.calls += len(made) + leaks
    outcome.lost += leaks + sum(call not in executed for call in made)
    # Claude Code names the reason of any other end
    outcome.empty += not results or (results[-1]["subtype"] == "success" and not said.strip())
    outcome.uncalled += not made and not leaks
    outcome.unsolved += not solved
    outcome.took.append(took)
    verdict = f"{'solved' if solved else 'not solved'} in {took:.0f} s"
    say(f"  {model} {side.name} {task.tool} {verdict}, calls {len(made)}, leaked {leaks}: {said[:500]!r}")


def run_claude(side: Side, program: Path, model: str, folder: Path, task: Task) -> list[Json]:
    """What it told as stream-json; without its result when it had to be ended."""
    home = folder.parent / "home"
    (home / ".claude").mkdir(parents=True, exist_ok=True)
    words = ["-p", task.prompt.replace("{folder}", str(folder)), "--output-format", "stream-json", "--verbose"]
    words += ["--tools", task.tool, "--allowedTools", task.tool, "--max-turns", "3"]
    words += ["--system-prompt", demo.SYSTEM_PROMPT]
    env = {"PATH": "/usr/bin:/bin"}
    launch = claude.launch(
        program, words, url=side.url, token=TOKEN, model=model, context=demo.CONTEXT, env=env, home=home, max_output=512
    )
    try:
        done = subprocess.run(
            launch.argv,
            env=dict(launch.env),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        told = done.stdout
    except subprocess.TimeoutExpired as late:
        told = late.stdout or b""
    # the last line may be cut
    return [json.loads(line) for line in told.splitlines() if line.startswith(b"{") and line.endswith(b"}")]


def blocks_of(event: Json) -> list[Json]:
    content = event.get("message", {}).get("content", [])
    return content if isinstance(content, list) else []


# --- servers ------------------------------------------------------------------------------------------------------


@contextmanager
def serving(place: Path, program: Path, model: Path) -> Iterator[Side]:
    """Ollama with all three models."""
    store = place / "models"
    for name, text in MODELFILES.items():
        modelfile = place / f"Modelfile.{name}"
        modelfile.write_text(text)
        folder = registry.prepare(place / "cache", program, model, name, modelfile)
        shutil.copytree(folder, store, dirs_exist_ok=True, copy_function=link)
    env = {
        "PATH": os.defpath,
        "HOME": str(place),
        "OLLAMA_HOST": "127.0.0.1:0",
        "OLLAMA_MODELS": str(store),
        "OLLAMA_CONTEXT_LENGTH": str(CONTEXT),
        "OLLAMA_NUM_PARALLEL": "1",
        "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NOPRUNE": "1",
    }
    log = place / "serve.log"
    with child([str(program), "serve"], env, log):
        wait_for(lambda: "Listening on " in log.read_text(errors="replace"))
        address = log.read_text(errors="replace").partition("Listening on ")[2].split()[0]
        yield Side("raw", f"http://{address}")


@contextmanager
def proxied(place: Path, raw: Side, model: str) -> Iterator[Side]:
    """The engine side before Ollama, with the model loaded."""
    load(raw, model)
    with engine_side(place, raw, model, "ollama") as ours:
        yield ours


@contextmanager
def engine_side(place: Path, raw: Side, model: str, engine: str) -> Iterator[Side]:
    """As a box starts it."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        run = Path(name)
        (run / "engine.port").write_text(raw.url.rpartition(":")[2])
        env = {"PATH": os.defpath, "SELFHOST_TOKEN": TOKEN, "SELFHOST_MODEL": model, "SELFHOST_ENGINE": engine}
        command = [sys.executable, "-m", "selfhost_cli.proxy", "--run-dir", name, "--port", "0"]
        with child(command, env, place / f"proxy-{model}.log"):
            wait_for((run / "ready").exists)
            yield Side("ours", f"http://127.0.0.1:{(run / 'proxy.port').read_text().strip()}")


def engine_python(place: Path, made: assets.Assets) -> Path:
    """An environment with llama.cpp's wheel, as a box has it."""
    venv = place / "venv"
    subprocess.run([made.python, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    offline = ["--no-index", "--find-links", str(made.wheels), "--no-cache-dir", "--disable-pip-version-check"]
    pip = [str(python), "-m", "pip", "install", "--quiet", *offline, assets.BOX_REQUIREMENTS["engine"]]
    subprocess.run(pip, check=True)
    return python


@contextmanager
def llama(place: Path, python: Path, file: Path, model: str) -> Iterator[Side]:
    """llama.cpp's server with that model file, as a box starts it."""
    port = place / "engine.port"
    words = ["--model", str(file), "--alias", model, "--context", str(demo.CONTEXT), "--port-file", str(port)]
    with child([str(python), str(LAUNCHER), *words], {"PATH": os.defpath}, place / "engine.log"):
        wait_for(port.exists, 120)
        yield Side("raw", f"http://127.0.0.1:{port.read_text().strip()}")


@contextmanager
def child(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=dict(env), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def load(raw: Side, model: str, *, shift: bool = False) -> None:
    """Alone: our models have the same weights, and Ollama would take one for the other. A box loads without `shift`."""
    for name in listed(raw):
        generate(raw, {"model": name, "keep_alive": 0})
    wait_for(lambda: not listed(raw))
    generate(raw, {"model": model, "keep_alive": -1, "shift": shift})


def listed(raw: Side) -> list[str]:
    models = httpx.get(f"{raw.url}/api/ps", timeout=10, trust_env=False).raise_for_status().json()["models"]
    return [entry["name"] for entry in models]


def generate(raw: Side, request: Json) -> None:
    answer = httpx.post(f"{raw.url}/api/generate", json={"stream": False} | request, timeout=120, trust_env=False)
    answer.raise_for_status()


def wait_for(probe: Callable[[], T], seconds: float = 60) -> T:
    deadline = time.monotonic() + seconds
    while not (value := probe()):
        if time.monotonic() > deadline:
            sys.exit(f"nothing happened within {seconds:g} s")
        time.sleep(0.05)
    return value


def link(source: str, target: str) -> None:
    if not os.path.exists(target):
        os.link(source, target)


if __name__ == "__main__":
    main()
