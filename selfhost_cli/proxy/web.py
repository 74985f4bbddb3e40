"""What both roles need of HTTP: token, errors, one log line per request, how to be hosted."""

from __future__ import annotations

import asyncio
import hmac
import io
import logging
import re
import time
import zlib
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from selfhost_cli.proxy import sse
from selfhost_cli.proxy.contract import Json
from selfhost_cli.proxy.errors import (
    INVALID,
    ProxyError,
    invalid,
    new_id,
    not_found,
    too_large,
    unauthorized,
)

MAX_BODY = 32 * 2**20
BODY_S = 300.0
"""So long may a body take to come."""
MAX_HEAD, MAX_HEADERS = 32 * 2**10, 100
"""Bytes and number of a request's headers. Claude Code sends about thirty, and 2 KB."""
HEAD_S = 75.0
"""So long may a connection go without a whole head: at its start, or after an answer. The front leaves after 60."""
HOME = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE | re.ASCII)
PING_EVERY = 5.0
UNREAD_S = 300.0
"""So long may a client leave unread what is written to it; then it is cut off, because it holds a slot."""
MOST_PENDING = 2**14
"""Bytes of events that are written in the next moment; more than that only a slow reader leaves."""
PUBLIC = frozenset({"/", "/api/hello"})
MAIN = "main"
AUXILIARY = "auxiliary"
ASK = "ask"
CLASSES = frozenset({MAIN, "subagent", "workflow", "compaction", AUXILIARY, "side_reply", ASK})
"""What Claude Code knows, and `selfhost ask`."""

Moment = Literal["began", "queued", "turn", "heard", "first", "done"]
"""Of a request: came, waited for a slot, got it, the engine's first output, the client's first, the engine's end."""

log = logging.getLogger("selfhost.proxy")
_TRACE: ContextVar[Trace] = ContextVar("trace")


@dataclass
class Trace:
    """What the log says of one request. Never any of its text."""

    id: str = field(default_factory=lambda: new_id("req"))
    cls: str = "other"
    outcome: str = ""
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    repaired: int = 0
    notes: tuple[str, ...] = ()
    """What of the request was left out, without its text."""
    moments: dict[Moment, float] = field(default_factory=lambda: {"began": time.monotonic()})

    def mark(self, moment: Moment) -> None:
        """It is now, unless it was before."""
        if moment not in self.moments:
            self.moments[moment] = time.monotonic()

    def seconds(self, since: Moment, until: Moment) -> float | None:
        """Between the two; None when one of them never came."""
        if since in self.moments and until in self.moments:
            return self.moments[until] - self.moments[since]
        return None

    def line(self, http: web.Request, status: int) -> str:
        times = {
            "wait": self.seconds("queued", "turn"),
            "first": self.seconds("began", "first"),
            "total": time.monotonic() - self.moments["began"],
        }
        return " ".join(
            [
                f"id={self.id} {http.method} {http.path!r} class={self.cls} status={status}",
                f"outcome={self.outcome or 'ok'}",
                f"in={self.input_tokens} cached={self.cached_tokens} out={self.output_tokens}",
                *([f"repaired={self.repaired}"] if self.repaired else []),
                *(f"{name}={value:.3f}" for name, value in times.items() if value is not None),
                *([f"left_out={self.notes}"] if self.notes else []),
            ]
        )


def trace() -> Trace:
    """Of the request that this task serves."""
    return _TRACE.get()


def is_probe(http: web.Request) -> bool:
    """Asked by ourselves (health, prewarming), not by a client."""
    return http.headers.get("x-selfhost-probe") == "1"


def request_class(http: web.Request) -> str:
    """What Claude Code says that the request is for: main, subagent, compaction, auxiliary, …"""
    if is_probe(http):
        return "probe"
    name = http.headers.get("x-claude-code-request-class", MAIN)
    return name if name in CLASSES else "other"


