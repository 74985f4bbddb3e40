"""The backends that one can choose: what may be written down, where keys are, and the old system's file."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from selfhost_cli import backends, config
from selfhost_cli.backends import Backend, Kind, imported, keys
from selfhost_cli.config import Paths
from selfhost_cli.errors import NotSetUp, SelfhostError, UsageError

KEY = "sk-not-a-real-one"
SOLD = Backend("sold", Kind.OPENAI, "https://api.example.com", "tiny", 4096, key="env:SOLD_KEY")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return config.paths("test", {"SELFHOST_HOME": str(tmp_path)})


def test_what_is_added_is_there_the_next_time_and_nothing_in_the_file_is_lost(paths: Paths) -> None:
    backends.add(paths, SOLD)
    text = paths.backends.read_text()
    paths.backends.write_text(f"# mine\n{text}")
    backends.add(paths, replace(SOLD, name="other", price_in=0.5, fields={"seed": 7}))
    assert backends.load(paths)["sold"] == SOLD
    assert backends.get(paths, "other").fields == {"seed": 7}
    assert "# mine" in paths.backends.read_text()
    assert list(backends.load(paths)) == ["vast", "sold", "other"]
    assert stat.S_IMODE(paths.backends.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("kind = 'openai'", "no model"),
        ("kind = 'wat'", "'wat' is not a valid Kind"),
        ("kind = 'openai'\nurl = 'https://a'\nmodel = 'm'\nsecret = 'x'", "knows no secret"),
        ("kind = 'openai'\nurl = 'https://a'\nmodel = 7", "model is to be a text"),
        ("kind = 'openai'\nurl = 'https://a'\nmodel = 'm'\nslots = true", "slots is to be a whole number"),
        ("kind = 'openai'\nurl = 'https://a'\nmodel = 'm'\nprice_in = -1", "price_in is to be a number of dollars"),
        ("kind = 'openai'\nurl = 'https://a'\nmodel = 'm'\nkey = 'sk-123'", "no place for a key"),
        ("kind = 'openai'\nurl = 'https://a'\nmodel = 'm'\nfields = 'seed'", "fields is to be a table"),
        ("kind = 'local'\nurl = 'http://127.0.0.1:1'\nmodel = 'm'", "engine is one of"),
        ("kind = 'vast'", "is there already"),
    ],
)
def test_what_makes_no_sense_in_the_file_is_named(paths: Paths, entry: str, reason: str) -> None:
    paths.make()
    paths.backends.write_text(f"[mine]\n{entry}\n")
    with pytest.raises(UsageError, match=reason) as error:
        backends.load(paths)
    assert str(paths.backends) in error.value.message
    assert "backend mine" in error.value.message


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://api.example.com/v1", "https://api.example.com"),
        ("https://api.example.com/v1/", "https://api.example.com"),
        ("https://api.example.com/v2/abc/openai/v1/chat/completions", "https://api.example.com/v2/abc/openai"),
        ("http://127.0.0.1:11434", "http://127.0.0.1:11434"),
        ("http://[::1]:8000/v1/messages", "http://[::1]:8000"),
    ],
)
def test_an_address_is_kept_without_what_every_request_adds(url: str, kept: str) -> None:
    assert backends.address(url, plain_http=False) == kept


@pytest.mark.parametrize(
    "url",
    [
        *("", "api.example.com", "ftp://a", "https://", "https://a:99999", "https://a/?key=1", "https://a/#b"),
        *("https://me:pw@a", "https://a/{endpoint}", "http://10.0.0.1", "http://127.0.0.1.example.com", "http://a b"),
    ],
)
def test_invalid_url(url: str) -> None:
    with pytest.raises(UsageError) as error:
        backends.address(url, plain_http=False)
    assert "pw" not in error.value.message


def test_http_over_a_network_only_when_it_is_asked_for() -> None:
    assert backends.address("http://10.0.0.1:8000/v1", plain_http=True) == "http://10.0.0.1:8000"


# --- which of them serve ---


def test_the_rented_box_serves_until_something_else_is_chosen(paths: Paths) -> None:
    assert backends.chain(paths) == ("vast",)
    backends.add(paths, SOLD)
    backends.use(paths, ["vast", "sold"])
    assert backends.chain(paths) == ("vast", "sold")
    assert [one.name for one in backends.serving(paths)] == ["vast", "sold"]
    assert backends.variables(paths) == {"SOLD_KEY"}


@pytest.mark.parametrize("names", [["nobody"], ["sold", "sold"]])
def test_a_choice_that_cannot_be_changes_nothing(paths: Paths, names: list[str]) -> None:
    backends.add(paths, SOLD)
    with pytest.raises(UsageError):
        backends.use(paths, names)
    assert backends.chain(paths) == ("vast",)


def test_what_is_in_use_is_not_removed(paths: Paths) -> None:
    backends.add(paths, SOLD)
    backends.use(paths, ["sold"])
    with pytest.raises(UsageError, match="in use"):
        backends.remove(paths, "sold")
    backends.use(paths, ["vast"])
    backends.remove(paths, "sold")
    assert list(backends.load(paths)) == ["vast"]
    with pytest.raises(UsageError):
        backends.remove(paths, "vast")


@pytest.mark.parametrize("text", ["", "[]", '{"chain": 7}', '{"chain": []}', "\0"])
def test_a_damaged_choice_is_the_rented_box(paths: Paths, text: str) -> None:
    paths.make()
    paths.use.write_text(text)
    assert backends.chain(paths) == ("vast",)


# --- keys ---


def test_key_missing(paths: Paths) -> None:
    for place in ("env:SOLD_KEY", "file"):
        with pytest.raises(NotSetUp, match="its key is missing") as error:
            keys.read(paths, "sold", place, {})
        assert "selfhost backends key sold" in error.value.remedy


def test_key_empty(paths: Paths) -> None:
    with pytest.raises(NotSetUp, match="its key is empty"):
        keys.read(paths, "sold", "env:SOLD_KEY", {"SOLD_KEY": " \n"})
    keys.keep(paths, "sold", "file", "")
    with pytest.raises(NotSetUp, match="its key is empty"):
        keys.read(paths, "sold", "file", {})


def test_a_key_in_a_file_is_its_owners_alone(paths: Paths) -> None:
    keys.keep(paths, "sold", "file", f" {KEY}\n")
    path = paths.config / "keys" / "sold"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.read(paths, "sold", "file", {}) == KEY
    path.chmod(0o644)
    with pytest.raises(NotSetUp, match="others may read"):
        keys.read(paths, "sold", "file", {})
    keys.forget(paths, "sold", "file")
    assert not path.exists()


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel", "nul\0"])
def test_a_key_that_is_none_is_refused_and_not_shown(paths: Paths, key: str) -> None:
    with pytest.raises(NotSetUp) as error:
        keys.read(paths, "sold", "env:SOLD_KEY", {"SOLD_KEY": key})
    assert key not in error.value.message + error.value.remedy


@pytest.mark.parametrize("place", ["sk-123", "env:", "env:A B", "file:/etc/passwd"])
def test_a_key_is_not_taken_for_the_place_of_one(place: str) -> None:
    with pytest.raises(UsageError):
        keys.checked(place)


# --- presets, and the old system's file ---


def test_presets_are_data_with_source_and_date() -> None:
    presets = backends.presets()
    assert set(presets) >= {"cerebras", "runpod", "anthropic"}
    for preset in presets.values():
        assert preset.source
        assert preset.date >= "2026-11-01"
        assert keys.variable(preset.key)


OLD = {
    "backends": {
        "self-hosted": {"url": "http://127.0.0.1:8000", "model": "qwen2.5-coder"},
        "vast-ai": {"url": "http://1.2.3.4:8000", "apiKey": KEY},
        "cerebras": {"apiKey": KEY, "model": "gpt-oss-120b"},
        "far": {"url": "http://1.2.3.4:8000/v1", "model": "m", "apiKey": KEY},
    }
}


def test_the_old_file_is_taken_apart_into_backends_and_keys(tmp_path: Path) -> None:
    path = tmp_path / ".llmrc.json"
    path.write_text(json.dumps(OLD))
    found = {one.name: one for one in imported.read(path)}
    assert found["self-hosted"].backend
    assert found["self-hosted"].backend.kind is Kind.LOCAL
    assert found["vast"].left_out
    assert found["cerebras"].key == KEY
    assert found["cerebras"].backend
    assert found["cerebras"].backend.url == "https://api.cerebras.ai"
    assert found["cerebras"].backend.key == "file"
    assert "not encrypted" in found["far"].left_out
    assert KEY not in repr(found)


@pytest.mark.parametrize("text", ["", "[]", "{", f'{{"backends": "{KEY}"}}'])
def test_what_is_no_such_file_is_told_without_what_it_holds(tmp_path: Path, text: str) -> None:
    path = tmp_path / ".llmrc.json"
    path.write_text(text)
    with pytest.raises(SelfhostError) as error:
        imported.read(path)
    assert KEY not in error.value.message + error.value.remedy
