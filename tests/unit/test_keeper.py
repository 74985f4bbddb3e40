from __future__ import annotations

from selfhost_cli.keeper.deadlines import outlived
from selfhost_cli.model import Caps
from tests.fakes.rental import make_rental

START = 1_795_000_000.0


def test_a_keeper_holds_out_for_an_hour_longer_than_the_box_can_live() -> None:
    rental = make_rental(sent_at=START, caps=Caps(max_s=7200))
    assert not outlived(rental, START + 7200 + 3599)
    assert outlived(rental, START + 7200 + 3601)


def test_a_rental_that_was_never_sent_counts_from_its_intent() -> None:
    rental = make_rental(created_at=START, sent_at=None, caps=Caps(max_s=60))
    assert not outlived(rental, START + 3600)
    assert outlived(rental, START + 3661)
