"""`selfhost doctor` as a program: the sandbox's market, a real sshd, and secrets of every kind where it looks."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import config
from selfhost_cli.cli import doctor as command
from selfhost_cli.doctor.checks import Check, Report, Verdict
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle import SIMULATED
from selfhost_cli.model import BoxSpec, BoxState, Endpoint, Need, State
from selfhost_cli.providers.vast import VastProvider
from selfhost_cli.remote import NotYet
from selfhost_cli.remote.ssh import connect, make_key
from tests.e2e.test_secrets import Search, Secret, of_key
from tests.fakes.box import healthy
from tests.fakes.front import StubFront
from tests.fakes.rental import make_rental
from tests.sandbox.market_process import MarketProcess
from tests.waiting import until

CLAUDE = "#!/bin/sh\necho '2.1.330 (Claude Code)'\n"
MODEL = "qwen2.5-coder-0.5b"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Box:
    """A real sandbox box that lets us in."""

    number: int
    label: str
    endpoint: Endpoint
    host_key: str
    home: Path


@dataclass
class Person:
    """Somebody with an account, a profile, and perhaps a box."""

    home: Path
    market: MarketProcess
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port = free_port()
        self.private, self.public = make_key("login")
        self.paths.make()
        self.paths.login_key.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
        self.paths.login_key.write_text(self.private)
        self.install(CLAUDE)

    @property
    def paths(self) -> config.Paths:
        return config.paths("default", {"SELFHOST_HOME": str(self.home / "selfhost")})

    @property
    def key(self) -> str:
        return str(self.market.facts["api_key"])

    def install(self, text: str) -> None:
        (self.home / "bin").mkdir(parents=True, exist_ok=True)
        (self.home / "bin" / "claude").write_text(text)
        (self.home / "bin" / "claude").chmod(0o755)

    def record(self, box: Box, **changes: Any) -> None:
        facts = {"state": State.READY, "endpoint": box.endpoint, "host_key": box.host_key, "instance_id": box.number}
        facts |= {"gpu": f"RTX 4090{SIMULATED}", "model": MODEL, "bootstrap": False, "created_at": time.time()}
        with closing(Ledger(self.paths.ledger)) as ledger:
            ledger.intend(make_rental(box.label, **(facts | changes)))

    def run(self, *words: str, **env: str) -> tuple[int, str, str]:
        settings = {"PACE": "0", "MARKET_URL": self.market.url, "API_KEY": self.key, "PORT": str(self.port)}
        whole = {"PATH": f"{self.home / 'bin'}:{os.environ['PATH']}", "HOME": str(self.home)}
        whole |= {"SELFHOST_HOME": str(self.home / "selfhost")}
        whole |= {f"SELFHOST_{name}": value for name, value in settings.items()} | self.env | env
        command = [sys.executable, "-m", "selfhost_cli", "doctor", *words]
        done = subprocess.run(
            command, env={k: v for k, v in whole.items() if v}, cwd=self.home, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def ask(self, **env: str) -> tuple[int, dict[str, dict[str, Any]]]:
        """Exit code, and the checks by their names."""
        code, out, err = self.run("--json", **env)
        assert out, err
        assert "Traceback" not in err
        return code, {f"{check['part']}/{check['name']}": check for check in json.loads(out)["checks"]}


@pytest.fixture
def person(clean: MarketProcess, tmp_path: Path) -> Person:
    return Person(tmp_path, clean)


@pytest.fixture
def box(person: Person) -> Box:
    provider = VastProvider(person.key, person.market.url)
    provider.register_key(person.public)
    offer = provider.offers(Need(disk_gb=10.0, hours=0.1))[0]
    label = f"selfhost-{config.installation_id(person.paths)}-1"
    number = provider.create(offer, BoxSpec(label, "vastai/base-image:test", 10.0, "true", {}))
    found = until(lambda: (row := provider.get(number)) and row.state is BoxState.RUNNING and row)
    root = person.market.box(number)
    assert found.direct
    end, host_key = found.direct, until(lambda: (root / "etc" / "ssh" / "ssh_host_ed25519_key.pub").read_text())

    def lets_us_in() -> bool:
        try:
            connect(end, host_key, person.paths.login_key).close()
        except NotYet:
            return False
        return True

    until(lets_us_in)
    for name in ("run", "log"):
        (root / "root" / ".selfhost" / name).mkdir(parents=True)
    return Box(number, label, end, host_key, root / "root" / ".selfhost")


SEEN = "this line is shown"


def plant(person: Person, box: Box) -> list[Secret]:
    """One of every kind, wherever doctor looks; SEEN stands beside each."""
    kinds = ["front", "box", "own", "vast", "proxy", "index"]
    made = {kind: secrets.token_urlsafe(32) for kind in (*kinds, "other")}
    made["own"] = secrets.token_hex(32)
    made["account"] = person.key
    made["user"] = f"sk-ant-{secrets.token_urlsafe(40)}"
    person.record(box, box_token=made["box"])
    person.paths.front_token.write_text(made["front"])
    person.paths.config_file.write_text(
        f"pip_args = '--index-url https://me:{made['index']}@index.example/simple'\napi_key = '{person.key}'\n"
    )
    (person.home / ".vast_api_key").write_text(made["vast"])
    person.env |= {
        "API_KEY": "",
        "HTTPS_PROXY": f"http://me:{made['proxy']}@proxy.example:3128",
        "NO_PROXY": "internal.example",
        "ANTHROPIC_API_KEY": made["user"],
        "SELFHOST_API_KEY": "",
        "OTHER_TOKEN": made["other"],
    }
    everything = [*made.values(), *person.private.splitlines()]
    lines = [f"{SEEN}: Authorization: Bearer {made['box']} {made['front'][:20]}…"]
    lines += [f"{SEEN}: CONTAINER_API_KEY={made['own']}, {made['own']}", f"{SEEN}: {everything}"]
    lines += [f"{SEEN}: {base64.b64encode(value.encode()).decode()} {value.encode().hex()}" for value in everything]
    log, run = box.home / "log", box.home / "run"
    (log / "engine.log").write_text("\n".join(lines[:3]))
    (log / "proxy.log").write_text("\n".join(lines[-5:]))
    (log / "watchdog.log").write_text("\n".join(lines[3:8]))
    # The cut of 8000 bytes goes through it.
    (log / "install.log").write_text(f"{person.private * 20}\n{made['own'] * 2}\n{SEEN}\n{'.' * 7900}\n")
    (log / "onstart.log").write_text(person.private)
    (run / "engine.problem").write_text(f"{SEEN}: {made['box']} is wrong\n")
    (run / "armed").write_text(f"refused {made['own']}")
    return [*(Secret(kind, value.encode()) for kind, value in made.items()), of_key("login key", person.private)]


def test_no_secret_that_was_planted_is_in_the_report(
    person: Person, box: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = plant(person, box)
    front_token = person.paths.front_token.read_text()
    label = {"label": box.label, "state": "reconnecting", "reason": f"{SEEN}: {front_token} was refused"}
    broken = healthy(MODEL, 32_768) | {"version": f"{SEEN}: {wanted[1].value.decode()}"}
    with StubFront(front_token, {"state": (200, {"rentals": [label]}), "/health": (200, {"box": broken})}) as front:
        person.paths.keeper_file.write_text(json.dumps({"pid": 1, "port": front.port, "version": "0"}))
        code, out, err = person.run("--json")
    assert code == 5, err
    told = json.loads(out)
    found = tuple(Check(**(one | {"verdict": Verdict(one["verdict"])})) for one in told["checks"])
    command.show(Report(**(told | {"checks": found})))
    text = capsys.readouterr().out
    checks = {check.name: check for check in found}
    search = Search(wanted)
    for place, shown in (("json", out), ("report", text), ("talk", err)):
        search.look(place, shown.encode())
    assert search.found == {secret.name: set() for secret in wanted}
    # It saw all of that, or the search would have been in vain.
    for name in ("engine log", "proxy log", "watchdog log", "tunnel", "health: proxy", "engine"):
        assert SEEN in checks[name].saw + checks[name].why, name
        assert "(hidden)" in checks[name].saw + checks[name].why, name
    assert checks["account key"].saw == "accepted by the market; from config.toml"
    assert "http://(hidden)@proxy.example:3128" in checks["proxies"].saw
    assert "https://(hidden)@index.example/simple" in checks["config"].saw
    assert checks["conflicts"].saw == "ANTHROPIC_API_KEY"
    assert str(person.home) not in out + text
    assert SEEN in text


def test_with_an_account_and_without_a_box_nothing_is_wrong_and_nothing_is_made(person: Person) -> None:
    shutil.rmtree(person.home / "selfhost")
    code, checks = person.ask()
    assert [check for check in checks.values() if check["verdict"] in ("failed", "warning")] == []
    assert (code, checks["laptop/credit"]["saw"]) == (0, "$25.00")
    assert checks["laptop/market"]["saw"] == f"{person.market.url} answers"
    assert checks["laptop/clock"]["saw"] == "as the market's"
    # The turns at the market are taken in a book beside the profiles.
    assert not (person.home / "selfhost" / "config").exists()
    assert not person.paths.ledger.exists()


def test_a_key_that_the_market_refuses_is_3_and_named_with_its_remedy(person: Person) -> None:
    person.market.set("/faults", fault="key_refused", whose="account", status="401")
    code, checks = person.ask()
    assert (code, checks["laptop/account key"]["verdict"]) == (3, "failed")
    assert "does not accept the account key" in checks["laptop/account key"]["why"]
    assert "manage-keys" in checks["laptop/account key"]["remedy"]
    assert checks["laptop/credit"]["why"] == "account key: it has to work first"
    assert person.key not in str(checks)
