"""The prefix of a Claude Code that was never used here: it is run once against a listener that hears its first request.

In a home of its own, which is gone afterwards: without the user's hooks, MCP servers, plugins and memory, but with what
of their settings decides about tools and style. Nobody but the listener on loopback is contacted.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from selfhost_cli import claude
from selfhost_cli.prefix import Prefix, taken

PATIENCE_S = 20.0
PROMPT = "hello"
DECIDE = ("permissions", "outputStyle", "includeCoAuthoredBy", "attribution", "language")
"""Of the user's settings."""
SCREEN = {"TERM": "xterm-256color", "LINES": "40", "COLUMNS": "120"}


def record(binary: Path, mode: str, *, model: str, context: int, env: Mapping[str, str]) -> Prefix | None:
    """Of that mode (see `MODES`), for a model of that name; None when nothing came within PATIENCE_S seconds.

    Raises what `claude.launch` raises, and OSError.
    """
    with tempfile.TemporaryDirectory(prefix="selfhost-claude-") as place, _Listener() as listener:
        home, project = Path(place) / "home", Path(place) / "project"
        project.mkdir()
        _furnish(home / ".claude", project, env)
        words = ["-p", PROMPT] if mode == "sdk-cli" else [PROMPT]
        launch = claude.launch(
            binary,
            [*words, "--strict-mcp-config"],
            url=listener.url,
            token=secrets.token_hex(16),
            model=model,
            context=context,
            env=dict(env) | SCREEN,
            home=home,
        )
        _run(launch, project, listener.heard)
        return taken(*listener.request) if listener.request else None


def _furnish(folder: Path, project: Path, env: Mapping[str, str]) -> None:
    folder.mkdir(parents=True)
    theirs = claude.user_settings(env)
    (folder / "settings.json").write_text(json.dumps({name: theirs[name] for name in DECIDE if name in theirs}))
    # An empty directory of our own is nothing to be asked about.
    known = {"hasCompletedOnboarding": True, "projects": {str(project): {"hasTrustDialogAccepted": True}}}
    (folder / ".claude.json").write_text(json.dumps(known))


def _run(launch: claude.Launch, project: Path, heard: threading.Event) -> None:
    """On a terminal of its own, until its first request was heard."""
    ours, its = os.openpty()
    try:
        try:
            process = subprocess.Popen(
                launch.argv, env=launch.env, cwd=project, stdin=its, stdout=its, stderr=its, start_new_session=True
            )
        finally:
            os.close(its)
        deadline = time.monotonic() + PATIENCE_S
        while not heard.is_set() and process.poll() is None and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.05)[0]:
                with suppress(OSError):  # the last one that wrote to it is gone
                    os.read(ours, 2**16)
    finally:
        os.close(ours)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # nothing of it is to be kept
    process.wait()


class _Listener:
    """Hears one request. `request`: the user agent and the body of the first that begins a session."""

    def __init__(self) -> None:
        self.heard = threading.Event()
        self.request: tuple[str, bytes] | None = None
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(200)
                self.end_headers()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                agent = self.headers.get("user-agent", "")
                if not listener.heard.is_set() and taken(agent, body):
                    listener.request = agent, body
                    listener.heard.set()
                self.send_error(403)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> _Listener:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
