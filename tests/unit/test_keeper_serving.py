"""The chosen backends in the keeper: hosted while they serve, switched under running requests, passed over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from selfhost_cli import backends, config
from selfhost_cli.backends import Backend, Kind, keys
from selfhost_cli.config import Settings
from selfhost_cli.keeper.serving import Serving, host, probe
from selfhost_cli.proxy import front
from selfhost_cli.proxy.errors import ProxyError
from selfhost_cli.proxy.front import Away, Upstream, Usage
from tests.proxy.kit import Json, asynchronous, serving, streamed, texts
from tests.proxy.openai_stub import KEY, OpenAIStub, ended, words

TOKEN = "front-token"
NO_BOX = Away("gone", "no box is rented: run `selfhost up`", 15)
ASKED = {"max_tokens": 16, "stream": True, "messages": [{"role": "user", "content": "hi"}]}


def no_way(destination: str, port: int, remote_port: int) -> list[str]:
    raise AssertionError(destination)


class House:
    """A front over the chosen backends, as the keeper has it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.vast: Upstream | Away = NO_BOX
        self.used: list[Usage] = []
        self.spent = 0.0
        self.serving = Serving(
            settings, lambda: self.vast, lambda backend, since: self.spent, {"SOLD_KEY": KEY}, no_way
        )

    async def use(self, *names: str) -> None:
        backends.use(self.settings.paths, names)
        await self.serving.tick()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Callable[..., Any]]:
        """What asks the front."""
        app = front.build_front(TOKEN, self.serving.upstream, dict, self.used.append, {}, on_failed=self.serving.failed)
        async with serving(app) as url, aiohttp.ClientSession() as session:

            def ask(body: Json = ASKED) -> Any:
                headers = {"authorization": f"Bearer {TOKEN}"}
                return session.post(f"{url}/v1/messages", json=body, headers=headers)

            try:
                yield ask
            finally:
                await self.serving.stop()


@pytest.fixture
def house(tmp_path: Path) -> House:
    settings = config.load("test", env={"SELFHOST_HOME": str(tmp_path), "SELFHOST_MARKET_URL": "http://127.0.0.1:9"})
    settings.paths.make()
    return House(settings)


@asynccontextmanager
async def service(house: House, name: str, said: str, **more: Any) -> AsyncIterator[OpenAIStub]:
    """A backend of that name that says so."""
    stub = OpenAIStub(script=[*words(said), *ended()], owner="sold")
    async with serving(stub.application()) as url:
        made = Backend(name, Kind.OPENAI, url, "tiny", 4096, key="env:SOLD_KEY", price_in=1.0, price_out=2.0)
        backends.add(house.settings.paths, replace(made, **more))
        yield stub


async def said(answer: aiohttp.ClientResponse) -> str:
    assert answer.status == 200, await answer.text()
    return texts([event async for event in streamed(answer.content.iter_any())])


@asynchronous
async def test_the_next_request_goes_where_was_switched_to(house: House) -> None:
    async with service(house, "one", "I am one"), service(house, "two", "I am two"), house.opened() as ask:
        await house.use("one")
        async with ask() as answer:
            assert await said(answer) == "I am one"
            assert answer.headers["x-selfhost-backend"] == "one"
        await house.use("two")
        async with ask() as answer:
            assert await said(answer) == "I am two"
            assert answer.headers["x-selfhost-backend"] == "two"
    assert [usage.rental for usage in house.used] == ["backend-one", "backend-two"]


@asynchronous
async def test_an_answer_that_was_begun_ends_where_it_was_begun(house: House) -> None:
    go_on = asyncio.Event()
    async with service(house, "one", "I am one") as one, service(house, "two", "I am two"), house.opened() as ask:
        first, *rest = words("I am", " one")
        one.script = [first, rest[0], go_on, *rest[1:], *ended()]
        await house.use("one")
        async with ask() as answer:
            await house.use("two")
            async with ask() as other:
                assert await said(other) == "I am two"
            go_on.set()
            assert await said(answer) == "I am one"


@asynchronous
async def test_without_a_box_the_next_one_serves_and_the_box_again_once_it_is_there(house: House) -> None:
    async with service(house, "sold", "I am sold"), service(house, "box", "I am the box"), house.opened() as ask:
        box = await host(house.settings, backends.get(house.settings.paths, "box"), KEY)
        await house.use("vast", "sold")
        async with ask() as answer:
            assert await said(answer) == "I am sold"
        told: Any = house.serving.told()
        assert told["serving"] == "sold"
        assert [row["state"] for row in told["chain"]] == ["gone", "up"]
        house.vast = Upstream(box.url, box.token, "rental-1")
        async with ask() as answer:
            assert await said(answer) == "I am the box"
            assert answer.headers["x-selfhost-backend"] == "vast"
        await box.app.cleanup()


@pytest.mark.parametrize("status", [401, 402, 429, 503])
@asynchronous
async def test_what_one_refuses_the_next_one_takes(house: House, status: int) -> None:
    async with service(house, "one", "I am one") as one, service(house, "two", "I am two"), house.opened() as ask:
        one.refusals = [(status, {"message": "not now"})] * 2
        await house.use("one", "two")
        async with ask() as answer:
            assert await said(answer) == "I am two"
            assert answer.headers["x-selfhost-backend"] == "two"
        told: Any = house.serving.told()
        assert [row["state"] for row in told["chain"]] == ["away", "up"]
        async with ask() as answer:
            assert await said(answer) == "I am two"
        assert len(one.asked) == 1, "it is left alone for a while"
    assert [usage.rental for usage in house.used] == ["backend-two", "backend-two"]