def application(
    token: str, public: frozenset[str] = PUBLIC, observe: Callable[[Trace], None] | None = None
) -> web.Application:
    """An empty one that checks the token, words every failure as Anthropic's, and logs.

    `observe` gets every request when it has ended.
    """
    return web.Application(middlewares=[_gate(token, public, observe)], client_max_size=MAX_BODY)


def runner(app: web.Application) -> web.AppRunner:
    """How either role has to be hosted: handlers are cancelled when their client is gone.

    aiohttp would answer a body that is not compressed as its head says in plain text, or by hanging up; and large heads
    in plain text, where its limits are not above ours.
    """
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=2,
        auto_decompress=False,
        keepalive_timeout=HEAD_S,
        max_line_size=4 * MAX_HEAD,
        max_field_size=4 * MAX_HEAD,
        max_headers=4 * MAX_HEADERS,
    )


async def read_body(http: web.Request) -> bytes:
    """The whole body, unpacked; or ProxyError 400, 408, 413, 415."""
    if (http.content_length or 0) > MAX_BODY:
        raise too_large(MAX_BODY)
    try:
        async with asyncio.timeout(BODY_S):
            body = await http.read()
    except TimeoutError as error:
        raise ProxyError(408, INVALID, f"the body did not come within {BODY_S:g} s") from error
    except web.RequestPayloadError as error:
        raise invalid(f"the body cannot be read: {error}") from error
    match http.headers.get("content-encoding", "identity").strip().lower():
        case "identity" | "":
            return body
        case "gzip" | "x-gzip" | "deflate" as encoding:
            return _unpacked(encoding, body)
        case encoding:
            raise ProxyError(415, INVALID, f"content-encoding {encoding!r} is not known here; gzip and deflate are")


def _unpacked(encoding: str, body: bytes) -> bytes:
    either = zlib.MAX_WBITS | 32  # the header says which of the two it is
    try:
        unpacker = zlib.decompressobj(either)
        unpacked = unpacker.decompress(body, MAX_BODY)
    except zlib.error as error:
        raise invalid(f"the body is not what its content-encoding says ({encoding})") from error
    if unpacker.unconsumed_tail:
        raise too_large(MAX_BODY)
    if not unpacker.eof:
        raise invalid(f"the body breaks off in the middle of its content-encoding ({encoding})")
    if unpacker.unused_data:
        raise invalid(f"the body goes on behind the end of its content-encoding ({encoding})")
    return unpacked


def upload(body: bytes | None) -> bytes | io.BytesIO | None:
    """A body as aiohttp's client takes it best: it warns of bytes over 1 MB, and sends less in one piece."""
    return io.BytesIO(body) if body and len(body) > 2**20 else body or None


class EventStream:
    """A 200 of server-sent events whose headers leave at once, with a ping in every silence.

    Events that come in one go leave in one piece: a write each would cost more than all the rest. Use as an async
    context manager; a client that is gone shows as ConnectionError, a slow one as a `send` that waits.
    """

    def __init__(self, http: web.Request, ping_every: float = PING_EVERY) -> None:
        self._http = http
        self._every = ping_every
        self._loop = asyncio.get_running_loop()
        self._pending = bytearray()
        self._writing: asyncio.Task[None] | None = None
        self._gone: ConnectionError | None = None
        self.response = web.StreamResponse(
            headers={
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "request-id": trace().id,
            }
        )

    async def __aenter__(self) -> EventStream:
        await self.response.prepare(self._http)
        self._written = self._loop.time()
        self._silence = self._loop.call_later(self._every, self._ping)
        return self

    async def __aexit__(self, failed: object, *_: object) -> None:
        self._silence.cancel()
        if not failed:
            last, self._pending = self._pending, bytearray()
            unread = self._loop.call_later(UNREAD_S, self._cut_off)
            try:
                await self._room()
                await self.response.write_eof(bytes(last))
            finally:
                unread.cancel()
        elif self._writing:
            self._writing.cancel()

    async def send(self, event: Json) -> None:
        if self._gone:
            raise self._gone
        self._put(sse.encode(event))
        if len(self._pending) > MOST_PENDING:
            await self._room()

    def _put(self, data: bytes) -> None:
        """It is written in the next moment, with what else comes until then."""
        self._pending += data
        if self._writing is None or self._writing.done():
            self._writing = self._loop.create_task(self._write())

    async def _room(self) -> None:
        """What is pending has been written."""
        if self._writing:
            await self._writing
        if self._gone:
            raise self._gone

    async def _write(self) -> None:
        try:
            while self._pending:
                data, self._pending = self._pending, bytearray()
                await self.response.write(data)
                self._written = self._loop.time()
        except ConnectionError as error:
            self._gone = error

    def _ping(self) -> None:
        left = self._written + self._every - self._loop.time()
        if left <= 0:
            left = self._every
            if not self._pending:
                self._put(sse.PING)
            if self._loop.time() - self._written > UNREAD_S:
                self._cut_off()
        self._silence = self._loop.call_later(left, self._ping)

    def _cut_off(self) -> None:
        if self._http.transport:
            self._http.transport.abort()


