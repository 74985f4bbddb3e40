"""What a real run cost: bytes counted by the box's real watchdog, noted by the real keeper, billed by the market."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from selfhost_cli.ledger import Ledger
from tests.e2e.stage import Stage
from tests.waiting import until

pytestmark = pytest.mark.e2e


@pytest.mark.long
def test_the_estimate_of_a_real_run_is_what_the_market_charges(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage()
    stage.up()
    env = stage.ask("env", "--json").json
    answer = httpx.post(
        f"{env['ANTHROPIC_BASE_URL']}/v1/messages",
        json={"max_tokens": 4, "messages": [{"role": "user", "content": "Say hi."}]},
        headers={"Authorization": f"Bearer {env['ANTHROPIC_AUTH_TOKEN']}"},
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 200

    def downloaded() -> float:
        return float(stage.ask("status", "--json").json[0]["so_far"]["traffic_gb"] or 0)

    until(lambda: downloaded() > 0.45, 60)  # the model, as the watchdog saw it come
    (running,) = stage.ask("cost", "--json").json["running"]
    (bill,) = stage.ask("down", "--json").json["invoices"]
    assert 0 < running["cost"]["dollars"] <= bill["total"] * 1.05
    assert not bill["estimated"]
    ledger = Ledger(stage.paths.ledger)
    (rental,) = ledger.all()
    ledger.close()
    assert abs(bill["estimate"] - bill["total"]) <= max(0.05 * bill["total"], 5 / 3600 * rental.dph_total)
    value = stage.ask("cost", "--json").json
    assert value["total"]["dollars"] == pytest.approx(bill["total"])
    assert value["total"]["usage"]["output_tokens"] > 0
    assert "market's" in stage.ask("cost").out
