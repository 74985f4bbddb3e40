"""Stores of each kind, on real files and real Redis servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.proxy.cache.redis_server import RedisServer, redis_cluster, redis_server


@pytest.fixture(scope="session")
def common_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(common_redis: RedisServer) -> RedisServer:
    """An empty one that no test may stop."""
    common_redis.ask("FLUSHALL")
    return common_redis


@pytest.fixture(scope="session")
def common_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture
def cluster(common_cluster: list[RedisServer]) -> list[RedisServer]:
    """An empty one that no test may stop."""
    for node in common_cluster:
        node.ask("FLUSHALL")
    return common_cluster
