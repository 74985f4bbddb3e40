"""What boxes read ahead of a session: heard from Claude Code, recorded where it was never heard, sent to every box."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine, Iterable

import aiohttp

from selfhost_cli import claude
from selfhost_cli.config import Settings
from selfhost_cli.errors import SelfhostError
from selfhost_cli.prefix import ANSWERED, MODES, Store, recording, taken
from selfhost_cli.proxy.front import Upstream

SEND_S = 60.0
"""A hundred kilobytes, over a slow line."""
LOOK_S = 30.0
"""Between two looks at whether a box still has its wishes: a proxy that starts anew has none."""

log = logging.getLogger("selfhost.keeper")


class Prewarming:
    """Make and use it inside the event loop; it forgets a box's wishes with the tunnel that they went through."""

    def __init__(self, settings: Settings, look_every: float = LOOK_S) -> None:
        self._on = settings.prewarm
        self._settings = settings
        self._store = Store(settings.paths.prefixes)
        self._directory = ""
        self._edition = 0
        """Grows with every change of what is to be sent."""
        self._sent: dict[str, tuple[str, int]] = {}
        self._look_every = look_every
        self._looked: dict[str, float] = {}
        self._jobs: dict[str, asyncio.Task[None]] = {}

    def heard(self, agent: str, body: bytes) -> None:
        """A request of Claude Code's on its way to the box: a session's first is kept."""
        if self._on and ANSWERED not in body:
            self._start("keep", self._keep(agent, body))

    def ahead_of(self, directory: str, model: str, context: int) -> None:
        """A session will begin there, with that model. What is not known yet is recorded."""
        if not self._on:
            return
        if directory != self._directory:
            self._directory = directory
            self._edition += 1
        if not self._settings.sandbox:  # where the whole prompt would take a laptop's processor minutes
            self._start("record", self._record(model, context))

    def tick(self, boxes: Iterable[Upstream]) -> None:
        """Send them what they do not have yet, or no longer."""
        now = time.monotonic()
        for box in boxes if self._on else ():
            due = box.url, self._edition
            if self._sent.get(box.rental) != due:
                if self._start(f"send {box.rental}", self._send(box)):
                    self._sent[box.rental], self._looked[box.rental] = due, now
            elif now - self._looked[box.rental] >= self._look_every:
                self._looked[box.rental] = now
                self._start(f"look {box.rental}", self._look(box))

    def stop(self) -> None:
        for job in self._jobs.values():
            job.cancel()

    def _start(self, name: str, job: Coroutine[object, object, None]) -> bool:
        """Unless the one of that name is still at it."""
        if (before := self._jobs.get(name)) and not before.done():
            job.close()
            return False
        self._jobs[name] = asyncio.create_task(job)
        return True

    async def _keep(self, agent: str, body: bytes) -> None:
        try:
            if await asyncio.to_thread(self._take, agent, body):
                self._edition += 1  # not `+= await …`, which would forget what was added meanwhile
        except SelfhostError as error:
            log.warning("%s", error.message)

    def _take(self, agent: str, body: bytes) -> bool:
        prefix = taken(agent, body)
        return prefix is not None and self._store.keep(prefix)

    async def _record(self, model: str, context: int) -> None:
        try:
            await asyncio.to_thread(self._record_missing, model, context)
        except (SelfhostError, OSError) as error:
            log.info("Claude Code's prompt is not known before its first session: %s", error)

    def _record_missing(self, model: str, context: int) -> None:
        binary = claude.find(self._settings.claude, os.environ)
        version = claude.seen_version(binary, self._settings.paths.state).version
        for mode in MODES:
            known = self._store.all().get(mode)
            if known and known.version == version:
                continue
            prefix = recording.record(binary, mode, model=model, context=context, env=os.environ)
            if prefix and self._store.keep(prefix):
                self._edition += 1

    async def _send(self, box: Upstream) -> None:
        """The most likely one first."""
        try:
            async with asyncio.timeout(SEND_S), aiohttp.ClientSession() as session:
                for mode, prefix in (await asyncio.to_thread(self._store.all)).items():
                    body = prefix.ahead(self._directory)
                    headers = {"authorization": f"Bearer {box.token}"}
                    url = f"{box.url}/selfhost/prefix?name={mode}"
                    async with session.post(url, json=body, headers=headers) as answer:
                        if answer.status != 202:
                            log.info("box of %s takes no prefix: %s", box.rental, answer.status)
        except (aiohttp.ClientError, OSError, TimeoutError, SelfhostError) as error:
            log.info("no prefix for the box of %s: %s", box.rental, error)
            self._sent.pop(box.rental, None)

    async def _look(self, box: Upstream) -> None:
        """A proxy that started anew has no wishes, and its tunnel may have outlived that."""
        headers = {"authorization": f"Bearer {box.token}", "x-selfhost-probe": "1"}
        try:
            async with (
                asyncio.timeout(SEND_S),
                aiohttp.ClientSession() as session,
                session.get(f"{box.url}/health", headers=headers) as answer,
            ):
                told = await answer.json()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            log.debug("the box of %s does not tell what it has read: %s", box.rental, error)
            return
        match told:
            case {"prefix": {"state": "none"}}:
                self._sent.pop(box.rental, None)
