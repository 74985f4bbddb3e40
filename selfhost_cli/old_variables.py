"""What became of the variables that the system before this one was set up with: one table, for commands and docs.

On the way of every `selfhost claude`: the standard library only, and no value is ever kept or told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Now(StrEnum):
    """What one of them means today."""

    USED = "used"
    AT_CHOICE = "used at choice"
    IGNORED = "ignored"
    CONFLICT = "conflict"


@dataclass(frozen=True)
class Variable:
    """A variable of the old system: what it was, what it means now, and what to do instead ("" when nothing)."""

    name: str
    was: str
    now: Now
    instead: str


_CACHE = "where the cache of answers is, once `cache_store` is redis; `redis_url` beats it"
TABLE = (
    Variable("REDIS_HOST", "where Redis was", Now.AT_CHOICE, _CACHE),
    Variable("REDIS_PORT", "its port", Now.AT_CHOICE, _CACHE),
    Variable("REDIS_PASSWORD", "its password", Now.AT_CHOICE, _CACHE),
    Variable("REDIS_URL", "host, port and password of Redis in one", Now.AT_CHOICE, _CACHE),
    Variable("CACHE_TTL", "seconds until an answer in the cache was too old", Now.IGNORED, "set `cache_ttl`, in hours"),
    Variable("MODEL_NAME", "the model to serve", Now.IGNORED, "set `model`, or pass `selfhost up --model`"),
    Variable(
        "ANTHROPIC_MODEL",
        "the model that Claude Code asks for",
        Now.CONFLICT,
        "set `model`; `selfhost claude` sets this variable to what the box serves",
    ),
    Variable("API_PORT", "the local port of the proxy", Now.IGNORED, "set `port`, or pass `selfhost up --port`"),
    Variable(
        "OLLAMA_HOST",
        "which Ollama was asked",
        Now.IGNORED,
        "nothing replaces it: each box has an Ollama of its own, which only its proxy reaches",
    ),
    Variable(
        "CEREBRAS_API_KEY",
        "the key of a hosted backend",
        Now.AT_CHOICE,
        "the key of backend `cerebras`, once `selfhost backends add cerebras` has made it",
    ),
    Variable(
        "VAST_API_KEY",
        "the key of the account at vast.ai",
        Now.USED,
        "serves as `api_key`, unless SELFHOST_API_KEY or SELFHOST_MARKET_URL is set",
    ),
    Variable(
        "ANTHROPIC_BASE_URL",
        "where Claude Code sends its requests",
        Now.CONFLICT,
        "`selfhost claude` replaces it; a plain `claude` goes there: unset it, or take what `selfhost env` prints",
    ),
)
DOTENV = ".env"
HERE = Path()
FILE = Variable(
    DOTENV,
    "a file with these variables, in the working directory",
    Now.IGNORED,
    "`selfhost config set` writes config.toml",
)
LARGEST = 1 << 16
"""Bytes of such a file that are looked at."""
MEMORY = "old_variables.json"


@dataclass(frozen=True)
class Found:
    """One of them that is set; `where` is "environment", or "working directory" for the file."""

    variable: Variable
    where: str


def found(env: Mapping[str, str], state: Path, folder: Path = HERE) -> tuple[Found, ...]:
    """Those that are set here, the file last; but not what `selfhost env` printed, by the token that `state` holds."""
    token = env.get("ANTHROPIC_AUTH_TOKEN")
    from_us = bool(token) and token == _token(state)
    here = [
        Found(variable, "environment")
        for variable in TABLE
        if env.get(variable.name) and not (from_us and variable.name.startswith("ANTHROPIC_"))
    ]
    if _names_any(folder / DOTENV):
        here.append(Found(FILE, "working directory"))
    return tuple(here)


def remark(env: Mapping[str, str], state: Path, folder: Path = HERE) -> str:
    """What to say of those that do nothing, "" for nothing. Each is told once; the directory `state` remembers it."""
    news = [one for one in found(env, state, folder) if one.variable.now not in (Now.USED, Now.AT_CHOICE)]
    told = _told(state) if news else []
    names = [one.variable.name for one in news if one.variable.name not in told]
    if not names:
        return ""
    _remember(state, [*told, *names])
    are = "are" if len(names) > 1 else "is"
    return f"{_and(names)} {are} not used: `selfhost config show` tells what is, instead"


def _names_any(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would keep us waiting
            return False
        with path.open("rb") as file:
            text = file.read(LARGEST).decode(errors="replace")
    except OSError:
        return False
    import re

    names = "|".join(variable.name for variable in TABLE)
    return bool(re.search(rf"^\s*(export\s+)?({names})\s*=\s*\S", text, re.MULTILINE))


def _token(state: Path) -> str | None:
    try:
        return (state / "front.token").read_text().strip()
    except (OSError, ValueError):
        return None


def _told(state: Path) -> list[str]:
    try:
        names = json.loads((state / MEMORY).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _remember(state: Path, names: Sequence[str]) -> None:
    draft = state / f"{MEMORY}.{os.getpid()}"
    try:
        draft.write_text(json.dumps(names))
        draft.replace(state / MEMORY)
    except OSError:
        pass  # told again next time


def _and(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
