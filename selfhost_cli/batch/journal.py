"""The file of results: one JSON object a line, on the disk before the next one is begun. What is in it is done."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfhost_cli.batch.tasks import Task
from selfhost_cli.errors import SelfhostError, UsageError


@dataclass(frozen=True)
class Result:
    """What came of a task: `text`, or the `error`. Tokens of the prompt, reused ones among them, and of the answer."""

    id: str
    digest: str
    text: str = ""
    stop_reason: str = ""
    error: str = ""
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    attempts: int = 1


class Journal:
    """Open it for as long as the batch runs: two of them at once would ask everything twice."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError for a file that holds something else, and while another batch has it."""
        self.path = path
        self.done: dict[tuple[str, str], Result] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            os.close(self._file)
            raise UsageError(f"another batch writes {path} now", "Wait for it, or pass another --out.") from None
        except UsageError:
            os.close(self._file)
            raise

    def close(self) -> None:
        os.close(self._file)

    def left(self, tasks: Sequence[Task]) -> list[Task]:
        """Those that have no answer yet, as they are asked now."""
        return [task for task in tasks if (task.id, task.digest) not in self.done]

    def keep(self, result: Result) -> None:
        """A failure too, for people; only an answer counts as done. Raises SelfhostError when it cannot be written."""
        line = json.dumps(asdict(result), ensure_ascii=False) + "\n"
        view = memoryview(line.encode())
        try:
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except OSError as error:
            raise SelfhostError(
                f"{self.path}: {error.strerror}", "Make room there; the same command goes on with the rest."
            ) from error
        self._note(result)

    def _note(self, result: Result) -> None:
        if not result.error:
            self.done[result.id, result.digest] = result

    def _read(self) -> None:
        """A last line that a kill cut off is taken away; its task is asked again."""
        held = self.path.read_bytes()
        whole = held[: held.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._note(_result(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise UsageError(
                    f"{self.path}, line {number}: it is no result of a batch", "Pass another --out."
                ) from error
        if held and not whole and not held.startswith(b'{"id"'):
            raise UsageError(f"{self.path} is no file of results", "Pass another --out.")
        os.ftruncate(self._file, len(whole))
        os.lseek(self._file, 0, os.SEEK_END)


def _result(told: Mapping[str, Any]) -> Result:
    if not (isinstance(told["id"], str) and isinstance(told["digest"], str)):
        raise ValueError("no result")
    return Result(**told)
