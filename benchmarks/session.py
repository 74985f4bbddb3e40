"""A session of the real Claude Code through us, through others' proxies and straight to the engine; and its first turn.

    .venv/bin/python benchmarks/session.py [--json] [--full] [--only session|first] [--rounds N] [--cache DIR]

The session is recorded first, against scripted answers: turns, tool calls, another conversation, a subagent, a search,
a compaction. Then the recorded requests go to llama.cpp's real server with a small model, to one of its own on every
way, each request on all ways before the next one, so that a busy moment meets all of them:

    ours         the front and the engine side, from a Claude Code that `selfhost claude` launched
    LiteLLM, claude-code-router
                 as scripts/peers installed them, from a Claude Code that was told where the server is
    raw          the engine's own /v1/messages, from the same
    raw, launched
                 the same, from the Claude Code that `selfhost claude` launched

The first turn, through us: cold, at an engine that has read nothing; warm, at one that has read ahead what the keeper
keeps of a session's first request, in the same project (another prompt, another process) and in another one (another
home, too). Every turn has an engine of its own. A bound is what the tokens allow: those of the prompt, over those that
were not read ahead.

Without --full the session has four tools and a short system prompt, the first turn four others and Claude Code's own
system prompt. Five engines and the peers take 6 GB of memory. Nothing of the recordings is printed, or kept afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from platform import release

import httpx
from figures import Figure, as_json, as_table, columns, figure, machine
from losses import engine_python, say, wait_for
from peers import Peer, Site, installed
from prefix import (
    MODEL,
    READ,
    READ_PLAN,
    TOKEN,
    Json,
    Recorded,
    Recorder,
    Step,
    call,
    common,
    counters,
    engine,
    last_prompt,
    proxied,
    record,
    rendered,
    run_claude,
    text,
    tokenized,
)
from proxy import FRONT, Broken, answers, free_port, running

from selfhost_cli import config
from selfhost_cli.prefix import taken
from selfhost_cli.sandbox import assets, demo

REUSED_GOAL = 99.0
SAME_GOAL, OTHER_GOAL = 10.0, 4.0
ANSWER_TOKENS = 16
REQUEST_S = 1800.0


@dataclass(frozen=True)
class Size:
    """How much of Claude Code: tools of the session, with which system prompt (none is its own), tools of the first
    turn, which always has its own system prompt; and the engine's context (tokens)."""

    name: str
    tools: str
    system: Sequence[str]
    first_tools: str
    context: int


REDUCED = Size(
    "reduced", "Agent,Edit,Read,WebSearch", ("--system-prompt", demo.SYSTEM_PROMPT), "Bash,Edit,Read,Write", 16_384
)
FULL = Size("full", "default", (), "default", 32_768)


@dataclass(frozen=True)
class Asked:
    """What became of a request. Seconds; tokens of its prompt, `shared` with an earlier one, `reused` by the engine."""

    first: float
    took: float
    total: int
    shared: int
    reused: int
    failed: str


