"""`selfhost completion`: the scripts, and what a shell is offered; bash itself asks, where it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfhost_cli import config, logs
from selfhost_cli.cli import completion


def ask(home: Path, *words: str) -> list[str]:
    """What bash is offered for the last word."""
    env = {"SELFHOST_HOME": str(home), "PATH": os.environ["PATH"]}
    env |= {"COMP_WORDS": "\n".join(("selfhost", *words)), "COMP_CWORD": str(len(words))}
    run = [sys.executable, "-m", "selfhost_cli"]
    done = subprocess.run(
        run, env=env | {completion.VARIABLE: "complete_bash"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_settings_are_offered_where_one_is_wanted(tmp_path: Path) -> None:
    assert ask(tmp_path, "config", "set", "max_") == [one for one in config.NAMES if one.startswith("max_")]


@pytest.mark.parametrize("before", [(), ("status",), ("config", "set"), ("claude",), ("status", "--json")])
def test_a_profile_is_offered_wherever_it_may_stand(tmp_path: Path, before: tuple[str, ...]) -> None:
    for name in ("work", "demo"):
        config.paths(name, {"SELFHOST_HOME": str(tmp_path)}).make()
    assert ask(tmp_path, *before, "--profile", "") == ["demo", "work"]
    assert ask(tmp_path, *before, "--profile", "w") == ["work"]


def test_behind_a_command_the_option_is_offered_and_what_follows_its_name(tmp_path: Path) -> None:
    assert ask(tmp_path, "status", "--p") == ["--profile"]
    assert ask(tmp_path, "logs", "--profile", "work", "wat") == ["watchdog"]


def test_names_are_offered_by_their_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))
    assert completion.profiles("") == []
    for name in ("work", "demo"):
        config.paths(name, os.environ).make()
    assert completion.profiles("") == ["demo", "work"]
    assert completion.profiles("w") == ["work"]
    assert completion.parts("") == list(logs.PARTS)
    assert completion.settings("hou") == ["hours"]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_each_shell_has_a_script_that_asks_us(shell: str) -> None:
    script = completion.script(shell)
    assert f"{completion.VARIABLE}=complete_{shell}" in script
    assert "selfhost" in script


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_bash_completes_with_it(tmp_path: Path) -> None:
    (tmp_path / "selfhost").write_text(f'#!/bin/sh\nexec {sys.executable} -m selfhost_cli "$@"\n')
    (tmp_path / "selfhost").chmod(0o755)
    asked = "COMP_WORDS=(selfhost logs wat) COMP_CWORD=2; _selfhost_completion selfhost; echo ${COMPREPLY[@]}"
    text = f"{completion.script('bash')}\n{asked}\n"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SELFHOST_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("watchdog\n", "")
