from __future__ import annotations

import pytest

from selfhost_cli.invoice import invoice
from selfhost_cli.ledger import Usage
from selfhost_cli.model import Charges
from tests.fakes.rental import make_rental

HOUR = 3600.0
START = 1_795_000_000.0


def test_the_gpu_costs_from_running_and_the_disk_from_creation() -> None:
    rental = make_rental(instance_id=7, sent_at=START, running_at=START + HOUR, ended_at=START + 3 * HOUR)
    bill = invoice(rental, Usage(), None, now=START + 99 * HOUR)
    assert bill.gpu_dollars == pytest.approx(2 * 0.30)
    assert bill.disk_dollars == pytest.approx(3 * 0.01)
    assert bill.estimated


def test_the_markets_own_figures_win() -> None:
    rental = make_rental(instance_id=7, sent_at=START, running_at=START)
    bill = invoice(rental, Usage(2, 900_000, 0, 100_000), Charges(0.5, 0.1, down=0.2, up=0.2), now=START + HOUR)
    assert not bill.estimated
    assert bill.total == pytest.approx(1.0)
    assert bill.traffic_gb == pytest.approx(0.2 / 0.002 + 0.2 / 0.004)
    assert bill.per_million_tokens == pytest.approx(1.0)


def test_a_box_that_never_existed_costs_nothing() -> None:
    bill = invoice(make_rental(sent_at=START), Usage(), None, now=START + HOUR)
    assert bill.total == 0
    assert bill.per_million_tokens is None
