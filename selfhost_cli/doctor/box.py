"""The box, over ssh: driver and video memory, disk, what runs on it and the last lines of its logs. Reads only.

The commands are values, and what they print is parsed by pure functions: a stranger's machine wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from selfhost_cli import health, logs
from selfhost_cli.config import Settings
from selfhost_cli.doctor.checks import Case, Finding, Line, attempt, failed, ok, skipped, warning
from selfhost_cli.errors import SelfhostError
from selfhost_cli.lifecycle import SIMULATED
from selfhost_cli.lifecycle.reaching import meet
from selfhost_cli.model import Rental, State
from selfhost_cli.remote import Remote, Result

SSH_S = 90.0
"""For all of it: two ways in, and a dozen short commands."""
ANSWER_S = 20.0
LOG_BYTES, LOG_LINES = 8000, 5
LEAST_MB, LITTLE_MB = 200, 2000
FULL = 0.985
"""Of the video memory: the next request may not find room."""
LATE_S = 60.0
"""Its watchdog looks every few seconds."""
BILL = "`selfhost down` ends the bill."
OTHERWISE = "With another model or context: `selfhost down`, then `selfhost up --model NAME` or `--context TOKENS`."
ANOTHER = "Another machine: `selfhost down`, then `selfhost up`."
LOGS = ("engine", "proxy", "watchdog", "install", "onstart")
NAMES = (
    *("ssh to the box", "disk", "watchdog", "engine", "proxy", "model on the GPU"),
    *(f"{log} log" for log in LOGS),
    *("driver", "video memory"),
)

# A driver that hangs must not keep the rest: these come last, and `timeout` ends what can be ended.
DRIVER = (
    "command -v nvidia-smi >/dev/null || exit 127; timeout -k 2 10 nvidia-smi"
    " --query-gpu=name,driver_version,memory.total,memory.used --format=csv,noheader,nounits"
)
DISK = "df -Pk ~/.selfhost"
# That a process has a number proves nothing: it has to look like the loop that wrote it.
WATCHDOG = (
    "cd ~/.selfhost/run && p=$(cat watchdog.pid) && tr '\\0' ' ' </proc/$p/cmdline | grep -q watchdog && echo alive=1;"
    ' echo "armed=$(cat armed)"; echo "verdict=$(cat verdict)";'
    ' t=$(stat -c %Y watch) && echo "age=$(($(date +%s) - t))"; true'
)
PART = (
    "cd ~/.selfhost/run && p=$(cat {part}.pid) && tr '\\0' ' ' </proc/$p/cmdline | grep -q 'supervise {part}' &&"
    ' echo alive=1; echo "deaths=$(cat {part}.deaths)"; echo "problem=$(head -n 1 {part}.problem)"; true'
)
LOADED = (
    "cd ~/.selfhost && p=$(cat run/engine.port) &&"
    " timeout -k 2 10 curl -qsS --noproxy '*' -m 8 \"http://127.0.0.1:$p/api/ps\""
)
LOG = f"tail -c {LOG_BYTES} ~/.selfhost/log/{{log}}.log"


@dataclass(frozen=True)
class Gpu:
    """One card as nvidia-smi tells it; megabytes, None where it does not know."""

    name: str
    driver: str
    total_mb: float | None
    used_mb: float | None


def lines(case: Case, settings: Settings | None, rentals: Sequence[Rental]) -> list[Line]:
    asked = settings or Settings(case.profile, case.paths, {})
    if not rentals:
        return [Line("box", NAMES, lambda: (skipped("there is no rental") for _ in NAMES), ANSWER_S)]
    rental = rentals[-1]
    if rental.state not in (State.INSTALLING, State.READY):
        why = f"nobody can log in to a box that is {rental.state}"
        return [Line("box", NAMES, lambda: (skipped(why) for _ in NAMES), ANSWER_S)]
    return [Line("box", NAMES, lambda: _look(case, asked, rental), SSH_S)]


def _look(case: Case, settings: Settings, rental: Rental) -> Iterator[Finding]:
    with case.reach(settings) as (_, reach):
        try:
            remote, endpoint = meet(rental, reach)
        except SelfhostError as error:
            yield failed("", error.message, f"{error.remedy} {BILL}")
            return
        try:
            yield ok(f"{endpoint} shows the pinned host key and lets us in")
            yield from examine(remote, rental)
        finally:
            remote.close()


def examine(remote: Remote, rental: Rental) -> Iterator[Finding]:
    """A finding for each name but the first, in their order."""

    def ask(command: str, read: Callable[[Result], Finding]) -> Finding:
        return attempt(lambda: read(remote.run(command, timeout=ANSWER_S)))

    simulated = SIMULATED in rental.gpu
    yield ask(DISK, disk)
    yield ask(WATCHDOG, lambda result: watchdog(result, armed=rental.guarded))
    for part in ("engine", "proxy"):
        yield ask(PART.format(part=part), process)
    if rental.engine == "ollama":
        yield ask(LOADED, lambda result: loaded(result, rental.model, simulated=simulated))
    else:
        yield skipped(f"{rental.engine} does not tell")
    for name in LOGS:
        yield ask(LOG.format(log=name), log)
    found: list[Gpu] = []
    yield ask(DRIVER, lambda result: driver(result, found, simulated=simulated))
    yield attempt(lambda: memory(found))


def disk(result: Result) -> Finding:
    """What `df -Pk` says of the file system that everything of ours is on."""
    rows = result.out.strip().splitlines()
    numbers = [word for word in (rows[-1].split() if rows else []) if word.isascii() and word.isdigit()]
    if result.code or len(numbers) < 3:
        return _unreadable("df", result)
    total, free = (int(numbers[at]) * 1024 / 1e6 for at in (0, 2))
    saw = f"{free / 1000:.1f} of {total / 1000:.1f} GB free"
    bigger = f"Rent one with more: `selfhost down`, then `selfhost up --disk {total / 1000 + 20:.0f}`."
    if free < LEAST_MB:
        return failed(saw, "nothing can be written any more", bigger)
    return warning(saw, "little is left for logs and another model", bigger) if free < LITTLE_MB else ok(saw)


def watchdog(result: Result, *, armed: bool) -> Finding:
    """Whether it lives and looks, and whether its key was proven to work."""
    told = _pairs(result)
    age = _number(told.get("age", ""))
    saw = "alive" if told.get("alive") else "dead"
    saw += f", looked {age:.0f} s ago" if told.get("alive") and age is not None else ""
    saw += f", {'armed' if told['armed'] == 'ok' else told['armed']}" if told.get("armed") else ""
    again = f"The keeper starts it again: `selfhost status` tells whether there is one. {BILL}"
    if not told.get("alive"):
        return failed(saw, "nothing on the box would end it by itself", again)
    if told.get("verdict"):
        return failed(saw, f"it is ending the box: {told['verdict']}", "`selfhost down` proves that it is gone.")
    if age is None or age > LATE_S:
        return failed(saw, "it has not looked for more than a minute", again)
    if told.get("armed") != "ok" or not armed:
        why = "its key was not proven to work: only `selfhost down` or the keeper ends this box"
        return warning(saw, why, BILL)
    return ok(saw)


def process(result: Result) -> Finding:
    """The loop that keeps engine or proxy running."""
    told = _pairs(result)
    deaths, problem = int(_number(told.get("deaths", "")) or 0), told.get("problem", "")
    saw = ("alive" if told.get("alive") else "not running") + (f", died {deaths} times in a row" if deaths > 1 else "")
    again = f"`selfhost up` starts it again. {BILL}"
    if not told.get("alive"):
        return failed(saw, problem or "nothing starts it again", again)
    if problem:
        return failed(saw, problem, OTHERWISE)
    return warning(saw, "it ends again and again; its log below tells why", again) if deaths > 1 else ok(saw)


def loaded(result: Result, model: str, *, simulated: bool) -> Finding:
    """Ollama's /api/ps: what is loaded, and how much of it is in video memory (`size_vram == size`)."""
    names = (model.lower(), f"{model.lower()}:latest")  # it does not mind case
    try:
        rows = json.loads(result.out)["models"]
        row = next(row for row in rows if str(row.get("name")).lower() in names)
    except StopIteration:
        return failed("", f"{model} is not loaded", f"It may still be loading: look at `selfhost status`. {BILL}")
    except (ValueError, KeyError, TypeError, AttributeError):
        return _unreadable("/api/ps", result)
    share = health.on_gpu(row)
    if share is None:
        return warning(
            "", "Ollama does not tell how much of it is in video memory", "`selfhost status` tells the rest."
        )
    saw = f"{row['size_vram'] / 1e9:.2f} of {row['size'] / 1e9:.2f} GB"
    if row["size_vram"] == row["size"]:
        return ok(saw)
    why = f"{1 - share:.0%} of the model is not on the GPU, which costs most of the speed"
    if simulated:
        return warning(saw, f"{why}; this GPU is simulated", "None is needed in the sandbox.")
    return failed(saw, why, health.REMEDIES["gpu"])


