"""A program that makes a local port lead somewhere, the tunnel to a machine of one's own say: kept running."""

from __future__ import annotations

import asyncio
import logging
import socket
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Sequence

from selfhost_cli.proxy.front import Away

LOOK_S = 0.1
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0
END_S = 1.0
REASON = 200
"""Characters of what it said, at most."""

log = logging.getLogger("selfhost.keeper")


class Wire:
    """Make it inside the event loop. `words`: what listens on a port of this machine for as long as its stdin is open.

    `name` in words, for the log.
    """

    def __init__(self, name: str, words: Callable[[int], Sequence[str]]) -> None:
        self.port: int | None = None
        """Of this machine; None while nothing gets through."""
        self.reason = ""
        self._name = name
        self._words = words
        self._process: Process | None = None
        self._ending = False
        self._task = asyncio.create_task(self._live())

    @property
    def away(self) -> Away:
        return Away("reconnecting" if self.reason else "connecting", self.reason or "the tunnel is not there yet", 3)

    async def retire(self) -> None:
        """Take nothing new; what is under way still comes to its end."""
        self._ending = True
        if self._process and self._process.stdin:
            self._process.stdin.close()
        else:
            self._task.cancel()
        await asyncio.wait([self._task])

    async def stop(self) -> None:
        """At once."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _live(self) -> None:
        wait = FIRST_WAIT_S
        while not self._ending:
            try:
                if await self._once():
                    wait = FIRST_WAIT_S
            except Exception as error:  # no program, no port, no process more: it may be otherwise later
                self._tell(str(error) or type(error).__name__)
            if not self._ending:
                await asyncio.sleep(wait)
                wait = min(LONGEST_WAIT_S, wait * 2)

    async def _once(self) -> bool:
        """From its start to its end; whether anything got through."""
        port = free_port()
        process = await asyncio.create_subprocess_exec(
            *self._words(port), stdin=PIPE, stdout=DEVNULL, stderr=PIPE, start_new_session=True
        )
        self._process = process
        heard = asyncio.create_task(_last_line(process))
        try:
            while process.returncode is None and not await _listens(port):
                await asyncio.sleep(LOOK_S)
            opened = process.returncode is None
            if opened:
                self.port, self.reason = port, ""
                log.info("%s is up", self._name)
            await process.wait()
            self._tell(await heard or f"it ended with status {process.returncode}")
            return opened
        finally:
            self.port = self._process = None
            heard.cancel()
            if process.returncode is None:
                await _end(process)

    def _tell(self, why: str) -> None:
        if why != self.reason and not self._ending:
            log.warning("%s: %s", self._name, why)
        self.reason = why


async def _end(process: Process) -> None:
    assert process.stdin
    process.stdin.close()
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _last_line(process: Process) -> str:
    assert process.stderr
    last = ""
    while data := await process.stderr.read(2**12):
        lines = [line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1][:REASON] if lines else last
    return last


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
