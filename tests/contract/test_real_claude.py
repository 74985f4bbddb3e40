"""What we launch Claude Code with, against the real one: it talks to our URL only, with our token and our context.

It runs with an environment and a home of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import claude, config
from selfhost_cli.keeper.prewarming import Prewarming
from selfhost_cli.prefix import Prefix, Store, recording
from selfhost_cli.sandbox.assets import Assets
from tests.proxy.kit import eventually
from tests.terminal import Terminal

TOKEN = "front-token-of-this-test"
CONTEXT = 54_321


def events(text: str) -> bytes:
    """A streamed answer of one text block."""
    usage = {"input_tokens": 7, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 1}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "qwen3-coder:30b", "content": []}
    stream: list[dict[str, Any]] = [
        {"type": "message_start", "message": message | {"stop_reason": None, "stop_sequence": None, "usage": usage}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 3},
        },
        {"type": "message_stop"},
    ]
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in stream)


class Api:
    """Answers every request with the same text and remembers method, path, headers and body."""

    def __init__(self, text: str) -> None:
        self.seen: list[tuple[str, str, dict[str, str], dict[str, Any]]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                api.seen.append((self.command, self.path, headers, json.loads(body or b"{}")))
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                self.wfile.write(events(text))

            do_GET = do_HEAD = do_POST = do_CONNECT = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Api:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def binary(downloads: Assets) -> Path:
    return downloads.claude


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    (home / ".claude").mkdir(parents=True)
    return home


@pytest.fixture
def api() -> Iterator[Api]:
    with Api("Hello from the box.") as api:
        yield api


@pytest.fixture
def elsewhere() -> Iterator[Api]:
    """Where nothing may go."""
    with Api("You went the wrong way.") as api:
        yield api


def launched(
    binary: Path, api: Api, home: Path, *args: str, notice: claude.Notice | None = None, **user: str
) -> claude.Launch:
    return claude.launch(
        binary,
        args,
        url=api.url,
        token=TOKEN,
        model="qwen3-coder:30b",
        context=CONTEXT,
        env={"PATH": "/usr/bin:/bin", **user},
        home=home,
        notice=notice,
    )


def run(
    binary: Path, api: Api, home: Path, *args: str, notice: claude.Notice | None = None, **user: str
) -> subprocess.CompletedProcess[str]:
    """Run the real claude as `selfhost claude` does, from an otherwise empty environment."""
    launch = launched(binary, api, home, *args, notice=notice, **user)
    return executed(launch.argv, launch.env, home)


def executed(argv: Sequence[str], env: Mapping[str, str], home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        env=dict(env),
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_answer_is_printed_and_one_request_was_sent_with_our_token(
    binary: Path, api: Api, elsewhere: Api, home: Path
) -> None:
    real = {"ANTHROPIC_API_KEY": "sk-real", "ANTHROPIC_BASE_URL": elsewhere.url, "ANTHROPIC_CUSTOM_HEADERS": "x-a: b"}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), elsewhere.url)
    done = run(binary, api, home, "-p", "say hi", "--output-format", "json", **real, **proxies)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["result"] == "Hello from the box."
    assert result["is_error"] is False
    assert result["modelUsage"]["qwen3-coder:30b"]["contextWindow"] == CONTEXT
    assert elsewhere.seen == []
    [(method, path, headers, body)] = api.seen
    assert (method, path.partition("?")[0]) == ("POST", "/v1/messages")
    assert headers["authorization"] == f"Bearer {TOKEN}"
    assert "x-api-key" not in headers
    assert "x-a" not in headers
    assert body["model"] == "qwen3-coder:30b"
    assert body["max_tokens"] == CONTEXT // 8
    assert "thinking" not in body
    assert "safeguards" not in body


@pytest.mark.parametrize("where", ["user", "project"])
def test_a_settings_file_cannot_send_it_elsewhere(
    binary: Path, api: Api, elsewhere: Api, home: Path, where: str
) -> None:
    env = {
        "ANTHROPIC_BASE_URL": elsewhere.url,
        "ANTHROPIC_AUTH_TOKEN": "another",
        "ANTHROPIC_API_KEY": "another",
        "ANTHROPIC_MODEL": "another",
        "CLAUDE_CODE_USE_BEDROCK": "1",
    }
    name = "settings.json" if where == "user" else "settings.local.json"
    (home / ".claude" / name).write_text(json.dumps({"env": env}))
    done = run(binary, api, home, "-p", "say hi")
    assert (done.returncode, done.stdout.strip()) == (0, "Hello from the box."), done.stderr
    assert elsewhere.seen == []
    assert [headers["authorization"] for _, _, headers, _ in api.seen] == [f"Bearer {TOKEN}"]
    assert [body["model"] for _, _, _, body in api.seen] == ["qwen3-coder:30b"]


def test_our_settings_in_front_are_accepted_by_other_subcommands(binary: Path, api: Api, home: Path) -> None:
    done = run(binary, api, home, "mcp", "list")
    assert done.returncode == 0, done.stderr
    assert "No MCP servers" in done.stdout
    assert api.seen == []


def test_a_settings_option_of_the_persons_own_replaces_ours(binary: Path, api: Api, home: Path) -> None:
    """Why nothing of ours is added beside it."""
    ours, mine = home / "ours", home / "mine"
    launch = launched(binary, api, home, "-p", "say hi")
    settings = [json.dumps({"hooks": hooks(f"touch {mark}")}) for mark in (ours, mine)]
    argv = [launch.argv[0], "--settings", settings[0], "--settings", settings[1], "-p", "say hi"]
    done = executed(argv, launch.env, home)
    assert (done.returncode, mine.exists(), ours.exists()) == (0, True, False), done.stderr


@pytest.mark.parametrize("args", [["doctor"], ["auth", "status"], ["config", "list"], ["plugin", "list"], ["--help"]])
def test_our_settings_in_front_change_nothing_for_other_subcommands(
    binary: Path, api: Api, home: Path, args: list[str]
) -> None:
    launch = launched(binary, api, home, *args, notice=claude.Notice(home / "n.json", home / "n.txt"))
    assert launch.argv[1] == "--settings"
    executed(launch.argv, launch.env, home)
    plain = executed([launch.argv[0], *args], launch.env, home)
    ours = executed(launch.argv, launch.env, home)  # the first one of all makes files, and tells of it
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)


def hooks(command: str) -> dict[str, object]:
    return {"UserPromptSubmit": [{"hooks": [{"type": "command", "command": command}]}]}


@contextmanager
def session(binary: Path, api: Api, home: Path, notice: claude.Notice) -> Iterator[Terminal]:
    """A person's session in a directory that they trust."""
    known = {"hasCompletedOnboarding": True, "projects": {str(home): {"hasTrustDialogAccepted": True}}}
    (home / ".claude" / ".claude.json").write_text(json.dumps(known))
    launch = launched(binary, api, home, "--tools", "", "--system-prompt", "Be brief.", notice=notice)
    terminal = Terminal(launch.argv, env=launch.env, cwd=home)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.fixture
