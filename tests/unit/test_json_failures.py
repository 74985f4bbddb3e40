"""With --json a failure is on stdout, too: for each command that reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfhost_cli.cli import app
from selfhost_cli.errors import UsageError

COMMANDS = (
    "up --yes",
    "up",
    "offers",
    "down",
    "reap",
    "status",
    "cost",
    "extend --hours 1",
    "extend --hours x",
    "env",
    "config show",
    "config get hours",
    "cache stats",
    "cache show",
    "cache flush",
    "ask x",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_program_reads_of_a_failure_on_stdout(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))
    monkeypatch.setenv("SELFHOST_HOURS", "many")
    with pytest.raises(UsageError) as caught:
        app.run([*command.split(), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["error"] == {"message": caught.value.message, "remedy": caught.value.remedy, "exit_code": 2}
    assert told["left"] == []
    with pytest.raises(UsageError):
        app.run(command.split())
    assert capsys.readouterr().out == ""
