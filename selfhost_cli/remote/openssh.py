"""SSH with the system's own program, to a machine of the user's own: it has their configuration, agent, jump hosts and
known_hosts, and who the machine is, is theirs to say.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from selfhost_cli.errors import NotSetUp, SelfhostError, UsageError
from selfhost_cli.remote import ConnectionLost, Result
from selfhost_cli.wait import Pending, TimedOut, until

CONNECT_S = 30
"""For all of it, jump hosts too."""
PUT_S = 120.0
LONGEST_ANSWER = 2**24
"""Bytes that a command may say, on both streams."""
CLOSE_S = 5.0
BROKEN = 255
"""What the program ends with when it is not the command that ended."""


def words(destination: str, config: str = "") -> list[str]:
    """The program and what all its calls have in common. It asks nobody anything: neither for a password nor whether a
    key is right. `destination`: as `ssh` takes it; `config`: another file than ~/.ssh/config.

    Raises UsageError for what is no destination, NotSetUp without the program.
    """
    checked(destination)
    program = shutil.which("ssh")
    if program is None:
        raise NotSetUp("there is no `ssh` here", "Install OpenSSH's client.")
    options = ["BatchMode=yes", "StrictHostKeyChecking=yes", f"ConnectTimeout={CONNECT_S}", "ServerAliveInterval=5"]
    options += ["ServerAliveCountMax=2", "ForwardAgent=no", "ForwardX11=no", "ControlMaster=no", "LogLevel=ERROR"]
    return [
        program,
        *(["-F", config] if config else []),
        "-T",
        *(word for option in options for word in ("-o", option)),
    ]


def checked(destination: str) -> str:
    """Raises UsageError for what `ssh` could take for anything else than a machine."""
    if not re.fullmatch(r"[^\s\-'\"\\][^\s'\"\\]*", destination) or "@-" in destination:
        raise UsageError(f"{destination!r} is no machine that `ssh` could go to", "Pass user@host, as to `ssh`.")
    return destination


def forward(destination: str, config: str, port: int, remote_port: int) -> list[str]:
    """127.0.0.1:`port` here becomes 127.0.0.1:`remote_port` there, for as long as its stdin is open.

    And no longer: whoever holds the other end may be killed. Once it is closed, open connections still end by
    themselves.
    """
    tunnel = ["-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes"]
    tunnel += ["-L", f"127.0.0.1:{port}:127.0.0.1:{remote_port}"]
    return [*words(destination, config), *tunnel, "--", destination, "cat >/dev/null"]


def refusal(destination: str, said: str) -> SelfhostError:
    """Why nobody could log in, from what the program said."""
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it says nothing")
    if "IDENTIFICATION HAS CHANGED" in said:
        why = f"{destination} shows another host key than your known_hosts has: nobody logged in"
        return NotSetUp(why, f"See what `ssh {destination}` says: it may be another machine.")
    if "Host key verification failed" in said:
        why = f"your known_hosts does not know {destination}: nobody logged in"
        return NotSetUp(why, f"Run `ssh {destination}` once, and compare its key.")
    if "Permission denied" in said:
        why = f"{destination} does not let you in: {last}"
        return NotSetUp(why, f"See to it that `ssh {destination}` works without a password, by a key or an agent.")
    return NotSetUp(f"{destination} cannot be reached: {last}", f"See what `ssh {destination}` says.")


class OpenSsh:
    """`remote.Remote` over one login: a process holds it, and every command shares it.

    Raises what `words` and `refusal` give.
    """

    def __init__(self, destination: str, config: str = "") -> None:
        self._destination = destination
        self._common = words(destination, config)
        self._folder = Path(tempfile.mkdtemp(prefix="selfhost-"))  # short: a socket's path has 104 bytes at most
        socket = self._folder / "s"
        self._said = self._folder / "said"
        self._path = ["-o", f"ControlPath={socket}"]
        with self._said.open("wb") as said:
            login = [*self._common, *self._path, "-o", "ClearAllForwardings=yes", "-M", "-N", "--", destination]
            # A group of its own: Ctrl-C is ours to answer.
            self._holder = subprocess.Popen(
                login, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )

        def ready() -> bool | Pending:
            if self._holder.poll() is not None:
                raise refusal(destination, self._said.read_text(errors="replace"))
            return socket.exists() or Pending("not logged in yet")

        try:
            until(ready, what=f"ssh to {destination}", seconds=CONNECT_S * 2, every=0.05)
        except TimedOut as error:
            self.close()
            raise refusal(destination, error.message) from error
        except BaseException:
            self.close()
            raise

    def run(self, command: str, *, timeout: float = 60.0, on_line: Callable[[str], None] | None = None) -> Result:
        """Run a shell command; `timeout` is seconds of silence. Raises ConnectionLost."""
        with (
            self._begin(command, subprocess.DEVNULL) as process,
            selectors.DefaultSelector() as streams,
        ):
            assert process.stdout
            assert process.stderr
            heard = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
            out, err = heard.values()
            for number in heard:
                streams.register(number, selectors.EVENT_READ)
            told = 0
            try:
                while streams.get_map():
                    ready = streams.select(timeout)
                    if not ready:
                        raise ConnectionLost(f"{self._destination} said nothing for {timeout:.0f} s")
                    for key, _ in ready:
                        data = os.read(key.fd, 2**16)
                        if not data:
                            streams.unregister(key.fd)
                        heard[key.fd] += data
                    if len(out) + len(err) > LONGEST_ANSWER:
                        raise ConnectionLost(f"{self._destination} says more than it may")
                    while on_line and (end := out.find(b"\n", told)) >= 0:
                        on_line(out[told:end].decode(errors="replace"))
                        told = end + 1
                code = process.wait(timeout)
            except BaseException:
                process.kill()
                raise
        return self._ended(code, bytes(out), bytes(err))

    def put(self, data: bytes, path: str, *, mode: int = 0o600) -> None:
        """Write a file (relative to the home directory) atomically, with that mode from its first byte."""
        target, draft = shlex.quote(path), shlex.quote(f"{path}.new")
        write = f"umask 077 && rm -f {draft} && cat >{draft} && chmod {mode:o} {draft} && mv -f {draft} {target}"
        with self._begin(write, subprocess.PIPE) as process:
            try:
                out, err = process.communicate(data, PUT_S)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise ConnectionLost(f"{self._destination} takes no file any more") from error
            except BaseException:
                process.kill()
                raise
        result = self._ended(process.returncode, out, err)
        if result.code:
            raise NotSetUp(f"{self._destination}: ~/{path} cannot be written: {result.err.strip()}", "Make room there.")

    def close(self) -> None:
        self._holder.terminate()
        try:
            self._holder.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._holder.kill()
            self._holder.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, command: str, stdin: int) -> subprocess.Popen[bytes]:
        if self._holder.poll() is not None:
            raise ConnectionLost(f"the connection to {self._destination} is gone")
        # Where the login is gone the program would try one of its own.
        shared = [*self._common, *self._path, "-o", f"ProxyCommand=exit {BROKEN}", "--", self._destination, command]
        return subprocess.Popen(
            shared, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    def _ended(self, code: int, out: bytes, err: bytes) -> Result:
        told = err.decode(errors="replace")
        if code == BROKEN:
            raise ConnectionLost(f"the connection to {self._destination} broke: {told.strip() or 'it says nothing'}")
        return Result(code, out.decode(errors="replace"), told)
