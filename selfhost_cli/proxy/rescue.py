"""Tool calls that a model wrote as text, found in the stream and made calls again.

A filter over an engine's events. Three things have to hold, or the text stays text, byte for byte: it has the form of a
call, it fits one of the request's own tools, and nothing but calls, and results that the model made up, follows it to
the end of the answer. The last one tells a call from an explanation of one, and costs no time, because a model stops
after its calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from selfhost_cli.proxy.contract import Json
from selfhost_cli.proxy.engines import AnswerEvent, Done, Text, Thinking, ToolCall, ToolInput
from selfhost_cli.proxy.fit import Misfit, fitting, parse, properties, shut_out

MAX_HELD = 2**20
"""Characters that are held back at most; a call that is longer is given up as text."""

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Reads text that is still coming: yields when it needs more of it."""

Call = tuple[str, str]
"""The tool's name, and its input as JSON."""

_BLANKS = re.compile(r"[ \t\r\n]*")
_REST_OF_LINE = re.compile(r"[ \t\r]*")
_KEY_END = re.compile(r"[>\s<=]")
_MARKERS = "</parameter>|</function>|</tool_call>|<parameter=|<function=|<tool_call>"
_VALUE_END = re.compile(_MARKERS)
_QUOTED_END = re.compile(r'["\\]')
_ATTRIBUTE = re.compile(r'\s*([^\s<>="]+)\s*=\s*(?:"([^"\\]*)"\s*(?:/?>\s*)?|(\w+)\s*)')
_ECHOES = {
    f"<{word}>": re.compile(f"</{word}>|{_MARKERS}")
    for word in ("parameter", "required", "description", "type", "additionalProperties")
}
"""Up to where they go: elements that declare a tool in a prompt, and that a model repeats inside its call."""
_IN_A_CALL = ("<parameter=", "</parameter>", "</function>", "</tool_call>", "<function=", "<tool_call>", *_ECHOES)
_RESPONSE_END = re.compile("</tool_response>")
_BROKEN_TAG = re.compile(r"</?[a-z_]*=?\Z")
_LONGEST_TAG = len("</additionalProperties>")
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)")
_NO_BRACKETS = re.compile(r'[^"{}\[\]]*')
_STRING_PART = re.compile(r'(?:[^"\\]+|\\.)*', re.DOTALL)


class Rescue:
    """For one answer. `repaired` counts the calls that were found in its text.

    `stops`: the client named stop sequences. Not every engine tells that one ended the answer, maybe inside a call.
    """

    def __init__(self, tools: list[Json], max_held: int = MAX_HELD, *, stops: bool = False) -> None:
        self.repaired = 0
        self._stops = stops
        self._schemas = {tool["name"]: tool["input_schema"] for tool in tools}
        self._max_held = max_held
        self._off = not tools
        self._prose = _Prose()
        self._attempt: _Attempt | None = None

    def feed(self, event: AnswerEvent) -> Iterator[AnswerEvent]:
        """What can be told by now: text as it comes, but what may be a call only when that is decided."""
        match event:
            case Text(text):
                yield from _text(self._say(text))
            case Thinking(text) if text:
                yield from _text("".join(self._refused()))
                self._prose = _Prose()
                yield event
            case ToolCall():
                yield from self._end(cut=True)
                self._prose = _Prose()
                yield event
            case Done():
                before = self.repaired
                # a limit may have cut a call short: what is not closed then is not a call
                cut = event.cut or event.reason in ("max_tokens", "stop_sequence")
                yield from self._end(cut=cut or self._stops)
                ends_in_calls = self.repaired > before or (self.repaired and event.reason == "end_turn")
                yield replace(event, reason="tool_use", stop_sequence=None) if ends_in_calls else event
            case _:
                yield event

    def _say(self, text: str) -> str:
        """Takes more of the answer, gives that part which is certainly no call."""
        if self._off:
            return text
        passed: list[str] = []
        at = 0
        while at < len(text):
            if self._attempt is None:
                plain = self._prose.before_a_call(text, at)
                if plain > at:
                    passed.append(self._prose.add(text[at:plain]))
                    at = plain
                    continue
                self._attempt = _Attempt(self._schemas, own_line=self._prose.at_line_start)
            # In slices: small ones first, as most attempts end soon, and none beyond the limit, so that it does not
            # matter in which pieces the text came.
            held = self._attempt.held
            piece = text[at : at + min(max(64, held), self._max_held + 1 - held)]
            at += len(piece)
            try:
                self._attempt.read(piece)
            except _NotACall:
                refused, rest = self._refused()
                passed.append(self._prose.add(refused))
                text, at = (text, at - len(rest)) if len(rest) <= at else (rest + text[at:], 0)
            else:
                if self._attempt.held > self._max_held:
                    self._off = True
                    return "".join([*passed, *self._refused(), text[at:]])
        return "".join(passed)

    def _end(self, *, cut: bool) -> Iterator[AnswerEvent]:
        """The text is over: what was held back is calls, or it is text."""
        if self._attempt is None:
            return
        try:
            calls = self._attempt.end(cut=cut)
        except _NotACall:
            # no call begins in the rest: that is less than the longest tag
            yield from _text("".join(self._refused()))
            return
        self._attempt = None
        for name, given in calls:
            self.repaired += 1
            yield ToolCall(name)
            yield ToolInput(given)

    def _refused(self) -> tuple[str, str]:
        """The text of the attempt that is no call, and the rest of it, in which one may still begin."""
        refused = self._attempt.refused() if self._attempt else ("", "")
        self._attempt = None
        return refused


