"""Errors as Anthropic's API words them: every failure leaves as one of these objects, as a status or as an event."""

from __future__ import annotations

import random
from typing import Any

OVERLOADED = "overloaded_error"
API_ERROR = "api_error"
INVALID = "invalid_request_error"


class ProxyError(Exception):
    """An answer that is an error. `kind` is Anthropic's error type; `retry_after` in seconds.

    Claude Code gives up at once on a retry-after above 60, so it never is. `origin`: the status of the engine whose
    error it was, 0 where it was none.
    """

    origin = 0

    def __init__(
        self, status: int, kind: str, message: str, *, retry_after: int | None = None, final: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.retry_after = None if retry_after is None else max(1, min(retry_after, 60))
        self.final = final

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.final:
            headers["x-should-retry"] = "false"
        return headers

    def body(self, request_id: str) -> dict[str, Any]:
        return error_object(self.kind, self.message, request_id)


class EngineDown(ProxyError):
    """The engine did not take the request; the same request may work in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(529, OVERLOADED, message, retry_after=retry_after)


class EngineLoading(EngineDown):
    """The engine is up and loads its model: all that it takes is to wait."""


class EngineBroke(ProxyError):
    """The engine took the request and did not finish the answer."""

    def __init__(self, message: str) -> None:
        super().__init__(500, API_ERROR, message)


class EmptyAnswer(ProxyError):
    """The engine ended its turn without delivering anything. Final, because asking again gives the same."""

    def __init__(self, tokens: int) -> None:
        super().__init__(
            400, API_ERROR, f"the model generated {tokens} tokens but no text and no tool call", final=True
        )


def invalid(message: str) -> ProxyError:
    """400: asking again without a change cannot help."""
    return ProxyError(400, INVALID, message)


def too_long(prompt: int, limit: int) -> ProxyError:
    """400 in the words by which Claude Code recognises that it has to compact. Both in tokens."""
    return invalid(f"prompt is too long: {prompt} tokens > {min(limit, prompt - 1)} maximum")


def too_large(limit: int) -> ProxyError:
    return ProxyError(413, "request_too_large", f"the request is larger than {limit // 2**20} MB")


def unauthorized() -> ProxyError:
    """401, final: Claude Code would otherwise try a wrong token for three minutes."""
    return ProxyError(401, "authentication_error", "the token is missing or wrong", final=True)


def not_found(what: str) -> ProxyError:
    return ProxyError(404, "not_found_error", f"no such thing here: {what}")


def overloaded(message: str, retry_after: int) -> ProxyError:
    return ProxyError(529, OVERLOADED, message, retry_after=retry_after)


def error_object(kind: str, message: str, request_id: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def reason_of(error: Exception) -> str:
    """Many of the network's have no words."""
    return str(error) or type(error).__name__


def new_id(prefix: str) -> str:
    """All that it has to be is unique."""
    return f"{prefix}_{random.getrandbits(96):024x}"
