"""Between a call and its answer: rate limits, outages, answers that are lost or odd. What faults do to any call."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import web

from selfhost_cli.sandbox.faults import Faults
from selfhost_cli.sandbox.timeline import Timeline

Answering = Callable[[web.Request], Awaitable[web.StreamResponse]]

INTERVALS: Mapping[str, tuple[int, float]] = {
    "search": (10, 60.0),
    "create": (1, 4.5),
    "list": (1, 1.0),
    "show": (1, 2.0),
    "change": (1, 1.0),
    "destroy": (1, 3.0),
    "attach": (1, 1.0),
    "keys": (1, 1.0),
    "charges": (1, 1.0),
}
"""What the market documents per call and key: so many in so many seconds (August 2026)."""
PENALTIES: Mapping[str, float] = {"create": 12.0}
"""Seconds of silence after a call that came too early."""

_PAGE = "<html><head><title>{0} {1}</title></head><body><center><h1>{0} {1}</h1></center></body></html>\n"
_LOOK_S = 0.02


def reply(body: Any, status: int = 200, **headers: str) -> web.Response:
    """JSON whose Content-Type has no charset: vast's command line insists on that."""
    text = json.dumps(body).encode()
    return web.Response(body=text, status=status, headers=headers, content_type="application/json")


class Answers:
    """Lets every call pass, unless a fault is set for it."""

    def __init__(self, faults: Faults, clock: Timeline) -> None:
        self._faults = faults
        self._clock = clock
        self._asked: dict[tuple[str, str], deque[float]] = {}
        self._silent_until: dict[tuple[str, str], float] = {}

    async def answer(
        self, call: str, offer: int | None, request: web.Request, handler: Answering
    ) -> web.StreamResponse:
        """What the client gets for `call`, which is about this offer."""
        await request.read()  # now: afterwards the connection may be gone
        down = self._faults.holding("market_down")
        if down is not None and self._clock() < down.since + down.options["seconds"]:
            return await _lost(request, down.options["how"])
        if self._faults.holding("rate_intervals") and (interval := self._too_early(call, request)):
            return _limited("plain", None, interval)
        limit = self._faults.take("rate_limited", offer=offer, call=call)
        if limit is not None:
            return _limited(limit["form"], limit["retry_after"], INTERVALS.get(call, (1, 1.0))[1])
        lost = self._faults.take("answer_lost", offer=offer, call=call)
        if lost is not None and not lost["effect"]:
            return await _lost(request, lost["how"])
        response = await handler(request)
        if lost is not None:
            return await _lost(request, lost["how"], response)
        odd = self._faults.take("odd_answer", offer=offer, call=call)
        return _odd(odd["shape"], response) if odd is not None else response

    def _too_early(self, call: str, request: web.Request) -> float | None:
        """The seconds within which this call was made too often; None when it may be answered."""
        if call not in INTERVALS:
            return None
        most, seconds = INTERVALS[call]
        caller = (call, request.headers.get("Authorization", ""))
        asked = self._asked.setdefault(caller, deque(maxlen=most))
        now = self._clock()
        if now < self._silent_until.get(caller, 0.0) or (len(asked) == most and now - asked[0] < seconds):
            self._silent_until[caller] = now + PENALTIES.get(call, 0.0)
            return seconds
        asked.append(now)
        return None


def _limited(form: str, retry_after: float | None, threshold: float) -> web.Response:
    headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
    text = f"API requests too frequent: endpoint threshold={threshold:g}"
    match form:
        case "plain":
            return web.Response(text=text, status=429, headers=headers)
        case "detail":
            return reply({"detail": text}, 429, **headers)
        case "quota":
            body = {"success": False, "error": "search_quota_exceeded", "msg": "Daily search quota exceeded"}
            return reply(body, 429, **headers, **{"X-RateLimit-Reset": "1800000000"})
        case _:
            return reply({"success": False, "error": "rate_limit_exceeded", "msg": text}, 429, **headers)


async def _lost(request: web.Request, how: str, answer: web.StreamResponse | None = None) -> web.StreamResponse:
    """Instead of `answer`: an error page, half of it, a connection that closes, or silence until the client leaves."""
    if how.isdigit():
        page = _PAGE.format(how, HTTPStatus(int(how)).phrase)
        return web.Response(status=int(how), text=page, content_type="text/html")
    transport = request.transport
    if how == "hang":
        while transport is not None and not transport.is_closing():
            await asyncio.sleep(_LOOK_S)
    if how == "cut":
        await _half(request, answer)
    if transport is not None:
        transport.abort()
    return web.Response()


async def _half(request: web.Request, answer: web.StreamResponse | None) -> None:
    body = answer.body if isinstance(answer, web.Response) and isinstance(answer.body, bytes) else b'{"success": true}'
    half = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(body))})
    await half.prepare(request)
    await half.write(body[: len(body) // 2])


def _odd(shape: str, answer: web.StreamResponse) -> web.StreamResponse:
    """What a client must not take for an answer. The last ones are about the list, and leave other bodies alone."""
    match shape:
        case "null":
            return reply(None)
        case "empty":
            return reply({})
        case "html":
            return web.Response(text="<html><body>We will be back soon.</body></html>", content_type="text/html")
        case "unsuccessful":
            return reply({"success": False, "msg": "Something went wrong."})
        case "refusal":
            return reply({"success": False, "instances": [], "instances_found": 0, "next_token": None})
        case "endless":
            return reply({"success": True, "instances": [], "instances_found": 0, "next_token": "again"})
    body = json.loads(answer.body) if isinstance(answer, web.Response) and isinstance(answer.body, bytes) else None
    if not isinstance(body, dict) or not isinstance(body.get("instances"), list):
        return answer
    match shape:
        case "no_rows":
            body["instances"] = None
        case "hollow":
            body["instances"] = []
        case "bad_row":
            body["instances"].append({"label": "selfhost-", "actual_status": "running"})
        case "no_token":
            del body["next_token"]
    return reply(body)
