"""How a command reaches the keeper of its profile: find the listener, make it prove itself, start it when it is away.

On the way of every `selfhost claude`, so the standard library only, and `subprocess` only when there is something to
start. The proof is of the front's token *and* of the port asked: neither another user's process on that port nor one
that relays to the real front on another port can give it, and without it nobody is sent the token.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfhost_cli.config import Paths, Settings, Source
from selfhost_cli.errors import SelfhostError
from selfhost_cli.lock import ProcessLock
from selfhost_cli.wait import SYSTEM, Clock, Pending, TimedOut, until

HOST = "127.0.0.1"
PROOF = b"selfhost-prove\n"
LARGEST_ANSWER = 1 << 20
LOG_LINES = 8

# Forked once more and not waited for: the caller often becomes `claude`, which would never reap a child it does not
# know of. An interpreter of its own does it because the caller may have threads. Prints the keeper's process id.
DETACH = """
import os, sys
child = os.fork()
if child:
    print(child)
else:
    os.dup2(2, 1)
    os.execv(sys.argv[1], sys.argv[1:])
"""

PASSED_ON = frozenset(
    {
        "HOME",
        "PATH",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "VIRTUAL_ENV",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
    }
)
PASSED_ON_PREFIXES = ("SELFHOST_", "VAST_", "REDIS_", "XDG_", "LC_", "PYTHON", "LD_", "DYLD_", "COVERAGE_")


class Refused(SelfhostError):
    """The keeper's own word for why it does not do what it was asked; `said` is only that."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


@dataclass(frozen=True)
class Front:
    """A listener that proved that it is ours."""

    url: str
    port: int
    token: str = field(repr=False)


def find(paths: Paths, *, timeout: float = 2.0) -> Front | None:
    """The profile's keeper, None when none runs or what listens there is not ours. `timeout` seconds per answer."""
    port, token = _port(paths.keeper_file), _read_token(paths.front_token)
    if port is None or token is None or not _proves(port, token, timeout):
        return None
    return Front(f"http://{HOST}:{port}", port, token)


def ensure(settings: Settings, *, timeout: float = 10.0, clock: Clock = SYSTEM) -> Front:
    """The profile's keeper, started when there is none. One of another version serves as well.

    Raises SelfhostError with the last lines of its log when it does not prove itself within `timeout` seconds.
    """
    paths = settings.paths
    if front := find(paths):
        return front
    paths.make()
    front_token(paths)
    pid = _start(settings)

    def probe() -> Front | Pending:
        if front := find(paths):
            return front
        # Two commands may start one each; the keeper's lock leaves one of them, not always ours.
        if not _alive(pid) and ProcessLock(paths.keeper_lock).holder() is None:
            raise _not_started(paths, "it ended at once")
        return Pending("no listener that proves itself")

    try:
        return until(probe, what="the keeper", seconds=timeout, every=0.05, clock=clock)
    except TimedOut as error:
        raise _not_started(paths, f"it did not prove itself within {timeout:.0f} s") from error


