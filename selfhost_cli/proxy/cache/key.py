"""Which requests are one and the same: the name under which the answer to a request is kept.

Two share a name when the engine would see the same prompt, the same sampling and the same tools, and what serves them
is the same. What varies from call to call without meaning (metadata, cache_control, attribution, whether it streams,
the ids of tool calls) is not in it. The order of keys in what passes through as it is (schemas, inputs of calls) is,
because a prompt shows them in that order.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass, replace

from selfhost_cli.proxy.codec import encode
from selfhost_cli.proxy.contract import Json, Request

SCHEMA = 1
"""Of names and of what is kept under them. A new one makes everything that was kept a miss."""


@dataclass(frozen=True)
class Served:
    """What answers: the engine's name, the model's, the digest of its weights, and the version of the proxy, which
    decides how a request becomes a prompt."""

    engine: str
    model: str
    digest: str
    version: str


def digest(request: Request, served: Served) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(encode([*astuple(served), _canonical(request)])).hexdigest()


def question(request: Request, served: Served) -> tuple[str, str] | None:
    """What a plain question is: everything but its text, as 64 hexadecimal digits, and the text.

    None for whatever is more than that: a conversation, tools, pictures, a form of the answer.
    """
    match request.messages:
        case [{"role": "user", "content": [{"type": "text", "text": str(text)}]}]:
            if request.tools or request.deferred or request.schema is not None:
                return None
            return digest(replace(request, messages=[]), served), text
    return None


def prefix(scope: str) -> str:
    """What the names of a scope begin with."""
    return f"selfhost:{SCHEMA}:{scope}:"


def _canonical(request: Request) -> Json:
    return {
        "system": request.system,
        "tools": request.tools,
        "deferred": request.deferred,
        "messages": _without_ids(request.messages),
        "force_tool": request.force_tool,
        "max_tokens": request.max_tokens,
        # 1 and 1.0 are the same to an engine
        "sampling": {key: float(value) if type(value) is int else value for key, value in request.sampling.items()},
        "thinking": request.thinking,
        "effort": request.effort,
        "schema": request.schema,
    }


def _without_ids(messages: list[Json]) -> list[Json]:
    """Every id by the order in which it first came: which result belongs to which call stays what it was."""
    known: dict[str, int] = {}
    return [message | {"content": [_numbered(block, known) for block in message["content"]]} for message in messages]


def _numbered(block: Json, known: dict[str, int]) -> Json:
    for name in ("id", "tool_use_id"):
        if name in block:
            return block | {name: known.setdefault(block[name], len(known))}
    return block
