"""Everything that reaches a box after onstart: upload what changed, run install.sh, follow its progress.

The steps themselves (inputs hashed, skipped when their result is there) are `templates/install.sh`'s: it also runs by
hand, and goes on when the laptop goes away in the middle.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from selfhost_cli import archive, payload
from selfhost_cli.archive import Archive
from selfhost_cli.errors import BoxFailed, NotServable, SelfhostError
from selfhost_cli.model import Event
from selfhost_cli.remote import Remote, Result

# Commands are values: what they do on a box is tested by running them, who runs them is somebody else's business.
DIGESTS = (
    "umask 077 && mkdir -p ~/.selfhost/bin ~/.selfhost/run && cd ~/.selfhost"
    " && { find bin run/install.env -type f -exec sha256sum {} + 2>/dev/null || true; }"
)
INSTALL = "sh ~/.selfhost/bin/install.sh"
PROXY_PORT = "cat ~/.selfhost/run/proxy.port"
# Also starts a watchdog, should it be dead (where one lives, this one leaves), and prints what it measured last and
# its verdict, which stands even when a later look would not give it.
RENEW_LEASE = (
    "cd ~/.selfhost && touch run/lease || exit; cat run/watch run/verdict 2>/dev/null;"
    " [ -e bin/watchdog.sh ] && command -v flock >/dev/null || exit 0;"
    " sh bin/watchdog.sh </dev/null >>log/watchdog.log 2>&1 &"
)
# What the model is served with: while the launcher tries what fits, "loaded" is false; a problem comes instead.
SHAPE = "cd ~/.selfhost/run && cat engine.problem 2>/dev/null || cat engine.fit 2>/dev/null || true"
LIMITS = "sh ~/.selfhost/bin/limits.sh"
HOST_KEY = "sh ~/.selfhost/bin/hostkey.sh"
ARMED = "cat ~/.selfhost/run/armed 2>/dev/null || true"
ARCHIVE = "cat ~/.selfhost/run/archive 2>/dev/null || true"

ROOT = ".selfhost"
STEPS = ("tools", "engine", "model", "proxy", "start")
SCRIPTS = ("install.sh", "start.sh", "stop.sh", "limits.sh", "hostkey.sh", "llamacpp.py", "ollama.py")

# install.sh says something every few seconds, even while pip or sha256sum are silent.
SILENCE_S = 180.0

_AGAIN = "run `selfhost up` to try again, or `selfhost down` to end the bill"


@dataclass(frozen=True)
class InstallSpec:
    """What a box shall run. `url`, `size` (bytes) and `sha256` are llamacpp's model file; None or "": unknown.

    `context` is that of each of the `slots`, the answers that are generated at once.
    `pip_args` and the requirements are words as pip takes them, separated by spaces. `archive` is what Ollama's release
    archive must be, None when none was seen yet: then it is what comes from `ollama_url`. `registry` is where its
    models come from, "" for its own. `packages`: what is missing of tools may be installed for the whole machine.
    """

    engine: str
    model: str
    context: int
    token: str = field(repr=False)
    version: str
    url: str = ""
    sha256: str = ""
    size: int | None = None
    pip_args: str = ""
    proxy_requirements: str = "aiohttp>=3.11 orjson>=3.10 prometheus-client>=0.22"
    engine_requirements: str = ""
    ollama_url: str = ""
    ollama_version: str = ""
    archive: Archive | None = None
    registry: str = ""
    slots: int = 1
    kv_cache_type: str = "q8_0"
    packages: bool = True


@dataclass(frozen=True)
class Installed:
    """What runs on the box now. `proxy_port` is on the box's own 127.0.0.1; `archive` is what Ollama came out of."""

    proxy_port: int
    archive: Archive | None = None


def apply(remote: Remote, spec: InstallSpec, report: Callable[[Event], None]) -> Installed:
    """Bring the box to `spec`; doing it again changes nothing.

    Raises BoxFailed with what the failing step said (NotServable: no other box could either), and ConnectionLost
    when the connection broke (the box goes on by itself, so that a later `apply` finds the work done).
    """
    return bring(remote, files(spec), report)


def bring(remote: Remote, wanted: dict[str, tuple[bytes, int]], report: Callable[[Event], None]) -> Installed:
    """`apply` for given files (see `files`): upload what differs, run install.sh, ask for the port."""
    _upload(remote, wanted, report)
    _run_install(remote, report)
    return Installed(_proxy_port(remote), _archive(remote))


def files(spec: InstallSpec) -> dict[str, tuple[bytes, int]]:
    """Path below ~/.selfhost -> (content, mode) of everything that is uploaded."""
    wanted = {f"bin/{name}": (payload.script(name), 0o700) for name in SCRIPTS}
    wanted["bin/proxy.zip"] = (payload.proxy_zip(), 0o600)
    wanted["run/install.env"] = (env_file(spec), 0o600)
    return wanted


