"""What ends a box when nobody does: laptop, parts or watchdog gone, work that takes long, caps that move."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Rental
from tests.e2e.stage import Stage
from tests.waiting import until

pytestmark = pytest.mark.e2e

MakeStage = Callable[..., Stage]


def run(stage: Stage) -> Path:
    return stage.box() / "root" / ".selfhost" / "run"


def pid(stage: Stage, name: str) -> int:
    return int((run(stage) / name).read_text())


def measured(stage: Stage) -> dict[str, float]:
    """What the watchdog of the box wrote last."""
    _, up, lease, idle, dollars = (run(stage) / "watch").read_text().split()[:5]
    return {"up": float(up), "lease": float(lease), "idle": float(idle), "dollars": float(dollars)}


def rental(stage: Stage) -> Rental:
    ledger = Ledger(stage.paths.ledger)
    try:
        return ledger.live()[0]
    finally:
        ledger.close()


def kill(*pids: int, sign: signal.Signals = signal.SIGKILL) -> None:
    for one in pids:
        os.kill(one, sign)


def sessions(stage: Stage) -> list[int]:
    """sshd of the box, and what it forked for us."""
    sshd = int((stage.box() / "run" / "sshd.pid").read_text())
    return [sshd, *map(int, Path(f"/proc/{sshd}/task/{sshd}/children").read_text().split())]


@pytest.mark.parametrize(
    "how",
    [pytest.param(signal.SIGKILL, id="killed", marks=pytest.mark.long), pytest.param(signal.SIGSTOP, id="cut off")],
)
def test_without_the_laptop_nothing_is_billed_soon_after_the_lease(make_stage: MakeStage, how: signal.Signals) -> None:
    stage = make_stage(lease=0.15)
    stage.up()
    keeper = stage.keeper
    assert keeper
    kill(keeper, sign=how)  # one that is stopped keeps its connection, and says nothing: a network that is cut
    gone = time.monotonic()
    until(lambda: stage.billed == 0, 9 + 60)
    assert time.monotonic() - gone > 4  # it was the lease
    if how == signal.SIGSTOP:
        kill(keeper)
    stage.ask("down")


@pytest.mark.long
def test_the_watchdog_outlives_everything_else_and_its_own_death(make_stage: MakeStage) -> None:
    stage = make_stage(lease=0.2)
    stage.up()
    watchdog = pid(stage, "watchdog.pid")
    parts = [pid(stage, f"{part}.{kind}") for part in ("engine", "proxy") for kind in ("pid", "child")]
    keeper = stage.keeper
    assert keeper
    kill(*parts, *sessions(stage), keeper, watchdog)
    until(lambda: stage.billed == 0, 12 + 60)
    stage.ask("down")


@pytest.mark.long
def test_a_renewal_starts_a_watchdog_whose_loop_died_too(make_stage: MakeStage) -> None:
    stage = make_stage(lease=0.2)
    stage.up()
    before = pid(stage, "watchdog.pid")
    loop = int(Path(f"/proc/{before}/stat").read_text().rpartition(")")[2].split()[1])
    kill(loop, before)
    until(lambda: pid(stage, "watchdog.pid") != before, 30)
    (row,) = stage.ask("status", "--json").json
    assert row["unwatched_s"] < 30
    assert row["box"]["watchdog"]["lease_s"] < 12
    stage.ask("down")


@pytest.mark.long
def test_a_market_that_refuses_the_boxs_key_gets_no_rent(make_stage: MakeStage) -> None:
    stage = make_stage()
    stage.control("faults", fault="key_refused", whose="box", status="403")
    answer = stage.up(code=1)
    assert "the box cannot end itself: refused 403" in answer.err
    assert stage.billed == 0
    stage.up("--unguarded")
    assert stage.billed == 1
    stage.ask("down")
    assert stage.billed == 0


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_prefill_and_a_queue_that_outlast_the_idle_time_are_work(make_stage: MakeStage) -> None:
    stage = make_stage(idle=0.2)
    stage.up()
    env = stage.ask("env", "--json").json
    engine = pid(stage, "engine.child")
    served = [engine, *map(int, Path(f"/proc/{engine}/task/{engine}/children").read_text().split())]

    def ask(number: int) -> int:
        answer = httpx.post(
            f"{env['ANTHROPIC_BASE_URL']}/v1/messages",
            json={"max_tokens": 4, "messages": [{"role": "user", "content": f"Say {number}."}]},
            headers={"Authorization": f"Bearer {env['ANTHROPIC_AUTH_TOKEN']}"},
            timeout=100,
            trust_env=False,
        )
        return int(answer.json()["usage"]["output_tokens"])

    kill(*served, sign=signal.SIGSTOP)  # the first one is in prefill, the others wait for their turn
    try:
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(ask, number) for number in range(3)]
            since = measured(stage)["up"]
            until(lambda: measured(stage)["up"] > since + 30, 60)
            assert measured(stage)["idle"] < 12
            assert stage.billed == 1
            assert not any(one.done() for one in asked)
            kill(*served, sign=signal.SIGCONT)
            assert all(one.result() > 0 for one in asked)
    finally:
        if stage.billed:
            kill(*served, sign=signal.SIGCONT)
    until(lambda: stage.billed == 0, 60)  # and then it is idle
    stage.ask("down")


@pytest.mark.long
@pytest.mark.timeout(240)
def test_extend_moves_the_caps_before_they_end_the_box(make_stage: MakeStage) -> None:
    stage = make_stage(hours=8, max_spend=5)
    stage.up()
    soon = measured(stage)["up"] + 40
    done = stage.ask("extend", "--hours", f"{soon / 3600:.5f}")
    assert "✓ --hours 8 → 0.0" in done.out
    assert "ends by itself in less than a minute by --hours" in done.out
    moves = "h are over. To move that: `selfhost --profile demo extend --hours +2` does"
    assert moves in stage.ask("status").out
    assert moves in stage.ask("claude", "--version").err

    done = stage.ask("extend", "--hours", "+1", "--max-spend", "8")
    assert "✓ --max-spend $5 → $8" in done.out
    assert rental(stage).caps.max_s == pytest.approx(3600 + soon, abs=1)
    assert rental(stage).caps.max_dollars == 8.0
    until(lambda: measured(stage)["up"] > soon + 2, 80)
    assert stage.billed == 1
    (row,) = stage.ask("status", "--json").json
    assert {one["why"] for one in row["ends"]} == {"idle", "hours", "dollars"}

    known, price = measured(stage), rental(stage).dph_total
    assert known["dollars"] > known["up"] / 3600 * price + 0.0001  # what it downloaded costs, too
    answer = stage.ask("extend", "--max-spend", f"{known['dollars'] + price / 200:.4f}", "--json").json
    assert answer["before"]["max_dollars"] == 8.0
    assert answer["ends"][0]["why"] == "dollars"
    assert 0 < answer["ends"][0]["seconds"] < 20
    until(lambda: stage.billed == 0, 75)
    stage.ask("down")


def test_a_box_that_never_started_is_the_next_commands_to_end(make_stage: MakeStage) -> None:
    stage = make_stage(loading_timeout=0.05)
    stage.control("faults", fault="boot_stuck", stage="loading")
    up = stage.spawn("up", "--yes", "--detach", env={"SELFHOST_LOADING_TIMEOUT": "15"})
    until(lambda: stage.paths.ledger.exists() and stage.billed == 1)
    keeper = stage.keeper
    assert keeper
    kill(up.pid, keeper)
    up.communicate()
    assert "nobody looks after it" in stage.ask("status").out
    assert "`selfhost --profile demo down` ends it" in stage.ask("claude", code=5).err
    assert "not over within 0.05 minutes" in stage.up("--attempts", "1", code=1).err
    assert stage.billed == 0


@pytest.mark.long
def test_a_box_out_of_reach_is_not_extended_and_that_is_said(make_stage: MakeStage) -> None:
    stage = make_stage(hours=8)
    stage.ask("extend", "--hours", "9", code=3)
    stage.up()
    assert "at once" in stage.ask("extend", "--hours", "0.001", code=2).err
    assert "nothing to move" in stage.ask("extend", code=2).err
    assert "expected a number" in stage.ask("extend", "--idle", "soon", code=2).err
    kill(*sessions(stage))
    answer = stage.ask("extend", "--hours", "9", code=5)
    assert "MAY STILL BE BILLING: it cannot be reached, and its caps are as they were" in answer.err
    assert rental(stage).caps.max_s == 8 * 3600
    stage.ask("down")
    assert stage.billed == 0
