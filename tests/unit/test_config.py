from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selfhost_cli import config
from selfhost_cli.config import Source
from selfhost_cli.errors import NotSetUp, UsageError
from selfhost_cli.providers.vast import cli_key


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "config" / "default").mkdir(parents=True)
    return {"SELFHOST_HOME": str(tmp_path)}


def write(env: dict[str, str], text: str) -> Path:
    path = config.paths("default", env).config_file
    path.write_text(text)
    return path


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(env: dict[str, str]) -> None:
    write(env, 'hours = 1\nregion = "US"\nport = 9000\n')
    settings = config.load("default", env=env | {"SELFHOST_HOURS": "2", "SELFHOST_REGION": "CA"}, flags={"hours": 3.0})
    assert (settings.hours, settings.region, settings.port, settings.gpu) == (3.0, "CA", 9000, "RTX 4090")
    found = [settings.sources[name] for name in ("hours", "region", "port", "gpu")]
    assert found == [Source.FLAG, Source.ENVIRONMENT, Source.FILE, Source.DEFAULT]


def test_flags_that_were_not_given_count_for_nothing(env: dict[str, str]) -> None:
    assert config.load("default", env=env, flags={"hours": None}).hours == 8.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hour = 1", "'hours'"),
        ('hours = "soon"', "expected a number"),
        ("hours = -1", "zero or more"),
        ("hours = 0", "more than zero"),
        ("port = 80.5", "whole number"),
        ("port = 70000", "1 to 65535"),
        ("disk = 0", "more than zero"),
        ('market_url = "foo"', "expected a URL"),
        ('market_url = ""', "expected a URL"),
        ('registry = "foo"', "expected a URL"),
        ('registry = "http://192.0.2.1:5000"', "expected https, or http on loopback"),
        ('api_key = "two\\nlines"', "printable"),
        ("gpu = 4090", "expected text"),
        ("unguarded = 'perhaps'", "true or false"),
        ("hours = [", "config.toml"),
    ],
)
def test_what_makes_no_sense_is_named(env: dict[str, str], text: str, message: str) -> None:
    write(env, text)
    with pytest.raises(UsageError, match=message):
        config.load("default", env=env)


def test_a_key_is_never_in_an_error_or_in_the_repr(env: dict[str, str]) -> None:
    write(env, "api_key = 12345678")
    with pytest.raises(UsageError) as caught:
        config.load("default", env=env)
    assert "12345678" not in caught.value.message
    assert "hunter2" not in repr(config.load("default", env={"VAST_API_KEY": "hunter2"}))


@pytest.mark.parametrize("given", ["registry.ollama.ai/library/qwen3-coder:30b", "library/qwen3-coder:30b"])
def test_a_models_name_is_the_one_that_ollama_lists(env: dict[str, str], given: str) -> None:
    assert config.load("default", env=env, flags={"model": given}).model == "qwen3-coder:30b"


def test_vasts_own_variable_serves_as_the_key(env: dict[str, str]) -> None:
    assert config.load("default", env=env | {"VAST_API_KEY": "a"}, flags={}).api_key == "a"
    assert config.load("default", env=env | {"VAST_API_KEY": "a", "SELFHOST_API_KEY": "b"}).api_key == "b"


@pytest.mark.parametrize("content", [b"\xff\xfe", "schlüssel".encode(), b"one\ntwo"])
def test_a_key_file_of_vasts_own_that_holds_no_key_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ".config" / "vastai" / "vast_api_key"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(NotSetUp, match=f"{path} does not hold a key"):
        cli_key({"HOME": str(tmp_path)})


def test_a_key_of_the_environment_never_goes_to_a_market_that_a_file_names(env: dict[str, str]) -> None:
    write(env, 'market_url = "http://127.0.0.1:4711/"\napi_key = "the-files-own"\n')
    for name in ("VAST_API_KEY", "SELFHOST_API_KEY"):
        assert config.load("default", env=env | {name: "the-real-one"}).api_key == "the-files-own"
    both = env | {"SELFHOST_API_KEY": "other", "SELFHOST_MARKET_URL": "http://127.0.0.1:4712"}
    assert config.load("default", env=both).api_key == "other"
    assert config.load("default", env=env).market_url == "http://127.0.0.1:4711"


def test_profiles_share_nothing_but_the_cache(env: dict[str, str]) -> None:
    one, two = config.paths("default", env), config.paths("demo", env)
    assert one.state != two.state
    assert one.config != two.config
    assert one.cache == two.cache


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b"])
def test_a_profile_name_cannot_leave_its_directory(env: dict[str, str], name: str) -> None:
    with pytest.raises(UsageError, match="profile"):
        config.paths(name, env)


def test_the_installation_id_is_made_once_even_by_many(env: dict[str, str]) -> None:
    where = config.paths("default", env)
    where.make()
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: config.installation_id(where), range(32)))
    assert len(made) == 1
    path = where.config / "installation"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(entry.name for entry in where.config.iterdir()) == ["installation"]


@pytest.mark.parametrize("content", [b"", b"0123456789ab", b"\xff" * 10, "é".encode() * 10])
def test_a_damaged_installation_id_is_not_replaced(env: dict[str, str], content: bytes) -> None:
    where = config.paths("default", env)
    (where.config / "installation").write_bytes(content)
    with pytest.raises(UsageError, match="installation does not hold an installation id"):
        config.installation_id(where)
    assert (where.config / "installation").read_bytes() == content


def test_only_a_market_on_this_machine_is_a_sandbox(env: dict[str, str]) -> None:
    assert not config.load("default", env=env).sandbox
    assert config.load("default", env=env, flags={"market_url": "http://127.0.0.1:4711"}).sandbox


def test_blanks_around_a_key_are_not_part_of_it(env: dict[str, str]) -> None:
    assert config.load("default", env=env | {"SELFHOST_API_KEY": "abc\r\n"}).api_key == "abc"
