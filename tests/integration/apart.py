"""A link or a tunnel in a process of its own, which a test can stop or starve: `python -m tests.integration.apart`.

It says what happens in lines of JSON, does what it is told in words on stdin, and ends when nobody tells it any more.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from selfhost_cli.keeper.links import Link, LinkState
from selfhost_cli.model import Endpoint, Rental, State
from selfhost_cli.remote.ssh import connect, log_in
from selfhost_cli.remote.tunnel import Tunnel
from tests.fakes.rental import make_rental
from tests.waiting import until

DESCRIPTORS = 64


class Apart:
    """The test's side of it."""

    def __init__(self, what: str, **facts: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.apart", what, json.dumps(facts)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._said: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                self._said.append(json.loads(line))

    def heard(self, seconds: float = 30.0, **what: object) -> dict[str, Any]:
        """The first line that says this, with an `at` (monotonic) that is not before the one given; waits for it."""
        since = what.pop("since", 0.0)
        found = until(
            lambda: next(
                (one for one in list(self._said) if one.items() >= what.items() and one.get("at", since) >= since), None
            ),
            seconds,
        )
        assert found
        return found

    def heard_of(self, name: str) -> Any:
        """What it says of that; waits for it."""
        return until(lambda: next((one for one in list(self._said) if name in one), None))[name]

    def said(self, since: float) -> list[dict[str, Any]]:
        """Everything from then on."""
        return [one for one in list(self._said) if one.get("at", 0.0) >= since]

    def tell(self, word: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Stopped as a whole; then it goes on."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._reader.join(30)


def say(**what: object) -> None:
    sys.stdout.write(f"{json.dumps(what)}\n")
    sys.stdout.flush()


def keep_a_link(host_key: str, login_key: str, endpoint: list[Any], market: list[list[Any]], proxy_port: int) -> None:
    """A link to `endpoint`, and to what the market says: each change is a line. It takes no words."""

    def open_line(rental: Rental, endpoint: Endpoint, sock: socket.socket) -> Tunnel:
        return Tunnel(log_in(sock, endpoint, rental.host_key, Path(login_key)), proxy_port)

    def changed(rental: Rental, state: LinkState, reason: str) -> None:
        say(at=time.monotonic(), state=state, reason=reason, port=link.port)

    facts = {"state": State.READY, "instance_id": 1, "proxy_port": proxy_port, "host_key": host_key}
    rental = make_rental(endpoint=Endpoint(*endpoint), **facts)
    link = Link(rental, open_line, lambda rental: [Endpoint(*one) for one in market], on_change=changed)
    link.start()
    sys.stdin.read()
    link.stop()
    link.join()


def keep_a_tunnel(host_key: str, login_key: str, endpoint: list[Any], port: int) -> None:
    """A tunnel. `hoard` leaves this process no descriptor, `release` gives them back. What it logs are lines, too."""
    logging.getLogger("selfhost").addHandler(Lines())
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    tunnel = Tunnel(connect(Endpoint(*endpoint), host_key, Path(login_key)), port)
    say(port=tunnel.port)
    with ExitStack() as hoard:
        for word in sys.stdin:
            if word == "hoard\n":
                with suppress(OSError):
                    while True:
                        hoard.enter_context(open(os.devnull, "rb"))
            else:
                hoard.close()
            say(done=word.strip())
    tunnel.close()


class Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(log=record.getMessage())


if __name__ == "__main__":
    {"link": keep_a_link, "tunnel": keep_a_tunnel}[sys.argv[1]](**json.loads(sys.argv[2]))
