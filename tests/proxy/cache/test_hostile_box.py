"""Boxes that answer strangely, late, or as another one: nothing hangs, nothing wrong is kept, nobody pays for it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from selfhost_cli.proxy import front as front_module
from selfhost_cli.proxy.cache import cache as cache_module
from selfhost_cli.proxy.cache import entry as entries
from selfhost_cli.proxy.cache.flight import _renamed
from selfhost_cli.proxy.cache.stores.local import LocalStore
from selfhost_cli.proxy.front import Upstream
from tests.proxy.cache.kit import Laptop, laptop
from tests.proxy.kit import HI, STREAM, asynchronous, check_grammar, eventually, serving, texts, wire

START = wire(
    "message_start",
    message={
        "id": "msg_" + "0" * 24,
        "content": [],
        "model": "m",
        "usage": {"input_tokens": 1, "output_tokens": 0, "cache_read_input_tokens": 0},
    },
)
USAGE = {"input_tokens": 1, "output_tokens": 2, "cache_read_input_tokens": 0}
END = wire("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage=USAGE)
END += wire("message_stop")


def block(kind: str, *deltas: Any, **more: Any) -> bytes:
    start = wire("content_block_start", index=0, content_block={"type": kind, **more})
    told = [wire("content_block_delta", index=0, delta=delta) for delta in deltas]
    return b"".join([start, *told, wire("content_block_stop", index=0)])


def saying(text: str) -> bytes:
    return START + block("text", {"type": "text_delta", "text": text}, text="") + END


@dataclass
class Box:
    """Says of itself and answers what the test wants. `hold`: waited for before an answer; `die`: how often it breaks
    off before anything was said."""

    body: bytes = b""
    model: str = "m"
    status: int = 200
    kind: str = "text/event-stream"
    slow: float = 0.0
    hold: asyncio.Event | None = None
    die: int = 0
    looked: int = 0
    asked: int = 0
    gone: list[str] = field(default_factory=list)

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/messages", self._messages)
        return app

    async def _health(self, http: web.Request) -> web.Response:
        self.looked += 1
        await asyncio.sleep(self.slow)
        return web.json_response(
            {
                "status": "healthy",
                "engine": "e",
                "model": self.model,
                "digest": "d" if self.model else "",
                "version": "1",
            }
        )

    async def _messages(self, http: web.Request) -> web.StreamResponse:
        self.asked += 1
        if self.hold:
            await self.hold.wait()
        response = web.StreamResponse(status=self.status, headers={"content-type": self.kind})
        await response.prepare(http)
        if self.die:
            self.die -= 1
            assert http.transport
            http.transport.abort()
            return response
        await response.write(self.body)
        return response


@asynccontextmanager
async def before(box: Box, tmp_path: Path, store: type[LocalStore] = LocalStore) -> AsyncIterator[Laptop]:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(box.application()))
        target, kept = Upstream(url, "t", "r"), store(tmp_path / "answers", 2**24)
        yield await stack.enter_async_context(laptop(target, kept))


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


STRANGE = {
    "a delta of nothing": block("text", {"type": "x"}, text=""),
    "a block of a kind nobody knows": block("surprise", {"type": "text_delta", "text": "a"}),
    "an input that is nested deeply": block(
        "tool_use", {"type": "input_json_delta", "partial_json": deep(5000)}, id="toolu_1", name="Read", input={}
    ),
    "an input nested as deep as can be read": block(
        "tool_use", {"type": "input_json_delta", "partial_json": deep(700)}, id="toolu_1", name="Read", input={}
    ),
    "numbers that JSON has no words for": block(
        "tool_use", {"type": "input_json_delta", "partial_json": '{"a": NaN}'}, id="toolu_1", name="Read", input={}
    ),
    "a delta before its block": wire("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"}),
}


@pytest.mark.parametrize("what", STRANGE)
@asynchronous
async def test_a_strange_answer_passes_as_it_is_ends_and_is_not_kept(tmp_path: Path, what: str) -> None:
    box = Box(START + STRANGE[what] + END)
    async with before(box, tmp_path) as front:
        for _ in range(2):
            async with front.ask(STREAM) as response:
                assert await asyncio.wait_for(response.read(), 10) == box.body
            await asyncio.wait_for(front.settled(), 10)
    assert box.asked == 2


@asynchronous
async def test_an_answer_of_very_many_events_is_not_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "MOST_READ", 1000)
    monkeypatch.setattr(entries, "collect", None)
    answer = entries.read(saying("x" * 1000), streamed=True, cls="main", at=0.0, seconds=0.0)
    assert answer == "it is too large"


@asynchronous
async def test_what_another_box_answered_is_not_kept_for_the_one_that_was_asked(tmp_path: Path) -> None:
    """The first breaks before anything was said, and the second try goes to another one."""
    first, second = Box(saying("I am A"), model="a", die=1), Box(saying("I am B"), model="b")
    async with serving(second.application()) as other, before(first, tmp_path) as front:
        asked = front.target
        asking = asyncio.create_task(front.hear(STREAM))
        await eventually(lambda: first.asked == 1)
        front.target = Upstream(other, "t", "rb")
        _, events = await asking
        assert texts(events) == "I am B"
        await front.settled()
        front.target = asked
        note, events = await front.answer(STREAM)
        assert (note, texts(events)) == ("miss", "I am A")


@asynchronous
async def test_a_box_that_is_brought_to_another_model_has_no_answers_of_the_one_before(tmp_path: Path) -> None:
    box = Box(saying("I am A"), model="a")
    async with before(box, tmp_path) as front:
        assert (await front.answer(STREAM))[0] == "miss"
        asked = front.target
        assert isinstance(asked, Upstream)
        front.target = replace(asked, changing=True)
        box.body, box.model = saying("I am B"), "b"
        note, events = await front.answer(STREAM)
        assert (note, texts(events)) == ("bypass;not known what is served", "I am B")
        front.target = asked
        note, events = await front.answer(STREAM)
        assert (note, texts(events)) == ("miss", "I am B")


@asynchronous
async def test_a_box_that_is_slow_to_say_what_it_serves_is_not_asked_by_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_module, "WHO_S", 0.2)
    box = Box(saying("hi"), slow=1.0)
    async with before(box, tmp_path) as front:
        answers = await asyncio.gather(*(front.hear(STREAM | {"system": str(one)}) for one in range(5)))
    assert {note for note, _ in answers} == {"bypass;not known what is served"}
    assert box.looked == 1


@asynchronous
async def test_a_box_that_does_not_say_is_asked_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(saying("hi"), model="")
    async with before(box, tmp_path) as front:
        for _ in range(3):
            await front.answer(STREAM)
        assert box.looked == 1
        box.model = "m"
        monkeypatch.setattr(front_module, "NOT_SAID_S", 0.0)
        assert [(await front.answer(STREAM))[0] for _ in range(2)] == ["miss", "hit"]


@asynchronous
async def test_a_refusal_after_pings_is_told_as_an_error_and_not_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another laptop asks the same and dies; meanwhile the head is out."""
    monkeypatch.setattr(cache_module, "PING_EVERY", 0.05)
    refused = {"error": {"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8 maximum"}}
    box = Box(json.dumps(refused).encode(), status=400, kind="application/json")
    taken = LocalStore(tmp_path / "answers", 2**24)
    async with before(Box(saying("hi")), tmp_path) as front:
        await front.answer(STREAM)
    await taken.start()
    [name] = [name async for name in taken.names("selfhost:")]
    await taken.delete(name)
    assert await taken.take(name, "dead", 0.5)
    async with before(box, tmp_path) as front:
        _, events = await front.answer(STREAM)
    await taken.close()
    assert events[0] == {"type": "ping"}
    assert events[-1]["type"] == "error"
    assert events[-1]["error"] == refused["error"]
    assert box.asked == 1


