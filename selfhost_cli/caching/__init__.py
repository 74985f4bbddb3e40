"""Settings -> the parts of the cache of answers: for the keeper, which uses it, and for commands that look into it.

What each part needs is loaded where it is made: `status` only counts.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from selfhost_cli import config
from selfhost_cli.config import Settings
from selfhost_cli.errors import UsageError
from selfhost_cli.model import Saved

if TYPE_CHECKING:
    from selfhost_cli.proxy.cache.cache import Cache
    from selfhost_cli.proxy.cache.counters import Count, Counters
    from selfhost_cli.proxy.cache.seal import Seal
    from selfhost_cli.proxy.cache.semantic.decide import Semantic
    from selfhost_cli.proxy.cache.stores import Store

Key = TypeVar("Key")
Value = TypeVar("Value")
HOUR_S = 3600.0
MB = 2**20
DIGITS = 64
"""Hexadecimal ones, of a key."""
WHERE = "Set `redis_url`, or REDIS_URL, or REDIS_HOST; or set `cache_store` to local."


def cache(settings: Settings, env: Mapping[str, str], rental: Callable[[], str]) -> Cache | None:
    """All of it, None when it is switched off. Raises UsageError for settings that cannot be."""
    from selfhost_cli.proxy.cache.cache import Cache
    from selfhost_cli.proxy.cache.counters import Counters
    from selfhost_cli.proxy.cache.rules import Rules

    if not settings.cache_enabled:
        return None
    rules = Rules(
        untempered=settings.cache_untempered,
        tempered=settings.cache_tempered,
        ttl=settings.cache_ttl * HOUR_S,
        ttl_by_class={name: hours * HOUR_S for name, hours in config.lifetimes(settings.cache_ttl_by_class).items()},
    )
    counters = Counters(settings.paths.counters)
    similar = _similar(settings, counters.note)
    return Cache(store(settings, env), seal(settings), scope(settings), rules, counters, rental, similar)


def store(settings: Settings, env: Mapping[str, str]) -> Store:
    """Where the answers are. Raises UsageError, without a password in it."""
    if settings.cache_store == "local":
        from selfhost_cli.proxy.cache.stores.local import LocalStore

        return LocalStore(settings.paths.answers, round(settings.cache_size * MB))
    from selfhost_cli.proxy.cache.stores import address
    from selfhost_cli.proxy.cache.stores.shared import SharedStore

    tls = {"on": True, "off": False}.get(settings.redis_tls)
    how: dict[str, Any] = {"tls": tls, "ca": settings.redis_ca, "cluster": settings.redis_cluster}
    try:
        url = settings.redis_url
        place = address.parse(url, **how) if url else address.from_variables(env, **how)
    except ValueError as error:
        raise UsageError(str(error), WHERE) from None
    if place is None:
        raise UsageError("`cache_store` is redis, and nothing says where that is", WHERE)
    return SharedStore(place, timeout=settings.redis_timeout / 1000)


def _similar(settings: Settings, note: Callable[[str], None]) -> Semantic | None:
    """What finds questions that were put in other words, when it is asked for. Raises UsageError without its extra."""
    if settings.cache_semantic == "off":
        return None
    try:
        from selfhost_cli.proxy.cache.semantic.decide import Semantic
        from selfhost_cli.proxy.cache.semantic.index import Index
        from selfhost_cli.proxy.cache.semantic.minilm import MiniLM

        embedder = MiniLM()
    except ImportError as error:
        raise UsageError(str(error), "Or run `selfhost config set cache_semantic off`.") from error
    index = Index(embedder.name, settings.paths.questions, seal(settings))
    return Semantic(embedder, index, "on" if settings.cache_semantic == "on" else "shadow", note)


def scope(settings: Settings) -> str:
    """Whose answers these are: this installation's, unless a team has given them a name."""
    return settings.cache_scope or config.installation_id(settings.paths)


def seal(settings: Settings) -> Seal:
    from selfhost_cli.proxy.cache.seal import Seal

    return Seal(bytes.fromhex(sealing_key(settings)))


def sealing_key(settings: Settings) -> str:
    """64 hexadecimal digits, made at first use. Raises UsageError for a file that holds something else."""
    if settings.cache_key:
        return settings.cache_key
    path = settings.paths.cache_key
    text = config.made_once(path, lambda: secrets.token_hex(DIGITS // 2))
    if len(text) != DIGITS or not set(text) <= set("0123456789abcdef"):
        raise UsageError(
            f"{path} does not hold a key of the cache", "Delete it: another one is made, and what was kept is lost."
        )
    return text


def counts(settings: Settings) -> dict[tuple[str, str], Count]:
    """What was counted, by a rental's label and a class of request; nothing where nothing is known."""
    return _read(settings, lambda counters: counters.totals())


def notes(settings: Settings) -> dict[str, int]:
    """What became of the questions for which similar ones were looked for."""
    return _read(settings, lambda counters: counters.noted())


def _read(settings: Settings, ask: Callable[[Counters], Awaitable[dict[Key, Value]]]) -> dict[Key, Value]:
    from selfhost_cli.proxy.cache.counters import Counters

    async def read() -> dict[Key, Value]:
        counters = Counters(settings.paths.counters)
        try:
            return await ask(counters)
        finally:
            await counters.close()

    return asyncio.run(read()) if settings.paths.counters.exists() else {}


def saved(settings: Settings) -> dict[str, Saved]:
    """What was answered from the cache, by the label of the rental that was there."""
    totals: dict[str, Saved] = {}
    for (label, _), one in counts(settings).items():
        if one.hits:
            this = Saved(one.hits, one.input_tokens, one.output_tokens, one.gpu_seconds)
            totals[label] = totals[label] + this if label in totals else this
    return totals
