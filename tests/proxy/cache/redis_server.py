"""Real Redis servers on loopback."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import BusyLoadingError
from redis.exceptions import ConnectionError as NoConnection

PROGRAM = shutil.which("redis-server") or shutil.which("redis-check-rdb")
"""Debian's redis-tools has it by its second name: it is the server when it is called so."""
BASE = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--loglevel", "warning")


@dataclass
class RedisServer:
    """One that can be killed, stopped for a while, and started again at the same place."""

    folder: Path
    options: tuple[str, ...]
    port: int
    tls_port: int = 0
    process: subprocess.Popen[bytes] | None = None
    admin: Redis | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "r.sock"

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = ["redis-server", *BASE, "--port", str(self.port), "--dir", str(self.folder)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--unixsocket", str(self.socket), *self.options],
                executable=PROGRAM,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 20
        while True:
            try:
                # its one connection stays as mighty as it begins, whatever the test takes from others
                self.admin = Redis("127.0.0.1", self.port, protocol=2, single_connection_client=True)
                self.ask("PING")
                return
            except (NoConnection, BusyLoadingError):
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, "redis-server does not come up"
                time.sleep(0.01)

    def ask(self, *words: str | int | bytes) -> Any:
        assert self.admin
        return self.admin.execute_command(*words)

    def pause(self) -> None:
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As the kernel does it when memory is short."""
        process = self._running()
        process.kill()
        process.wait()
        self.process = None
        if self.admin:
            self.admin.close()

    def _running(self) -> subprocess.Popen[bytes]:
        assert self.process
        return self.process


@contextmanager
def redis_server(folder: Path, *options: str, tls: bool = False) -> Iterator[RedisServer]:
    """One with these options beside those that keep it on loopback and off the disk."""
    if not PROGRAM:
        pytest.skip("needs a redis-server: scripts/test installs one")
    folder.mkdir(parents=True, exist_ok=True)
    port, tls_port = free_ports(2)
    server = RedisServer(folder, (*options, *(("--tls-port", str(tls_port)) if tls else ())), port, tls_port)
    try:
        server.start()
        yield server
    finally:
        if server.process:
            server.kill()


@contextmanager
def redis_cluster(folder: Path) -> Iterator[list[RedisServer]]:
    """Three primaries that share the slots, without replicas."""
    with ExitStack() as stack:
        buses = free_ports(3)
        options = (
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "2000",
            "--cluster-require-full-coverage",
            "no",
        )
        nodes = [
            stack.enter_context(redis_server(folder / str(bus), *options, "--cluster-port", str(bus))) for bus in buses
        ]
        for number, node in enumerate(nodes):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.ask("CLUSTER", "ADDSLOTSRANGE", 2**14 * number // 3, 2**14 * (number + 1) // 3 - 1)
            nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", node.port, buses[number])
        deadline = time.monotonic() + 30
        while not all(_whole(node) for node in nodes):
            assert time.monotonic() < deadline, "the cluster does not come up"
            time.sleep(0.05)
        yield nodes


def _whole(node: RedisServer) -> bool:
    info = bytes(node.ask("CLUSTER", "INFO"))
    return all(word in info for word in (b"cluster_state:ok", b"slots_assigned:16384", b"known_nodes:3"))


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