def notice(home: Path) -> claude.Notice:
    folder = home / 'it\'s "a" $(place)'
    folder.mkdir()
    return claude.Notice(folder / "n.json", folder / "n.txt")


def tell(notice: claude.Notice, text: str) -> None:
    notice.for_hooks.write_text(json.dumps({"systemMessage": text}))
    notice.line.write_text(text)


def prompts(api: Api) -> list[dict[str, Any]]:
    """What reached the model, without the session's id."""
    return [{name: value for name, value in body.items() if name != "metadata"} for _, _, _, body in api.seen]


@pytest.mark.parametrize("form", ["text", "json", "stream-json"])
def test_a_notice_reaches_neither_the_model_nor_the_output_of_a_print(
    binary: Path, api: Api, home: Path, notice: claude.Notice, form: str
) -> None:
    def say_hi(notice: claude.Notice | None) -> subprocess.CompletedProcess[str]:
        more = ["--verbose"] if form == "stream-json" else []
        done = run(binary, api, home, "-p", "say hi", "--output-format", form, *more, notice=notice)
        assert done.returncode == 0, done.stderr
        return done

    plain, quiet = say_hi(None), say_hi(notice)
    tell(notice, "WALNUT")
    loud = say_hi(notice)
    first, second, third = prompts(api)
    assert first == second == third
    shapes = [[_shape(line) for line in done.stdout.splitlines()] for done in (plain, quiet, loud)]
    assert shapes[0] == shapes[1]
    if form == "stream-json":  # whoever reads events may read that one too
        assert [shape for shape in shapes[2] if shape != ("system", "informational")] == shapes[0]
    else:
        assert shapes[2] == shapes[0]
        assert "WALNUT" not in loud.stdout


def _shape(line: str) -> object:
    """A line of text, or the sort or the fields of a JSON object."""
    try:
        value = json.loads(line)
    except ValueError:
        return line
    return (value["type"], value.get("subtype")) if value["type"] != "result" else sorted(value)


