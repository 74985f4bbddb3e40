"""The cache before a box: who asks the same gets the same, and nobody gets what is not his answer."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from selfhost_cli.proxy.answer import PROMPT_MS
from selfhost_cli.proxy.cache import cache as cache_module
from selfhost_cli.proxy.cache import entry as entry_module
from selfhost_cli.proxy.cache.rules import Rules
from selfhost_cli.proxy.cache.stores.local import LocalStore
from selfhost_cli.proxy.front import Away, Upstream
from tests.proxy.cache.kit import AUTH, SCOPE, boxed, laptop
from tests.proxy.kit import (
    HI,
    READ,
    STREAM,
    TOKEN,
    LlamaStub,
    asynchronous,
    call,
    check_grammar,
    ended,
    eventually,
    proxied,
    started,
    streamed,
    text,
    texts,
)

Json = dict[str, Any]


def called() -> list[bytes]:
    return [started(), *text("Look: "), *call("Read", '{"a":', '"b"}', index=1), *ended("tool_use", blocks=2)]


def ids(answer: Any) -> set[str]:
    """Of a message or of events."""
    events = answer if isinstance(answer, list) else [{"message": answer}, *map(as_start, answer["content"])]
    found = {event.get("message", event.get("content_block", {})).get("id") for event in events}
    return {one for one in found if one}


def as_start(block: Json) -> Json:
    return {"content_block": block}


def without_ids(answer: Any) -> Any:
    """The same for two answers that differ in their ids, their times, and in where their texts are cut."""
    if isinstance(answer, dict):
        return {key: without_ids(value) for key, value in answer.items() if key not in ("id", PROMPT_MS)}
    if not isinstance(answer, list):
        return answer
    joined: list[Any] = []
    for one in answer:
        delta = one.get("delta", {}) if isinstance(one, dict) and one.get("type") == "content_block_delta" else None
        if delta and joined and joined[-1].get("index") == one["index"] and "delta" in joined[-1]:
            name = next(key for key in delta if key != "type")
            before = joined.pop()
            joined.append(one | {"delta": delta | {name: before["delta"][name] + delta[name]}})
        else:
            joined.append(one)
    return [without_ids(one) for one in joined if not (isinstance(one, dict) and one.get("type") == "ping")]


@pytest.mark.parametrize(("script", "cached"), [(called(), 0), ([started(30, 12), *text("Hel", "lo"), *ended()], 12)])
@asynchronous
async def test_the_same_request_is_answered_once_and_told_again_as_if_it_were_live(
    tmp_path: Path, script: list[bytes], cached: int
) -> None:
    stub, body = LlamaStub(script=list(script)), STREAM | {"tools": [READ]}
    async with boxed(stub, tmp_path) as front:
        first, live = await front.answer(body)
        second, again = await front.answer(body)
        counted = (await front.counters.totals())["rental-1", "main"]
    assert (first, second, len(stub.asked)) == ("miss", "hit", 1)
    check_grammar(again)
    assert without_ids(again) == without_ids(live)
    assert len(ids(again)) == len(ids(live)) > 0
    assert not ids(again) & ids(live)
    assert (counted.hits, counted.misses, counted.bypasses) == (1, 1, 0)
    assert (counted.input_tokens, counted.output_tokens) == (live[0]["message"]["usage"]["input_tokens"] + cached, 7)
    assert counted.gpu_seconds > 0


@asynchronous
async def test_a_stream_answers_who_wants_it_whole_and_the_other_way_round(tmp_path: Path) -> None:
    stub, body = LlamaStub(script=called()), HI | {"tools": [READ]}
    async with boxed(stub, tmp_path) as front:
        await front.answer(body | {"stream": True})
        note, whole = await front.answer(body)
        other = body | {"system": "other"}
        await front.answer(other)
        _, events = await front.answer(other | {"stream": True})
    assert (note, len(stub.asked)) == ("hit", 2)
    assert whole["content"][1]["input"] == {"a": "b"}
    assert (whole["stop_reason"], whole["usage"]["output_tokens"]) == ("tool_use", 7)
    check_grammar(events)
    assert texts(events) == "Look: "


@asynchronous
async def test_what_varies_without_meaning_hits_and_what_means_something_misses(tmp_path: Path) -> None:
    stub = LlamaStub()
    same: list[Json] = [
        {"metadata": {"user_id": "x"}},
        {"model": "claude-other"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "x"}}]}]},
        {"system": [{"type": "text", "text": "x-anthropic-billing-header: 7"}]},
    ]
    other: list[Json] = [
        {"messages": [{"role": "user", "content": "ho"}]},
        {"system": "x"},
        {"tools": [READ]},
        {"max_tokens": 51},
        {"temperature": 0},
        {"stop_sequences": ["x"]},
        {"thinking": {"type": "enabled"}},
        {"output_config": {"effort": "high"}},
    ]
    async with boxed(stub, tmp_path) as front:
        await front.answer(HI)
        assert [(await front.answer(HI | change))[0] for change in same] == ["hit"] * len(same)
        assert [(await front.answer(HI | change))[0] for change in other] == ["miss"] * len(other)
        assert len(stub.asked) == 1 + len(other)


@asynchronous
async def test_another_model_or_other_weights_of_its_name_never_answer_from_it(tmp_path: Path) -> None:
    stub = LlamaStub()
    for digest in ("d1", "d2"):
        async with boxed(stub, tmp_path, digest=digest) as front:
            assert [(await front.answer())[0] for _ in range(2)] == ["miss", "hit"]
    assert len(stub.asked) == 2


@asynchronous
async def test_a_box_that_does_not_say_what_it_serves_is_asked_every_time(tmp_path: Path) -> None:
    stub = LlamaStub()
    async with boxed(stub, tmp_path, digest="") as front:
        assert [(await front.answer())[0] for _ in range(2)] == ["bypass;not known what is served"] * 2
    assert len(stub.asked) == 2


NOT_KEPT: dict[str, Callable[[], LlamaStub]] = {
    "cut by its limit": lambda: LlamaStub(script=[started(), *text("Hel"), *ended("max_tokens")]),
    "a broken stream": lambda: LlamaStub(script=[started(), *text("Hel"), "die"]),
    "empty": lambda: LlamaStub(script=[started(), *ended(blocks=0)]),
    "refused": lambda: LlamaStub(refusal=(400, {"error": {"message": "no"}})),
    "a call that was repaired": lambda: LlamaStub(
        script=[started(), *text('<tool_call>{"name": "Read", "arguments": {}}</tool_call>'), *ended()]
    ),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("why", NOT_KEPT)
@asynchronous
async def test_what_is_no_good_answer_is_not_kept(tmp_path: Path, why: str, stream: bool) -> None:
    stub = NOT_KEPT[why]()
    async with boxed(stub, tmp_path) as front:
        for _ in range(2):
            async with front.ask(HI | {"tools": [READ], "stream": stream}) as response:
                assert response.headers.get("x-selfhost-cache", "miss") == "miss"
                await response.read()
    assert len(stub.asked) == 2


@asynchronous
async def test_what_is_too_large_to_keep_is_passed_on_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry_module, "LARGEST", 100)
    stub = LlamaStub(script=[started(), *text("x" * 200), *ended()])
    async with boxed(stub, tmp_path) as front:
        for _ in range(2):
            note, events = await front.answer(STREAM)
            assert (note, len(texts(events))) == ("miss", 200)


@asynchronous
async def test_who_asks_at_the_same_time_hears_it_as_it_comes_and_one_asks_the_engine(tmp_path: Path) -> None:
    more = asyncio.Event()
    stub = LlamaStub(script=[started(), *text("Hel"), more, *text("lo", index=0)[1:], *ended()])
    async with boxed(stub, tmp_path) as front:

        async def ask(heard: asyncio.Event) -> tuple[str, list[Json]]:
            events = []
            async with front.ask(STREAM) as response:
                async for event in streamed(response.content.iter_any()):
                    events.append(event)
                    if "delta" in event:
                        heard.set()
                return response.headers["x-selfhost-cache"], events

        heard = [asyncio.Event() for _ in range(30)]
        asking = [asyncio.create_task(ask(one)) for one in heard]
        await asyncio.wait_for(asyncio.gather(*(one.wait() for one in heard)), 10)  # before the engine goes on
        more.set()
        answers = await asyncio.gather(*asking)
    assert len(stub.asked) == 1
    assert sorted(note for note, _ in answers) == ["hit;asked at the same time"] * 29 + ["miss"]
    for _, events in answers:
        check_grammar(events)
        assert texts(events) == "Hello"
    assert len({next(iter(ids(events))) for _, events in answers}) == 30


@asynchronous
async def test_whole_answers_are_asked_for_once_too(tmp_path: Path) -> None:
    more = asyncio.Event()
    stub = LlamaStub(script=[started(), *text("Hello"), more, *ended()])
    async with boxed(stub, tmp_path) as front:
        asking = [asyncio.create_task(front.hear(HI | {"stream": one % 2 == 0})) for one in range(10)]
        await eventually(lambda: len(stub.asked) == 1)
        more.set()
        answers = await asyncio.gather(*asking)
    assert len(stub.asked) == 1
    assert {answer["content"][0]["text"] for _, answer in answers if isinstance(answer, dict)} == {"Hello"}
    assert len(set.union(*(ids(answer) for _, answer in answers))) == 10


@asynchronous
async def test_a_failure_is_everybodys_who_waited_for_it_and_nobodys_after(tmp_path: Path) -> None:
    stub = LlamaStub(script=[started(), "die"])
    async with boxed(stub, tmp_path) as front:
        async with aiohttp.ClientSession() as session:
            asking = [session.post(front.url + "/v1/messages", json=HI, headers=AUTH) for _ in range(5)]
            statuses = {response.status for response in await asyncio.gather(*asking)}
        assert statuses == {500}
        assert len(stub.asked) < 5
        stub.script = [started(), *text("Hello"), *ended()]
        assert (await front.answer())[0] == "miss"


@asynchronous
async def test_it_goes_on_without_who_asked_first_as_long_as_somebody_listens(tmp_path: Path) -> None:
    more = asyncio.Event()
    stub = LlamaStub(script=[started(), *text("Hel"), more, *ended()])
    async with boxed(stub, tmp_path) as front:
        first = await front.ask(STREAM)
        await first.content.readany()
        second = asyncio.create_task(front.hear(STREAM))
        other = await front.ask(STREAM)
        await other.content.readany()
        first.close()
        other.close()
        assert (stub.running, stub.gone) == (1, 0)
        more.set()
        _, events = await second
        check_grammar(events)
        await front.settled()
        assert (await front.answer(STREAM))[0] == "hit"
    assert len(stub.asked) == 1


@asynchronous
async def test_what_nobody_listens_to_any_more_stops_being_generated(tmp_path: Path) -> None:
    more = asyncio.Event()
    stub = LlamaStub(script=[started(), *text("Hel"), more])
    async with boxed(stub, tmp_path) as front:
        for _ in range(2):
            response = await front.ask(STREAM)
            await response.content.readany()
            response.close()
            await eventually(lambda: stub.running == 0)
    assert len(stub.asked) == 2


@pytest.mark.parametrize(
    ("rules", "change", "expected"),
    [
        (Rules(), {"temperature": 0}, ["miss", "hit"]),
        (Rules(), {"temperature": 0.5}, ["bypass;temperature"] * 2),
        (Rules(tempered=True), {"temperature": 0.5}, ["miss", "hit"]),
        (Rules(untempered=False), {}, ["bypass;no temperature"] * 2),
        (Rules(untempered=False), {"temperature": 0}, ["miss", "hit"]),
    ],
)
@asynchronous
async def test_what_is_random_on_purpose_is_cached_only_when_asked(
    tmp_path: Path, rules: Rules, change: Json, expected: list[str]
) -> None:
    async with boxed(LlamaStub(), tmp_path, rules=rules) as front:
        assert [(await front.answer(HI | change))[0] for _ in range(2)] == expected


@asynchronous
async def test_a_client_can_keep_the_cache_out_or_have_it_asked_anew(tmp_path: Path) -> None:
    stub = LlamaStub()
    async with boxed(stub, tmp_path) as front:
        notes = [
            (await front.answer(HI, **({"cache-control": wish} if wish else {})))[0]
            for wish in ("no-store", "", "no-store", "no-cache", "")
        ]
    assert notes == ["bypass;no-store", "miss", "bypass;no-store", "bypass;no-cache", "hit"]
    assert len(stub.asked) == 4


@asynchronous
async def test_probes_are_not_the_caches(tmp_path: Path) -> None:
    stub = LlamaStub()
    async with boxed(stub, tmp_path) as front:
        for _ in range(2):
            assert (await front.answer(HI, **{"x-selfhost-probe": "1"}))[0] == ""
        assert await front.counters.totals() == {}
    assert len(stub.asked) == 2


@asynchronous
async def test_an_answer_is_good_for_as_long_as_its_class_says(tmp_path: Path) -> None:
    now = 1000.0
    store = LocalStore(tmp_path / "answers", 2**24, now=lambda: now)
    rules = Rules(ttl=100, ttl_by_class={"auxiliary": 10})
    stub = LlamaStub()
    titled, body = {"x-claude-code-request-class": "auxiliary"}, HI | {"system": "title"}
    async with AsyncExitStack() as stack:
        box = await stack.enter_async_context(proxied(stub, tmp_path, digest="d"))
        front = await stack.enter_async_context(laptop(Upstream(box.url, TOKEN, "r"), store, rules=rules))
        await front.answer()
        await front.answer(body, **titled)
        now += 50
        assert (await front.answer())[0] == "hit"
        assert (await front.answer(body, **titled))[0] == "miss"
        now += 51
        assert (await front.answer())[0] == "miss"


@asynchronous
async def test_what_was_tampered_with_moved_or_sealed_by_others_is_a_miss(tmp_path: Path) -> None:
    stub = LlamaStub()
    async with proxied(stub, tmp_path, digest="d") as box:
        target = Upstream(box.url, TOKEN, "r")
        path = tmp_path / "answers"
        async with laptop(target, LocalStore(path, 2**24)) as front:
            await front.answer()
            await front.answer(HI | {"system": "other"})
        store = LocalStore(path, 2**24)
        await store.start()
        first, second = [name async for name in store.names(f"selfhost:1:{SCOPE}:")]
        kept = await store.get(first)
        assert kept
        await store.put(second, kept, 1000)  # a true answer, to another question
        await store.put(first, kept[:-1] + bytes([kept[-1] ^ 1]), 1000)
        await store.close()
        async with laptop(target, LocalStore(path, 2**24)) as front:
            assert [(await front.answer(HI | one))[0] for one in ({}, {"system": "other"})] == ["miss", "miss"]
        async with laptop(target, LocalStore(path, 2**24), key=bytes(32)) as front:
            assert (await front.answer())[0] == "miss"
        async with laptop(target, LocalStore(path, 2**24), scope="other") as front:
            assert (await front.answer())[0] == "miss"


@asynchronous
async def test_nothing_of_an_answer_can_be_read_in_the_store(tmp_path: Path) -> None:
    stub = LlamaStub(script=[started(), *text("the secret word is swordfish"), *ended()])
    async with boxed(stub, tmp_path) as front:
        await front.answer(HI | {"system": "tell me of marlins"})
        store = LocalStore(tmp_path / "answers.sqlite3", 2**24)
        await store.start()
        [name] = [name async for name in store.names("selfhost:")]
        kept = await store.get(name)
        await store.close()
    assert kept
    for start in range(32):  # packed, it could not be read either
        with pytest.raises(zlib.error):
            zlib.decompress(kept[start:])
    files = b"".join(path.read_bytes() for path in tmp_path.glob("answers*"))
    assert b"swordfish" not in files
    assert b"marlins" not in files


@asynchronous
async def test_answers_outlive_the_box(tmp_path: Path) -> None:
    stub = LlamaStub()
    async with boxed(stub, tmp_path) as front:
        await front.answer()
        front.target = Away("reconnecting", "it was lost")
        assert (await front.answer())[0] == "hit"
        async with front.ask(HI | {"system": "new"}) as response:
            assert response.status == 529


@asynchronous
async def test_a_store_in_trouble_costs_nobody_an_answer(tmp_path: Path) -> None:
    stub = LlamaStub()
    store = LocalStore(tmp_path / "no" / "such" / "folder", 2**24)
    async with AsyncExitStack() as stack:
        box = await stack.enter_async_context(proxied(stub, tmp_path, digest="d"))
        front = await stack.enter_async_context(laptop(Upstream(box.url, TOKEN, "r"), store))
        assert [(await front.answer())[0] for _ in range(2)] == ["miss", "miss"]
    assert store.trouble


@asynchronous
async def test_of_two_laptops_one_asks_and_the_other_gets_its_answer(tmp_path: Path) -> None:
    more = asyncio.Event()
    stub = LlamaStub(script=[started(), *text("Hello"), more, *ended()])
    async with proxied(stub, tmp_path, digest="d") as box:
        target, path = Upstream(box.url, TOKEN, "r"), tmp_path / "answers"
        async with (
            laptop(target, LocalStore(path, 2**24)) as one,
            laptop(target, LocalStore(path, 2**24)) as two,
        ):
            asking = [asyncio.create_task(front.hear(STREAM)) for front in (one, two)]
            await eventually(lambda: len(one.cache._flights) + len(two.cache._flights) == 2)
            await eventually(lambda: stub.running == 1)
            more.set()
            for _, events in await asyncio.gather(*asking):
                check_grammar(events)
    assert len(stub.asked) == 1


@asynchronous
async def test_a_dead_laptop_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "LEASE_S", 0.3)
    monkeypatch.setattr(cache_module, "PING_EVERY", 0.05)
    stub = LlamaStub()
    async with proxied(stub, tmp_path, digest="d") as box:
        target, path = Upstream(box.url, TOKEN, "r"), tmp_path / "answers"
        async with laptop(target, LocalStore(path, 2**24)) as front:
            await front.answer(STREAM)
        dead = LocalStore(path, 2**24)
        await dead.start()
        [name] = [name async for name in dead.names("selfhost:")]
        await dead.delete(name)
        assert await dead.take(name, "dead", 0.3)
        async with laptop(target, LocalStore(path, 2**24)) as front:
            note, events = await front.answer(STREAM)
        await dead.close()
    assert (note, len(stub.asked)) == ("miss", 2)
    assert {"type": "ping"} in events
    check_grammar(events)


def test_the_doubt_of_the_box_is_not_told_again() -> None:
    message = {"content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn", "stop_sequence": None}
    message |= {"usage": {"output_tokens": 1}, "model": "m"}
    made = entry_module.read(json.dumps(message).encode(), streamed=False, cls="main", at=0, seconds=1)
    assert isinstance(made, entry_module.Entry)
    assert replace(made, at=1) == replace(entry_module.unpack(made.pack()) or made, at=1)


@asynchronous
async def test_what_it_did_is_told_in_prometheus_format(tmp_path: Path) -> None:
    async with boxed(LlamaStub(), tmp_path) as front:
        for _ in range(3):
            await front.answer()
        async with front.session.get(front.url + "/selfhost/metrics", headers=AUTH) as response:
            page = await response.text()
        async with front.session.get(front.url + "/selfhost/metrics") as response:
            assert response.status == 401
    families = {family.name: family for family in text_string_to_metric_families(page)}
    samples = {sample.labels["kind"]: sample.value for sample in families["selfhost_cache_requests"].samples}
    assert samples == {"hits": 2, "misses": 1, "bypasses": 0}


@asynchronous
async def test_an_old_answer_that_is_put_back_stays_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub, path = LlamaStub(), tmp_path / "answers"
    async with AsyncExitStack() as stack:
        box = await stack.enter_async_context(proxied(stub, tmp_path, digest="d"))
        front = await stack.enter_async_context(
            laptop(Upstream(box.url, TOKEN, "r"), LocalStore(path, 2**24), rules=Rules(ttl=100))
        )
        await front.answer()
        writer = LocalStore(path, 2**24)
        await writer.start()
        stack.push_async_callback(writer.close)
        [name] = [name async for name in writer.names("selfhost:")]
        kept = await writer.get(name)
        assert kept
        await writer.put(name, kept, 10**6)
        assert (await front.answer())[0] == "hit"
        real = time.time
        monkeypatch.setattr(cache_module.time, "time", lambda: real() + 101)
        assert (await front.answer())[0] == "miss"


@asynchronous
async def test_nobody_waits_for_ever_for_who_says_that_he_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "TURN_S", 0.3)
    stub, path = LlamaStub(), tmp_path / "answers"
    async with AsyncExitStack() as stack:
        box = await stack.enter_async_context(proxied(stub, tmp_path, digest="d"))
        front = await stack.enter_async_context(laptop(Upstream(box.url, TOKEN, "r"), LocalStore(path, 2**24)))
        await front.answer()
        liar = LocalStore(path, 2**24)
        await liar.start()
        stack.push_async_callback(liar.close)
        [name] = [name async for name in liar.names("selfhost:")]
        await liar.delete(name)
        assert await liar.take(name, "liar", 1000)
        assert (await front.answer())[0] == "miss"
    assert len(stub.asked) == 2
