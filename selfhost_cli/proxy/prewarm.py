"""Beginnings of prompts that are read ahead, while nobody asks: so that the first turn of a session is a warm one.

A wish is a Messages body. The engine reads it for an answer of one token, gives way to whoever asks meanwhile (what was
read of it stays read), and reads it again once the engine is a new one. Where the engine can put what it read away, a
new one gets it from the disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Literal

from selfhost_cli.proxy.admission import Admission
from selfhost_cli.proxy.codec import encode
from selfhost_cli.proxy.contract import Json, Request
from selfhost_cli.proxy.engines import Engine, Prompt
from selfhost_cli.proxy.errors import EngineBroke, EngineDown, ProxyError, invalid

State = Literal["cold", "reading", "warm", "refused"]
MOST = 4
"""Wishes; one for each way in which Claude Code is run is what there is."""
HEADS = 4
"""Beginnings that clients' own prompts had: what is wished for may have been read already."""

log = logging.getLogger("selfhost.proxy")


@dataclass
class _Wish:
    """`tokens` of it, of which `reused` had been read before, took `seconds`. `why` it is refused."""

    request: Request
    digest: str
    state: State = "cold"
    tokens: int = 0
    reused: int = 0
    seconds: float = 0.0
    why: str = ""

    def told(self) -> Json:
        facts: Json = {"state": self.state, "digest": self.digest}
        if self.state == "warm":
            facts |= {"tokens": self.tokens, "reused": self.reused, "seconds": round(self.seconds, 3)}
        return facts | ({"reason": self.why} if self.why else {})


class Prewarm:
    """`served`: the model, in every detail that what the engine put away depends on.

    `engine_start`: something else for every start of the engine, None while it is away.
    """

    def __init__(
        self, served: str, engine: Engine, admission: Admission, engine_start: Callable[[], object], every: float
    ) -> None:
        self._served = served
        self._engine = engine
        self._admission = admission
        self._engine_start = engine_start
        self._every = every
        self._start: object = None
        self._wishes: dict[str, _Wish] = {}
        self._heads: deque[tuple[Request, Prompt]] = deque(maxlen=HEADS)
        self._wished = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    def wish(self, name: str, request: Request) -> None:
        """In place of what had that name before. Raises ProxyError 400 when there are too many names."""
        if name not in self._wishes and len(self._wishes) == MOST:
            raise invalid(f"there are {MOST} prefixes already: {', '.join(self._wishes)}")
        request = replace(request, max_tokens=1, stream=True)
        whole = [self._served, request.system, request.tools, request.messages, request.thinking, request.effort]
        digest = hashlib.sha256(encode(whole)).hexdigest()[:16]
        if (before := self._wishes.get(name)) and before.digest == digest:
            return
        self._wishes[name] = wish = _Wish(request, digest)
        for head, prompt in self._heads:
            _learn(wish, head, prompt)
        self._wished.set()

    def give_way(self) -> None:
        """A client is about to ask. The engine keeps what it has read so far."""
        if self._reading:
            self._reading.cancel()

    def answered(self, request: Request, prompt: Prompt) -> None:
        """A client's prompt was read: its beginning is warm from now on."""
        if self._engine_start() != self._start:
            return  # by which engine, the next look tells
        if not any(_same_head(request, head) for head, _ in self._heads):
            self._heads.append((request, prompt))
        for wish in self._wishes.values():
            _learn(wish, request, prompt)

    def told(self) -> Json:
        """For `/health`: of all wishes together, and of each. Warm: all of them but those that are refused."""
        wishes = {name: wish.told() for name, wish in self._wishes.items()}
        states = [wish.state for wish in self._wishes.values()]
        if not states:
            return {"state": "none"}
        order: list[State] = ["reading", "cold", "warm", "refused"]
        state = next(one for one in order if one in states)
        warm = [wish for wish in self._wishes.values() if wish.state == "warm"]
        total = {"tokens": sum(wish.tokens for wish in warm), "seconds": round(sum(wish.seconds for wish in warm), 3)}
        return {"state": state, **total, "wishes": wishes}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await self._wished.wait()
            self._wished.clear()
            if (start := self._engine_start()) != self._start:
                self._start = start
                self._heads.clear()
                for wish in self._wishes.values():
                    wish.state = "cold"
            cold = next((wish for wish in self._wishes.values() if wish.state == "cold"), None)
            if cold is None or start is None or self._admission.running or self._admission.waiting:
                continue
            self._reading = asyncio.create_task(self._read(cold))
            try:
                await asyncio.wait([self._reading])
            finally:
                self._reading.cancel()
                self._reading = None
            if cold.state == "warm":
                self._wished.set()  # the next one, without waiting

    async def _read(self, wish: _Wish) -> None:
        began = time.monotonic()
        wish.state, wish.why = "reading", ""
        try:
            async with self._admission.turn(auxiliary=True):
                restored = await self._engine.restore(wish.digest)
                async with aclosing(self._engine.messages(wish.request)) as events:
                    async for event in events:
                        if isinstance(event, Prompt):
                            wish.tokens, wish.reused = event.total, event.cached
                wish.state, wish.seconds = "warm", time.monotonic() - began
                if not restored:
                    await self._engine.save(wish.digest, wish.tokens)
        except (EngineDown, EngineBroke) as error:
            wish.why = error.message  # it is tried again
        except ProxyError as error:
            wish.state, wish.why = "refused", error.message
        except Exception:
            log.exception("a bug of ours, or an engine's answer of an unknown shape")
            wish.state, wish.why = "refused", "the proxy failed; its log says why"
        finally:
            if wish.state == "reading":
                wish.state = "cold"
        level = logging.DEBUG if wish.state == "cold" else logging.INFO
        counts = f"{wish.tokens} tokens, {wish.reused} reused"
        log.log(level, "prefix %s %s %s %s", wish.digest, wish.state, counts, wish.why)


def _same_head(one: Request, other: Request) -> bool:
    """What templates put first, and what is by far the most of it."""
    heads = ((each.system, each.tools, each.thinking, each.effort) for each in (one, other))
    return next(heads) == next(heads)


def _learn(wish: _Wish, request: Request, prompt: Prompt) -> None:
    if wish.state != "warm" and _same_head(wish.request, request):
        wish.state, wish.why = "warm", ""
        wish.tokens, wish.reused, wish.seconds = prompt.total, prompt.cached, 0.0
