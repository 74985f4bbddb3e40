"""One box, used as a person uses it. The tests of this module share it and leave it ready."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from selfhost_cli.ledger import Ledger
from selfhost_cli.model import State
from selfhost_cli.remote import OtherKey
from selfhost_cli.remote.ssh import connect
from selfhost_cli.sandbox import demo
from tests.e2e.stage import Stage
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("ready")]

PAGE = Path(__file__).parents[2] / "docs" / "ssh.md"
SHORT = ["--system-prompt", demo.SYSTEM_PROMPT]
ANEW = {"SELFHOST_CACHE": "off"}
"""Where it is the box that has to answer, whatever was asked before."""


def reached(stage: Stage) -> bool:
    (row,) = stage.ask("status", "--json").json
    return bool(row["tunnel"] == "up" and row["box"].get("status") == "healthy")


def test_claude_reads_a_real_file_through_a_tool_call(ready: Stage) -> None:
    task = demo.make_task(ready.paths)
    answer = ready.ask(*task.arguments, cwd=task.folder)
    assert task.solved_by(answer.out)


def test_claude_changes_a_real_file(ready: Stage, tmp_path: Path) -> None:
    target = tmp_path / "hello.txt"
    prompt = f"Create the file {target} with the content: hello"
    ready.ask("claude", "-p", prompt, "--tools", "Write", "--allowedTools", "Write", *SHORT, cwd=tmp_path)
    assert "hello" in target.read_text()


def test_stdout_is_claudes_alone_and_json_stays_parseable(ready: Stage) -> None:
    answer = ready.ask("claude", "-p", "Say hi.", "--tools", "", "--output-format", "json", *SHORT)
    result = json.loads(answer.out)
    assert result["is_error"] is False
    assert result["modelUsage"][demo.MODEL]["contextWindow"] == demo.CONTEXT


def test_claudes_own_exit_code_is_ours(ready: Stage) -> None:
    ready.ask("claude", "--no-such-option", code=1)
    assert "2.1.330" in ready.ask("claude", "--version").out


def test_up_again_reuses_the_box_and_pays_for_no_second(ready: Stage) -> None:
    answer = ready.ask("up", "--yes", "--json", "--trace", env={"API_PORT": "8000"})
    assert "API_PORT is not used" in answer.err
    assert answer.json["rental"]["state"] == "ready"
    assert {"reuse", "health"} <= {span["name"] for span in answer.json["trace"]}
    assert "where the time went" in answer.err
    assert ready.billed == 1


def test_status_tells_what_there_is_and_what_it_costs(ready: Stage) -> None:
    (row,) = ready.ask("status", "--json").json
    assert row["rental"]["state"] == "ready"
    assert row["tunnel"] == "up"
    assert row["box"]["context"] == demo.CONTEXT
    assert 0 < row["so_far"]["total"] < 1
    assert "box_token" not in row["rental"]
    assert "ends by itself" in ready.ask("status").out


def test_tokens_are_counted(ready: Stage) -> None:
    before = ready.ask("status", "--json").json[0]["so_far"]["usage"]
    ready.ask("claude", "-p", "Say hi.", "--tools", "", *SHORT, env=ANEW)
    after = ready.ask("status", "--json").json[0]["so_far"]["usage"]
    assert after["requests"] == before["requests"] + 1
    assert after["input_tokens"] > before["input_tokens"]
    assert after["output_tokens"] > before["output_tokens"]


def test_env_serves_other_clients(ready: Stage) -> None:
    env = ready.ask("env", "--json").json
    answer = httpx.post(
        f"{env['ANTHROPIC_BASE_URL']}/v1/messages",
        json={"max_tokens": 4, "messages": [{"role": "user", "content": "Say hi."}]},
        headers={"Authorization": f"Bearer {env['ANTHROPIC_AUTH_TOKEN']}"},
        timeout=60,
        trust_env=False,
    )
    assert answer.json()["usage"]["output_tokens"] > 0
    assert f"export ANTHROPIC_BASE_URL={env['ANTHROPIC_BASE_URL']}" in ready.ask("env").out


def test_who_has_no_token_gets_nothing(ready: Stage) -> None:
    url = ready.ask("env", "--json").json["ANTHROPIC_BASE_URL"]
    answer = httpx.post(f"{url}/v1/messages", json={"messages": []}, timeout=10, trust_env=False)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"


def test_a_killed_keeper_is_back_at_the_next_command_on_the_same_port(ready: Stage) -> None:
    url = ready.ask("env", "--json").json["ANTHROPIC_BASE_URL"]
    keeper = ready.keeper
    assert keeper
    os.kill(keeper, signal.SIGKILL)
    until(lambda: ready.keeper is None)
    answer = ready.ask("claude", "-p", "Say hi.", "--tools", "", *SHORT, env=ANEW)
    assert answer.out.strip()
    assert ready.keeper not in (None, keeper)
    assert ready.ask("env", "--json").json["ANTHROPIC_BASE_URL"] == url


@pytest.mark.parametrize("part", ["engine", "proxy"])
def test_a_killed_part_of_the_box_comes_back(ready: Stage, part: str) -> None:
    run = ready.box() / "root" / ".selfhost" / "run"
    port = (run / f"{part}.port").read_text()
    child = int((run / f"{part}.child").read_text())
    os.kill(child, signal.SIGKILL)
    until(lambda: (run / f"{part}.child").read_text().strip() not in ("", str(child)))
    until(lambda: reached(ready), 60)
    assert (run / f"{part}.port").read_text() == port


def cut(ready: Stage) -> None:
    """Every ssh session of the box is gone at once."""
    sshd = int((ready.box() / "run" / "sshd.pid").read_text())
    for session in Path(f"/proc/{sshd}/task/{sshd}/children").read_text().split():
        os.kill(int(session), signal.SIGKILL)


def test_a_box_whose_sshd_lost_our_session_is_reached_again(ready: Stage) -> None:
    cut(ready)
    until(lambda: reached(ready), 30)


def test_the_logs_of_all_parts_are_followed_through_a_cut(ready: Stage) -> None:
    following = ready.spawn("logs", "-f", "--json")
    assert following.stdout
    told = [json.loads(next(following.stdout))]
    while told[-1]["part"] != "keeper":  # the last of the first look
        told.append(json.loads(next(following.stdout)))
    assert {one["part"] for one in told} >= {"install", "engine", "proxy"}
    with closing(Ledger(ready.paths.ledger)) as ledger:
        assert ledger.live()[0].box_token not in json.dumps(told)
    cut(ready)
    with (ready.box() / "root/.selfhost/log/engine.log").open("a") as file:
        file.write("written after the cut\n")
    assert any("written after the cut" in line for line in following.stdout)
    following.send_signal(signal.SIGINT)
    assert "Traceback" not in following.communicate(timeout=30)[1]
    assert following.returncode == 0
    until(lambda: reached(ready), 30)


@pytest.mark.long
def test_a_session_of_claude_goes_on_through_a_cut_between_two_turns(ready: Stage, tmp_path: Path) -> None:
    ready.ask("claude", "-p", "Remember the word walnut.", "--tools", "", *SHORT, cwd=tmp_path)
    cut(ready)
    answer = ready.ask("claude", "-p", "-c", "Say the word again.", "--tools", "", *SHORT, cwd=tmp_path)
    assert answer.out.strip()


@pytest.mark.long
def test_a_session_of_claude_goes_on_through_a_cut_in_the_middle_of_an_answer(ready: Stage, tmp_path: Path) -> None:
    words = ["--output-format", "stream-json", "--verbose", "--include-partial-messages", "--tools", "", *SHORT]
    process = ready.spawn("claude", "-p", "Count from 1 to 30 in words.", *words, cwd=tmp_path)
    assert process.stdout
    for line in process.stdout:
        if json.loads(line).get("event", {}).get("type") == "content_block_delta":
            break
    cut(ready)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["type"] == "result"
    assert not result["is_error"], result
    assert result["result"].strip()


def test_what_holds_secrets_is_the_owners_alone(ready: Stage) -> None:
    where = ready.paths
    for path in (where.ledger, where.login_key, where.front_token, where.keeper_file, where.config_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    box = ready.box() / "root" / ".selfhost"
    assert stat.S_IMODE((box / "run" / "install.env").stat().st_mode) == 0o600
    assert stat.S_IMODE(box.stat().st_mode) == 0o700


def test_no_key_and_no_foreign_token_is_on_the_box(ready: Stage) -> None:
    where = ready.paths
    secrets = [ready.market.api_key, where.front_token.read_text().strip(), where.login_key.read_text()]
    for path in (ready.box() / "root").rglob("*"):
        if path.is_file() and path.stat().st_size < 1_000_000:
            text = path.read_text(errors="replace")
            assert not any(secret in text for secret in secrets), path


def on_a_terminal(stage: Stage, *words: str, answers: bytes = b"") -> tuple[int, str]:
    """Run a command under a pseudo-terminal, as a person does; its exit code and what the screen showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(stage.home)
        os.execve(sys.executable, [sys.executable, "-m", "selfhost_cli", "--profile", "demo", *words], stage.env)
    if answers:
        os.write(terminal, answers)
    shown = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the other side has ended
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode(errors="replace")


