"""One request of `selfhost bench`: what is sent, and what times and tokens are taken from the answer."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from selfhost_cli.attach import Front
from selfhost_cli.bench.client import HELP, Answer, BrokeOff, Client, Listening, connected
from selfhost_cli.errors import SelfhostError
from tests.proxy.kit import asynchronous, ended, serving, started, text, wire

USAGE = {"input_tokens": 30, "cache_read_input_tokens": 70, "cache_creation_input_tokens": 0, "output_tokens": 9}
END = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": USAGE}
DELTA = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "one"}}


def heard(*events: tuple[float, Any], cache: str = "miss") -> Answer:
    listening = Listening()
    for at, event in events:
        listening.hear(at, event)
    return listening.answer(cache)


def test_the_first_token_is_the_first_piece_of_content_and_pings_are_none() -> None:
    answer = heard((0.1, {"type": "ping"}), (1.5, {"type": "message_start"}), (2.0, DELTA), (4.0, DELTA), (6.0, END))
    assert (answer.first_s, answer.total_s) == (2.0, 6.0)
    assert (answer.fresh, answer.reused, answer.prompt, answer.out) == (30, 70, 100, 9)
    assert answer.prefill == 30 / 2
    assert answer.decode == 8 / 4, "the first token is not generated in that time"


@pytest.mark.parametrize("events", [[(2.0, DELTA), (6.0, END)], [(6.0, END)]])
def test_an_answer_in_one_piece_or_none_tells_no_rate(events: list[tuple[float, Any]]) -> None:
    answer = heard(*events)
    assert answer.decode is None
    assert answer.first_s == events[0][0]


def test_of_a_hit_the_box_read_nothing_whatever_its_usage_says() -> None:
    answer = heard((0.5, DELTA), (0.6, END), cache="hit;asked at the same time")
    assert answer.hit
    assert (answer.fresh, answer.reused) == (0, 0)


def test_a_box_that_tells_no_numbers_has_read_none_and_has_no_rates() -> None:
    usage = {"input_tokens": "many", "cache_read_input_tokens": -5, "output_tokens": None}
    answer = heard((1.0, DELTA), (2.0, END | {"usage": usage}))
    assert (answer.prompt, answer.prefill, answer.decode) == (0, None, None)


def test_an_answer_that_does_not_come_to_its_end_is_none() -> None:
    with pytest.raises(BrokeOff, match="ended in the middle"):
        heard((1.0, DELTA))
    with pytest.raises(BrokeOff, match="the engine fell over"):
        heard((1.0, DELTA), (2.0, {"type": "error", "error": {"message": "the engine fell over"}}))


@dataclass
class Box:
    """Answers every request so; `seen` holds headers and body."""

    script: list[bytes] = field(default_factory=lambda: [started(), *text("one", "two"), *ended(tokens=5)])
    status: int = 200
    refusal: bytes = b""
    seen: list[tuple[dict[str, str], Any]] = field(default_factory=list)

    async def answer(self, http: web.Request) -> web.StreamResponse:
        self.seen.append(({name.lower(): value for name, value in http.headers.items()}, await http.json()))
        if self.status != 200:
            return web.Response(status=self.status, body=self.refusal)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "x-selfhost-cache": "miss"})
        await response.prepare(http)
        for piece in self.script:
            await response.write(piece)
        return response


def seconds() -> Callable[[], float]:
    """A clock that goes on by one each time that somebody looks."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


@asynccontextmanager
async def asking(box: Box, wish: str = "") -> AsyncIterator[Client]:
    app = web.Application()
    app.router.add_post("/v1/messages", box.answer)
    async with serving(app) as url, connected(Front(url, 0, "front-token"), wish, seconds()) as client:
        yield client


@asynchronous
async def test_a_request_carries_the_token_and_its_class_and_keeps_out_of_the_cache() -> None:
    box = Box()
    async with asking(box) as client:
        answer = await client.ask({"messages": [], "stream": True})
    ((headers, body),) = box.seen
    assert body == {"messages": [], "stream": True}
    assert headers["authorization"] == "Bearer front-token"
    assert headers["x-claude-code-request-class"] == "bench"
    assert headers["cache-control"] == "no-store"
    assert "x-selfhost-probe" not in headers, "it is the user's own use, and keeps an idle box alive"
    assert (answer.pieces, answer.stop, answer.cache, answer.out) == (2, "end_turn", "miss", 5)
    # looked at: when it was sent, and at each event: start, block, two pieces, stop of the block, end
    assert (answer.first_s, answer.total_s) == (3.0, 6.0)


@pytest.mark.parametrize(("wish", "sent"), [("", None), ("no-store", "no-store"), ("no-cache", "no-cache")])
@asynchronous
async def test_where_the_cache_is_measured_it_is_asked_as_the_user_wishes(wish: str, sent: str | None) -> None:
    box = Box()
    async with asking(box, wish) as client:
        await client.ask({}, keep=True)
    assert box.seen[0][0].get("cache-control") == sent


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (529, json.dumps({"error": {"message": "the box is away\x1b"}}).encode(), "529: the box is away"),
        (502, b"<html>gateway", "502: <html>gateway"),
    ],
)
@asynchronous
async def test_a_refusal_is_told_with_what_helps(status: int, body: bytes, message: str) -> None:
    async with asking(Box(status=status, refusal=body)) as client:
        with pytest.raises(SelfhostError, match=message) as refused:
            await client.ask({})
    assert not isinstance(refused.value, BrokeOff)
    assert refused.value.remedy == HELP
    assert "\x1b" not in refused.value.message


@asynchronous
async def test_what_is_no_event_is_passed_over_and_an_error_is_not() -> None:
    script = [b"data: nonsense\n\n", started(), *text("one"), wire("error", error={"message": "it broke"})]
    async with asking(Box(script=script)) as client:
        with pytest.raises(BrokeOff, match="it broke"):
            await client.ask({})


@asynchronous
async def test_a_front_that_is_gone_is_an_error() -> None:
    async with connected(Front("http://127.0.0.1:9", 9, "t"), "") as client:
        with pytest.raises(SelfhostError, match="the front does not answer"):
            await client.ask({})
