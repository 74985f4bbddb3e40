"""What `GET /metrics` counts, and in which order waiting requests get a slot."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from selfhost_cli.proxy.admission import Admission
from tests.proxy.kit import (
    HELLO,
    HI,
    LOADING,
    STREAM,
    LlamaStub,
    Proxy,
    asynchronous,
    ended,
    eventually,
    proxied,
    started,
    text,
)
from tests.proxy.ollama_stub import OllamaStub, said

SUBAGENT = {"x-claude-code-request-class": "subagent"}
AUXILIARY = {"x-claude-code-request-class": "auxiliary"}
PROBE = {"x-selfhost-probe": "1"}
Samples = dict[tuple[str, ...], float]


async def samples(proxy: Proxy) -> Samples:
    """(name without our prefix, label values in order) -> value; only of what is ours and no time of creation."""
    async with proxy.get("/metrics") as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/plain; version=")
        page = await response.text()
    return {
        (sample.name.removeprefix("selfhost_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@asynchronous
async def test_without_the_token_there_are_no_metrics(tmp_path: Path) -> None:
    async with proxied(LlamaStub(), tmp_path) as proxy, proxy.session.get(proxy.url + "/metrics") as response:
        assert response.status == 401
        assert "selfhost_" not in await response.text()


@asynchronous
async def test_requests_are_counted_by_class_and_outcome(tmp_path: Path) -> None:
    stub = LlamaStub()
    async with proxied(stub, tmp_path) as proxy:
        await proxy.stream()
        await proxy.answer()
        await proxy.answer(**SUBAGENT)
        await proxy.answer(**PROBE)
        await proxy.answer(**{"x-claude-code-request-class": "made up"})
        await proxy.answer(b"[")
        async with proxy.post(HI, "/v1/messages/count_tokens"):
            pass
        async with proxy.post(HI, "/v1/messages/count_tokens", **PROBE):
            pass
        stub.script = [started(), *text("Hel"), "die"]
        await proxy.stream()
        counted = {key[1:]: value for key, value in (await samples(proxy)).items() if key[0] == "requests_total"}
    assert counted == {
        ("main", "ok"): 2,
        ("main", "invalid_request_error"): 1,
        ("main", "api_error"): 1,
        ("subagent", "ok"): 1,
        ("probe", "ok"): 2,
        ("other", "ok"): 1,
        ("count", "ok"): 1,
    }


@asynchronous
async def test_a_client_that_leaves_is_an_outcome_of_its_own(tmp_path: Path) -> None:
    stub = LlamaStub([started(), *text("Hel"), asyncio.Event()])
    async with proxied(stub, tmp_path) as proxy:
        async with proxy.post(STREAM) as response:
            await response.content.readany()
        await eventually(lambda: stub.gone == 1)
        told = await samples(proxy)
    assert told["requests_total", "main", "client gone"] == 1
    assert ("engine_seconds_total", "main", "answer") not in told


@asynchronous
async def test_tokens_are_counted_by_class_and_reused_ones_beside_all(tmp_path: Path) -> None:
    stub = LlamaStub([started(uncached=5, cached=95), *text("Hi"), *ended(tokens=7)])
    async with proxied(stub, tmp_path) as proxy:
        await proxy.stream()
        await proxy.answer()
        await proxy.answer(**PROBE)
        told = await samples(proxy)
    tokens = {name: told[f"{name}_tokens_total", "main"] for name in ("input", "cached", "output")}
    assert tokens == {"input": 200, "cached": 190, "output": 14}
    assert told["input_tokens_total", "probe"] == 100


@asynchronous
async def test_repaired_calls_are_counted(tmp_path: Path) -> None:
    leak = "<function=Read>\n<parameter=file_path>\n/a\n</parameter>\n</function>"
    tools = [{"name": "Read", "description": "", "input_schema": {"type": "object"}}]
    async with proxied(OllamaStub(script=said(leak)), tmp_path) as proxy:
        await proxy.answer(HI | {"tools": tools})
        told = await samples(proxy)
    assert told["repaired_calls_total", "main"] == 1


@asynchronous
async def test_times_of_prompt_answer_and_first_token_are_told_apart(tmp_path: Path) -> None:
    first, rest = asyncio.Event(), asyncio.Event()
    hello, there = text("Hello", " there")[:2], text("Hello", " there")[2:]
    stub = LlamaStub([first, started(), *hello, rest, *there, *ended()])
    loop = asyncio.get_running_loop()
    async with proxied(stub, tmp_path) as proxy, proxy.post(STREAM) as response:
        loop.call_later(0.2, first.set)
        await response.content.readuntil(b"content_block_delta")
        loop.call_later(0.1, rest.set)
        await response.read()
        told = await samples(proxy)
    assert 0.15 <= told["engine_seconds_total", "main", "prompt"] < 5
    assert 0.05 <= told["engine_seconds_total", "main", "answer"] < 5
    assert told["first_token_seconds_count", "main"] == 1
    assert 0.15 <= told["first_token_seconds_sum", "main"] < 5


@asynchronous
async def test_the_time_that_a_model_loads_is_a_wait_and_not_the_prompts(tmp_path: Path) -> None:
    stub = LlamaStub()
    loop = asyncio.get_running_loop()
    async with proxied(stub, tmp_path) as proxy:
        stub.refusal = (503, LOADING)
        loop.call_later(1, setattr, stub, "refusal", None)
        await proxy.stream()
        told = await samples(proxy)
    assert told["engine_seconds_total", "main", "prompt"] < 0.9 < told["queue_seconds_sum", "main"]


@asynchronous
async def test_the_queue_is_told_while_it_stands_and_its_time_afterwards(tmp_path: Path) -> None:
    hold = asyncio.Event()
    stub = LlamaStub([hold, *HELLO])
    async with proxied(stub, tmp_path) as proxy:
        asking = [asyncio.create_task(proxy.stream()) for _ in range(3)]

        async def queue() -> tuple[float, float]:
            told = await samples(proxy)
            return told[("running",)], told[("queue_length",)]

        async with asyncio.timeout(5):
            while await queue() != (1, 2):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        hold.set()
        await asyncio.gather(*asking)
        assert await queue() == (0, 0)
        told = await samples(proxy)
    assert told["queue_seconds_count", "main"] == 3
    assert told["queue_seconds_bucket", "main", "0.05"] == 1
    assert 0.2 <= told["queue_seconds_sum", "main"] < 5


@asynchronous
async def test_two_applications_in_one_process_count_each_for_itself(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    async with (
        proxied(LlamaStub(), tmp_path / "one") as one,
        proxied(LlamaStub(), tmp_path / "other") as other,
    ):
        await one.answer()
        assert ("requests_total", "main", "ok") in await samples(one)
        assert ("requests_total", "main", "ok") not in await samples(other)


# --- who gets the next slot ---


@asynchronous
async def test_an_auxiliary_request_lets_every_waiting_main_one_pass(tmp_path: Path) -> None:
    hold = asyncio.Event()
    stub = LlamaStub([hold, *HELLO])
    async with proxied(stub, tmp_path) as proxy:
        asking = []
        for number, headers in enumerate([{}, AUXILIARY, {}, AUXILIARY, SUBAGENT]):
            body = {"messages": [{"role": "user", "content": f"{number}"}], "max_tokens": 9}
            asking.append(asyncio.create_task(proxy.answer(body, **headers)))
            async with asyncio.timeout(5):
                while (told := await samples(proxy))[("running",)] + told[("queue_length",)] <= number:
                    await asyncio.sleep(0.005)
        hold.set()
        await asyncio.gather(*asking)
        order = [asked["messages"][0]["content"][0]["text"] for asked in stub.asked]
    assert order == ["0", "2", "4", "1", "3"]


class Line:
    """Requests at an Admission of one slot, each of which stays inside until it is let go."""

    def __init__(self) -> None:
        self.admission = Admission(slots=1)
        self.inside: list[str] = []
        self._leave = asyncio.Event()

    async def join(self, name: str, *, auxiliary: bool = False) -> asyncio.Task[None]:
        task = asyncio.create_task(self._serve(name, auxiliary))
        await asyncio.sleep(0)
        return task

    async def _serve(self, name: str, auxiliary: bool) -> None:
        async with self.admission.turn(auxiliary=auxiliary):
            self.inside.append(name)
            await self._leave.wait()

    def let_go(self) -> None:
        self._leave.set()


@asynchronous
async def test_who_leaves_the_queue_is_not_waited_for() -> None:
    line = Line()
    first, gone, last = [await line.join(name) for name in ("first", "gone", "last")]
    gone.cancel()
    await asyncio.wait([gone])
    assert line.admission.waiting == 1
    line.let_go()
    await asyncio.gather(first, last)
    assert line.inside == ["first", "last"]
    assert (line.admission.running, line.admission.waiting) == (0, 0)


@pytest.mark.parametrize("called_first", [True, False], ids=["called, then cancelled", "cancelled, then called"])
@asynchronous
async def test_a_slot_is_not_lost_with_one_who_is_called_and_leaves_in_the_same_moment(called_first: bool) -> None:
    admission = Admission(slots=1)

    async def serve() -> None:
        async with admission.turn():
            pass

    held = admission.turn()
    await held.__aenter__()
    gone, last = asyncio.create_task(serve()), asyncio.create_task(serve())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert admission.waiting == 2
    steps: list[Any] = [lambda: held.__aexit__(None, None, None), lambda: cancel(gone)]
    for step in steps if called_first else reversed(steps):
        await step()
    async with asyncio.timeout(5):
        await asyncio.wait([gone, last])
    assert gone.cancelled()
    assert last.exception() is None
    assert (admission.running, admission.waiting) == (0, 0)


async def cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
