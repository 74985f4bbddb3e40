"""Where claude is found, and exactly with what it is run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import claude
from selfhost_cli.errors import NotSetUp, UsageError

BINARY = Path("/opt/claude")
MODE = ("--settings", '{"permissions":{"disableAutoMode":"disable"}}')

EXPECTED = {
    "ANTHROPIC_BASE_URL": "http://127.0.0.1:8001",
    "ANTHROPIC_AUTH_TOKEN": "front-token",
    "ANTHROPIC_API_KEY": "",
    "ANTHROPIC_MODEL": "qwen3-coder:30b",
    "ANTHROPIC_DEFAULT_OPUS_MODEL": "qwen3-coder:30b",
    "ANTHROPIC_DEFAULT_SONNET_MODEL": "qwen3-coder:30b",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": "qwen3-coder:30b",
    "ANTHROPIC_DEFAULT_FABLE_MODEL": "qwen3-coder:30b",
    "CLAUDE_CODE_SUBAGENT_MODEL": "qwen3-coder:30b",
    "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "65536",
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "8192",
    "CLAUDE_CODE_DISABLE_1M_CONTEXT": "1",
    "CLAUDE_CODE_PROVIDER_MANAGED_BY_HOST": "1",
    "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
    "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",
    "CLAUDE_CODE_GATEWAY_HINT_HEADERS": "1",
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
    "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",
    "CLAUDE_CODE_DISABLE_THINKING": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL": "1",
    "DISABLE_AUTOUPDATER": "1",
    "CLAUDE_CODE_DISABLE_TERMINAL_TITLE": "1",
    "CLAUDE_CODE_AUTO_MODE_SERVER": "0",
    "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "1800000",
    "API_TIMEOUT_MS": "3600000",
    "API_FORCE_IDLE_TIMEOUT": "0",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """An empty home."""
    home = tmp_path / "user"
    home.mkdir()
    return home


def launched(
    env: Mapping[str, str],
    args: Sequence[str] = (),
    model: str = "qwen3-coder:30b",
    context: int = 65_536,
    **more: Any,
) -> claude.Launch:
    return claude.launch(
        BINARY, args, url="http://127.0.0.1:8001", token="front-token", model=model, context=context, env=env, **more
    )


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_environment_is_exactly_this(user: Path) -> None:
    env = {"HOME": str(user), "PATH": "/bin", "LANG": "C"}
    assert launched(env).env == env | EXPECTED


def test_the_token_is_not_in_the_arguments_nor_in_what_gets_printed(user: Path) -> None:
    launch = launched({"HOME": str(user)}, ["-p", "hi"])
    assert "front-token" not in repr(launch)
    assert not any("front-token" in arg for arg in launch.argv)


def test_what_would_send_requests_or_keys_elsewhere_is_removed(user: Path) -> None:
    conflicting = {
        "ANTHROPIC_API_KEY": "real",
        "ANTHROPIC_AUTH_TOKEN": "real",
        "ANTHROPIC_BASE_URL": "https://real",
        "ANTHROPIC_CUSTOM_HEADERS": "x: y",
        "ANTHROPIC_BETAS": "real",
        "ANTHROPIC_SMALL_FAST_MODEL": "real",
        "ANTHROPIC_BEDROCK_BASE_URL": "real",
        "CLAUDE_CODE_USE_BEDROCK": "real",
        "CLAUDE_CODE_USE_VERTEX": "real",
        "CLAUDE_CODE_USE_FOUNDRY": "real",
        "CLAUDE_CODE_OAUTH_TOKEN": "real",
        "CLAUDE_CODE_EXTRA_BODY": "real",
        "CLAUDE_CODE_HTTP_PROXY": "real",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "real",
        "SELFHOST_API_KEY": "real",
        "VAST_API_KEY": "real",
    }
    env = {"HOME": str(user), "CLAUDE_CODE_EFFORT_LEVEL": "low", "EDITOR": "vi"}
    assert launched(env | conflicting).env == env | EXPECTED


@pytest.mark.parametrize("model", ["glm-4.7-flash", "gpt-oss:20b"])
def test_a_model_that_may_think_is_left_to_it(user: Path, model: str) -> None:
    env = launched({"HOME": str(user)}, model=model).env
    assert "CLAUDE_CODE_DISABLE_THINKING" not in env
    assert env["ANTHROPIC_MODEL"] == model


@pytest.mark.parametrize(
    ("env", "upper", "lower"),
    [
        ({"NO_PROXY": "corp"}, "corp,127.0.0.1,localhost", "corp,127.0.0.1,localhost"),
        ({"no_proxy": "corp, a"}, "corp,a,127.0.0.1,localhost", "corp,a,127.0.0.1,localhost"),
        ({"NO_PROXY": "a", "no_proxy": "b"}, "a,127.0.0.1,localhost", "b,127.0.0.1,localhost"),
        ({"NO_PROXY": "localhost,127.0.0.1"}, "localhost,127.0.0.1", "localhost,127.0.0.1"),
        ({"NO_PROXY": "*"}, "*", "*"),
        ({"NO_PROXY": ""}, "127.0.0.1,localhost", "127.0.0.1,localhost"),
    ],
)
def test_no_proxy_is_extended_in_both_spellings(user: Path, env: dict[str, str], upper: str, lower: str) -> None:
    found = launched({"HOME": str(user), **env}).env
    assert (found["NO_PROXY"], found["no_proxy"]) == (upper, lower)


@pytest.mark.parametrize(
    ("context", "most"), [(262_144, "8192"), (65_536, "8192"), (49_152, "6144"), (32_768, "4096"), (1_000, "256")]
)
def test_a_small_context_leaves_less_for_the_output(user: Path, context: int, most: str) -> None:
    env = launched({"HOME": str(user)}, context=context).env
    assert (env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"], env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"]) == (str(context), most)


@pytest.mark.parametrize("model", ["claude-opus-5", "Claude", "sonnet", "default", ""])
def test_a_model_must_not_be_called_like_one_of_anthropics(user: Path, model: str) -> None:
    with pytest.raises(UsageError, match="cannot be called"):
        launched({"HOME": str(user)}, model=model)


def test_arguments_pass_through_untouched_and_in_order(user: Path) -> None:
    args = ["-p", "--model", "x", "a b", "", "--profile", "demo", "--", "--settings", "é\n"]
    assert launched({"HOME": str(user)}, args).argv == (str(BINARY), *MODE, *args)


@pytest.mark.parametrize(
    "args",
    [
        ["--settings", "x.json"],
        ["-p", "hi", "--settings=x.json"],
        ["--permission-mode", "auto"],
        ["--permission-mode=plan"],
        ["-c", "--dangerously-skip-permissions"],
    ],
)
def test_arguments_that_choose_a_mode_win_over_ours(user: Path, args: list[str]) -> None:
    assert launched({"HOME": str(user)}, args).argv == (str(BINARY), *args)


def test_the_version_stays_the_only_argument(user: Path) -> None:
    """It is answered in a sixth of the time when nothing precedes it."""
    assert launched({"HOME": str(user)}, ["--version"]).argv == (str(BINARY), "--version")


@pytest.mark.parametrize("permissions", [{"disableAutoMode": "disable"}, {"defaultMode": "auto", "allow": []}])
@pytest.mark.parametrize("where", ["home", "config", "own"])
def test_settings_that_choose_a_mode_win_over_ours(user: Path, permissions: dict[str, object], where: str) -> None:
    folder = user / "elsewhere" if where == "config" else user / ".claude"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"permissions": permissions}))
    env = {"HOME": "/nowhere" if where == "own" else str(user)}
    if where == "config":
        env["CLAUDE_CONFIG_DIR"] = str(folder)
    assert launched(env, home=user if where == "own" else None).argv == (str(BINARY),)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"permissions": []}', b'{"permissions": {"allow": ["Bash"]}}', b"[" * 99999],
)
def test_settings_that_say_nothing_or_are_broken_change_nothing(user: Path, text: bytes) -> None:
    (user / ".claude").mkdir()
    (user / ".claude" / "settings.json").write_bytes(text)
    assert launched({"HOME": str(user)}).argv == (str(BINARY), *MODE)
    assert (user / ".claude" / "settings.json").read_bytes() == text


NOTICE = claude.Notice(Path('/a b/it\'s "here"/n.json'), Path("/a b/n.txt"))


def told(launch: claude.Launch) -> dict[str, Any]:
    """The settings that are ours."""
    argv = launch.argv[1:]
    return dict(json.loads(argv[1])) if argv[:1] == ("--settings",) else {}


def test_a_notice_is_shown_by_hooks_and_by_a_status_line(user: Path) -> None:
    found = told(launched({"HOME": str(user)}, ["-c"], notice=NOTICE))
    assert found["permissions"] == {"disableAutoMode": "disable"}
    assert set(found["hooks"]) == {"UserPromptSubmit", "Stop"}
    assert found["statusLine"]["command"] == "cat '/a b/n.txt' 2>/dev/null || true"


def test_the_command_of_a_hook_prints_the_file_wherever_it_is_and_never_fails(tmp_path: Path) -> None:
    file = tmp_path / 'it\'s "a" $(dir) `x` \\' / "n.json"
    file.parent.mkdir()
    found = told(launched({"HOME": str(tmp_path)}, notice=claude.Notice(file, file)))
    for text in ("", '{"systemMessage": "hello"}\n'):
        if text:
            file.write_text(text)
        for event in found["hooks"].values():
            command = event[0]["hooks"][0]["command"]
            done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout, done.stderr) == (0, text, "")


@pytest.mark.parametrize("where", ["user", "project", "local"])
def test_the_persons_own_status_line_stays(user: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = user / "work"
    folder = (user if where == "user" else work) / ".claude"
    folder.mkdir(parents=True)
    work.mkdir(exist_ok=True)
    monkeypatch.chdir(work)
    name = "settings.local.json" if where == "local" else "settings.json"
    (folder / name).write_text('{"statusLine": {"type": "command", "command": "date"}}')
    found = told(launched({"HOME": str(user)}, notice=NOTICE))
    assert "statusLine" not in found
    assert found["hooks"]


@pytest.mark.parametrize("args", [["--settings", "x.json"], ["-p", "hi", "--settings={}"], ["--version"], ["-v"]])
def test_settings_of_the_persons_own_are_left_alone_and_so_is_the_version(user: Path, args: list[str]) -> None:
    assert launched({"HOME": str(user)}, args, notice=NOTICE).argv == (str(BINARY), *args)


def test_a_notice_does_not_decide_about_the_mode(user: Path) -> None:
    assert told(launched({"HOME": str(user)}, ["--permission-mode", "plan"], notice=NOTICE)).keys() == {
        "hooks",
        "statusLine",
    }


def test_a_home_of_its_own_leaves_the_users_alone(user: Path) -> None:
    mine = {"HOME": "/home/me", "CLAUDE_CONFIG_DIR": "/home/me/conf", "CLAUDE_CODE_TMPDIR": "/home/me/tmp"}
    env = launched(mine, home=user).env
    assert [env[name] for name in mine] == [str(user), str(user / ".claude"), str(user / "tmp")]
    assert launched(mine).env.items() >= mine.items()
    assert list(user.iterdir()) == []


def test_claude_is_found_on_path_then_where_its_installers_put_it(user: Path) -> None:
    env = {"HOME": str(user), "PATH": f"{user / 'a'}::{user / 'b'}"}
    with pytest.raises(NotSetUp, match="not found on PATH") as caught:
        claude.find("", env)
    assert "npm install -g --prefix ~/.local @anthropic-ai/claude-code@2.1.330" in caught.value.remedy
    for place in (".claude/local/claude", ".local/bin/claude", "b/claude", "a/claude"):
        expected = program(user / place)
        assert claude.find("", env) == expected


def test_what_cannot_be_run_is_not_claude(user: Path) -> None:
    (user / "a" / "claude").mkdir(parents=True)
    program(user / "b" / "claude").chmod(0o644)
    found = program(user / "c" / "claude")
    assert claude.find("", {"HOME": str(user), "PATH": f"{user}/a:{user}/b:{user}/c"}) == found


def test_a_claude_in_the_current_directory_is_not_taken(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(user / "claude")
    monkeypatch.chdir(user)
    with pytest.raises(NotSetUp):
        claude.find("", {"HOME": str(user), "PATH": ":"})


def test_the_path_that_was_set_is_the_one(user: Path) -> None:
    env = {"HOME": str(user), "PATH": str(program(user / "claude").parent)}
    assert claude.find(str(program(user / "mine")), env) == user / "mine"
    with pytest.raises(NotSetUp, match="missing is not a program"):
        claude.find(str(user / "missing"), env)


def version_stub(path: Path, version: str) -> Path:
    """Says `version`, and counts in a file beside it how often it was asked."""
    return program(path, f'#!/bin/sh\necho asked >> "$0.log"\necho "{version} (Claude Code)"\n')


def asked(stub: Path) -> int:
    return len(stub.with_name(stub.name + ".log").read_text().splitlines())


def test_a_version_is_asked_once_per_file(tmp_path: Path) -> None:
    stub = version_stub(tmp_path / "claude", "2.1.330")
    for _ in range(3):
        assert claude.seen_version(stub, tmp_path) == claude.Seen("2.1.330", "")
    assert asked(stub) == 1
    os.utime(stub, (1, 1))
    assert claude.seen_version(stub, tmp_path).version == "2.1.330"
    assert asked(stub) == 2


def test_a_version_that_we_have_not_seen_is_warned_about_once(tmp_path: Path) -> None:
    stub = version_stub(tmp_path / "claude", "2.2.0")
    first = claude.seen_version(stub, tmp_path)
    assert "2.2.0" in first.warning
    assert "2.1.330" in first.warning
    os.utime(stub, (1, 1))
    assert claude.seen_version(stub, tmp_path) == claude.Seen("2.2.0", "")
    newer = version_stub(tmp_path / "b" / "claude", "2.3.0")
    assert "2.3.0" in claude.seen_version(newer, tmp_path).warning
    assert claude.seen_version(stub, tmp_path).warning == ""


@pytest.mark.parametrize("memory", [b"{", b"[]", b'{"identity": 7, "told": {}}', b'{"told": [7]}'])
def test_a_broken_memory_is_asked_again(tmp_path: Path, memory: bytes) -> None:
    (tmp_path / "claude.json").write_bytes(memory)
    stub = version_stub(tmp_path / "claude", "2.1.330")
    assert claude.seen_version(stub, tmp_path).version == "2.1.330"
    assert claude.seen_version(stub, tmp_path).version == "2.1.330"
    assert asked(stub) == 1


def test_a_memory_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    stub = version_stub(tmp_path / "claude", "2.1.330")
    assert claude.seen_version(stub, tmp_path / "missing").version == "2.1.330"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/bin/sh\necho claude native binary not installed >&2\nexit 1\n", "ended with 1: claude native binary"),
        ("#!/bin/sh\necho hello\n", "hello"),
        ("#!/missing\n", "No such file"),
    ],
)
def test_a_claude_that_cannot_say_its_version_is_not_installed(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(NotSetUp, match=said) as caught:
        claude.seen_version(program(tmp_path / "claude", text), tmp_path)
    assert "npm install" in caught.value.remedy


EXECUTE = """
import sys
from selfhost_cli.claude import Launch, execute
from selfhost_cli.errors import NotSetUp
try:
    print("before")
    execute(Launch(tuple(sys.argv[1:]), {"ONLY": "this"}))
except NotSetUp as error:
    print(error.message)
"""


def test_executing_is_becoming_it() -> None:
    shell = 'echo "$1 $ONLY $$"; exec >&2; env; kill -TERM $$'
    ours = subprocess.Popen(
        [sys.executable, "-c", EXECUTE, "/bin/sh", "-c", shell, "sh", "a b"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = ours.communicate(timeout=20)
    assert out.decode() == f"before\na b this {ours.pid}\n"
    assert b"ONLY=this" in err
    assert ours.returncode == -15


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_python_ignores_is_not_ignored_across_exec() -> None:
    command = [sys.executable, "-c", EXECUTE, "/bin/grep", "SigIgn", "/proc/self/status"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ignored = int(out.split()[-1], 16)
    assert not [number for number in (signal.SIGPIPE, signal.SIGXFSZ) if ignored >> (number - 1) & 1]


def test_what_cannot_be_executed_is_an_error(tmp_path: Path) -> None:
    stub = program(tmp_path / "claude", "")
    out = subprocess.run([sys.executable, "-c", EXECUTE, stub], capture_output=True, text=True, check=True).stdout
    assert f"{stub} cannot be run: Exec format error" in out
