"""`selfhost ssh` with the system's OpenSSH against a real sshd."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import config
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Endpoint, State
from selfhost_cli.remote.ssh import make_key
from tests.fakes.rental import make_rental
from tests.integration.conftest import Box
from tests.sandbox.market_process import MarketProcess

pytestmark = pytest.mark.box

LABEL = "selfhost-0123456789-a"
NOBODY = Endpoint("127.0.0.1", 9)


@dataclass
class User:
    """A person whose profile has the box in its ledger. The paths hold what ssh would split or expand."""

    home: Path
    box: Box
    market: MarketProcess

    @property
    def env(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "SELFHOST_HOME": str(self.home / "state of 100%h"),
            "SELFHOST_MARKET_URL": self.market.url,
            "SELFHOST_API_KEY": str(self.market.facts["api_key"]),
            "SSH_AUTH_SOCK": str(self.home / "agent"),
        }

    @property
    def paths(self) -> config.Paths:
        return config.paths("default", self.env)

    @property
    def known_hosts(self) -> Path:
        return self.paths.state / f"known_hosts.{LABEL}"

    def rent(self, **changes: Any) -> None:
        self.paths.make()
        shutil.copy(self.box.login_key, self.paths.login_key)
        facts = {"state": State.READY, "endpoint": self.box.endpoint, "host_key": self.box.host_key, "instance_id": 7}
        with closing(Ledger(self.paths.ledger)) as ledger:
            ledger.intend(make_rental(LABEL, **(facts | {"bootstrap": False} | changes)))

    def amend(self, **facts: Any) -> None:
        with closing(Ledger(self.paths.ledger)) as ledger:
            ledger.amend(LABEL, **facts)

    def ask(self, *words: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "selfhost_cli", "ssh", *words, code=code, **env)

    def run(self, *words: str | Path, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            words, env=self.env | env, cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture
def user(tmp_path: Path, box: Box, market: MarketProcess) -> User:
    made = User(tmp_path, box, market)
    made.rent()
    return made


def test_a_command_runs_in_the_box_and_ends_as_it_ended(user: User) -> None:
    done = user.ask("--", "pwd; cat; echo oops >&2; exit 7", code=7)
    assert done.stdout == f"{user.box.home}\n"
    assert "oops" in done.stderr


def test_what_looks_like_an_option_of_ssh_belongs_to_the_command(user: User) -> None:
    assert "OpenSSH" not in user.ask("--", "-V", code=2).stderr  # the box's shell has no such option with an argument
    assert user.ask("--", "echo", "-n", "-o", "ProxyCommand=false", "--", "x").stdout == "-o ProxyCommand=false -- x"


def test_its_known_hosts_has_exactly_the_pinned_keys_and_is_ours_alone(user: User) -> None:
    with closing(Ledger(user.paths.ledger)) as ledger:
        old = user.paths.state / "known_hosts.selfhost-0123456789-ended"
        old.write_text("a box that is gone\n")
        user.ask("--", "true")
        bare = " ".join(user.box.host_key.split()[:2])
        assert user.known_hosts.read_text() == f"{LABEL} {bare}\n"
        assert stat.S_IMODE(user.known_hosts.stat().st_mode) == 0o600
        assert not old.exists()
        other = " ".join(make_key("x")[1].split()[:2])
        ledger.amend(LABEL, host_key=other, next_host_key=bare, state=State.INSTALLING)
        user.ask("--", "true")
        assert user.known_hosts.read_text() == f"{LABEL} {other}\n{LABEL} {bare}\n"


def test_another_host_key_is_reported_as_that_and_nobody_logs_in(user: User) -> None:
    fragment = user.ask("--config").stdout
    user.amend(host_key=make_key("another")[1])
    done = user.ask("--", "touch was-here", code=5)
    assert "MAY STILL BE BILLING" in done.stderr
    assert "shows another host key than this box has" in done.stderr
    (user.home / "conf").write_text(fragment)
    user.known_hosts.write_text(f"{LABEL} {make_key('another')[1]}\n")
    refused = user.run("ssh", "-F", "conf", "selfhost", "touch was-here", code=255)
    assert "Host key verification failed" in refused.stderr
    assert not (user.box.home / "was-here").exists()


def test_the_fragment_holds_the_same_pins(user: User) -> None:
    fragment = user.ask("--config").stdout
    (user.home / "conf").write_text(fragment)
    assert user.run("ssh", "-F", "conf", "selfhost", "pwd").stdout == f"{user.box.home}\n"
    said = user.run("ssh", "-G", "-F", "conf", "selfhost").stdout.splitlines()
    held = dict(line.partition(" ")[::2] for line in said)
    wanted = {
        "hostname": user.box.endpoint.host, "port": str(user.box.endpoint.port), "user": "root",
        "forwardagent": "no", "forwardx11": "no", "identitiesonly": "yes", "identityagent": "none",
        "stricthostkeychecking": "true", "hostkeyalias": LABEL, "hostkeyalgorithms": "ssh-ed25519",
        "globalknownhostsfile": "/dev/null",
    }  # fmt: skip
    assert {name: held[name] for name in wanted} == wanted
    assert [line for line in said if line.startswith("identityfile ")] == [
        f"identityfile {user.paths.login_key}".replace("%", "%%")
    ]


def test_included_at_the_top_it_serves_ssh_and_scp_whatever_else_is_configured(user: User) -> None:
    (user.home / "selfhost.conf").write_text(user.ask("--config").stdout)
    (user.home / "config").write_text(
        f"Include {user.home}/selfhost.conf\n\nHost *\n    User somebody\n    Port 9\n    StrictHostKeyChecking no\n"
        "    UserKnownHostsFile /dev/null\n    ForwardAgent yes\n    IdentityFile ~/.ssh/another\n"
    )
    (user.home / "here.txt").write_text("hello\n")
    user.run("scp", "-F", "config", "here.txt", "selfhost:there.txt")
    assert (user.box.home / "there.txt").read_text() == "hello\n"
    user.run("scp", "-F", "config", "selfhost:there.txt", "back.txt")
    assert (user.home / "back.txt").read_text() == "hello\n"
    user.known_hosts.write_text(f"{LABEL} {make_key('another')[1]}\n")
    refused = user.run("ssh", "-F", "config", "selfhost", "true", code=255)
    assert "Host key verification failed" in refused.stderr


def test_a_box_that_has_moved_is_found_where_the_market_says(user: User) -> None:
    user.amend(endpoint=NOBODY, instance_id=int(user.box.root.name.removeprefix("box-")))
    assert user.ask("--", "echo here").stdout == "here\n"


def test_nothing_of_the_users_own_ssh_is_used(user: User) -> None:
    recorder = user.home / "bin" / "ssh"
    recorder.parent.mkdir()
    recorder.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    recorder.chmod(0o755)
    words = user.ask("--", "uptime", PATH=f"{recorder.parent}:{os.environ['PATH']}").stdout.splitlines()
    assert words[:2] == ["-F", "none"]
    assert {"IdentitiesOnly=yes", "IdentityAgent=none", "StrictHostKeyChecking=yes", "ForwardAgent=no"} <= set(words)
    assert words[-3:] == ["--", "selfhost", "uptime"]


def test_without_ssh_a_box_is_billed_and_that_is_the_headline(user: User) -> None:
    done = user.ask("--", "true", code=5, PATH="/nowhere")
    assert "is ready and MAY STILL BE BILLING: ssh is not installed" in done.stderr
    assert "apt-get install openssh-client" in done.stderr


@pytest.mark.parametrize("host", ["-oProxyCommand=touch was-here", "a b", "a\nProxyCommand b", "%h", ""])
def test_an_address_that_is_none_never_reaches_ssh(user: User, host: str) -> None:
    user.amend(endpoint=Endpoint(host, 22), instance_id=99)
    done = user.ask("--", "true", code=5)
    assert "cannot be reached" in done.stderr or "no address" in done.stderr


@pytest.mark.parametrize("state", [State.CREATING, State.BOOTING, State.ENDING])
def test_a_box_that_lets_nobody_in_now_says_so(user: User, state: State) -> None:
    user.amend(state=state)
    assert f"a box that is {state}" in user.ask(code=5).stderr


def test_the_fragment_waits_for_the_host_key_to_be_final(user: User) -> None:
    user.amend(state=State.INSTALLING)
    assert "final once it is ready" in user.ask("--config", code=5).stderr


def test_without_a_box_it_is_not_set_up(user: User) -> None:
    with closing(Ledger(user.paths.ledger)) as ledger:
        ledger.ended(LABEL, 1.0, "gone")
    assert "there is no box" in user.ask("--config", code=3).stderr
    user.paths.ledger.unlink()
    assert "there is no box" in user.ask(code=3).stderr


def test_a_command_and_a_fragment_are_two_wishes(user: User) -> None:
    user.ask("--config", "--", "true", code=2)


def test_the_host_is_named_after_the_profile(user: User) -> None:
    shutil.copytree(user.paths.state, config.paths("work", user.env).state)
    config.paths("work", user.env).make()
    assert user.ask("--profile", "work", "--config").stdout.startswith("Host selfhost-work\n")
