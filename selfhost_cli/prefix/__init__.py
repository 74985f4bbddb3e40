"""What Claude Code begins its prompts with: kept on this machine, so that a box can read it ahead.

System prompt and tools are the same in every project, for one version of Claude Code and one way to run it; the
directory, the day and the project's own instructions follow, and are sent ahead only for that directory. What a user
said is never kept. Read from 2.1.330.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from selfhost_cli.errors import SelfhostError

Json = dict[str, Any]
MODES = ("cli", "sdk-cli")
"""As its user agent calls them: on a terminal, and `claude -p`."""
ANSWERED = b'"role":"assistant"'
"""In a prompt that is not a session's first."""
LARGEST = 4 * 2**20
AGENT = re.compile(r"claude-cli/(?P<version>\d[\w.-]*) \(external, (?P<mode>[a-z-]+)")
REMINDER = "<system-reminder>"
QUOTING = ("Called the ", "Result of calling ")
"""How a reminder begins that shows the model what a tool said."""
KEPT = ("system", "tools", "thinking", "output_config")
"""What chat templates make the beginning of a prompt from; the messages follow."""


@dataclass(frozen=True)
class Prefix:
    """`body` is a Messages body, without a word of the user's."""

    mode: str
    version: str
    body: Json = field(repr=False)

    def ahead(self, directory: str) -> Json:
        """What a box may read ahead of a session in that directory."""
        messages = self.body["messages"]
        # Another project's is none of its business, and would be of no use.
        here = f": {directory}\n" in _texts(messages)
        return self.body | {"messages": messages if here else [{"role": "user", "content": "."}], "max_tokens": 1}


def taken(agent: str, body: bytes) -> Prefix | None:
    """From the first request of a session, as it was sent with that user agent; None for any other."""
    claude = AGENT.match(agent)
    if not claude or claude["mode"] not in MODES or ANSWERED in body or len(body) > LARGEST:
        return None
    try:
        asked = json.loads(body)
        kept: Json = {name: asked[name] for name in KEPT if name in asked}
        kept["messages"] = [said for message in asked["messages"] if (said := _without_words(message))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not kept.get("tools") or not kept.get("system") or not kept["messages"]:
        return None
    return Prefix(claude["mode"], claude["version"], kept)


class Store:
    """The last one of each mode, in a file that nobody else may read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keeping = threading.Lock()  # one is heard while another is recorded

    def all(self) -> dict[str, Prefix]:
        """By mode; none when the file is not there or is none of ours."""
        try:
            found = json.loads(self._path.read_bytes())
            return {mode: Prefix(**found[mode]) for mode in MODES if mode in found}
        except (OSError, ValueError, TypeError, RecursionError):
            return {}

    def keep(self, prefix: Prefix) -> bool:
        """In place of the last one of its mode; whether it is another one. Raises SelfhostError."""
        with self._keeping:
            known = self.all()
            if known.get(prefix.mode) == prefix:
                return False
            known[prefix.mode] = prefix
            draft = self._path.with_suffix(f".{os.getpid()}")
            try:
                with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                    json.dump({mode: asdict(one) for mode, one in known.items()}, file)
                draft.replace(self._path)
            except OSError as error:
                raise SelfhostError(f"{self._path} cannot be written: {error.strerror}") from error
        return True


def _without_words(message: Mapping[str, Any]) -> Json | None:
    """As Claude Code made it; what stands beside its reminders is the user's, and so are files that they named."""
    role, content = message["role"], message["content"]
    if role == "system":
        return {"role": role, "content": content}
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [block["text"] for block in blocks if block.get("type") == "text"]
    ours = [{"type": "text", "text": text} for text in texts if text.startswith(REMINDER) and not _quotes(text)]
    return {"role": role, "content": ours} if ours else None


def _quotes(reminder: str) -> bool:
    """Whether it is what a tool was asked and answered before the model was: a file named with @, say."""
    return reminder.removeprefix(REMINDER).lstrip().startswith(QUOTING)


def _texts(messages: list[Json]) -> str:
    parts = []
    for message in messages:
        content = message["content"]
        parts += [content] if isinstance(content, str) else [block["text"] for block in content]
    return "\n".join(parts)
