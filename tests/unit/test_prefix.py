"""What is kept of a session's first request, and what of it a box may read ahead."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli.errors import SelfhostError
from selfhost_cli.prefix import Prefix, Store, taken

AGENT = "claude-cli/2.1.330 (external, cli)"
HEAD: dict[str, Any] = {
    "system": [{"type": "text", "text": "You are careful."}],
    "tools": [{"name": "Read", "input_schema": {"type": "object"}}],
}
REMINDER = {"type": "text", "text": "<system-reminder>\nBe kind.\n</system-reminder>"}
PLACE = {"role": "system", "content": " - Primary working directory: /home/me/project\n - Platform: linux"}
FIRST = HEAD | {
    "model": "qwen3-coder:30b",
    "messages": [
        {"role": "user", "content": [REMINDER, {"type": "text", "text": "the words of the user"}]},
        PLACE,
    ],
    "metadata": {"user_id": "the id of the user"},
    "max_tokens": 8192,
    "stream": True,
}


def heard(body: Any = FIRST, agent: str = AGENT) -> Prefix | None:
    return taken(agent, json.dumps(body, separators=(",", ":")).encode())


def known(**changes: Any) -> Prefix:
    prefix = heard(FIRST | changes)
    assert prefix
    return prefix


def test_all_is_kept_but_what_the_user_said_and_who_they_are() -> None:
    prefix = known()
    assert (prefix.mode, prefix.version) == ("cli", "2.1.330")
    assert prefix.body == HEAD | {"messages": [{"role": "user", "content": [REMINDER]}, PLACE]}
    assert "user said" not in repr(prefix)


@pytest.mark.parametrize("quote", ["Called the Read tool with secret.py", "Result of calling the Read tool: KEY = 1"])
def test_files_that_the_user_named_are_theirs(quote: str) -> None:
    """Claude Code shows them to the model as reminders."""
    shown = {"type": "text", "text": f"<system-reminder>\n{quote}\n</system-reminder>"}
    body = known(messages=[{"role": "user", "content": [REMINDER, shown]}, PLACE]).body
    assert body["messages"] == [{"role": "user", "content": [REMINDER]}, PLACE]


@pytest.mark.parametrize("said", ["the words of the user", [{"type": "text", "text": "the words of the user"}]])
def test_a_message_of_nothing_else_is_left_out(said: Any) -> None:
    assert known(messages=[{"role": "user", "content": said}, PLACE]).body["messages"] == [PLACE]


@pytest.mark.parametrize(
    "body",
    [
        FIRST | {"messages": [*FIRST["messages"], {"role": "assistant", "content": "so"}]},
        FIRST | {"tools": []},
        FIRST | {"messages": [{"role": "user", "content": "hi"}]},
        FIRST | {"messages": "hi"},
        FIRST | {"messages": [{"role": "user"}]},
        [],
    ],
)
def test_no_other_request_is_taken(body: Any) -> None:
    assert heard(body) is None


@pytest.mark.parametrize("agent", ["", "curl/8", "claude-cli/2.1.330 (external, sdk-ts)", "anthropic/1 claude-cli/2"])
def test_nobody_elses_is_taken(agent: str) -> None:
    assert heard(agent=agent) is None


def test_what_is_no_json_is_not_taken() -> None:
    assert taken(AGENT, b"{") is None


def test_only_a_session_in_the_same_directory_gets_the_projects_part() -> None:
    prefix = known()
    assert prefix.ahead("/home/me/project")["messages"] == prefix.body["messages"]
    for elsewhere in ("/home/me", "/home/me/project2", "/home/me/projec", ""):
        ahead = prefix.ahead(elsewhere)
        assert "/home/me" not in json.dumps(ahead)
        assert (ahead["system"], ahead["tools"]) == (HEAD["system"], HEAD["tools"])


def test_the_store_keeps_one_of_each_mode_for_nobody_else_to_read(tmp_path: Path) -> None:
    store, terminal = Store(tmp_path / "prefixes.json"), known()
    printing = heard(agent="claude-cli/2.1.330 (external, sdk-cli)")
    assert printing
    assert store.all() == {}
    assert store.keep(terminal)
    assert not store.keep(terminal), "the same again is no news"
    assert store.keep(printing)
    newer = known(system=[{"type": "text", "text": "You are quick."}])
    assert store.keep(newer)
    assert store.all() == {"cli": newer, "sdk-cli": printing}
    assert stat.S_IMODE((tmp_path / "prefixes.json").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["prefixes.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"cli": 3}', '{"cli": {"mode": "cli"}}'])
def test_a_store_that_is_none_is_empty(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prefixes.json"
    path.write_text(content)
    assert Store(path).all() == {}


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(SelfhostError, match="cannot be written"):
        Store(tmp_path / "missing" / "prefixes.json").keep(known())
