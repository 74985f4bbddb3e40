"""A `Remote` without ssh: the same verbs, run by a local shell whose home is a temporary directory."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from selfhost_cli.remote import ConnectionLost, Result


@dataclass
class RemoteFake:
    """Commands are really run (`sh -c`), files really written. `lost` makes every further verb fail."""

    home: Path
    env: dict[str, str]
    commands: list[str] = field(default_factory=list)
    puts: list[str] = field(default_factory=list)
    lost: bool = False

    def run(self, command: str, *, timeout: float = 60.0, on_line: Callable[[str], None] | None = None) -> Result:
        self._check()
        self.commands.append(command)
        process = subprocess.Popen(
            ["sh", "-c", command],
            cwd=self.home,
            env={**self.env, "HOME": str(self.home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        errors: list[str] = []
        with process:
            assert process.stdout is not None
            assert process.stderr is not None
            reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
            reader.start()
            lines = []
            for line in process.stdout:
                lines.append(line)
                if on_line:
                    on_line(line.rstrip("\n"))
            reader.join(timeout)
            code = process.wait(timeout)
        return Result(code, "".join(lines), "".join(errors))

    def put(self, data: bytes, path: str, *, mode: int = 0o600) -> None:
        self._check()
        self.puts.append(path)
        target = self.home / path
        new = target.with_name(target.name + ".new")
        new.touch(mode=mode)
        new.chmod(mode)
        new.write_bytes(data)
        new.replace(target)

    def close(self) -> None:
        self.lost = True

    def _check(self) -> None:
        if self.lost:
            raise ConnectionLost("the connection to the box is gone")