def test_a_notice_is_seen_in_a_session_by_the_person_alone(
    binary: Path, api: Api, home: Path, notice: claude.Notice
) -> None:
    with session(binary, api, home, notice) as terminal:
        terminal.watch(lambda: "manualmode" in terminal.shown)
        tell(notice, "WALNUT ends at 14:20")
        terminal.watch(lambda: "WALNUTendsat14:20" in terminal.shown)  # nobody typed anything
        terminal.type("say hi\r")
        terminal.watch(lambda: "UserPromptSubmitsays:WALNUT" in terminal.shown)
        terminal.watch(lambda: "Stopsays:WALNUT" in terminal.shown)
        notice.for_hooks.unlink()
        notice.line.unlink()
        before = terminal.shown.count("WALNUT")
        terminal.type("again\r")
        terminal.watch(lambda: len(prompts(api)) == 2 and terminal.shown.count("Hellofromthebox.") == 2)
        assert terminal.shown.count("says:WALNUT") == 2, before
    assert "WALNUT" not in json.dumps(prompts(api))


def test_the_persons_own_hooks_and_status_line_go_on(
    binary: Path, api: Api, home: Path, notice: claude.Notice, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {"hooks": hooks("touch mine"), "statusLine": {"type": "command", "command": "echo MAPLE"}}
    (home / ".claude" / "settings.json").write_text(json.dumps(mine))
    monkeypatch.chdir(home)
    tell(notice, "WALNUT")
    with session(binary, api, home, notice) as terminal:
        terminal.watch(lambda: "MAPLE" in terminal.shown)
        terminal.type("say hi\r")
        terminal.watch(lambda: "UserPromptSubmitsays:WALNUT" in terminal.shown)
    assert (home / "mine").exists()


def test_it_is_the_version_that_these_facts_are_about(binary: Path, home: Path) -> None:
    assert claude.seen_version(binary, home) == claude.Seen(claude.SEEN)


@pytest.mark.parametrize(("mode", "only_there"), [("cli", "AskUserQuestion"), ("sdk-cli", "")])
def test_what_it_begins_with_is_recorded_without_the_users_doings(
    binary: Path, tmp_path: Path, mode: str, only_there: str
) -> None:
    home, marker = tmp_path / "home", tmp_path / "ran"
    (home / ".claude").mkdir(parents=True)
    hook = [{"hooks": [{"type": "command", "command": f"touch {marker}"}]}]
    settings = {
        "permissions": {"deny": ["WebSearch"]},
        "hooks": {"SessionStart": hook},
        "apiKeyHelper": f"touch {marker}",
    }
    (home / ".claude/settings.json").write_text(json.dumps(settings))
    (home / ".claude.json").write_text(
        json.dumps({"mcpServers": {"mine": {"command": "touch", "args": [str(marker)]}}})
    )
    before = sorted(str(path) for path in home.rglob("*"))
    env = {"PATH": os.defpath, "HOME": str(home)}
    prefix = recording.record(binary, mode, model="qwen3-coder:30b", context=65_536, env=env)
    assert prefix
    assert (prefix.mode, prefix.version) == (mode, claude.SEEN)
    names = {tool["name"] for tool in prefix.body["tools"]}
    assert "Bash" in names
    assert "WebSearch" not in names, "what the user denied is not in their tools"
    assert not only_there or only_there in names
    assert recording.PROMPT not in [block["text"] for block in prefix.body["messages"][0]["content"]]
    assert not marker.exists()
    assert sorted(str(path) for path in home.rglob("*")) == before


def test_a_program_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    mute = tmp_path / "claude"
    mute.write_text("#!/bin/sh\nexit 0\n")
    mute.chmod(0o755)
    assert (
        recording.record(mute, "cli", model="m", context=65_536, env={"PATH": os.defpath, "HOME": str(tmp_path)})
        is None
    )


def test_the_keeper_records_both_ways_to_run_it_and_again_when_it_has_another_version(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = config.load("test", env={"SELFHOST_HOME": str(tmp_path), "SELFHOST_CLAUDE": str(binary)})
    settings.paths.make()
    store = Store(settings.paths.prefixes)
    store.keep(Prefix("cli", "2.0.0", {"system": "old", "tools": [], "messages": []}))
    asked: list[str] = []

    async def keep() -> None:
        prewarming = Prewarming(settings)
        prewarming.ahead_of(str(tmp_path), "qwen3-coder:30b", 65_536)
        await eventually(lambda: {one.version for one in store.all().values()} == {claude.SEEN}, 40)
        await eventually(lambda: len(store.all()) == 2, 40)
        asked.extend(store.all())
        before = settings.paths.prefixes.stat().st_mtime_ns
        prewarming.ahead_of(str(tmp_path), "qwen3-coder:30b", 65_536)  # all is known now
        await asyncio.sleep(0)
        assert settings.paths.prefixes.stat().st_mtime_ns == before
        prewarming.stop()

    asyncio.run(keep())
    assert asked == ["cli", "sdk-cli"]