def _text(text: str) -> Iterator[Text]:
    if text:
        yield Text(text)


def _begun(*words: str) -> str:
    """A pattern: one of the words, or as much of one as the text has room for."""
    begun = sorted({word[:length] for word in words for length in range(len(word))})
    return "|".join([*map(re.escape, words), *(re.escape(start) + r"\Z" for start in begun)])


_KEYS = ('"name"', '"arguments"', '"parameters"', '"input"')
_JSON_OR_FENCE = re.compile(rf"[ \t]*+(\{{[ \t\r\n]*+(?:{_begun(*_KEYS)})|`(?:{_begun('``')}))")
_TAG_OR_LINE_END = re.compile(rf"\n|<(?:{_begun('tool_call>', 'function=')})")


class _Prose:
    """Where in its Markdown the text is: at the start of a line, inside a fence."""

    def __init__(self) -> None:
        self._line = ""
        self._fence = ""

    @property
    def at_line_start(self) -> bool:
        return not self._line.strip(" \t")

    def before_a_call(self, text: str, begin: int) -> int:
        """Up to where, at most to the end of the line, no call can begin; `begin` when one can there."""
        if self._fence:
            return text.find("\n", begin) + 1 or len(text)
        if self.at_line_start and (found := _JSON_OR_FENCE.match(text, begin)):
            return found.start(1)
        if not (found := _TAG_OR_LINE_END.search(text, begin)):
            return len(text)
        return found.end() if found[0] == "\n" else found.start()

    def add(self, text: str) -> str:
        """Gives it back."""
        *lines, rest = text.split("\n")
        for line in lines:
            self._go_on(line)
            self._end_line()
        self._go_on(rest)
        return text

    def _go_on(self, part: str) -> None:
        # its beginning is enough, and a line may be long
        self._line = (self._line + part[:256])[:256]

    def _end_line(self) -> None:
        found = _FENCE.match(self._line)
        self._line = ""
        if not found:
            return
        marks, info = found[1], found[2]
        if not self._fence:
            # backticks behind backticks are code in a sentence
            self._fence = "" if marks[0] == "`" and "`" in info else marks
        elif marks.startswith(self._fence) and not info.strip():
            self._fence = ""


class _NotACall(Exception):
    """What is read cannot become a call any more."""


class _Attempt:
    """Reads on from where a call may begin, up to the end of the answer."""

    def __init__(self, schemas: dict[str, Any], *, own_line: bool) -> None:
        self._schemas = schemas
        self._own_line = own_line
        self._buffer = ""
        self._at = 0
        self._taken: list[str] = []
        self._taken_length = 0
        self._ended = False
        self._cut = False
        self._reading = self._calls()

    @property
    def held(self) -> int:
        """In characters."""
        return self._taken_length + self._left

    def read(self, text: str) -> None:
        """Raises _NotACall as soon as that is certain."""
        self._buffer, self._at = self._buffer[self._at :] + text, 0
        next(self._reading)

    def end(self, *, cut: bool) -> list[Call]:
        """Raises _NotACall. `cut`: the text ended without the model wanting it."""
        self._ended, self._cut = True, cut
        try:
            next(self._reading)
        except StopIteration as stop:
            calls: list[Call] = stop.value
            return calls
        raise AssertionError("it asks for more text than there is")

    def refused(self) -> tuple[str, str]:
        """The text that is no call, at least one character, and the rest, in which a call may still begin."""
        if not self._taken:
            self._take(1)
        return "".join(self._taken), self._buffer[self._at :]

    # --- the grammar: closing tags may be missing, <tool_call> around it too

    def _calls(self) -> Reading[list[Call]]:
        calls: list[Call] = []
        grounded: list[Call] = []
        opened = False
        while True:
            # the model leaves out the opening tag more often than the closing one
            behind = ("</tool_call>", "<tool_response>") if calls and not opened else ()
            match (yield from self._literal("<tool_call>", "<function=", "{", "```", *behind)):
                case "<tool_call>":
                    opened = True
                case "</tool_call>":
                    pass
                case "<tool_response>":
                    # made up by the model; and so is the ground for every call behind it
                    grounded = grounded or [*calls]
                    yield from self._until(_RESPONSE_END, len("</tool_response>"))
                    if not (yield from self._literal("</tool_response>")):
                        return grounded  # it went on making that up until it was cut
                case "<function=":
                    calls.append((yield from self._function(own_line=self._own_line or opened or bool(calls))))
                    opened = False
                case "{":
                    calls.append((yield from self._object()))
                    opened = False
                case "```" if not opened:
                    calls += yield from self._fenced()
                case _:
                    if not calls or opened or self._left:
                        raise _NotACall
                    return grounded or calls
            yield from self._blanks()

    def _function(self, *, own_line: bool) -> Reading[Call]:
        name = (yield from self._expect(*(f"{name}>" for name in self._schemas)))[:-1]
        if not own_line:
            # in the middle of a line only when the tag ends that line: in a sentence about calls it does not
            yield from self._blanks(_REST_OF_LINE)
            yield from self._expect("\n")
        schema = self._schemas[name]
        given: Json = {}
        echoed: list[str] = []
        while True:
            yield from self._blanks()
            match (yield from self._next(*_IN_A_CALL)):
                case "<parameter=" as tag:
                    self._take(len(tag))
                    key = _new((yield from self._until(_KEY_END, 1)), given, schema)
                    given[key] = yield from self._parameter()
                case tag if tag in _ECHOES:
                    inside = yield from self._element(tag)
                    if tag == "<parameter>" and (found := _ATTRIBUTE.fullmatch(inside)):
                        given[_new(found[1], given, schema)] = found[2] or found[3] or ""
                    else:
                        echoed.append(tag + inside)
                case "</parameter>" as tag:
                    self._take(len(tag))  # of one that had its value in its tag
                case "</function>" as tag:
                    self._take(len(tag))
                    break
                case "":
                    if self._left or self._cut:
                        raise _NotACall
                    break
                case _:
                    break
        if _names_more(echoed, given, schema):
            raise _NotACall
        return name, _fitting(given, schema)

    def _element(self, tag: str) -> Reading[str]:
        """What is in it."""
        self._take(len(tag))
        inside = yield from self._until(_ECHOES[tag], _LONGEST_TAG)
        yield from self._expect(f"</{tag[1:]}")
        return inside

    def _parameter(self) -> Reading[str]:
        if (yield from self._expect(">", "=")) == "=":
            return (yield from self._quoted())
        value = yield from self._until(_VALUE_END, _LONGEST_TAG)
        if not (yield from self._literal("</parameter>")):
            if not self._left and _BROKEN_TAG.search(value):
                raise _NotACall
            value = value.lstrip(" ")
        # the format has the value on lines of its own; more blanks than that are the value's
        return re.sub(r"\A\r?\n|\r?\n\Z", "", value)

    def _quoted(self) -> Reading[str]:
        """A value that stands in its tag. A backslash there has two meanings."""
        yield from self._expect('"')
        value = yield from self._until(_QUOTED_END, 1)
        yield from self._expect('"')
        yield from self._blanks()
        yield from self._expect(">", "/>")
        yield from self._blanks()
        yield from self._literal("</parameter>")
        return value

    def _fenced(self) -> Reading[list[Call]]:
        yield from self._literal("json", "JSON", "tool_call")
        yield from self._blanks(_REST_OF_LINE)
        yield from self._expect("\n")
        calls: list[Call] = []
        while True:
            yield from self._blanks()
            match (yield from self._literal("{", "```")):
                case "{":
                    calls.append((yield from self._object()))
                case "```" if calls:
                    return calls
                case _:
                    if not calls or self._left or self._cut:
                        raise _NotACall
                    return calls

    def _object(self) -> Reading[Call]:
        name: str | None = None
        raw: str | None = None
        while True:
            yield from self._blanks()
            key = yield from self._expect('"name"', '"arguments"', '"parameters"', '"input"')
            yield from self._blanks()
            yield from self._expect(":")
            yield from self._blanks()
            if key == '"name"' and name is None:
                name = json.loads((yield from self._expect(*map(json.dumps, self._schemas))))
            elif key != '"name"' and raw is None:
                raw = yield from self._value()
            else:
                raise _NotACall
            yield from self._blanks()
            if (yield from self._expect(",", "}")) == "}":
                break
        if name is None or raw is None:
            raise _NotACall
        return name, _fitting(_parsed(raw), self._schemas[name])

    def _value(self) -> Reading[str]:
        """A JSON object, or a string that may have one in it; only its end is looked for."""
        if not (yield from self._next("{", '"')):
            raise _NotACall
        said: list[str] = []
        depth = 0
        while True:
            mark = yield from self._mark()
            said.append(mark)
            match mark[-1]:
                case '"':
                    said.append((yield from self._rest_of_string()))
                case "{" | "[":
                    depth += 1
                case "}" | "]":
                    depth -= 1
            if depth <= 0:
                return "".join(said)

    def _mark(self) -> Reading[str]:
        """Up to the next quote or bracket, with it."""
        said = yield from self._while(_NO_BRACKETS)
        return said + self._take(1)

    def _rest_of_string(self) -> Reading[str]:
        said = yield from self._while(_STRING_PART)
        return said + self._take(1)

    # --- reading what comes in pieces; nothing may depend on where the pieces end

    @property
    def _left(self) -> int:
        return len(self._buffer) - self._at

    def _take(self, length: int) -> str:
        taken = self._buffer[self._at : self._at + length]
        self._at += len(taken)
        self._taken_length += len(taken)
        self._taken.append(taken)
        return taken

    def _next(self, *options: str) -> Reading[str]:
        """Which of them comes next, "" for none."""
        while True:
            for option in options:
                if self._buffer.startswith(option, self._at):
                    return option
            if self._ended or not any(self._may_become(option) for option in options):
                return ""
            yield

    def _may_become(self, option: str) -> bool:
        return self._left < len(option) and option.startswith(self._buffer[self._at :])

    def _literal(self, *options: str) -> Reading[str]:
        found = yield from self._next(*options)
        return self._take(len(found)) if found else ""

    def _expect(self, *options: str) -> Reading[str]:
        found = yield from self._literal(*options)
        if not found:
            raise _NotACall
        return found

    def _blanks(self, blanks: re.Pattern[str] = _BLANKS) -> Reading[None]:
        while True:
            if found := blanks.match(self._buffer, self._at):
                self._take(found.end() - self._at)
            if self._left or self._ended:
                return
            yield

    def _while(self, pattern: re.Pattern[str]) -> Reading[str]:
        """As far as it matches; there is something behind it."""
        said: list[str] = []
        while True:
            if found := pattern.match(self._buffer, self._at):
                said.append(self._take(found.end() - self._at))
            # a backslash at the end waits for what it escapes
            if self._left and not (self._left == 1 and self._buffer.endswith("\\")):
                return "".join(said)
            if self._ended:
                raise _NotACall
            yield

    def _until(self, end: re.Pattern[str], longest: int) -> Reading[str]:
        """What comes before the end, which is at most so long; all there is when it does not come."""
        said: list[str] = []
        while not (found := end.search(self._buffer, self._at)):
            if self._ended:
                return "".join([*said, self._take(self._left)])
            said.append(self._take(max(0, self._left - longest)))
            yield
        return "".join([*said, self._take(found.start() - self._at)])


# --- do they fit


def _fitting(given: Any, schema: Any) -> str:
    """The arguments as JSON, in the types that the schema wants. Raises _NotACall."""
    try:
        return json.dumps(fitting(given, schema))
    except Misfit as error:
        raise _NotACall from error


def _parsed(text: str) -> Any:
    try:
        return parse(text)
    except Misfit as error:
        raise _NotACall from error


def _new(key: str, given: Json, schema: Any) -> str:
    """Raises _NotACall for one that has no place in the call."""
    if key in given or shut_out(key, schema):
        raise _NotACall
    return key


def _names_more(echoed: list[str], given: Json, schema: Any) -> bool:
    """They may hold an argument that the call does not have."""
    missing = properties(schema).keys() - given
    return any(re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", text) for text in echoed for key in missing)
