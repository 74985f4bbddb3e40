"""What SDK 1.9.1 sent, and did with the answers, when the contract was recorded: done again on the sandbox's market.

captures/sdk_requests.json: requests in order, each with the status it was answered with, and how the call ended. Left
out is what varies: host, encodings, the SDK's version, page tokens; keys and ids are replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vastai import VastAI

from tests.sandbox.market_process import MarketProcess

CAPTURES: dict[str, Any] = json.loads((Path(__file__).parent / "captures/sdk_requests.json").read_text())
OFFER, INSTANCE, KEY_ID = 41684738, 52402296, 9
KEY = "ssh-ed25519 AAAA me@x"
STRING = (
    "gpu_name=RTX_4090 num_gpus=1 gpu_ram>=23 disk_space>=80 reliability>0.98 inet_down>=300 direct_port_count>=2 "
    "cuda_vers>=12.4 driver_version>=570.00.00 dph<=0.6 geolocation notin [CN,VN] rented=any"
)
LABELLED = {
    "select_filters": {"label": {"in": ["selfhost-x"]}},
    "select_cols": ["id", "label", "actual_status"],
    "order_by": [{"col": "id", "dir": "asc"}],
    "limit": 25,
}


@dataclass(frozen=True)
class Ids:
    """What there is on the market: an offer, an instance of another one, a key of each kind."""

    offer: int
    instance: int
    key: int


@dataclass(frozen=True)
class Again:
    """One recorded call: the call, the faults it was made under, how the SDK was made."""

    call: Callable[[Any, Ids], object]
    faults: tuple[Mapping[str, Any], ...] = ()
    sdk: Mapping[str, Any] = field(default_factory=dict)
    gone: bool = False


def create(**arguments: Any) -> Callable[[Any, Ids], object]:
    return lambda sdk, ids: sdk.create_instance(id=ids.offer, **arguments)


def search(**arguments: Any) -> Callable[[Any, Ids], object]:
    return lambda sdk, ids: sdk.search_offers(**arguments)


def show(sdk: Any, ids: Ids) -> object:
    return sdk.show_instance(id=ids.instance)


def destroy(sdk: Any, ids: Ids) -> object:
    return sdk.destroy_instance(id=ids.instance)


def once(fault: str, **options: Any) -> tuple[Mapping[str, Any]]:
    return ({"fault": fault, "calls": 1, **options},)


PLAIN = create(image="u", ssh=True, direct=True)
DROPPED = once("answer_lost", how="drop")
REFUSED_AFTER_502 = (*once("answer_lost", how="502"), *once("create_refused", why="no_ssh_key_for_vm", skip=1))

AGAIN = {
    "err_401": Again(show, sdk={"api_key": "wrong"}),
    "err_429_no_retry_after": Again(show, ({"fault": "rate_limited"},)),
    "err_429_retry_after_1": Again(show, once("rate_limited", retry_after=1)),
    "err_429_retry_after_90": Again(show, ({"fault": "rate_limited", "retry_after": 90},)),
    "err_429_search_quota": Again(
        search(query="gpu_name=RTX_4090 rented=any"), ({"fault": "rate_limited", "form": "quota"},)
    ),
    "err_create_200_success_false": Again(PLAIN, once("offer_gone", spelling="200")),
    "err_create_500": Again(PLAIN, once("answer_lost", how="500", effect=False)),
    "err_create_502_retry1": Again(PLAIN, once("answer_lost", how="502"), sdk={"retry": 1}),
    "err_create_502_then_retried": Again(PLAIN, REFUSED_AFTER_502),
    "err_create_connection_dropped_then_retried": Again(PLAIN, DROPPED),
    "err_create_insufficient_credit": Again(PLAIN, once("create_refused")),
    "err_create_no_such_ask_404": Again(PLAIN, once("offer_gone", spelling="404")),
    "err_create_no_such_ask_410": Again(PLAIN, once("offer_gone", spelling="410")),
    "err_destroy_404": Again(destroy, gone=True),
    "err_retry0_breaks": Again(show, sdk={"retry": 0}),
    "gone_instance_200_null": Again(show, gone=True),
    "sdk_attach_ssh": Again(lambda sdk, ids: sdk.attach_ssh(instance_id=ids.instance, ssh_key=KEY)),
    "sdk_create_instance_direct_only": Again(create(image="u", direct=True)),
    "sdk_create_instance_envstr_bid": Again(
        create(
            image="ubuntu:22.04",
            env="-e A=1 -p 11434:11434 -h myhost",
            bid_price=0.21,
            disk=80,
            label="x",
            runtype="ssh_direct",
        )
    ),
    "sdk_create_instance_full": Again(
        create(
            image="vastai/base-image:@vastai-automatic-tag",
            env={"A": "1", "-p 11434:11434": "1"},
            disk=80,
            label="selfhost-x",
            onstart_cmd="touch ~/.no_auto_tmux",
            ssh=True,
            direct=True,
            cancel_unavail=True,
        )
    ),
    "sdk_create_instance_minimal": Again(create(image="ubuntu:22.04")),
    "sdk_create_instance_runtype_and_ssh": Again(create(image="u", runtype="ssh_direct", ssh=True)),
    "sdk_create_ssh_key": Again(lambda sdk, ids: sdk.create_ssh_key(ssh_key=KEY)),
    "sdk_delete_ssh_key": Again(lambda sdk, ids: sdk.delete_ssh_key(id=ids.key)),
    "sdk_destroy_instance": Again(destroy),
    "sdk_detach_ssh": Again(lambda sdk, ids: sdk.detach_ssh(instance_id=ids.instance, ssh_key_id=1)),
    "sdk_label_instance": Again(lambda sdk, ids: sdk.label_instance(id=ids.instance, label="selfhost-y")),
    "sdk_logs": Again(lambda sdk, ids: sdk.logs(instance_id=ids.instance, tail="100")),
    "sdk_logs_daemon": Again(
        lambda sdk, ids: sdk.logs(instance_id=ids.instance, tail="100", filter="err", daemon_logs=True)
    ),
    "sdk_search_offers_badfield": Again(search(query="hosting_type>=1 gpu_name=RTX_4090 rented=any")),
    "sdk_search_offers_badquery": Again(search(query="gpu_name")),
    "sdk_search_offers_dict": Again(
        search(
            query={"gpu_name": {"eq": "RTX 4090"}, "num_gpus": {"eq": 1}},
            order="dph_total,score-",
            limit=20,
            storage=80,
        )
    ),
    "sdk_search_offers_dict_nodefault": Again(
        search(
            query={"gpu_name": {"in": ["RTX 4090", "RTX 4090 D"]}},
            type="bid",
            no_default=True,
            order="dph_total",
            limit=5,
            storage=80,
        )
    ),
    "sdk_search_offers_new": Again(lambda sdk, ids: sdk.search_offers_new(query="gpu_name=RTX_4090", limit=3)),
    "sdk_search_offers_none": Again(search()),
    "sdk_search_offers_string": Again(search(query=STRING, order="dph_total", limit=20, storage=80)),
    "sdk_show_instance": Again(show),
    "sdk_show_instance_extra_env_null": Again(show, once("null_fields", fields="extra_env")),
    "sdk_show_instance_start_date_null": Again(show, once("null_fields", fields="start_date")),
    "sdk_show_instances": Again(lambda sdk, ids: sdk.show_instances()),
    "sdk_show_instances_one_bad_row": Again(
        lambda sdk, ids: sdk.show_instances(), once("null_fields", fields="start_date")
    ),
    "sdk_show_instances_two_pages": Again(lambda sdk, ids: sdk.show_instances(), ({"fault": "short_pages"},)),
    "sdk_show_instances_v1_filter": Again(lambda sdk, ids: sdk.show_instances_v1(LABELLED)),
    "sdk_show_invoices_v1_charges": Again(
        lambda sdk, ids: sdk.show_invoices_v1(
            charges=True,
            start_date=1795000000,
            end_date=1795600000,
            charge_type=["instance"],
            latest_first=True,
            limit=100,
        )
    ),
    "sdk_show_ssh_keys": Again(lambda sdk, ids: sdk.show_ssh_keys()),
    "sdk_show_user": Again(lambda sdk, ids: sdk.show_user()),
    "sdk_scp_url": Again(lambda sdk, ids: sdk.scp_url(id=ids.instance)),
    "sdk_ssh_url": Again(lambda sdk, ids: sdk.ssh_url(id=ids.instance)),
    "sdk_start_instance": Again(lambda sdk, ids: sdk.start_instance(id=ids.instance)),
    "sdk_stop_instance": Again(lambda sdk, ids: sdk.stop_instance(id=ids.instance)),
    "start_queued_200": Again(lambda sdk, ids: sdk.start_instance(id=ids.instance), ({"fault": "start_queued"},)),
}


def test_every_recorded_call_is_made_again() -> None:
    assert AGAIN.keys() == CAPTURES.keys()


@pytest.mark.parametrize("name", CAPTURES)
def test_the_sdk_does_what_it_did_when_the_contract_was_recorded(clean: MarketProcess, name: str) -> None:
    clean.set("/settings", real_boxes=False)
    clean.set("/faults", fault="boot_stuck", stage="null")
    again, sdk = AGAIN[name], clean.sdk()
    rows = sdk.search_offers(query={"disk_space": {"gte": 100}, "min_bid": {"lte": 0.21}}, no_default=True)
    offer, others = rows[0]["id"], [row["id"] for row in rows[1:3]]
    rented = [sdk.create_instance(id=id, image="i", disk=20)["new_contract"] for id in others]
    key = sdk.create_ssh_key(ssh_key="ssh-ed25519 AAAA account")["key"]["id"]
    ids = Ids(offer, rented[0], key)
    if "two_pages" not in name:
        sdk.destroy_instance(id=rented[1])
    if again.gone:
        sdk.destroy_instance(id=ids.instance)
    elif name == "sdk_detach_ssh":
        sdk.attach_ssh(instance_id=ids.instance, ssh_key=KEY)
    elif name == "start_queued_200":
        sdk.stop_instance(id=ids.instance)
    clean.control.delete("/requests")
    for fault in again.faults:
        clean.set("/faults", **fault)
    recorded = CAPTURES[name]
    made = VastAI(**({"api_key": clean.facts["api_key"], "server_url": clean.url} | dict(again.sdk)))

    ended = None
    try:
        again.call(made, ids)
    except Exception as error:  # whatever it was
        ended = f"{type(error).__module__}.{type(error).__name__}: {error}"

    clean.control.delete("/faults")
    told = clean.asked()
    assert [_varied(row, ids) for row in told] == recorded["requests"]
    assert _told(ended, ids) == recorded["exception"]
    for kept in sdk.show_ssh_keys() if name != "sdk_delete_ssh_key" else ():
        sdk.delete_ssh_key(id=kept["id"])


def _varied(row: Mapping[str, Any], ids: Ids) -> dict[str, Any]:
    """A request without what is another one each time."""
    headers = {name: value for name, value in row["headers"].items() if name not in ("Host", "Accept-Encoding")}
    headers["User-Agent"] = headers["User-Agent"].split("/")[0]
    query = row["query"] | ({"after_token": "<token>"} if "after_token" in row["query"] else {})
    path = _numbered(row["path"], ids)
    return {name: row[name] for name in ("method", "body", "status")} | {
        "path": path,
        "query": query,
        "headers": headers,
    }


def _numbered(text: str, ids: Ids) -> str:
    for ours, recorded in ((ids.offer, OFFER), (ids.instance, INSTANCE)):
        text = text.replace(str(ours), str(recorded))
    return re.sub(r"(/ssh/)\d+/$", rf"\g<1>{KEY_ID}/", text)


def _told(ended: str | None, ids: Ids) -> str | None:
    return _numbered(re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:<port>", ended), ids) if ended else None
