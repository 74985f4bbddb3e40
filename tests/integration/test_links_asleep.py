"""The keeper's links after a sleep of the laptop: its process is stopped for longer than every deadline."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest

from selfhost_cli.keeper import links
from selfhost_cli.keeper.links import LinkState
from tests.integration.conftest import Box, Keep
from tests.relay import Relay
from tests.waiting import until

pytestmark = [pytest.mark.box, pytest.mark.long]

SLEPT_S = links.RENEW_EVERY_S + links.ANSWER_S + links.SIGN_OF_LIFE_S + 1
AT_ONCE_S = 4.5
"""Sooner than a renewal that is not answered takes."""


def passed(seconds: float, since: float) -> None:
    until(lambda: time.monotonic() - since > seconds, seconds + 5)


def renewals(box: Box) -> int:
    """Grows with each renewal of the lease."""
    return (box.home / ".selfhost" / "run" / "lease").stat().st_mtime_ns


def renewed(box: Box, before: int) -> float:
    """When it was renewed for the first time since then; waits for it."""
    until(lambda: renewals(box) > before)
    return time.monotonic()


def test_a_sleep_that_the_connection_outlives_is_no_loss(keep: Keep, box: Box) -> None:
    laptop = keep(box.endpoint)
    fell_asleep = renewed(box, renewals(box))
    with laptop.asleep():
        before = renewals(box)
        passed(SLEPT_S, fell_asleep)
        awake = time.monotonic()
    assert renewed(box, before) - awake <= 2
    passed(SLEPT_S, awake)
    assert laptop.said(since=fell_asleep) == []


def test_an_answer_that_came_during_a_sleep_counts(keep: Keep, box: Box) -> None:
    """It fell asleep while it waited for one: that it waited long is nobody's silence."""
    laptop = keep(box.endpoint)
    last = renewed(box, renewals(box))
    before = renewals(box)
    passed(1, last)  # that renewal is over, and the next has not begun
    with ExitStack() as asleep:
        with box.frozen(*box.sessions()):
            passed(links.RENEW_EVERY_S + 2, last)
            asleep.enter_context(laptop.asleep())
        passed(SLEPT_S, last + links.RENEW_EVERY_S)
    renewed(box, before)
    assert laptop.said(since=last) == []


def test_a_connection_that_did_not_outlive_a_sleep_is_replaced_at_once(keep: Keep, relay: Relay) -> None:
    laptop = keep(relay.endpoint)
    fell_asleep = time.monotonic()
    with laptop.asleep():
        relay.strand()
        passed(SLEPT_S, fell_asleep)
    awake = time.monotonic()
    assert laptop.heard(state=LinkState.UP, since=awake)["at"] - awake <= AT_ONCE_S
    assert [one["state"] for one in laptop.said(since=awake)] == [LinkState.RECONNECTING, LinkState.UP]


def test_a_laptop_that_sleeps_while_the_box_is_away_finds_it_at_once(keep: Keep, relay: Relay, box: Box) -> None:
    """Nor does it believe that the box is gone, because it was not reached for so long."""
    laptop = keep(relay.endpoint, box.endpoint)
    away = time.monotonic()
    relay.close()
    laptop.heard(state=LinkState.RECONNECTING, since=away)
    with laptop.asleep():
        passed(SLEPT_S, away)
    awake = time.monotonic()
    assert laptop.heard(state=LinkState.UP, since=away)["at"] - awake <= AT_ONCE_S
    assert {one["state"] for one in laptop.said(since=away)} == {LinkState.RECONNECTING, LinkState.UP}