@dataclass
class Way:
    """`url`: where Claude Code asks. `server`: the engine behind it."""

    name: str
    url: str
    server: str
    requests: Sequence[Recorded]
    asked: list[Asked] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of figures")
    parser.add_argument(
        "--full",
        action="store_true",
        help="every tool: 19 000 tokens; on a CPU, the first turns take half an hour a round, the session hours",
    )
    parser.add_argument("--only", choices=("session", "first"), help="one half of it")
    parser.add_argument("--rounds", type=int, default=3, help="of the first turn (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=config.paths("default", os.environ).cache)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends with us, as on Ctrl-C
    made = assets.ensure(options.cache, lambda line: None)
    size = FULL if options.full else REDUCED
    figures: list[Figure] = []

    def show(part: str) -> None:
        if not options.json:
            print(part, end="\n\n", flush=True)

    show(machine())
    try:
        with tempfile.TemporaryDirectory(prefix="selfhost-session-") as name:
            place = Path(name)
            python = engine_python(place, made)
            if options.only != "first":
                ways = session(place, python, made, size, options.cache)
                figures += [one for way in ways for one in way_figures(way)]
                show(table(ways))
            if options.only != "session":
                turns = first_turns(place, python, made, size, options.rounds)
                turns += [one for each in (REDUCED, FULL) for one in bounds(place, python, made, each)]
                figures += turns
                show(as_table(turns))
    except Broken as why:
        sys.exit(str(why))
    except KeyboardInterrupt:
        sys.exit(130)
    if options.json:
        print(as_json(figures))


# --- the session --------------------------------------------------------------------------------------------------


def steps(size: Size) -> list[Step]:
    edit = call("Edit", file_path="{folder}/plan.md", old_string="dawn", new_string="noon")
    agent = call(
        "Agent",
        description="Read a file",
        prompt="Read {folder}/note.txt and report the secret word.",
        subagent_type="general-purpose",
        run_in_background=False,
    )
    search, found = call("WebSearch", query="when do ships sail"), text("They sail at high tide.")
    walnut, summary = (
        text("The secret word is walnut."),
        text("<summary>A file was read, its word is walnut.</summary>"),
    )
    session = [
        Step("a turn", "Read note.txt.", [READ, walnut]),
        Step("the next turn", "We sail at noon: plan.md.", [READ_PLAN, edit, text("Noon it is.")], goes_on=True),
        Step("another conversation", "How many lines has note.txt?", [READ, text("It has three lines.")]),
        Step("back in the first", "What was the secret word?", [text("It was walnut.")], goes_on=True),
        Step("a subagent", "Let an agent read note.txt.", [agent, READ, walnut, text("It says walnut.")], goes_on=True),
        Step("a search", "When do ships sail?", [search, found, text("At high tide.")], goes_on=True),
        Step("back once more", "And what was the plan?", [text("To sail.")], goes_on=True),
        Step("a compaction", "/compact", [summary], goes_on=True),
        Step("after it", "Say the word again.", [text("Walnut.")], goes_on=True),
    ]
    return [replace(step, tools=size.tools) for step in session]


def session(place: Path, python: Path, made: assets.Assets, size: Size, cache: Path) -> list[Way]:
    recorded = {}
    for launched in (False, True):
        home = place / f"session-{launched}"
        project(home / "project", "a ship's log")
        recorded[launched] = record(
            home, made.claude, launched=launched, session=steps(size), system=size.system, context=size.context
        )
        kinds = [f"{request.step}, {request.cls}" for request in recorded[launched]]
        say(f"recorded {'launched' if launched else 'plain'}: {len(kinds)} requests")
    with ExitStack() as stack:
        ways = []

        def serving(name: str) -> str:
            return stack.enter_context(engine(made_folder(place / name), python, made.model, size.context))

        front, _, server = stack.enter_context(ours(made_folder(place / "ours"), python, made, size))
        ways.append(Way("ours", front, server, recorded[True]))
        for peer in installed(cache, lambda name: say(f"{name} is left out: run scripts/peers")):
            server = serving(f"engine of {peer.name}")
            try:
                url = stack.enter_context(beside(peer, made_folder(place / peer.name), server))
            except Broken as why:
                say(f"{peer.name} is left out: {why}")
                continue
            ways.append(Way(peer.name, url, server, recorded[False]))
        for name, launched in (("raw", False), ("raw, launched", True)):
            server = serving(name)
            ways.append(Way(name, server, server, recorded[launched]))
        for number in range(max(len(way.requests) for way in ways)):
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                if number < len(way.requests):
                    ask_next(way, number)
    return ways


def ask_next(way: Way, number: int) -> None:
    request = way.requests[number]
    before = counters(way.server)
    first, took, failed = ask(way.url, request)
    read, reused = (now - then for now, then in zip(counters(way.server), before, strict=True))
    tokens = last_prompt(way.server) if read + reused else []
    shared = max((common(tokens, other) for other in way.prompts), default=0)
    way.prompts.append(tokens)
    way.asked.append(Asked(first, took, len(tokens), shared, reused, failed))
    said = f"{len(tokens)} tokens, {shared} shared, {reused} reused, {first:.2f} s {failed}"
    say(f"{number + 1:2} {request.step}, {request.cls}, {way.name}: {said}")


def ask(url: str, request: Recorded) -> tuple[float, float, str]:
    """Seconds to the first of what is answered, and to its end; and why it failed."""
    body = request.body | {"max_tokens": ANSWER_TOKENS, "stream": True}
    headers = {"authorization": f"Bearer {TOKEN}", **request.headers}
    began = time.perf_counter()
    first, ended, failed = 0.0, False, ""
    try:
        with httpx.stream(
            "POST", f"{url}/v1/messages?beta=true", json=body, headers=headers, timeout=REQUEST_S, trust_env=False
        ) as answer:
            if answer.status_code != 200:
                failed = f"{answer.status_code}: {answer.read()[:200].decode(errors='replace')}"
            for event in events(answer.iter_lines() if not failed else ()):
                first = first or (time.perf_counter() - began if event["type"] in SAYS else 0.0)
                ended = ended or event["type"] == "message_stop"
                if event["type"] == "error":
                    failed = json.dumps(event)[:200]
    except httpx.HTTPError as error:
        failed = repr(error)
    took = time.perf_counter() - began
    return first or took, took, failed or ("" if ended else "it broke off")


SAYS = ("content_block_delta", "message_delta")
"""What cannot come before the first token: an answer begins with `message_start`, which some send at once."""


def events(lines: Iterator[str] | tuple[()]) -> Iterator[Json]:
    for line in lines:
        if line.startswith("data:"):
            event = json.loads(line[len("data:") :])
            if isinstance(event, dict) and "type" in event:
                yield event


# --- the first turn -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class First:
    """The first requests of three sessions: two in one project, one in another. What was kept is of `one`."""

    one: Recorded
    same: Recorded
    other: Recorded
    project: Path
    another: Path

    def ahead(self, directory: Path) -> Json:
        """What the keeper has a box read ahead of a session there."""
        prefix = taken(self.one.headers["user-agent"], json.dumps(self.one.body).encode())
        if prefix is None:
            raise Broken("no prefix is kept of Claude Code's first request")
        return prefix.ahead(str(directory))


def first_turns(place: Path, python: Path, made: assets.Assets, size: Size, rounds: int) -> list[Figure]:
    turns = record_first(place, made, size)
    took: dict[str, list[float]] = {name: [] for name in ("cold", "same", "other", "ahead, same", "ahead, other")}

    def turn(number: int, name: str, request: Recorded, directory: Path | None = None) -> None:
        with ours(made_folder(place / f"{name}-{number}"), python, made, size) as (front, box, _):
            if directory:
                took[f"ahead, {name}"].append(read_ahead(box, turns.ahead(directory)))
            took[name].append(must(ask(front, request)))

    ways = [("cold", turns.one, None), ("same", turns.same, turns.project), ("other", turns.other, turns.another)]
    for number in range(rounds):
        for name, request, directory in ways[:: -1 if number % 2 else 1]:
            turn(number, name, request, directory)
        say(f"first turn {number + 1}: " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in took.items()))

    def against(name: str) -> list[float]:
        return [a / b for a, b in zip(took["cold"], took[name], strict=True)]

    return [
        figure("first turn warm in the same project, of cold", against("same"), "×", SAME_GOAL, more=True),
        figure("first turn warm in another project, of cold", against("other"), "×", OTHER_GOAL, more=True),
        figure("first token of the first turn, cold", took["cold"], "s"),
        figure("first token of the first turn, warm in the same project", took["same"], "s"),
        figure("first token of the first turn, warm in another project", took["other"], "s"),
        figure("reading ahead for the same project", took["ahead, same"], "s"),
        figure("reading ahead for another project", took["ahead, other"], "s"),
    ]


