"""A Redis as people run it, and as it fails: each request waits for it once at most, and soon after for nothing."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.crc import key_slot

from selfhost_cli.proxy.cache.stores import StoreDown
from selfhost_cli.proxy.cache.stores.address import Address, parse
from selfhost_cli.proxy.cache.stores.link import PROBE
from selfhost_cli.proxy.cache.stores.shared import SharedStore
from tests.proxy.cache.redis_server import RedisServer, redis_cluster, redis_server
from tests.proxy.kit import asynchronous

NAME = "selfhost:1:mine:aaaa"
SECRET = "Pa:ss/w@rd#1%"
PATIENT = 10.0
"""A deadline for tests that are not about it."""
DEADLINE = 0.2
BOUND = 5 * DEADLINE
"""What a request waited at most, on a machine that has other things to do."""


@asynccontextmanager
async def opened(address: Address, timeout: float = PATIENT, **settings: Any) -> AsyncIterator[SharedStore]:
    store = SharedStore(address, timeout=timeout, **({"patience": PATIENT, "backoff": (0.01, 0.05)} | settings))
    await store.start()
    try:
        yield store
    finally:
        await store.close()


async def well(store: SharedStore, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while store.trouble:
            await asyncio.sleep(0.005)


async def trouble(store: SharedStore, *words: str, seconds: float = 20) -> str:
    """Waits until it is told with these words."""
    try:
        async with asyncio.timeout(seconds):
            while not all(word in store.trouble for word in words):
                await asyncio.sleep(0.005)
    except TimeoutError:
        pytest.fail(f"{words} are not in {store.trouble!r}")
    return store.trouble


def at_once(question: Coroutine[Any, Any, Any]) -> Any:
    """The answer of what waits for nothing at all."""
    try:
        question.send(None)
    except StopIteration as done:
        return done.value
    question.close()
    pytest.fail("it waits")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """One of the test's own."""
    with redis_server(tmp_path / "redis") as server:
        yield server


# --- who may ---


