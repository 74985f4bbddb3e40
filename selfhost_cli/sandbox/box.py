"""The supervisor of one box: `python -m selfhost_cli.sandbox.box DIR` runs the container that DIR describes.

It runs onstart and sshd, adopts every orphan below it, and ends them all, however they daemonised:
SIGTERM (or the market's death) ends the box and removes DIR; SIGUSR1 ends the processes and keeps the disk (a stop).
Exit codes: 0 ended as asked · 3 not set up · 1 the box could not be started or ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from selfhost_cli.errors import NotSetUp
from selfhost_cli.sandbox import image, processes

_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STOP = signal.SIGUSR1
_SIGNALS = {*_END, _STOP, signal.SIGCHLD}


def main(arguments: list[str]) -> int:
    """Run the box in the directory given until a signal ends it."""
    box = Path(arguments[0]).resolve()
    config = image.BoxConfig.load(box)
    # Before anything can send them: handled one at a time by `sigtimedwait`, never in the middle of something.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    processes.become_subreaper()
    if config.market_pid:
        try:
            processes.die_with_parent(config.market_pid)
        except ProcessLookupError:
            shutil.rmtree(box, ignore_errors=True)
            return 1
    for _ in range(20):  # a market that sweeps takes it for a moment, to see whether anybody has it
        if processes.hold(box / "lock") is not None:
            break
        time.sleep(0.05)
    else:
        _say(f"{box} is supervised already")
        return 1
    if os.getuid() == 0 and not processes.private_mounts(box) and not processes.privsep_ready():
        raise NotSetUp("sshd, started by root, needs the directory /run/sshd", "mkdir -p -m 0755 /run/sshd")
    keep = Container(box, config).run() == _STOP
    ended = processes.end_descendants()
    (box / "run/sshd.pid").unlink(missing_ok=True)
    if not keep:
        shutil.rmtree(box, ignore_errors=True)
    return 0 if ended else 1


class Container:
    """One start of a box: from onstart and sshd to the signal that ends them."""

    def __init__(self, box: Path, config: image.BoxConfig) -> None:
        self._box = box
        self._config = config
        self._clean = image.environment(box)
        image.configure_sshd(box, config.port, deny=config.deny_s > 0)
        self._admit_at: float | None = None
        self._onstart: int | None = None
        self._sshd: int | None = None
        self._onstart_over = False

    def run(self) -> signal.Signals:
        """Start both in the order configured; returns the signal that asked for the end."""
        started = time.monotonic()
        if self._config.sshd_first:
            onstart_at, sshd_at = started + self._config.gap_s, started
        else:
            onstart_at, sshd_at = started, started + self._config.gap_s
        sshd_earliest = started + self._config.sshd_delay_s
        sshd_at = max(sshd_at, sshd_earliest)
        while True:
            now = time.monotonic()
            if self._onstart is None and now >= onstart_at:
                self._onstart = self._run_onstart()
            if self._sshd is None and (now >= sshd_at or (self._onstart_over and now >= sshd_earliest)):
                self._sshd = self._run_sshd()
                self._admit_at = now + self._config.deny_s if self._config.deny_s else None
            if self._admit_at is not None and now >= self._admit_at:
                self._admit()
            waits = [at - now for at, pid in ((onstart_at, self._onstart), (sshd_at, self._sshd)) if pid is None]
            if self._onstart_over and self._sshd is None:
                waits.append(sshd_earliest - now)
            if self._admit_at is not None:
                waits.append(self._admit_at - now)
            received = signal.sigtimedwait(_SIGNALS, max(0.0, min(waits, default=3600.0)))
            if received is None:
                continue
            if received.si_signo != signal.SIGCHLD:
                return signal.Signals(received.si_signo)
            self._note(processes.reap())

    def _admit(self) -> None:
        """From now on sshd knows the keys."""
        self._admit_at = None
        image.configure_sshd(self._box, self._config.port)
        if self._sshd is not None:
            os.kill(self._sshd, signal.SIGHUP)

    def _note(self, ended: dict[int, int]) -> None:
        if self._onstart in ended:
            self._onstart_over = True
            _say(f"onstart ended with {ended[self._onstart]}")
        if self._sshd in ended:
            _say(f"sshd ended with {ended[self._sshd]}")

    def _run_onstart(self) -> int:
        home = self._box / "root"
        environment = {**self._clean, **self._config.env}
        return self._spawn(["/bin/bash", str(home / "onstart.sh")], environment, "onstart.log")

    def _run_sshd(self) -> int:
        config = str(self._box / "etc/ssh/sshd_config")
        return self._spawn([image.sshd_path(), "-D", "-e", "-f", config], self._clean, "sshd.log")

    def _spawn(self, command: list[str], environment: dict[str, str], log: str) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            os.chdir(self._box / "root")
            out = os.open(self._box / "var/log" / log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.umask(0o022)
            os.execve(command[0], command, environment)
        except OSError as error:
            _say(f"{command[0]}: {error}")
            os._exit(127)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except NotSetUp as error:
        _say(f"{error.message}: {error.remedy}")
        sys.exit(error.exit_code)
