"""The market's contract, spoken by the unmodified SDK against the real process. No box gets further than `null`."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import requests

from tests.sandbox.market_process import MarketProcess
from tests.waiting import until

QUERY = {"gpu_name": {"eq": "RTX 4090"}, "num_gpus": {"eq": 1}}
KEY = "ssh-ed25519 AAAA me@x"


@pytest.fixture(autouse=True)
def _no_boxes(clean: MarketProcess) -> None:
    """These tests are about the market's answers: nothing is started."""
    clean.set("/faults", fault="boot_stuck", stage="null")


def offers(market: MarketProcess, **more: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = market.sdk().search_offers(query=QUERY | more, order="dph_total", storage=20)
    return rows


def rent(market: MarketProcess, offer: int | None = None, **more: Any) -> int:
    arguments: dict[str, Any] = {"image": "some/image:1", "disk": 20, "runtype": "ssh_direct", "cancel_unavail": True}
    id = offers(market)[0]["id"] if offer is None else offer
    answer = market.sdk().create_instance(id=id, **(arguments | more))
    assert answer["success"] is True
    assert len(answer["instance_api_key"]) == 64
    instance: int = answer["new_contract"]
    return instance


def refusal(call: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(requests.exceptions.HTTPError) as caught:
        call()
    return caught.value.response.status_code, caught.value.response.json()


def sent(market: MarketProcess) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = market.control.get("/requests").json()
    return rows


def test_every_path_answers_with_and_without_its_trailing_slash(clean: MarketProcess) -> None:
    instance = rent(clean)
    with clean.http(clean.facts["api_key"]) as http:
        for path in (f"/api/v0/instances/{instance}", "/api/v1/instances", "/api/v0/users/current", "/api/v0/charges"):
            assert http.get(path).status_code == http.get(f"{path}/").status_code == 200
        for path in ("/api/v0/bundles", "/api/v0/bundles/"):
            assert http.post(path, json={}).status_code == 200


def test_a_search_is_filtered_ordered_and_limited_and_needs_no_key(clean: MarketProcess) -> None:
    rows = clean.sdk(key="nobody").search_offers(query=QUERY, order="dph_total", limit=5, storage=20)
    assert [row["gpu_name"] for row in rows] == ["RTX 4090"] * 5
    prices = [row["dph_total"] for row in rows]
    assert prices == sorted(prices)


def test_a_string_query_and_the_second_search_endpoint_find_the_same(clean: MarketProcess) -> None:
    text = "gpu_name=RTX_4090 num_gpus=1 gpu_ram>=23 reliability>0.98 geolocation notin [CN,VN] dph_total<=0.6"
    found = clean.sdk().search_offers(query=text, order="dph_total", limit=20)
    assert found
    assert all(row["reliability"] > 0.98 and row["dph_total"] <= 0.6 for row in found)
    other = clean.sdk().search_offers_new(query=text, order="dph_total", limit=20)
    assert [row["id"] for row in other] == [row["id"] for row in found]


def test_a_bare_value_as_a_filter_is_a_bad_request(clean: MarketProcess) -> None:
    sdk = clean.sdk()
    status, body = refusal(lambda: sdk.search_offers(query={"verified": True}, no_default=True))
    assert (status, body["error"]) == (400, "bad_request")
    assert "Input should be a valid dictionary" in body["msg"]


def test_a_rented_offer_leaves_the_search_and_comes_back(clean: MarketProcess) -> None:
    def there() -> bool:
        return offer in [row["id"] for row in offers(clean)]

    offer = offers(clean)[0]["id"]
    instance = rent(clean, offer)
    assert not there()
    clean.sdk().destroy_instance(id=instance)
    assert there()


@pytest.mark.parametrize(
    "bad",
    [
        {"onstart_cmd": "#" * 4000},
        {"env": {"A": "x" * 256}},
        {"env": {f"A{number}": "x" * 240 for number in range(150)}},
        {"label": "x" * 257},
        {"disk": 4},
        {"disk": 100_000},
        {"image": "x" * 1025},
        {"runtype": "telnet"},
        {"price": 0.0001},
    ],
)
def test_a_create_call_that_is_wrong_is_refused_and_rents_nothing(clean: MarketProcess, bad: dict[str, Any]) -> None:
    offer = offers(clean)[0]["id"]
    status, body = refusal(lambda: rent(clean, offer, **bad))
    assert (status, body["success"]) == (400, False)
    assert clean.billed()["count"] == 0


def test_the_longest_onstart_and_env_entry_that_are_allowed_arrive(clean: MarketProcess) -> None:
    instance = rent(clean, onstart_cmd="#" * 3999, env={"A": "x" * 254}, label="l" * 256)
    row = clean.sdk().show_instance(id=instance)
    assert (len(row["onstart"]), row["extra_env"], row["label"]) == (3999, {"A": "x" * 254}, "l" * 256)


@pytest.mark.parametrize("spelling", ["400", "404", "410"])
def test_an_offer_that_is_gone_says_so_in_the_spelling_switched(clean: MarketProcess, spelling: str) -> None:
    first, second = (row["id"] for row in offers(clean)[:2])
    clean.set("/faults", fault="offer_gone", offer=first, spelling=spelling, calls=1)
    status, body = refusal(lambda: rent(clean, first))
    assert status == int(spelling)
    assert "no_such_ask" in json.dumps(body)
    assert first not in [row["id"] for row in offers(clean)]
    rent(clean, second)


def test_an_offer_can_be_gone_with_status_200_too(clean: MarketProcess) -> None:
    clean.set("/faults", fault="offer_gone", spelling="200", calls=1)
    answer = clean.sdk().create_instance(id=offers(clean)[0]["id"], image="i", disk=20)
    assert (answer["success"], answer["error"]) == (False, "no_such_ask")
    assert clean.billed()["count"] == 0


def test_an_offer_that_never_was_is_no_such_ask(clean: MarketProcess) -> None:
    status, body = refusal(lambda: rent(clean, 7))
    assert status == 404
    assert "no_such_ask" in body["msg"]


def test_without_cancel_unavail_a_taken_offer_leaves_a_stopped_instance_that_is_billed(clean: MarketProcess) -> None:
    offer = offers(clean)[0]["id"]
    rent(clean, offer)
    assert refusal(lambda: rent(clean, offer))[0] == 410
    second = rent(clean, offer, cancel_unavail=False)
    row = clean.sdk().show_instance(id=second)
    assert row["actual_status"] == row["cur_state"] == "stopped"
    billed = next(row for row in clean.billed()["instances"] if row["id"] == second)
    assert (billed["gpu_hour"] == 0, billed["disk_hour"] > 0) == (True, True)
    started = clean.sdk().start_instance(id=second)
    assert (started["success"], started["error"]) == (False, "resources_unavailable")
    clean.sdk().destroy_instance(id=second)
    assert offer not in [row["id"] for row in offers(clean)], "the first instance still has it"


def test_without_credit_nothing_is_rented(clean: MarketProcess) -> None:
    clean.set("/settings", credit=0)
    assert clean.sdk().show_user()["credit"] <= 0
    status, body = refusal(lambda: rent(clean))
    assert (status, body["error"]) == (400, "insufficient_credit")


def test_a_new_instance_has_every_key_of_a_real_one_and_no_ports_yet(clean: MarketProcess) -> None:
    row = clean.sdk().show_instance(id=rent(clean, label="selfhost-a", env={"A": "1", "-p 80:80": "1"}))
    real = json.loads(resources.files("selfhost_cli.sandbox").joinpath("instance.json").read_text())
    assert row.keys() == real.keys()
    assert (row["actual_status"], row["intended_status"], row["label"]) == (None, "running", "selfhost-a")
    assert (row["ports"], row["direct_port_start"]) == ({}, -1)
    assert row["extra_env"] == {"A": "1", "-p 80:80": "1"}
    assert row["dph_total"] == pytest.approx(row["dph_base"] + row["storage_cost"] * 20 / 720)


def test_an_unknown_instance_is_null_not_an_error(clean: MarketProcess) -> None:
    assert clean.sdk().show_instance(id=7) is None


def test_destroying_what_is_gone_is_no_such_instance(clean: MarketProcess) -> None:
    instance = rent(clean)
    sdk = clean.sdk()
    assert sdk.destroy_instance(id=instance)["success"] is True
    status, body = refusal(lambda: sdk.destroy_instance(id=instance))
    assert (status, body["error"]) == (404, "no_such_instance")
    assert sdk.show_instance(id=instance) is None


def test_the_listing_is_paged_by_25_and_filtered(clean: MarketProcess) -> None:
    every = clean.sdk().search_offers(query={}, no_default=True, limit=64, storage=8)
    many = [row["id"] for row in every if row["disk_space"] > 20][:30]
    rented = [rent(clean, offer, label=f"selfhost-{number % 2}") for number, offer in enumerate(many)]
    sdk = clean.sdk()
    clean.control.delete("/requests")
    assert [row["id"] for row in sdk.show_instances()] == sorted(rented)
    pages = sent(clean)
    assert len(pages) == 2
    assert set("/+=") <= set(pages[1]["query"]["after_token"]), "a token must be escaped"
    page = sdk.show_instances_v1({"select_filters": {"label": {"eq": "selfhost-1"}}, "limit": 100})
    assert page["instances_found"] == 15
    assert page["label_counts"] == {"selfhost-1": 15}
    assert page["next_token"] is None
    columns = sdk.show_instances_v1({"select_filters": {"id": {"in": rented[:1]}}, "select_cols": ["id", "label"]})
    assert columns["instances"] == [{"id": rented[0], "label": "selfhost-0"}]


def test_a_destroy_between_two_pages_hides_no_row(clean: MarketProcess) -> None:
    every = clean.sdk().search_offers(query={}, no_default=True, limit=64, storage=8)
    rented = [rent(clean, row["id"]) for row in every if row["disk_space"] > 20][:30]
    sdk = clean.sdk()
    order = {"order_by": [{"col": "id", "dir": "asc"}], "limit": 25}
    first = sdk.show_instances_v1(order)
    for gone in sorted(rented)[:5]:
        sdk.destroy_instance(id=gone)
    second = sdk.show_instances_v1(order | {"after_token": first["next_token"]})
    seen = [row["id"] for row in first["instances"] + second["instances"]]
    assert set(sorted(rented)[5:]) <= set(seen)


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"select_filters": {"colour": {"eq": "red"}}}, "invalid_request"),
        ({"select_filters": {"label": "x"}}, "invalid_request"),
        ({"after_token": "mine"}, "invalid_token"),
        ({"limit": 0}, "invalid_request"),
    ],
)
def test_a_listing_that_makes_no_sense_is_refused(clean: MarketProcess, parameters: dict[str, Any], error: str) -> None:
    sdk = clean.sdk()
    status, body = refusal(lambda: sdk.show_instances_v1(parameters))
    assert (status, body["error"]) == (400, error)


