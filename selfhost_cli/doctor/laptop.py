"""The laptop: what our commands need, what the environment does to them, and the market as it is seen from here."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from selfhost_cli import attach, claude, old_variables
from selfhost_cli.config import DEFAULTS, Paths, Settings, Source
from selfhost_cli.doctor.checks import Case, Finding, Line, failed, ok, skipped, warning
from selfhost_cli.errors import MarketUnreachable, NoCredit, NotSetUp, SelfhostError

LOOK_S = 10.0
CLAUDE_S = 20.0
MARKET_S = 40.0
"""It may make us wait for our turn."""
PYTHON = (3, 11)
SSH = (6, 5)
"""The first OpenSSH that knows ed25519."""
CLOCK_S = 60.0
"""Wrong by more: certificates and the market's times begin to be misread."""
NODE = re.compile(rb"#!.*\bnode\b")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
LOOPBACK = ("127.0.0.1", "localhost")
SOURCES = {"file": "config.toml", "environment": "the environment"}


def lines(case: Case, settings: Settings | None) -> list[Line]:
    """`settings` is None when they cannot be read; then the market is not asked: it may be another one."""
    override = settings.claude if settings else ""
    made = [
        Line("laptop", ("python",), lambda: [python()], LOOK_S),
        Line("laptop", ("ssh",), lambda: [ssh(case.env)], LOOK_S),
        Line("laptop", ("claude", "node"), lambda: _claude(override, case.env), CLAUDE_S),
        Line("laptop", ("proxies",), lambda: [proxies(case.env)], LOOK_S),
        Line("laptop", ("conflicts",), lambda: [conflicts(case.env, case.paths)], LOOK_S),
        Line("laptop", ("old variables",), lambda: [old(case.env, case.paths)], LOOK_S),
    ]
    if settings is None:
        return [*made, Line("laptop", ("port", "market", "clock", "account key", "credit"), _unknown, LOOK_S)]
    return [
        *made,
        Line("laptop", ("port",), lambda: [port(settings)], LOOK_S),
        Line("laptop", ("market", "clock"), lambda: _clock(settings), LOOK_S),
        Line("laptop", ("account key", "credit"), lambda: _account(case, settings), MARKET_S),
    ]


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    saw = f"{'.'.join(map(str, version))} on {platform.system()}"
    if version[:2] < PYTHON:
        return failed(saw, "selfhost needs 3.11 or newer", "Install it again with a newer Python.", NotSetUp.exit_code)
    return ok(saw)


def ssh(env: Mapping[str, str]) -> Finding:
    program = shutil.which("ssh", path=env.get("PATH", ""))
    install = "Install OpenSSH's client, on Debian and Ubuntu `apt-get install openssh-client`."
    if not program:
        return warning("", "ssh is not installed; only `selfhost ssh` needs it", install)
    done = subprocess.run(
        [program, "-V"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LOOK_S / 2, check=False
    )
    said = (done.stderr + done.stdout).strip().splitlines()
    return ssh_version(said[0] if said else "")


def ssh_version(said: str) -> Finding:
    """What `ssh -V` tells, such as `OpenSSH_9.6p1 Ubuntu-3ubuntu13.5, OpenSSL 3.0.13 30 Jan 2024`."""
    found = re.match(r"OpenSSH_(?:for_Windows_)?(\d+)\.(\d+)", said)
    if not found:
        return warning(said, "that is not OpenSSH; `selfhost ssh` uses its options", "Put OpenSSH first on PATH.")
    if (int(found[1]), int(found[2])) < SSH:
        return warning(said, "it does not know ed25519 keys, which `selfhost ssh` uses", "Install a newer OpenSSH.")
    return ok(said.partition(",")[0])


def _claude(override: str, env: Mapping[str, str]) -> Iterator[Finding]:
    binary = claude.find(override, env)  # NotSetUp tells how to install it
    # No directory for its memory: a version that we have told of here is still told by `selfhost claude`.
    seen = claude.seen_version(binary, Path(os.devnull))
    saw = f"{seen.version}, {binary}"
    if seen.version == claude.SEEN:
        yield ok(saw)
    else:
        yield warning(
            saw, f"selfhost was made with {claude.SEEN}; most of another version will work", f"`{claude.INSTALL}`"
        )
    yield node(binary, env)


def node(binary: Path, env: Mapping[str, str]) -> Finding:
    """Needed where `claude` is a script for it; newer ones are programs of their own."""
    with binary.open("rb") as file:
        if not NODE.match(file.readline(200)):
            return skipped("this claude needs none")
    program = shutil.which("node", path=env.get("PATH", ""))
    if not program:
        why = f"{binary} is a script for node, which is not on PATH"
        return failed("", why, f"Install Node.js 18 or newer, or claude again: `{claude.INSTALL}`", NotSetUp.exit_code)
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=LOOK_S / 2, check=False)
    version = done.stdout.strip()
    found = re.match(r"v(\d+)\.", version)
    if found and int(found[1]) < 18:
        return failed(version, "Claude Code needs Node.js 18 or newer", "Install a newer one.", NotSetUp.exit_code)
    return ok(f"{version}, {program}")


def port(settings: Settings) -> Finding:
    """The local port that Claude Code talks to: free, or our keeper's."""
    wanted, front = settings.port, attach.find(settings.paths)
    if front:
        return ok(f"{front.port}, held by our keeper" + (f"; {wanted} was taken" if front.port != wanted else ""))
    if _is_free(wanted):
        return ok(f"{wanted} is free")
    return warning(
        f"{wanted} is taken",
        "another program listens there; the keeper takes the next free one",
        "`selfhost up --port N` chooses another, `selfhost env` tells the one in use.",
    )


