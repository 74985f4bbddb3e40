"""Tasks -> results, a few at a time, each asked again while that may help."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from selfhost_cli.attach import Front
from selfhost_cli.batch.journal import Result
from selfhost_cli.batch.tasks import Task
from selfhost_cli.errors import plain

CLASS = "batch"
SILENT_S = 60.0
"""The front pings in every silence."""
ATTEMPTS = 5
PASSING = frozenset({408, 429, 500, 502, 503, 504, 529})
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
Sleep = Callable[[float], Awaitable[None]]


class _Failed(Exception):
    """`again_s`: seconds after which asking again may help; None when it cannot."""

    def __init__(self, why: str, again_s: float | None) -> None:
        super().__init__(why)
        self.again_s = again_s


@asynccontextmanager
async def connected(front: Front, wish: str) -> AsyncIterator[httpx.AsyncClient]:
    """`wish`: what the user asks of the cache, in the words of Cache-Control."""
    headers = {"Authorization": f"Bearer {front.token}", "x-claude-code-request-class": CLASS}
    if wish:
        headers["cache-control"] = wish
    limits = httpx.Limits(max_connections=None)
    # plain http on loopback: no proxy of the environment's, no certificates
    async with httpx.AsyncClient(
        base_url=front.url, headers=headers, timeout=SILENT_S, limits=limits, trust_env=False, verify=False
    ) as http:
        yield http


async def run(
    http: httpx.AsyncClient,
    tasks: Sequence[Task],
    *,
    model: str,
    max_tokens: int,
    at_once: int,
    keep: Callable[[Result], None],
    sleep: Sleep = asyncio.sleep,
) -> None:
    """`keep` gets each result as it comes, in whatever order; what it raises ends the batch."""
    waiting = iter(tasks)

    async def work() -> None:
        for task in waiting:
            keep(await _answered(http, task, model, max_tokens, sleep))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(tasks))):
                group.create_task(work())
    except ExceptionGroup as several:
        raise several.exceptions[0] from several


async def _answered(http: httpx.AsyncClient, task: Task, model: str, max_tokens: int, sleep: Sleep) -> Result:
    began, attempt, wait = time.monotonic(), 0, FIRST_WAIT_S
    body = {"model": model, "max_tokens": task.max_tokens or max_tokens, "stream": True}
    body |= {"messages": [{"role": "user", "content": task.prompt}]} | ({"system": task.system} if task.system else {})
    while True:
        attempt += 1
        try:
            text, stop, usage = await _asked(http, body)
        except _Failed as failed:
            if failed.again_s is None or attempt == ATTEMPTS:
                seconds = time.monotonic() - began
                return Result(task.id, task.digest, error=str(failed), seconds=seconds, attempts=attempt)
            await sleep(max(failed.again_s, wait))
            wait = min(2 * wait, LONGEST_WAIT_S)
            continue
        cached = _count(usage, "cache_read_input_tokens")
        new = _count(usage, "input_tokens") + _count(usage, "cache_creation_input_tokens")
        output = _count(usage, "output_tokens")
        seconds = time.monotonic() - began
        return Result(task.id, task.digest, text, stop, "", new + cached, cached, output, seconds, attempt)


async def _asked(http: httpx.AsyncClient, body: Mapping[str, Any]) -> tuple[str, str, Mapping[str, Any]]:
    """Text, why it ended, and usage. Raises _Failed."""
    said: list[str] = []
    stop = ""
    usage: dict[str, Any] = {}
    try:
        async with http.stream("POST", "/v1/messages", json=dict(body)) as response:
            if response.status_code != 200:
                await response.aread()
                again = _retry_after(response) if response.status_code in PASSING else None
                raise _Failed(f"{response.status_code}: {_message(response)}", again)
            async for line in response.aiter_lines():
                match _event(line):
                    case {"type": "content_block_delta", "delta": {"type": "text_delta", "text": str(text)}}:
                        said.append(text)
                    case {"type": "message_start", "message": {"usage": dict(counted)}}:
                        usage |= counted
                    case {"type": "message_delta", "delta": {"stop_reason": str(found)}, "usage": dict(counted)}:
                        stop = found
                        usage |= counted
                    case {"type": "error", "error": {"message": str(message)}}:
                        raise _Failed(f"it broke off: {plain(message)}", 0.0)
    except httpx.HTTPError as error:
        raise _Failed(f"it broke off: {error or type(error).__name__}", 0.0) from error
    if not stop:
        raise _Failed("it ended in the middle", 0.0)
    # An engine may cut a character in two halves of UTF-16, and only whole ones can be written down.
    whole = "".join(said).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole, stop, usage


def _event(line: str) -> Any:
    if not line.startswith("data:"):
        return None
    try:
        return json.loads(line.removeprefix("data:"))
    except ValueError:
        return None  # a stranger's machine may say anything


def _retry_after(response: httpx.Response) -> float:
    told = response.headers.get("retry-after", "")
    return min(float(told), LONGEST_WAIT_S) if told.isdecimal() else 0.0


def _message(response: httpx.Response) -> str:
    try:
        return plain(str(response.json()["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return plain(response.text[:200])


def _count(usage: Mapping[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and value > 0 else 0
