"""How soon a box is ready: what `selfhost up` takes beyond the market's boot, the link's time and the engine's load.

    .venv/bin/python benchmarks/ready.py [--json] [--engine llamacpp|ollama] [--rounds N] [--rate MB/S]

The real `selfhost up` rents from the sandbox's market, on whose boxes sshd, the scripts, engine and model (0.5 B) are
real ones. All that a box downloads comes over one link of the given rate, which its transfers share. The client polls
with the product's own intervals, not with the demo's. Each round rents a new box and destroys it. Five rounds take five
minutes on two cores; the downloads come from the user's cache directory, where `selfhost demo` puts them.

    total    from the intent, which is written right after the confirmation, to READY in the ledger
    boot     from the intent until the container runs: the market's time
    bytes    what the box downloaded, by the market's own count, at the link's rate
    load     from the engine's start until it answers; of Ollama's server that is the one that it starts for the model
    beyond   total - boot - bytes - load, in three parts: the link was idle though something was still to come; from the
             last byte until the load begins; from its end to READY
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from figures import Figure, as_json, as_table, columns, figure

from selfhost_cli import config
from selfhost_cli.sandbox import demo

GOAL_S = 5.0
PATIENCE_S = 600.0
"""For one command."""
MARKS = (
    *("container runs", "let in by ssh", "watchdog armed", "uploaded", "last byte", "engine", "model", "proxy"),
    *("load begins", "load ends", "start", "tunnel", "ready"),
)
"""Moments of a round. `engine`, `model`, `proxy`, `start`: those steps of install.sh are done."""
TOLD = {"boot": "let in by ssh", "guard": "watchdog armed", "upload": "uploaded", "tunnel": "tunnel"}
"""What `up` says when a stage is done -> the mark."""


@dataclass(frozen=True)
class Round:
    """One box. `marks` in seconds since the intent; `carried`: bytes that it downloaded."""

    marks: Mapping[str, float]
    carried: int
    rate: float

    @property
    def total(self) -> float:
        return self.marks["ready"]

    @property
    def boot(self) -> float:
        return self.marks["container runs"]

    @property
    def link(self) -> float:
        return self.carried / self.rate

    @property
    def load(self) -> float:
        return self.marks["load ends"] - self.marks["load begins"]

    @property
    def idle(self) -> float:
        """Of the link, until the last byte."""
        return self.marks["last byte"] - self.boot - self.link

    @property
    def before(self) -> float:
        return self.marks["load begins"] - self.marks["last byte"]

    @property
    def after(self) -> float:
        return self.total - self.marks["load ends"]

    @property
    def beyond(self) -> float:
        return self.idle + self.before + self.after


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of figures")
    parser.add_argument("--engine", choices=demo.ENGINES, default="llamacpp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=50.0, help="MB/s of the box's link (default: %(default)g)")
    options = parser.parse_args()
    if options.rounds < 1 or options.rate <= 0:
        parser.error("there is nothing to measure")
    with tempfile.TemporaryDirectory(prefix="selfhost-ready-") as place:
        rounds = measure(Path(place), options.engine, options.rounds, options.rate * 1e6)
    figures = report(rounds)
    if options.json:
        print(as_json(figures))
        return
    print(as_table(figures))
    print(f"\nat which second ({options.engine}, {len(rounds)} boxes, {options.rate:g} MB/s; median, least, most)\n")
    print(moments(rounds))


def report(rounds: Sequence[Round]) -> list[Figure]:
    return [
        figure("beyond boot + bytes ÷ bandwidth + load", [one.beyond for one in rounds], "s", GOAL_S),
        figure("  the link idle, though something was to come", [one.idle for one in rounds], "s"),
        figure("  from the last byte until the load begins", [one.before for one in rounds], "s"),
        figure("  from the end of the load to READY", [one.after for one in rounds], "s"),
        figure("total, from the confirmation to READY", [one.total for one in rounds], "s"),
        figure("  boot, the market's", [one.boot for one in rounds], "s"),
        figure("  bytes ÷ bandwidth", [one.link for one in rounds], "s"),
        figure("  load, the engine's", [one.load for one in rounds], "s"),
        figure("bytes that the box downloaded", [one.carried / 1e6 for one in rounds], "MB"),
    ]


def moments(rounds: Sequence[Round]) -> str:
    rows = []
    for name in MARKS:
        at = [one.marks[name] for one in rounds if name in one.marks]
        if at:
            rows.append((statistics.median(at), name, f"{min(at):.2f}", f"{max(at):.2f}"))
    return columns([(name, f"{median:.2f} s", least, most) for median, name, least, most in sorted(rows)])


# --- one box after the other ------------------------------------------------------------------------------------------


def measure(place: Path, engine: str, rounds: int, rate: float) -> list[Round]:
    cache = config.paths(demo.PROFILE, os.environ).cache
    (place / "cache").symlink_to(cache)
    os.environ["SELFHOST_HOME"] = str(place)
    with market(engine, rate) as (where, rented_from):
        return [one_box(where, rented_from, rate) for _ in range(rounds)]


@contextmanager
def market(engine: str, rate: float) -> Iterator[tuple[config.Paths, demo.Market]]:
    """A sandbox with a slow link, and the profile that rents there as a person's would."""
    where = demo.paths()
    made = demo.prepare(where, lambda line: print(line, file=sys.stderr))
    ollama = demo.prepare_ollama(where, made) if engine == "ollama" else None
    running = demo.start_market(where, keep=False, ollama=ollama)
    try:
        running.control("mirror", rate=rate)
        demo.write_config(where, running, made, ollama)
        lines = where.config_file.read_text().splitlines(keepends=True)
        where.config_file.write_text("".join(line for line in lines if not re.match("(poll|pace) ", line)))
        yield where, running
    finally:
        demo.stop(where)


