"""The old system's variables: one table, what is found of it, and that it is told once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from selfhost_cli import config, old_variables
from selfhost_cli.claude import environment
from selfhost_cli.old_variables import FILE, TABLE, Now

NAMES = {
    "REDIS_HOST", "REDIS_PORT", "REDIS_PASSWORD", "REDIS_URL", "CACHE_TTL", "MODEL_NAME", "ANTHROPIC_MODEL", "API_PORT",
    "OLLAMA_HOST", "CEREBRAS_API_KEY", "VAST_API_KEY", "ANTHROPIC_BASE_URL",
}  # fmt: skip


def test_the_table_has_each_of_them_once() -> None:
    assert sorted(one.name for one in TABLE) == sorted(NAMES)
    assert FILE.name == ".env"


def test_only_what_the_table_calls_used_changes_a_setting(tmp_path: Path) -> None:
    home = {"SELFHOST_HOME": str(tmp_path)}
    without = config.load("default", env=home)
    for one in TABLE:
        changed = config.load("default", env=home | {one.name: "4711"}) != without
        assert changed == (one.now is Now.USED), one.name


def test_what_the_table_calls_a_conflict_is_what_claude_is_given_instead() -> None:
    given = environment("http://127.0.0.1:8001", "token", "qwen3:8b", 65_536, {})
    for one in TABLE:
        assert (one.name in given) == (one.now is Now.CONFLICT), one.name


def test_each_is_told_once_and_what_is_used_never(tmp_path: Path) -> None:
    env = {"OLLAMA_HOST": "pw-of-mine", "VAST_API_KEY": "key-of-mine", "REDIS_URL": "redis://:of-mine@host"}
    told = old_variables.remark(env, tmp_path, tmp_path)
    assert told == "OLLAMA_HOST is not used: `selfhost config show` tells what is, instead"
    assert old_variables.remark(env, tmp_path, tmp_path) == ""
    more = env | {"MODEL_NAME": "x", "API_PORT": "1", "OLLAMA_HOST": ""}
    assert old_variables.remark(more, tmp_path, tmp_path).startswith("MODEL_NAME and API_PORT are not used")
    assert "of-mine" not in (tmp_path / old_variables.MEMORY).read_text()


@pytest.mark.parametrize("memory", ["{", "{}", "[1]", None])
def test_a_memory_that_cannot_be_read_or_written_is_no_reason_to_fail(tmp_path: Path, memory: str | None) -> None:
    state = tmp_path / "not there"
    if memory is not None:
        state.mkdir()
        (state / old_variables.MEMORY).write_text(memory)
    assert "CACHE_TTL" in old_variables.remark({"CACHE_TTL": "1"}, state, tmp_path)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("REDIS_HOST=localhost\n", True),
        ("# x\nexport  API_PORT = 8000", True),
        ("REDIS_HOST=\n", False),
        ("MY_REDIS_HOST=x\n#API_PORT=1\n", False),
        ("\xff\x00", False),
    ],
)
def test_a_file_counts_when_it_sets_one_of_them(tmp_path: Path, text: str, counts: bool) -> None:
    (tmp_path / ".env").write_text(text)
    assert bool(old_variables.found({}, tmp_path, tmp_path)) == counts


def test_a_pipe_in_the_files_place_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".env")
    assert old_variables.found({}, tmp_path, tmp_path) == ()


def test_what_selfhost_env_printed_is_no_conflict(tmp_path: Path) -> None:
    (tmp_path / "front.token").write_text("ours\n")
    env = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:8001", "ANTHROPIC_MODEL": "x", "ANTHROPIC_AUTH_TOKEN": "ours"}
    assert old_variables.found(env, tmp_path, tmp_path) == ()
    assert len(old_variables.found(env | {"ANTHROPIC_AUTH_TOKEN": "another"}, tmp_path, tmp_path)) == 2
