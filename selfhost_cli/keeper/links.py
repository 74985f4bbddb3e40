"""One rental's lease and tunnel: a thread that connects, renews, notices and reconnects."""

from __future__ import annotations

import logging
import random
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

from selfhost_cli import countdown, install
from selfhost_cli.errors import SelfhostError
from selfhost_cli.model import Endpoint, Heard, Rental
from selfhost_cli.remote import ConnectionLost, Result
from selfhost_cli.remote.knock import Knocks
from selfhost_cli.wait import SYSTEM, Clock

RENEW_EVERY_S = 3.0
ANSWER_S = 5.0
"""A peer that froze is noticed after RENEW_EVERY_S + ANSWER_S at the latest."""
SIGN_OF_LIFE_S = 2.0
LOOK_S = 0.25
NAP_S = 5.0
"""A look that took so much longer: this machine slept, or had no time for us."""
KNOCK_EVERY_S = 2.0
NEXT_DOOR_S = 0.5
"""The market's relay is tried so long after the direct way: direct is faster."""
KEEN_S = 600.0
"""So long after a loss somebody is probably waiting for it to end."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0
REASON = 200
"""Characters of what a stranger's machine said, at most."""
ASK_AFTER_S = 3.0
"""So long after a loss the market is asked whether the box has moved."""

log = logging.getLogger("selfhost.keeper")


class LinkState(StrEnum):
    """What is the matter with a link. Only UP and DEGRADED carry requests: `Link.port` is None in all others."""

    WAITING = "waiting for box"
    """Nobody knows where it is yet, or there is nothing on it to forward to: it is being installed."""
    CONNECTING = "connecting"
    """It was not reached yet since the keeper began."""
    UP = "up"
    """The box renewed its lease over it a few seconds ago."""
    DEGRADED = "degraded"
    """The box answers but does not renew its lease; it will end by itself when that lasts."""
    RECONNECTING = "reconnecting"
    """It was lost, and is knocked for every other second."""
    REPLACED = "replaced"
    """Another box takes the place of this one."""
    GONE = "gone"
    """The market does not know the box any more."""
    STOPPED = "stopped"
    """Nobody needs it any more."""


class Line(Protocol):
    """A connection to a box: a `remote.tunnel.Tunnel`, or a bare one while there is no proxy to forward to."""

    @property
    def port(self) -> int | None:
        """The local end of the tunnel; None when nothing is forwarded."""
        ...

    @property
    def alive(self) -> bool:
        """False once it is known to be broken; True does not prove that the box answers."""
        ...

    def run(self, command: str, *, timeout: float) -> Result: ...

    def answers(self, seconds: float) -> bool:
        """Whether the box says anything at all in time; it is of no use any more when it does not."""
        ...

    def close(self) -> None: ...


