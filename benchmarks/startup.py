"""How long `selfhost` takes to begin: `--help`, and what `selfhost claude` adds to `claude` on a warm rental.

    .venv/bin/python benchmarks/startup.py [--json] [--claude PATH]

Medians of ten rounds; in each round every command runs once, so that a busy moment meets all of them. The rental is a
ledger of its own in a temporary directory, with a listener beside it that proves itself as the keeper does.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from figures import Figure, as_json, as_table, figure

from selfhost_cli import attach, config
from selfhost_cli.claude import INSTALL, SEEN
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Caps, Rental, State

HELP_GOAL_MS = 250.0
CLAUDE_GOAL_MS = 100.0
LABEL = "selfhost-benchmark-1"

BARE = """
import typer
app = typer.Typer(add_completion=False)
@app.command()
def up() -> None: "Up."
@app.command()
def down() -> None: "Down."
app()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of figures")
    parser.add_argument("--claude", help=f"path of the claude command, {SEEN} (default: looked for)")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    claude = find_claude(options.claude)
    with tempfile.TemporaryDirectory(prefix="selfhost-startup-") as place:
        figures = measure(Path(place), claude, options.rounds)
    print(as_json(figures) if options.json else as_table(figures))


def find_claude(given: str | None) -> Path:
    """The given one, else the sandbox's, else the one on PATH."""
    cached = config.paths("default", os.environ).cache / "claude" / SEEN / "node_modules" / ".bin" / "claude"
    for place in (given, os.environ.get("SELFHOST_TEST_CLAUDE"), cached, shutil.which("claude")):
        if place and os.access(place, os.X_OK):
            return Path(place).absolute()
        if place and place == given:
            break
    sys.exit(f"no claude found: pass --claude PATH, or run scripts/setup, or {INSTALL}")


def measure(place: Path, claude: Path, rounds: int) -> list[Figure]:
    env = {"PATH": "/usr/bin:/bin", "HOME": str(place), "SELFHOST_HOME": str(place), "SELFHOST_CLAUDE": str(claude)}
    env["DISABLE_AUTOUPDATER"] = "1"
    paths = config.paths("default", env)
    paths.make()
    rent(paths)
    with Front(paths):
        commands = {
            "bare": [sys.executable, "-c", BARE, "--help"],
            "help": [*selfhost(), "--help"],
            "claude": [str(claude), "--version"],
            "ours": [*selfhost(), "claude", "--version"],
        }
        once(commands, env, 0)  # fills caches: bytecode, pages, and the version of claude
        times = [once(commands, env, number) for number in range(rounds)]
    column = {name: [row[name] for row in times] for name in commands}
    added = [row["ours"] - row["claude"] for row in times]
    return [
        figure("selfhost --help", column["help"], "ms", HELP_GOAL_MS),
        figure("what selfhost claude adds to claude --version", added, "ms", CLAUDE_GOAL_MS),
        figure("a bare Typer app --help", column["bare"], "ms"),
        figure("claude --version", column["claude"], "ms"),
    ]


def once(commands: Mapping[str, Sequence[str]], env: Mapping[str, str], number: int) -> dict[str, float]:
    """Milliseconds of each, in turns from the first and from the last."""
    took = {}
    for name in list(commands)[:: -1 if number % 2 else 1]:
        begin = time.perf_counter()
        done = subprocess.run(commands[name], env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        took[name] = (time.perf_counter() - begin) * 1000
        if done.returncode:
            said = done.stderr.decode(errors="replace")
            sys.exit(f"{' '.join(commands[name])} ended with {done.returncode}:\n{said}")
    return took


def selfhost() -> list[str]:
    script = Path(sys.executable).with_name("selfhost")
    return [str(script)] if script.exists() else [sys.executable, "-m", "selfhost_cli"]


def rent(paths: config.Paths) -> None:
    """A ledger with one rental that is ready."""
    ledger = Ledger(paths.ledger)
    rental = Rental(
        label=LABEL,
        state=State.CREATING,
        created_at=time.time(),
        offer_id=1,
        machine_id=1,
        gpu="RTX 4090",
        place="nowhere",
        dph_base=0.3,
        dph_total=0.31,
        storage_dph=0.01,
        down_per_gb=0.0,
        up_per_gb=0.0,
        model="qwen3-coder:30b",
        engine="ollama",
        context=65_536,
        caps=Caps(),
        host_key="",
        box_token="",
        instance_id=1,
    )
    ledger.intend(rental)
    ledger.advance(rental, State.READY)
    ledger.close()


class Front:
    """Stands where the keeper's front stands: proves itself and says that the tunnel is up."""

    def __init__(self, paths: config.Paths) -> None:
        token = attach.front_token(paths).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/selfhost/prove":
                    signed = f"selfhost-prove\n{body['nonce']}\n{port}".encode()
                    answer: object = {"proof": hmac.new(token, signed, hashlib.sha256).hexdigest()}
                else:
                    answer = {"rentals": [{"label": LABEL, "state": "up", "reason": ""}]}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        port = self._server.server_address[1]
        announced = {"pid": os.getpid(), "port": port, "version": "benchmark"}
        paths.keeper_file.write_text(json.dumps(announced))

    def __enter__(self) -> Front:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


if __name__ == "__main__":
    main()
