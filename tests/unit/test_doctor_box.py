"""`doctor` on a box: what its commands print, as nvidia-smi, df, Ollama and our own scripts do, and what is made of it.

The outputs of nvidia-smi have the form that its manual (of driver 550) gives; no GPU was at hand.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import health
from selfhost_cli.doctor import box
from selfhost_cli.doctor.box import Gpu
from selfhost_cli.doctor.checks import Finding, Verdict
from selfhost_cli.lifecycle import SIMULATED
from selfhost_cli.remote import ConnectionLost, Result
from tests.fakes.front import StubFront
from tests.fakes.rental import make_rental

OK, WARNING, FAILED, SKIPPED = Verdict.OK, Verdict.WARNING, Verdict.FAILED, Verdict.SKIPPED
MODEL = "qwen3-coder:30b"

ONE_CARD = "NVIDIA GeForce RTX 4090, 550.54.15, 24564, 21877\n"
TWO_CARDS = "NVIDIA A100-SXM4-80GB, 535.183.01, 81920, 512\nNVIDIA A100-SXM4-80GB, 535.183.01, 81920, 4\n"
UNSUPPORTED = "NVIDIA GeForce GT 710, 470.256.02, 2000, [N/A]\n"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n"
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.163\n"
OLLAMAS = """\
{"models":[{"name":"tiny:latest","model":"tiny:latest","size":552400321,"digest":"4ed8","details":{"parent_model":"",\
"format":"gguf","family":"qwen2","families":["qwen2"],"parameter_size":"630.17M","quantization_level":"Q4_K_M"},\
"expires_at":"2026-11-23T17:38:49.737314564Z","size_vram":0,"context_length":2048}]}"""
"""What Ollama 0.34.0 answered, on a machine without a GPU; the digest was cut."""
DF = """\
Filesystem     1024-blocks      Used Available Capacity Mounted on
overlay           62914560  {used}  {free}      40% /
"""


def drive(result: Result, simulated: bool = False) -> tuple[Finding, list[Gpu]]:
    found: list[Gpu] = []
    return box.driver(result, found, simulated=simulated), found


def test_card_driver_and_memory_are_read() -> None:
    finding, cards = drive(Result(0, ONE_CARD, ""))
    assert (finding.verdict, finding.saw) == (OK, "NVIDIA GeForce RTX 4090, driver 550.54.15")
    assert cards == [Gpu("NVIDIA GeForce RTX 4090", "550.54.15", 24564, 21877)]
    assert (box.memory(cards).verdict, box.memory(cards).saw) == (OK, "21877 of 24564 MiB in use")
    finding, cards = drive(Result(0, TWO_CARDS, ""))
    assert len(cards) == 2
    assert box.memory(cards).saw == "512 of 81920 MiB in use, 4 of 81920 MiB in use"


def test_a_card_that_is_full_or_does_not_tell_is_a_warning() -> None:
    assert box.memory([Gpu("x", "1", 24564, 24400)]).verdict is WARNING
    _, cards = drive(Result(0, UNSUPPORTED, ""))
    assert (cards[0].total_mb, cards[0].used_mb) == (2000, None)
    assert "does not tell" in box.memory(cards).why
    assert box.memory([]).verdict is SKIPPED


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (Result(9, NO_DRIVER, ""), "couldn't communicate with the NVIDIA driver"),
        (Result(18, MISMATCH, ""), "Driver/library version mismatch"),
        (Result(6, "No devices were found\n", ""), "No devices were found"),
        (Result(0, "No devices were found\n", ""), "No devices were found"),
        (Result(124, "", ""), "the driver hangs"),
        (Result(137, "", ""), "the driver hangs"),
        (Result(127, "", ""), "there is no nvidia-smi on the box"),
        (Result(1, "", ""), "not a word"),
    ],
)
def test_a_driver_that_does_not_work_is_a_failure_with_what_it_said(result: Result, said: str) -> None:
    finding, cards = drive(result)
    assert (finding.verdict, cards) == (FAILED, [])
    assert said in finding.why
    assert "`selfhost down`, then `selfhost up`" in finding.remedy


def test_a_simulated_gpu_has_no_driver_and_that_is_no_failure() -> None:
    finding, _ = drive(Result(127, "", ""), simulated=True)
    assert (finding.verdict, finding.saw) == (WARNING, "no driver")
    assert "simulated" in finding.why


@pytest.mark.parametrize(
    ("free", "verdict"), [(40_000_000, OK), (1_900_000, WARNING), (150_000, FAILED), (0, FAILED)]
)  # fmt: skip
def test_the_disk_that_is_left_is_read_from_df(free: int, verdict: Verdict) -> None:
    finding = box.disk(Result(0, DF.format(used=62914560 - free, free=free), ""))
    assert finding.verdict is verdict
    assert finding.saw == f"{free * 1024 / 1e9:.1f} of 64.4 GB free"
    assert ("`selfhost up --disk 84`" in finding.remedy) is (verdict is not OK)


@pytest.mark.parametrize("out", ["", "df: no such file", "overlay - - - 40% /"])
def test_a_df_that_makes_no_sense_is_told(out: str) -> None:
    assert box.disk(Result(0, out, "")).verdict is FAILED


def ps(size: Any, there: Any, name: str = MODEL) -> Result:
    return Result(0, json.dumps({"models": [{"name": name, "size": size, "size_vram": there}]}), "")


def test_a_model_that_is_all_on_the_gpu_and_one_that_is_not() -> None:
    assert box.loaded(ps(21_500_000_000, 21_500_000_000), MODEL, simulated=False) == Finding(OK, "21.50 of 21.50 GB")
    spilled = box.loaded(ps(20, 19), MODEL, simulated=False)
    assert (spilled.verdict, spilled.remedy) == (FAILED, health.REMEDIES["gpu"])
    assert "`selfhost down`, then `selfhost up --model NAME`" in spilled.remedy
    assert "5% of the model is not on the GPU" in spilled.why
    assert box.loaded(ps(20, 0), MODEL, simulated=True).verdict is WARNING
    assert box.loaded(ps(1, 1, "qwen:latest"), "Qwen", simulated=False).verdict is OK


def test_what_a_real_ollama_says_of_a_model_on_the_cpu_is_read() -> None:
    found = box.loaded(Result(0, OLLAMAS, ""), "tiny", simulated=False)
    assert (found.verdict, found.saw) == (FAILED, "0.00 of 0.55 GB")
    assert "100% of the model is not on the GPU" in found.why


@pytest.mark.parametrize(
    ("result", "verdict", "said"),
    [
        (Result(0, '{"models": []}', ""), FAILED, "is not loaded"),
        (Result(0, ps(1, 1, "another").out, ""), FAILED, "is not loaded"),
        (Result(7, "", "curl: (7) Failed to connect"), FAILED, "Failed to connect"),
        (Result(0, "[]", ""), FAILED, "nothing sensible"),
        (Result(0, '{"models": ["x"]}', ""), FAILED, "nothing sensible"),
        (Result(0, '{"models": 7}', ""), FAILED, "nothing sensible"),
        (ps("many", None), WARNING, "does not tell"),
    ],
)
def test_an_engine_without_the_model_or_without_sense_is_told(result: Result, verdict: Verdict, said: str) -> None:
    finding = box.loaded(result, MODEL, simulated=False)
    assert finding.verdict is verdict
    assert said in finding.why


@pytest.mark.parametrize(
    ("out", "verdict", "said"),
    [
        ("alive=1\narmed=ok\nverdict=\nage=3\n", OK, "alive, looked 3 s ago, armed"),
        ("armed=ok\nverdict=\nage=3\n", FAILED, "nothing on the box would end it"),
        ("alive=1\narmed=ok\nverdict=\nage=300\n", FAILED, "not looked for more than a minute"),
        ("alive=1\narmed=ok\nverdict=\n", FAILED, "not looked"),
        ("alive=1\narmed=ok\nverdict=idle for 2701 s\nage=3\n", FAILED, "it is ending the box: idle for 2701 s"),
        ("alive=1\narmed=refused 401\nverdict=\nage=3\n", WARNING, "not proven to work"),
        ("alive=1\narmed=\nverdict=\nage=3\n", WARNING, "not proven to work"),
        ("", FAILED, "nothing on the box would end it"),
    ],
)
def test_a_watchdog_that_lives_looks_and_is_armed_is_fine(out: str, verdict: Verdict, said: str) -> None:
    finding = box.watchdog(Result(0, out, ""), armed=True)
    assert finding.verdict is verdict
    assert said in f"{finding.saw} {finding.why}"


@pytest.mark.parametrize(
    ("out", "verdict", "said"),
    [
        ("alive=1\ndeaths=0\nproblem=\n", OK, "alive"),
        ("alive=1\ndeaths=1\nproblem=\n", OK, "alive"),
        ("alive=1\ndeaths=4\nproblem=\n", WARNING, "died 4 times in a row"),
        ("alive=1\ndeaths=0\nproblem=model requires more system memory\n", FAILED, "more system memory"),
        ("deaths=\nproblem=\n", FAILED, "not running"),
    ],
)
def test_a_part_that_runs_dies_or_is_away_is_told(out: str, verdict: Verdict, said: str) -> None:
    finding = box.process(Result(0, out, ""))
    assert finding.verdict is verdict
    assert said in f"{finding.saw} {finding.why}"


def test_what_does_not_fit_is_changed_after_down() -> None:
    finding = box.process(Result(0, "alive=1\ndeaths=0\nproblem=model requires more system memory\n", ""))
    assert "`selfhost down`, then `selfhost up --model NAME`" in finding.remedy, "a live box refuses another model"


def test_the_end_of_a_log_is_its_last_whole_lines() -> None:
    assert box.log(Result(0, "".join(f"line {n}\n" for n in range(9)), "")).saw == "\n".join(
        f"line {n}" for n in range(4, 9)
    )
    cut = "e-rest-of-a-secret\nwhole\n" + "x" * box.LOG_BYTES
    assert box.log(Result(0, cut[-box.LOG_BYTES - 20 :], "")).saw.startswith("whole\n")
    assert box.log(Result(0, "y" * box.LOG_BYTES, "")).saw == "empty"
    assert box.log(Result(1, "", "tail: cannot open")).verdict is SKIPPED


def test_a_line_of_a_log_is_what_a_terminal_would_leave_of_it() -> None:
    assert box.log(Result(0, "first\n\x1b[31m10 %\r 50 %\r100 %\r\nlast\n", "")).saw == "first\n100 %\nlast"
    assert len(box.log(Result(0, "y" * 5000 + "\n", "")).saw) < 2100


# --- the commands themselves, in a home that looks like a box's --------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("run", "log"):
        (tmp_path / ".selfhost" / name).mkdir(parents=True)
    return tmp_path


def run(home: Path, command: str) -> Result:
    env = {"HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-c", command], env=env, cwd="/", capture_output=True, text=True, timeout=30, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


@contextmanager
def process(home: Path, name: str, *words: str) -> Iterator[None]:
    """Something that lives, with these words as its arguments; its number is in run/NAME.pid."""
    sleeper = subprocess.Popen(["sh", "-c", "sleep 30 & wait", *words], start_new_session=True)
    (home / ".selfhost" / "run" / f"{name}.pid").write_text(f"{sleeper.pid}\n")
    try:
        yield
    finally:
        os.killpg(sleeper.pid, signal.SIGKILL)
        sleeper.wait()


def test_a_living_watchdog_is_seen_and_a_number_that_is_somebody_elses_is_not(home: Path) -> None:
    folder = home / ".selfhost" / "run"
    (folder / "armed").write_text("ok\n")
    (folder / "watch").write_text("0/0/0/0 1 1 1 0.1 \n")
    with process(home, "watchdog", "bin/watchdog.sh", "-"):
        assert box.watchdog(run(home, box.WATCHDOG), armed=True).verdict is OK
    with process(home, "watchdog", "another", "program"):
        assert box.watchdog(run(home, box.WATCHDOG), armed=True).saw == "dead, armed"
    (folder / "watchdog.pid").unlink()
    assert box.watchdog(run(home, box.WATCHDOG), armed=True).verdict is FAILED


def test_the_loops_of_engine_and_proxy_are_seen(home: Path) -> None:
    folder = home / ".selfhost" / "run"
    (folder / "proxy.deaths").write_text("2\n")
    (folder / "engine.problem").write_text("it does not fit\nand more\n")
    with process(home, "engine", "bin/start.sh", "supervise", "engine"):
        engine = box.process(run(home, box.PART.format(part="engine")))
        proxy = box.process(run(home, box.PART.format(part="proxy")))
    assert (engine.verdict, engine.saw, engine.why) == (FAILED, "alive", "it does not fit")
    assert (proxy.verdict, proxy.saw) == (FAILED, "not running, died 2 times in a row")


def test_disk_logs_and_cards_are_asked_for_as_they_are(home: Path) -> None:
    assert re.fullmatch(r"[\d.]+ of [\d.]+ GB free", box.disk(run(home, box.DISK)).saw)
    (home / ".selfhost" / "log" / "engine.log").write_text("first\n" + "z" * 9000 + "\nlast\n")
    assert box.log(run(home, box.LOG.format(log="engine"))).saw == "last"
    assert box.log(run(home, box.LOG.format(log="proxy"))).verdict is SKIPPED
    assert run(home, f"PATH=/nowhere; {box.DRIVER}").code == 127
    (home / "bin").mkdir()
    (home / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'X'\n{ONE_CARD}X\n")
    (home / "bin" / "nvidia-smi").chmod(0o755)
    assert drive(run(home, box.DRIVER))[1][0].total_mb == 24564


def test_ollama_is_asked_on_the_port_that_it_has(home: Path) -> None:
    assert box.loaded(run(home, box.LOADED), MODEL, simulated=False).verdict is FAILED
    with StubFront("x", {"/api/ps": (200, json.loads(ps(9, 9).out))}) as engine:
        (home / ".selfhost" / "run" / "engine.port").write_text(f"{engine.port}\n")
        assert (
            box.loaded(run(home, f"http_proxy=http://127.0.0.1:9; {box.LOADED}"), MODEL, simulated=False).verdict is OK
        )


# --- all of them over one connection ------------------------------------------------------------------------------


@dataclass
class Scripted:
    """A box whose commands are answered by their first words; others end with 1."""

    answers: dict[str, Callable[[], Result]]
    asked: list[str] = field(default_factory=list)

    def run(self, command: str, *, timeout: float = 60.0, on_line: object = None) -> Result:
        self.asked.append(command)
        return next(
            (answer() for begin, answer in self.answers.items() if command.startswith(begin)), Result(1, "", "")
        )

    def put(self, data: bytes, path: str, *, mode: int = 0o600) -> None:
        raise AssertionError("doctor only looks")

    def close(self) -> None: ...


def examined(remote: Scripted, **facts: Any) -> dict[str, Finding]:
    rental = make_rental(**({"engine": "ollama", "model": MODEL} | facts))
    return dict(zip(box.NAMES[1:], box.examine(remote, rental), strict=True))


def test_one_command_that_breaks_keeps_no_other_from_being_asked() -> None:
    def breaks() -> Result:
        raise ConnectionLost("the connection to the box broke")

    remote = Scripted({"df": breaks, box.LOADED: lambda: ps(5, 5), box.DRIVER: lambda: Result(0, ONE_CARD, "")})
    found = examined(remote)
    assert (found["disk"].verdict, found["disk"].why) == (FAILED, "the connection to the box broke")
    assert found["model on the GPU"].verdict is found["driver"].verdict is found["video memory"].verdict is OK
    assert remote.asked[-1] == box.DRIVER, "a driver that hangs comes last"


def test_an_engine_that_is_not_ollama_is_not_asked_for_what_only_ollama_tells() -> None:
    remote = Scripted({})
    found = examined(remote, engine="llamacpp", gpu=f"RTX 4090{SIMULATED}")
    assert found["model on the GPU"].why == "llamacpp does not tell"
    assert box.LOADED not in remote.asked
