"""An engine that the user gave a name: its errors say which one it is and what to do, and keep their meaning."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

from selfhost_cli.proxy.contract import Request
from selfhost_cli.proxy.engines import AnswerEvent, Engine, Health
from selfhost_cli.proxy.errors import EngineBroke, EngineDown, ProxyError

NOTHING_CAME = "nothing came of it"


class Named:
    """`engine` under the name of a backend."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = engine.name
        self._backend = name
        self._engine = engine

    async def health(self) -> Health:
        with self._named():
            return await self._engine.health()

    async def context(self) -> int:
        with self._named():
            return await self._engine.context()

    async def count(self, request: Request) -> int | None:
        with self._named():
            return await self._engine.count(request)

    def forms(self, request: Request) -> bool:
        return self._engine.forms(request)

    async def messages(self, request: Request) -> AsyncGenerator[AnswerEvent]:
        with self._named():
            async with aclosing(self._engine.messages(request)) as events:
                async for event in events:
                    yield event

    async def save(self, name: str, tokens: int) -> bool:
        return await self._engine.save(name, tokens)

    async def restore(self, name: str) -> bool:
        return await self._engine.restore(name)

    async def close(self) -> None:
        await self._engine.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ProxyError as error:
            raise named(self._backend, error) from error


def named(backend: str, error: ProxyError) -> ProxyError:
    """What an engine said, as the backend's word. What asking again may cure stays what it was."""
    message = f"backend {backend}: {error.message}"
    match error.origin:
        case 401 | 403:
            remedy = f"`selfhost backends key {backend}` gives it another key"
            told = ProxyError(403, "permission_error", f"{message}; {remedy}", final=True)
        case 402:
            told = ProxyError(402, "billing_error", f"{message}; it wants to be paid: {_elsewhere()}", final=True)
        case 404:
            remedy = f"`selfhost backends test {backend}` tells what it serves"
            told = ProxyError(404, "not_found_error", f"{message}; {remedy}", final=True)
        case 429 if isinstance(error, EngineDown):
            told = ProxyError(429, "rate_limit_error", f"{message}; {_elsewhere()}", retry_after=error.retry_after)
        case _ if isinstance(error, EngineDown | EngineBroke):
            error.args, error.message = (message,), f"{message}; {_elsewhere()}"
            return error
        case _:
            told = ProxyError(
                error.status,
                error.kind,
                _length_first(message, error),
                retry_after=error.retry_after,
                final=error.final,
            )
    told.origin = error.origin
    return told


def _elsewhere() -> str:
    return "`selfhost use` shows what else could serve"


def _length_first(message: str, error: ProxyError) -> str:
    """Claude Code compacts by words that it looks for anywhere; the name goes where it does no harm."""
    return message if "too long" not in error.message else error.message