def test_ssh_on_a_terminal_is_a_shell_in_the_box(ready: Stage) -> None:
    code, shown = on_a_terminal(ready, "ssh", answers=b"pwd -P\nexit 7\n")
    assert code == 7, shown
    assert str((ready.box() / "root").resolve()) in shown


def test_the_page_about_ssh_can_be_typed_line_by_line(ready: Stage, tmp_path: Path) -> None:
    (tmp_path / "selfhost").write_text(f'#!/bin/sh\nexec {sys.executable} -m selfhost_cli --profile demo "$@"\n')
    (tmp_path / "selfhost").chmod(0o755)
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    done = subprocess.run(
        # The host is named after the profile.
        ["sh", "-exc", re.sub(r"^(ssh|scp) (.*) selfhost\b", r"\1 \2 selfhost-demo", block, flags=re.MULTILINE)],
        env=ready.env | {"PATH": f"{tmp_path}:{ready.env['PATH']}"},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "load average" in done.stdout
    assert (tmp_path / "proxy.log").read_bytes() == (ready.box() / "root/.selfhost/log/proxy.log").read_bytes()


def test_up_on_a_terminal_becomes_claude_with_the_arguments_behind_the_dashes(ready: Stage) -> None:
    code, shown = on_a_terminal(ready, "up", "--", "--version")
    assert code == 0, shown
    assert "2.1.330" in shown


def test_the_engines_own_api_is_not_to_be_had_through_the_front(ready: Stage) -> None:
    """With the right token of either door. tests/proxy/test_doors.py tries more of them, on engines that are none."""
    env = ready.ask("env", "--json").json
    port = (ready.box() / "root" / ".selfhost" / "run" / "engine.port").read_text().strip()
    asked = {"headers": {"authorization": f"Bearer {env['ANTHROPIC_AUTH_TOKEN']}"}, "timeout": 10, "trust_env": False}
    assert httpx.get(f"http://127.0.0.1:{port}/props", **asked).status_code == 200, "there is nothing to hide"
    for path in ("/props", "/slots", "/v1/chat/completions", "/completion", "/tokenize", "/lora-adapters"):
        for method in ("GET", "POST", "DELETE"):
            answer = httpx.request(method, f"{env['ANTHROPIC_BASE_URL']}{path}", **asked)
            assert (answer.status_code, answer.json()["type"]) == (404, "error"), (method, path)


def test_a_box_of_an_older_version_gets_a_host_key_of_its_own_and_stays_ready(ready: Stage) -> None:
    """As one looks in the ledger: what it shows now is what the market knows, too."""
    with closing(Ledger(ready.paths.ledger)) as ledger:
        (older,) = ledger.live()
        older = ledger.note(older, bootstrap=True)
    again = ready.ask("up", "--yes", "--json")
    with closing(Ledger(ready.paths.ledger)) as ledger:
        (now,) = ledger.live()
    assert (now.label, now.state, now.bootstrap, now.next_host_key) == (older.label, State.READY, False, "")
    assert now.host_key != older.host_key
    assert again.json["rental"]["host_key"] == now.host_key
    until(lambda: reached(ready), 30)
    assert now.endpoint
    with pytest.raises(OtherKey):
        connect(now.endpoint, older.host_key, ready.paths.login_key)


def test_doctor_finds_a_ready_box_well_but_for_the_gpu_that_it_does_not_have(ready: Stage) -> None:
    until(lambda: reached(ready), 30)
    report = ready.ask("doctor", "--json").json
    checks = {f"{check['part']}/{check['name']}": check for check in report["checks"]}
    unwell = {name: check["why"] for name, check in checks.items() if check["verdict"] in ("warning", "failed")}
    assert unwell.keys() == {"box/driver"}, unwell
    assert "held by our keeper" in checks["laptop/port"]["saw"]
    assert checks["rental/tunnel"]["saw"] == "up"
    assert "generated" in checks["rental/health: token"]["saw"]
    assert checks["rental/health: token"]["seconds"] > 0
    assert re.fullmatch(r"alive, looked \d+ s ago, armed", checks["box/watchdog"]["saw"])
    assert (checks["box/engine"]["saw"], checks["box/proxy"]["saw"]) == ("alive", "alive")
    assert all(checks[f"box/{log} log"]["saw"] for log in ("engine", "proxy", "install"))
    assert checks["box/driver"]["saw"] == "no driver"
    assert report["exit_code"] == 0
