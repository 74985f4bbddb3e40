"""Knocking at a box's sshd: does anybody speak there? The connection that was answered is the one to log in over."""

from __future__ import annotations

import queue
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from selfhost_cli.model import Endpoint
from selfhost_cli.remote import NotYet

PATIENCE_S = 10.0
"""How long one knock waits: a box under load takes its time, and one that was frozen answers when it goes on."""
AT_ONCE = 5


def knock(endpoint: Endpoint, seconds: float) -> socket.socket:
    """A connection on which the greeting of an ssh server waits to be read. Raises NotYet."""
    sock = None
    try:
        sock = socket.create_connection(endpoint, timeout=seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sock.recv(1, socket.MSG_PEEK):
            return sock
        why = "hangs up without a word"
    except TimeoutError:
        why = f"says nothing within {seconds:.0f} s" if sock else f"does not answer within {seconds:.0f} s"
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
        why = f"cannot be reached: {error}"
    if sock:
        sock.close()
    raise NotYet(f"{endpoint} {why}")


class Closable(Protocol):
    """What a login makes of a connection."""

    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What came of one knock: what the login made of it, or why there is none."""

    endpoint: Endpoint
    line: T | None = None
    error: Exception | None = None
    """None as well when the login was put off."""


class Knocks(Generic[T]):
    """Knocks, and the logins after them, that do not wait for each other: name lookups hang, silence has a deadline."""

    def __init__(self, log_in: Callable[[Endpoint, socket.socket], T | None]) -> None:
        """`log_in` is called in the thread of each knock that is answered; None when it is put off."""
        self._log_in = log_in
        self._answers: queue.SimpleQueue[Answer[T]] = queue.SimpleQueue()
        self._waiting: Counter[Endpoint] = Counter()
        self._lock = threading.Lock()
        self._over = False

    def at(self, endpoint: Endpoint) -> None:
        """Knock once more, unless enough of them are unanswered there."""
        with self._lock:
            if self._waiting[endpoint] >= AT_ONCE:
                return
            self._waiting[endpoint] += 1
        threading.Thread(target=self._knock, args=(endpoint,), name=f"knock-{endpoint}", daemon=True).start()

    def answer(self, seconds: float) -> Answer[T] | None:
        """The next answer, None when there is none in time."""
        try:
            return self._answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None

    def close(self) -> None:
        """Hang up on everybody who still answers."""
        with self._lock:
            self._over = True
        while (left := self.answer(0.0)) is not None:
            if left.line:
                left.line.close()

    def _knock(self, endpoint: Endpoint) -> None:
        try:
            answer = Answer(endpoint, self._log_in(endpoint, knock(endpoint, PATIENCE_S)))
        except Exception as error:  # a bug as well, for who asks to tell
            answer = Answer(endpoint, error=error)
        with self._lock:
            self._waiting[endpoint] -= 1
            late = self._over
            if not late:
                self._answers.put(answer)
        if late and answer.line:
            answer.line.close()