def log(result: Result) -> Finding:
    """The last whole lines of one log."""
    if result.code:
        return skipped("not there")
    # A line that was cut in front might begin in the middle of a secret.
    text = result.out.partition("\n")[2] if len(result.out.encode(errors="replace")) >= LOG_BYTES else result.out
    lines = [line for line in map(logs.tidy, text.split("\n")) if line.strip()]
    return ok("\n".join(lines[-LOG_LINES:])) if lines else ok("empty")


def driver(result: Result, found: list[Gpu], *, simulated: bool) -> Finding:
    """What nvidia-smi says; the cards are put into `found`."""
    said = (result.err.strip() or result.out.strip()).splitlines()
    if result.code == 127:
        if simulated:
            return warning("no driver", "this GPU is simulated: its box has none", "None is needed in the sandbox.")
        return failed("no driver", "there is no nvidia-smi on the box", ANOTHER)
    if result.code in (124, 137):
        return failed("", "nvidia-smi did not end within 10 s: the driver hangs", ANOTHER)
    cards = [gpu for line in result.out.splitlines() if (gpu := parse(line))]
    if result.code or not cards:
        return failed("", f"nvidia-smi failed ({result.code}): {said[0] if said else 'not a word'}", ANOTHER)
    found += cards
    return ok(", ".join(f"{gpu.name}, driver {gpu.driver}" for gpu in cards))


def parse(line: str) -> Gpu | None:
    """One line of nvidia-smi's CSV, None for what is none."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 4 or not all(fields):
        return None
    return Gpu(fields[0], fields[1], _number(fields[2]), _number(fields[3]))


def memory(cards: Sequence[Gpu]) -> Finding:
    """Video memory in use, as far as the cards tell it."""
    if not cards:
        return skipped("without a driver nobody knows")
    known = [(gpu.used_mb, gpu.total_mb) for gpu in cards if gpu.used_mb is not None and gpu.total_mb]
    if len(known) < len(cards):
        return warning("", "nvidia-smi does not tell how much of it is in use", ANOTHER)
    saw = ", ".join(f"{used:.0f} of {total:.0f} MiB in use" for used, total in known)
    if any(used / total > FULL for used, total in known):
        return warning(saw, "there may be no room for the next request", health.REMEDIES["gpu"])
    return ok(saw)


def _unreadable(what: str, result: Result) -> Finding:
    said = (result.err.strip() or result.out.strip())[:LOG_BYTES].splitlines()
    return failed("", f"{what} told nothing sensible ({result.code}): {said[0] if said else 'not a word'}", BILL)


def _pairs(result: Result) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition("=") for line in result.out.splitlines())}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < 1e15 else None