@asynchronous
async def test_the_last_ones_refusal_is_told_and_a_wrong_request_is_not_passed_on(house: House) -> None:
    async with (
        service(house, "one", "I am one") as one,
        service(house, "two", "I am two") as two,
        house.opened() as ask,
    ):
        one.refusals = [(400, {"message": "what is that?"})]
        await house.use("one", "two")
        async with ask() as answer:
            assert answer.status == 400
        assert two.asked == []
        one.refusals, two.refusals = [(402, {"message": "pay"})], [(429, {"message": "slow down"})]
        async with ask() as answer:
            assert answer.status == 429
            assert "backend two" in (await answer.json())["error"]["message"]


@asynchronous
async def test_what_breaks_in_the_middle_is_not_finished_by_another_one(house: House) -> None:
    async with (
        service(house, "one", "I am one") as one,
        service(house, "two", "I am two") as two,
        house.opened() as ask,
    ):
        one.script = [*words("I am", " o"), "die"]
        await house.use("one", "two")
        async with ask() as answer:
            events = [event async for event in streamed(answer.content.iter_any())]
        assert events[-1]["type"] == "error"
        assert two.asked == []


@asynchronous
async def test_what_costs_as_much_as_it_may_is_passed_over_until_midnight(house: House) -> None:
    async with service(house, "sold", "I am sold", per_day=1.0), house.opened() as ask:
        await house.use("sold")
        house.spent = 0.99
        async with ask() as answer:
            assert answer.status == 200
        house.spent = 1.0
        async with ask() as answer:
            assert answer.status == 529
            assert "has cost $1.00 today" in (await answer.json())["error"]["message"]


@asynchronous
async def test_a_missing_key_is_told_to_who_asks(house: House) -> None:
    async with service(house, "sold", "I am sold", key="env:NOT_SET"), house.opened() as ask:
        await house.use("sold")
        async with ask() as answer:
            assert answer.status == 529
            message = (await answer.json())["error"]["message"]
        assert "NOT_SET is not set" in message
        house.serving.give("sold", KEY)
        await house.serving.tick()
        async with ask() as answer:
            assert await said(answer) == "I am sold"


class OddEnvironment(dict[str, str]):
    def __contains__(self, name: object) -> bool:
        raise RuntimeError("odd")


@asynchronous
async def test_what_nobody_thought_of_keeps_one_backend_from_serving_and_not_the_keeper(house: House) -> None:
    house.serving = Serving(house.settings, lambda: NO_BOX, lambda backend, since: 0.0, OddEnvironment(), no_way)
    async with service(house, "sold", "I am sold"), house.opened() as ask:
        await house.use("sold")
        async with ask() as answer:
            assert answer.status == 529
            assert "odd" in (await answer.json())["error"]["message"]


@asynchronous
async def test_a_smaller_context_than_claude_was_told_makes_it_compact(house: House) -> None:
    async with service(house, "large", "I am large"), service(house, "small", "") as small, house.opened() as ask:
        small.refusals = [(400, {"error": {"message": "Please reduce it.", "code": "context_length_exceeded"}})]
        await house.use("large")
        async with ask() as answer:
            await said(answer)
        await house.use("small")
        async with ask() as answer:
            assert answer.status == 400
            error = (await answer.json())["error"]
            assert error["type"] == "invalid_request_error"
            assert error["message"].startswith("prompt is too long")


@asynchronous
async def test_another_key_is_used_from_the_next_request_on(house: House) -> None:
    async with service(house, "sold", "I am sold", key="file") as stub, house.opened() as ask:
        keys.keep(house.settings.paths, "sold", "file", "sk-old")
        await house.use("sold")
        async with ask() as answer:
            await said(answer)
        keys.keep(house.settings.paths, "sold", "file", "sk-new")
        await house.serving.tick()
        stub.keys.clear()
        async with ask() as answer:
            await said(answer)
        assert stub.keys == {"Bearer sk-new"}


@asynchronous
async def test_a_file_that_was_damaged_meanwhile_leaves_all_as_it_is(house: House) -> None:
    async with service(house, "sold", "I am sold"), house.opened() as ask:
        await house.use("sold")
        house.settings.paths.backends.write_text("[")
        await house.serving.tick()
        async with ask() as answer:
            assert await said(answer) == "I am sold"
        assert house.serving.told()["problem"]


@asynchronous
async def test_a_backend_is_asked_for_a_token_without_being_chosen(house: House) -> None:
    async with service(house, "sold", "OK") as stub:
        told = await probe(backends.get(house.settings.paths, "sold"), KEY)
        assert (told["context"], told["tokens"]) == (4096, 7)
        stub.refusals = [(401, {"message": f"no such key {KEY}"})]
        with pytest.raises(ProxyError) as error:
            await probe(backends.get(house.settings.paths, "sold"), KEY)
    assert "backend sold" in error.value.message
    assert KEY not in error.value.message


@asynchronous
async def test_the_keeper_is_needed_while_something_else_than_the_box_is_chosen(house: House) -> None:
    async with service(house, "sold", "I am sold"):
        needed = [house.serving.needs_us]
        for row in (["vast", "sold"], ["vast"]):
            await house.use(*row)
            needed.append(house.serving.needs_us)
        assert needed == [False, True, False]
        await house.serving.stop()
