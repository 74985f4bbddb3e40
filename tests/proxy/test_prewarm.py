"""What a box reads ahead: when it does, what becomes of it, and that it keeps nobody waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.proxy.kit import (
    HELLO,
    HI,
    READ,
    LlamaStub,
    Proxy,
    assert_error,
    asynchronous,
    ended,
    proxied,
    started,
    text,
)

Json = dict[str, Any]
HEAD: Json = {"system": "You are careful.", "tools": [READ]}
WISH: Json = HEAD | {"messages": [{"role": "user", "content": "."}], "max_tokens": 4000}
ANSWER = [started(uncached=300, cached=0), *text("ok"), *ended(tokens=1)]


async def wish(proxy: Proxy, body: Json = WISH, name: str = "cli") -> Json:
    async with proxy.post(body, f"/selfhost/prefix?name={name}") as response:
        assert response.status == 202
        told: Json = await response.json()
    return told


async def told(proxy: Proxy) -> Json:
    async with proxy.get("/health") as response:
        prefix: Json = (await response.json())["prefix"]
    return prefix


async def until(proxy: Proxy, holds: Callable[[Json], bool], seconds: float = 5) -> Json:
    async with asyncio.timeout(seconds):
        while not holds(prefix := await told(proxy)):
            await asyncio.sleep(0.005)
    return prefix


def is_(state: str) -> Callable[[Json], bool]:
    return lambda prefix: bool(prefix["state"] == state)


@asynchronous
async def test_it_is_read_at_once_for_one_token_and_is_no_activity(tmp_path: Path) -> None:
    stub = LlamaStub(script=[*ANSWER])
    async with proxied(stub, tmp_path) as proxy:
        assert await told(proxy) == {"state": "none"}
        await wish(proxy)
        prefix = await until(proxy, is_("warm"))
    assert prefix["tokens"] == 300
    assert prefix["wishes"]["cli"]["reused"] == 0
    [asked] = stub.asked
    assert asked["max_tokens"] == 1
    assert asked["system"] == HEAD["system"]
    assert not (tmp_path / "activity").exists()


@asynchronous
async def test_the_same_wish_again_is_not_read_again(tmp_path: Path) -> None:
    stub = LlamaStub(script=[*ANSWER])
    async with proxied(stub, tmp_path) as proxy:
        await wish(proxy)
        await until(proxy, is_("warm"))
        assert (await wish(proxy))["state"] == "warm"
        await wish(proxy, WISH | {"system": "You are quick."})
        await until(proxy, lambda prefix: len(stub.asked) == 2 and prefix["state"] == "warm")
    assert stub.asked[1]["system"] == "You are quick."


@asynchronous
async def test_one_that_thinks_begins_otherwise_and_is_read_anew(tmp_path: Path) -> None:
    stub = LlamaStub(script=[*ANSWER])
    async with proxied(stub, tmp_path) as proxy:
        await wish(proxy, WISH | {"thinking": {"type": "disabled"}})
        await until(proxy, is_("warm"))
        await wish(proxy, WISH | {"thinking": {"type": "enabled", "budget_tokens": 1024}})
        await until(proxy, lambda prefix: is_("warm")(prefix) and len(stub.asked) == 2)


@asynchronous
async def test_a_client_does_not_wait_for_it_and_it_goes_on_afterwards(tmp_path: Path) -> None:
    never = asyncio.Event()
    stub = LlamaStub(script=[started(), never])
    async with proxied(stub, tmp_path) as proxy:
        await wish(proxy)
        await until(proxy, is_("reading"))
        stub.script = [*ANSWER]
        status, answer, _ = await proxy.answer(HI)
        assert (status, answer["content"][0]["text"]) == (200, "ok")
        assert stub.gone == 1, "the engine was left at it"
        await until(proxy, is_("warm"))
    assert [len(body.get("tools", [])) for body in stub.asked] == [1, 0, 1]


@asynchronous
async def test_it_does_not_begin_while_a_client_is_served(tmp_path: Path) -> None:
    done = asyncio.Event()
    stub = LlamaStub(script=[started(), *text("so"), done, *ended()])
    async with proxied(stub, tmp_path) as proxy:
        serving = asyncio.create_task(proxy.answer(HI))
        async with asyncio.timeout(5):
            while not stub.asked:
                await asyncio.sleep(0.005)
        await wish(proxy)
        await wish(proxy, WISH | {"system": "Another."}, "sdk-cli")
        assert len(stub.asked) == 1
        stub.script = [*HELLO]
        done.set()
        await serving
        await until(proxy, is_("warm"))
    assert len(stub.asked) == 3


@pytest.mark.parametrize("wished_first", [True, False])
@asynchronous
async def test_what_a_client_had_read_need_not_be_read_again(tmp_path: Path, wished_first: bool) -> None:
    never = asyncio.Event()
    stub = LlamaStub(script=[never] if wished_first else [*ANSWER])
    async with proxied(stub, tmp_path) as proxy:
        if wished_first:
            await wish(proxy)
            await until(proxy, is_("reading"))
            stub.script = [*ANSWER]
        await proxy.answer(HI | HEAD)
        if not wished_first:
            await wish(proxy)
        prefix = await until(proxy, is_("warm"))
    assert prefix["wishes"]["cli"]["tokens"] == 300
    assert len(stub.asked) == 1 + wished_first


@asynchronous
async def test_a_new_engine_reads_it_again(tmp_path: Path) -> None:
    stub = LlamaStub(script=[*ANSWER])
    async with proxied(stub, tmp_path) as proxy:
        await wish(proxy)
        await until(proxy, is_("warm"))
        port = tmp_path / "engine.port"
        (tmp_path / "new").write_text(port.read_text())
        (tmp_path / "new").replace(port)
        await until(proxy, lambda prefix: len(stub.asked) == 2 and prefix["state"] == "warm")


@asynchronous
async def test_one_that_does_not_fit_is_refused_and_left_alone(tmp_path: Path) -> None:
    error = {"type": "exceed_context_size_error", "message": "too long", "n_prompt_tokens": 9000, "n_ctx": 4096}
    stub = LlamaStub(refusal=(400, {"error": error | {"code": 400}}))
    async with proxied(stub, tmp_path) as proxy:
        await wish(proxy)
        prefix = await until(proxy, is_("refused"))
        assert "9000 tokens > 4096" in prefix["wishes"]["cli"]["reason"]
        stub.refusal = None
        await proxy.answer(HI)
        assert (await told(proxy))["state"] == "refused"
    assert len(stub.asked) == 2


@asynchronous
async def test_an_engine_that_fails_is_asked_again(tmp_path: Path) -> None:
    stub = LlamaStub(script=[started(), "die"])
    async with proxied(stub, tmp_path) as proxy:
        await wish(proxy)
        async with asyncio.timeout(5):
            while not stub.gone and len(stub.asked) < 2:
                await asyncio.sleep(0.005)
        stub.script = [*ANSWER]
        await until(proxy, is_("warm"))


@asynchronous
async def test_a_wish_that_makes_no_sense_is_an_error(tmp_path: Path) -> None:
    async with proxied(LlamaStub(), tmp_path) as proxy:
        for path in ("?name=NO", "?name=" + "a" * 40):
            async with proxy.post(WISH, f"/selfhost/prefix{path}") as response:
                assert_error(response.status, await response.json(), 400, "invalid_request_error")
        for number in range(4):
            await wish(proxy, name="abcd"[number])
        async with proxy.post(WISH, "/selfhost/prefix?name=e") as response:
            assert "already" in assert_error(response.status, await response.json(), 400, "invalid_request_error")
