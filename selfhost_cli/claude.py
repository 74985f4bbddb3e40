"""Claude Code against our front: where it is, what to run it with, and becoming it.

Knows nothing of GPUs, SSH and prices, and writes nothing in `~/.claude`. Values and flags were seen to work with
Claude Code 2.1.330; another version gets a warning.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from selfhost_cli.errors import NotSetUp, UsageError

SEEN = "2.1.330"
INSTALL = f"npm install -g --prefix ~/.local @anthropic-ai/claude-code@{SEEN}"

AUTO_MODE_OFF = {"permissions": {"disableAutoMode": "disable"}}
CACHE = "SELFHOST_CACHE"
CACHE_WISHES = {"": "", "on": "", "off": "no-store", "refresh": "no-cache"}
DECIDES_THE_MODE = ("--permission-mode", "--dangerously-skip-permissions")
NOTICED_AT = ("UserPromptSubmit", "Stop")
"""Hooks that show a `systemMessage` to the person only: neither the model nor `-p` prints a word of it."""
LOOK_S = 10
FIRST_REQUEST = 19_300
"""Tokens with which a session of 2.1.330 begins, its full set of tools included; counted with a Qwen tokenizer."""
CONVERSATION = 8_000
"""Tokens of work that there shall be room for before it is summed up: a few files that were read, and answers."""
COMPACTION = 13_000
"""Tokens that Claude Code keeps free for that, beside an answer."""
# Claude Code answers these at once, before it loads anything, but only where no other argument precedes them.
ANSWERED_AT_ONCE = ("--version", "-v")

OUR_KEYS = ("SELFHOST_API_KEY", "VAST_API_KEY")
"""Kept from Claude Code, and meant for us."""

# Everything that could send requests, keys or other fields elsewhere than to the front as it is set up here.
CONFLICTING_PREFIX = "ANTHROPIC_"
CONFLICTING = frozenset(
    {
        "CLAUDE_CODE_USE_ANTHROPIC_AWS",
        "CLAUDE_CODE_USE_ANTHROPIC_GOOGLE_CLOUD",
        "CLAUDE_CODE_USE_BEDROCK",
        "CLAUDE_CODE_USE_FOUNDRY",
        "CLAUDE_CODE_USE_GATEWAY",
        "CLAUDE_CODE_USE_MANTLE",
        "CLAUDE_CODE_USE_VERTEX",
        "CLAUDE_CODE_API_BASE_URL",
        "CLAUDE_CODE_API_KEY_FILE_DESCRIPTOR",
        "CLAUDE_CODE_GATEWAY_TOKEN",
        "CLAUDE_CODE_GATEWAY_TOKEN_FILE_DESCRIPTOR",
        "CLAUDE_CODE_OAUTH_REFRESH_TOKEN",
        "CLAUDE_CODE_OAUTH_TOKEN",
        "CLAUDE_CODE_OAUTH_TOKEN_FILE_DESCRIPTOR",
        "CLAUDE_CODE_SESSION_ACCESS_TOKEN",
        "CLAUDE_CODE_HTTP_PROXY",
        "CLAUDE_CODE_HTTPS_PROXY",
        "CLAUDE_CODE_PROXY_URL",
        "CLAUDE_CODE_EXTRA_BODY",
        "CLAUDE_BYTE_STREAM_IDLE_TIMEOUT_MS",
        # The market's account key: every command that a model on a stranger's machine asks for could read it.
        "SELFHOST_API_KEY",
        "VAST_API_KEY",
    }
)
# Claude Code's own names: it would assume the context of the model that it knows under them.
ITS_ALIASES = ("default", "best", "opus", "opusplan", "sonnet", "haiku", "fable")


@dataclass(frozen=True)
class Notice:
    """Files that are there while people are to be told something: JSON for hooks, one line for a status line."""

    for_hooks: Path
    line: Path


@dataclass(frozen=True)
class Launch:
    """One command, ready for exec."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Seen:
    """Which Claude Code this is. `warning` is for stderr, once for each version that we have not seen."""

    version: str
    warning: str = ""


def find(override: str, env: Mapping[str, str]) -> Path:
    """The `claude` command: the override, else on PATH, else where its installers put it. Raises NotSetUp."""
    if override:
        path = Path(override).expanduser()
        if not _runs(path):
            raise NotSetUp(f"{path} is not a program", "Set `claude` to the path of the claude command, or unset it.")
        return path
    home = Path(env.get("HOME") or Path.home())
    # An empty entry of PATH means the current directory, where no project shall put its own `claude`.
    places = [Path(entry) for entry in env.get("PATH", "").split(os.pathsep) if entry]
    for place in (*places, home / ".local/bin", home / ".claude/local"):
        if _runs(place / "claude"):
            return place / "claude"
    raise NotSetUp("claude was not found on PATH, in ~/.local/bin or ~/.claude/local", f"Install it: `{INSTALL}`")


