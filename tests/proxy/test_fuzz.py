"""Ten thousand malformed bodies: each is answered, or refused as Anthropic's API refuses, and nothing stays behind."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

from tests.proxy.kit import (
    AUTH,
    Json,
    LlamaStub,
    asynchronous,
    check_grammar,
    ended,
    eventually,
    proxied,
    started,
    text,
)
from tests.proxy.ollama_stub import OllamaStub, raw, said

BODIES = 10_000
AT_ONCE = 16
"""Fewer than the queue is long: a full one is no fault of ours."""
PATHS = ("/v1/messages", "/v1/messages/count_tokens")

SCHEMA: Json = {"type": "object", "properties": {"a": {"type": "string", "enum": ["x"]}}, "required": ["a"]}
IMAGE: Json = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
WHOLE: Json = {
    "model": "claude",
    "max_tokens": 50,
    "stream": True,
    "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "look"}, IMAGE]},
        {"role": "system", "content": "it is late"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"a": "x"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no"}, {"type": "tool_reference", "tool_name": "Late"}, IMAGE],
                },
                {"type": "document", "title": "t", "source": {"type": "text", "media_type": "text/plain", "data": "d"}},
                {"type": "text", "text": "go on"},
            ],
        },
    ],
    "tools": [
        {"name": "Read", "description": "reads", "input_schema": SCHEMA},
        {"name": "Late", "description": "later", "input_schema": SCHEMA, "defer_loading": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "tool_choice": {"type": "auto"},
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "stop_sequences": ["</block>"],
    "thinking": {"type": "enabled", "budget_tokens": 2048},
    "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}},
    "metadata": {"user_id": "{}"},
}


# --- what is sent: reproducible, from one seed ---


DEEP = "replaced by something nested deeper than Python could build or write it"
JUNK: list[Callable[[Random], Any]] = [
    lambda dice: dice.choice([None, True, False, "", " ", [], {}, [[]], [{}], [None], {"": None}, {"type": []}]),
    lambda dice: dice.choice([0, -1, 0.5, -0.0, 1e308, -1e308, 5e-324, 2**31, 2**63, -(2**64), 10**400, 10**4299]),
    lambda dice: dice.choice(["\ud800", "a\udfffb", "\x00", "\u202e", "é" * 1000, "</s>", "<tool_call>", "{", "NaN"]),
    lambda dice: dice.choice(["any", "tool", "none", "text", "image", "document", "tool_result", "tool_use"]),
    lambda dice: {"type": dice.choice(["any", "tool", "none", "tool_use", "tool_result", "text", "json_schema"])},
    lambda dice: {dice.choice(["type", "role", "content", "\ud800"]): dice.choice([1, None, "x", ["x"]])},
    lambda dice: DEEP,
]


def nested(dice: Random) -> bytes:
    levels = dice.choice([10, 70, 300, 900, 5000])
    return dice.choice([b"[" * levels + b"]" * levels, b'{"a":' * levels + b"1" + b"}" * levels])


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key of it, however far down."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


VALID = json.dumps(WHOLE).encode()
PLACES = list(places(WHOLE))


def wrong(dice: Random) -> bytes:
    """A request in which some things are not what they should be."""
    body = json.loads(VALID)
    for _ in range(dice.choice([1, 1, 2, 5])):
        container, key = dice.choice(list(places(body)))
        match dice.choice(["replace", "replace", "replace", "remove", "double", "swap"]):
            case "replace":
                container[key] = dice.choice(JUNK)(dice)
            case "remove":
                del container[key]
            case "double" if isinstance(container, list):
                container += container
            case _:
                other, where = dice.choice(PLACES)
                container[key] = json.loads(json.dumps(other[where]))
    return json.dumps(body).encode().replace(json.dumps(DEEP).encode(), nested(dice))


BREAKS: list[Callable[[Random, int], bytes]] = [
    lambda dice, at: b"",
    lambda dice, at: VALID[:at],
    lambda dice, at: VALID[at:],
    lambda dice, at: VALID[:at] + dice.randbytes(dice.randrange(1, 9)) + VALID[at:],
    lambda dice, at: VALID[:at] + dice.choice([b"NaN", b"1e999", b"\\ud800", b"9" * 5000]) + VALID[at + 1 :],
    lambda dice, at: dice.choice([b"[", b'{"a":', b'{"messages":[']) * dice.choice([1, 100, 5000]),
    lambda dice, at: dice.randbytes(at),
    lambda dice, at: VALID.decode().encode(dice.choice(["utf-16", "utf-32", "utf-8-sig"])),
    lambda dice, at: json.dumps(dice.choice(JUNK)(dice)).encode(),
    lambda dice, at: gzip.compress(VALID),
]
"""No JSON any more, mostly."""


def bodies(seed: int, count: int) -> Iterator[bytes]:
    dice = Random(seed)
    for _ in range(count):
        yield dice.choice(BREAKS)(dice, dice.randrange(len(VALID))) if dice.random() < 0.6 else wrong(dice)


# --- what has to come back ---


async def outcome(response: aiohttp.ClientResponse) -> str:
    """What it was, after asserting that it is one of what may be."""
    if response.status != 200:
        error = await response.json()
        assert 400 <= response.status < 500, error
        assert (error.keys(), error["type"]) == ({"type", "error", "request_id"}, "error")
        assert error["error"].keys() == {"type", "message"}
        return f"{response.status} {error['error']['type']}"
    if response.content_type == "text/event-stream":
        lines = (await response.text()).splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        if events[-1]["type"] == "error":
            error = events[-1]["error"]
            # a schema that the stub's answer does not fit
            misfit = error["type"] == "api_error" and "output_config.format" in error["message"]
            assert misfit or error["type"] == "invalid_request_error", error
            return "200 and an error"
        check_grammar(events)
        return "200 stream"
    message = await response.json()
    assert "input_tokens" in message or message["type"] == "message"
    return "200 whole"


def sockets() -> int:
    """How many this process has open."""
    count = 0
    for number in os.listdir("/dev/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
        except OSError:
            pass  # the listing's own, closed by now
    return count


def answering(engine: str) -> LlamaStub:
    """It can do everything, and what it says fits SCHEMA, so that whatever fails is our fault."""
    words = '{"a": ', '"x"}'
    if engine == "llamacpp":
        return LlamaStub(n_ctx=10**9, script=[started(), *text(*words), *ended()])
    capable = ["completion", "tools", "vision", "thinking"]
    return OllamaStub(n_ctx=10**9, capabilities=capable, raw=raw(*words), script=said(*words))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="sockets are counted as Linux shows them")
@pytest.mark.parametrize("engine", ["llamacpp", "ollama"])
@asynchronous
async def test_no_body_makes_us_fail_and_none_leaves_a_task_or_a_socket(tmp_path: Path, engine: str) -> None:
    outcomes: Counter[str] = Counter()
    waiting = bodies(seed=5, count=BODIES // 2)
    async with proxied(answering(engine), tmp_path) as proxy:
        await proxy.answer()
        await proxy.session.close()
        before = asyncio.all_tasks(), sockets()

        async def client(session: aiohttp.ClientSession, path: str) -> None:
            for body in waiting:
                headers = AUTH | {"content-type": "application/json"}
                async with session.post(proxy.url + path, data=body, headers=headers) as response:
                    try:
                        outcomes[await outcome(response)] += 1
                    except Exception as error:
                        error.add_note(f"{path} {response.status} for {body[:2000]!r}")
                        raise

        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as clients:
            for number in range(AT_ONCE):
                clients.create_task(client(session, PATHS[number % 2]))
        await eventually(lambda: asyncio.all_tasks() <= before[0] and sockets() <= before[1], seconds=2)
    assert outcomes.total() == BODIES // 2
    # neither all refused before they were read nor all let through
    assert outcomes["400 invalid_request_error"] > BODIES // 20
    assert outcomes["200 stream"] > BODIES // 50
