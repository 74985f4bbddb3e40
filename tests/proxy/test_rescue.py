"""Tool calls that leak as text: made calls again when they fit, left alone when they merely look like one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selfhost_cli.proxy.answer import Narrator, collect
from selfhost_cli.proxy.engines import AnswerEvent, Done, Prompt, StopReason, Text, Thinking, ToolCall, ToolInput
from selfhost_cli.proxy.rescue import Rescue

LEAKS = Path(__file__).parent / "leaks"
CALLS: dict[str, Any] = json.loads((LEAKS / "calls.json").read_text("utf-8"))
PROSE = sorted(path.stem for path in (LEAKS / "prose").glob("*.txt"))

TEXT = {"type": "string"}
TODO = {
    "type": "object",
    "properties": {"content": TEXT, "status": {"type": "string", "enum": ["pending", "done"]}},
    "required": ["content", "status"],
    "additionalProperties": False,
}


def tool(name: str, properties: dict[str, Any], *required: str, **schema: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(required), **schema}
    return {"name": name, "description": "", "input_schema": {"additionalProperties": False} | schema}


TOOLS = [
    tool("Read", {"file_path": TEXT, "offset": {"type": "integer"}, "limit": {"type": "integer"}}, "file_path"),
    tool("ReadMany", {"paths": {"type": "array", "items": TEXT}}, "paths"),
    tool("Write", {"file_path": TEXT, "content": TEXT}, "file_path", "content"),
    tool(
        "Bash",
        {
            "command": TEXT,
            "description": TEXT,
            "timeout": {"type": "number"},
            "run_in_background": {"type": "boolean"},
        },
        "command",
    ),
    tool("TodoWrite", {"todos": {"type": "array", "items": TODO}}, "todos"),
    tool("ListAgents", {}),
]


def leak(kind: str, name: str) -> str:
    return (LEAKS / kind / f"{name}.txt").read_bytes().decode()


def told(rescue: Rescue, events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    return [out for event in events for out in rescue.feed(event)]


def merged(events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    merged: list[AnswerEvent] = []
    for event in events:
        if isinstance(event, Text) and merged and isinstance(last := merged[-1], Text):
            merged[-1] = Text(last.text + event.text)
        else:
            merged.append(event)
    return merged


def rescued(
    *pieces: str,
    reason: StopReason = "end_turn",
    tools: list[dict[str, Any]] = TOOLS,
    max_held: int = 2**20,
) -> list[AnswerEvent]:
    events: list[AnswerEvent] = [*map(Text, pieces), Done(reason, 9)]
    return merged(told(Rescue(tools, max_held), events))


def calls(events: Iterable[AnswerEvent]) -> list[tuple[str, Any]]:
    events = list(events)
    names = [event.name for event in events if isinstance(event, ToolCall)]
    inputs = [json.loads(event.json) for event in events if isinstance(event, ToolInput)]
    return list(zip(names, inputs, strict=True))


def text(events: Iterable[AnswerEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def as_prose(said: str, reason: StopReason = "end_turn") -> list[AnswerEvent]:
    return [Text(said), Done(reason, 9)] if said else [Done(reason, 9)]


def in_pieces(said: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(said), *(cut % (len(said) + 1) for cut in cuts)})
    return [said[begin:end] for begin, end in pairwise(places)]


# --- the corpus


@pytest.mark.parametrize("name", CALLS)
def test_a_leaked_call_of_the_corpus_becomes_a_call_again(name: str) -> None:
    expected = CALLS[name]
    rescue = Rescue(TOOLS)
    events = told(rescue, [Text(leak("calls", name)), Done("end_turn", 9)])
    assert text(events) == expected["text"]
    assert calls(events) == [tuple(call) for call in expected["calls"]]
    assert events[-1] == Done("tool_use", 9)
    assert rescue.repaired == len(expected["calls"])


@pytest.mark.parametrize("name", PROSE)
def test_what_merely_looks_like_a_call_stays_as_it_is(name: str) -> None:
    said = leak("prose", name)
    assert rescued(said) == as_prose(said)


def test_the_corpus_has_no_leak_without_its_expectation() -> None:
    assert {path.stem for path in (LEAKS / "calls").iterdir()} == set(CALLS)


ANY_LEAK = [leak("calls", name) for name in CALLS] + [leak("prose", name) for name in PROSE]


@pytest.mark.parametrize("said", ANY_LEAK)
def test_one_character_at_a_time_makes_no_difference(said: str) -> None:
    assert rescued(*said) == rescued(said)


@given(
    st.lists(st.sampled_from(ANY_LEAK), min_size=1, max_size=3),
    st.lists(st.integers(min_value=0)),
    st.sampled_from(["end_turn", "max_tokens"]),
    st.integers(min_value=1, max_value=600),
)
def test_where_the_pieces_end_makes_no_difference(
    leaks: list[str], cuts: list[int], reason: StopReason, max_held: int
) -> None:
    said = "".join(leaks)
    assert rescued(*in_pieces(said, cuts), reason=reason, max_held=max_held) == rescued(
        said, reason=reason, max_held=max_held
    )


@given(st.sampled_from(ANY_LEAK), st.integers(min_value=0))
def test_nothing_of_an_answer_is_lost_when_it_is_cut_anywhere(said: str, cut: int) -> None:
    said = said[: cut % (len(said) + 1)]
    events = rescued(said, reason="max_tokens")
    if not calls(events):
        assert events == as_prose(said, "max_tokens")
    else:
        assert said.startswith(text(events))
        assert events[-1] == Done("tool_use", 9)


# --- any call of any tool, in every shape

MARKERS = ("<parameter=", "</parameter>", "<function=", "</function>", "<tool_call>", "</tool_call>")


def plain(value: str) -> bool:
    return not any(marker in value for marker in MARKERS)


TEXTS = st.text() | st.text(alphabet="<>/{}[]`\"'\\ \n\tab=")
WORDS = TEXTS.filter(plain)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers()
KINDS: list[tuple[dict[str, Any], st.SearchStrategy[Any]]] = [
    (TEXT, WORDS),
    ({"type": "integer"}, st.integers()),
    ({"type": "number"}, NUMBERS),
    ({"type": "boolean"}, st.booleans()),
    ({"type": ["integer", "null"]}, st.none() | st.integers()),
    ({"enum": ["a", "b c"]}, st.sampled_from(["a", "b c"])),
    ({"enum": [1, 2]}, st.sampled_from([1, 2])),
    ({"const": True}, st.just(True)),
    ({"anyOf": [{"type": "integer"}, {"type": "boolean"}]}, st.integers() | st.booleans()),
    ({"$ref": "#/$defs/item"}, st.fixed_dictionaries({"content": WORDS, "status": st.sampled_from(["done"])})),
    ({"type": "array", "items": {"type": "number"}}, st.lists(NUMBERS)),
    ({"type": "object"}, st.dictionaries(WORDS, st.none() | WORDS | st.lists(NUMBERS))),
]


@st.composite
def any_calls(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[tuple[str, dict[str, Any]]]]:
    """Some tools, and calls that fit them."""
    names = draw(
        st.lists(st.from_regex(r"[A-Za-z_][A-Za-z0-9_.:-]{0,9}", fullmatch=True), min_size=1, max_size=4, unique=True)
    )
    tools, fitting = [], []
    for name in names:
        keys = draw(st.lists(st.from_regex(r"[A-Za-z-][A-Za-z0-9_-]{0,7}", fullmatch=True), max_size=4, unique=True))
        kinds = {key: draw(st.sampled_from(KINDS)) for key in keys}
        required = [key for key in keys if draw(st.booleans())]
        schemas = {key: kind[0] for key, kind in kinds.items()}
        tools.append(tool(name, schemas, *required, **{"$defs": {"item": TODO}}))
        values = st.fixed_dictionaries(
            {key: kinds[key][1] for key in required},
            optional={key: kind[1] for key, kind in kinds.items() if key not in required},
        )
        fitting.append(st.tuples(st.just(name), values))
    return tools, draw(st.lists(st.one_of(fitting), min_size=1, max_size=3))


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def xml(name: str, given: dict[str, Any], *, inline: bool = False) -> str:
    gap = "" if inline else "\n"
    parts = (f"<parameter={key}>{gap}{as_text(value)}{gap}</parameter>\n" for key, value in given.items())
    return f"<function={name}>{gap}{''.join(parts)}</function>"


def as_object(name: str, given: Any, arguments: str = "arguments", indent: int | None = None) -> str:
    return json.dumps({"name": name, arguments: given}, indent=indent, ensure_ascii=bool(indent))


def values_in_tags(name: str, given: dict[str, Any]) -> str:
    """Those that have one meaning there."""
    simple = {key: text for key, value in given.items() if not set('"\\') & set(text := as_text(value))}
    tags = "".join(f'<parameter={key}="{text}">\n' for key, text in simple.items())
    rest = {key: value for key, value in given.items() if key not in simple}
    return xml(name, rest).replace(">", f">\n{tags}", 1)


def with_echo(name: str, given: dict[str, Any]) -> str:
    echo = f"<parameter>\nit\n</parameter>\n<required>{json.dumps([*given])}</required>\n"
    return xml(name, given).removesuffix("</function>") + echo + "</function>"


SHAPES: dict[str, Callable[[str, Any], str]] = {
    "xml": xml,
    "xml, all tags": lambda name, given: f"<tool_call>\n{xml(name, given)}\n</tool_call>",
    "xml, no opening tag": lambda name, given: f"{xml(name, given)}\n</tool_call>",
    "xml, no closing tag": lambda name, given: f"<tool_call>\n{xml(name, given)}",
    "xml, last tags missing": lambda name, given: xml(name, given).removesuffix("</function>"),
    "xml, values in its tags": values_in_tags,
    "xml, with more than arguments": with_echo,
    "json": as_object,
    "json, tags": lambda name, given: f"<tool_call>\n{as_object(name, given, indent=2)}\n</tool_call>",
    "json, fence": lambda name, given: f"```json\n{as_object(name, given, 'parameters', indent=2)}\n```",
    "json, fence not closed": lambda name, given: f"```\n{as_object(name, given, 'input')}\n",
    "json, string": lambda name, given: as_object(name, json.dumps(given)),
}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(list(SHAPES)), any_calls(), st.sampled_from(["", "\n", "Like so.\n\n"]), st.lists(st.integers(0))
)
def test_any_call_in_any_shape_comes_back_as_it_was(shape: str, generated: Any, before: str, cuts: list[int]) -> None:
    tools, wanted = generated
    said = before + "\n".join(SHAPES[shape](*call) for call in wanted)
    events = rescued(*in_pieces(said, cuts), tools=tools)
    assert calls(events) == wanted
    assert text(events) == before
    assert events[-1] == Done("tool_use", 9)


@given(WORDS)
def test_a_value_in_the_line_of_its_tag_keeps_its_blanks(value: str) -> None:
    assume(not value.startswith(("\n", "\r\n")))
    assume(not value.endswith("\n"))
    assert calls(rescued(xml("Bash", {"command": value}, inline=True))) == [("Bash", {"command": value})]


# --- prose


@given(st.lists(TEXTS))
def test_prose_without_a_marker_passes_unchanged_and_at_once(pieces: list[str]) -> None:
    said = "".join(pieces)
    assume(not any(mark in said for mark in ("<", "{", "`")))
    rescue = Rescue(TOOLS)
    for piece in filter(None, pieces):
        assert list(rescue.feed(Text(piece))) == [Text(piece)]


HEAP = [*MARKERS, "Read>", "file_path>", "```", "json", "{", "}", '"name"', ":", "\n", " x"]
HEAP += ['file_path="', '">', "<parameter>", "<required>", "</required>"]


@given(st.lists(st.sampled_from(HEAP)))
def test_no_heap_of_markers_loses_a_character_or_takes_anything_but_a_fitting_call(pieces: list[str]) -> None:
    said = "".join(pieces)
    events = rescued(*pieces)
    if not calls(events):
        assert text(events) == said
    for name, given_input in calls(events):
        assert name == "Read"
        assert set(given_input) == {"file_path"}


@pytest.mark.parametrize(
    ("said", "held"),
    [
        ("a < b", ""),
        ("if (a <", "<"),
        ("see <tool", "<tool"),
        ("see <tools", ""),
        ("see <tool_call> or", ""),
        ("<function=Re", "<function=Re"),
        ("<function=Red", ""),
        ("so <function=Read>", "<function=Read>"),
        ("so <function=Read> is", ""),
        ("<function=Read>\n<parameter=file_path>\n/a", "<function=Read>\n<parameter=file_path>\n/a"),
        ("<function=Read>\n<parameter=colour>", ""),
        ("<function=Read>\n<parameter=file_path is", ""),
        ("<function=Read>\nIt", ""),
        ("<function=Read>\n<requ", "<function=Read>\n<requ"),
        ("<function=Read>\n<name>", ""),
        ('<function=Read>\n<parameter=file_path="/a"', '<function=Read>\n<parameter=file_path="/a"'),
        ('<function=Read>\n<parameter=file_path="/a" b', ""),
        ("Then:\n```js", "```js"),
        ("Then:\n```jsx", ""),
        ("Then:\n```python\n<function=", ""),
        ("Then:\n`", "`"),
        ("Then:\n`x", ""),
        ('{\n  "name": "Re', '{\n  "name": "Re'),
        ('{\n  "name": "my', ""),
        ('{"version', ""),
        ("{\n\n x", ""),
        ("a </tool_call", ""),
        ("x {", ""),
        ("Hello \n\n ", ""),
    ],
)
def test_text_is_held_back_only_while_it_may_become_a_call(said: str, held: str) -> None:
    assert text(told(Rescue(TOOLS), map(Text, said))) == said.removesuffix(held)


def test_text_behind_a_call_ends_the_waiting_at_once() -> None:
    rescue = Rescue(TOOLS)
    said = leak("prose", "explained").rpartition("and the server")[0]
    begin = said.index("<function=")
    assert told(rescue, [Text(said)]) == [Text(said[:begin])]
    assert told(rescue, [Text("and")]) == [Text(said[begin:] + "and")]


# --- among other events


def test_calls_of_the_engine_pass_untouched_and_keep_their_place() -> None:
    native: list[AnswerEvent] = [
        Thinking("<function=Read>"),
        Text("a "),
        ToolCall("Telephone"),
        ToolInput('{"to":'),
        ToolInput(" 1}"),
        Prompt(10, 4),
        Done("tool_use", 9),
    ]
    rescue = Rescue(TOOLS)
    assert told(rescue, native) == native
    assert rescue.repaired == 0


def test_a_leaked_call_in_front_of_one_of_the_engine_is_made_one_too() -> None:
    leaked = Text(xml("Read", {"file_path": "/a"}) + "\n</tool_call>\n")
    rest: list[AnswerEvent] = [ToolCall("Read"), ToolInput('{"file_path": "/b"}')]
    events = told(Rescue(TOOLS), [leaked, *rest, Done("end_turn", 9)])
    assert calls(events) == [("Read", {"file_path": "/a"}), ("Read", {"file_path": "/b"})]
    assert events[-1] == Done("tool_use", 9)
    assert told(Rescue(TOOLS), [leaked, *rest, Done("max_tokens", 9)])[-1] == Done("max_tokens", 9)


def test_a_leaked_call_behind_one_of_the_engine_is_made_one_too() -> None:
    first: list[AnswerEvent] = [ToolCall("Read"), ToolInput('{"file_path": "/b"}')]
    leaked = Text("\n" + xml("Read", {"file_path": "/a"}))
    events = told(Rescue(TOOLS), [*first, leaked, Prompt(3), Done("tool_use", 9)])
    assert events == [*first, Text("\n"), Prompt(3), ToolCall("Read"), ToolInput('{"file_path": "/a"}'), events[-1]]


def test_thinking_in_between_makes_text_of_what_was_held_back() -> None:
    leaked = xml("Read", {"file_path": "/a"})
    events: list[AnswerEvent] = [Text(leaked), Thinking("hm"), Done("end_turn", 9)]
    assert told(Rescue(TOOLS), events) == events
    assert calls(told(Rescue(TOOLS), [Text(leaked), Thinking(""), Done("end_turn", 9)]))


@pytest.mark.parametrize("shape", ["xml, last tags missing", "json, fence not closed"])
def test_a_call_that_a_limit_may_have_cut_short_stays_text(shape: str) -> None:
    said = SHAPES[shape]("Bash", {"command": "rm -r /tmp/a"})
    assert rescued(said, reason="max_tokens") == as_prose(said, "max_tokens")
    assert calls(rescued(said))


def test_a_whole_call_at_the_limit_is_a_call() -> None:
    events = rescued(xml("Read", {"file_path": "/a"}), reason="max_tokens")
    assert calls(events) == [("Read", {"file_path": "/a"})]
    assert events[-1] == Done("tool_use", 9)


def test_without_tools_everything_passes() -> None:
    said = leak("calls", "opening_tag_left_out")
    assert told(Rescue([]), map(Text, said)) == [*map(Text, said)]


def test_the_narrator_tells_a_repaired_answer_as_text_and_tool_use() -> None:
    narrator = Narrator("m")
    said = Text(leak("calls", "text_before_it"))
    events = told(Rescue(TOOLS), [Prompt(5), said, Done("end_turn", 9)])
    message = collect(piece for event in events for piece in narrator.tell(event))
    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
    assert message["content"][1]["input"] == {"file_path": "/srv/app/notes.md"}
    assert message["stop_reason"] == "tool_use"


# --- bounds


def test_a_call_that_is_too_long_is_given_up_and_what_is_in_it_is_no_call_either() -> None:
    said = xml("Write", {"file_path": "/a", "content": "x\n" * 200}) + "\n" + xml("Read", {"file_path": "/a"})
    assert rescued(said, max_held=300) == rescued(*said, max_held=300) == as_prose(said)
    assert calls(rescued(said, max_held=len(said)))
    rescue = Rescue(TOOLS, max_held=300)
    told(rescue, [Text(said[:290])])
    assert text(told(rescue, [Text(said[290:310])])) == said[:310]


@pytest.mark.parametrize(
    "said",
    [
        "<function=Write>\n<parameter=file_path>\n/a\n</parameter>\n<parameter=content>\n" + "x < y\n" * 40_000,
        '{"name": "Write", "arguments": {"content": [' + '{"a": "\\\\"}, ' * 20_000,
        "<tool_call>\n" * 20_000,
        "<tool_call> <t {`\n" * 15_000,
        xml("Write", {"file_path": "/a"}) * 4_000,
    ],
    ids=["value", "json", "openers", "starts", "misfits"],
)
@pytest.mark.parametrize("size", [5, 10**6])
def test_a_quarter_of_a_megabyte_of_what_never_becomes_a_call_costs_no_more_than_reading_it(
    said: str, size: int
) -> None:
    began = time.process_time()
    assert rescued(*(said[at : at + size] for at in range(0, len(said), size)), reason="max_tokens") == as_prose(
        said, "max_tokens"
    )
    assert time.process_time() - began < 10


def steps(said: str) -> int:
    """How many functions are called until it is told."""
    called = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal called
        called += event == "call"

    sys.setprofile(count)
    try:
        events = rescued(said)
    finally:
        sys.setprofile(None)
    assert events == as_prose(said)
    return called


@pytest.mark.parametrize("unit", ["<", "< ", "<t", "<tool_cal ", "</tool_call>", "{", "`x`", '{"nam": '])
def test_a_heap_of_signs_without_a_tag_takes_no_more_steps_than_a_few_of_them(unit: str) -> None:
    assert steps(unit * 30_000) == steps(unit * 30)


@pytest.mark.parametrize(
    "unit", ["<tool_call> ", "<function=Read> ", "{\n", '{"name": 1\n', "```\n", "```json\n{ x\n```\n"]
)
def test_twice_as_many_beginnings_take_twice_as_many_steps(unit: str) -> None:
    assert steps(unit * 2000) <= 2.1 * steps(unit * 1000)


# --- odd schemas


def odd_schemas() -> Iterator[Any]:
    odds: list[Any] = [True, False, None, 3, "object", [], {}]
    for odd in odds:
        for key in (
            "type",
            "properties",
            "required",
            "items",
            "anyOf",
            "allOf",
            "$ref",
            "enum",
            "additionalProperties",
        ):
            yield {key: odd}
            yield {"properties": {"command": {key: odd}}}


def test_no_schema_of_a_client_breaks_it() -> None:
    for schema in odd_schemas():
        for call in ("ls", [1], {"a": 1}):
            said = as_object("Bash", {"command": call})
            events = rescued(said, tools=[{"name": "Bash", "input_schema": schema}])
            assert calls(events) == [("Bash", {"command": call})] or events == as_prose(said)


@pytest.mark.parametrize(
    ("reference", "fits"),
    [
        ("#/$defs/number", False),
        ("#/$defs/text", True),
        ("#/allOf/0/properties/count", False),
        ("#/allOf/7", True),
        ("#/$defs/missing/deeper", True),
        ("#text", True),
        ("https://json-schema.example/text", True),
    ],
)
def test_a_reference_that_leads_nowhere_lets_everything_pass(reference: str, fits: bool) -> None:
    number = {"type": "integer"}
    schema = {
        "properties": {"v": {"$ref": reference}},
        "allOf": [{"properties": {"count": number}}],
        "$defs": {"text": TEXT, "number": number},
    }
    said = xml("T", {"v": "much"})
    events = rescued(said, tools=[{"name": "T", "input_schema": schema}])
    assert events == as_prose(said) if not fits else calls(events) == [("T", {"v": "much"})]


def test_a_schema_that_goes_round_in_circles_fits_nothing() -> None:
    said = as_object("Bash", {})
    assert rescued(said, tools=[{"name": "Bash", "input_schema": {"$ref": "#"}}]) == as_prose(said)


def test_json_that_is_nested_too_deep_is_text() -> None:
    said = '{"name": "Bash", "arguments": {"command": ' + "[" * 100_000 + "]" * 100_000 + "}}"
    assert rescued(said, tools=[{"name": "Bash", "input_schema": {}}]) == as_prose(said)


def test_a_text_that_may_stay_text_does() -> None:
    schema = {"properties": {"v": {"anyOf": [{"type": "integer"}, TEXT]}, "w": {}}}
    events = rescued(xml("T", {"v": 3, "w": "true"}), tools=[{"name": "T", "input_schema": schema}])
    assert calls(events) == [("T", {"v": "3", "w": "true"})]
