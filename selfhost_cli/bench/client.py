"""One request to the front with a clock beside it: when the first token came, when the last, and what was read."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from selfhost_cli.attach import Front
from selfhost_cli.bench.plan import Body
from selfhost_cli.errors import SelfhostError, plain

CLASS = "bench"
HELP = "`selfhost doctor` looks for the reason."
SILENT_S = 60.0
"""The front pings in every silence."""


class BrokeOff(SelfhostError):
    """An answer that had begun did not come to its end."""


@dataclass(frozen=True)
class Answer:
    """`fresh` and `reused`: tokens of the prompt that the box read, and that it had read before; both 0 for a hit.

    `first_s`, `total_s`: seconds from sending to the first token and to the end. `pieces`: in so many events came the
    text. `cache`: what the front says of its cache, "" when that is off.
    """

    fresh: int
    reused: int
    out: int
    first_s: float
    total_s: float
    pieces: int
    stop: str
    cache: str

    @property
    def prompt(self) -> int:
        return self.fresh + self.reused

    @property
    def hit(self) -> bool:
        return self.cache.startswith("hit")

    @property
    def prefill(self) -> float | None:
        """Tokens per second; the way to the box and the first token are in it. None when it read nothing."""
        return self.fresh / self.first_s if self.fresh and self.first_s > 0 else None

    @property
    def decode(self) -> float | None:
        """Tokens per second behind the first; None for an answer that was too short, or came in one piece."""
        seconds = self.total_s - self.first_s
        return (self.out - 1) / seconds if self.out > 1 and self.pieces > 1 and seconds > 0 else None


@dataclass
class Listening:
    """Events of a stream, each with the seconds since the request was sent -> an answer."""

    first: float | None = None
    end: float | None = None
    pieces: int = 0
    stop: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)

    def hear(self, at: float, event: object) -> None:
        """Raises BrokeOff for an error in the middle of an answer."""
        match event:
            case {"type": "content_block_delta"}:
                self.pieces += 1
                self.first = at if self.first is None else self.first
            case {"type": "message_delta", "delta": {"stop_reason": str(stop)}, "usage": dict(usage)}:
                self.end, self.stop, self.usage = at, stop, usage
            case {"type": "error", "error": {"message": str(message)}}:
                raise BrokeOff(f"an answer broke off: {plain(message)}", HELP)

    def answer(self, cache: str) -> Answer:
        """Raises BrokeOff when the stream ended before the answer did."""
        if self.end is None:
            raise BrokeOff("an answer ended in the middle, and nothing says why", HELP)
        hit = cache.startswith("hit")  # its usage is that of the one who asked first
        return Answer(
            fresh=0 if hit else self._count("input_tokens") + self._count("cache_creation_input_tokens"),
            reused=0 if hit else self._count("cache_read_input_tokens"),
            out=self._count("output_tokens"),
            first_s=self.end if self.first is None else self.first,
            total_s=self.end,
            pieces=self.pieces,
            stop=self.stop,
            cache=cache,
        )

    def _count(self, name: str) -> int:
        value = self.usage.get(name)
        return value if isinstance(value, int) and value > 0 else 0  # a stranger's machine may say anything


class Client:
    """Of the front. `wish`: what the user asks of its cache, in the words of Cache-Control."""

    def __init__(self, http: httpx.AsyncClient, wish: str, clock: Callable[[], float]) -> None:
        self._http = http
        self._clock = clock
        self.wish = wish

    def clock(self) -> float:
        return self._clock()

    async def ask(self, body: Body, *, keep: bool = False) -> Answer:
        """`keep`: the cache may answer, and keep what was answered. Raises BrokeOff, and SelfhostError when the box
        does not answer at all."""
        wish = self.wish if keep else "no-store"
        headers = {"content-type": "application/json"} | ({"cache-control": wish} if wish else {})
        content = json.dumps(body).encode()
        heard, began = Listening(), self.clock()
        try:
            async with self._http.stream("POST", "/v1/messages", content=content, headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise SelfhostError(f"the box answers {response.status_code}: {_message(response)}", HELP)
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        heard.hear(self.clock() - began, _decoded(line.removeprefix("data:")))
                return heard.answer(response.headers.get("x-selfhost-cache", ""))
        except httpx.HTTPError as error:
            raise SelfhostError(f"the front does not answer: {error or type(error).__name__}", HELP) from error


@asynccontextmanager
async def connected(front: Front, wish: str, clock: Callable[[], float] = time.perf_counter) -> AsyncIterator[Client]:
    # plain http on loopback: no proxy of the environment's, no certificates
    headers = {"Authorization": f"Bearer {front.token}", "x-claude-code-request-class": CLASS}
    headers["x-session-id"] = uuid.uuid4().hex  # of several boxes, all of it at one
    async with httpx.AsyncClient(
        base_url=front.url, headers=headers, timeout=SILENT_S, trust_env=False, verify=False
    ) as http:
        yield Client(http, wish, clock)


def _decoded(data: str) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None  # a stranger's machine may say anything


def _message(response: httpx.Response) -> str:
    try:
        return plain(str(response.json()["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return plain(response.text[:200])
