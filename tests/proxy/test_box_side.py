"""The engine side beside the answers: token, errors, health, and what the watchdog reads."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import logging
import os
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.proxy.web import MAX_BODY
from tests.proxy.kit import (
    AUTH,
    HELLO,
    HI,
    READ,
    STREAM,
    TOKEN,
    LlamaStub,
    as_body,
    assert_error,
    asynchronous,
    check_grammar,
    eventually,
    proxied,
)
from tests.proxy.ollama_stub import OllamaStub, said


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong"}, {"authorization": "Bearer"}, {"authorization": TOKEN}])
@asynchronous
async def test_without_the_token_nothing_is_answered_and_no_retry_invited(tmp_path: Path, headers: Any) -> None:
    stub = LlamaStub()
    async with proxied(stub, tmp_path) as proxy:
        for method, path in (("POST", "/v1/messages"), ("GET", "/health"), ("GET", "/v1/models"), ("GET", "/nothing")):
            async with proxy.session.request(method, proxy.url + path, headers=headers, data=b"{}") as response:
                assert_error(response.status, await response.json(), 401, "authentication_error")
                assert response.headers["x-should-retry"] == "false"
    assert stub.asked == []
    assert not (tmp_path / "activity").exists()


@pytest.mark.parametrize(
    "headers", [AUTH, {"x-api-key": TOKEN}, {"authorization": f"bearer {TOKEN}", "x-api-key": "the user's own"}]
)
@asynchronous
async def test_the_token_is_taken_from_either_header(tmp_path: Path, headers: Any) -> None:
    async with (
        proxied(LlamaStub(), tmp_path) as proxy,
        proxy.session.get(proxy.url + "/v1/models", headers=headers) as response,
    ):
        assert response.status == 200


@asynchronous
async def test_liveness_needs_no_token(tmp_path: Path) -> None:
    async with proxied(None, tmp_path) as proxy:
        for method in ("GET", "HEAD"):
            for path in ("/", "/api/hello"):
                async with proxy.session.request(method, proxy.url + path) as response:
                    assert response.status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nothing", 404, "not_found_error"),
        ("POST", "/prefix/v1/messages", 404, "not_found_error"),
        ("GET", "/v1/models/claude-opus", 404, "not_found_error"),
        ("GET", "/v1/messages", 405, "invalid_request_error"),
    ],
)
@asynchronous
async def test_what_is_not_there_is_an_anthropic_error(
    tmp_path: Path, method: str, path: str, status: int, kind: str
) -> None:
    async with (
        proxied(LlamaStub(), tmp_path) as proxy,
        proxy.session.request(method, proxy.url + path, headers=AUTH) as response,
    ):
        assert_error(response.status, await response.json(), status, kind)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'"text"',
        b"{}",
        b'{"messages": NaN}',
        {"messages": []},
        {"messages": "hi"},
        {"messages": ["hi"]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": []}]},
        b'{"messages": ' + b"[" * 100_000,
    ],
)
@asynchronous
async def test_a_body_that_cannot_be_answered_is_a_400(tmp_path: Path, body: Any) -> None:
    stub = LlamaStub()
    async with proxied(stub, tmp_path) as proxy:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            async with proxy.post(body, path) as response:
                assert_error(response.status, await response.json(), 400, "invalid_request_error")
    assert stub.asked == []


@asynchronous
async def test_a_body_over_the_limit_is_a_413_whether_or_not_its_length_is_told(tmp_path: Path) -> None:
    async def endless() -> Any:
        for _ in range(33):
            yield b" " * 2**20

    whole = io.BytesIO(b" " * (33 * 2**20))
    async with proxied(LlamaStub(), tmp_path) as proxy:
        async with proxy.session.post(proxy.url + "/v1/messages", data=whole, headers=AUTH) as response:
            assert_error(response.status, await response.json(), 413, "request_too_large")
        async with proxy.session.post(f"{proxy.url}/v1/messages", data=endless(), headers=AUTH) as response:
            assert_error(response.status, await response.json(), 413, "request_too_large")


PACKED = gzip.compress(json.dumps(HI).encode())


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", PACKED, 200),
        ("Deflate", zlib.compress(json.dumps(HI).encode()), 200),
        ("identity", json.dumps(HI).encode(), 200),
        ("gzip", json.dumps(HI).encode(), 400),
        ("gzip", PACKED[:-9], 400),
        ("gzip", b"", 400),
        ("gzip", PACKED + b"junk", 400),
        ("gzip", gzip.compress(as_body(HI)[:9]) + gzip.compress(as_body(HI)[9:]), 400),
        ("gzip", gzip.compress(b" " * (MAX_BODY + 1)), 413),
        ("br", json.dumps(HI).encode(), 415),
    ],
    ids=["gzip", "deflate", "identity", "no gzip", "cut", "empty", "junk behind", "two", "too large", "brotli"],
)
def test_a_packed_body_is_unpacked_or_refused_in_anthropics_words(
    tmp_path: Path, encoding: str, body: bytes, status: int
) -> None:
    @asynchronous
    async def ask() -> None:
        async with proxied(LlamaStub(), tmp_path) as proxy:
            answered, message, _ = await proxy.answer(body, **{"content-encoding": encoding})
        assert (answered, message["type"]) == (status, "message" if status == 200 else "error")

    ask()


@asynchronous
async def test_counting_is_the_engines_own(tmp_path: Path) -> None:
    async with (
        proxied(LlamaStub(tokens=1234), tmp_path) as proxy,
        proxy.post(HI, "/v1/messages/count_tokens?beta=true") as response,
    ):
        assert await response.json() == {"input_tokens": 1234}


@asynchronous
async def test_an_engine_that_cannot_count_is_guessed_for_and_the_answer_says_so(tmp_path: Path) -> None:
    text = "word " * 1000
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": text}]}
    async with proxied(OllamaStub(script=said("yes", prompt=1001)), tmp_path) as proxy:

        async def count() -> Any:
            async with proxy.post(body, "/v1/messages/count_tokens") as response:
                return await response.json()

        first = await count()
        assert first["estimated"] is True
        assert 500 < first["input_tokens"] < 5000
        await proxy.answer(body)
        assert (await count())["input_tokens"] == 1001


@asynchronous
async def test_a_leaked_call_leaves_as_a_call_and_is_counted(tmp_path: Path) -> None:
    leak = ["Let me look.\n\n<func", "tion=Read>\n<parameter=file_path>\n/a\n</para", "meter>\n</function>"]
    schema = {"type": "object", "properties": {"file_path": {"type": "string"}}, "required": ["file_path"]}
    tools = [{"name": "Read", "description": "", "input_schema": schema}]
    async with proxied(OllamaStub(script=said(*leak)), tmp_path) as proxy:
        status, message, _ = await proxy.answer(HI | {"tools": tools})
        async with proxy.get("/health") as response:
            repaired = (await response.json())["usage"]["repaired_calls"]
    assert (status, message["stop_reason"], repaired) == (200, "tool_use", 1)
    said_, call = message["content"]
    assert said_["text"].strip() == "Let me look."
    assert (call["name"], call["input"]) == ("Read", {"file_path": "/a"})


@asynchronous
async def test_models_names_the_one_that_is_served(tmp_path: Path) -> None:
    async with proxied(LlamaStub(), tmp_path) as proxy:
        async with proxy.get("/v1/models?limit=1000") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["tiny"]
        async with proxy.get("/v1/models/tiny") as response:
            assert (await response.json())["type"] == "model"


@asynchronous
async def test_health_tells_the_context_and_what_was_used(tmp_path: Path) -> None:
    async with proxied(LlamaStub(n_ctx=8192), tmp_path) as proxy:
        await proxy.stream()
        await proxy.answer()
        async with proxy.get("/health") as response:
            health = await response.json()
    assert response.status == 200
    assert {key: health[key] for key in ("status", "version", "engine", "model", "context")} == {
        "status": "healthy",
        "version": "0.0",
        "engine": "llamacpp",
        "model": "tiny",
        "context": 8192,
    }
    assert {name: part["status"] for name, part in health["components"].items()} == {
        "proxy": "healthy",
        "llamacpp": "healthy",
    }
    assert health["usage"] == {"requests": 2, "input_tokens": 40, "output_tokens": 14, "repaired_calls": 0}
    assert health["tokens_per_s"] == round(14 / 60, 1)
    assert health["requests"] == {"running": 0, "waiting": 0}


@asynchronous
async def test_health_is_degraded_and_a_503_while_the_engine_is_down(tmp_path: Path) -> None:
    async with proxied(None, tmp_path) as proxy, proxy.get("/health") as response:
        health = await response.json()
    assert (response.status, health["status"], health["context"]) == (503, "degraded", None)
    assert "still starting" in health["components"]["llamacpp"]["reason"]


@asynchronous
async def test_health_tells_what_the_watchdog_measured(tmp_path: Path) -> None:
    watch = tmp_path / "watch"
    async with proxied(LlamaStub(), tmp_path) as proxy:

        async def told() -> Any:
            async with proxy.get("/health") as response:
                return (await response.json())["watchdog"]

        assert await told() is None
        watch.write_text("1/2/1/2 3600 4 120 0.4500 idle for 120 s\n")
        os.utime(watch, (time.time() - 60,) * 2)
        found = await told()
        assert 60 <= found.pop("age_s") < 120
        assert found == {"up_s": 3600, "lease_s": 4, "idle_s": 120, "dollars": 0.45}
        watch.write_text("1/2/1/2 3600 4\n")
        assert await told() is None


# --- what the watchdog reads ---


@asynchronous
async def test_ready_appears_when_the_engine_first_answers_and_is_never_moved(tmp_path: Path) -> None:
    async with proxied(None, tmp_path) as proxy, proxy.get("/health"):
        assert not (tmp_path / "ready").exists()
    async with proxied(LlamaStub(), tmp_path):
        await eventually((tmp_path / "ready").exists)
    os.utime(tmp_path / "ready", (1, 1))
    async with proxied(LlamaStub(), tmp_path) as proxy:
        await proxy.stream()
        assert (tmp_path / "ready").stat().st_mtime == 1


@asynchronous
async def test_only_a_clients_messages_are_activity(tmp_path: Path) -> None:
    async with proxied(LlamaStub(), tmp_path) as proxy:
        for path in ("/", "/health", "/v1/models"):
            async with proxy.get(path):
                pass
        async with proxy.post(HI, "/v1/messages/count_tokens"):
            pass
        await proxy.stream(**{"x-selfhost-probe": "1"})
        await proxy.answer(**{"x-selfhost-probe": "1"})
        assert not (tmp_path / "activity").exists()
        await proxy.answer()
        assert (tmp_path / "activity").exists()


@asynchronous
async def test_activity_that_cannot_be_noted_keeps_nobody_from_an_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "activity").symlink_to(tmp_path / "none" / "activity")  # a full disk has no place for it either
    async with proxied(LlamaStub(), tmp_path) as proxy:
        check_grammar(await proxy.stream())
    assert f"{tmp_path / 'activity'}: [Errno 2]" in caplog.text


@pytest.mark.parametrize("body", [STREAM, HI], ids=["stream", "whole"])
@asynchronous
async def test_a_request_that_waits_or_runs_is_activity_all_the_time(tmp_path: Path, body: Any) -> None:
    hold = asyncio.Event()
    stub = LlamaStub([hold, *HELLO])
    activity = tmp_path / "activity"
    async with proxied(stub, tmp_path) as proxy:
        asking = asyncio.create_task(proxy.answer(body) if body is HI else proxy.stream(body))
        await eventually(lambda: stub.running == 1)
        for _ in range(3):
            os.utime(activity, (1, 1))
            await eventually(lambda: activity.stat().st_mtime > 1)
        hold.set()
        await asking
        await asyncio.sleep(0.05)
        os.utime(activity, (1, 1))
        await asyncio.sleep(0.05)
        assert activity.stat().st_mtime == 1


@asynchronous
async def test_the_log_has_one_line_per_request_and_nothing_of_its_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "the launch code is 0000"
    body = {"messages": [{"role": "user", "content": secret}], "system": secret, "stream": True, "tools": [READ]}
    with caplog.at_level(logging.DEBUG, logger="selfhost.proxy"):
        async with proxied(LlamaStub(), tmp_path) as proxy:
            await proxy.stream(body, **{"x-claude-code-request-class": "subagent"})
            await proxy.post(as_body(body)[:-5])
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("id=")]
    assert len(lines) == 2
    assert "class=subagent status=200 outcome=ok in=20 cached=0 out=7" in lines[0]
    assert "status=400 outcome=invalid_request_error" in lines[1]
    assert secret not in caplog.text
    assert "Hello" not in caplog.text
    assert TOKEN not in caplog.text


@asynchronous
async def test_lone_surrogates_reach_the_engine_as_something_it_can_read(tmp_path: Path) -> None:
    stub = LlamaStub()
    body = json.dumps(HI).replace("hi", "\\ud800 hi").encode()
    async with proxied(stub, tmp_path) as proxy:
        status, _, _ = await proxy.answer(body)
    assert status == 200
    assert stub.asked[0]["messages"][0]["content"][0]["text"] == "? hi"
