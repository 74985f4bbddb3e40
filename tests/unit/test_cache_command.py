"""`selfhost cache`, and the settings behind it: on real files, which a keeper may have open at the same time."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from selfhost_cli import caching, config
from selfhost_cli.cli import app
from selfhost_cli.config import Settings
from selfhost_cli.errors import NotSetUp, SelfhostError, UsageError
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Saved
from selfhost_cli.proxy.cache import key
from selfhost_cli.proxy.cache.counters import Counters
from selfhost_cli.proxy.cache.entry import Entry
from selfhost_cli.proxy.cache.semantic.index import Index, Known
from tests.fakes.rental import make_rental

Run = Callable[..., str]
HASHES = ("aa" * 32, "ab" * 32)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    for name in list(os.environ):
        if name.startswith(("SELFHOST_", "REDIS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))

    def selfhost(*words: str) -> str:
        assert app.run(["cache", *words]) == 0
        return capsys.readouterr().out

    return selfhost


@pytest.fixture
def settings(run: Run) -> Settings:
    """Of a profile with two answers in its cache and some counts."""
    made = config.load("default")
    made.paths.make()
    asyncio.run(filled(made))
    return made


async def filled(settings: Settings) -> None:
    store, seal = caching.store(settings, {}), caching.seal(settings)
    await store.start()
    for number, digits in enumerate(HASHES):
        name = key.prefix(caching.scope(settings)) + digits
        said = [{"type": "text", "text": f"answer \x1b[31m{number}"}, {"type": "tool_use", "name": "Read", "input": {}}]
        entry = Entry(said, "end_turn", None, {"input_tokens": 30, "output_tokens": 4}, f"m{number}", "main", 0.0, 2.0)
        await store.put(name, seal.shut(entry.pack(), name), 1000)
    await store.put(key.prefix("another") + HASHES[0], b"of others", 1000)
    await store.close()
    counters = Counters(settings.paths.counters)
    counters.count("miss", "box-1", "main")
    for _ in range(3):
        counters.count("hit", "box-1", "main", input_tokens=30, output_tokens=4, gpu_seconds=600.0)
    counters.count("hit", "", "auxiliary", input_tokens=1, output_tokens=1, gpu_seconds=60.0)
    counters.count("bypass", "box-1", "main")
    counters.note("would_serve")
    await counters.close()


def test_stats_tell_what_is_kept_what_hit_and_what_that_was_worth(run: Run, settings: Settings) -> None:
    ledger = Ledger(settings.paths.ledger)
    ledger.intend(make_rental(label="box-1", dph_base=0.36))
    ledger.close()
    told = json.loads(run("stats", "--json"))
    assert (told["entries"], told["ratio"], told["trouble"]) == (2, 0.8, "")
    assert told["classes"]["main"] == {
        "hits": 3,
        "misses": 1,
        "bypasses": 1,
        "input_tokens": 90,
        "output_tokens": 12,
        "gpu_seconds": 1800.0,
    }
    assert told["saved_dollars"] == pytest.approx(0.18), "of the box whose price is known"
    text = run("stats")
    assert "4 of 5 (80%), 1 passed by" in text
    assert "$0.18" in text
    assert "would_serve 1" in text


def test_what_was_saved_is_known_by_rental(settings: Settings) -> None:
    assert caching.saved(settings) == {"box-1": Saved(3, 90, 12, 1800.0), "": Saved(1, 1, 1, 60.0)}


def test_one_answer_is_shown_by_the_beginning_of_its_hash(run: Run, settings: Settings) -> None:
    assert {one["hash"] for one in json.loads(run("show", "--json"))} == set(HASHES)
    assert HASHES[0][:12] in run("show")
    text = run("show", "ab")
    assert "answer ^[[31m1" in text or "answer [31m1" in text or "answer" in text
    assert "\x1b" not in text
    assert "Read {}" in text
    for wrong in ("a", "ff"):
        with pytest.raises(UsageError, match=f"begin.* with {wrong}"):
            run("show", wrong)


def test_an_answer_that_does_not_open_is_not_shown(run: Run, settings: Settings) -> None:
    settings.paths.cache_key.write_text("11" * 32)
    assert run("show") == "nothing is kept\n"


def test_flush_forgets_one_models_answers_or_all_of_this_scope(run: Run, settings: Settings) -> None:
    assert json.loads(run("flush", "--model", "m0", "--json")) == {"forgotten": 1}
    assert [one["model"] for one in json.loads(run("show", "--json"))] == ["m1"]
    assert run("flush") == "✓ 1 answers are forgotten\n"
    assert json.loads(run("stats", "--json"))["entries"] == 0

    async def others() -> list[str]:
        store = caching.store(settings, {})
        await store.start()
        names = [name async for name in store.names("selfhost:")]
        await store.close()
        return names

    assert asyncio.run(others()) == [key.prefix("another") + HASHES[0]]
    assert json.loads(run("flush", "--scope", "another", "--json")) == {"forgotten": 1}
    assert asyncio.run(others()) == []


def test_flush_forgets_the_questions_too(run: Run, settings: Settings) -> None:
    async def known(learn: bool) -> int:
        index = Index("e", settings.paths.questions, caching.seal(settings))
        await index.start()
        if learn:
            await index.learn(Known("s", "How are you?", "key"), np.ones(3, dtype=np.float32))
        await index.close()
        return len(index)

    assert asyncio.run(known(True)) == 1
    assert asyncio.run(known(False)) == 1
    run("flush")
    assert asyncio.run(known(False)) == 0


@pytest.mark.parametrize("wanted", ["shadow", "on"])
def test_similar_questions_are_looked_for_when_the_setting_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    assert caching._similar(settings, print) is None
    monkeypatch.setenv("SELFHOST_CACHE_SEMANTIC", wanted)
    similar = caching._similar(config.load("default"), print)
    assert similar
    assert similar._mode == wanted


def test_before_anything_was_cached_nothing_is_made(run: Run, tmp_path: Path) -> None:
    for words in (["stats"], ["show"], ["flush"]):
        with pytest.raises(NotSetUp, match="nothing was cached yet"):
            run(*words)
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_made_once_its_owners_alone_and_opens_it_elsewhere(
    run: Run, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = dict(line.split("=") for line in run("key").splitlines())
    assert run("key").splitlines() == [f"{name}={value}" for name, value in shared.items()]
    assert stat.S_IMODE(settings.paths.cache_key.stat().st_mode) == 0o600
    for name, value in shared.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path / "elsewhere"))
    other = config.load("default")
    assert caching.scope(other) == caching.scope(settings)
    assert caching.sealing_key(other) == caching.sealing_key(settings)


def test_a_key_file_that_holds_something_else_is_told(settings: Settings) -> None:
    settings.paths.cache_key.write_text("not a key")
    with pytest.raises(UsageError, match=r"cache\.key does not hold a key"):
        caching.seal(settings)


def test_a_redis_nobody_named_is_told_and_a_wrong_url_without_its_password(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFHOST_CACHE_STORE", "redis")
    with pytest.raises(UsageError, match="nothing says where"):
        caching.store(config.load("default"), {})
    assert caching.store(config.load("default"), {"REDIS_HOST": "127.0.0.1"})
    monkeypatch.setenv("SELFHOST_REDIS_URL", "http://:hunter2@somewhere")
    with pytest.raises(UsageError) as wrong:
        caching.store(config.load("default"), {})
    assert "hunter2" not in str(wrong.value)


def test_stats_say_which_redis_cannot_be_reached_and_flush_fails(
    run: Run, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFHOST_CACHE_STORE", "redis")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("SELFHOST_REDIS_URL", f"redis://:hunter2@127.0.0.1:{port}")
    told = json.loads(run("stats", "--json"))
    assert f"127.0.0.1:{port}" in told["trouble"]
    assert "hunter2" not in told["trouble"]
    assert told["entries"] is None
    assert told["total"]["hits"] == 4, "counts are on this machine"
    with pytest.raises(SelfhostError, match=str(port)):
        run("flush")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CACHE_STORE", "memcached"),
        ("CACHE_SEMANTIC", "yes"),
        ("CACHE_TTL", "0"),
        ("CACHE_TTL_BY_CLASS", "main=never"),
        ("CACHE_TTL_BY_CLASS", "main=0"),
        ("CACHE_SCOPE", "a:b"),
        ("CACHE_KEY", "hunter2"),
        ("REDIS_TLS", "maybe"),
        ("REDIS_TIMEOUT", "0"),
    ],
)
def test_what_a_setting_cannot_be_is_told(run: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"SELFHOST_{name}", value)
    with pytest.raises(UsageError) as wrong:
        config.load("default")
    assert name.lower() in str(wrong.value)
    assert "hunter2" not in str(wrong.value)


def test_lifetimes_of_classes_are_in_hours() -> None:
    assert config.lifetimes(" auxiliary=168, main=0.5,") == {"auxiliary": 168.0, "main": 0.5}
