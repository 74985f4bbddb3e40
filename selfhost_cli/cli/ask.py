"""`selfhost ask`: one plain question to the box's model, without tools and without Claude Code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from selfhost_cli.attach import Front
from selfhost_cli.claude import cache_wish
from selfhost_cli.cli import launch, render
from selfhost_cli.cli.words import say
from selfhost_cli.config import Settings
from selfhost_cli.errors import SelfhostError, UsageError, plain

CLASS = "ask"
HELP = "`selfhost doctor` looks for the reason."
SILENT_S = 60.0
"""The front pings in every silence."""


@dataclass(frozen=True)
class Answered:
    """`cache`: hit, miss or bypass, with a reason behind a semicolon."""

    text: str
    stop_reason: str
    cache: str
    usage: dict[str, Any]


def run(settings: Settings, words: list[str], *, max_tokens: int, as_json: bool) -> None:
    """Print the answer as it comes. Raises NotSetUp, MayBeBilling, UsageError, and SelfhostError for an error of the
    box."""
    question = " ".join(words) if words else _piped()
    serving = launch.serving(settings, then="asking all the same")
    messages = [{"role": "user", "content": question}]
    body = {"model": serving.model, "max_tokens": max_tokens, "stream": True, "messages": messages}
    answered = _asked(serving.front, body, quiet=as_json)
    if as_json:
        render.as_json(answered)
    if answered.stop_reason == "max_tokens":
        say(f"selfhost: the answer was cut at {max_tokens} tokens; --max-tokens takes more")


def _piped() -> str:
    """The question from stdin, when that is no terminal. Raises UsageError."""
    text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().strip()
    if not text:
        raise UsageError(
            "there is no question", 'Write it behind the command, such as selfhost ask "why is the sky blue?"'
        )
    return text


def _asked(front: Front, body: dict[str, Any], *, quiet: bool) -> Answered:
    headers = {"Authorization": f"Bearer {front.token}", "x-claude-code-request-class": CLASS}
    if wish := cache_wish(os.environ):
        headers["cache-control"] = wish
    timeout = httpx.Timeout(SILENT_S)
    # plain http on loopback: no proxy of the environment's, no certificates
    with httpx.Client(timeout=timeout, trust_env=False, verify=False) as client:
        try:
            with client.stream("POST", f"{front.url}/v1/messages", json=body, headers=headers) as response:
                if response.status_code != 200:
                    response.read()
                    raise SelfhostError(f"the box answers {response.status_code}: {_message(response)}", HELP)
                return _told(response, quiet=quiet)
        except httpx.HTTPError as error:
            raise SelfhostError(f"the answer broke off: {error or type(error).__name__}", HELP) from error


def _told(response: httpx.Response, *, quiet: bool) -> Answered:
    said, reason, usage = [], "", {}
    for event in _events(response):
        match event:
            case {"type": "content_block_delta", "delta": {"type": "text_delta", "text": str(text)}}:
                said.append(text)
                if not quiet:
                    print(plain(text), end="", flush=True)
            case {"type": "message_delta", "delta": {"stop_reason": str(found)}, "usage": dict(counted)}:
                reason, usage = found, counted
            case {"type": "error", "error": {"message": str(message)}}:
                if said and not quiet:
                    print()
                raise SelfhostError(f"the answer broke off: {plain(message)}", HELP)
    if not quiet:
        print()
    return Answered("".join(said), reason, response.headers.get("x-selfhost-cache", ""), usage)


def _events(response: httpx.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line.startswith("data:"):
            try:
                yield json.loads(line.removeprefix("data:"))
            except ValueError:
                continue  # a stranger's machine may say anything


def _message(response: httpx.Response) -> str:
    try:
        return plain(str(response.json()["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return plain(response.text[:200])