def one_box(where: config.Paths, rented_from: demo.Market, rate: float) -> Round:
    told, said = up()
    rental = json.loads(said)["rental"]
    since, ready = float(rental["created_at"]), float(rental["ready_at"])
    box = Path(next(one["box"] for one in rented_from.control("boxes", "GET") if one["id"] == rental["instance_id"]))
    ours = box / "root/.selfhost"
    moments = {
        "container runs": changed(ours / "run/box.env"),
        "last byte": changed(box / "net_dev"),
        "ready": ready,
        **{TOLD[stage]: at for stage, at in told.items() if stage in TOLD},
        **{step: changed(ours / "steps" / step) for step in ("engine", "model", "proxy", "start")},
        **(loaded_by_ollama(ours) if rental["engine"] == "ollama" else loaded_by_llamacpp(ours)),
    }
    found = Round({name: at - since for name, at in moments.items()}, received(box), rate)
    answered(["down"])
    return found


def up() -> tuple[dict[str, float], str]:
    """When each stage was said to be done (Unix seconds), and the rental as JSON."""
    told: dict[str, float] = {}
    with subprocess.Popen(
        selfhost("up", "--yes", "--detach", "--json"),
        env=demo.clean_environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout
        assert running.stderr
        lines = []
        for line in running.stderr:
            lines.append(line)
            if stage := re.match(r"✓ (\w+)", line):
                told[stage[1]] = time.time()
        said = running.stdout.read()
    if running.returncode:
        sys.exit(f"`selfhost up` ended with {running.returncode}:\n{''.join(lines)}")
    return told, said


def answered(words: Sequence[str]) -> None:
    done = subprocess.run(
        selfhost(*words),
        env=demo.clean_environment(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    if done.returncode:
        sys.exit(f"`selfhost {' '.join(words)}` ended with {done.returncode}:\n{done.stderr}")


def selfhost(*words: str) -> list[str]:
    return [sys.executable, "-m", "selfhost_cli", "--profile", demo.PROFILE, *words]


# --- what a box tells -------------------------------------------------------------------------------------------------


def changed(file: Path) -> float:
    return file.stat().st_mtime


def received(box: Path) -> int:
    """Bytes, by the market's count."""
    line = next(line for line in (box / "net_dev").read_text().splitlines() if "eth0" in line)
    return int(line.partition(":")[2].split()[0])


def loaded_by_llamacpp(ours: Path) -> dict[str, float]:
    """Its port is written once it answers."""
    pid = int((ours / "run/engine.child").read_text())
    return {"load begins": began(pid), "load ends": changed(ours / "run/engine.port")}


def loaded_by_ollama(ours: Path) -> dict[str, float]:
    """By Ollama's own log: from the start of the model's server until that answered."""
    log = (ours / "log/engine.log").read_text(errors="replace")
    begun, over = (
        [
            datetime.fromisoformat(at).timestamp()
            for at in re.findall(rf'^time=(\S+) .* msg="{words}', log, re.MULTILINE)
        ]
        for words in ("starting llama-server", "llama-server started in")
    )
    return {"load begins": begun[0], "load ends": over[-1]}


def began(pid: int) -> float:
    """When a process of this machine began, in Unix seconds."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - up_s + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
