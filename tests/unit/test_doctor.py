"""`doctor`: how checks are run, what the laptop's and the rental's make of what they see, and the exit code."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from selfhost_cli import config, doctor, health
from selfhost_cli.cli import app, exposed
from selfhost_cli.cli import doctor as command
from selfhost_cli.config import Settings
from selfhost_cli.doctor import checks, laptop, rental
from selfhost_cli.doctor.checks import Case, Check, Finding, Line, Report, Verdict, examine, ok
from selfhost_cli.doctor.secrets import Secrets
from selfhost_cli.errors import KeyRefused, MarketUnreachable, NotSetUp, SelfhostError
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle.reaching import Reach
from selfhost_cli.model import BoxState, Endpoint, Instance, State
from selfhost_cli.remote import NotYet
from tests.fakes.clock import FakeClock
from tests.fakes.front import StubFront
from tests.fakes.market import FakeMarket
from tests.fakes.rental import make_rental

OK, WARNING, FAILED, SKIPPED = Verdict.OK, Verdict.WARNING, Verdict.FAILED, Verdict.SKIPPED
ROOT = Path(__file__).parents[2]


# --- how they are run -------------------------------------------------------------------------------------------------


def test_one_that_hangs_and_one_that_raises_are_told_as_that_and_keep_nobody() -> None:
    never = threading.Event()

    def hangs() -> Iterator[Finding]:
        yield ok("the first answers")
        never.wait()

    def raises() -> Iterator[Finding]:
        yield ok("so does this one")
        raise ZeroDivisionError("in the middle")

    began = time.monotonic()
    found = examine(
        [
            Line("box", ("one", "two", "three"), hangs, 0.2),
            Line("rental", ("a", "b", "c"), raises, 5.0),
            Line("laptop", ("alone",), lambda: [ok("fine")], 5.0),
        ]
    )
    assert time.monotonic() - began < 4
    never.set()
    assert [(check.name, check.verdict, check.why) for check in found] == [
        ("one", OK, ""),
        ("two", FAILED, "no answer within 0.2 s"),
        ("three", SKIPPED, "two: no answer"),
        ("a", OK, ""),
        ("b", FAILED, "ZeroDivisionError: in the middle"),
        ("c", SKIPPED, "b: it has to work first"),
        ("alone", OK, ""),
    ]
    assert all("`selfhost doctor`" in check.remedy for check in found if check.verdict is FAILED)


def test_each_has_its_own_seconds() -> None:
    go = threading.Event()

    def slow() -> Iterator[Finding]:
        yield ok("at once")
        go.wait(0.3)
        yield ok("later")

    first, second = examine([Line("box", ("first", "second"), slow, 5.0)])
    assert first.seconds < 0.2 < second.seconds


def test_an_error_of_ours_keeps_its_remedy_and_exit_code() -> None:
    def refused() -> Iterator[Finding]:
        raise KeyRefused("the key is wrong", "Make one.")
        yield

    (check,) = examine([Line("laptop", ("key",), refused, 5.0)])
    assert (check.verdict, check.why, check.remedy, check.exit_code) == (FAILED, "the key is wrong", "Make one.", 3)


def a_check(verdict: Verdict, code: int = 1) -> Check:
    return Check("laptop", "x", verdict, "", "", "", 0.0, code)


@pytest.mark.parametrize(
    ("found", "billed", "code"),
    [
        ([a_check(OK), a_check(WARNING), a_check(SKIPPED)], True, 0),
        ([a_check(FAILED, 1)], False, 1),
        ([a_check(FAILED, 1), a_check(FAILED, 3)], False, 3),
        ([a_check(FAILED, 3), a_check(FAILED, 5)], False, 5),
        ([a_check(FAILED, 1)], True, 5),
    ],
)
def test_the_exit_code_is_that_of_the_worst_failure_and_5_while_something_is_billed(
    found: list[Check], billed: bool, code: int
) -> None:
    assert doctor.exit_code(tuple(found), billed=billed) == code


# --- the laptop -------------------------------------------------------------------------------------------------------


def test_an_old_python_is_named() -> None:
    assert laptop.python((3, 12, 1)).verdict is OK
    assert laptop.python((3, 10, 9)).exit_code == NotSetUp.exit_code


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("OpenSSH_9.6p1 Ubuntu-3ubuntu13.5, OpenSSL 3.0.13 30 Jan 2024", OK),
        ("OpenSSH_10.0p2 Debian-7, OpenSSL 3.5.1 1 Jul 2025", OK),
        ("OpenSSH_9.8p1, LibreSSL 3.3.6", OK),
        ("OpenSSH_6.4p1, OpenSSL 1.0.1e", WARNING),
        ("Dropbear v2022.83", WARNING),
        ("", WARNING),
    ],
)
def test_the_version_of_ssh_is_read(said: str, verdict: Verdict) -> None:
    assert laptop.ssh_version(said).verdict is verdict


def test_settings_that_cannot_be_read_are_mended_where_they_stand(tmp_path: Path) -> None:
    where = paths(tmp_path)

    def remedy(**env: str) -> str:
        case = Case(
            "default",
            where,
            env,
            load=lambda: config.load("default", env={"SELFHOST_HOME": str(tmp_path / "selfhost"), **env}),
            exposed=lambda _: "",
            provider=lambda _: pytest.fail("not asked"),
            reach=lambda _: pytest.fail("not asked"),
        )
        finding, settings = laptop.config(case)
        assert (finding.verdict, settings) == (FAILED, None)
        return finding.remedy

    assert remedy(SELFHOST_HOURZ="3") == "Did you mean SELFHOST_HOURS?"
    assert remedy(SELFHOST_HOURS="x") == "Mend or unset SELFHOST_HOURS."
    where.config_file.parent.mkdir(parents=True)
    where.config_file.write_text("hours = 'x'")
    assert remedy() == f"Mend it, or move it away: {where.config_file}"


@pytest.mark.parametrize("width", [80, 120])
def test_the_command_that_installs_claude_is_in_one_line(width: int) -> None:
    from selfhost_cli import claude

    check = replace(a_check(WARNING), remedy=f"Install Node.js 18 or newer, or claude again: `{claude.INSTALL}`")
    assert any(claude.INSTALL in line for line in command.lines(check, width))
    script = (ROOT / "selfhost_cli" / "doctor" / "laptop.py").read_text()
    assert script.count("claude.INSTALL") == script.count("`{claude.INSTALL}`"), "only what is quoted stays whole"


def test_without_ssh_only_one_command_is_missing() -> None:
    found = laptop.ssh({"PATH": "/nowhere"})
    assert found.verdict is WARNING
    assert "apt-get install openssh-client" in found.remedy


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("shebang", ["#!/usr/bin/env node", "#!/usr/bin/env -S node --no-warnings", "#!/opt/bin/node"])
def test_node_is_wanted_only_by_a_claude_that_is_a_script_for_it(tmp_path: Path, shebang: str) -> None:
    script, native = program(tmp_path / "claude", f"{shebang}\n"), program(tmp_path / "native", "\x7fELF node")
    assert laptop.node(native, {"PATH": ""}).verdict is SKIPPED
    missing = laptop.node(script, {"PATH": str(tmp_path / "none")})
    assert (missing.verdict, missing.exit_code) == (FAILED, 3)
    for version, verdict in (("v22.3.0", OK), ("v16.20.2", FAILED)):
        program(tmp_path / "bin" / "node", f"#!/bin/sh\necho {version}\n")
        assert laptop.node(script, {"PATH": str(tmp_path / "bin")}).verdict is verdict


@pytest.mark.parametrize(
    ("env", "verdict"),
    [
        ({}, OK),
        ({"HTTPS_PROXY": "http://proxy:3128"}, WARNING),
        ({"all_proxy": "socks5://proxy:1080", "no_proxy": "localhost"}, WARNING),
        ({"http_proxy": "http://proxy:3128", "NO_PROXY": "internal, 127.0.0.1,localhost"}, OK),
        ({"HTTP_PROXY": "http://proxy:3128", "no_proxy": "*"}, OK),
    ],
)
def test_a_proxy_that_catches_loopback_is_seen(env: dict[str, str], verdict: Verdict) -> None:
    found = laptop.proxies(env)
    assert found.verdict is verdict
    assert all(name in found.saw for name in env if "no_proxy" not in name.lower())


def paths(tmp_path: Path) -> config.Paths:
    return config.paths("default", {"SELFHOST_HOME": str(tmp_path / "selfhost")})


def test_variables_that_lead_claude_elsewhere_are_named_without_their_values(tmp_path: Path) -> None:
    env = {"ANTHROPIC_BASE_URL": "https://elsewhere", "CLAUDE_CODE_USE_BEDROCK": "1", "CLAUDE_CODE_FINE": "1"}
    found = laptop.conflicts(env | {"ANTHROPIC_AUTH_TOKEN": "", "SELFHOST_API_KEY": "ours"}, paths(tmp_path))
    assert (found.verdict, found.saw) == (WARNING, "ANTHROPIC_BASE_URL, CLAUDE_CODE_USE_BEDROCK")
    assert found.remedy == "Run `unset ANTHROPIC_BASE_URL CLAUDE_CODE_USE_BEDROCK`."
    assert laptop.conflicts({"SELFHOST_API_KEY": "ours", "VAST_API_KEY": "too"}, paths(tmp_path)).verdict is OK


def keeper(where: config.Paths, front: StubFront) -> None:
    where.make()
    where.keeper_file.write_text(json.dumps({"pid": 1, "port": front.port, "version": "0"}))
    where.front_token.write_text("front-token")


def test_variables_of_the_old_system_are_told_by_name_with_what_to_do_instead(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MODEL_NAME=qwen\n")
    where = paths(tmp_path)
    none = laptop.old({"VAST_API_KEY": "hidden-key", "ANTHROPIC_BASE_URL": "https://a.test"}, where, tmp_path / "empty")
    assert (none.verdict, none.saw) == (OK, "VAST_API_KEY is used")
    assert laptop.old({}, where, tmp_path / "empty").saw == "none"
    found = laptop.old({"MODEL_NAME": "secret-model", "API_PORT": "1"}, where, tmp_path)
    assert (found.verdict, found.saw) == (WARNING, "MODEL_NAME, API_PORT, .env")
    assert "MODEL_NAME is ignored: set `model`" in found.why
    assert "secret-model" not in repr(found)


def test_a_port_is_free_or_our_keepers_or_somebody_elses(tmp_path: Path) -> None:
    where = paths(tmp_path)
    with StubFront("front-token") as front:
        settings = Settings("default", where, {}, port=front.port)
        taken = laptop.port(settings)
        keeper(where, front)
        ours = laptop.port(settings)
        elsewhere = laptop.port(replace(settings, port=free_port()))
        env = {"ANTHROPIC_BASE_URL": f"http://127.0.0.1:{front.port}", "ANTHROPIC_MODEL": "x"}
        assert laptop.conflicts(env, where).saw == "those of `selfhost env`"
    assert (taken.verdict, ours.verdict, elsewhere.verdict) == (WARNING, OK, OK)
    assert ours.saw == f"{front.port}, held by our keeper"
    assert elsewhere.saw.startswith(f"{front.port}, held by our keeper; ")
    assert "`selfhost up --port N`" in taken.remedy


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("off", "verdict", "saw"),
    [
        (0.0, OK, "as the market's"),
        (0.9, OK, "as the market's"),
        (-30.0, OK, "30 s behind"),
        (-90.0, WARNING, "90 s behind"),
        (3600.0, WARNING, "ahead of"),
    ],
)
def test_our_clock_is_compared_with_the_markets(off: float, verdict: Verdict, saw: str) -> None:
    theirs = 1_795_000_000.0
    found = laptop.clock(formatdate(theirs, usegmt=True), theirs + off, theirs + off)
    assert found.verdict is verdict
    assert saw in found.saw


@pytest.mark.parametrize("date", ["", "yesterday", "Mon, 99 Nov 2026 99:00:00 GMT"])
def test_a_date_that_is_none_is_no_verdict(date: str) -> None:
    assert laptop.clock(date, 1.0, 1.0).verdict is SKIPPED


@pytest.mark.parametrize(("dollars", "verdict"), [(-1.0, FAILED), (0.0, FAILED), (4.99, WARNING), (5.0, OK)])
def test_credit_that_ends_before_the_caps_do_is_seen(dollars: float, verdict: Verdict) -> None:
    assert laptop.credit(dollars, 5.0).verdict is verdict


# --- the rental -------------------------------------------------------------------------------------------------------


def listed(number: int, label: str, state: BoxState = BoxState.RUNNING) -> Instance:
    return Instance(number, label, state, str(state), "", 1, "RTX 4090", 0.3, 1.0, None, None)


def test_what_the_market_lists_is_held_against_the_ledger() -> None:
    known = make_rental("selfhost-me-1", instance_id=1)
    mine, other = listed(1, "selfhost-me-1"), listed(9, "selfhost-you-1")
    assert rental.boxes([], "selfhost-me-", []).verdict is OK
    both = rental.boxes([mine, other], "selfhost-me-", [known])
    assert (both.verdict, "1 of other" in both.saw) == (OK, True)
    stray = rental.boxes([mine, listed(2, "selfhost-me-2")], "selfhost-me-", [known])
    assert (stray.verdict, stray.exit_code) == (FAILED, 5)
    assert "box 2 MAY BE BILLED" in stray.why
    assert "`selfhost reap --yes`" in stray.remedy
    assert rental.boxes([listed(1, "selfhost-me-1", BoxState.FAILED)], "selfhost-me-", [known]).verdict is FAILED
    assert rental.boxes([other], "selfhost-me-", [known]).verdict is WARNING


@pytest.mark.parametrize(
    ("state", "verdict"),
    [("up", OK), ("degraded", WARNING), ("reconnecting", WARNING), ("gone", FAILED), ("not watched", FAILED)],
)
def test_the_state_of_the_link_is_told_with_its_reason(state: str, verdict: Verdict) -> None:
    found = rental.tunnel(state, "no route")
    assert (found.verdict, found.saw) == (verdict, f"{state}: no route")


# --- all of it, with a market and a box in memory ---------------------------------------------------------------------


TOLD = "others can read it; `chmod 600 x`"
NOBODY: Any = (None, None)


class Patient:
    """A person with a profile; `Case` for it."""

    def __init__(self, tmp_path: Path) -> None:
        self.home = tmp_path
        self.env = {"HOME": str(tmp_path), "SELFHOST_HOME": str(tmp_path / "selfhost"), "PATH": str(tmp_path / "bin")}
        self.market = FakeMarket(FakeClock())
        self.no_market: SelfhostError | None = None
        program(tmp_path / "bin" / "claude", "#!/bin/sh\necho '2.1.330 (Claude Code)'\n")
        program(tmp_path / "bin" / "ssh", "#!/bin/sh\necho OpenSSH_9.6p1, OpenSSL 3 >&2\n")

    @property
    def paths(self) -> config.Paths:
        return paths(self.home)

    def provider(self, settings: Settings) -> FakeMarket:
        if self.no_market:
            raise self.no_market
        return self.market

    @contextmanager
    def reach(self, settings: Settings) -> Iterator[tuple[Ledger, Reach]]:
        def connect(endpoint: Endpoint, *rest: Any) -> Any:
            raise NotYet(f"{endpoint}: connection refused")

        with closing(Ledger(self.paths.ledger)) as ledger:
            yield ledger, Reach(connect, self.paths.login_key, lambda rental: [Endpoint("192.0.2.7", 22)])

    def rent(self, **changes: object) -> None:
        self.paths.make()
        label = f"selfhost-{config.installation_id(self.paths)}-1"
        with closing(Ledger(self.paths.ledger)) as ledger:
            ledger.intend(make_rental(label, **({"created_at": time.time(), "instance_id": 1} | changes)))
        self.market.boxes[1] = listed(1, label)

    def look(self, **env: str) -> tuple[Report, dict[str, Check]]:
        with StubFront("x") as market:  # for HEAD, to which it answers with a date
            whole = self.env | {"SELFHOST_MARKET_URL": f"http://127.0.0.1:{market.port}"} | env
            report = doctor.look(
                Case(
                    "default",
                    self.paths,
                    whole,
                    lambda: config.load("default", env=whole),
                    exposed.warning,
                    self.provider,
                    self.reach,
                )
            )
        return report, {f"{check.part}/{check.name}": check for check in report.checks}


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    return Patient(tmp_path)


def test_who_is_well_and_rents_nothing_leaves_with_0_and_nothing_is_made(patient: Patient) -> None:
    report, found = patient.look(SELFHOST_PORT=str(free_port()))
    assert [check for check in report.checks if check.verdict in (FAILED, WARNING)] == []
    assert report.exit_code == 0
    assert [check.part for check in report.checks] == sorted((c.part for c in report.checks), key=checks.PARTS.index)
    assert found["laptop/clock"].saw == "as the market's"
    assert not (patient.home / "selfhost").exists()


def test_a_settings_file_that_cannot_be_read_asks_no_market_and_names_the_line(patient: Patient) -> None:
    patient.paths.make()
    patient.paths.config_file.write_text("modell = 'x'\n")
    patient.no_market = AssertionError("asked")  # type: ignore[assignment]
    report, found = patient.look()
    assert report.exit_code == 2
    assert "Did you mean 'model'?" in found["laptop/config"].why
    assert {found[f"laptop/{name}"].verdict for name in ("port", "market", "clock", "account key", "credit")} == {
        SKIPPED
    }
    assert found["rental/boxes"].verdict is SKIPPED


def test_what_is_set_is_told_with_its_source_and_without_the_key(patient: Patient) -> None:
    patient.paths.make()
    patient.paths.config_file.write_text("model = 'other:7b'\napi_key = 'no-word-of-it'\n")
    report, found = patient.look(SELFHOST_MARKET_URL="", SELFHOST_HOURS="2")
    assert "model=other:7b (file)" in found["laptop/config"].saw
    assert "hours=2.0 (environment)" in found["laptop/config"].saw
    assert "no-word-of-it" not in str(report)


def test_a_key_that_others_can_read_is_a_warning_with_the_command_that_hides_it(patient: Patient) -> None:
    patient.paths.make()
    case = Case(
        "default", patient.paths, {}, lambda: config.load("default", env=patient.env), lambda paths: TOLD, *NOBODY
    )
    finding, settings = laptop.config(case)
    assert (finding.verdict, finding.why, finding.remedy) == (WARNING, "others can read it", "Run `chmod 600 x`.")
    assert settings


@pytest.mark.parametrize(
    ("error", "code"), [(NotSetUp("no key", "Make one."), 3), (MarketUnreachable("no route"), 1)], ids=["key", "route"]
)
def test_a_market_that_cannot_be_asked_is_5_as_soon_as_there_is_a_rental(
    patient: Patient, error: SelfhostError, code: int
) -> None:
    patient.no_market = error
    port = str(free_port())
    report, found = patient.look(SELFHOST_PORT=port)
    assert (report.exit_code, found["laptop/account key"].why) == (code, error.message)
    assert found["laptop/credit"].why == "account key: it has to work first"
    patient.rent(state=State.READY)
    report, found = patient.look(SELFHOST_PORT=port)
    assert report.exit_code == 5
    assert found["rental/boxes"].verdict is FAILED
    assert "`selfhost env` starts one" in found["rental/keeper"].remedy


def test_a_box_that_cannot_be_reached_is_told_and_the_rest_of_it_skipped(patient: Patient) -> None:
    patient.rent(state=State.READY, endpoint=Endpoint("192.0.2.7", 21))
    report, found = patient.look()
    assert report.exit_code == 5
    assert "192.0.2.7:21: connection refused; 192.0.2.7:22: connection refused" in found["box/ssh to the box"].why
    assert found["box/driver"].why == "ssh to the box: it has to work first"
    assert {check.verdict for check in report.checks if check.part == "box"} == {FAILED, SKIPPED}


@pytest.mark.parametrize("state", [State.CREATING, State.BOOTING, State.ENDING])
def test_a_box_that_lets_nobody_in_yet_is_not_knocked_at(patient: Patient, state: State) -> None:
    patient.rent(state=state)
    _, found = patient.look()
    assert found["box/ssh to the box"].why == f"nobody can log in to a box that is {state}"
    assert found["rental/keeper"].verdict is FAILED


def test_a_ledger_that_cannot_be_read_is_5(patient: Patient) -> None:
    patient.paths.make()
    patient.paths.ledger.write_bytes(b"no database" * 100)
    report, found = patient.look()
    assert (report.exit_code, found["rental/ledger"].verdict) == (5, FAILED)


def test_the_probes_of_a_ready_box_are_checks_each(patient: Patient) -> None:
    patient.rent(state=State.READY, model="m", engine="ollama", context=100)
    parts = {"proxy": {"status": "healthy"}, "ollama": {"status": "healthy", "size": 10, "size_vram": 5}}
    answer = {"status": "healthy", "engine": "ollama", "model": "m", "context": 100, "components": parts}
    row = {"label": f"selfhost-{config.installation_id(patient.paths)}-1", "state": "up", "reason": ""}
    with StubFront("front-token", {"state": (200, {"rentals": [row]}), "/health": (200, {"box": answer})}) as front:
        keeper(patient.paths, front)
        _, found = patient.look(SELFHOST_PORT=str(front.port))
    assert (found["rental/keeper"].verdict, found["rental/tunnel"].verdict) == (OK, OK)
    told = {name: found[f"rental/health: {name}"] for name in health.PROBES}
    assert [check.verdict for check in told.values()] == [OK, OK, OK, OK, FAILED, SKIPPED, SKIPPED]
    assert told["gpu"].why == "50% of the model is on the GPU"
    assert "`selfhost down`, then `selfhost up --model NAME`" in told["gpu"].remedy, "it is refused on a live box"
    assert told["gpu"].remedy.endswith("`selfhost down` ends the bill.")


# --- what it prints ---------------------------------------------------------------------------------------------------


def shown(report: Report, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    command.show(report)
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_fits_the_terminal_and_tells_what_to_do(
    patient: Patient, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    patient.rent(state=State.READY)
    report, _ = patient.look(HTTPS_PROXY="http://proxy.example.org:3128", ANTHROPIC_API_KEY="x")
    out = shown(report, width, capsys, monkeypatch)
    assert max(map(len, out.splitlines())) <= width
    for check in report.checks:
        assert check.name in " ".join(out.split())
        if check.verdict in (WARNING, FAILED):
            assert " ".join(check.remedy.split()) in re.sub(r"\s+", " ", out)
            assert all(command in out for command in re.findall("`[^`]+`", check.remedy)), "a command is cut in two"
    assert f"{report.count(FAILED)} failed" in out
    assert "logs may quote from your work: read them first" in " ".join(out.split())


def test_lines_of_a_log_stay_lines_and_markup_in_them_is_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = replace(a_check(OK), saw="[bold]one[/]\n\x1b[31mtwo", name="engine log").with_texts(Secrets([], {}).hide)
    out = shown(Report("1", "default", "Linux", "now", (check,), 1.0, 0), 80, capsys, monkeypatch)
    assert "    | [bold]one[/]\n    | [31mtwo\n" in out


@pytest.mark.parametrize("json", [False, True])
def test_commands_in_remedies_are_shown_for_the_profile_at_hand(
    tmp_path: Path, json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfhost_cli.cli.words.speaking_for", "work")
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))
    monkeypatch.setenv("SELFHOST_MARKET_URL", "http://127.0.0.1:9")  # the discard port: nothing listens there
    monkeypatch.setenv("ANTHROPIC_MODEL", "x")
    assert command.run("work", {}, json=json) == 3
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "`selfhost --profile work doctor` again" in out
    assert "`selfhost --profile work claude` drops them" in out


# --- remedies name real commands --------------------------------------------------------------------------------------


def remedies() -> set[str]:
    """Every text in the code of doctor and health that shows a command."""
    files = [*(ROOT / "selfhost_cli" / "doctor").glob("*.py"), ROOT / "selfhost_cli" / "health.py"]
    return {shown for file in files for shown in re.findall(r"`selfhost ([^`{]+)`", file.read_text())}


def test_every_command_in_a_remedy_exists_with_its_options() -> None:
    import typer

    known = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    found = remedies()
    assert len(found) > 5
    for text in found:
        name, *words = text.split()
        assert name in known, text
        options = {option for parameter in known[name].params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= options, text


def test_every_probe_has_a_remedy_with_a_command_in_it() -> None:
    assert set(health.REMEDIES) == {*health.PROBES, "front"}
    assert all("`selfhost " in remedy for remedy in health.REMEDIES.values())
