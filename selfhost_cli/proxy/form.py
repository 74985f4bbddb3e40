"""The form of an answer (`output_config.format`) where the engine does not hold it: asked for in words, and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

from selfhost_cli.proxy.codec import decode
from selfhost_cli.proxy.contract import Json, Request
from selfhost_cli.proxy.engines import AnswerEvent, Done, Text, ToolCall
from selfhost_cli.proxy.errors import API_ERROR, ProxyError
from selfhost_cli.proxy.fit import fits

FENCE = re.compile(r"```\w*\s*")


def in_words(request: Request) -> Request:
    """The same request, with its schema told at the end of what the user says. Its last message is the user's."""
    words = (
        "Answer with one JSON value that fits this schema, and with nothing else, not even a code fence:\n"
        + json.dumps(request.schema, ensure_ascii=False)
    )
    *before, last = request.messages
    last = last | {"content": [*last["content"], {"type": "text", "text": words}]}
    return replace(request, messages=[*before, last], schema=None)


class Form:
    """For one answer. Its text is held back to its end, because what does not fit must not be read as if it did."""

    def __init__(self, schema: Json) -> None:
        self._schema = schema
        self._held: list[str] = []

    def feed(self, event: AnswerEvent) -> Iterator[AnswerEvent]:
        """Raises ProxyError (400) when the whole answer does not fit; one that was cut passes as it is."""
        match event:
            case Text(text):
                self._held.append(text)
            case ToolCall():
                yield from self._given_back()
                yield event
            case Done(reason="end_turn", cut=False):
                yield from self._checked()
                yield event
            case Done():
                yield from self._given_back()
                yield event
            case _:
                yield event

    def _given_back(self) -> Iterator[AnswerEvent]:
        if self._held:
            yield Text("".join(self._held))
            self._held.clear()

    def _checked(self) -> Iterator[AnswerEvent]:
        said = "".join(self._held)
        if not said:
            return  # nothing at all is somebody else's to complain of
        text = _unfenced(said.strip())
        try:
            fitting = fits(decode(text), self._schema)
        except ValueError:
            fitting = False
        if not fitting:
            message = "the model's answer does not fit the schema of output_config.format"
            raise ProxyError(400, API_ERROR, message, final=True)
        yield Text(text)


def _unfenced(said: str) -> str:
    fence, _, inside = said.partition("\n")
    return inside[:-3].strip() if FENCE.fullmatch(fence) and inside.endswith("```") else said
