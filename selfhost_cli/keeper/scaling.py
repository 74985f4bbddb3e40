"""`up --boxes MIN..MAX`: while requests wait for a slot, another box is rented, by `selfhost up` itself.

Nothing here ends a box: one that nobody asks ends by itself, and one that was rented because others were busy does so
after a shorter time.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from subprocess import DEVNULL

from selfhost_cli import fleet
from selfhost_cli.config import Settings
from selfhost_cli.fleet import Fleet
from selfhost_cli.lifecycle import SIMULATED
from selfhost_cli.model import Rental, State
from selfhost_cli.wait import SYSTEM, Clock

LOOK_EVERY_S = 5.0
ENDED_S = 0.5
"""Between two looks whether `selfhost up` is over."""
BUSY_S = 30.0
"""So long requests have to wait, at every look, before another box is rented."""
AGAIN_S = 600.0
"""After one that could not be had."""
IDLE_MINUTES = 15.0
"""What was rented for a rush ends so long after it."""

Start = Callable[[Sequence[str], Mapping[str, str]], Awaitable[int]]
Healths = Callable[[], Awaitable[Mapping[str, object]]]
Spent = Callable[[float], float]
"""Dollars of the rentals that began since then (Unix time) and have ended."""

log = logging.getLogger("selfhost.keeper")


async def _run(words: Sequence[str], env: Mapping[str, str]) -> int:
    """What it says is in the keeper's log. It goes on when nobody waits for it any more."""
    process = subprocess.Popen(words, env=dict(env), stdin=DEVNULL, stdout=DEVNULL, start_new_session=True)
    while process.poll() is None:
        await asyncio.sleep(ENDED_S)
    return process.returncode


class Scaling:
    """Make and use it inside the event loop. `healths`: what each box says of itself."""

    def __init__(
        self,
        settings: Settings,
        healths: Healths,
        spent: Spent,
        env: Mapping[str, str],
        start: Start = _run,
        clock: Clock = SYSTEM,
    ) -> None:
        self._settings = settings
        self._healths = healths
        self._spent = spent
        self._env = env
        self._start = start
        self._clock = clock
        self._looked = float("-inf")
        self._busy_since: float | None = None
        self._not_before = float("-inf")
        self._task: asyncio.Task[None] | None = None

    def tick(self, rentals: Sequence[Rental]) -> None:
        """`rentals`: all that may cost money."""
        now = self._clock.monotonic()
        if now - self._looked < LOOK_EVERY_S or (self._task and not self._task.done()):
            return
        self._looked = now
        wanted = fleet.recall(self._settings.paths)
        settled = all(rental.state is State.READY for rental in rentals)
        if wanted is None or not rentals or not settled or len(rentals) >= wanted.most or now < self._not_before:
            self._busy_since = None
            return
        self._task = asyncio.create_task(self._look(wanted, list(rentals)))

    def stop(self) -> None:
        """A `selfhost up` that is at it goes on: it has rules of its own for who leaves it alone."""
        if self._task:
            self._task.cancel()

    async def _look(self, wanted: Fleet, rentals: Sequence[Rental]) -> None:
        waiting = sum(_waiting(health) for health in (await self._healths()).values())
        now = self._clock.monotonic()
        if not waiting:
            self._busy_since = None
            return
        if self._busy_since is None:
            self._busy_since = now
        if now - self._busy_since < BUSY_S:
            return
        self._busy_since = None
        if not self._affordable(wanted, rentals):
            return
        log.info("%d requests wait for a slot of %d boxes: renting another one", waiting, len(rentals))
        words = [sys.executable, "-m", "selfhost_cli", "--profile", self._settings.profile]
        words += ["up", "--yes", "--detach", "--boxes", f"{len(rentals) + 1}..{wanted.most}"]
        try:
            code = await self._start(words, dict(self._env) | _wishes(wanted, rentals))
        except OSError as error:
            log.error("%s cannot be run: %s", words[0], error)
            code = 1
        if code:
            log.error("no other box was rented: status %d; nothing is tried for %.0f s", code, AGAIN_S)
            self._not_before = self._clock.monotonic() + AGAIN_S

    def _affordable(self, wanted: Fleet, rentals: Sequence[Rental]) -> bool:
        held, spent = sum(rental.caps.max_dollars for rental in rentals), self._spent(wanted.since)
        if held + spent + wanted.share <= wanted.dollars + fleet.CENT:
            return True
        log.warning(
            "requests wait, and no other box is rented: $%.2f are spent and $%.2f spoken for, of $%.2f",
            *(spent, held, wanted.dollars),
        )
        self._not_before = self._clock.monotonic() + AGAIN_S
        return False


def _waiting(health: object) -> int:
    match health:
        case {"requests": {"waiting": int(waiting)}}:
            return waiting
    return 0


def _wishes(wanted: Fleet, rentals: Sequence[Rental]) -> dict[str, str]:
    """The same again, as settings, within what was confirmed."""
    one = rentals[0]
    left = (wanted.most - len(rentals)) * wanted.share
    told: dict[str, object] = {
        "gpu": one.gpu.removesuffix(SIMULATED),
        "model": one.model,
        "engine": one.engine,
        "context": one.context_asked or one.context,
        "slots": one.slots,
        "kv_cache_type": one.kv_cache_type,
        "max_price": wanted.ceiling,
        "max_spend": sum(rental.caps.max_dollars for rental in rentals) + left,
        "hours": one.caps.max_s / 3600,
        "idle": min(IDLE_MINUTES, one.caps.idle_s / 60),
    }
    return {f"SELFHOST_{name.upper()}": str(value) for name, value in told.items()}