class Link(threading.Thread):
    """Keeps one rental reachable. `state`, `reason` and `port` may be read at any time.

    The renewal of the lease is the liveness probe: an answer over the same connection within a deadline. Whatever
    else says that the tunnel is up does not count.
    """

    def __init__(
        self,
        rental: Rental,
        open_line: Callable[[Rental, Endpoint, socket.socket], Line],
        endpoints: Callable[[Rental], Sequence[Endpoint] | None],
        *,
        on_change: Callable[[Rental, LinkState, str], None] = lambda rental, state, reason: None,
        clock: Clock = SYSTEM,
    ) -> None:
        """`open_line` logs in over a connection on which sshd has spoken; it raises SelfhostError.

        `endpoints` asks the market where the box is now: none when that is unknown, None when there is no such box.
        `on_change` is told each new state with its reason, in this thread.
        """
        super().__init__(name=f"link-{rental.instance_id}", daemon=True)
        self.rental = rental
        self.state = LinkState.CONNECTING
        self.reason = ""
        self.port: int | None = None
        self.down_since: float | None = clock.monotonic()
        self.heard: countdown.Measured | None = None
        """What the box's watchdog measured when the lease was last renewed."""
        self.last: Heard | None = None
        """The last of it that made sense, and when: for the bill."""
        self._open_line = open_line
        self._on_change = on_change
        self._clock = clock
        self._told: set[str] = set()
        self._stopping = threading.Event()
        self._end = LinkState.STOPPED
        self._away = LinkState.CONNECTING
        self._candidates: Sequence[Endpoint] = (rental.endpoint,) if rental.endpoint else ()
        """Where the box may be: what worked last comes first, else direct before the market's relay."""
        self._logins: defaultdict[Endpoint, _Backoff] = defaultdict(_Backoff)
        self._lock = threading.Lock()
        self._market = _Market(rental, endpoints)

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                if line := self._open():
                    self._hold(line)
            except Exception:
                # A bug of ours must not end the lease: it is told, and tried again.
                log.exception("box %s", self.rental.instance_id)
                self._set_away("internal error, see the keeper's log")
                self._stopping.wait(LONGEST_WAIT_S)
        self._set(self._end, "", None)

    def stop(self, state: LinkState = LinkState.STOPPED) -> None:
        """Ask the thread to end, and say why; it does between two requests, each of which has a deadline."""
        self._end = state
        self._stopping.set()

    def _open(self) -> Line | None:
        """Knock wherever the box may be until a login works; None when we are to stop."""
        began, rounds, knocks = self._clock.monotonic(), _Rounds(), Knocks(self._log_in)
        try:
            while not self._stopping.is_set():
                now = self._clock.monotonic()
                if not self._candidates or now - began > ASK_AFTER_S:
                    self._market.ask(now)
                    self._candidates = self._market.update(self._candidates)
                self._set_away(self.reason)
                admitted = [end for end in self._candidates if self._logins[end].due <= now]
                for endpoint in rounds.due(now, admitted, keen=now - began < KEEN_S):
                    knocks.at(endpoint)
                nap = _Nap()
                answer = knocks.answer(LOOK_S)
                if nap.over():  # what was put off or asked before it is of no use any more
                    knocks.close()
                    if answer and answer.line:
                        answer.line.close()
                    began, rounds, knocks = self._clock.monotonic(), _Rounds(), Knocks(self._log_in)
                    self._logins.clear()
                    self._market.hurry()
                elif answer is None:
                    continue
                elif isinstance(answer.error, SelfhostError):
                    self._set_away(answer.error.message)
                elif answer.error:
                    raise answer.error
                elif answer.line:
                    found = answer.endpoint
                    self._candidates = (found, *(end for end in self._candidates if end != found))
                    return answer.line
        finally:
            knocks.close()
        return None

    def _log_in(self, endpoint: Endpoint, sock: socket.socket) -> Line | None:
        """In the knock's own thread: whoever says nothing from here on keeps nobody from knocking again."""
        with self._lock:
            login, now = self._logins[endpoint], self._clock.monotonic()
            if login.due > now:  # a knock from before the last login began
                sock.close()
                return None
            login.failed(now)  # until a lease was renewed over it
        return self._open_line(self.rental, endpoint, sock)

    def _hold(self, line: Line) -> None:
        """Renew the lease until that fails or we are to stop."""
        try:
            while not self._stopping.is_set() and self._renew(line):
                if self._rest(line) and not line.answers(SIGN_OF_LIFE_S):
                    self.reason = "it was lost while this machine slept"
                    return
        finally:
            self._away = LinkState.RECONNECTING
            self._set_away(self.reason)
            line.close()

    def _rest(self, line: Line) -> bool:
        """Wait until the lease has to be renewed; whether this machine slept meanwhile."""
        due, nap = self._clock.monotonic() + RENEW_EVERY_S, _Nap()
        while line.alive and self._clock.monotonic() < due and not self._stopping.wait(LOOK_S):
            if nap.over():
                return True
            nap = _Nap()
        return False

    def _renew(self, line: Line) -> bool:
        """False when the line is of no use any more."""
        try:
            answer = line.run(install.RENEW_LEASE, timeout=ANSWER_S)
        except ConnectionLost as error:
            self.reason = error.message
            if not line.answers(SIGN_OF_LIFE_S):
                return False
            self._carry(line, f"the box is slow: {error.message}")
            return True
        self.heard = countdown.parse(answer.out)
        if self.heard:
            now, said = self._clock.time(), self.heard
            self.last = Heard(now, said.up_s, said.idle_s, said.dollars, said.down_bytes, said.up_bytes)
        self._carry(line, f"the box cannot renew its lease: {answer.err.strip()[:REASON]}" if answer.code else "")
        return True

    def _carry(self, line: Line, trouble: str) -> None:
        self._logins.clear()
        self._market.forget()
        if not line.port:
            self._set(LinkState.WAITING, trouble or "it is being installed", None)
        else:
            self._set(LinkState.DEGRADED if trouble else LinkState.UP, trouble, line.port)

    def _set_away(self, reason: str) -> None:
        if self._market.gone:
            self._set(LinkState.GONE, "the market does not know it any more", None)
        elif not self._candidates:
            self._set(LinkState.WAITING, "the market shows no address of it yet", None)
        else:
            self._set(self._away, reason, None)

    def _set(self, state: LinkState, reason: str, port: int | None) -> None:
        reached = port is not None or (state is LinkState.WAITING and bool(self._candidates))
        if reached:
            self.down_since = None
        elif self.down_since is None:
            self.down_since = self._clock.monotonic()
        changed = state is not self.state
        self.state, self.reason, self.port = state, reason, port
        if changed:
            self._told.clear()
        if reason not in self._told or changed:
            self._told.add(reason)
            log.info("box %s: %s %s", self.rental.instance_id, state, reason)
        if changed:
            self._on_change(self.rental, state, reason)