def _is_free(number: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((attach.HOST, number))
            listener.listen(1)
        except OSError:
            return False
    return True


def proxies(env: Mapping[str, str]) -> Finding:
    """Proxies of the environment that would be used for loopback, where our front is."""
    there = {name: env[name] for upper in PROXIES for name in (upper, upper.lower()) if env.get(name)}
    saw = ", ".join(f"{name}={value}" for name, value in there.items())
    if not there:
        return ok("none")
    excepted = {host.strip() for name in ("NO_PROXY", "no_proxy") for host in env.get(name, "").split(",")}
    if "*" in excepted or excepted.issuperset(LOOPBACK):
        return ok(f"{saw}; not for loopback")
    return warning(
        saw,
        "other clients' requests to 127.0.0.1 would go there (our commands and `selfhost claude` see to it themselves)",
        "Run `export NO_PROXY=127.0.0.1,localhost`, or take what `selfhost env` prints.",
    )


def conflicts(env: Mapping[str, str], paths: Paths) -> Finding:
    """Variables that would lead Claude Code elsewhere; names only, their values are secrets."""
    names = sorted(
        name
        for name, value in env.items()
        if value
        and name not in claude.OUR_KEYS
        and (name in claude.CONFLICTING or name.startswith(claude.CONFLICTING_PREFIX))
    )
    if not names:
        return ok("none")
    front = attach.find(paths)
    if front and env.get("ANTHROPIC_BASE_URL") == front.url:
        return ok("those of `selfhost env`")
    return warning(
        ", ".join(names),
        "`selfhost claude` drops them, but a plain `claude` or another client uses them",
        f"Run `unset {' '.join(names)}`.",
    )


def old(env: Mapping[str, str], paths: Paths, folder: Path = old_variables.HERE) -> Finding:
    """Those of the system before this one that do nothing here; names only. What conflicts is told by `conflicts`."""
    found = [one.variable for one in old_variables.found(env, paths.state, folder)]
    idle = [one for one in found if one.now not in (old_variables.Now.USED, old_variables.Now.CONFLICT)]
    if not idle:
        return ok(", ".join(f"{one.name} is used" for one in found if one.now is old_variables.Now.USED) or "none")
    told = "\n".join(f"{one.name} is {one.now}: {one.instead}" for one in idle)
    return warning(", ".join(one.name for one in idle), told, "`selfhost config show` tells what is set, and by what.")


def _clock(settings: Settings) -> Iterator[Finding]:
    """Whether the market answers at all, nobody's name given, and how far its clock is from ours."""
    url = settings.market_url
    before = time.time()
    try:
        answer = httpx.head(url, timeout=LOOK_S - 2, trust_env=not settings.sandbox, follow_redirects=False)
    except httpx.HTTPError as error:
        why = f"no answer: {error or type(error).__name__}"
        yield failed(
            url, why, "Check the network and its proxy, then `selfhost doctor` again.", MarketUnreachable.exit_code
        )
        return
    yield ok(f"{url} answers")
    yield clock(answer.headers.get("date", ""), before, time.time())


def clock(date: str, before: float, after: float) -> Finding:
    """The market's `Date` header beside our clock before and after it was asked for. It tells whole seconds."""
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return skipped("the market's answer has no date")
    off = max(before - theirs - 1, theirs - after, 0.0)
    saw = f"{off:.0f} s {'ahead of' if before > theirs else 'behind'} the market's" if off else "as the market's"
    if off <= CLOCK_S:
        return ok(saw)
    return warning(saw, "caps, bills and certificates are read with it", "Set it: `timedatectl set-ntp true` on Linux.")


def _account(case: Case, settings: Settings) -> Iterator[Finding]:
    account = case.provider(settings).account()  # NotSetUp without a key, KeyRefused
    source = settings.sources["api_key"].name.lower() if settings.api_key else "vast's own key file"
    yield ok(f"accepted by the market; from {SOURCES.get(source, source)}")
    yield credit(account.credit, settings.max_spend)


def credit(dollars: float, cap: float) -> Finding:
    saw, add = f"${dollars:.2f}", "Add credit at https://cloud.vast.ai/billing/"
    if dollars <= 0:
        return failed(saw, "the account cannot pay, and the market stops its boxes", f"{add}.", NoCredit.exit_code)
    if dollars < cap:
        why = f"less than what a box may cost (${cap:g}): the market would stop it before we do"
        return warning(saw, why, f"{add}, or rent with less: `selfhost up --max-spend {dollars:.2f}`.")
    return ok(saw)


def _unknown() -> Iterator[Finding]:
    for _ in range(5):
        yield skipped("the settings cannot be read")


def config(case: Case) -> tuple[Finding, Settings | None]:
    """The settings, and what is wrong with them."""
    path = case.paths.config_file
    try:
        settings = case.load()
    except SelfhostError as error:
        saw = str(path) if path.exists() else "no config file"
        return failed(saw, error.message, error.remedy or f"Mend it, or move it away: {path}", error.exit_code), None
    changed = [
        f"{name}={getattr(settings, name)} ({source.name.lower()})"
        for name, source in settings.sources.items()
        if source is not Source.DEFAULT and name != "api_key" and getattr(settings, name) != DEFAULTS[name]
    ]
    saw = f"{path if path.exists() else 'no config file'}; {', '.join(changed) or 'all as by default'}"
    why, _, remedy = case.exposed(case.paths).partition("; ")
    return (warning(saw, why, f"Run {remedy}.") if why else ok(saw)), settings
