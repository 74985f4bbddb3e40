"""`selfhost claude` as a process: what it becomes, what it says when it cannot, what it costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import attach, config
from selfhost_cli.cli import entry, launch
from selfhost_cli.errors import MayBeBilling, NotSetUp, SelfhostError
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import State
from tests.fakes.front import StubFront
from tests.fakes.rental import make_rental

TOKEN = "the-token-of-the-front"
LABEL = "selfhost-0123456789-a"

RENTAL = make_rental(
    LABEL, created_at=time.time(), dph_total=0.34, model="qwen3-coder:30b", context=65_536, instance_id=4711
)

# Says everything about itself as JSON, and ends as it is told.
CLAUDE = f"""#!{sys.executable} -IS
import json, os, sys
if sys.argv[1:] == ["--version"]:
    print("2.1.330 (Claude Code)")
    sys.exit()
print(json.dumps({{
    "pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "stdin": sys.stdin.read(),
}}))
sys.stdout.flush()
if "die" in sys.argv:
    os.kill(os.getpid(), 9)
sys.exit(42)
"""


@dataclass
class User:
    """A person with a home, a PATH and a profile."""

    home: Path
    profile: str = "default"

    @property
    def env(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "SELFHOST_HOME": str(self.home / "selfhost"),
            "PATH": f"{self.home / 'bin'}:/usr/bin:/bin",
            "ANTHROPIC_API_KEY": "the user's own",
        }

    @property
    def paths(self) -> config.Paths:
        return config.paths(self.profile, self.env)

    def install_claude(self, text: str = CLAUDE) -> None:
        (self.home / "bin").mkdir(parents=True, exist_ok=True)
        (self.home / "bin" / "claude").write_text(text)
        (self.home / "bin" / "claude").chmod(0o755)

    def rent(self, state: State, label: str = LABEL) -> Ledger:
        self.paths.make()
        ledger = Ledger(self.paths.ledger)
        rental = replace(RENTAL, label=label)
        ledger.intend(rental)
        ledger.advance(rental, state)
        return ledger

    def keeper(self, front: StubFront) -> None:
        """Let `front` be this profile's keeper."""
        self.paths.keeper_file.write_text(json.dumps({"pid": 1, "port": front.port, "version": "0"}))
        self.paths.front_token.write_text(TOKEN)

    def selfhost(self, *args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "selfhost_cli", *args]
        return subprocess.run(
            command, env=self.env | env, cwd=self.home, input=stdin, capture_output=True, text=True, timeout=60
        )


def state(reached: str = "up", reason: str = "", label: str = LABEL) -> dict[str, tuple[int, Any]]:
    return {"state": (200, {"rentals": [{"label": label, "state": reached, "reason": reason}]})}


@pytest.fixture
def user(tmp_path: Path) -> User:
    user = User(tmp_path / "user")
    user.install_claude()
    return user