def launch(
    binary: Path,
    args: Sequence[str],
    *,
    url: str,
    token: str,
    model: str,
    context: int,
    env: Mapping[str, str],
    home: Path | None = None,
    notice: Notice | None = None,
    max_output: int = 8192,
) -> Launch:
    """What to execute so that Claude Code talks to `url` only and knows the model's real `context` (tokens).

    `args` pass through untouched, in order. `home` gives Claude Code a home of its own, with its temporary files.
    Changes nothing; all that is read is the settings of user and project, for whether they decide about auto mode and
    have a status line. Raises UsageError for a model name that Claude Code would take for one of its own.
    """
    own = dict(env)
    if home is not None:
        # It leaves temporary files. (With a `home` of more than about 80 bytes its socket is in /tmp all the same.)
        own.update(HOME=str(home), CLAUDE_CONFIG_DIR=str(home / ".claude"), CLAUDE_CODE_TMPDIR=str(home / "tmp"))
    kept = {name: value for name, value in own.items() if not _conflicts(name)}
    ours = environment(url, token, model, context, own, max_output)
    return Launch((str(binary), *_settings(args, own, notice), *args), {**kept, **ours})


def environment(
    url: str, token: str, model: str, context: int, env: Mapping[str, str], max_output: int = 8192
) -> dict[str, str]:
    """What Claude Code needs to be told; `env` is the user's, for the proxy exceptions in it. Raises UsageError."""
    _check_name(model)
    told = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": token,
        "ANTHROPIC_API_KEY": "",  # not absent: nothing may fall back to the user's real one
        "ANTHROPIC_MODEL": model,  # without it a context of one million tokens is assumed
        "ANTHROPIC_DEFAULT_OPUS_MODEL": model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
        "ANTHROPIC_DEFAULT_FABLE_MODEL": model,
        "CLAUDE_CODE_SUBAGENT_MODEL": model,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(context),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(min(max_output, _room(context))),
        "CLAUDE_CODE_DISABLE_1M_CONTEXT": "1",
        "CLAUDE_CODE_PROVIDER_MANAGED_BY_HOST": "1",  # the `env` of a settings.json beats the environment otherwise
        # The same prompt prefix in every session and project, so that the engine need not read it again.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
        "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",
        "CLAUDE_CODE_GATEWAY_HINT_HEADERS": "1",
        # Nothing but the front is contacted, and not for trifles.
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL": "1",
        "DISABLE_AUTOUPDATER": "1",
        "CLAUDE_CODE_DISABLE_TERMINAL_TITLE": "1",
        "CLAUDE_CODE_AUTO_MODE_SERVER": "0",
        # A long prefill is not a broken connection.
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "1800000",
        "API_TIMEOUT_MS": "3600000",
        "API_FORCE_IDLE_TIMEOUT": "0",
    }
    if "qwen" in model.lower():
        told["CLAUDE_CODE_DISABLE_THINKING"] = "1"
    if wish := cache_wish(env):
        told["ANTHROPIC_CUSTOM_HEADERS"] = f"cache-control: {wish}"
    return told | _no_proxy(env)


def cache_wish(env: Mapping[str, str]) -> str:
    """What SELFHOST_CACHE says of one command, in the words of Cache-Control. Raises UsageError."""
    said = env.get(CACHE, "").lower()
    if said not in CACHE_WISHES:
        raise UsageError(f"{CACHE}={said}: expected off (neither asked nor kept) or refresh (answered anew and kept)")
    return CACHE_WISHES[said]


def seen_version(binary: Path, cache: Path) -> Seen:
    """Which version this is. Asked once per file and remembered in the directory `cache`. Raises NotSetUp."""
    memory = cache / "claude.json"
    known = _json_object(memory)
    stat = binary.stat()
    identity = [str(binary), stat.st_mtime_ns, stat.st_size]
    if known.get("identity") == identity and isinstance(known.get("version"), str):
        return Seen(known["version"])
    version = _ask(binary)
    told = known["told"] if isinstance(known.get("told"), list) else []
    new = version != SEEN and version not in told
    _remember(memory, {"identity": identity, "version": version, "told": [*told, version] if new else told})
    return Seen(version, f"this is Claude Code {version}; selfhost was made with {SEEN} (`{INSTALL}`)" if new else "")


def execute(launch: Launch) -> NoReturn:
    """Become Claude Code: its exit code, signals and terminal are its own from here on. Raises NotSetUp."""
    import signal

    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores both, and what is ignored stays so across exec, down to every command that Claude Code runs.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGPIPE, signal.SIGXFSZ)}
    try:
        os.execve(launch.argv[0], launch.argv, launch.env)
    except OSError as error:
        for number, handler in before.items():
            signal.signal(number, handler)
        raise NotSetUp(f"{launch.argv[0]} cannot be run: {error.strerror}", f"Install it again: `{INSTALL}`") from error


def compacts_at(context: int, max_output: int = 8192) -> int:
    """Tokens of a conversation at which Claude Code sums it up, seen with 2.1.330; 0 or less: in every turn."""
    return context - min(max_output, _room(context), 20_000) - COMPACTION


