from __future__ import annotations

import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from selfhost_cli.keeper.links import Line, Link, LinkState
from selfhost_cli.model import BoxSpec, BoxState, Endpoint, Need, Rental, State
from selfhost_cli.providers.vast import VastProvider
from selfhost_cli.remote import NotYet
from selfhost_cli.remote.ssh import connect, log_in, make_key
from selfhost_cli.remote.tunnel import Tunnel
from tests.fakes.rental import make_rental
from tests.integration.apart import Apart
from tests.relay import Relay
from tests.sandbox.market_process import MarketProcess
from tests.waiting import until


@dataclass(frozen=True)
class Box:
    """A real sandbox box with our login key on it."""

    endpoint: Endpoint
    host_key: str
    login_key: Path
    root: Path

    @property
    def home(self) -> Path:
        return self.root / "root"

    @property
    def sshd(self) -> int:
        return int((self.root / "run" / "sshd.pid").read_text())

    def lets_us_in(self) -> bool:
        try:
            connect(self.endpoint, self.host_key, self.login_key).close()
        except NotYet:
            return False
        return True

    def sessions(self) -> list[int]:
        """Process ids of the sshd processes that serve connections, and of what they run."""
        found: list[int] = []
        todo = [self.sshd]
        while todo:
            pid = todo.pop()
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except FileNotFoundError:
                continue
            todo += map(int, children)
            found += map(int, children)
        return found

    def signal_sessions(self, number: int) -> None:
        send(self.sessions(), number)

    @contextmanager
    def frozen(self, *processes: int) -> Iterator[None]:
        """Stop these processes and let them go on in the end."""
        send(processes, signal.SIGSTOP)
        try:
            yield
        finally:
            send(processes, signal.SIGCONT)


def send(processes: Iterable[int], number: int) -> None:
    for pid in processes:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it ended by itself


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MarketProcess]:
    process = MarketProcess(tmp_path_factory.mktemp("market"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def box(market: MarketProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    private, public = make_key("login")
    login = tmp_path_factory.mktemp("login") / "key"
    login.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
    login.write_text(private)
    provider = VastProvider(market.facts["api_key"], market.url)
    provider.register_key(public)
    offer = provider.offers(Need(disk_gb=10.0, hours=0.1))[0]
    number = provider.create(offer, BoxSpec("selfhost-t-1", "vastai/base-image:test", 10.0, "true", {}))
    found = until(lambda: (row := provider.get(number)) and row.state is BoxState.RUNNING and row)
    root = market.box(number)
    assert found.direct
    host_key = until(lambda: (root / "etc" / "ssh" / "ssh_host_ed25519_key.pub").read_text())
    made = Box(found.direct, host_key, login, root)
    until(made.lets_us_in)
    yield made
    provider.destroy(number)


@dataclass
class Watched:
    """A link, and when it changed to what, by its own account."""

    link: Link
    changes: list[tuple[float, LinkState, str]] = field(default_factory=list)

    def when(self, state: LinkState, since: float = 0.0) -> float:
        """The moment it changed to that state for the first time since then; waits for it."""
        found = until(lambda: next((at for at, now, _ in self.changes if now is state and at >= since), None), 60)
        assert found
        return found


Watch = Callable[..., Watched]


@pytest.fixture
def watch(box: Box) -> Iterator[Watch]:
    made: list[Watched] = []

    def open_line(rental: Rental, endpoint: Endpoint, sock: socket.socket) -> Line:
        remote = log_in(sock, endpoint, rental.host_key, box.login_key)
        return remote if rental.proxy_port is None else Tunnel(remote, rental.proxy_port)

    def make(
        endpoint: Endpoint | None = box.endpoint,
        endpoints: Callable[[Rental], Sequence[Endpoint] | None] = lambda rental: (),
        **changes: object,
    ) -> Watched:
        facts = {"state": State.READY, "instance_id": 1, "proxy_port": 80, "host_key": box.host_key} | changes
        rental = make_rental(endpoint=endpoint, **facts)
        changed: list[tuple[float, LinkState, str]] = []

        def note(rental: Rental, state: LinkState, reason: str) -> None:
            changed.append((time.monotonic(), state, reason))

        made.append(Watched(Link(rental, open_line, endpoints, on_change=note), changed))
        made[-1].link.start()
        return made[-1]

    (box.home / ".selfhost" / "run").mkdir(parents=True, exist_ok=True)
    yield make
    for watched in made:
        watched.link.stop()
    for watched in made:
        watched.link.join(30)
        assert not watched.link.is_alive()
        assert watched.link.state is LinkState.STOPPED


@pytest.fixture
def relay(box: Box) -> Iterator[Relay]:
    relay = Relay(box.endpoint.port)
    yield relay
    relay.close()


Keep = Callable[..., Apart]


@pytest.fixture
def keep(box: Box) -> Iterator[Keep]:
    """Makes links that are up, each in a process of its own, so that it can fall asleep."""
    made: list[Apart] = []

    def make(endpoint: Endpoint, *market: Endpoint) -> Apart:
        facts = {"host_key": box.host_key, "login_key": str(box.login_key), "endpoint": endpoint, "market": market}
        made.append(Apart("link", **facts, proxy_port=80))
        made[-1].heard(state=LinkState.UP)
        return made[-1]

    (box.home / ".selfhost" / "run").mkdir(parents=True, exist_ok=True)
    yield make
    for apart in made:
        apart.close()