def env_file(spec: InstallSpec) -> bytes:
    """run/install.env: one `SELFHOST_NAME='value'` per setting, safe to source whatever the values hold."""
    values = {
        "ENGINE": spec.engine,
        "MODEL": spec.model,
        "MODEL_URL": spec.url,
        "MODEL_SHA256": spec.sha256,
        "MODEL_BYTES": "" if spec.size is None else str(spec.size),
        "CONTEXT": str(spec.context),
        "SLOTS": str(spec.slots),
        "KV_CACHE_TYPE": spec.kv_cache_type,
        "TOKEN": spec.token,
        "VERSION": spec.version,
        "PIP_ARGS": spec.pip_args,
        "PROXY_REQUIREMENTS": spec.proxy_requirements,
        "ENGINE_REQUIREMENTS": spec.engine_requirements,
        "OLLAMA_URL": spec.ollama_url,
        "OLLAMA_VERSION": spec.ollama_version,
        "OLLAMA_BYTES": str(spec.archive.size) if spec.archive else "",
        "OLLAMA_SHA256": spec.archive.sha256 if spec.archive else "",
        "REGISTRY": spec.registry,
        "PACKAGES": "" if spec.packages else "no",
    }
    return "".join(f"SELFHOST_{name}={_quote(value)}\n" for name, value in values.items()).encode()


def parse(line: str) -> Event | None:
    """A progress line of install.sh as an Event; None for anything else.

    A box that makes up a step gets none of its own: it could pass for one of ours, such as `down`.
    """
    fields = line.rstrip("\r\n").split("\t", 5)
    if len(fields) != 6 or fields[0] != "@selfhost":
        return None
    _, step, status, done, total, text = fields
    stage = step if step in STEPS else "install"
    match status:
        case "start" | "progress" | "done" | "skip" | "fail":
            return Event(stage, status, text, _number(done), _number(total))
        case "refuse":
            return Event(stage, "fail", text)
    return None


def armed(remote: Remote) -> str:
    """What became of the watchdog's trial call: "ok", "refused <why>", or "" while it is still trying."""
    return remote.run(ARMED).out.strip()


def settled(remote: Remote) -> bool:
    """Whether the engine's launcher has found what fits into the card: until then it may load the model once more.

    Raises BoxFailed with what it says when nothing fits. A launcher that says nothing has nothing to find.
    """
    said = remote.run(SHAPE).out.strip()
    if not said.startswith("{"):
        if said:
            raise BoxFailed(f"the model cannot be loaded as it should be: {said}", _AGAIN)
        return True
    try:
        told = json.loads(said)
    except ValueError:
        return True  # what it is worth, the health check finds out
    return not isinstance(told, dict) or told.get("loaded") is not False


def _upload(remote: Remote, wanted: dict[str, tuple[bytes, int]], report: Callable[[Event], None]) -> None:
    result = remote.run(DIGESTS)
    if result.code:
        raise BoxFailed(f"~/.selfhost on the box cannot be used: {_tail(result)}", _AGAIN)
    present = {path: digest for digest, path in (line.split(None, 1) for line in result.out.splitlines())}
    changed = {path: file for path, file in wanted.items() if present.get(path) != payload.digest(file[0])}
    if not changed:
        report(Event("upload", "skip", "already there"))
        return
    total = sum(len(data) for data, _ in changed.values())
    report(Event("upload", "start"))
    sent = 0
    for path, (data, mode) in changed.items():
        remote.put(data, f"{ROOT}/{path}", mode=mode)
        sent += len(data)
        report(Event("upload", "progress", path, sent, total))
    report(Event("upload", "done", f"{len(changed)} files", total, total))


def _run_install(remote: Remote, report: Callable[[Event], None]) -> None:
    failed: deque[Event] = deque(maxlen=1)
    kind: type[SelfhostError] = BoxFailed

    def on_line(line: str) -> None:
        nonlocal kind
        event = parse(line)
        if event is None:
            return
        if event.status == "fail":
            failed.append(event)
            kind = NotServable if line.split("\t")[2] == "refuse" else BoxFailed
        report(event)

    result = remote.run(INSTALL, timeout=SILENCE_S, on_line=on_line)
    if result.code == 0:
        return
    if failed:
        message = f"installing on the box failed at the step {failed[0].stage}: {failed[0].text}"
    else:
        message = f"installing on the box failed with status {result.code}"
    raise kind(f"{message}\n{_tail(result)}".rstrip(), _AGAIN)


def _proxy_port(remote: Remote) -> int:
    result = remote.run(PROXY_PORT)
    port = _number(result.out.strip())
    if result.code or port is None:
        raise BoxFailed(f"the proxy on the box does not say its port: {_tail(result)}", _AGAIN)
    return port


def _archive(remote: Remote) -> Archive | None:
    """A stranger's machine wrote it: what makes no sense is not kept."""
    try:
        return archive.parse(remote.run(ARCHIVE).out)
    except ValueError:
        return None


def _quote(value: str) -> str:
    if "\0" in value:
        raise SelfhostError("a setting of the box holds a NUL byte")
    return "'" + value.replace("'", "'\\''") + "'"


def _number(text: str) -> int | None:
    """None for what no size or port can be, too: such an int would fail wherever it is divided."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _tail(result: Result, lines: int = 20) -> str:
    """Set in, so that no line of the box's can pass for one of ours."""
    return "\n".join(f"    {line}" for line in (result.err or result.out).strip().splitlines()[-lines:])
