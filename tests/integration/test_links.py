"""The keeper's links on a real box: what they notice, and how fast they are back."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest

from selfhost_cli.keeper.links import Line, Link
from selfhost_cli.model import Endpoint, Rental, State
from selfhost_cli.remote.ssh import connect
from selfhost_cli.remote.tunnel import Tunnel
from tests.fakes.rental import make_rental
from tests.integration.conftest import Box
from tests.waiting import until

pytestmark = pytest.mark.box


@pytest.fixture
def make_link(box: Box) -> Iterator[Callable[..., Link]]:
    made: list[Link] = []

    def open_line(rental: Rental, endpoint: Endpoint) -> Line:
        if rental.proxy_port is None:
            return connect(endpoint, rental.host_key, box.login_key)
        return Tunnel(endpoint, rental.host_key, box.login_key, rental.proxy_port)

    def make(
        endpoint: Endpoint | None = None, endpoints: tuple[Endpoint, ...] = (), proxy_port: int | None = 80
    ) -> Link:
        rental = make_rental(
            state=State.READY,
            instance_id=1,
            endpoint=endpoint or box.endpoint,
            proxy_port=proxy_port,
            host_key=box.host_key,
        )
        made.append(Link(rental, open_line, lambda rental: endpoints))
        made[-1].start()
        return made[-1]

    (box.home / ".selfhost" / "run").mkdir(parents=True, exist_ok=True)
    yield make
    for link in made:
        link.stop()
        link.join(20)
        assert not link.is_alive()


def test_a_link_comes_up_and_renews_the_lease(make_link: Callable[..., Link], box: Box) -> None:
    lease = box.home / ".selfhost" / "run" / "lease"
    lease.unlink(missing_ok=True)
    link = make_link()
    until(lambda: link.state == "up")
    assert link.port
    assert lease.exists()
    before = lease.stat().st_mtime_ns
    until(lambda: lease.stat().st_mtime_ns > before)


def test_with_the_lease_comes_what_the_watchdog_measured(make_link: Callable[..., Link], box: Box) -> None:
    (box.home / ".selfhost" / "run" / "watch").write_text("1/2/1/2 3600 4 120 0.4500\n")
    link = make_link()
    until(lambda: link.state == "up")
    assert link.heard
    assert (link.heard.up_s, link.heard.idle_s, link.heard.dollars) == (3600, 120, 0.45)


def test_the_lease_is_renewed_while_there_is_no_proxy_to_forward_to(make_link: Callable[..., Link], box: Box) -> None:
    lease = box.home / ".selfhost" / "run" / "lease"
    lease.unlink(missing_ok=True)
    link = make_link(proxy_port=None)
    until(lambda: link.state == "installing")
    assert lease.exists()
    assert link.port is None


def test_a_killed_session_is_noticed_and_replaced(make_link: Callable[..., Link], box: Box) -> None:
    link = make_link()
    until(lambda: link.state == "up")
    box.signal_sessions(signal.SIGKILL)
    until(lambda: link.state != "up")
    until(lambda: link.state == "up")


def test_a_frozen_peer_is_noticed_within_ten_seconds_or_so(make_link: Callable[..., Link], box: Box) -> None:
    link = make_link()
    until(lambda: link.state == "up")
    began = time.monotonic()
    with box.frozen(box.sshd, *box.sessions()):
        until(lambda: link.state != "up", 15)
        assert link.reason
    assert time.monotonic() - began < 15
    until(lambda: link.state == "up")


def test_a_box_that_moved_is_found_through_the_market(make_link: Callable[..., Link], box: Box) -> None:
    link = make_link(endpoint=Endpoint("127.0.0.1", 9), endpoints=(box.endpoint,))
    until(lambda: link.state == "up")


def test_a_box_that_is_away_says_why(make_link: Callable[..., Link]) -> None:
    link = make_link(endpoint=Endpoint("127.0.0.1", 9))
    until(lambda: "refused" in link.reason)
    assert link.state == "connecting"
    assert link.down_since is not None
