"""What fits a schema, and how little it takes to tell."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from selfhost_cli.proxy.fit import Misfit, fits, fitting

OPERATORS = ("neg", "not", "abs")


def recurring(schema: dict[str, Any]) -> dict[str, Any]:
    """What refers to #/$defs/it is this schema."""
    return {"$ref": "#/$defs/it", "$defs": {"it": schema}}


IT = {"$ref": "#/$defs/it"}
OF_IT = [{"type": "object", "properties": {"arg": IT, "op": {"const": name}}, "required": ["op"]} for name in OPERATORS]
ANY = recurring({"anyOf": [{"type": "number"}, *OF_IT]})
ALL = recurring({"allOf": [{"properties": {"arg": IT}}] * 2})


def expression(depth: int, innermost: object) -> Any:
    """Of the last operator, which is not known before its argument was read."""
    made = innermost
    for _ in range(depth):
        made = {"arg": made, "op": "abs"}
    return made


def steps(value: Any, schema: Any) -> int:
    """How many functions are called until it is known."""
    called = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal called
        called += event == "call"

    sys.setprofile(count)
    try:
        fits(value, schema)
        fitting(value, schema)
    except Misfit:
        pass
    finally:
        sys.setprofile(None)
    return called


@pytest.mark.parametrize("innermost", [7, "7", "seven"])
@pytest.mark.parametrize("schema", [ANY, ALL], ids=["any of", "all of"])
def test_twice_as_deep_an_answer_to_a_recursive_schema_takes_twice_as_many_steps(
    schema: Any, innermost: object
) -> None:
    assert steps(expression(8, innermost), schema) <= 2.2 * steps(expression(4, innermost), schema)


def test_a_recursive_schema_is_kept_to() -> None:
    assert fits(expression(10, 7), ANY)
    assert not fits(expression(10, "7"), ANY)
    assert not fits({"arg": expression(10, 7), "op": "sum"}, ANY)
    assert fitting(expression(10, "7"), ANY) == expression(10, 7)
    with pytest.raises(Misfit):
        fitting(expression(10, "seven"), ANY)


@pytest.mark.parametrize("last", [99, -1], ids=["fits", "does not"])
def test_twice_as_long_a_list_of_a_twice_as_long_enum_takes_twice_as_many_steps(last: int) -> None:
    def long(size: int) -> int:
        return steps([*range(size), last], {"items": {"enum": list(range(size))}})

    assert long(200) <= 2.2 * long(100)


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        (1.0, {"enum": [1, 0.5]}, True),
        (1, {"const": 1.0}, True),
        ({"a": [2.0]}, {"const": {"a": [2]}}, True),
        (0.5, {"enum": [1, 0.5]}, True),
        (True, {"enum": [1]}, False),
        (1, {"const": True}, False),
        ("1", {"const": 1}, False),
        (2, {"enum": [1, 0.5]}, False),
        (3.0, {"type": "integer"}, True),
        (3.5, {"type": "integer"}, False),
        (True, {"type": "integer"}, False),
        (float("inf"), {"type": "integer"}, False),
        (float("inf"), {"const": 1}, False),
    ],
)
def test_a_number_is_its_value_however_it_is_written(value: object, schema: Any, expected: bool) -> None:
    assert fits(value, schema) is expected
