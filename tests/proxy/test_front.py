"""The front: relays everything, gives the box nothing it must not have, and always has an answer."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from selfhost_cli.proxy import front as front_module
from selfhost_cli.proxy import sse
from selfhost_cli.proxy.errors import ProxyError, invalid
from selfhost_cli.proxy.front import Away, Upstream, Usage, build_front
from tests.proxy.kit import (
    HELLO,
    HI,
    STREAM,
    LlamaStub,
    assert_error,
    asynchronous,
    check_grammar,
    ended,
    eventually,
    proxied,
    serving,
    started,
    streamed,
    text,
    texts,
    types,
    wire,
)


@pytest.fixture(autouse=True)
def soon_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a connection that is the same after a moment stays the same."""
    monkeypatch.setattr(front_module, "SETTLED_S", 0.2)


FRONT = "front-token"
AUTH = {"authorization": f"Bearer {FRONT}"}


@dataclass
class Box:
    """Stands where the tunnel ends: records what arrives, and answers as the test says."""

    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    answer: Any = None
    drop: int = 0
    gone: int = 0

    def application(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._any)
        return app

    async def _any(self, http: web.Request) -> web.StreamResponse:
        body = await http.read()
        self.seen.append((http.method, http.raw_path, {k.lower(): v for k, v in http.headers.items()}, body))
        if self.drop:
            self.drop -= 1
            assert http.transport
            http.transport.abort()
        if self.answer:
            try:
                response: web.StreamResponse = await self.answer(http)
                return response
            except (asyncio.CancelledError, ConnectionError):
                self.gone += 1
                raise
        return web.json_response({"status": "healthy"}, headers={"x-own": "yes"})


@dataclass
class Front:
    url: str
    session: aiohttp.ClientSession
    usage: list[Usage]

    def ask(self, path: str, method: str = "POST", body: Any = None, **headers: str) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        return self.session.request(method, self.url + path, data=data, headers=AUTH | headers)

    async def stream(self) -> list[dict[str, Any]]:
        async with self.ask("/v1/messages", body=STREAM) as response:
            assert response.status == 200
            return [event async for event in streamed(response.content.iter_any())]


async def double(given: dict[str, Any]) -> dict[str, Any]:
    if "n" not in given:
        raise invalid("n is missing")
    return {"n": given["n"] * 2}


async def refuse(given: dict[str, Any]) -> dict[str, Any]:
    raise ProxyError(409, "invalid_request_error", "not now")


@asynccontextmanager
async def fronted(
    target: Upstream | Away | Callable[[], Upstream | Away],
    on_main: Callable[[str, bytes], None] = lambda agent, body: None,
) -> AsyncIterator[Front]:
    usage: list[Usage] = []
    controls = {"double": double, "refuse": refuse}
    upstream = target if callable(target) else lambda: target
    app = build_front(FRONT, upstream, lambda: {"pid": 7}, usage.append, controls, on_main=on_main)
    async with serving(app) as url, aiohttp.ClientSession() as session:
        yield Front(url, session, usage)


@asynccontextmanager
async def before(box: Box) -> AsyncIterator[Front]:
    async with serving(box.application()) as url, fronted(Upstream(url, "box-token", "rental-1")) as front:
        yield front


