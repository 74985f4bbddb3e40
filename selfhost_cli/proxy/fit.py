"""Whether a value fits a JSON schema, and the types that it wants: of calls' arguments, and of answers.

What it does not know of JSON Schema it lets pass, because the client checks again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from operator import is_
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
    """One schema, with its definitions. Nothing is tried twice: a schema that recurs would have it done without end."""

    def __init__(self, root: Any) -> None:
        self._root = root
        # with the value, so that its id does not become another's
        self._tried: dict[tuple[int, int, bool], tuple[Any, Any, bool]] = {}
        self._allowed: dict[int, set[str]] = {}

    def fit(self, value: Any, schema: Any, *, coerce: bool = True) -> Any:
        """The value in the type that is wanted, itself where it has it: text may be the JSON of one. Raises Misfit."""
        if not isinstance(schema, dict):
            return _refuse() if schema is False else value
        key = id(value), id(schema), coerce
        if key not in self._tried:
            try:
                self._tried[key] = value, self._fitted(value, schema, coerce=coerce), True
            except Misfit:
                self._tried[key] = value, None, False
        _, fitted, good = self._tried[key]
        return fitted if good else _refuse()

    def _fitted(self, value: Any, schema: Json, *, coerce: bool) -> Any:
        if isinstance(reference := schema.get("$ref"), str):
            value = self.fit(value, self._definition(reference), coerce=coerce)
        for part in _array(schema.get("allOf")):
            value = self.fit(value, part, coerce=coerce)
        for choice in ("anyOf", "oneOf"):
            if options := _array(schema.get(choice)):
                value = self._one_of(value, options, coerce=coerce)
        if types := [kind for kind in _array(schema.get("type")) if isinstance(kind, str) and kind in _IS]:
            value = _typed(value, types, coerce=coerce)
        if allowed := self._allowed_by(schema):
            value = _listed(value, allowed, coerce=coerce and not types)
        if isinstance(value, dict):
            return self._object(value, schema, coerce=coerce)
        if isinstance(value, list) and "items" in schema:
            items = [self.fit(item, schema["items"], coerce=coerce) for item in value]
            return value if all(map(is_, items, value)) else items
        return value

    def _allowed_by(self, schema: Json) -> set[str]:
        """What `const` or `enum` allow, as JSON; empty without one."""
        if id(schema) not in self._allowed:
            allowed = [schema["const"]] if "const" in schema else _array(schema.get("enum"))
            self._allowed[id(schema)] = set(map(_json, allowed))
        return self._allowed[id(schema)]

    def _object(self, value: Json, schema: Json, *, coerce: bool) -> Json:
        properties = _object(schema.get("properties"))
        others = None if "patternProperties" in schema else schema.get("additionalProperties")
        if any(key not in value for key in _array(schema.get("required")) if isinstance(key, str)):
            _refuse()
        parts = {key: self.fit(part, properties.get(key, others), coerce=coerce) for key, part in value.items()}
        return value if all(map(is_, parts.values(), value.values())) else parts

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
    "integer": lambda value: _IS["number"](value) and isinstance(_whole(value), int),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
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


def _listed(value: Any, allowed: set[str], *, coerce: bool) -> Any:
    if _json(value) not in allowed:
        return _listed(_from_text(value), allowed, coerce=False) if coerce else _refuse()
    return value


def _json(value: Any) -> str:
    """The same for what is equal in JSON: to Python true is 1."""
    return json.dumps(_whole(value), sort_keys=True)


def _whole(value: Any) -> Any:
    """With 1 for 1.0."""
    match value:
        case float():
            return int(value) if value.is_integer() else value
        case dict():
            return {key: _whole(part) for key, part in value.items()}
        case list():
            return [_whole(part) for part in value]
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


def _object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _array(value: Any) -> list[Any]:
    """A lone type stands for a list of it."""
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []
