"""`selfhost ssh`: become OpenSSH in the box, with the host keys that the ledger has and nothing from ~/.ssh."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from selfhost_cli.cli import wiring
from selfhost_cli.config import Paths, Settings
from selfhost_cli.errors import NotSetUp, SelfhostError
from selfhost_cli.ledger import Ledger
from selfhost_cli.lifecycle.reaching import Reach, meet
from selfhost_cli.model import Endpoint, Rental, State

INSTALL = "Install OpenSSH's client, on Debian and Ubuntu `apt-get install openssh-client`."
KNOWN_HOSTS = "known_hosts."
"""What the names of our files begin with; the rest is the rental's label."""
DRAFT_S = 60.0
"""One that is older was left by a command that was killed."""


def run(settings: Settings, command: Sequence[str]) -> None:
    """Become `ssh`, in the box or running a command there: its exit code, signals and terminal are its own.

    Raises NotSetUp when there is no box, and MayBeBilling for all that keeps us from reaching one that there is.
    """
    with wiring.reach(settings) as (ledger, reach):
        program = shutil.which("ssh")
        if not program:
            raise NotSetUp("ssh is not installed", INSTALL)
        rental = _rental(ledger)
        endpoint = _meet(rental, reach)
        options = _options(settings, endpoint, rental, _pin(settings.paths, ledger, rental))
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        # Behind the dashes nothing is an option any more: ssh takes them after the host, too.
        _execute([program, "-F", "none", *words, "--", _host(settings), *command])


def fragment(settings: Settings) -> str:
    """What an ssh_config needs for editors and other tools. Raises like `run`, also while the host key is replaced."""
    with wiring.reach(settings) as (ledger, reach):
        rental = _rental(ledger)
        if rental.state is not State.READY:
            raise SelfhostError("its host key is only final once it is ready")
        endpoint = _meet(rental, reach)
        options = _options(settings, endpoint, rental, _pin(settings.paths, ledger, rental))
    return "\n".join([f"Host {_host(settings)}", *(f"    {name} {value}" for name, value in options.items())])


def _host(settings: Settings) -> str:
    return "selfhost" if settings.profile == "default" else f"selfhost-{settings.profile}"


def _rental(ledger: Ledger) -> Rental:
    live = ledger.live()
    if not live:
        raise NotSetUp("there is no box", "Rent one: `selfhost up`.")
    rental = live[-1]
    if rental.state not in (State.INSTALLING, State.READY):
        raise SelfhostError(f"nobody can log in to a box that is {rental.state}")
    return rental


def _meet(rental: Rental, reach: Reach) -> Endpoint:
    remote, endpoint = meet(rental, reach)
    remote.close()
    return endpoint


def _pin(paths: Paths, ledger: Ledger, rental: Rental) -> Path:
    """This rental's own known_hosts, with exactly the keys that it may show; those of ended ones are deleted."""
    live = {one.label for one in ledger.live()}
    for old in paths.state.glob(f"{KNOWN_HOSTS}*"):
        if old.name.removeprefix(KNOWN_HOSTS) not in live:
            old.unlink(missing_ok=True)
    for draft in paths.state.glob(f"new.*.{KNOWN_HOSTS}*"):
        with suppress(FileNotFoundError):
            if time.time() - draft.stat().st_mtime > DRAFT_S:
                draft.unlink()
    path = paths.state / f"{KNOWN_HOSTS}{rental.label}"
    lines = (" ".join([rental.label, *key.split()[:2]]) for key in rental.host_keys)
    draft = path.with_name(f"new.{os.getpid()}.{path.name}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.writelines(f"{line}\n" for line in lines)
    draft.replace(path)
    return path


def _options(settings: Settings, endpoint: Endpoint, rental: Rental, known_hosts: Path) -> dict[str, str]:
    """For ssh's -o as well as for an ssh_config. Raises SelfhostError for an address that is none."""
    if not re.fullmatch(r"[0-9A-Za-z:][0-9A-Za-z.:-]*", endpoint.host):
        raise SelfhostError(f"the market says that it is at {endpoint.host!r}, which is no address")
    return {
        "HostName": endpoint.host,
        "Port": str(endpoint.port),
        "User": "root",
        "IdentityFile": _quoted(settings.paths.login_key),
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "PreferredAuthentications": "publickey",
        "HostKeyAlias": rental.label,
        "HostKeyAlgorithms": "ssh-ed25519",
        "UserKnownHostsFile": _quoted(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "VerifyHostKeyDNS": "no",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "ServerAliveInterval": "5",
    }


def _quoted(path: Path) -> str:
    """One word for ssh, with nothing in it to expand. Raises SelfhostError for what cannot be quoted."""
    text = str(path)
    if re.search(r'["\\\n]|\$\{', text):
        raise SelfhostError(f"ssh cannot be told the path {text!r}", "Set SELFHOST_HOME to a plainer one.")
    return '"' + text.replace("%", "%%") + '"'


def _execute(argv: list[str]) -> NoReturn:
    import signal

    sys.stdout.flush()
    sys.stderr.flush()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores both, and so would ssh
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(argv[0], argv)
    except OSError as error:
        raise NotSetUp(f"{argv[0]} cannot be run: {error.strerror}", INSTALL) from error