def test_the_old_list_is_gone(clean: MarketProcess) -> None:
    with clean.http(clean.facts["api_key"]) as http:
        answer = http.get("/api/v0/instances/", params={"owner": "me"})
    assert (answer.status_code, answer.json()["error"]) == (410, "deprecated_endpoint")


def test_a_label_can_be_changed(clean: MarketProcess) -> None:
    instance = rent(clean, label="a")
    clean.sdk().label_instance(id=instance, label="b")
    assert clean.sdk().show_instance(id=instance)["label"] == "b"


def test_account_keys_are_404_while_there_are_none(clean: MarketProcess) -> None:
    sdk = clean.sdk()
    assert refusal(sdk.show_ssh_keys)[0] == 404
    key = sdk.create_ssh_key(ssh_key=KEY)["key"]
    assert key["public_key"] == KEY
    assert [row["public_key"] for row in sdk.show_ssh_keys()] == [KEY]
    sdk.delete_ssh_key(id=key["id"])
    assert refusal(sdk.show_ssh_keys)[0] == 404
    assert refusal(lambda: sdk.create_ssh_key(ssh_key="-----BEGIN OPENSSH PRIVATE KEY-----"))[0] == 400


def test_attaching_a_key_twice_says_that_it_is_there(clean: MarketProcess) -> None:
    instance = rent(clean)
    sdk = clean.sdk()
    assert sdk.attach_ssh(instance_id=instance, ssh_key=KEY)["success"] is True
    again = sdk.attach_ssh(instance_id=instance, ssh_key=KEY)
    assert (again["success"], again["msg"]) == (False, "SSH key already associated with instance.")
    with clean.http(clean.facts["api_key"]) as http:
        keys = http.get(f"/api/v0/instances/{instance}/ssh/").json()["ssh_keys"]
    assert [row["public_key"] for row in json.loads(keys)] == [KEY]


