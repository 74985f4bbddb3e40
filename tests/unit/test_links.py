"""What a link promises of its timing, without a box: a listener that greets as sshd does, and lines that are lost."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest

from selfhost_cli.keeper import links
from selfhost_cli.keeper.links import Link, LinkState, _Backoff, _Market, _Rounds
from selfhost_cli.model import Endpoint, Rental
from selfhost_cli.remote import ConnectionLost, OtherKey, Result
from selfhost_cli.wait import SYSTEM
from tests.fakes.rental import make_rental
from tests.waiting import until

DIRECT, PROXY = Endpoint("203.0.113.7", 40022), Endpoint("198.51.100.9", 22)


def test_a_frozen_box_cannot_stay_unnoticed_for_more_than_ten_seconds() -> None:
    assert links.RENEW_EVERY_S + links.ANSWER_S <= 10  # it froze after a renewal
    assert links.ANSWER_S + links.SIGN_OF_LIFE_S <= 10  # it froze in the middle of one


def test_what_fails_is_tried_less_and_less_often_but_every_fifteen_seconds_at_least() -> None:
    backoff, waits = _Backoff(), []
    assert backoff.due < 0
    for _ in range(10):
        backoff.failed(100.0)
        waits.append(backoff.due - 100.0)
    assert 0 < waits[0] <= 0.5
    assert all(7.5 <= wait <= 15 for wait in waits[-4:])
    assert len(set(waits)) == len(waits)


def test_every_door_is_knocked_at_every_two_seconds_direct_before_the_relay() -> None:
    rounds, knocks = _Rounds(), []
    for tenth in range(40):
        knocks += [(tenth / 10, end) for end in rounds.due(tenth / 10, (DIRECT, PROXY), keen=True)]
    assert knocks == [(0.0, DIRECT), (0.5, PROXY), (2.0, DIRECT), (2.5, PROXY)]


def test_later_there_is_less_of_a_hurry() -> None:
    rounds = _Rounds()
    knocks = [second for second in range(600) if rounds.due(float(second), (DIRECT,), keen=False)]
    assert 600 / 15 <= len(knocks) <= 600 / 7.5
    assert all(later - earlier <= 16 for earlier, later in pairwise(knocks))


def test_the_market_is_asked_ever_less_often_and_what_worked_stays_first() -> None:
    asked: list[Rental] = []

    def endpoints(rental: Rental) -> Sequence[Endpoint]:
        asked.append(rental)
        return (DIRECT, PROXY)

    market = _Market(make_rental(), endpoints)
    for second in range(120):
        market.ask(float(second))
        until(lambda: market._asking is None or not market._asking.is_alive())
        assert market.update((PROXY, DIRECT)) == (PROXY, DIRECT)
    assert 120 / 15 <= len(asked) <= 20
    market.ask(1000.0)
    until(lambda: market.update((PROXY,)) == (DIRECT, PROXY))


def test_a_market_that_fails_says_nothing_about_the_box() -> None:
    def endpoints(rental: Rental) -> Sequence[Endpoint]:
        raise RuntimeError("a bug")

    market = _Market(make_rental(), endpoints)
    market.ask(0.0)
    until(lambda: market._asking and not market._asking.is_alive())
    assert market.update((DIRECT,)) == (DIRECT,)
    assert not market.gone


@dataclass
class LostAtOnce:
    """A line that never carries anything."""

    port: int | None = 1
    alive: bool = True

    def run(self, command: str, *, timeout: float) -> Result:
        raise ConnectionLost("the session ended")

    def answers(self, seconds: float) -> bool:
        return False

    def close(self) -> None:
        pass


@pytest.fixture
def door() -> Iterator[Endpoint]:
    """Greets whoever comes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.sendall(b"SSH-2.0-box\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    yield Endpoint(*listener.getsockname())
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


@pytest.mark.parametrize("refuse", [True, False], ids=["refused", "lost at once"])
def test_logins_that_lead_nowhere_are_not_hammered_at(door: Endpoint, refuse: bool) -> None:
    logins = threading.Semaphore(0)

    def open_line(rental: Rental, endpoint: Endpoint, sock: socket.socket) -> LostAtOnce:
        sock.close()
        logins.release()
        if refuse:
            raise OtherKey("another host key")
        return LostAtOnce()

    link = Link(make_rental(endpoint=door), open_line, lambda rental: ())
    link.start()
    assert logins.acquire(timeout=20)
    assert logins.acquire(timeout=20)
    assert not logins.acquire(timeout=0.4)  # the third has to wait longer than that
    assert link.state is (LinkState.CONNECTING if refuse else LinkState.RECONNECTING)
    assert link.reason in ("another host key", "the session ended")
    link.stop(LinkState.REPLACED)
    link.join(20)
    assert link.state is LinkState.REPLACED


def test_after_a_sleep_nothing_that_was_put_off_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away for long already: the next knock would come in 7 s at the earliest."""
    slept = 0.0
    now = SYSTEM.since_boot
    monkeypatch.setattr(SYSTEM, "since_boot", lambda: now() + slept)
    monkeypatch.setattr(links, "KEEN_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        link = Link(make_rental(endpoint=Endpoint(*listener.getsockname())), no_line, lambda rental: ())
        link.start()
        with listener.accept()[0]:
            listener.settimeout(0.5)
            with pytest.raises(TimeoutError):
                listener.accept()
            slept = 8 * 3600.0
            listener.settimeout(5)
            listener.accept()[0].close()
        link.stop()
        link.join(20)


def no_line(rental: Rental, endpoint: Endpoint, sock: socket.socket) -> LostAtOnce:
    raise AssertionError("nobody greeted")