class _Nap:
    """Begins with a look, and tells after it whether nobody was awake meanwhile."""

    def __init__(self) -> None:
        self._began = SYSTEM.since_boot()

    def over(self) -> bool:
        return SYSTEM.since_boot() - self._began > NAP_S


class _Backoff:
    """When to do again what must not be hurried: each failure doubles the wait, and no two fall together for long."""

    def __init__(self) -> None:
        self.due = float("-inf")
        self._wait = 0.0

    def failed(self, now: float) -> None:
        self._wait = min(LONGEST_WAIT_S, self._wait * 2 or FIRST_WAIT_S)
        self.due = now + self._wait * random.uniform(0.5, 1.0)


class _Rounds:
    """When to knock where: at each door in turn, and again every KNOCK_EVERY_S, later less often."""

    def __init__(self) -> None:
        self._next = float("-inf")
        self._later: list[tuple[float, Endpoint]] = []

    def due(self, now: float, doors: Sequence[Endpoint], *, keen: bool) -> list[Endpoint]:
        if now >= self._next and doors:
            self._next = now + (KNOCK_EVERY_S if keen else LONGEST_WAIT_S * random.uniform(0.5, 1.0))
            self._later = [(now + NEXT_DOOR_S * number, door) for number, door in enumerate(doors)]
        due = [door for at, door in self._later if at <= now]
        self._later = [(at, door) for at, door in self._later if at > now]
        return due


class _Market:
    """Where the market says the box is; asked in a thread of its own, because its answer may take its time."""

    def __init__(self, rental: Rental, endpoints: Callable[[Rental], Sequence[Endpoint] | None]) -> None:
        self.gone = False
        self._rental = rental
        self._endpoints = endpoints
        self._found: Sequence[Endpoint] = ()
        self._again = _Backoff()
        self._asking: threading.Thread | None = None

    def ask(self, now: float) -> None:
        """Ask unless it was asked just now."""
        if now < self._again.due or (self._asking and self._asking.is_alive()):
            return
        self._again.failed(now)
        self._asking = threading.Thread(target=self._ask, name=f"market-{self._rental.instance_id}", daemon=True)
        self._asking.start()

    def update(self, known: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """Where the box may be; what was known, in its order, when the market says the same."""
        found, self._found = self._found, ()
        return found if found and set(found) != set(known) else known

    def hurry(self) -> None:
        """Ask as if it were the first time."""
        self._again = _Backoff()

    def forget(self) -> None:
        """The box was reached: what comes next is another loss."""
        self.gone, self._found, self._again = False, (), _Backoff()

    def _ask(self) -> None:
        try:
            found = self._endpoints(self._rental)
        except Exception:
            log.exception("box %s: asking the market", self._rental.instance_id)
            return
        self.gone = found is None
        self._found = found or ()
