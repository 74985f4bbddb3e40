"""Two machines with a cable between them: network namespaces, where root may make them."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import until

LAPTOP, ELSEWHERE, BOX = "10.77.0.1", "10.77.0.3", "10.77.0.2"
"""Addresses: the laptop's, the one it gets in another network, and the box's."""
_CLONE_NEWNET = 0x40000000
_OURS = Path("/proc/thread-self/ns/net")


@dataclass(frozen=True)
class Machine:
    """A network of its own, that lasts as long as its process."""

    pid: int

    @property
    def net(self) -> Path:
        return Path(f"/proc/{self.pid}/ns/net")

    def ip(self, *words: str) -> None:
        """Run `ip …` there."""
        run([f"--net={self.net}", "ip", *words])

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The sockets that this thread, and the threads it starts, make meanwhile are of that machine."""
        home = os.open(_OURS, os.O_RDONLY)
        there = os.open(self.net, os.O_RDONLY)
        try:
            _enter(there)
            yield
        finally:
            _enter(home)
            os.close(there)
            os.close(home)


@functools.cache
def why_not() -> str:
    """Why there can be no machines here, "" when there can."""
    try:
        with machines() as (laptop, _), laptop.inside():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        return f"network namespaces need root and `ip` (a relay that swallows stands in, see test_links.py): {said}"


@contextmanager
def machines() -> Iterator[tuple[Machine, Machine]]:
    """A laptop and a box, at LAPTOP and BOX; each calls its end of the cable `wire`."""
    with _machine() as laptop, _machine() as box:
        laptop.ip("link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", str(box.pid))
        for machine, address in ((laptop, LAPTOP), (box, BOX)):
            machine.ip("address", "add", f"{address}/24", "dev", "wire")
            for device in ("lo", "wire"):
                machine.ip("link", "set", device, "up")
        yield laptop, box


def run(words: Sequence[str]) -> None:
    """`nsenter …`. Raises CalledProcessError with what it said."""
    subprocess.run(["nsenter", *words], check=True, capture_output=True, text=True, timeout=20)


@contextmanager
def _machine() -> Iterator[Machine]:
    # It ends with us at the latest: then nobody holds its stdin any more.
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo made; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        if not process.stdout.readline():
            raise OSError(process.stderr.read().strip())
        try:
            yield Machine(process.pid)
        finally:
            process.stdin.close()
    until(lambda: process.poll() is not None)


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
