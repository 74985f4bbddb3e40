"""vast.ai through its own SDK: the only module that speaks `vastai`.

Facts about the API and the SDK's traps were checked against vastai 1.9.1; the dates in the comments say when.
Never chooses an offer, never repeats a create.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import requests

from selfhost_cli.config import LIVE_MARKET, Settings
from selfhost_cli.errors import (
    AnswerLost,
    KeyRefused,
    MarketError,
    MarketUnreachable,
    NoCredit,
    NotSetUp,
    OfferGone,
    TooOften,
)
from selfhost_cli.model import Account, BoxSpec, BoxState, Charges, Endpoint, Instance, Need, Offer
from selfhost_cli.providers.pacing import LONGEST_S, PATIENCE_S, Limit, Pacer
from selfhost_cli.wait import SYSTEM, Clock

T = TypeVar("T")
Row = Mapping[str, Any]

ROWS = 64
"""Of a search: the market never answers with more, whatever is asked."""
PAGE = 25
PAGES = 50
ATTEMPTS = 4
HICCUP_S = 1.0
LIMITS: Mapping[str, Limit] = {
    "search": Limit(10.0, burst=4),  # ten a minute: four at once and six more is never beyond it
    # Impatient: the ledger has noted already when it is sent, and the list's lag is counted from then.
    "create": Limit(4.5, penalty=12.0, patience=15.0),
    "list": Limit(1.0),
    "show": Limit(2.0),
    "destroy": Limit(3.0),
    "keys": Limit(1.0),
    "attach": Limit(1.0),
    "charges": Limit(1.0),
    "account": Limit(1.0),
}
"""What the market allows per endpoint (rate-limits page and API description, August 2026); account: our guess.

Each endpoint is counted for itself, so whoever polls is never in the way of a destroy call.
"""
HOPELESS = re.compile(
    "OCI runtime create failed|failed to inject CDI devices|could not select device driver|no space left on device"
)
"""What Docker says, by way of `status_msg`, on a host that will never run the container."""
IMAGELESS = re.compile("pull access denied|manifest .*(not found|unknown)")


def cli_key(env: Mapping[str, str]) -> str:
    """The key that vast's own command line stored, "" when there is none. Raises NotSetUp when it is no key."""
    home = Path(env.get("HOME", "~")).expanduser()
    config = Path(env.get("XDG_CONFIG_HOME") or home / ".config")
    for path in (config / "vastai" / "vast_api_key", home / ".vast_api_key"):
        if path.is_file():
            key = path.read_text(errors="replace").strip()
            if not (key.isascii() and key.isprintable()):
                raise NotSetUp(f"{path} does not hold a key", "Write the key into it, or delete it.")
            return key
    return ""


def account_key(settings: Settings, env: Mapping[str, str]) -> str:
    """The key to use, "" when there is none. The one of vast's command line is for vast.ai and goes nowhere else."""
    return settings.api_key or (cli_key(env) if settings.market_url == LIVE_MARKET else "")


