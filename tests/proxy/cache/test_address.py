"""Where a Redis is said to be."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from selfhost_cli.proxy.cache.stores.address import Address, from_variables, is_loopback, parse

HOST = "redis-1234.example.com"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://localhost", {"host": "localhost"}),
        ("redis://127.0.0.1:6380/2", {"port": 6380, "db": 2}),
        ("redis://[::1]:6380", {"host": "::1", "port": 6380}),
        ("redis://:p%40ss%2Fword@localhost", {"host": "localhost", "password": "p@ss/word"}),
        ("redis://me:secret@127.0.0.1", {"user": "me", "password": "secret"}),
        ("rediss://127.0.0.1", {"tls": True}),
        (
            f"redis://default:pw@{HOST}:1234",
            {"host": HOST, "port": 1234, "user": "default", "password": "pw", "tls": True},
        ),
        (f"rediss://{HOST}?ssl_cert_reqs=none", {"host": HOST, "tls": True, "verify": False}),
        (f"rediss://{HOST}?ssl_ca_certs=/ca.pem&db=3", {"host": HOST, "tls": True, "ca": "/ca.pem", "db": 3}),
        ("unix:///run/redis.sock", {"socket": "/run/redis.sock"}),
        ("unix://me:pw@/run/redis.sock?db=4", {"socket": "/run/redis.sock", "user": "me", "password": "pw", "db": 4}),
    ],
)
def test_a_url_says_where_it_is(url: str, expected: dict[str, Any]) -> None:
    assert asdict(parse(url)) == asdict(Address()) | expected


def test_whatever_leaves_this_machine_is_encrypted_unless_that_is_turned_off() -> None:
    assert not parse("redis://localhost").tls
    assert not parse("redis://127.8.9.10").tls
    for host in (HOST, "10.0.0.1", "redis", "localhost.example.com", "[fe80::1]"):
        assert parse(f"redis://{host}").tls
        assert parse(f"redis://{host}").verify
        assert not parse(f"redis://{host}", tls=False).tls
    assert parse("redis://localhost", tls=True).tls


@pytest.mark.parametrize(("host", "expected"), [("LOCALHOST", True), ("::1", True), ("127.1", False), ("", False)])
def test_loopback_is_told_by_its_names(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "settings", "why"),
    [
        ("", {}, "begins with"),
        (f"http://:{SECRET}@localhost", {}, "begins with"),
        (f"localhost:{SECRET}", {}, "begins with"),
        (f"redis://:{SECRET}/x@localhost", {}, "cannot be read"),
        (f"redis://:x/{SECRET}@localhost", {}, "cannot be read"),
        (f"redis://:{SECRET}#x@localhost", {}, "cannot be read"),
        (f"redis://me:{SECRET}@localhost:port", {}, "cannot be read"),
        (f"redis://me:{SECRET}@localhost:99999", {}, "cannot be read"),
        (f"redis://me:{SECRET}@[::1", {}, "cannot be read"),
        (f"redis://:{SECRET}@localhost#x", {}, "#"),
        (f"redis://:{SECRET}@localhost/zero", {}, "number of a database"),
        (f"redis://:{SECRET}@localhost?password={SECRET}", {}, "only db="),
        (f"redis://{HOST}?ssl_check_hostname=false", {}, "only db="),
        (f"redis://{HOST}?ssl_cert_reqs=optional", {}, "only db="),
        (f"unix://:{SECRET}@host/run/redis.sock", {}, "slash"),
        ("unix:", {}, "slash"),
        (f"rediss://:{SECRET}@localhost", {"tls": False}, "redis_tls"),
        (f"unix://:{SECRET}@/run/redis.sock", {"tls": True}, "TLS"),
        (f"redis://:{SECRET}@localhost/3", {"cluster": True}, "cluster"),
        (f"unix://:{SECRET}@/run/redis.sock", {"cluster": True}, "cluster"),
        ("redis://me@localhost", {}, "password"),
        (f"redis://:{SECRET}@localhost", {"ca": "ca.pem"}, "redis_tls"),
    ],
)
def test_what_is_wrong_with_a_url_is_told_without_its_password(url: str, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why) as told:
        parse(url, **settings)
    assert SECRET not in str(told.value)
    assert told.value.__suppress_context__ or told.value.__context__ is None


def test_the_variables_of_old_are_read() -> None:
    assert from_variables({}) is None
    assert from_variables({"REDIS_PORT": "1", "REDIS_PASSWORD": "x"}) is None
    host = from_variables({"REDIS_HOST": HOST, "REDIS_PORT": "1234", "REDIS_PASSWORD": "p@ss/word#"}, ca="ca.pem")
    assert host == Address(HOST, 1234, password="p@ss/word#", tls=True, ca="ca.pem")
    assert from_variables({"REDIS_HOST": "localhost", "REDIS_PASSWORD": ""}) == Address("localhost")
    both = from_variables({"REDIS_URL": "redis://:pw@localhost:7000", "REDIS_HOST": HOST})
    assert both == Address("localhost", 7000, password="pw")


@pytest.mark.parametrize(
    "variables",
    [
        {"REDIS_HOST": HOST, "REDIS_PORT": SECRET},
        {"REDIS_HOST": HOST, "REDIS_PORT": "0"},
        {"REDIS_HOST": f"redis://:{SECRET}@{HOST}"},
        {"REDIS_URL": f"redis://:{SECRET}/@{HOST}"},
    ],
)
def test_what_is_wrong_with_the_variables_is_told_without_a_password(variables: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"Redis|REDIS") as told:
        from_variables(variables)
    assert SECRET not in str(told.value)


def test_an_address_is_shown_without_its_password() -> None:
    address = parse(f"redis://me:{SECRET}@localhost:7000")
    assert SECRET not in f"{address} {address!r}"
    assert str(address) == "localhost:7000"
    assert str(parse("redis://[::1]")) == "[::1]:6379"
    assert str(parse("unix:///run/redis.sock")) == "/run/redis.sock"