def test_claude_gets_arguments_stdin_and_directory_and_keeps_its_exit_code(user: User) -> None:
    args = ["-p", "say hi", "--profile", "x", "--help", ""]
    user.rent(State.READY).close()
    with StubFront(TOKEN, state()) as front:
        user.keeper(front)
        done = user.selfhost("claude", *args, stdin="piped")
    seen = json.loads(done.stdout)
    assert done.returncode == 42
    assert done.stderr == ""
    assert seen["argv"][2:] == args
    assert seen["argv"][0] == "--settings"
    assert (seen["stdin"], seen["cwd"]) == ("piped", str(user.home))
    assert seen["env"]["ANTHROPIC_BASE_URL"] == f"http://127.0.0.1:{front.port}"
    assert seen["env"]["ANTHROPIC_AUTH_TOKEN"] == TOKEN
    assert seen["env"]["ANTHROPIC_API_KEY"] == ""
    assert seen["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "65536"
    assert [(name, header) for name, header, _ in front.seen] == [("prove", None), ("state", f"Bearer {TOKEN}")]


def test_a_variable_of_the_old_system_is_told_once_on_stderr(user: User) -> None:
    user.rent(State.READY).close()
    with StubFront(TOKEN, state()) as front:
        user.keeper(front)
        first, second = (user.selfhost("claude", MODEL_NAME="x", OLLAMA_HOST="pw") for _ in range(2))
    assert (
        first.stderr
        == "selfhost: MODEL_NAME and OLLAMA_HOST are not used: `selfhost config show` tells what is, instead\n"
    )
    assert (first.returncode, second.returncode, second.stderr) == (42, 42, "")


def test_claude_is_the_same_process_and_dies_of_its_own_signals(user: User) -> None:
    user.rent(State.READY).close()
    with StubFront(TOKEN, state()) as front:
        user.keeper(front)
        command = [sys.executable, "-m", "selfhost_cli", "claude", "die"]
        ours = subprocess.Popen(command, env=user.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        out = ours.communicate(timeout=60)[0]
    assert json.loads(out)["pid"] == ours.pid
    assert ours.returncode == -signal.SIGKILL


def test_the_short_way_imports_nothing_heavy_and_asks_the_version_once(user: User) -> None:
    """The whole way up to exec, by what the interpreter says that it imported."""
    user.rent(State.READY).close()
    with StubFront(TOKEN, state()) as front:
        user.keeper(front)
        user.selfhost("claude")
        done = user.selfhost("claude", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time" in line}
    assert done.returncode == 42
    assert {"selfhost_cli.claude", "selfhost_cli.attach", "sqlite3"} <= imported
    tops = {name.split(".")[0] for name in imported}
    assert not tops & {"typer", "rich", "vastai", "paramiko", "sshtunnel", "aiohttp", "httpx", "redis", "requests"}
    assert not tops & {"asyncio", "subprocess", "tomllib", "secrets", "shutil", "tempfile", "logging", "inspect_"}


def test_the_environment_for_other_clients_is_the_one_claude_gets(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    user.rent(State.READY).close()
    for name, value in user.env.items():
        monkeypatch.setenv(name, value)
    with StubFront(TOKEN, state()) as front:
        user.keeper(front)
        told = launch.environment(config.load("default"))
        seen = json.loads(user.selfhost("claude").stdout)["env"]
    assert told["ANTHROPIC_AUTH_TOKEN"] == TOKEN
    assert told.items() <= seen.items()
    assert set(seen) - set(told) <= set(user.env) | {"LC_CTYPE"}


def test_a_shell_that_evaluates_env_has_nothing_left_that_leads_elsewhere(user: User) -> None:
    user.rent(State.READY).close()
    mine = {"CLAUDE_CODE_USE_BEDROCK": "1", "ANTHROPIC_CUSTOM_HEADERS": "x: y", "ANTHROPIC_BASE_URL": "https://a.test"}
    mine |= {"ANTHROPIC_$(echo bad >&2)": "1", "SELFHOST_API_KEY": "of-the-account", "EDITOR": "ed"}
    with StubFront(TOKEN, state()) as front:
        user.keeper(front)
        told = user.selfhost("env", **mine).stdout
    assert told.startswith("unset ANTHROPIC_CUSTOM_HEADERS\nunset CLAUDE_CODE_USE_BEDROCK\nexport ")
    done = subprocess.run(
        ["sh", "-c", f"{told}\nenv"], env={"PATH": os.environ["PATH"], **mine},
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert f"ANTHROPIC_BASE_URL=http://127.0.0.1:{front.port}\n" in done.stdout
    assert "BEDROCK" not in done.stdout
    assert "CUSTOM_HEADERS" not in done.stdout
    assert "SELFHOST_API_KEY=of-the-account\n" in done.stdout, "it is meant for us"


def test_claude_may_have_a_home_of_its_own(user: User) -> None:
    user.rent(State.READY).close()
    own = user.home / "demo-home"
    with StubFront(TOKEN, state()) as front:
        user.keeper(front)
        done = user.selfhost("claude", SELFHOST_CLAUDE_HOME=str(own))
    seen = json.loads(done.stdout)["env"]
    assert (seen["HOME"], seen["CLAUDE_CONFIG_DIR"]) == (str(own), str(own / ".claude"))


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (["--profile", "demo", "claude"], {}),
        (["--profile=demo", "claude"], {}),
        (["claude"], {"SELFHOST_PROFILE": "demo"}),
        (["--profile", "demo", "claude"], {"SELFHOST_PROFILE": "other"}),
    ],
)
def test_a_profile_has_its_own_box(user: User, args: list[str], env: dict[str, str]) -> None:
    user.profile = "demo"
    user.rent(State.READY).close()
    with StubFront(TOKEN, state()) as front:
        user.keeper(front)
        assert user.selfhost(*args, **env).returncode == 42


@pytest.mark.parametrize(
    ("argv", "parsed"),
    [
        (["claude"], ("default", [])),
        (["claude", "--profile", "x", "claude"], ("default", ["--profile", "x", "claude"])),
        (["--profile", "x", "claude", "--version"], ("x", ["--version"])),
        (["--profile", "claude", "claude"], ("claude", [])),
        ([], None),
        (["up", "claude"], None),
        (["--help", "claude"], None),
        (["--profile"], None),
        (["--profile", "claude"], None),
        (["--json", "claude"], None),
    ],
)
def test_which_arguments_are_claudes(argv: list[str], parsed: tuple[str, list[str]] | None) -> None:
    assert entry.claude_arguments(argv, {}) == parsed


def test_without_a_box_nothing_is_made_and_up_is_named(user: User) -> None:
    done = user.selfhost("claude", "-p", "hi")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "selfhost: there is no box to run Claude Code on\nRent one: `selfhost up`.\n"
    assert not (user.home / "selfhost").exists()


def test_without_a_box_of_this_profile_the_remedy_names_the_profile(user: User) -> None:
    ledger = user.rent(State.READY)
    ledger.end(LABEL, "asked")
    ledger.ended(LABEL, 2.0)
    ledger.close()
    assert user.selfhost("claude").returncode == 3
    assert "`selfhost --profile demo up`" in user.selfhost("--profile", "demo", "claude").stderr


@pytest.mark.parametrize("reached", [State.CREATING, State.BOOTING, State.INSTALLING, State.ENDING])
def test_a_box_that_is_not_ready_is_the_headline(user: User, reached: State) -> None:
    user.rent(reached).close()
    done = user.selfhost("claude")
    assert (done.returncode, done.stdout) == (5, "")
    headline, remedy = done.stderr.splitlines()
    assert headline == f"selfhost: box 4711 (RTX 4090, $0.34/h) is {reached}, not ready, and may be billed"
    assert "`selfhost down`" in remedy
    assert ("`selfhost up`" in remedy) == (reached is not State.ENDING)


def test_a_missing_claude_with_a_box_running_is_about_money_too(user: User) -> None:
    user.rent(State.READY).close()
    (user.home / "bin" / "claude").unlink()
    done = user.selfhost("claude", PATH="/nowhere")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith(
        "selfhost: box 4711 (RTX 4090, $0.34/h) is ready and billed, but claude was not found on PATH"
    )
    assert "npm install -g --prefix ~/.local @anthropic-ai/claude-code@2.1.330" in done.stderr
    assert "`selfhost down` ends the box." in done.stderr


def test_another_version_of_claude_is_mentioned_once_and_run(user: User) -> None:
    user.install_claude(CLAUDE.replace("2.1.330", "3.0.0"))
    user.rent(State.READY).close()
    with StubFront(TOKEN, state()) as front:
        user.keeper(front)
        first, second = user.selfhost("claude"), user.selfhost("claude")
    assert (first.returncode, second.returncode) == (42, 42)
    assert "this is Claude Code 3.0.0" in first.stderr
    assert len(first.stderr.splitlines()) == 1
    assert second.stderr == ""


def test_bad_settings_are_an_error_in_one_sentence(user: User) -> None:
    done = user.selfhost("claude", SELFHOST_PORT="many")
    assert (done.returncode, done.stdout) == (2, "")
    assert "port" in done.stderr
    assert "Traceback" not in done.stderr


class Clock:
    """Time that passes by sleeping only; `then` happens at the next sleep."""

    def __init__(self) -> None:
        self.now = 0.0
        self.then: list[Any] = []

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def since_boot(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.then:
            self.then.pop(0)()


def waiting(front: StubFront, ledger: Ledger, clock: Clock) -> None:
    address = attach.Front(f"http://127.0.0.1:{front.port}", front.port, TOKEN)
    rental = ledger.live()[0]
    launch.wait_for_tunnel(address, ledger, rental, seconds=2.0, clock=clock)


@pytest.mark.parametrize(
    "away", [state("connecting", "no route"), state(label="another"), {"state": (200, {})}, {"state": (500, {})}]
)
def test_a_tunnel_that_comes_up_is_waited_for_with_one_remark(
    user: User, capsys: pytest.CaptureFixture[str], away: dict[str, tuple[int, Any]]
) -> None:
    ledger, clock = user.rent(State.READY), Clock()
    with StubFront(TOKEN, away) as front:
        clock.then = [lambda: None, lambda: front.answers.update(state())]
        waiting(front, ledger, clock)
    ledger.close()
    out, err = capsys.readouterr()
    assert clock.now == 0.5
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "waiting for the tunnel to box 4711" in err


def test_a_tunnel_that_stays_away_does_not_keep_claude_from_starting(
    user: User, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, clock = user.rent(State.READY), Clock()
    with StubFront(TOKEN, state("connecting", "no route")) as front:
        waiting(front, ledger, clock)
    ledger.close()
    out, err = capsys.readouterr()
    assert (out, clock.now) == ("", 2.0)
    assert "last seen: no route; starting claude all the same" in err


def test_a_box_taken_down_meanwhile_ends_the_waiting(user: User) -> None:
    ledger, clock = user.rent(State.READY), Clock()
    with StubFront(TOKEN, state("connecting")) as front:
        clock.then = [lambda: ledger.end(LABEL, "asked")]
        with pytest.raises(MayBeBilling, match="is ending"):
            waiting(front, ledger, clock)
    ledger.close()


def test_a_box_gone_meanwhile_ends_the_waiting(user: User) -> None:
    ledger, clock = user.rent(State.READY), Clock()
    with StubFront(TOKEN, state("connecting")) as front:
        clock.then = [lambda: (ledger.end(LABEL, "asked"), ledger.ended(LABEL, 2.0))]
        with pytest.raises(NotSetUp, match="no box"):
            waiting(front, ledger, clock)
    ledger.close()


def raising(error: BaseException) -> int:
    raise error


def test_errors_for_a_person_become_message_remedy_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.boundary(lambda: 7) == 7
    assert entry.boundary(lambda: raising(MayBeBilling("Box 7 runs.", "`selfhost down`"))) == 5
    assert entry.boundary(lambda: raising(SelfhostError("no remedy"))) == 1
    assert entry.boundary(lambda: raising(KeyboardInterrupt())) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "selfhost: Box 7 runs.\n`selfhost down`\nselfhost: no remedy\nselfhost: interrupted\n"


def test_our_own_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        entry.boundary(lambda: 1 // 0)


BROKEN = """
import sys
from selfhost_cli.cli.entry import boundary
def action():
    sys.stdin.read()
    for _ in range(100_000): print("some line")
    return 0
sys.exit(boundary(action))
"""


def test_a_reader_that_left_is_no_error_text() -> None:
    ours = subprocess.Popen(
        [sys.executable, "-c", BROKEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert ours.stdout
    ours.stdout.close()
    ours.stdout = None
    err = ours.communicate(timeout=60)[1]
    assert (ours.returncode, err) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
@pytest.mark.parametrize("args", [["--help"], ["status"], ["status", "--json"]])
def test_an_output_that_cannot_be_written_is_one_sentence(user: User, args: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "selfhost_cli", *args]
        done = subprocess.run(command, env=user.env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "selfhost: the output cannot be written: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("", 1, "selfhost: the output cannot be written: No space left on device\n"),
        ("raise MayBeBilling('Box 7 runs.')", 5, "selfhost: Box 7 runs.\n"),
    ],
)
def test_what_is_still_to_be_written_at_the_end_counts_unless_there_is_worse_news(
    end: str, code: int, said: str
) -> None:
    script = "import sys; from selfhost_cli.cli.entry import boundary; from selfhost_cli.errors import MayBeBilling\n"
    script += f"def action():\n    print('text')\n    {end}\n    return 0\nsys.exit(boundary(action))"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)


def test_remarks_to_nobody_are_no_error() -> None:
    code = "import os; from selfhost_cli.cli.words import say; os.close(2); say('hello')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("json_too", [[], ["--json"]])
@pytest.mark.parametrize(
    "box",
    [
        [],
        {"status": "[/x]", "usage": [], "components": 7},
        {"status": {}, "usage": {"repaired_calls": "[/x]"}, "components": []},
        {"status": "\ud800", "context": [], "components": {"llamacpp": ["[/x]"]}},
        {"components": {"llamacpp": {"version": "[/x]\ud800", "parameters": {}, "size": "1", "size_vram": []}}},
    ],
    ids=repr,
)
def test_whatever_a_box_says_of_itself_status_shows_the_rental(user: User, box: object, json_too: list[str]) -> None:
    user.rent(State.READY).close()
    with StubFront(TOKEN, {**state(), "/health": (200, {"box": box})}) as front:
        user.keeper(front)
        done = user.selfhost("status", *json_too)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4711" in done.stdout


@pytest.mark.parametrize("rentals", [None, [], [7], ["label"], {}])
def test_a_keeper_that_tells_nothing_of_a_rental_does_not_watch_it(user: User, rentals: object) -> None:
    user.rent(State.READY).close()
    with StubFront(TOKEN, {"state": (200, {"rentals": rentals})}) as front:
        user.keeper(front)
        assert "not watched" in user.selfhost("status").stdout


def test_the_console_script_takes_the_same_way(user: User) -> None:
    script = Path(sys.executable).with_name("selfhost")
    if not script.exists():
        pytest.skip("selfhost is not installed beside this interpreter")
    done = subprocess.run([script, "claude"], env=user.env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, user.selfhost("claude").stderr)


def test_directories_that_cannot_be_used_are_no_traceback(user: User) -> None:
    done = user.selfhost("claude", SELFHOST_HOME=os.devnull)
    assert (done.returncode, done.stdout) == (2, "")
    assert "config.toml: [Errno" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_ledger_that_cannot_be_looked_at_is_not_an_absent_one(user: User) -> None:
    user.paths.make()
    user.paths.ledger.mkdir()
    done = user.selfhost("claude")
    assert (done.returncode, done.stdout) == (5, "")
    assert "cannot be used" in done.stderr
