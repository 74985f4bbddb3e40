from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selfhost_cli.errors import NotSetUp
from selfhost_cli.sandbox import image
from tests.sandbox.market_process import MarketProcess


@pytest.fixture(autouse=True)
def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No netrc (it would replace the SDK's key), no proxy, no account of the real user."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HTTP_PROXY", "http_proxy", "VAST_URL", "VAST_API_KEY", "XDG_CONFIG_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def _boxes_can_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        image.check(tmp_path_factory.getbasetemp())
    except NotSetUp as error:
        pytest.skip(f"{error.message}: {error.remedy}")


@pytest.fixture(scope="module")
def market(_boxes_can_run: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MarketProcess]:
    """One for the tests of a module; each leaves it without instances, faults and switches."""
    process = MarketProcess(tmp_path_factory.mktemp("market"))
    yield process
    process.close()


@pytest.fixture
def clean(market: MarketProcess) -> Iterator[MarketProcess]:
    yield market
    market.control.delete("/faults")
    market.destroy_all()
    market.set("/clock", stopped=False)
    market.set("/settings", sshd_first=False, gap_s=2.0, sshd_delay_s=0.0, credit=25.0, ollama="", real_boxes=True)
    market.set("/mirror")


@pytest.fixture
def start_market(_boxes_can_run: None, tmp_path: Path) -> Iterator[Callable[..., MarketProcess]]:
    """Start markets of one's own, one after the other on the same state directory."""
    started: list[MarketProcess] = []

    def start(*arguments: str) -> MarketProcess:
        started.append(MarketProcess(tmp_path, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.control.close()
        if process.process.poll() is None:
            process.process.terminate()
            process.process.wait(20)


@pytest.fixture(scope="session")
def login(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private login key; its public half is beside it."""
    path = tmp_path_factory.mktemp("login") / "key"
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "login", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path
