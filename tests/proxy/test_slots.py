"""As many answers at once as the engine had room for, which may be less than was asked for."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from selfhost_cli.proxy.admission import Admission
from selfhost_cli.proxy.errors import ProxyError
from selfhost_cli.proxy.rundir import RunDir
from tests.proxy.kit import LlamaStub, asynchronous, proxied


@asynchronous
async def test_with_fewer_slots_who_has_one_keeps_it_and_nobody_new_gets_it() -> None:
    admission = Admission(2)
    async with AsyncExitStack() as first, AsyncExitStack() as second:
        for held in (first, second):
            await held.enter_async_context(admission.turn())
        admission.resize(1)
        waiting = asyncio.create_task(admission.turn().__aenter__())
        await first.aclose()
        await asyncio.sleep(0)
        assert (admission.running, waiting.done()) == (1, False)
        await second.aclose()
        await waiting
        assert admission.running == 1


@asynchronous
async def test_with_more_slots_who_waits_comes_in() -> None:
    admission = Admission(1)
    async with admission.turn():
        waiting = asyncio.create_task(admission.turn().__aenter__())
        await asyncio.sleep(0)
        assert admission.waiting == 1
        admission.resize(2)
        await waiting
        assert (admission.running, admission.waiting) == (2, 0)


def test_the_queue_shrinks_too() -> None:
    admission = Admission(2, queue=0)
    admission.resize(1)
    with admission.place(), pytest.raises(ProxyError), admission.place():
        pass


@pytest.mark.parametrize("text", ["", "[]", '{"slots": 0}', '{"slots": "1"}', '{"slots": 9}'])
def test_what_the_engine_did_not_say_is_as_it_was_asked_for(tmp_path: Path, text: str) -> None:
    assert RunDir(tmp_path).slots(2) == 2
    (tmp_path / "engine.fit").write_text(text)
    assert RunDir(tmp_path).slots(2) == 2


@asynchronous
async def test_a_proxy_tells_how_many_there_are(tmp_path: Path) -> None:
    async with proxied(LlamaStub(), tmp_path, slots=2) as proxy:
        seen: list[int] = []

        async def told() -> int:
            async with proxy.get("/health") as answer:
                return int((await answer.json())["slots"])

        assert await told() == 2
        (tmp_path / "engine.fit").write_text(json.dumps({"slots": 1, "loaded": True}))
        for _ in range(200):
            seen.append(await told())
            if seen[-1] == 1:
                break
            await asyncio.sleep(0.01)
        assert seen[-1] == 1
