"""The market's REST contract, as vast.ai's SDK 1.9 speaks it: every path with and without its trailing slash."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from selfhost_cli.sandbox.answers import Answers, reply
from selfhost_cli.sandbox.catalogue import BadQuery, Catalogue, Row, matcher
from selfhost_cli.sandbox.faults import Faults
from selfhost_cli.sandbox.instances import Instance, Instances, Order
from selfhost_cli.sandbox.timeline import Timeline

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_PAGE = 25
_DAY = 86_400
_ONSTART_BYTES = 4000
_ENTRY_CHARS = 256
_ENV_BYTES = 32 * 1024
_RUNTYPES = {"ssh", "ssh_direct", "ssh_direc", "ssh_proxy", "args", "jupyter", "jupyter_direct", "jupyter_direc"}
_RUNTYPES |= {"jupyter_proxy"}
_LIST_FILTERS = {"actual_status", "gpu_name", "verification", "id", "label"}
_KEY_TYPES = ("ssh-", "ecdsa-", "sk-")
_REFUSALS = {
    "insufficient_credit": "Your account lacks credit; see the billing page.",
    "spend_limit": "This would exceed the hourly spend rate limit of new accounts.",
    "no_ssh_key_for_vm": "Add an SSH key to your account first.",
}


class Refused(Exception):
    """An answer that is not a success, in the market's own words."""

    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"success": False, "error": error, "msg": message}


@dataclass(frozen=True)
class Caller:
    """Who sent a request: the account, or one instance by its own key."""

    instance: int | None = None