@asynchronous
async def test_nobody_waits_for_the_store_to_have_an_answer(tmp_path: Path) -> None:
    box, release = Box(saying("hi")), asyncio.Event()

    class Slow(LocalStore):
        async def put(self, name: str, sealed: bytes, ttl: float) -> None:
            await release.wait()
            await super().put(name, sealed, ttl)

    async with before(box, tmp_path, Slow) as front:
        _, events = await asyncio.wait_for(front.hear(STREAM), 10)
        check_grammar(events)
        release.set()
        await front.settled()
        assert (await front.answer(STREAM))[0] == "hit"


@asynchronous
async def test_what_was_kept_between_looking_and_asking_is_told(tmp_path: Path) -> None:
    box = Box(saying("hi"))

    class Late(LocalStore):
        """Finds nothing the first time, as if it were kept just afterwards."""

        looked = 0

        async def get(self, name: str) -> bytes | None:
            self.looked += 1
            return None if self.looked == 1 else await super().get(name)

    async with before(box, tmp_path) as front:
        await front.answer(STREAM)
    async with before(box, tmp_path, Late) as front:
        _, events = await front.answer(STREAM)
    check_grammar(events)
    assert box.asked == 1
    third = LocalStore(tmp_path / "answers", 2**24)
    await third.start()
    [name] = [name async for name in third.names("selfhost:")]
    assert await third.take(name, "third", 1), "who found it keeps nobody from asking"
    await third.close()


def test_in_a_whole_message_only_its_own_id_becomes_another() -> None:
    first, second = b'{"id":"msg_' + b"0" * 24 + b'"', b'{"id":"toolu_' + b"0" * 24 + b'"}}'
    names: dict[bytes, bytes] = {}
    renamed = _renamed(first, names, False)
    assert renamed != first
    assert len(renamed) == len(first)
    assert _renamed(second, names, False) == second
    assert _renamed(second, {}, True) != second


@asynchronous
async def test_whole_answers_that_are_not_kept_have_ids_of_their_own_and_are_counted(tmp_path: Path) -> None:
    message = {"id": "msg_" + "0" * 24, "type": "message", "role": "assistant", "model": "m", "content": []}
    message |= {"stop_reason": "max_tokens", "stop_sequence": None, "usage": USAGE}
    body = json.dumps(message, separators=(",", ":")).encode()
    box = Box(body, kind="application/json", hold=asyncio.Event())
    async with before(box, tmp_path) as front:
        asking = [asyncio.create_task(front.hear(HI)) for _ in range(4)]
        await eventually(lambda: box.asked == 1)
        flight = next(iter(front.cache._flights.values()))
        await eventually(lambda: flight.listeners == 4)
        assert box.hold
        box.hold.set()
        answers = await asyncio.gather(*asking)
        await front.settled()
        counted = (await front.counters.totals())["rental-1", "main"]
    assert box.asked == 1
    assert len({answer["id"] for _, answer in answers}) == 4
    assert (counted.hits, counted.misses) == (0, 4)


@asynchronous
async def test_a_torn_whole_answer_is_logged_as_broken_and_not_as_the_clients_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    box = Box(b"", kind="application/json", die=1)
    with caplog.at_level(logging.INFO):
        async with before(box, tmp_path) as front:
            with pytest.raises(aiohttp.ClientError):
                await front.hear(HI)
            await front.settled()
    [line] = [record.getMessage() for record in caplog.records if "POST '/v1/messages'" in record.getMessage()]
    assert "outcome=broken" in line
    assert "client gone" not in line