def record_first(place: Path, made: assets.Assets, size: Size) -> First:
    """Three processes, two homes, two projects with repositories of their own."""

    def first(name: str, prompt: str) -> Recorded:
        folder, home = place / name / "project", place / name / "home"
        (home / ".claude").mkdir(parents=True, exist_ok=True)
        words = ["-p", prompt, "--output-format", "json", "--tools", size.first_tools]
        with Recorder() as recorder:
            recorder.step = "the first turn"
            run_claude(made.claude, words, folder, home, recorder.url, launched=True, context=size.context)
        return recorder.requests[0]

    project(place / "one" / "project", "a ship's log")
    project(place / "another" / "project", "recipes for bread")
    return First(
        first("one", "Read note.txt and say how many lines it has."),
        first("one", "Which files are in this folder, and what are they for?"),
        first("another", "Explain what this project does."),
        place / "one" / "project",
        place / "another" / "project",
    )


def project(folder: Path, about: str) -> None:
    """A repository with a commit, a changed file and a CLAUDE.md, as people have them."""
    folder.mkdir(parents=True)
    (folder / "CLAUDE.md").write_text(f"# {about.capitalize()}\n\nThis repository holds {about}. Keep lines short.\n")
    (folder / "note.txt").write_text("The secret word is walnut.\n" * 3)
    (folder / "plan.md").write_text("We sail at dawn.\n")
    git = ["git", "-c", "user.name=A. Body", "-c", "user.email=body@localhost", "-C", str(folder)]
    env = {"PATH": os.environ.get("PATH", os.defpath), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for words in (["init", "--quiet", "--initial-branch", "main"], ["add", "."], ["commit", "--quiet", "-m", about]):
        subprocess.run([*git, *words], env=env, stdin=subprocess.DEVNULL, check=True)
    (folder / "todo.md").write_text(f"- more {about}\n")


def must(asked: tuple[float, float, str]) -> float:
    first, _, failed = asked
    if failed:
        raise Broken(f"the first turn failed: {failed}")
    return first


def read_ahead(box: str, prefix: Json) -> float:
    """The seconds until the engine side has read it."""
    began = time.perf_counter()
    headers = {"authorization": f"Bearer {TOKEN}"}
    httpx.post(f"{box}/selfhost/prefix", json=prefix, headers=headers, timeout=60, trust_env=False).raise_for_status()

    def warm() -> bool:
        told = httpx.get(f"{box}/health", headers=headers, timeout=60, trust_env=False).json()["prefix"]
        if told["state"] == "refused":
            raise Broken(f"the prefix was refused: {told}")
        return bool(told["state"] == "warm")

    wait_for(warm, REQUEST_S)
    return time.perf_counter() - began


def bounds(place: Path, python: Path, made: assets.Assets, size: Size) -> list[Figure]:
    """What the tokens allow, for the prompts as the engine gets them; and what they would with lines moved."""
    turns = record_first(made_folder(place / f"bounds-{size.name}"), made, size)
    asked = {
        "ahead, same": turns.ahead(turns.project),
        "ahead, other": turns.ahead(turns.another),
        "one": turns.one.body,
        "same": turns.same.body,
        "other": turns.other.body,
    }
    with ours(made_folder(place / f"peek-{size.name}"), python, made, size) as (front, _, server):
        prompts = {name: peek(front, server, body) for name, body in asked.items()}
        changing = (date.today().isoformat(), release())
        moved = [settled(prompts[a], prompts[b], changing) for a, b in (("one", "other"), ("other", "one"))]
        tokens = {name: tokenized(server, prompt) for name, prompt in prompts.items()}
        one, other = (tokenized(server, prompt) for prompt in moved)
    rows = [
        ("same project", tokens["ahead, same"], tokens["same"]),
        ("another project", tokens["ahead, other"], tokens["other"]),
        ("another project, what varies moved to the end", one, other),
    ]
    return [one for name, ahead, now in rows for one in bound(f"{size.name}, {name}", len(now), common(ahead, now))]


def bound(name: str, tokens: int, ahead: int) -> list[Figure]:
    return [
        figure(f"bound, {name}", [tokens / max(1, tokens - ahead)], "×"),
        figure(f"tokens, {name}", [tokens], "tokens"),
        figure(f"of these, read ahead, {name}", [ahead], "tokens"),
    ]


def peek(front: str, server: str, body: Json) -> str:
    """The prompt that the engine makes of it, without letting it read it to the end."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    asked = body | {"max_tokens": 1, "stream": True}
    with httpx.stream("POST", f"{front}/v1/messages", json=asked, headers=headers, timeout=60, trust_env=False) as said:
        if said.status_code != 200:
            raise Broken(f"{said.status_code}: {said.read()[:200].decode(errors='replace')}")
        wait_for(lambda: is_reading(server), REQUEST_S)
        prompt = rendered(server)
    wait_for(lambda: not is_reading(server), REQUEST_S)  # it finishes the batch that it is at
    return prompt


def is_reading(server: str) -> bool:
    [slot] = httpx.get(f"{server}/slots", timeout=60, trust_env=False).raise_for_status().json()
    return bool(slot["is_processing"])


def settled(prompt: str, other: str, changing: Sequence[str]) -> str:
    """The prompt, its lines that the other one does not have, or that hold what is `changing`, behind all others."""
    there = set(other.split("\n"))
    lines = prompt.split("\n")
    stays = [line for line in lines if line in there and not any(word in line for word in changing)]
    moves = [line for line in lines if line not in there or any(word in line for word in changing)]
    return "\n".join([*stays, *moves])


# --- servers ------------------------------------------------------------------------------------------------------


def made_folder(path: Path) -> Path:
    path.mkdir()
    return path


@contextmanager
def ours(folder: Path, python: Path, made: assets.Assets, size: Size) -> Iterator[tuple[str, str, str]]:
    """An engine, the engine side and the front. The URLs of the front, the engine side, and the engine."""
    with (
        engine(folder, python, made.model, size.context) as server,
        proxied(folder, server) as box,
        running([sys.executable, "-c", FRONT, box, TOKEN]) as (_, port),
    ):
        yield f"http://127.0.0.1:{port}", box, server


@contextmanager
def beside(peer: Peer, home: Path, server: str) -> Iterator[str]:
    port = free_port()
    arguments, env = peer.settle(Site(home, port, server, MODEL, TOKEN))
    with running([str(peer.program), *arguments], {"HOME": str(home), **env}, lambda: answers(port)):
        yield f"http://127.0.0.1:{port}"


# --- figures ------------------------------------------------------------------------------------------------------


def way_figures(way: Way) -> list[Figure]:
    """In one order for every way: the table has a row for each."""
    shared = sum(one.shared for one in way.asked)
    kept = 100 * sum(min(one.reused, one.shared) for one in way.asked) / max(1, shared)
    failed = [one for one in way.asked if one.failed]
    is_ours = way.name == "ours"
    goals = (REUSED_GOAL, 0) if is_ours else (None, None)
    figures = [
        figure("of the shared tokens, reused", [kept], "%", goals[0], more=True),
        figure("requests that failed", [len(failed)], "requests", goals[1]),
        figure("first token of the first turn", [way.asked[0].first], "s"),
        figure("first token of every later request", [one.first for one in way.asked[1:]], "s"),
        figure("the whole session", [sum(one.took for one in way.asked)], "s"),
        figure("tokens of all prompts", [sum(one.total for one in way.asked)], "tokens"),
        figure("of these, shared with an earlier prompt", [shared], "tokens"),
        figure("read by the engine", [sum(one.total - one.reused for one in way.asked)], "tokens"),
    ]
    return [replace(one, figure=f"{way.name}: {one.figure}") for one in figures]


def table(ways: Sequence[Way]) -> str:
    rows: list[tuple[str, ...]] = [("", *(way.name for way in ways), "goal")]
    for figures in zip(*(way_figures(way) for way in ways), strict=True):
        mine = figures[0]
        goal = "" if mine.goal is None else f"{'≥' if mine.unit == '%' else '≤'} {mine.goal:g}"
        verdict = {True: f"{goal} met", False: f"{goal} MISSED", None: ""}[mine.met]
        rows.append((mine.figure.partition(": ")[2], *map(cell, figures), verdict))
    return columns(rows)


def cell(one: Figure) -> str:
    if one.unit == "s":
        return f"{one.value:.2f} s" + (f" (± {one.spread:.2f})" if one.spread else "")
    return f"{one.value:.1f} %" if one.unit == "%" else f"{one.value:.0f}"


if __name__ == "__main__":
    main()
