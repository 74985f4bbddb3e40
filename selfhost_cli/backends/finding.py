"""What kind of server answers at an address, and what it serves: asked without a key, on the user's own word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from selfhost_cli.errors import SelfhostError

LOOK_S = 5.0


@dataclass(frozen=True)
class Server:
    """`engine` as in `Backend.engine`; `models` by the names that it knows."""

    engine: str
    models: tuple[str, ...]


def look(url: str) -> Server:
    """Raises SelfhostError when nothing that we know answers there."""
    with httpx.Client(timeout=LOOK_S, follow_redirects=False) as client:
        if models := _asked(client, f"{url}/api/tags", "models"):
            return Server("ollama", tuple(str(one.get("name")) for one in models))
        models = _asked(client, f"{url}/v1/models", "data")
        if models is None:
            raise SelfhostError(
                f"no server that is known answers at {url}: neither Ollama, llama.cpp nor what speaks OpenAI's dialect",
                "Start it, or check the address; --kind and --engine say what it is without a look.",
            )
        names = tuple(str(one.get("id")) for one in models)
        own = any(one.get("owned_by") == "llamacpp" for one in models)
        return Server("llamacpp" if own else "openai", names)


def _asked(client: httpx.Client, url: str, key: str) -> list[dict[str, Any]] | None:
    """The list under that key; None when there is none."""
    try:
        answer = client.get(url).json()
    except (httpx.HTTPError, ValueError):
        return None
    found = answer.get(key) if isinstance(answer, dict) else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else None
