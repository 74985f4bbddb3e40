"""One rental's lease and tunnel: a thread that connects, renews, notices and reconnects."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from selfhost_cli import countdown, install
from selfhost_cli.errors import SelfhostError
from selfhost_cli.model import Endpoint, Rental
from selfhost_cli.remote import ConnectionLost, Result

RENEW_EVERY_S = 5.0
ANSWER_S = 5.0
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
REFRESH_AFTER = 3
"""Failed attempts before the market is asked whether the box has moved."""

log = logging.getLogger("selfhost.keeper")


class Line(Protocol):
    """A connection to a box: a `remote.tunnel.Tunnel`, or a bare one while there is no proxy to forward to."""

    @property
    def port(self) -> int | None:
        """The local end of the tunnel; None when nothing is forwarded."""
        ...

    def run(self, command: str, *, timeout: float) -> Result: ...
    def close(self) -> None: ...


class Link(threading.Thread):
    """Keeps one rental reachable. `state`, `reason` and `port` may be read at any time.

    The renewal of the lease is the liveness probe: an answer over the same connection within a deadline. Whatever
    else says that the tunnel is up does not count.
    """

    def __init__(
        self,
        rental: Rental,
        open_line: Callable[[Rental, Endpoint], Line],
        endpoints: Callable[[Rental], Sequence[Endpoint]],
    ) -> None:
        super().__init__(name=f"link-{rental.instance_id}", daemon=True)
        self.rental = rental
        self.state = "connecting"
        self.reason = ""
        self.port: int | None = None
        self.down_since: float | None = time.monotonic()
        self.heard: countdown.Measured | None = None
        """What the box's watchdog measured when the lease was last renewed."""
        self._open_line = open_line
        self._endpoints = endpoints
        self._stopping = threading.Event()
        self._failures = 0
        self._candidates: Sequence[Endpoint] = (rental.endpoint,) if rental.endpoint else ()

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._round()
            except Exception:
                # A bug of ours must not end the lease: it is told, and tried again.
                log.exception("box %s", self.rental.instance_id)
                self._set("reconnecting", "internal error, see the keeper's log", None)
                self._stopping.wait(BACKOFF_S[-1])
        self._set("stopped", "", None)

    def _round(self) -> None:
        """Connect and hold for as long as it lasts, or fail once and wait."""
        line = self._connect()
        if line is None:
            self._failures += 1
            if self._failures % REFRESH_AFTER == 0 or not self._candidates:
                self._candidates = self._endpoints(self.rental) or self._candidates
            self._stopping.wait(BACKOFF_S[min(self._failures, len(BACKOFF_S)) - 1])
            return
        self._failures = 0
        try:
            self._hold(line)
        finally:
            self._set("reconnecting", self.reason, None)
            line.close()

    def stop(self) -> None:
        """Ask the thread to end; the tunnel closes within the answer's deadline."""
        self._stopping.set()

    def _connect(self) -> Line | None:
        for endpoint in self._candidates:
            try:
                return self._open_line(self.rental, endpoint)
            except SelfhostError as error:
                if error.message != self.reason:
                    log.info("box %s: %s", self.rental.instance_id, error.message)
                self._set(self.state, error.message, None)
        return None

    def _hold(self, line: Line) -> None:
        """Renew the lease until that fails or we are to stop."""
        while not self._stopping.is_set():
            try:
                answer = line.run(install.RENEW_LEASE, timeout=ANSWER_S)
            except ConnectionLost as error:
                log.warning("box %s: %s", self.rental.instance_id, error.message)
                self.reason = error.message
                return
            if answer.code != 0:
                log.warning("box %s: the lease cannot be renewed: %s", self.rental.instance_id, answer.err.strip())
            self.heard = countdown.parse(answer.out)
            state = "up" if line.port else "installing"
            if self.state != state:
                log.info("box %s: %s, local port %s", self.rental.instance_id, state, line.port)
            self._set(state, "", line.port)
            self._stopping.wait(RENEW_EVERY_S)

    def _set(self, state: str, reason: str, port: int | None) -> None:
        if state in ("up", "installing"):
            self.down_since = None
        elif self.down_since is None:
            self.down_since = time.monotonic()
        self.state, self.reason, self.port = state, reason, port
