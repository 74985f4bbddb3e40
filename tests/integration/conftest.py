from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from selfhost_cli.model import BoxSpec, BoxState, Endpoint, Need
from selfhost_cli.providers.vast import VastProvider
from selfhost_cli.remote import NotYet
from selfhost_cli.remote.ssh import connect, make_key
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