def test_a_wrong_key_is_401_and_no_key_403(clean: MarketProcess) -> None:
    sdk = clean.sdk(key="wrong")
    status, body = refusal(sdk.show_user)
    assert (status, body["error"]) == (401, "auth_error")
    with clean.http() as http:
        assert http.get("/api/v0/users/current").status_code == 403
        assert http.get("/api/v0/users/current", auth=("net", "rc")).status_code == 401


def test_an_instance_key_is_good_for_its_own_instance_only(clean: MarketProcess) -> None:
    first, second = (row["id"] for row in offers(clean)[:2])
    answer = clean.sdk().create_instance(id=first, image="i", disk=20, cancel_unavail=True)
    own, key = answer["new_contract"], answer["instance_api_key"]
    other = rent(clean, second)
    with clean.http(key) as http:
        assert http.get(f"/api/v0/instances/{own}/").json()["instances"]["id"] == own
        assert http.put(f"/api/v0/instances/{own}/", json={"state": "running"}).json()["success"] is True
        for method, path, body in (
            ("GET", f"/api/v0/instances/{other}/", None),
            ("PUT", f"/api/v0/instances/{other}/", {"state": "stopped"}),
            ("DELETE", f"/api/v0/instances/{other}/", {}),
            ("PUT", f"/api/v0/instances/{own}/", {"label": "mine"}),
            ("GET", "/api/v1/instances/", None),
            ("GET", "/api/v0/users/current", None),
            ("GET", "/api/v0/ssh/", None),
            ("GET", "/api/v0/charges/", None),
            ("PUT", f"/api/v0/asks/{first}/", {"image": "i", "disk": 20}),
        ):
            assert http.request(method, path, json=body).status_code == 403, (method, path)
        assert http.request("DELETE", f"/api/v0/instances/{own}/", json={}).json()["success"] is True
    assert [row["id"] for row in clean.billed()["instances"]] == [other]


