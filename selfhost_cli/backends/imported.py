"""The old system's one file, `.llmrc.json`: its backends become ours, its keys go where keys belong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selfhost_cli import backends
from selfhost_cli.backends import Backend, Kind
from selfhost_cli.errors import UsageError

NAMES = {"self-hosted": "self-hosted", "vast-ai": backends.VAST, "runpod": "runpod", "cerebras": "cerebras"}
"""What the old system called its backends -> what they are here."""
LARGEST = 1 << 20


@dataclass(frozen=True)
class Found:
    """A backend of the file, with its key; or why it is left out."""

    name: str
    backend: Backend | None = None
    key: str = field(default="", repr=False)
    left_out: str = ""


def read(path: Path) -> list[Found]:
    """What the file has. Raises UsageError for what is no such file, without a word of what it holds."""
    try:
        if path.stat().st_size > LARGEST:
            raise UsageError(f"{path} is too large to be such a file")
        told = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise UsageError(
            f"{path}: {why}", "It is the file that `llm-proxy` kept, .llmrc.json in the home directory."
        ) from None
    entries = told.get("backends", told) if isinstance(told, dict) else None
    if not isinstance(entries, dict):
        raise UsageError(f"{path} holds no backends")
    return [_found(name, entry) for name, entry in entries.items() if isinstance(entry, dict)]


def _found(old: str, entry: Mapping[str, Any]) -> Found:
    name = NAMES.get(old, old)
    if name == backends.VAST:
        return Found(name, left_out="`selfhost up` rents it; its key is the setting `api_key`")
    known = backends.presets()
    url = _text(entry, "url", "baseUrl", "base_url", "endpoint")
    model = _text(entry, "model", "modelName", "model_name")
    try:
        plain = url.startswith("http://")
        start = known.get(name) or Backend(name, Kind.LOCAL if plain else Kind.OPENAI, engine="openai" if plain else "")
        url = backends.address(url or start.url, plain_http=False)
        backend = replace(start, url=url, model=model or start.model, key="file")
    except UsageError as error:
        return Found(name, left_out=error.message)
    if not backend.model:
        return Found(name, left_out="it names no model")
    key = _text(entry, "apiKey", "api_key", "key", "token")
    return Found(name, backend if key else replace(backend, key=""), key)


def _text(entry: Mapping[str, Any], *names: str) -> str:
    return next((value.strip() for name in names if isinstance(value := entry.get(name), str) and value.strip()), "")