class VastProvider:
    """The market at `url` with the account behind `key`. See `providers.Provider` for what each verb promises.

    `pacer` has the turns that all processes take; without one only what the market asks for is waited for.
    """

    def __init__(
        self,
        key: str,
        url: str,
        *,
        pacer: Pacer | None = None,
        clock: Clock = SYSTEM,
        env: MutableMapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> None:
        _tame_requests(os.environ if env is None else env, url)
        from vastai import VastAI  # 0.4 s: only commands that ask the market pay for it

        # One attempt a call: the SDK repeats every method, the paid create included (1.9.1, reproduced).
        self._sdk = VastAI(api_key=key, server_url=url.rstrip("/"), retry=1)
        self._sdk.client.timeout = timeout
        self._key = key
        self._clock = clock
        self._pacer = pacer or Pacer(None, url, 0.0, clock=clock)

    def account(self) -> Account:
        user = self._patiently("account", self._sdk.show_user)
        if not isinstance(user, dict) or not isinstance(user.get("credit"), int | float):
            raise MarketUnreachable("the market's account answer has no credit in it")
        return Account(id=str(user.get("id")), credit=float(user["credit"]))

    def offers(self, need: Need) -> list[Offer]:
        rows = self._patiently(
            "search",
            lambda: self._sdk.search_offers(
                query=_query(need), no_default=True, order="dph_total", storage=need.disk_gb, limit=ROWS
            ),
        )
        if not isinstance(rows, list):
            raise MarketUnreachable("the market's search answer has no list of offers")
        return [offer for row in rows if (offer := _offer(row)) is not None]

    def create(self, offer: Offer, spec: BoxSpec, sending: Callable[[], None] = lambda: None) -> int:
        try:
            with self._pacer.turn("create", LIMITS["create"]):
                sending()
                answer = self._sdk.create_instance(
                    id=offer.id,
                    image=spec.image,
                    disk=spec.disk_gb,
                    env=dict(spec.env),
                    label=spec.label,
                    onstart_cmd=spec.onstart,
                    runtype="ssh_direct",
                    cancel_unavail=True,  # else a lost race can leave a stopped instance that bills its disk
                )
        except requests.HTTPError as error:
            answer = _body(error.response)
            if (known := _contract(answer)) is None:
                raise self._create_error(error.response, answer, offer) from error
            return known
        except requests.ConnectionError as error:
            if _never_sent(error):
                raise self._away(error) from error
            raise AnswerLost(f"the answer to renting offer {offer.id} was lost") from error
        except (requests.RequestException, ValueError, RecursionError) as error:
            raise AnswerLost(f"the answer to renting offer {offer.id} was lost") from error
        if (known := _contract(answer)) is not None:
            return known
        if isinstance(answer, dict) and answer.get("success") is False and answer.get("error"):
            raise self._create_error(None, answer, offer)
        raise AnswerLost(f"the answer to renting offer {offer.id} has neither an id nor an error")

    def instances(self, label_prefix: str, ids: Collection[int] = ()) -> list[Instance]:
        found: list[Instance] = []
        listed = 0
        token: str | None = None
        seen: set[str] = set()
        while True:
            params: dict[str, Any] = {"select_filters": {}, "order_by": [{"col": "id", "dir": "asc"}], "limit": PAGE}
            if token:
                params["after_token"] = token
            page = self._patiently("list", lambda asked=params: self._sdk.show_instances_v1(asked))  # type: ignore[misc]
            rows = page.get("instances") if isinstance(page, dict) else None
            if not isinstance(rows, list) or page.get("success") is False or "next_token" not in page:
                raise MarketUnreachable("the market's list of instances is malformed: what exists is unknown")
            for row in rows:
                if not isinstance(row, dict) or not isinstance(row.get("id"), int):
                    raise MarketUnreachable("the market's list of instances has a malformed row")
                if row["id"] in ids or str(row.get("label") or "").startswith(label_prefix):
                    found.append(_listed(row))
            listed += len(rows)
            token = page["next_token"]
            if token is None:
                if not listed and page.get("instances_found"):
                    raise MarketUnreachable("the market's list of instances is empty, and says that there are some")
                return found
            if not isinstance(token, str) or token in seen:
                raise MarketUnreachable("the market's list of instances does not end")
            seen.add(token)

    def get(self, instance_id: int) -> Instance | None:
        # Not show_instance(): it fails on rows with a null start_date or extra_env (1.9.1, reproduced).
        body = self._patiently("show", lambda: self._get(f"/instances/{instance_id}/", {"owner": "me"}))
        row = body.get("instances", "") if isinstance(body, dict) else ""
        if row is None:
            return None
        if not isinstance(row, dict) or row.get("id") != instance_id:
            raise MarketUnreachable(f"the market's answer for box {instance_id} is malformed")
        return _read(row)

    def destroy(self, instance_id: int) -> None:
        def ask() -> object:
            try:
                return self._sdk.destroy_instance(instance_id)
            except requests.HTTPError as error:
                if error.response.status_code == 404 and "no_such" in error.response.text:
                    return {"success": True}
                raise

        answer = self._patiently("destroy", ask)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise MarketUnreachable(f"the market did not confirm the end of box {instance_id}: {self._text(answer)}")

    def register_key(self, public_key: str) -> None:
        def known() -> list[Any]:
            try:
                return list(self._sdk.show_ssh_keys())
            except requests.HTTPError as error:
                if error.response.status_code == 404:  # its way to say "none"
                    return []
                raise

        material = " ".join(public_key.split()[:2])
        for row in self._patiently("keys", known):
            if isinstance(row, dict) and str(row.get("public_key") or row.get("key") or "").startswith(material):
                return
        answer = self._patiently("keys", lambda: self._sdk.create_ssh_key(public_key))
        if isinstance(answer, dict) and answer.get("success") is False:
            raise MarketError(f"the market did not take the login key: {self._text(answer)}")

    def attach_key(self, instance_id: int, public_key: str) -> None:
        answer = self._patiently("attach", lambda: self._sdk.attach_ssh(instance_id, public_key))
        refused = isinstance(answer, dict) and answer.get("success") is False
        if refused and "already" not in self._text(answer):  # "SSH key already associated with instance."
            raise MarketError(f"the market did not put the login key on box {instance_id}: {self._text(answer)}")

    def charges(self, ids: Collection[int], since: float) -> dict[int, Charges]:
        day = 86_400
        query = {
            "select_filters": {
                "day": {"gte": int(since) // day * day, "lte": int(self._clock.time()) + day},
                "type": {"in": ["instance"]},
            },
            "latest_first": "true",
            "limit": 100,
            "format": "table",
        }
        sources = {f"instance-{number}": number for number in ids}
        mine: dict[int, list[Row]] = {}
        for _ in range(PAGES):
            body = self._patiently("charges", lambda: self._get("/charges/", query))
            rows = body.get("results") if isinstance(body, dict) else None
            if not isinstance(rows, list):
                raise MarketUnreachable("the market's list of charges is malformed")
            for row in rows:
                if isinstance(row, dict) and (number := sources.get(str(row.get("source")))) is not None:
                    mine.setdefault(number, []).append(row)
            if not body.get("next_token"):
                return {number: _charges(found) for number, found in mine.items()}
            query["after_token"] = body["next_token"]
        raise MarketUnreachable("the market's list of charges does not end")

    def _get(self, path: str, query: dict[str, Any]) -> Any:
        response = self._sdk.client.get(path, query)
        response.raise_for_status()
        return response.json()

    def _away(self, error: Exception) -> MarketUnreachable:
        """Why the market does not answer, without the request: an error's text may hold the key."""
        if isinstance(error, requests.exceptions.Timeout):
            why = "it does not answer in time"
        elif isinstance(error, requests.ConnectionError):
            why = "no connection" if _never_sent(error) else "the connection broke"
        else:
            why = f"its answer makes no sense ({type(error).__name__})"
        url = self._sdk.client.server_url
        return MarketUnreachable(f"the market {url} cannot be reached: {why}", "Check the network, then try again.")

    def _patiently(self, call: str, ask: Callable[[], T]) -> T:
        """Ask something that may be repeated: rate limits and hiccups are waited out, a few times."""
        for left in reversed(range(ATTEMPTS)):
            try:
                with self._pacer.turn(call, LIMITS[call]):
                    answer = ask()
                return cast(T, _without(self._key, answer))
            except requests.HTTPError as error:
                problem = self._problem(call, error.response)
                if not left or not isinstance(problem, MarketUnreachable):
                    raise problem from error
                if isinstance(problem, TooOften):
                    if problem.seconds > PATIENCE_S:
                        raise problem from error
                    continue  # the next turn is not before that
            except (requests.RequestException, ValueError) as error:
                if not left:
                    raise self._away(error) from error
            except (LookupError, TypeError, AttributeError, RecursionError) as error:
                # The SDK takes answers apart without looking whether they are what it expects (1.9.1, reproduced).
                if not left:
                    raise self._away(error) from error
            self._clock.sleep(HICCUP_S)
        raise AssertionError("the last attempt returns or raises")

    def _problem(self, call: str, response: requests.Response) -> MarketError:
        """What an error answer means. After a rate limit nobody makes this call for as long as the market says."""
        if response.status_code != 429 or "search_quota_exceeded" in response.text:
            return self._read_error(response)
        seconds = max(LIMITS[call].penalty, _retry_after(response, self._clock.time()))
        self._pacer.hold(call, seconds)
        said = f"the market says that we ask too often, and wants {seconds:.0f} s of silence"
        return TooOften(said, "Try again after that.", seconds=min(seconds, LONGEST_S))

    def _create_error(self, response: requests.Response | None, answer: object, offer: Offer) -> MarketError:
        status = response.status_code if response is not None else 200
        text = self._text(answer)
        if "no_such_ask" in text:
            return OfferGone(f"offer {offer.id} is gone: {text}")
        if "insufficient_credit" in text:
            return NoCredit(f"the account cannot pay: {text}", "Add credit at https://cloud.vast.ai/billing/.")
        if status >= 500 or status == 408:
            return AnswerLost(f"the market answered {status} to renting offer {offer.id}")
        if response is not None and status == 429:
            return self._problem("create", response)
        if status in (401, 403) or "auth_error" in text:
            return _key_refused(status, text)
        return MarketError(f"the market refused offer {offer.id}: {text or status}")

    def _read_error(self, response: requests.Response) -> MarketError:
        status, text = response.status_code, self._text(_body(response))
        if status in (401, 403) or "auth_error" in text:
            return _key_refused(status, text)
        if status >= 500 or status == 408:
            return MarketUnreachable(f"the market answered {status}: {text}")
        return MarketError(f"the market refused ({status}): {text}")

    def _text(self, answer: object) -> str:
        """What an error answer says, whatever its shape: in one line, and without our key if it repeats that."""
        if isinstance(answer, dict):
            text = " ".join(str(answer[key]) for key in ("error", "msg", "detail") if answer.get(key))
        else:
            text = str(answer)
        told = " ".join(text.split())
        return (told.replace(self._key, "<the key>") if self._key else told)[:300]


def _without(key: str, answer: Any) -> Any:
    """What the market said, without our key wherever it repeats that: all of it may be shown and logged."""
    if isinstance(answer, str):
        return answer.replace(key, "<the key>") if key else answer
    if isinstance(answer, list):
        return [_without(key, item) for item in answer]
    if isinstance(answer, dict):
        return {_without(key, name): _without(key, value) for name, value in answer.items()}
    return answer


def _tame_requests(env: MutableMapping[str, str], url: str) -> None:
    """Two ways in which the SDK's `requests` session would betray us, closed by environment.

    An entry for the host in ~/.netrc replaces our key by a password; HTTP_PROXY is used even for loopback (1.9.1).
    """
    env["NETRC"] = os.devnull
    host = urlsplit(url).hostname or ""
    if host in ("127.0.0.1", "localhost", "::1"):
        for name in ("NO_PROXY", "no_proxy"):
            env[name] = ",".join(filter(None, [env.get(name, ""), host]))


def _query(need: Need) -> dict[str, dict[str, object]]:
    """What is on offer at all of the card; a strict need filters it, so that what fits is within the first ROWS."""
    query: dict[str, dict[str, object]] = {
        "gpu_name": {"eq": need.gpu},
        "num_gpus": {"eq": 1},
        "rentable": {"eq": True},
        "rented": {"eq": False},
        "external": {"eq": False},
    }
    if not need.strict:
        return query
    query |= {
        "gpu_ram": {"gte": need.gpu_ram_mb},
        "cpu_ram": {"gte": need.ram_mb},
        "verified": {"eq": True},
        "reliability": {"gte": need.reliability},
        "direct_port_count": {"gte": 1},
        "inet_down": {"gte": need.inet_down_mbps},
        "disk_space": {"gte": need.disk_gb},
        "duration": {"gte": need.hours * 3600},
    }
    if need.max_price is not None:
        query["dph_total"] = {"lte": need.max_price}
    return query


def _offer(row: object) -> Offer | None:
    """One row of a search, None when it lacks what names or prices it. Null, as many columns may be, is zero."""
    if not isinstance(row, dict):
        return None
    try:
        offer = Offer(
            id=int(row["ask_contract_id"]),
            machine_id=int(row["machine_id"]),
            host_id=int(row.get("host_id") or 0),
            gpu=str(row["gpu_name"]),
            num_gpus=int(row["num_gpus"]),
            gpu_ram_mb=int(row["gpu_ram"]),
            ram_mb=int(row["cpu_ram"] or 0),
            disk_gb=float(row["disk_space"] or 0),
            dph_base=float(row["dph_base"]),
            dph_total=float(row["dph_total"]),
            storage_dph=float(row.get("storage_total_cost") or 0.0),
            down_per_gb=float(row.get("inet_down_cost") or 0.0),
            up_per_gb=float(row.get("inet_up_cost") or 0.0),
            inet_down_mbps=float(row["inet_down"] or 0),
            inet_up_mbps=float(row.get("inet_up") or 0.0),
            reliability=float(row.get("reliability2") or row.get("reliability") or 0.0),
            verified=row.get("verification") == "verified",
            rentable=row.get("rentable") is True and row.get("rented") is not True,
            cuda=float(row.get("cuda_max_good") or 0.0),
            direct_ports=int(row.get("direct_port_count") or 0),
            duration_s=float(row.get("duration") or 0.0),
            place=str(row.get("geolocation") or "").strip(),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    prices = (offer.dph_base, offer.dph_total, offer.storage_dph, offer.down_per_gb, offer.up_per_gb)
    # A price that is no number would pass every limit, and the watchdog's dollars with it.
    sound = offer.dph_total > 0 and all(0 <= price < float("inf") for price in prices)
    return offer if sound else None


def _listed(row: Row) -> Instance:
    """What is in the list exists: one row that makes no sense neither hides its box nor keeps the others unknown."""
    try:
        return _read(row)
    except MarketUnreachable as error:
        label = str(row.get("label") or "")
        return Instance(row["id"], label, BoxState.PENDING, "unknown", error.message, 0, "", 0.0, None, None, None)


def _read(row: Row) -> Instance:
    try:
        return _instance(row)
    except (TypeError, ValueError, OverflowError) as error:
        raise MarketUnreachable(
            f"the market's row of box {row.get('id')} makes no sense ({type(error).__name__})"
        ) from error


def _instance(row: Row) -> Instance:
    """One row of a listing. Every column but the id may be null."""
    start = row.get("start_date")
    return Instance(
        id=int(row["id"]),
        label=str(row.get("label") or ""),
        state=_state(row),
        status=str(row.get("actual_status") or "accepted"),
        message=str(row.get("status_msg") or "").strip(),
        machine_id=int(row.get("machine_id") or 0),
        gpu=str(row.get("gpu_name") or ""),
        dph_total=float(row.get("dph_total") or 0.0),
        start=float(start) if isinstance(start, int | float) else None,
        direct=_direct(row),
        proxy=_proxy(row),
    )


def _state(row: Row) -> BoxState:
    actual = row.get("actual_status")
    said = str(row.get("status_msg") or "")
    if IMAGELESS.search(said):
        return BoxState.IMAGELESS
    if HOPELESS.search(said):
        return BoxState.FAILED
    if actual in ("exited", "unknown", "offline", "stopped", "frozen"):
        return BoxState.FAILED
    # We never ask for that: the market gave up on it, or took it away.
    if row.get("intended_status") == row.get("next_state") == "stopped":
        return BoxState.FAILED
    return BoxState.RUNNING if actual == "running" else BoxState.PENDING


def _direct(row: Row) -> Endpoint | None:
    host = str(row.get("public_ipaddr") or "").strip()
    try:
        return Endpoint(host, int(row["ports"]["22/tcp"][0]["HostPort"])) if host else None
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _proxy(row: Row) -> Endpoint | None:
    host, port = str(row.get("ssh_host") or "").strip(), row.get("ssh_port")
    if not host or not isinstance(port, int):
        return None
    return Endpoint(host, port + ("jupyter" in str(row.get("image_runtype") or "")))


def _charges(rows: Sequence[Row]) -> Charges:
    sums = {"gpu": 0.0, "disk": 0.0, "bwd": 0.0, "bwu": 0.0}
    try:
        for row in rows:
            for item in row.get("items") or []:
                if item.get("type") in sums:
                    sums[item["type"]] += float(item.get("amount") or 0.0)
        until = max((float(row["end"]) for row in rows if row.get("end")), default=None)
    except (AttributeError, TypeError, ValueError) as error:
        raise MarketUnreachable(f"the market's charges make no sense ({type(error).__name__})") from error
    return Charges(gpu=sums["gpu"], disk=sums["disk"], down=sums["bwd"], up=sums["bwu"], until=until)


def _contract(answer: object) -> int | None:
    """The id of an instance that exists now. Some errors carry one too: then a box exists (dstack's experience)."""
    known = str(answer.get("new_contract") or "") if isinstance(answer, dict) else ""
    return int(known) if re.fullmatch("[1-9][0-9]*", known) else None


def _retry_after(response: requests.Response, now: float) -> float:
    """Seconds of silence that the market asks for (a number, or a date in the header), 0 when it says nothing."""
    body = _body(response)
    said = response.headers.get("Retry-After") or (body.get("retry_after") if isinstance(body, dict) else None)
    try:
        seconds = float(said or 0.0)
    except (TypeError, ValueError):
        try:
            seconds = parsedate_to_datetime(str(said)).timestamp() - now
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return seconds if math.isfinite(seconds) else 0.0


def _key_refused(status: int, text: str) -> KeyRefused:
    return KeyRefused(
        f"the market does not accept the account key ({status} {text})".replace(" )", ")"),
        "Make one at https://cloud.vast.ai/manage-keys/ and put it into SELFHOST_API_KEY or config.toml.",
    )


def _never_sent(error: requests.ConnectionError) -> bool:
    """Whether the request cannot have reached the market: no connection was made at all."""
    text = repr(error)
    return "NewConnectionError" in text or "NameResolutionError" in text or "ProxyError" in text


def _body(response: requests.Response) -> object:
    try:
        return response.json()
    except (ValueError, RecursionError):
        return response.text