def playing(*steps: bytes | asyncio.Event | str) -> Any:
    async def answer(http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(http)
        for step in steps:
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif step == "die":
                assert http.transport
                http.transport.abort()
            else:
                assert isinstance(step, bytes)
                await response.write(step)
        return response

    return answer


# --- relaying ---


@asynchronous
async def test_what_claude_code_asks_for_itself_is_heard_and_nothing_else() -> None:
    heard: list[tuple[str, bytes]] = []
    async with fronted(Away("gone", "no box"), lambda agent, body: heard.append((agent, body))) as front:
        for path, headers in (
            ("/v1/messages", {"x-claude-code-request-class": "main"}),
            ("/v1/messages", {"x-claude-code-request-class": "subagent"}),
            ("/v1/messages", {"x-selfhost-probe": "1"}),
            ("/v1/messages/count_tokens", {}),
        ):
            async with front.ask(path, body={}, **{"user-agent": "claude-cli/2"} | headers) as response:
                assert response.status == 529
    assert heard == [("claude-cli/2", b"{}")]


@asynchronous
async def test_method_path_query_body_and_headers_arrive_as_they_were_sent() -> None:
    box = Box()
    async with before(box) as front:
        for method in ("POST", "GET", "DELETE"):
            path = "/v1/a%2Fb/c?beta=true&x=%20"
            async with front.ask(method=method, path=path, body={"a": 1}, **{"anthropic-beta": "x,y"}) as response:
                assert await response.json() == {"status": "healthy"}
                assert response.headers["x-own"] == "yes"
    assert [seen[:2] for seen in box.seen] == [(m, "/v1/a%2Fb/c?beta=true&x=%20") for m in ("POST", "GET", "DELETE")]
    assert {seen[3] for seen in box.seen} == {b'{"a": 1}'}
    assert {seen[2]["anthropic-beta"] for seen in box.seen} == {"x,y"}


@asynchronous
async def test_the_fronts_token_never_reaches_the_box() -> None:
    box = Box()
    secrets = {
        "x-api-key": FRONT,
        "proxy-authorization": f"Bearer {FRONT}",
        "connection": "keep-alive, x-hop",
        "x-hop": FRONT,
    }
    async with before(box) as front:
        async with front.ask("/v1/messages", body=HI, **secrets):
            pass
        async with front.session.post(front.url + "/v1/messages", json=HI, headers={"x-api-key": FRONT}):
            pass
        async with front.ask("/health", "GET"):
            pass
    assert len(box.seen) == 3
    assert FRONT not in str(box.seen)
    assert {seen[2]["authorization"] for seen in box.seen} == {"Bearer box-token"}
    assert all("x-api-key" not in seen[2] for seen in box.seen)


@pytest.mark.parametrize("target", ["@evil.test/v1/models", "http://evil.test/v1/models", "*"])
@asynchronous
async def test_a_target_that_is_no_path_goes_nowhere(target: str) -> None:
    box = Box()
    async with before(box) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(front.url.rpartition(":")[2]))
        headers = f"host: localhost\r\nauthorization: Bearer {FRONT}\r\nconnection: close\r\n\r\n"
        writer.write(f"GET {target} HTTP/1.1\r\n{headers}".encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert answer.split()[1] in (b"400", b"404")
    assert box.seen == []


@asynchronous
async def test_errors_of_the_box_pass_with_status_and_headers() -> None:
    async def refused(http: web.Request) -> web.Response:
        return web.json_response({"type": "error"}, status=400, headers={"x-should-retry": "false"})

    async with before(Box(answer=refused)) as front, front.ask("/v1/messages", body=STREAM) as response:
        assert (response.status, response.headers["x-should-retry"]) == (400, "false")
        assert await response.json() == {"type": "error"}
        assert front.usage == []


@asynchronous
async def test_a_compressed_request_arrives_readable() -> None:
    box = Box()
    async with before(box) as front:
        headers = AUTH | {"content-encoding": "gzip"}
        async with front.session.post(front.url + "/x", data=gzip.compress(b"plain"), headers=headers) as response:
            assert response.status == 200
    assert box.seen[0][3] == b"plain"
    assert "content-encoding" not in box.seen[0][2]


@asynchronous
async def test_events_pass_as_they_come() -> None:
    hold = asyncio.Event()
    head, *rest = HELLO
    box = Box(answer=playing(head, hold, *rest))
    async with before(box) as front, front.ask("/v1/messages", body=STREAM) as response:
        assert await response.content.readline() == b"event: message_start\n"
        hold.set()
        assert b"message_stop" in await response.content.read()


@asynchronous
async def test_a_client_that_is_gone_cancels_what_it_asked_for() -> None:
    box = Box(answer=playing(HELLO[0], asyncio.Event()))
    async with before(box) as front:
        async with front.ask("/v1/messages", body=STREAM) as response:
            await response.content.readline()
        await eventually(lambda: box.gone == 1, seconds=1)


@asynchronous
async def test_usage_is_read_from_streams_and_from_bodies() -> None:
    usage = {"input_tokens": 3, "cache_read_input_tokens": 7, "output_tokens": 5}
    end = wire("message_delta", delta={"stop_reason": "end_turn"}, usage=usage) + wire("message_stop")

    async def whole(http: web.Request) -> web.Response:
        return web.json_response({"usage": usage})

    box = Box(answer=playing(started(), *text("x"), end[:30], end[30:]))
    async with before(box) as front:
        async with front.ask("/v1/messages?beta=true", body=STREAM, **{"x-claude-code-request-class": "subagent"}) as r:
            await r.read()
        box.answer = whole
        async with front.ask("/v1/messages", body=HI, **{"x-selfhost-probe": "1"}) as r:
            await r.read()
        async with front.ask("/v1/messages/count_tokens", body=HI) as r:
            await r.read()
        await eventually(lambda: len(front.usage) == 2)
    assert front.usage == [Usage("rental-1", "subagent", 10, 5, 7), Usage("rental-1", "probe", 10, 5, 7)]


@asynchronous
async def test_both_roles_together_answer_as_one(tmp_path: Path) -> None:
    stub = LlamaStub([started(4, 6), *text("Hello"), *ended(tokens=2)])
    async with proxied(stub, tmp_path) as proxy, fronted(Upstream(proxy.url, "box-token", "r")) as front:
        for _ in range(3):
            delta = check_grammar(await front.stream())
        assert delta["usage"]["output_tokens"] == 2
        async with front.ask("/health", "GET") as response:
            health = await response.json()
    assert [replace(one, prompt_s=0.0) for one in front.usage] == [Usage("r", "main", 10, 2, 6)] * 3
    assert all(0 <= one.prompt_s < 5 for one in front.usage)
    assert (health["status"], health["keeper"], health["box"]["context"]) == ("healthy", {"pid": 7}, 4096)


# --- when the box is not there ---


@asynchronous
async def test_while_the_box_is_away_the_state_is_told_and_when_to_come_back() -> None:
    async with fronted(Away("connecting", "the tunnel is being opened", 7)) as front:
        async with front.ask("/v1/messages", body=STREAM) as response:
            message = assert_error(response.status, await response.json(), 529, "overloaded_error")
            assert response.headers["retry-after"] == "7"
        assert message == "the box is connecting: the tunnel is being opened"
        async with front.ask("/health", "GET") as response:
            assert response.status == 200
            health = await response.json()
    assert health["status"] == "degraded"
    assert health["keeper"] == {"pid": 7}
    assert health["box"] == {"status": "away", "state": "connecting", "reason": "the tunnel is being opened"}


@asynchronous
async def test_a_refused_connection_is_overloaded_with_a_short_wait() -> None:
    async with fronted(Upstream("http://127.0.0.1:1", "t", "rental-1")) as front:
        async with front.ask("/v1/messages", body=HI) as response:
            message = assert_error(response.status, await response.json(), 529, "overloaded_error")
            assert int(response.headers["retry-after"]) <= 15
        assert "rental-1" in message
        async with front.ask("/health", "GET") as response:
            assert (await response.json())["box"]["status"] == "away"


@pytest.mark.parametrize("warm", [False, True])
@asynchronous
async def test_a_connection_that_drops_before_the_answer_is_tried_once_more(warm: bool) -> None:
    box = Box()
    async with before(box) as front:
        if warm:
            async with front.ask("/v1/models", "GET"):
                pass
        box.drop = 1
        async with front.ask("/v1/messages", body=HI) as response:
            assert response.status == 200
        box.drop, before_it = 2, len(box.seen)
        async with front.ask("/v1/messages", body=HI) as response:
            assert_error(response.status, await response.json(), 529, "overloaded_error")
        assert len(box.seen) == before_it + 2


@pytest.mark.parametrize("end", ["die", b""], ids=["torn", "clean"])
@asynchronous
async def test_a_stream_that_breaks_ends_in_an_error_event_and_no_half_event(end: Any) -> None:
    half = wire("content_block_delta", index=0, delta={"type": "text_delta", "text": "never whole"})[:-20]
    async with before(Box(answer=playing(started(), *text("Hel"), half, end))) as front:
        events = await front.stream()
    assert texts(events) == "Hel"
    assert types(events)[-1] == "error"
    assert events[-1]["error"]["type"] == "api_error"


@asynchronous
async def test_a_stream_that_breaks_before_its_start_is_worth_another_try() -> None:
    async with before(Box(answer=playing(sse.PING, "die"))) as front:
        events = await front.stream()
    assert types(events) == ["ping", "error"]
    assert events[-1]["error"]["type"] == "overloaded_error"


@asynccontextmanager
async def reconnecting(first: Box, second: Box) -> AsyncIterator[Front]:
    """Who asks for the way gets the first box, then hears a few times that it is away, and then gets the second."""

    async with serving(first.application()) as one, serving(second.application()) as other:
        ways: list[Upstream | Away] = [Upstream(one, "t", "rental-1")]
        ways += [Away("reconnecting", "the connection is lost")] * 3
        later = Upstream(other, "t", "rental-1")
        async with fronted(lambda: ways.pop(0) if ways else later) as front:
            yield front


@asynchronous
async def test_a_stream_that_came_to_nothing_is_asked_for_once_more_on_the_next_connection() -> None:
    first, second = Box(answer=playing(sse.PING, b"event: mess", "die")), Box(answer=playing(*HELLO))
    async with reconnecting(first, second) as front:
        events = await front.stream()
    assert types(events)[0] == "ping"
    assert "error" not in types(events)
    assert texts(events) == "Hello there"
    assert types(events)[-1] == "message_stop"
    assert [json.loads(box.seen[0][3]) for box in (first, second)] == [STREAM, STREAM]
    assert (len(first.seen), len(second.seen)) == (1, 1)
    assert [usage.output_tokens for usage in front.usage] == [7]


@asynchronous
async def test_a_request_without_an_answer_is_sent_once_more_on_the_next_connection() -> None:
    first, second = Box(drop=2), Box()
    async with reconnecting(first, second) as front, front.ask("/v1/messages", body=HI) as response:
        assert response.status == 200
    assert len(second.seen) == 1


@asynchronous
async def test_a_stream_that_comes_to_nothing_twice_ends_in_an_error_event() -> None:
    heard = asyncio.Event()  # what breaks at once may lose its ping
    first, second = Box(answer=playing(sse.PING, "die")), Box(answer=playing(sse.PING, heard, "die"))
    async with reconnecting(first, second) as front, front.ask("/v1/messages", body=STREAM) as response:
        events = streamed(response.content.iter_any())
        assert [(await anext(events))["type"] for _ in range(2)] == ["ping", "ping"]
        heard.set()
        [error] = [event async for event in events]
    assert error["error"]["type"] == "overloaded_error"
    assert (len(first.seen), len(second.seen)) == (1, 1)


@asynchronous
async def test_while_the_next_connection_is_waited_for_the_client_hears_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "PING_EVERY", 0.02)
    slow = asyncio.Event()

    async def late(http: web.Request) -> web.StreamResponse:
        await slow.wait()
        whole: web.StreamResponse = await playing(*HELLO)(http)
        return whole

    way = reconnecting(Box(answer=playing("die")), Box(answer=late))
    async with way as front, front.ask("/v1/messages", body=STREAM) as response:
        events = streamed(response.content.iter_any())
        assert [(await anext(events))["type"] for _ in range(20)] == ["ping"] * 20
        slow.set()
        rest = [event async for event in events]
    assert types(rest)[-1] == "message_stop"
    assert "error" not in types(rest)


@asynchronous
async def test_a_connection_that_stays_is_not_waited_for_as_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "BACK_S", 60.0)
    async with asyncio.timeout(20), before(Box(answer=playing(sse.PING, "die"))) as front:
        assert types(await front.stream())[-1] == "error"


@asynchronous
async def test_what_the_next_connection_refuses_is_an_error_event_and_no_text_in_the_stream() -> None:
    async def refused(http: web.Request) -> web.Response:
        return web.json_response({"type": "error", "error": "no room"}, status=400)

    way = reconnecting(Box(answer=playing(sse.PING, "die")), Box(answer=refused))
    async with way as front, front.ask("/v1/messages", body=STREAM) as response:
        said = await response.content.read()
    assert b"no room" not in said
    assert said.count(b"event: error") == 1
    assert b"it answers 400 now" in said


@pytest.mark.parametrize("begun", [[], [started(), *text("Hel")]], ids=["nothing", "some"])
@asynchronous
async def test_a_box_that_falls_silent_in_a_stream_is_told(begun: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "SILENT_S", 0.2)
    async with before(Box(answer=playing(sse.PING, *begun, asyncio.Event()))) as front:
        events = await front.stream()
    assert texts(events) == ("Hel" if begun else "")
    assert events[-1]["error"]["message"].endswith("nothing came for 0 s")


@asynchronous
async def test_an_event_that_does_not_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "MAX_EVENT", 2**20)
    endless = playing(started(), b"event: content_block_delta\ndata: ", *[bytes(2**16)] * 40, asyncio.Event())
    async with before(Box(answer=endless)) as front:
        events = await front.stream()
    assert "an event of more than 1 MB" in events[-1]["error"]["message"]


@asynchronous
async def test_no_more_than_a_little_is_read_of_a_boxs_health() -> None:
    async def talkative(http: web.Request) -> web.Response:
        return web.json_response({"status": "healthy", "more": "x" * 100_000})

    async with before(Box(answer=talkative)) as front, front.ask("/health", "GET") as response:
        assert (await response.json())["box"]["reason"] == "it says more than 65536 bytes"


@asynchronous
async def test_only_a_request_for_an_answer_waits_for_the_next_connection() -> None:
    first, second = Box(drop=9), Box()
    async with reconnecting(first, second) as front, front.ask("/v1/models", "GET") as response:
        assert_error(response.status, await response.json(), 529, "overloaded_error")
    assert second.seen == []


@asynchronous
async def test_what_had_begun_is_never_asked_for_again() -> None:
    first, second = Box(answer=playing(started(), *text("Hel"), "die")), Box(answer=playing(*HELLO))
    async with reconnecting(first, second) as front:
        events = await front.stream()
    assert texts(events) == "Hel"
    assert types(events)[-1] == "error"
    assert second.seen == []


@asynchronous
async def test_a_body_that_breaks_is_never_taken_for_whole() -> None:
    async def torn(http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "100"})
        await response.prepare(http)
        await response.write(b'{"usage"')
        assert http.transport
        http.transport.close()
        return response

    async with before(Box(answer=torn)) as front:
        with pytest.raises(aiohttp.ClientError):
            async with front.ask("/v1/messages", body=HI) as response:
                await response.read()


# --- what is its own ---


@asynchronous
async def test_the_token_is_asked_for_everywhere_but_for_liveness_and_the_proof() -> None:
    box = Box()
    async with before(box) as front:
        for path in ("/health", "/v1/messages", "/selfhost/double", "/anything"):
            async with front.session.post(front.url + path, headers={"x-api-key": "box-token"}) as response:
                assert_error(response.status, await response.json(), 401, "authentication_error")
        for path in ("/", "/api/hello"):
            async with front.session.head(front.url + path) as response:
                assert response.status == 200
    assert box.seen == []


@asynchronous
async def test_the_listener_proves_that_it_knows_the_token_on_this_very_port() -> None:
    async with fronted(Away("off", "")) as front:
        nonce, port = "ab" * 16, front.url.rpartition(":")[2]
        async with front.session.post(front.url + "/selfhost/prove", json={"nonce": nonce}) as response:
            proof = (await response.json())["proof"]
        message = f"selfhost-prove\n{nonce}\n{port}".encode()
        assert proof == hmac.new(FRONT.encode(), message, hashlib.sha256).hexdigest()
        for odd in ("", "xyz", 5, "AB" * 16, "a" * 500, f"{nonce}\n1"):
            async with front.session.post(front.url + "/selfhost/prove", json={"nonce": odd}) as response:
                assert_error(response.status, await response.json(), 400, "invalid_request_error")


@asynchronous
async def test_control_commands_are_served_by_name_and_never_relayed() -> None:
    box = Box()
    async with before(box) as front:
        async with front.ask("/selfhost/double", body={"n": 4}) as response:
            assert await response.json() == {"n": 8}
        async with front.ask("/selfhost/double") as response:
            assert assert_error(response.status, await response.json(), 400, "invalid_request_error") == "n is missing"
        async with front.ask("/selfhost/refuse", body={}) as response:
            assert response.status == 409
        for method, path in (("POST", "/selfhost/unknown"), ("GET", "/selfhost/double"), ("POST", "/selfhost/a/b")):
            async with front.ask(path, method, body={}) as response:
                assert_error(response.status, await response.json(), 404, "not_found_error")
    assert box.seen == []