def front_token(paths: Paths) -> str:
    """The token that Claude Code sends to the front, made at first use. It never leaves this machine."""
    if token := _read_token(paths.front_token):
        return token
    import secrets

    # Written aside and linked: whoever sees the file sees all of it, and of two writers the first one wins.
    draft = paths.front_token.with_suffix(f".{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(32))
    try:
        os.link(draft, paths.front_token)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    token = _read_token(paths.front_token)
    if token is None:
        raise SelfhostError(
            f"{paths.front_token} holds no token",
            f"Delete it and end the keeper; its process id is in {paths.keeper_file}.",
        )
    return token


def call(front: Front, name: str, body: Mapping[str, Any] | None = None, *, timeout: float = 10.0) -> dict[str, Any]:
    """Ask the keeper: POST /selfhost/`name`. Raises SelfhostError with what it answered, or that it did not."""
    try:
        status, answer = _post(front.port, name, body or {}, timeout, f"Authorization: Bearer {front.token}")
    except OSError as error:
        raise SelfhostError(f"the keeper on {front.url} does not answer {name!r}: {error}", "Try again.") from error
    if status != 200 or not isinstance(answer, dict):
        said = _said(answer)
        raise Refused(f"the keeper on {front.url} refused {name!r}: {status} {said}".rstrip(), said)
    return answer


def _proves(port: int, token: str, timeout: float) -> bool:
    import hmac

    nonce = os.urandom(32).hex()
    proof = hmac.digest(token.encode(), PROOF + f"{nonce}\n{port}".encode(), "sha256").hex()
    try:
        status, answer = _post(port, "prove", {"nonce": nonce}, timeout)
    except OSError:
        return False
    told = answer.get("proof") if isinstance(answer, dict) else None
    return status == 200 and isinstance(told, str) and hmac.compare_digest(told.encode(), proof.encode())


def _post(port: int, name: str, body: Mapping[str, Any], timeout: float, *headers: str) -> tuple[int, object]:
    """Status and decoded body, None when it is not JSON. Always directly: no proxy of the environment is used.

    By hand because `http.client` takes 20 ms to import, a fifth of what `selfhost claude` may cost. HTTP/1.0: the
    listener answers as it is and closes. Raises OSError, also for what is no HTTP; `timeout` is for each silence.
    """
    text = json.dumps(body).encode()
    sent = (f"Host: {HOST}:{port}", "Content-Type: application/json", f"Content-Length: {len(text)}", *headers)
    received = bytearray()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect((HOST, port))
        connection.sendall("\r\n".join((f"POST /selfhost/{name} HTTP/1.0", *sent, "", "")).encode() + text)
        while chunk := connection.recv(65_536):
            received += chunk
            if len(received) > LARGEST_ANSWER:
                raise ConnectionError("the answer does not end")
    head, _, answer = received.partition(b"\r\n\r\n")
    protocol, _, status = head[:12].partition(b" ")
    if protocol[:5] != b"HTTP/" or not status.isdigit():
        raise ConnectionError("the answer is not HTTP")
    try:
        return int(status), json.loads(answer)
    except ValueError:
        return int(status), None


def _said(answer: object) -> str:
    """The message of an Anthropic error object, "" when it is not one."""
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""


def _port(path: Path) -> int | None:
    try:
        port = json.loads(path.read_text())["port"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return port if isinstance(port, int) and 0 < port < 65536 else None


def _read_token(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (OSError, ValueError):
        return None


def _start(settings: Settings) -> int:
    """Start the keeper detached from terminal, session, directory and descriptors; its process id."""
    import subprocess

    keeper = [sys.executable, "-m", "selfhost_cli.keeper", "--profile", settings.profile]
    log = os.open(settings.paths.keeper_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        started = subprocess.run(
            [sys.executable, "-I", "-S", "-c", DETACH, *keeper],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            env=_environment(settings, os.environ),
            start_new_session=True,
            check=False,
        )
    finally:
        os.close(log)
    if started.returncode:
        raise _not_started(settings.paths, f"{sys.executable} could not be run")
    return int(started.stdout)


def _environment(settings: Settings, env: Mapping[str, str]) -> dict[str, str]:
    """What the keeper needs of ours, flags included. It lives for hours and needs none of a shell's other secrets."""
    from selfhost_cli import backends

    passed = PASSED_ON | backends.variables(settings.paths)
    kept = {name: value for name, value in env.items() if name in passed or name.startswith(PASSED_ON_PREFIXES)}
    flags = [name for name, source in settings.sources.items() if source is Source.FLAG]
    return kept | {f"SELFHOST_{name.upper()}": str(getattr(settings, name)) for name in flags}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _not_started(paths: Paths, why: str) -> SelfhostError:
    try:
        lines = paths.keeper_log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        lines = []
    holder = ProcessLock(paths.keeper_lock).holder()
    held = f"; process {holder} holds {paths.keeper_lock}" if holder else ""
    shown = "".join(f"\n    {line}" for line in lines)
    return SelfhostError(f"the keeper does not run: {why}{held}{shown}", f"Its log is {paths.keeper_log}.")