def least_context() -> int:
    """Tokens below which an interactive session makes no sense: it would be summed up before it is a conversation."""
    context = FIRST_REQUEST + CONVERSATION + COMPACTION
    while compacts_at(context) < FIRST_REQUEST + CONVERSATION:
        context += 1
    return context


def _room(context: int) -> int:
    """Output tokens that leave room for a prompt."""
    return max(256, context // 8)


def _no_proxy(env: Mapping[str, str]) -> dict[str, str]:
    """Both spellings, added to the user's: HTTP_PROXY would be used even for loopback."""
    merged = {}
    for name, other in (("NO_PROXY", "no_proxy"), ("no_proxy", "NO_PROXY")):
        hosts = [host.strip() for host in (env.get(name) or env.get(other, "")).split(",") if host.strip()]
        if "*" not in hosts:
            hosts += [host for host in ("127.0.0.1", "localhost") if host not in hosts]
        merged[name] = ",".join(hosts)
    return merged


def in_the_way(env: Mapping[str, str]) -> list[str]:
    """Of a shell's variables, those that would still lead a client elsewhere beside `environment`; not our own keys."""
    return sorted(name for name in env if _conflicts(name) and name not in OUR_KEYS and name.isidentifier())


def _conflicts(name: str) -> bool:
    return name in CONFLICTING or name.startswith(CONFLICTING_PREFIX)


def _check_name(model: str) -> None:
    plain = model.lower()
    if not plain or plain.startswith("claude") or plain in ITS_ALIASES:
        raise UsageError(
            f"the served model cannot be called {model!r}: Claude Code would take it for one of Anthropic's",
            "Choose another name with --model or the setting `model`.",
        )


def _settings(args: Sequence[str], env: Mapping[str, str], notice: Notice | None) -> tuple[str, ...]:
    """Ours as arguments. None beside the user's own --settings: the last one replaces those before it."""
    options = {option.split("=")[0] for option in (args[: args.index("--")] if "--" in args else args)}
    if "--settings" in options or (args and args[0] in ANSWERED_AT_ONCE):
        return ()
    user = user_settings(env)
    ours: dict[str, object] = {}
    if options.isdisjoint(DECIDES_THE_MODE) and not _mode_decided(user):
        ours |= AUTO_MODE_OFF
    if notice:
        ours |= _notices(notice, line=not any("statusLine" in known for known in (user, *_project_settings())))
    return ("--settings", json.dumps(ours, separators=(",", ":"))) if ours else ()


def _mode_decided(user: Mapping[str, Any]) -> bool:
    """Whether the user's settings already say in which permission mode to start."""
    permissions = user.get("permissions")
    return isinstance(permissions, dict) and not permissions.keys().isdisjoint({"disableAutoMode", "defaultMode"})


def _notices(notice: Notice, *, line: bool) -> dict[str, object]:
    """Hooks, which add to the user's; and a status line, of which there is but one, that is read again while idle."""
    hook = {"type": "command", "command": _show(notice.for_hooks), "timeout": 5}
    shown: dict[str, object] = {"hooks": {event: [{"hooks": [hook]}] for event in NOTICED_AT}}
    if line:
        shown["statusLine"] = {"type": "command", "command": _show(notice.line), "refreshInterval": LOOK_S}
    return shown


def _show(path: Path) -> str:
    quoted = str(path).replace("'", "'\\''")
    return f"cat '{quoted}' 2>/dev/null || true"


def user_settings(env: Mapping[str, str]) -> dict[str, Any]:
    """The user's settings, {} when they cannot be read: what is wrong with them is Claude Code's to say."""
    folder = env.get("CLAUDE_CONFIG_DIR") or os.path.join(env.get("HOME") or Path.home(), ".claude")
    return _json_object(Path(folder) / "settings.json")


def _project_settings() -> tuple[dict[str, Any], ...]:
    folder = Path(".claude")
    return _json_object(folder / "settings.json"), _json_object(folder / "settings.local.json")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _runs(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _ask(binary: Path) -> str:
    """What `claude --version` says, e.g. "2.1.330". It contacts nobody and writes nothing."""
    import re
    import subprocess

    try:
        done = subprocess.run(
            [binary, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotSetUp(f"{binary} --version: {error}", f"Install it again: `{INSTALL}`") from error
    version = re.match(r"\d+\.\d+\.\d+\S*", done.stdout.decode(errors="replace"))
    if done.returncode or version is None:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()[:200]
        raise NotSetUp(f"{binary} --version ended with {done.returncode}: {said}", f"Install it again: `{INSTALL}`")
    return version[0]


def _remember(memory: Path, known: Mapping[str, object]) -> None:
    draft = memory.with_suffix(f".{os.getpid()}")
    try:
        draft.write_text(json.dumps(known))
        draft.replace(memory)
    except OSError:
        pass  # asked again next time