def _gate(token: str, public: frozenset[str], observe: Callable[[Trace], None] | None) -> Middleware:
    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        traced = Trace()
        _TRACE.set(traced)
        status = 499
        try:
            _check_head(request)
            if request.path not in public and not _knows(token, request):
                raise unauthorized()
            response = await handler(request)
            status = response.status
            return response
        except (ProxyError, web.HTTPException) as error:
            failure = error if isinstance(error, ProxyError) else _worded(error, request)
            status, traced.outcome = failure.status, traced.outcome or failure.kind
            return _answer(failure, traced)
        except asyncio.CancelledError:
            traced.outcome = "client gone"
            raise
        except ConnectionError as error:
            traced.outcome = "client gone"
            raise asyncio.CancelledError from error  # which aiohttp takes for what it is, without a traceback
        except Exception:
            log.exception("id=%s a bug of ours", traced.id)
            status, traced.outcome = 500, "bug"
            return _answer(ProxyError(500, "api_error", "the proxy failed; its log says why"), traced)
        finally:
            # who watches asks every other second, and the log is kept
            quiet = status == 200 and (request.path == "/health" or request.path.startswith("/selfhost/"))
            log.log(logging.DEBUG if quiet else logging.INFO, "%s", traced.line(request, status))
            if observe:
                observe(traced)

    return gate


def _check_head(http: web.Request) -> None:
    """Raises ProxyError 431 and 403: no name but loopback's own can be asked for without a trick of the network's.

    A page of the web that has its own name lead to this machine sends that name.
    """
    size = len(http.raw_path) + sum(len(name) + len(value) for name, value in http.raw_headers)
    if size > MAX_HEAD or len(http.raw_headers) > MAX_HEADERS:
        limit = f"{MAX_HEAD // 2**10} KB and {MAX_HEADERS} headers"
        raise ProxyError(431, INVALID, f"the head of the request is larger than {limit}")
    for host in http.headers.getall("host", ()):
        if not HOME.fullmatch(host):
            raise ProxyError(403, "permission_error", f"127.0.0.1 and localhost are served here, not {host[:100]!r}")


def _knows(token: str, http: web.Request) -> bool:
    authorization = http.headers.get("authorization", "")
    scheme, _, bearer = authorization.partition(" ")
    offered = [http.headers.get("x-api-key", "")] + ([bearer.strip()] if scheme.lower() == "bearer" else [])
    wanted = token.encode()
    return any(hmac.compare_digest(one.encode("utf-8", "surrogateescape"), wanted) for one in offered)


def _worded(error: web.HTTPException, http: web.Request) -> ProxyError:
    match error.status:
        case 404:
            return not_found(http.path)
        case 413:
            return too_large(MAX_BODY)
        case 405:
            return ProxyError(405, INVALID, f"{http.method} is not possible on {http.path}")
    return ProxyError(error.status, INVALID, error.reason)


def _answer(error: ProxyError, trace: Trace) -> web.Response:
    return web.json_response(
        error.body(trace.id), status=error.status, headers=error.headers | {"request-id": trace.id}
    )