@asynchronous
async def test_a_wrong_password_is_told_and_costs_requests_nothing(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.ask("CONFIG", "SET", "requirepass", "another")
    async with opened(replace(parse(server.url), password=SECRET)) as store:
        said = await trouble(store, "invalid username-password pair", f"127.0.0.1:{server.port}")
        assert at_once(store.get(NAME)) is None
        assert at_once(store.take(NAME, "me", 1)) is True
        at_once(store.put(NAME, b"answer", 60))
        with pytest.raises(StoreDown) as down:
            await store.size("selfhost:")
        assert SECRET not in said + str(down.value) + repr(store._address) + caplog.text
        assert "another" not in said


@asynchronous
async def test_without_the_password_that_it_wants_it_says_so(server: RedisServer) -> None:
    server.ask("CONFIG", "SET", "requirepass", SECRET)
    async with opened(parse(server.url)) as store:
        await trouble(store, "Authentication required")


@asynchronous
async def test_the_right_password_is_found_again_after_it_was_wrong(server: RedisServer) -> None:
    server.ask("CONFIG", "SET", "requirepass", "another")
    async with opened(replace(parse(server.url), password=SECRET)) as store:
        await trouble(store, "invalid username-password pair")
        server.ask("CONFIG", "SET", "requirepass", SECRET)
        await well(store)


@asynchronous
async def test_a_user_with_just_the_rights_that_it_needs_can_do_all(server: RedisServer) -> None:
    rights = ("~selfhost:*", "+get", "+set", "+del", "+eval", "+pexpire", "+scan", "+strlen", "+info")
    server.ask("ACL", "SETUSER", "cache", "on", f">{SECRET}", *rights)
    async with opened(replace(parse(server.url), user="cache", password=SECRET)) as store:
        await well(store)
        await store.put(NAME, b"answer", 60)
        assert await store.get(NAME) == b"answer"
        assert await store.take(NAME, "me", 60)
        assert await store.take(NAME, "me", 60)
        await store.leave(NAME, "me")
        assert await store.take(NAME, "you", 60)
        assert (await store.size("selfhost:")).entries == 1
        assert await store.delete(NAME)
        assert not store.trouble


@asynchronous
async def test_a_user_who_may_not_read_its_names_is_in_trouble_from_the_start(server: RedisServer) -> None:
    server.ask("ACL", "SETUSER", "other", "on", f">{SECRET}", "~other:*", "+@all")
    async with opened(replace(parse(server.url), user="other", password=SECRET)) as store:
        await trouble(store, "no permissions")
        assert at_once(store.get(NAME)) is None


@asynchronous
async def test_a_user_who_may_only_read_gets_answers_and_keeps_none(server: RedisServer) -> None:
    server.ask("SET", NAME, "answer")
    server.ask("ACL", "SETUSER", "reader", "on", f">{SECRET}", "~selfhost:*", "+get")
    async with opened(replace(parse(server.url), user="reader", password=SECRET)) as store:
        await well(store)
        await store.put("selfhost:1:mine:bbbb", b"mine", 60)
        await trouble(store, "refuses SET", "no permissions")
        assert await store.get(NAME) == b"answer"
        assert await store.take(NAME, "me", 60) is True
        server.ask("ACL", "SETUSER", "reader", "+set", "+eval")
        await store.put("selfhost:1:mine:bbbb", b"mine", 60)
        assert await store.take(NAME, "me", 60)
        assert not store.trouble


# --- how it is reached ---


@asynchronous
async def test_a_unix_socket_with_a_user_and_a_database(server: RedisServer) -> None:
    server.ask("ACL", "SETUSER", "cache", "on", ">secret", "~*", "+@all")
    async with opened(parse(f"unix://cache:secret@{server.socket}?db=3")) as store:
        await well(store)
        await store.put(NAME, b"answer", 60)
        assert await store.get(NAME) == b"answer"
    assert server.ask("EXISTS", NAME) == 0
    server.ask("SELECT", 3)
    assert server.ask("GET", NAME) == b"answer"


class Authority:
    """Signs certificates for servers."""

    def __init__(self, folder: Path, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._folder = folder
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._signed(self._name, self._key, None).public_bytes(serialization.Encoding.PEM))

    def options(self, host: str) -> tuple[str, ...]:
        """Of a redis-server that is called so."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        certificate, private = self._folder / "server.pem", self._folder / "server.key"
        certificate.write_bytes(self._signed(name, key, host).public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(private), "--tls-ca-cert-file")
        return (*files, str(self.file), "--tls-auth-clients", "no")

    def _signed(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, host: str | None) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
        )
        if host:
            known = x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
            builder = builder.add_extension(x509.SubjectAlternativeName([known]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@asynchronous
async def test_tls_with_an_authority_of_ones_own(tmp_path: Path, authority: Authority) -> None:
    with redis_server(tmp_path / "redis", *authority.options("127.0.0.1"), tls=True) as server:
        server.ask("CONFIG", "SET", "requirepass", "secret")
        url = f"rediss://:secret@127.0.0.1:{server.tls_port}"
        async with opened(parse(url, ca=str(authority.file))) as store:
            await well(store)
            await store.put(NAME, b"answer" * 20_000, 60)
            assert await store.get(NAME) == b"answer" * 20_000


@asynchronous
async def test_a_certificate_of_somebody_else_is_refused(tmp_path: Path, authority: Authority) -> None:
    with redis_server(tmp_path / "redis", *authority.options("127.0.0.1"), tls=True) as server:
        url = f"rediss://127.0.0.1:{server.tls_port}"
        other = Authority(tmp_path, "other")
        async with opened(parse(url, ca=str(other.file))) as wrong, opened(parse(url)) as system:
            for store in (wrong, system):
                await trouble(store, "CERTIFICATE_VERIFY_FAILED")
                assert at_once(store.get(NAME)) is None
        async with opened(parse(f"{url}?ssl_cert_reqs=none")) as store:
            await well(store)


@asynchronous
async def test_a_certificate_for_another_host_is_refused(tmp_path: Path, authority: Authority) -> None:
    with redis_server(tmp_path / "redis", *authority.options("redis.example"), tls=True) as server:
        url = f"rediss://127.0.0.1:{server.tls_port}"
        async with opened(parse(url, ca=str(authority.file))) as store:
            await trouble(store, "CERTIFICATE_VERIFY_FAILED", "127.0.0.1")


@asynchronous
async def test_tls_with_a_redis_that_speaks_none_says_what_to_do(server: RedisServer) -> None:
    async with opened(parse(server.url, tls=True), patience=0.3) as store:
        await trouble(store, "redis_tls")


@asynchronous
async def test_a_file_of_certificates_that_is_not_there_is_told(server: RedisServer) -> None:
    async with opened(parse(server.url, tls=True, ca="nowhere.pem")) as store:
        await trouble(store, "nowhere.pem")


# --- how it fails ---


async def waited(question: Coroutine[Any, Any, Any]) -> float:
    began = time.monotonic()
    await question
    return time.monotonic() - began


@pytest.mark.parametrize("end", ["kill", "pause"])
@asynchronous
async def test_when_it_dies_or_stalls_under_load_each_request_waits_once_and_the_next_ones_not_at_all(
    server: RedisServer, end: str
) -> None:
    async with opened(parse(server.url), DEADLINE) as store:
        await well(store)
        await store.put(NAME, b"x" * 5000, 600)
        served, lost, longest = 0, 0, 0.0

        async def client() -> None:
            nonlocal served, lost, longest
            while lost < 50:
                began = time.monotonic()
                found = await store.get(NAME)
                longest = max(longest, time.monotonic() - began)
                served, lost = served + bool(found), lost + (not found)
                if served == 500:
                    served += 1
                    getattr(server, end)()

        async with asyncio.timeout(30):
            await asyncio.gather(*(client() for _ in range(50)))
        assert served > 500
        assert longest < BOUND
        assert store.trouble
        assert at_once(store.get(NAME)) is None
        assert at_once(store.take(NAME, "me", 1)) is True
        at_once(store.put(NAME, b"x", 60))
        at_once(store.leave(NAME, "me"))
        assert at_once(store.delete(NAME)) is False
        server.start() if end == "kill" else server.resume()
        await well(store)
        await store.put(NAME, b"again", 60)
        assert await store.get(NAME) == b"again"


@asynchronous
async def test_what_connects_but_is_slow_stays_in_trouble(server: RedisServer) -> None:
    server.pause()  # the kernel still accepts connections for it
    async with opened(parse(server.url), DEADLINE, patience=DEADLINE) as store:
        await trouble(store, f"127.0.0.1:{server.port}", "within")
        assert at_once(store.get(NAME)) is None
        server.resume()
        await well(store)


@asynchronous
async def test_keeping_an_answer_does_not_wait_for_a_stalled_redis_and_is_not_its_end(server: RedisServer) -> None:
    async with opened(parse(server.url), DEADLINE) as store:
        await well(store)
        server.pause()
        try:
            assert await waited(store.put(NAME, b"x" * 2**20, 60)) < BOUND
        finally:
            server.resume()

        async def arrived() -> None:
            while not await store.get(NAME):
                await well(store)

        await asyncio.wait_for(arrived(), 20)


@asynchronous
async def test_a_busy_laptop_is_not_taken_for_a_slow_redis(server: RedisServer) -> None:
    async with opened(parse(server.url), DEADLINE) as store:
        await well(store)
        await store.put(NAME, b"x" * 5000, 60)
        server.pause()
        asked = [asyncio.create_task(store.get(NAME)) for _ in range(20)]
        for _ in range(3):
            await asyncio.sleep(0)  # they are sent
        server.resume()
        time.sleep(2 * DEADLINE)  # the loop is held up; the answers are there before it looks
        assert all(await asyncio.gather(*asked))
        assert not store.trouble


@asynchronous
async def test_a_client_that_goes_away_takes_no_other_ones_answer(server: RedisServer) -> None:
    async with opened(parse(server.url)) as store:
        await well(store)
        names = [f"selfhost:1:mine:{number}" for number in range(50)]
        await asyncio.gather(*(store.put(name, name.encode(), 60) for name in names))
        before = server.ask("INFO", "stats")["total_connections_received"]
        for _ in range(5):
            asked = {name: asyncio.create_task(store.get(name)) for name in names}
            await asyncio.sleep(0)
            for name in names[::3]:
                asked[name].cancel()
            for name in set(names) - set(names[::3]):
                assert await asked[name] == name.encode()
        assert server.ask("INFO", "stats")["total_connections_received"] == before


@asynchronous
async def test_a_redis_that_closes_its_connections_is_back_soon(server: RedisServer) -> None:
    async with opened(parse(server.url)) as store:
        await well(store)
        server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await trouble(store, "closed")
        await well(store)


@asynchronous
async def test_a_redis_that_is_full_and_lets_go_of_old_entries_is_well(server: RedisServer) -> None:
    server.ask("CONFIG", "SET", "maxmemory", "4mb", "maxmemory-policy", "allkeys-lru")
    async with opened(parse(server.url)) as store:
        await well(store)
        for number in range(200):
            await store.put(f"{NAME}{number}", os.urandom(50_000), 600)
        size = await store.size("selfhost:")
        assert size.evictions
        assert 0 < size.entries < 200
        assert size.bytes == size.entries * 50_000 < 4 * 2**20
        assert not store.trouble


@asynchronous
async def test_a_redis_that_is_full_and_keeps_all_still_answers(server: RedisServer) -> None:
    async with opened(parse(server.url)) as store:
        await well(store)
        await store.put(NAME, b"kept", 600)
        server.ask("CONFIG", "SET", "maxmemory", "1", "maxmemory-policy", "noeviction")
        connections = server.ask("INFO", "stats")["total_connections_received"]
        for number in range(20):
            await store.put(f"{NAME}{number}", b"more", 600)
            assert await store.take(f"{NAME}{number}", "me", 60) is True
        await trouble(store, "refuses SET", "maxmemory")
        assert await store.get(NAME) == b"kept"
        assert await store.get(f"{NAME}1") is None
        assert server.ask("INFO", "stats")["total_connections_received"] == connections
        server.ask("CONFIG", "SET", "maxmemory", "0")
        await store.put(NAME, b"new", 600)
        await store.take(NAME, "me", 60)
        assert not store.trouble
        assert await store.get(NAME) == b"new"


# --- a cluster ---


def parts(nodes: list[RedisServer]) -> dict[int, str]:
    """A name for each node that has it."""
    names = (f"selfhost:1:mine:{number}" for number in range(1000))
    return {key_slot(name.encode()) * len(nodes) // 2**14: name for name in names}


@asynchronous
async def test_a_cluster_is_used_in_all_its_parts(cluster: list[RedisServer]) -> None:
    names = list(parts(cluster).values())
    async with opened(parse(cluster[1].url, cluster=True)) as store:
        await well(store)
        for name in names:
            await store.put(name, name.encode(), 60)
            assert await store.get(name) == name.encode()
        assert [node.ask("DBSIZE") for node in cluster] == [1, 1, 1]
        assert sorted([name async for name in store.names("selfhost:")]) == sorted(names)
        assert (await store.size("selfhost:")).entries == 3


@asynchronous
async def test_a_cluster_and_one_redis_are_not_taken_for_each_other(
    redis: RedisServer, cluster: list[RedisServer]
) -> None:
    elsewhere = cluster[key_slot(PROBE.encode()) * 3 // 2**14 - 1]
    async with opened(parse(elsewhere.url)) as alone, opened(parse(redis.url, cluster=True)) as together:
        await trouble(alone, "it is a cluster", "redis_cluster")
        await trouble(together, "cluster support disabled")


@asynchronous
async def test_what_moves_to_another_node_is_found_there(tmp_path: Path) -> None:
    with redis_cluster(tmp_path) as nodes:
        name = parts(nodes)[0]
        slot = key_slot(name.encode())
        async with opened(parse(nodes[0].url, cluster=True)) as store:
            await well(store)
            for node in nodes:
                node.ask("CLUSTER", "SETSLOT", slot, "NODE", nodes[2].ask("CLUSTER", "MYID"))
            assert await store.get(name) is None  # told that it has moved
            await store.put(name, b"answer", 60)
            assert await store.get(name) == b"answer"
            assert nodes[2].ask("DBSIZE") == 1
            assert not store.trouble


@asynchronous
async def test_when_one_node_of_a_cluster_dies_the_others_serve_and_it_is_found_again(tmp_path: Path) -> None:
    with redis_cluster(tmp_path) as nodes:
        names = parts(nodes)
        async with opened(parse(nodes[0].url, cluster=True), DEADLINE) as store:
            await well(store)
            for name in names.values():
                await store.put(name, b"answer", 600)
            nodes[0].kill()  # the one that was named, too
            await trouble(store, f"127.0.0.1:{nodes[0].port}")
            assert at_once(store.get(names[0])) is None
            assert [await store.get(names[number]) for number in (1, 2)] == [b"answer"] * 2
            with pytest.raises(StoreDown, match=str(nodes[0].port)):
                await store.size("selfhost:")
            nodes[0].start()
            await well(store)
