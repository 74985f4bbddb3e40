"""Lines -> tasks. A line is a JSON object with a prompt, or the prompt itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from selfhost_cli.errors import UsageError

FIELDS = ("id", "prompt", "system", "max_tokens")
LONGEST_ID = 200


@dataclass(frozen=True)
class Task:
    """`id`: the user's own, or the number of its line. `max_tokens`: where its answer is cut, None for the default."""

    id: str
    prompt: str
    system: str = ""
    max_tokens: int | None = None

    @property
    def digest(self) -> str:
        """Of what is asked: a task that was edited is another one."""
        asked = json.dumps([self.prompt, self.system, self.max_tokens], ensure_ascii=False)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]


def read(lines: Iterable[str], source: str) -> list[Task]:
    """All of them, checked before the first is asked. Raises UsageError, which names the line. Empty ones count not."""
    tasks: dict[str, Task] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        try:
            task = _task(text, number)
            if task.id in tasks:
                raise UsageError(f"there is a task {task.id!r} already")
        except UsageError as error:
            raise UsageError(f"{source}, line {number}: {error.message}", error.remedy) from error
        tasks[task.id] = task
    if not tasks:
        raise UsageError(f"{source} holds no tasks", 'One a line: a prompt, or {"id": "…", "prompt": "…"}.')
    return list(tasks.values())


def _task(text: str, number: int) -> Task:
    if not text.startswith("{"):
        return Task(str(number), text)
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"it begins as JSON and is none: {error}") from error
    return _checked(told, number)


def _checked(told: dict[str, Any], number: int) -> Task:
    if unknown := sorted(told.keys() - set(FIELDS)):
        raise UsageError(f"a task has no {', '.join(unknown)}", f"It has {', '.join(FIELDS)}.")
    name, prompt, system = told.get("id", str(number)), told.get("prompt"), told.get("system", "")
    most = told.get("max_tokens")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_ID:
        raise UsageError(f"its id is no text of 1 to {LONGEST_ID} characters")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError("it has no prompt")
    if not isinstance(system, str):
        raise UsageError("its system prompt is no text")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise UsageError("its max_tokens is no whole number above zero")
    try:
        f"{name}{prompt}{system}".encode()
    except UnicodeEncodeError as error:
        raise UsageError("it has half of a character, which nothing can be asked with") from error
    return Task(name, prompt, system, most)