def test_charges_agree_with_what_is_billed(clean: MarketProcess) -> None:
    before = clean.billed()["total"]
    instance = rent(clean)
    until(lambda: clean.billed()["instances"][0]["total"] > 0)
    clean.sdk().destroy_instance(id=instance)
    assert clean.billed()["count"] == 0
    answer = clean.sdk().show_invoices_v1(charges=True, limit=100, latest_first=True)
    row = next(row for row in answer["results"] if row["source"] == f"instance-{instance}")
    assert row["amount"] == pytest.approx(sum(item["amount"] for item in row["items"]))
    assert [item["type"] for item in row["items"]] == ["gpu", "disk", "bwd", "bwu"]
    assert clean.billed()["total"] == pytest.approx(before + row["amount"])
    assert clean.sdk().show_user()["credit"] == pytest.approx(25 - clean.billed()["total"])


def test_control_needs_its_own_token(clean: MarketProcess) -> None:
    with clean.http(clean.facts["api_key"]) as http:
        assert http.get("/control/billed").status_code == 401
        assert http.post("/control/shutdown").status_code == 401


def test_what_makes_no_sense_to_control_is_refused(clean: MarketProcess) -> None:
    for path, body in (
        ("/faults", {"fault": "earthquake"}),
        ("/settings", {"colour": "red"}),
        ("/settings", {"stages": {"lunch": 1}}),
        ("/mirror", {"colour": "red"}),
        ("/kill", {"instance": 7}),
    ):
        assert clean.control.post(path, json=body).status_code == 400, path


def test_the_request_log_keeps_no_private_key(clean: MarketProcess) -> None:
    secret = "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n-----END OPENSSH PRIVATE KEY-----"
    clean.control.delete("/requests")
    rent(clean, onstart_cmd=f"HOST_KEY='{secret}'\n")
    create = sent(clean)[-1]
    assert create["body"]["onstart"] == "HOST_KEY='<private key>'\n"
    assert clean.facts["api_key"] not in json.dumps(sent(clean))


def test_market_json_is_for_its_owner_only(clean: MarketProcess) -> None:
    announced = clean.state / "market.json"
    assert announced.stat().st_mode & 0o777 == 0o600
    assert clean.facts.keys() == {"url", "pid", "control_token", "mirror", "registry", "api_key"}
    assert clean.facts["pid"] == clean.process.pid
