"""Whether a value fits a JSON schema, and the types that it wants: of calls' arguments, and of answers.

What it does not know of JSON Schema it lets pass, because the client checks again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from selfhost_cli.proxy.contract import Json


class Misfit(ValueError):
    """It does not fit."""


def fits(value: Any, schema: Any) -> bool:
    """As it is."""
    try:
        _Fit(schema).fit(value, schema, coerce=False)
    except (Misfit, RecursionError):
        return False
    return True


def fitting(value: Any, schema: Any) -> Json:
    """An object in the types that the schema wants: text may be the JSON of one. Raises Misfit."""
    try:
        fitted = _Fit(schema).fit(_typed(value, ["object"], coerce=True), schema)
    except RecursionError:  # nested deeper than anything that is meant
        _refuse()
    return fitted if isinstance(fitted, dict) else _refuse()


def parse(text: str) -> Any:
    """JSON as models write it: line breaks in strings are forgiven. Raises Misfit, also for what has two meanings."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_distinct)
    except RecursionError:
        _refuse()
    except ValueError as error:
        raise Misfit from error


def properties(schema: Any) -> Json:
    """Those that the schema names."""
    return _object(_object(schema).get("properties"))


def shut_out(key: str, schema: Any) -> bool:
    """The schema knows no such key, and wants no others."""
    if not isinstance(schema, dict) or schema.get("additionalProperties") is not False or "patternProperties" in schema:
        return False
    return key not in properties(schema)


class _Fit:
    """One schema, with its definitions."""

    def __init__(self, root: Any) -> None:
        self._root = root

    def fit(self, value: Any, schema: Any, *, coerce: bool = True) -> Any:
        """The value in the type that is wanted: text may be the JSON of one. Raises Misfit."""
        if not isinstance(schema, dict):
            return _refuse() if schema is False else value
        if isinstance(reference := schema.get("$ref"), str):
            value = self.fit(value, self._definition(reference), coerce=coerce)
        for part in _array(schema.get("allOf")):
            value = self.fit(value, part, coerce=coerce)
        for choice in ("anyOf", "oneOf"):
            if options := _array(schema.get(choice)):
                value = self._one_of(value, options, coerce=coerce)
        if types := [kind for kind in _array(schema.get("type")) if isinstance(kind, str) and kind in _IS]:
            value = _typed(value, types, coerce=coerce)
        allowed = [schema["const"]] if "const" in schema else _array(schema.get("enum"))
        if allowed:
            value = _listed(value, allowed, coerce=coerce and not types)
        if isinstance(value, dict):
            return self._object(value, schema, coerce=coerce)
        if isinstance(value, list) and "items" in schema:
            return [self.fit(item, schema["items"], coerce=coerce) for item in value]
        return value

    def _object(self, value: Json, schema: Json, *, coerce: bool) -> Json:
        properties = _object(schema.get("properties"))
        others = None if "patternProperties" in schema else schema.get("additionalProperties")
        if any(key not in value for key in _array(schema.get("required")) if isinstance(key, str)):
            _refuse()
        return {key: self.fit(part, properties.get(key, others), coerce=coerce) for key, part in value.items()}

    def _one_of(self, value: Any, options: list[Any], *, coerce: bool) -> Any:
        """As it is, when one of them takes it so: a text that may stay text does."""
        for coerced in (False, True) if coerce else (False,):
            for option in options:
                try:
                    return self.fit(value, option, coerce=coerced)
                except Misfit:
                    continue
        return _refuse()

    def _definition(self, reference: str) -> Any:
        """A reference that leads nowhere, or out of the schema, lets everything pass."""
        start, *steps = reference.split("/")
        found: Any = self._root if start == "#" else True
        for step in steps:
            parts = {str(index): part for index, part in enumerate(found)} if isinstance(found, list) else found
            found = _object(parts).get(step.replace("~1", "/").replace("~0", "~"), True)
        return found


_IS: dict[Any, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _number(value) and value == int(value),
    "number": lambda value: _number(value),
    "null": lambda value: value is None,
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
}
_WORDS: Json = {"true": True, "false": False, "null": None, "none": None}


def _typed(value: Any, types: list[Any], *, coerce: bool) -> Any:
    if not any(_IS[kind](value) for kind in types) and coerce:
        value = _from_text(value)
    for kind in types:
        if _IS[kind](value):
            return int(value) if kind == "integer" else value
    return _refuse()


def _listed(value: Any, allowed: list[Any], *, coerce: bool) -> Any:
    # by their JSON, because to Python true is 1
    listed = {json.dumps(one, sort_keys=True) for one in allowed}
    if json.dumps(value, sort_keys=True) not in listed:
        return _listed(_from_text(value), allowed, coerce=False) if coerce else _refuse()
    return value


def _from_text(value: Any) -> Any:
    """What the text says: JSON, or a word as Python writes it, because chat templates print it so."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    return _WORDS[word] if word in _WORDS else parse(value)


def _distinct(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _refuse()


def _finite(digits: str) -> float:
    return found if math.isfinite(found := float(digits)) else _refuse()


def _refuse(_: object = None) -> NoReturn:
    raise Misfit


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _array(value: Any) -> list[Any]:
    """A lone type stands for a list of it."""
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []
