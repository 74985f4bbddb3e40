"""The doors of both roles: for whom they open, how large and how slow a request may be, and what is behind them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from selfhost_cli.proxy import web as doors
from selfhost_cli.proxy.front import Upstream, build_front
from tests.proxy.kit import TOKEN, LlamaStub, assert_error, asynchronous, proxied, serving

FRONT = "front-token"
ROLES = ("box", "front")


@dataclass
class Recorder(LlamaStub):
    """An engine with an admin API: notes what reaches it beside our own questions."""

    reached: list[str] = field(default_factory=list)

    def application(self) -> web.Application:
        app = super().application()
        app.router.add_route("*", "/{path:.*}", self._any)
        return app

    async def _any(self, http: web.Request) -> web.Response:
        self.reached.append(f"{http.method} {http.raw_path}")
        return web.json_response({"models": ["all of them"]})


@dataclass(frozen=True)
class Door:
    port: int
    token: str

    async def ask(self, method: str, target: str, *headers: str, body: bytes = b"", host: str = "127.0.0.1") -> Answer:
        """As written, byte for byte: a client library would tidy it up."""
        lines = [f"{method} {target} HTTP/1.1", f"host: {host}", f"authorization: Bearer {self.token}"]
        lines += ["connection: close", f"content-length: {len(body)}", *headers, "", ""]
        return await self.send("\r\n".join(lines).encode() + body)

    async def send(self, data: bytes, *, whole: bool = True) -> Answer:
        """Until the other side hangs up, or only to the end of an error."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            async with asyncio.timeout(10):
                if whole:
                    return Answer(await reader.read())
                return Answer(await reader.readuntil(b'"request_id"') + await reader.readuntil(b"}"))
        finally:
            writer.close()
            try:
                await writer.wait_closed()
            except ConnectionError:
                pass  # hung up before it had read everything


@dataclass(frozen=True)
class Answer:
    data: bytes

    @property
    def status(self) -> int:
        return int(self.data.split()[1])

    @property
    def head(self) -> str:
        return self.data.partition(b"\r\n\r\n")[0].decode().lower()

    @property
    def json(self) -> Any:
        return json.loads(self.data.partition(b"\r\n\r\n")[2])


@asynccontextmanager
async def opened(role: str, run: Path, engine: LlamaStub | None = None) -> AsyncIterator[Door]:
    """The door of a proxy on a box, or that of a front with such a proxy behind it."""
    async with proxied(engine or LlamaStub(), run) as proxy:
        if role == "box":
            yield Door(int(proxy.url.rpartition(":")[2]), TOKEN)
            return
        app = build_front(FRONT, lambda: Upstream(proxy.url, TOKEN, "r"), dict, lambda usage: None, {})
        async with serving(app) as url:
            yield Door(int(url.rpartition(":")[2]), FRONT)


# --- a name of the web that leads to this machine ---


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("path", ["/", "/api/hello", "/health", "/v1/models", "/selfhost/prove"])
@asynchronous
async def test_who_asks_for_another_name_than_this_machines_gets_nothing(tmp_path: Path, role: str, path: str) -> None:
    async with opened(role, tmp_path) as door:
        for host in (
            "evil.example",
            "evil.example:8001",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "10.0.0.1",
        ):
            answer = await door.ask("GET", path, host=host)
            assert_error(answer.status, answer.json, 403, "permission_error")
        twice = await door.ask("GET", path, "host: evil.example")
        assert 400 <= twice.status < 500


@pytest.mark.parametrize("role", ROLES)
@asynchronous
async def test_this_machine_is_known_by_its_own_names(tmp_path: Path, role: str) -> None:
    async with opened(role, tmp_path) as door:
        for host in ("127.0.0.1", "127.0.0.1:8001", "localhost", "LOCALHOST:1", "[::1]", "[::1]:8001"):
            assert (await door.ask("GET", "/v1/models", host=host)).status == 200


@pytest.mark.parametrize("role", ROLES)
@asynchronous
async def test_no_page_of_the_web_is_told_that_it_may_read_an_answer(tmp_path: Path, role: str) -> None:
    async with opened(role, tmp_path) as door:
        for method in ("GET", "OPTIONS"):
            for path in ("/", "/v1/models"):
                answer = await door.ask(method, path, "origin: https://evil.example")
                assert "access-control-" not in answer.head


# --- size ---


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("/v1/models", ["x-long: " + "a" * 40_000]),
        ("/v1/models", [f"x-{n}: a" for n in range(doors.MAX_HEADERS)]),
        ("/v1/models", [f"x-{n}: " + "a" * 5_000 for n in range(8)]),
        ("/v1/" + "a" * 40_000, []),
    ],
    ids=["a long one", "many", "together", "the path"],
)
@asynchronous
async def test_a_head_over_the_limit_is_refused_in_anthropics_words(
    tmp_path: Path, role: str, target: str, headers: list[str]
) -> None:
    async with opened(role, tmp_path) as door:
        answer = await door.ask("GET", target, *headers)
        message = assert_error(answer.status, answer.json, 431, "invalid_request_error")
        assert "32 KB and 100 headers" in message
        assert (await door.ask("GET", "/v1/models", "x-long: " + "a" * 20_000)).status == 200


@pytest.mark.parametrize("role", ROLES)
@asynchronous
async def test_a_head_beyond_all_measure_is_refused_too(tmp_path: Path, role: str) -> None:
    async with opened(role, tmp_path) as door:
        assert (await door.ask("GET", "/v1/models", "x-long: " + "a" * 200_000)).status == 400
        assert (await door.ask("GET", "/v1/models", *[f"x-{n}: a" for n in range(500)])).status in (400, 431)
        answer = await door.ask("GET", "/v1/models", *[f"x-{n}: a" for n in range(300)])
        assert_error(answer.status, answer.json, 431, "invalid_request_error")


# --- slowness ---


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("half", [b"", b"GET /v1/mo", b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: "])
@asynchronous
async def test_half_a_head_is_not_waited_for_without_end(
    tmp_path: Path, role: str, half: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "HEAD_S", 0.2)
    async with opened(role, tmp_path) as door:
        assert (await door.send(half)).data == b""


@pytest.mark.parametrize("role", ROLES)
@asynchronous
async def test_a_head_that_drips_is_not_waited_for_either(
    tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "HEAD_S", 0.3)
    async with opened(role, tmp_path) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        dripped = 0
        while not reader.at_eof() and dripped < 200:
            try:
                writer.write(b"G" if not dripped else b"E")
                await writer.drain()
            except ConnectionError:
                break
            dripped += 1
            await asyncio.sleep(0.02)
        writer.close()
    assert dripped < 200, "it would go on for ever"


@pytest.mark.parametrize("role", ROLES)
@asynchronous
async def test_a_body_that_does_not_come_is_given_up(
    tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "BODY_S", 0.2)
    async with opened(role, tmp_path) as door:
        head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {door.token}\r\n"
        answer = await door.send(f"{head}content-length: 100\r\n\r\n{{".encode(), whole=False)
        assert_error(answer.status, answer.json, 408, "invalid_request_error")


# --- what is behind them ---

OLLAMAS = [
    "api/tags",
    "api/ps",
    "api/version",
    "api/show",
    "api/pull",
    "api/push",
    "api/create",
    "api/copy",
    "api/delete",
]
OLLAMAS += ["api/generate", "api/chat", "api/embed", "api/embeddings", "api/blobs/sha256:00", "api/me", "api/signout"]
LLAMACPPS = [
    "slots",
    "slots/0?action=save",
    "slots/0?action=erase",
    "props",
    "lora-adapters",
    "models/load",
    "models/unload",
]
LLAMACPPS += ["completion", "completions", "infill", "embedding", "tokenize", "detokenize", "apply-template", "rerank"]
OPENAIS = ["v1/chat/completions", "v1/completions", "v1/embeddings", "v1/responses", "v1/audio/speech", "models"]
CRAFTED = ["v1/../api/tags", "v1/messages/../../api/tags", "/api/tags", "%61pi/tags", "v1/%2e%2e/slots", "./slots"]
CRAFTED += [
    "v1/models/../../slots",
    "v1/models/%2e%2e%2f%2e%2e%2fslots",
    "v1/messages;/../../props",
    "\\api\\tags",
    "?/slots",
]


@pytest.mark.parametrize("role", ROLES)
@asynchronous
async def test_the_engines_own_api_cannot_be_reached_with_any_token(tmp_path: Path, role: str) -> None:
    engine = Recorder()
    async with opened(role, tmp_path, engine) as door:
        for path in [*OLLAMAS, *LLAMACPPS, *OPENAIS, *CRAFTED]:
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
                answer = await door.ask(method, f"/{path}", body=b"{}")
                hello = method == "GET" and path == "?/slots"
                assert answer.status == 200 if hello else answer.status in (400, 404, 405), (method, path)
                assert b"all of them" not in answer.data
    assert engine.reached == []
    assert engine.asked == []


@pytest.mark.parametrize("role", ROLES)
@asynchronous
async def test_a_token_takes_as_long_to_refuse_wherever_it_is_wrong(
    tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by what compares: a stopwatch would have to be luckier than a test may be."""
    compared: list[tuple[bytes, bytes]] = []
    real = doors.hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(doors.hmac, "compare_digest", compare)
    async with opened(role, tmp_path) as door:
        for wrong in ("x", door.token[:-1] + "x", door.token + "x"):
            assert (await Door(door.port, wrong).ask("GET", "/v1/models")).status == 401
            assert (wrong.encode(), door.token.encode()) in compared