class Api:
    """Handlers and the account's state."""

    def __init__(
        self,
        *,
        api_key: str,
        catalogue: Catalogue,
        instances: Instances,
        faults: Faults,
        clock: Timeline,
    ) -> None:
        self._api_key = api_key
        self._catalogue = catalogue
        self._instances = instances
        self._faults = faults
        self._answers = Answers(faults, clock)
        self._clock = clock
        self._keys: dict[int, str] = {}
        self._key_ids = 100
        self._pages: dict[str, frozenset[int]] = {}
        self._logs: dict[str, Instance] = {}

    def routes(self) -> list[web.RouteDef]:
        account, own = self._for_account, self._for_instance
        one = r"/api/v0/instances/{id:\d+}"
        calls = [
            ("POST", "/api/v0/bundles", "search", self._search),
            ("PUT", "/api/v0/search/asks", "search", self._search_new),
            ("GET", "/api/v0/gpu_names/unique", "gpus", self._gpus),
            ("PUT", r"/api/v0/asks/{id:\d+}", "create", account(self._create)),
            ("GET", "/api/v1/instances", "list", account(self._list)),
            ("GET", "/api/v0/instances", "old_list", account(self._old_list)),
            ("GET", one, "show", own(self._show)),
            ("PUT", one, "change", own(self._change)),
            ("DELETE", one, "destroy", own(self._destroy)),
            ("GET", f"{one}/ssh", "attach", account(self._instance_keys)),
            ("POST", f"{one}/ssh", "attach", account(self._attach)),
            ("DELETE", one + r"/ssh/{key:\d+}", "attach", account(self._detach)),
            ("PUT", r"/api/v0/instances/request_logs/{id:\d+}", "logs", account(self._request_logs)),
            ("GET", "/api/v0/ssh", "keys", account(self._account_keys)),
            ("POST", "/api/v0/ssh", "keys", account(self._add_key)),
            ("DELETE", r"/api/v0/ssh/{key:\d+}", "keys", account(self._delete_key)),
            ("GET", "/api/v0/users/current", "account", account(self._user)),
            ("GET", "/api/v0/charges", "charges", account(self._charges)),
        ]
        routes = [
            web.route(method, path + slash, self._called(call, handler))
            for method, path, call, handler in calls
            for slash in ("", "/")
        ]
        return [*routes, web.get("/logs/{name}.log", self._log)]

    def _called(self, call: str, handler: Handler) -> Handler:
        """The handler's answer or refusal, or what the faults that are set make of it."""

        async def refusing(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except Refused as refused:
                return reply(refused.body, refused.status)

        async def answered(request: web.Request) -> web.StreamResponse:
            return await self._answers.answer(call, self._offer(call, request), request, refusing)

        return answered

    def _offer(self, call: str, request: web.Request) -> int | None:
        """The offer that a call is about, or that its instance was rented from."""
        id = request.match_info.get("id")
        if id is None or call == "create":
            return int(id) if id else None
        instance = self._instances.known(int(id))
        return instance.offer["id"] if instance else None

    def _caller(self, request: web.Request) -> Caller:
        header = request.headers.get("Authorization")
        if not header:
            raise Refused(403, "auth_error", "This action requires login.")
        scheme, _, key = header.partition(" ")
        if scheme.lower() == "bearer":
            if secrets.compare_digest(key.encode(), self._api_key.encode()):
                return self._accepted(Caller(), "account", None)
            for instance in self._instances.ever():
                if secrets.compare_digest(key.encode(), instance.key.encode()):
                    return self._accepted(Caller(instance.id), "box", instance.offer["id"])
        raise Refused(401, "auth_error", "Invalid user key")

    def _accepted(self, caller: Caller, whose: str, offer: int | None) -> Caller:
        refused = self._faults.take("key_refused", offer=offer, whose=whose)
        if refused is not None:
            raise Refused(int(refused["status"]), "auth_error", "Invalid user key")
        return caller

    def _for_account(self, handler: Handler) -> Handler:
        async def checked(request: web.Request) -> web.StreamResponse:
            if self._caller(request).instance is not None:
                raise Refused(403, "not_authorized", "This key may only start, stop and destroy its own instance.")
            return await handler(request)

        return checked

    def _for_instance(self, handler: Handler) -> Handler:
        """The account, or the instance in the path."""

        async def checked(request: web.Request) -> web.StreamResponse:
            if self._caller(request).instance not in (None, int(request.match_info["id"])):
                raise Refused(403, "not_authorized", "This key may only start, stop and destroy its own instance.")
            return await handler(request)

        return checked

    def _existing(self, request: web.Request) -> Instance:
        id = int(request.match_info["id"])
        instance = self._instances.get(id)
        if instance is None:
            raise Refused(404, "no_such_instance", f"Instance {id} not found.")
        return instance

    # Offers

    async def _search(self, request: web.Request) -> web.Response:
        return self._offers(await _body(request))

    async def _search_new(self, request: web.Request) -> web.Response:
        return self._offers((await _object(request)).get("q"))

    def _offers(self, query: Any) -> web.Response:
        try:
            return reply({"offers": self._catalogue.search(query, self._clock())})
        except BadQuery as error:
            raise Refused(400, "bad_request", str(error)) from error

    async def _gpus(self, request: web.Request) -> web.Response:
        return reply({"gpu_names": sorted({row["gpu_name"] for row in self._catalogue.search({}, self._clock())})})

    async def _create(self, request: web.Request) -> web.Response:
        offer = int(request.match_info["id"])
        body = await _object(request)
        order = _order(body)
        refused = self._faults.take("create_refused", offer=offer)
        if self._instances.credit() <= 0:
            refused = {"why": "insufficient_credit"}
        if refused is not None:
            raise Refused(400, refused["why"], _REFUSALS[refused["why"]])
        fault = self._faults.take("offer_gone", offer=offer)
        if fault is not None:
            self._catalogue.withdraw(offer)
            raise _gone(offer, fault["spelling"])
        row = self._catalogue.get(offer)
        if row is None:
            raise _gone(offer, "404")
        if order.disk_gb > row["disk_space"]:
            raise Refused(400, "invalid_args", f"disk: {order.disk_gb} GB is more than the machine has")
        price = body.get("price")
        if price is not None and (not isinstance(price, int | float) or price < row["min_bid"]):
            raise Refused(400, "invalid_price", f"price: must be at least {row['min_bid']}")
        available = self._catalogue.available(offer)
        if not available and body.get("cancel_unavail", True):
            raise _gone(offer, "410")
        keys = tuple(self._keys.values())
        half = self._faults.take("contract_in_error", offer=offer)
        instance = self._instances.create(row, order, keys, stopped=not available or half is not None)
        if half is not None:
            text = "error 400/3601: invalid_price the price is too low, the instance is stopped"
            body = {"success": False, "error": "invalid_price", "msg": text, "new_contract": instance.id}
            return reply(body, int(half["status"]))
        return reply({"success": True, "new_contract": instance.id, "instance_api_key": instance.key})

    # Instances

    async def _show(self, request: web.Request) -> web.Response:
        instance = self._instances.get(int(request.match_info["id"]))
        hidden = instance and self._faults.take("show_null", offer=instance.offer["id"]) is not None
        return reply({"instances": self._row(instance) if instance and not hidden else None})

    def _row(self, instance: Instance) -> Row:
        row = instance.row(self._clock())
        fault = self._faults.take("null_fields", offer=instance.offer["id"])
        if fault is None:
            return row
        names = row.keys() - {"id", "label"} if fault["fields"] == "all" else {fault["fields"]}
        return row | dict.fromkeys(names)

    async def _old_list(self, request: web.Request) -> web.Response:
        raise Refused(410, "deprecated_endpoint", "Use /api/v1/instances/ instead")

    async def _list(self, request: web.Request) -> web.Response:
        filters = _json_parameter(request, "select_filters", {})
        order = _json_parameter(request, "order_by", [])
        columns = _json_parameter(request, "select_cols", ["*"])
        limit = _json_parameter(request, "limit", _PAGE)
        if not isinstance(filters, dict) or not filters.keys() <= _LIST_FILTERS:
            raise Refused(400, "invalid_request", f"select_filters: use {sorted(_LIST_FILTERS)}")
        if not isinstance(limit, int) or limit < 1:
            raise Refused(400, "invalid_request", "limit: must be a positive number")
        try:
            passes = matcher(filters)
        except BadQuery as error:
            raise Refused(400, "invalid_request", str(error)) from error
        listed = [self._row(instance) for instance in self._instances.listed()]
        rows = [row for row in listed if passes(row)]
        rows = _sorted(rows, order)
        found = len(rows)
        labels = Counter(row["label"] for row in rows if row["label"])
        seen = self._seen(request.query.get("after_token"))
        # By what was shown already, not by position: a row that is destroyed between two pages hides no other.
        left = [row for row in rows if row["id"] not in seen]
        short = self._faults.take("short_pages", call="list")
        most = max(1, min(limit, _PAGE, int(short["rows"]) if short else _PAGE))
        page, more = left[:most], left[most:]
        return reply(
            {
                "success": True,
                "instances": [_columns(row, columns) for row in page],
                "instances_found": found,
                "total_instances": len(listed),
                "label_counts": dict(labels),
                "next_token": self._token(seen.union(row["id"] for row in page)) if more else None,
            }
        )

    def _seen(self, token: str | None) -> frozenset[int]:
        if not token:
            return frozenset()
        if token not in self._pages:
            raise Refused(400, "invalid_token", "after_token: not one of ours")
        return self._pages[token]

    def _token(self, seen: frozenset[int]) -> str:
        # The characters that a client must escape in a query.
        token = f"{secrets.token_urlsafe(9)}/+="
        self._pages[token] = seen
        return token

    async def _change(self, request: web.Request) -> web.Response:
        body = await _object(request)
        instance = self._existing(request)
        if "label" in body:
            if self._caller(request).instance is not None:
                raise Refused(403, "not_authorized", "This key may only start, stop and destroy its own instance.")
            instance.label = _label(body["label"])
        match body.get("state"):
            case None if "label" in body:
                pass
            case "running":
                if not self._instances.start(instance):
                    text = "Required resources are currently unavailable, state change queued."
                    raise Refused(200, "resources_unavailable", text)
            case "stopped":
                await self._instances.stop(instance)
            case other:
                raise Refused(400, "invalid_args", f"state: {other!r}")
        return reply({"success": True, "msg": ""})

    async def _destroy(self, request: web.Request) -> web.Response:
        await _object(request)
        instance = self._existing(request)
        denied = self._faults.take("destroy_404", offer=instance.offer["id"])
        if denied is None or denied["effect"]:
            self._instances.destroy(instance)
        if denied is not None:
            raise Refused(404, "no_such_instance", f"Instance {instance.id} not found.")
        return reply({"success": True, "msg": ""})

    async def _request_logs(self, request: web.Request) -> web.Response:
        instance = self._existing(request)
        tail = (await _object(request)).get("tail") or "1000"
        name = secrets.token_hex(12)
        self._logs[name] = instance
        url = request.url.origin().with_path(f"/logs/{name}.log").with_query(tail=str(tail))
        return reply({"success": True, "result_url": str(url), "msg": ""})

    async def _log(self, request: web.Request) -> web.Response:
        """Without a key, as on the real market: the name is the secret."""
        instance = self._logs.get(request.match_info["name"])
        if instance is None:
            return web.Response(status=404, text="no such log\n")
        log = instance.box / "var/log/onstart.log" if instance.box else None
        text = log.read_text(errors="replace") if log and log.exists() else ""
        tail = request.query.get("tail", "")
        lines = text.splitlines(keepends=True)
        return web.Response(text="".join(lines[-int(tail) :] if tail.isdigit() else lines))

    # SSH keys

    async def _account_keys(self, request: web.Request) -> web.Response:
        if not self._keys:
            raise Refused(404, "no_ssh_key", "No SSH keys found.")
        return reply([_key_row(id, key) for id, key in self._keys.items()])

    async def _add_key(self, request: web.Request) -> web.Response:
        key = _ssh_key(await _object(request))
        for id, known in self._keys.items():
            if known == key:
                return reply({"success": True, "key": _key_row(id, key)})
        self._key_ids += 1
        self._keys[self._key_ids] = key
        return reply({"success": True, "key": _key_row(self._key_ids, key)})

    async def _delete_key(self, request: web.Request) -> web.Response:
        if self._keys.pop(int(request.match_info["key"]), None) is None:
            raise Refused(400, "no_ssh_key", "No such SSH key.")
        return reply({"success": True})

    async def _instance_keys(self, request: web.Request) -> web.Response:
        keys = [_key_row(number, key) for number, key in enumerate(self._existing(request).keys, 1)]
        return reply({"success": True, "ssh_keys": json.dumps(keys)})

    async def _attach(self, request: web.Request) -> web.Response:
        instance = self._existing(request)
        key = _ssh_key(await _object(request))
        if key in instance.keys:
            return reply({"success": False, "msg": "SSH key already associated with instance."})
        instance.keys.append(key)
        await self._instances.write_keys(instance)
        return reply({"success": True, "msg": "SSH key attached successfully"})

    async def _detach(self, request: web.Request) -> web.Response:
        instance = self._existing(request)
        number = int(request.match_info["key"])
        if not 1 <= number <= len(instance.keys):
            raise Refused(400, "no_ssh_key", "No such SSH key.")
        await self._instances.remove_key(instance, instance.keys[number - 1])
        return reply({"success": True})

    # Money

    async def _user(self, request: web.Request) -> web.Response:
        credit = self._instances.credit()
        return reply(
            {
                "id": 2,
                "email": "sandbox@localhost",
                "username": "sandbox",
                "credit": credit,
                "balance": 0.0,
                "balance_threshold": 0.0,
                "balance_threshold_enabled": False,
                "can_pay": credit > 0,
                "has_billing": True,
                "billed_verified": True,
                "ssh_key": next(iter(self._keys.values()), None),
                "sid": "",
                "key_id": 1,
            }
        )

    async def _charges(self, request: web.Request) -> web.Response:
        filters = _json_parameter(request, "select_filters", {})
        day = filters.get("day", {}) if isinstance(filters, dict) else {}
        short = self._faults.take("short_pages", call="charges")
        limit = max(1, min(100, _json_parameter(request, "limit", 20), int(short["rows"]) if short else 100))
        latest_first = request.query.get("latest_first", "").lower() == "true"
        token = request.query.get("after_token", "0")
        if not token.isdigit():
            raise Refused(400, "invalid_token", "after_token: not one of ours")
        now = self._clock()
        rows = [_charge(one, now) for one in self._instances.ever()]
        # Whole days: the SDK's own "until now" is cut to the second.
        first, last = day.get("gte", 0) // _DAY * _DAY, (day.get("lte", now) // _DAY + 1) * _DAY
        rows = [row for row in rows if row["start"] < last and row["end"] >= first]
        kinds = filters.get("type", {}).get("in")
        if kinds is not None and "instance" not in kinds:
            rows = []
        rows.sort(key=lambda row: float(row["start"]), reverse=latest_first)
        page = rows[int(token) : int(token) + limit]
        more = int(token) + limit < len(rows)
        return reply(
            {
                "success": True,
                "count": len(page),
                "total": len(rows),
                "next_token": str(int(token) + limit) if more else None,
                "results": page,
            }
        )


async def _body(request: web.Request) -> Any:
    try:
        return json.loads(await request.text() or "{}")
    except ValueError as error:
        raise Refused(400, "bad_request", "the body is not JSON") from error


async def _object(request: web.Request) -> dict[str, Any]:
    body = await _body(request)
    if not isinstance(body, dict):
        raise Refused(400, "bad_request", "Input should be a valid dictionary")
    return body


def _json_parameter(request: web.Request, name: str, default: Any) -> Any:
    text = request.query.get(name)
    if text is None or text == "":
        return default
    try:
        return json.loads(text)
    except ValueError as error:
        raise Refused(400, "invalid_request", f"{name}: not JSON") from error


def _gone(offer: int, spelling: str) -> Refused:
    text = f"Instance type by id {offer} is not available."
    match spelling:
        case "410":
            return Refused(410, "no_such_ask", f"error 410/3907: no_such_ask {text} It is no longer available.")
        case "400":
            return Refused(400, "invalid_args", f"error 400/3603: no_such_ask {text}")
        case "200":
            return Refused(200, "no_such_ask", f"no_such_ask {text}")
        case _:
            return Refused(404, "invalid_args", f"error 404/3603: no_such_ask {text}")


def _label(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or len(value) > 256):
        raise Refused(400, "invalid_args", "label: at most 256 characters")
    return value


def _order(body: dict[str, Any]) -> Order:
    """Check a create call as the market does. Raises Refused."""
    image, disk, onstart = body.get("image"), body.get("disk", 10), body.get("onstart") or ""
    if not isinstance(image, str) or not 0 < len(image) <= 1024:
        raise Refused(400, "invalid_args", "image: 1 to 1024 characters")
    if not isinstance(disk, int | float) or isinstance(disk, bool) or disk < 8:
        raise Refused(400, "invalid_args", "disk: at least 8 GB")
    if not isinstance(onstart, str) or len(onstart.encode()) >= _ONSTART_BYTES:
        raise Refused(400, "invalid_args", "onstart: too long")
    runtype = body.get("runtype") or "ssh_proxy"
    if not isinstance(runtype, str) or not set(runtype.split()) <= _RUNTYPES:
        raise Refused(400, "invalid_args", f"runtype: {runtype!r}")
    return Order(
        image=image,
        label=_label(body.get("label")),
        disk_gb=float(disk),
        env=_env(body.get("env")),
        onstart=onstart,
        runtype=runtype,
    )


def _env(env: Any) -> dict[str, str]:
    if env is None:
        return {}
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        raise Refused(400, "invalid_args", "env: Input should be a dictionary of strings")
    if any(len(name) + 1 + len(value) > _ENTRY_CHARS for name, value in env.items()):
        raise Refused(400, "invalid_args", f"env: an entry is longer than {_ENTRY_CHARS} characters")
    if sum(len(f"{name}={value}".encode()) for name, value in env.items()) > _ENV_BYTES:
        raise Refused(400, "invalid_args", "invalid env arguments, total length > 32KB")
    return dict(env)


def _ssh_key(body: dict[str, Any]) -> str:
    key = body.get("ssh_key")
    if not isinstance(key, str) or not key.strip().startswith(_KEY_TYPES) or "\n" in key.strip():
        raise Refused(400, "invalid_args", "ssh_key: not an SSH public key")
    return key.strip()


def _key_row(id: int, key: str) -> Row:
    created = datetime.fromtimestamp(0, UTC).isoformat()
    return {"id": id, "user_id": 2, "key": key, "public_key": key, "created_at": created, "deleted_at": None}


def _columns(row: Row, columns: Any) -> Row:
    if not isinstance(columns, list) or "*" in columns or not columns:
        return row
    return {name: row[name] for name in columns if name in row}


def _sorted(rows: list[Row], order: Any) -> list[Row]:
    if not isinstance(order, list):
        raise Refused(400, "invalid_request", "order_by: Input should be a list")
    for column in reversed(order):
        if not isinstance(column, dict) or column.get("col") not in (rows[0] if rows else {column.get("col")}):
            raise Refused(400, "invalid_request", f"order_by: {column!r}")
        name = column["col"]
        # Rows without a value first; within them any order will do.
        rows = sorted(
            rows,
            key=lambda row: (row[name] is not None, row[name] if row[name] is not None else 0),
            reverse=column.get("dir") == "desc",
        )
    return rows


def _charge(instance: Instance, now: float) -> Row:
    bill = instance.bill(now)
    start, end = instance.created, instance.ended if instance.ended is not None else now
    amounts = {"gpu": bill.gpu, "disk": bill.disk, "bwd": bill.down, "bwu": bill.up}
    common = {"start": start, "end": end, "source": f"instance-{instance.id}", "metadata": {}}
    items = [
        common | {"type": kind, "description": f"{kind} of instance {instance.id}", "amount": amount, "items": []}
        for kind, amount in amounts.items()
    ]
    description = f"Instance {instance.id} ({instance.offer['gpu_name']})"
    return common | {"type": "instance", "description": description, "amount": bill.total, "items": items}
