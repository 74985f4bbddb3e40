"""What goes wrong, on real boxes: at the end of each test the market bills nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Rental, State
from tests.e2e.stage import Stage
from tests.waiting import until

pytestmark = pytest.mark.e2e

MakeStage = Callable[..., Stage]


def rental(stage: Stage) -> Rental | None:
    ledger = Ledger(stage.paths.ledger)
    try:
        live = ledger.live()
        return live[0] if live else None
    finally:
        ledger.close()


def state(stage: Stage) -> State | None:
    found = rental(stage) if stage.paths.ledger.exists() else None
    return found.state if found else None


def stuck_up(stage: Stage, *words: str) -> subprocess.Popen[str]:
    """An `up` whose box exists, is billed, and never gets past `loading`."""
    stage.control("faults", fault="boot_stuck", stage="loading")
    process = stage.spawn("up", "--yes", "--detach", *words)
    until(lambda: state(stage) is State.BOOTING and stage.billed == 1)
    return process


def test_up_gives_a_box_that_down_ends_and_proves_gone(make_stage: MakeStage) -> None:
    stage = make_stage()
    stage.up()
    assert stage.billed == 1
    answer = stage.ask("down")
    assert "nothing is billed any more" in answer.out
    assert "per million tokens" in answer.out
    assert stage.billed == 0
    assert "nothing is billed any more" in stage.ask("down").out
    assert "knows of no box" in stage.ask("status").out
    stage.ask("claude", "-p", "hi", code=3)
    stage.wait_for_keeper_to_end()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_up_destroys_its_box(make_stage: MakeStage, sign: signal.Signals) -> None:
    stage = make_stage()
    process = stuck_up(stage)
    process.send_signal(sign)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert stage.billed == 0


def test_down_ends_an_up_that_is_still_running(make_stage: MakeStage) -> None:
    stage = make_stage()
    process = stuck_up(stage)
    stage.ask("down")
    assert stage.billed == 0
    process.communicate(timeout=30)
    assert process.returncode != 0


def test_an_up_that_was_killed_is_resumed_and_nothing_is_rented_twice(make_stage: MakeStage) -> None:
    stage = make_stage()
    stage.control("settings", stages={"null": 0.05, "created": 0.05, "loading": 3.0})
    process = stage.spawn("up", "--yes", "--detach")
    until(lambda: state(stage) is State.BOOTING)
    process.kill()
    process.communicate()
    stage.up()
    asked = stage.control("requests", "GET")
    assert sum(row["method"] == "PUT" and "/asks/" in row["path"] for row in asked) == 1
    assert stage.billed == 1
    stage.ask("down")
    assert stage.billed == 0


def test_the_keeper_ends_the_box_of_an_up_that_was_killed(make_stage: MakeStage) -> None:
    stage = make_stage(orphan=0.02)
    process = stuck_up(stage)
    process.kill()
    process.communicate()
    until(lambda: stage.billed == 0)
    until(lambda: state(stage) is None)
    stage.wait_for_keeper_to_end()


def test_down_ends_the_box_when_the_ledger_is_lost(make_stage: MakeStage) -> None:
    stage = make_stage()
    process = stuck_up(stage)
    process.kill()
    process.communicate()
    for path in stage.paths.state.glob("ledger.sqlite3*"):
        path.unlink()
    answer = stage.ask("up", "--yes", code=5)
    assert "`selfhost --profile demo down`" in answer.err
    assert "which the ledger did not know" in stage.ask("down").out
    assert stage.billed == 0
    again = stuck_up(stage)  # the keeper sees the new ledger
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=30)
    assert stage.billed == 0


def test_down_works_with_a_ledger_that_is_no_database(make_stage: MakeStage) -> None:
    stage = make_stage()
    process = stuck_up(stage)
    process.kill()
    process.communicate()
    for path in stage.paths.state.glob("ledger.sqlite3-*"):
        path.unlink()
    stage.paths.ledger.write_bytes(b"not a database, but long enough to be looked at" * 50)
    stage.ask("up", "--yes", code=5)
    answer = stage.ask("down")
    assert "nothing of this installation is billed any more" in answer.out
    assert "move that file away" in answer.out
    assert stage.billed == 0


def test_an_interrupted_up_cleans_up_although_nobody_reads_its_words_any_more(make_stage: MakeStage) -> None:
    stage = make_stage()
    process = stuck_up(stage)
    assert process.stderr
    assert process.stdout
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    process.wait(30)
    process.stdout.close()
    assert stage.billed == 0


def test_a_boot_that_never_finishes_is_ended_at_its_deadline_and_another_machine_tried(make_stage: MakeStage) -> None:
    stage = make_stage(loading_timeout=0.05)
    stage.control("faults", fault="boot_stuck", stage="loading")
    answer = stage.up("--attempts", "2", code=1)
    assert "'loading' was not over within 0.05 minutes" in answer.err
    with closing(Ledger(stage.paths.ledger)) as ledger:
        first, second = ledger.all()
    assert first.machine_id != second.machine_id
    assert second.sent_at
    assert first.ended_at
    assert second.sent_at - first.ended_at > 5
    assert stage.billed == 0


def test_an_offer_that_is_gone_costs_nothing_but_a_moment(make_stage: MakeStage) -> None:
    stage = make_stage(loading_timeout=0.05)
    stage.control("faults", fault="offer_gone", calls=2)
    stage.control("faults", fault="boot_stuck", stage="loading")
    answer = stage.up("--attempts", "1", code=1)
    assert answer.err.count("trying the next one") == 2
    assert stage.billed == 0


def test_a_host_that_dies_is_noticed_and_not_billed_for(make_stage: MakeStage) -> None:
    stage = make_stage()
    stage.up()
    found = rental(stage)
    assert found
    stage.control("kill", instance=found.instance_id)
    until(lambda: stage.ask("status", "--json").json[0]["tunnel"] == "reconnecting")
    stage.ask("down")
    assert stage.billed == 0


def test_a_box_without_the_laptop_ends_itself_when_the_lease_is_over(make_stage: MakeStage) -> None:
    stage = make_stage(lease=0.1)
    stage.up()
    keeper = stage.keeper
    assert keeper
    os.kill(keeper, signal.SIGKILL)
    until(lambda: stage.billed == 0, 45)
    assert "knows of no box" in _eventually_forgotten(stage)


def _eventually_forgotten(stage: Stage) -> str:
    """`down` learns from the market that nothing is left, and says so."""
    stage.ask("down")
    return stage.ask("status").out


def test_an_idle_box_ends_itself_while_the_keeper_lives(make_stage: MakeStage) -> None:
    stage = make_stage(idle=0.2)
    stage.up()
    until(lambda: stage.billed == 0, 45)
    until(lambda: state(stage) is None, 60)
    stage.wait_for_keeper_to_end()
    assert "0.2 min without a request. To move that: a request does, or `selfhost extend" in (
        stage.paths.keeper_log.read_text()
    )


def test_the_hours_cap_ends_the_box(make_stage: MakeStage) -> None:
    stage = make_stage(hours=0.005)
    stage.spawn("up", "--yes", "--detach").communicate(timeout=100)
    until(lambda: stage.billed == 0, 60)
    stage.ask("down")


def test_when_the_market_is_away_down_says_what_may_still_cost_money(make_stage: MakeStage) -> None:
    stage = make_stage()
    process = stuck_up(stage)
    process.kill()
    process.communicate()
    answer = stage.ask("down", code=5, env={"SELFHOST_MARKET_URL": "http://127.0.0.1:9"})
    assert "MAY STILL BE BILLING" in answer.err
    assert "/h" in answer.err
    wrong = {"SELFHOST_API_KEY": "wrong", "SELFHOST_MARKET_URL": stage.market.url}
    answer = stage.ask("down", code=5, env=wrong)
    assert "MAY STILL BE BILLING" in answer.err
    stage.ask("down")
    assert stage.billed == 0


def test_the_exit_codes_tell_what_went_wrong(make_stage: MakeStage) -> None:
    stage = make_stage()
    assert "--yes" in stage.ask("up", code=2).err
    stage.ask("up", "--yes", "--hours", "soon", code=2)
    stage.ask("no-such-command", code=2)
    assert "refused" in stage.up("--max-price", "0.01", code=4).err
    wrong = {"SELFHOST_API_KEY": "wrong", "SELFHOST_MARKET_URL": stage.market.url}
    assert "SELFHOST_API_KEY" in stage.ask("down", env=wrong, code=3).err
    stage.control("settings", credit=0.01)
    assert "credit" in stage.up(code=3).err
    assert stage.billed == 0


def test_a_pipe_behind_up_ends_with_it(make_stage: MakeStage) -> None:
    stage = make_stage()
    command = f"{sys.executable} -m selfhost_cli --profile demo up --yes 2>&1 | cat"
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command], env=stage.env, cwd=stage.home, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip
    assert "serves" in done.stdout
    assert time.monotonic() - began < 90
    assert stage.keeper
    stage.ask("down")


def test_two_profiles_share_a_market_and_touch_only_their_own(make_stage: MakeStage, tmp_path: Path) -> None:
    stage = make_stage()
    other = tmp_path / "other"
    (other / "config" / "demo").mkdir(parents=True)
    (other / "config" / "demo" / "config.toml").write_bytes(stage.paths.config_file.read_bytes())
    elsewhere = {"SELFHOST_HOME": str(other)}
    process = stuck_up(stage)
    answer = stage.ask("down", env=elsewhere)
    assert "another installation" in answer.out
    assert stage.billed == 1
    stage.ask("down", "--all", env=elsewhere)
    assert stage.billed == 0
    process.kill()
    process.communicate()
    stage.ask("down")
