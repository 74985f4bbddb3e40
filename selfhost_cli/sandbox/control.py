"""What tests and the demo ask and switch, below /control/ under a token of its own.

GET  /control/billed                what is billed now, and what was so far
GET  /control/boxes                 every instance that exists or is being torn down
GET  /control/requests?since=N      what was asked, without keys, from its arrival on   DELETE forgets it
GET, POST, DELETE /control/faults   {"fault": kind, "offer"?: id, "calls"?: n, "skip"?: n, …options}; see faults.py
POST /control/kill                  {"instance": id, "status"?: "offline"}: its host dies now
POST /control/clock                 {"advance"?: s, "stopped"?: bool}: the market's time, not that inside the boxes
POST /control/settings              {"stages"?: {stage: s}, "sshd_first"?, "gap_s"?, "sshd_delay_s"?, "credit"?,
                                    "ollama"?, "real_boxes"?}
POST /control/mirror                {"rate"?, "stall_after"?, "cut_after"?, "cuts"?, "slow_after"?, "slow_rate"?,
                                    "slows"?, "corrupt"?}: absent is off
POST /control/shutdown
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from aiohttp import web

from selfhost_cli.errors import UsageError
from selfhost_cli.sandbox.faults import KINDS, STAGES, Faults
from selfhost_cli.sandbox.instances import Instances, Settings, describe
from selfhost_cli.sandbox.mirror import Mirror, Switches
from selfhost_cli.sandbox.timeline import Timeline

_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL)


class RequestLog:
    """What the SDK and the boxes asked, for tests. No key is kept."""

    def __init__(self, clock: Timeline) -> None:
        self.rows: list[dict[str, Any]] = []
        self._clock = clock

    async def note(self, request: web.Request) -> dict[str, Any]:
        """A new row, whose `status` is None until there is an answer."""
        at = self._clock()
        text = _PRIVATE_KEY.sub("<private key>", await request.text()) if request.body_exists else ""
        headers = dict(request.headers)
        if "Authorization" in headers:
            headers["Authorization"] = headers["Authorization"].partition(" ")[0] + " <key>"
        try:
            body = json.loads(text) if text else None
        except ValueError:
            body = text
        row = {
            "at": at,
            "method": request.method,
            "path": request.path,
            "query": dict(request.query),
            "headers": headers,
            "body": body,
            "status": None,
        }
        self.rows.append(row)
        return row


class Control:
    """Handlers below /control/."""

    def __init__(
        self,
        *,
        token: str,
        instances: Instances,
        faults: Faults,
        settings: Settings,
        mirror: Mirror,
        requests: RequestLog,
        clock: Timeline,
        shutdown: Callable[[], None],
    ) -> None:
        self._token = token
        self._instances = instances
        self._faults = faults
        self._settings = settings
        self._mirror = mirror
        self._requests = requests
        self._clock = clock
        self._shutdown = shutdown

    def routes(self) -> list[web.RouteDef]:
        checked = self._checked
        return [
            web.get("/control/billed", checked(self._billed)),
            web.get("/control/boxes", checked(self._boxes)),
            web.get("/control/requests", checked(self._requested)),
            web.delete("/control/requests", checked(self._forget)),
            web.get("/control/faults", checked(self._list_faults)),
            web.post("/control/faults", checked(self._add_fault)),
            web.delete("/control/faults", checked(self._clear_faults)),
            web.post("/control/kill", checked(self._kill)),
            web.post("/control/clock", checked(self._move_clock)),
            web.post("/control/settings", checked(self._set)),
            web.post("/control/mirror", checked(self._set_mirror)),
            web.post("/control/shutdown", checked(self._end)),
        ]

    def _checked(
        self, handler: Callable[[web.Request], Awaitable[Any]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """The token; UsageError as 400; whatever the handler returns as JSON."""

        async def checked(request: web.Request) -> web.Response:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), self._token.encode()):
                return web.json_response({"error": "the control token is missing or wrong"}, status=401)
            try:
                return web.json_response(await handler(request))
            except (UsageError, TypeError, ValueError) as error:
                remedy = error.remedy if isinstance(error, UsageError) else ""
                return web.json_response({"error": str(error), "remedy": remedy}, status=400)

        return checked

    async def _billed(self, request: web.Request) -> Any:
        now = self._clock()
        rows = []
        for one in self._instances.alive():
            gpu, disk = one.meter.rates
            total = one.bill(now).total
            rows.append({"id": one.id, "label": one.label, "gpu_hour": gpu, "disk_hour": disk, "total": total})
        ever = sum(one.bill(now).total for one in self._instances.ever())
        return {"count": len(rows), "instances": rows, "total": ever}

    async def _boxes(self, request: web.Request) -> Any:
        return [describe(one) for one in self._instances.ever() if one.ended is None or (one.box and one.box.exists())]

    async def _requested(self, request: web.Request) -> Any:
        return self._requests.rows[int(request.query.get("since", "0")) :]

    async def _forget(self, request: web.Request) -> Any:
        self._requests.rows.clear()
        return {}

    async def _list_faults(self, request: web.Request) -> Any:
        return [asdict(fault) for fault in self._faults]

    async def _add_fault(self, request: web.Request) -> Any:
        body = await request.json()
        kind = body.pop("fault", "")
        aim = {name: body.pop(name) for name in ("offer", "calls", "skip") if name in body}
        return asdict(self._faults.add(kind, body, **aim))

    async def _clear_faults(self, request: web.Request) -> Any:
        self._faults.clear()
        return {}

    async def _kill(self, request: web.Request) -> Any:
        body = await request.json()
        instance = self._instances.get(int(body["instance"]))
        if instance is None:
            raise UsageError(f"there is no instance {body['instance']}")
        status = body.get("status", "offline")
        if status not in (statuses := KINDS["host_dies"].choices["status"]):
            raise UsageError(f"there is no status {status!r}", f"one of: {', '.join(statuses)}")
        await self._instances.kill(instance, status)
        return describe(instance)

    async def _move_clock(self, request: web.Request) -> Any:
        body = await request.json()
        if "stopped" in body:
            self._clock.stop(bool(body["stopped"]))
        self._clock.advance(float(body.get("advance", 0.0)))
        for _ in range(20):  # what has woken up acts before the answer
            await asyncio.sleep(0)
        return {"now": self._clock()}

    async def _set(self, request: web.Request) -> Any:
        body = await request.json()
        stages = body.pop("stages", {})
        if not stages.keys() <= set(STAGES):
            raise UsageError(f"stages are {', '.join(STAGES)}")
        for name in body:
            if name not in asdict(self._settings):
                raise UsageError(f"there is no setting {name!r}")
        self._settings.stages |= {name: float(value) for name, value in stages.items()}
        for name, value in body.items():
            setattr(self._settings, name, type(getattr(self._settings, name))(value))
        return asdict(self._settings)

    async def _set_mirror(self, request: web.Request) -> Any:
        self._mirror.switches = Switches(**await request.json())
        return asdict(self._mirror.switches)

    async def _end(self, request: web.Request) -> Any:
        self._shutdown()
        return {}
