"""Calls of tools as a grammar: from the JSON Schemas of their parameters to Lark, in the syntax of `iolite.text.calls`.

    call:NAME{key:value,…}     keys bare and in the order in which the template writes them; strings raw, between two
                               quote tokens; numbers, true, false and null as in JSON; no blanks

What a schema leaves open is closed where the model would only lose its way: an object with properties takes no others
unless it says so. What no grammar can say (uniqueItems, not, if, …) is left out, and refused for a tool that is strict.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import regex_to_lark

from iolite.errors import UsageError
from iolite.text.calls import MAX_HEADER

Schema = Mapping[str, Any]

DEPTH = 8  # of objects and arrays of which the schema says nothing
MOST_REFERENCES = 60  # one in another, before a schema is taken to go round in circles
MOST_STEPS = 500_000  # keywords that are looked at for all tools together: 512 tools of 40 arguments take a fifth
_QUOTE = '<|"|>'
_NAME = re.compile(r"[\w.-]([\w.:-]*[\w.-])?")  # what the reader of calls takes for one
_BARE_KEY = re.compile(r"[^\s:=,{}()\[\]\"'`<>](?:[^:=,{}()\[\]\"'`<>\r\n]*[^\s:=,{}()\[\]\"'`<>])?")
_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
_LEFT_OUT = (
    "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "contains", "minContains",
    "maxContains", "uniqueItems", "propertyNames", "minProperties", "maxProperties", "unevaluatedProperties",
    "unevaluatedItems",
)  # fmt: skip
_RANGE = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_FORMATS = {
    "date": r"/[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])/",
    "time": r"/([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])/",
    "uuid": r"/[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}/",
}
_FORMATS["date-time"] = _FORMATS["date"] + ' "T" ' + _FORMATS["time"]
_TERMINALS = r"""
TEXT: /(?s:.*)/
KEY: /[A-Za-z_][A-Za-z0-9_-]{0,63}/
INTEGER: /-?(0|[1-9][0-9]{0,17})/
NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,2})?/
"""


@dataclass(frozen=True)
class Chosen:
    """The tools that an answer may call: None of them, any, or that it must; and whether one call is all."""

    tools: tuple[Mapping[str, Any], ...] = ()  # their inner objects
    required: bool = False
    one: bool = False


def chosen_tools(tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None) -> Chosen:
    """What tool_choice makes of tools. UsageError for a choice that is not one."""
    functions = [tool.get("function", tool) for tool in tools or ()]
    if choice is None or choice == "auto":
        return Chosen(tuple(functions))
    if choice == "none":
        return Chosen()
    if choice == "required":
        if not functions:
            raise UsageError('tool_choice is "required" and there are no tools', "name some in tools")
        return Chosen(tuple(functions), required=True)
    name = _named(choice)
    if name is None:
        raise UsageError(
            f"tool_choice is {choice!r}",
            'there are "none", "auto", "required" and {"type": "function", "function": {"name": "…"}}',
        )
    found = [function for function in functions if function["name"] == name]
    if not found:
        known = ", ".join(function["name"] for function in functions)
        raise UsageError(f"tool_choice names {name!r}, which is no tool", f"there are {known}" if known else None)
    return Chosen((found[-1],), required=True, one=True)


def _named(choice: Any) -> str | None:
    if not isinstance(choice, Mapping) or choice.get("type", "function") != "function":
        return None
    name = choice.get("function", choice)
    name = name.get("name") if isinstance(name, Mapping) else None
    return name if isinstance(name, str) else None


def call_grammar(tools: Sequence[Mapping[str, Any]], accepts: Callable[[str], bool]) -> str:
    """A Lark grammar of one call of any of these functions, without the tokens around it.

    accepts: whether a terminal's definition can be compiled. Raises UsageError for a schema that is no schema, for
    one that nothing fulfils, and for a strict tool with keywords that are left out.
    """
    rules = _Rules(accepts)
    calls = []
    for function in tools:
        name = function["name"]
        if not _NAME.fullmatch(name) or len(name) > MAX_HEADER - 8:
            raise UsageError(f"no call can name the tool {name!r}", "use letters, digits, _ and -")
        parameters = function.get("parameters")
        if parameters is None:
            parameters = {"type": "object", "properties": {}}
        try:
            arguments = _Tool(rules, parameters, bool(function.get("strict"))).arguments()
        except (_WrongError, _ImpossibleError) as error:
            raise UsageError(f"the parameters of the tool {name!r} cannot be used: {error}") from None
        except (TypeError, ValueError, AttributeError, RecursionError):
            raise UsageError(f"the parameters of the tool {name!r} are no JSON Schema") from None
        calls.append(f"{_text('call:' + name)} {arguments}")
    return "\n".join([f"start: {' | '.join(calls)}", *rules.lines, _TERMINALS])


class _WrongError(Exception):
    """A schema that is none, or that a strict tool cannot keep to."""


class _ImpossibleError(Exception):
    """A schema that nothing fulfils. A choice or an argument that need not be there is then left out."""


class _Rules:
    """The rules of a grammar, each of which has a name."""

    def __init__(self, accepts: Callable[[str], bool]) -> None:
        self.accepts = accepts
        self.lines: list[str] = []
        self._names: dict[str, str] = {}
        self._steps = 0

    def step(self, keywords: int) -> None:
        """Counts work: references to what refers to others twice, and those again, would take until tomorrow."""
        self._steps += 1 + keywords
        if self._steps > MOST_STEPS:
            raise _WrongError("what it refers to, followed to its end, is too much")

    def rule(self, body: str) -> str:
        """The name of a rule with that body."""
        return self._add(body, "r")

    def terminal(self, body: str) -> str:
        return self._add(body, "T")

    def name(self) -> str:
        """A name for a rule that is to be defined."""
        self._names[f"#{len(self._names)}"] = ""
        return f"r{len(self._names)}"

    def define(self, name: str, body: str) -> None:
        self.lines.append(f"{name}: {body}")

    def _add(self, body: str, prefix: str) -> str:
        if body not in self._names:
            self._names[body] = f"{prefix}{len(self._names) + 1}"
            self.define(self._names[body], body)
        return self._names[body]

    def anything(self, depth: int = DEPTH) -> str:
        """Any value, down to a depth."""
        simple = f'{_QUOTE} TEXT {_QUOTE} | NUMBER | "true" | "false" | "null"'
        if depth == 0:
            return self.rule(simple)
        inner = self.anything(depth - 1)
        return self.rule(f"{simple} | {self.array([], inner, 0, None)} | {self.open_object(inner)}")

    def array(self, first: Sequence[str], rest: str | None, least: int, most: int | None) -> str:
        """first: of the values at the beginning; rest: of all others, None: there are no others."""
        most = len(first) if rest is None else most
        bodies = ['"[]"'] if least == 0 else []
        if most is None or most > 0:
            bodies.append(f'"[" {self._items(first, rest, least, most)} "]"')
        return self.rule(" | ".join(bodies))

    def _items(self, first: Sequence[str], rest: str | None, least: int, most: int | None) -> str:
        """One value at least."""
        values = list(first[:most]) or [str(rest)]
        tail = ""
        if rest is not None:
            beyond = "" if most is None else str(most - len(values))
            tail = f'("," {rest}){{{max(0, least - len(values))},{beyond}}}' if beyond != "0" else ""
        for at in range(len(values) - 1, 0, -1):
            tail = f'"," {values[at]} {tail}'
            tail = tail if at < least else f"({tail})?"
        return f"{values[0]} {tail}"

    def open_object(self, value: str, keys: str = "KEY") -> str:
        """Any keys of the terminal, all with such values."""
        pair = self.rule(f'({keys} | {_QUOTE} TEXT {_QUOTE}) ":" {value}')
        return self.rule(f'"{{}}" | "{{" {pair} ("," {pair})* "}}"')


class _Tool:
    """One tool's schema on its way into the rules."""

    def __init__(self, rules: _Rules, root: Any, strict: bool) -> None:
        self.rules, self.root, self.strict = rules, root, strict
        self._references: dict[str, str] = {}
        self._following = 0

    def arguments(self) -> str:
        """The name of a rule of the arguments, braces included. They are an object, whatever the schema allows."""
        return self.value({"type": "object", "allOf": [self.root]} if self.root != {} else {"type": "object"})

    def value(self, schema: Any) -> str:
        """The name of a rule of the values that a schema describes."""
        if schema is True or schema == {}:
            return self.rules.anything()
        if not isinstance(schema, Mapping):
            raise (
                _ImpossibleError("no value fulfils it") if schema is False else _WrongError(f"{schema!r} is no schema")
            )
        self.rules.step(len(schema))
        reference = schema.get("$ref")
        if isinstance(reference, str) and not set(schema) & {*_ASKS, "allOf", "anyOf", "oneOf"}:
            return self._reference(reference)
        schema = self._flat(schema)
        choices = schema.get("anyOf") or schema.get("oneOf")
        if not choices:
            return self._plain(schema)
        if "oneOf" in schema:
            self._left_out("oneOf")  # that only one fits: the grammar takes any
        base = {key: value for key, value in schema.items() if key in _ASKS}
        if not base:  # then a choice may be a reference that leads back here
            return self._any(self.value, choices)
        return self._any(lambda choice: self.value(self._merged(base, self._flat(choice))), choices)

    def _any(self, make: Callable[[Any], str], choices: Sequence[Any]) -> str:
        """A rule of all choices that are possible."""
        found, error = [], _ImpossibleError("it has no choices")
        for choice in choices:
            try:
                found.append(make(choice))
            except _ImpossibleError as reason:
                error = reason
        if not found:
            raise error
        return self.rules.rule(" | ".join(dict.fromkeys(found)))

    def _reference(self, reference: str) -> str:
        """A rule of its own, which may lead back to itself."""
        if reference not in self._references:
            self._references[reference] = name = self.rules.name()
            self.rules.define(name, self.value(self._target(reference)))
        return self._references[reference]

    def _target(self, reference: str) -> Any:
        found = self.root
        for step in reference.removeprefix("#").split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            elif isinstance(found, Mapping) and step in found:
                found = found[step]
            else:
                found = None
        if not reference.startswith("#") or found is None:
            raise _WrongError(f"it refers to {reference!r}, which is not in it")
        return found

    def _flat(self, schema: Any) -> dict[str, Any]:
        """A schema without $ref and allOf."""
        if schema is True:
            return {}
        if not isinstance(schema, Mapping):
            raise (
                _ImpossibleError("no value fulfils it") if schema is False else _WrongError(f"{schema!r} is no schema")
            )
        self.rules.step(len(schema))
        found = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
        parts = list(schema.get("allOf") or ())
        if isinstance(schema.get("$ref"), str):
            parts.append(self._target(schema["$ref"]))
        self._following += 1
        try:
            if self._following > MOST_REFERENCES:
                raise _WrongError("it refers to itself without end")
            for part in parts:
                found = self._merged(found, self._flat(part))
        finally:
            self._following -= 1
        return found

    def _merged(self, one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
        """A schema of what fulfils both."""
        found = dict(one)
        for key, value in two.items():
            if key not in found or found[key] == value:
                found[key] = value
            elif key == "properties":
                own = found[key]
                self.rules.step(len(own) + len(value))
                found[key] = {**own, **{k: {"allOf": [own[k], v]} if k in own else v for k, v in value.items()}}
            elif key == "required":
                found[key] = list(dict.fromkeys([*found[key], *value]))
            elif key == "type":
                both = [kind for kind in _types(one) if kind in _types(two)]
                both += ["integer"] * ({"integer", "number"} <= {*_types(one), *_types(two)} and "integer" not in both)
                found[key] = both
            elif key == "enum":
                found[key] = [item for item in found[key] if item in value]
            elif key.startswith(("min", "exclusiveMin")):
                found[key] = max(found[key], value)
            elif key.startswith(("max", "exclusiveMax")):
                found[key] = min(found[key], value)
            elif key == "additionalProperties":
                found[key] = False if False in (found[key], value) else value
            elif key not in ("title", "description", "default", "examples", "$schema", "$id"):
                self._left_out(key)
        return found

    def _left_out(self, key: str) -> None:
        if self.strict:
            raise _WrongError(f"it is strict, and {key!r} cannot be kept to while a call is written")

    def _plain(self, schema: Mapping[str, Any]) -> str:
        for key in _LEFT_OUT:
            if key in schema:
                self._left_out(key)
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            kinds = _types(schema) if "type" in schema else list(_TYPES)
            return self._any(self.rules.rule, [_literal(value) for value in values if set(_kinds(value)) & set(kinds)])
        kinds = _types(schema)
        if not kinds:
            return self.rules.anything()
        return self._any(lambda kind: self._of_type(kind, schema), kinds)

    def _of_type(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind == "string":
            return self.rules.rule(f"{_QUOTE} {self._string(schema)} {_QUOTE}")
        if kind in ("integer", "number"):
            limits = {key: schema[key] for key in _RANGE if key in schema}
            if not limits:
                return self.rules.rule(kind.upper())
            numbers = {"type": kind, **limits, "x-guidance": {"whitespace_flexible": False}}
            return self.rules.rule(f"%json {json.dumps(numbers)}")
        if kind == "array":
            return self._array(schema)
        if kind == "object":
            return self._object(schema)
        if kind in ("boolean", "null"):
            return self.rules.rule('"true" | "false"' if kind == "boolean" else '"null"')
        raise _WrongError(f"there is no type {kind!r}")

    def _string(self, schema: Mapping[str, Any]) -> str:
        """The terminal of a raw string."""
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        conditions = [f"/(?s:.{{{least},{most}}})/"] if least or most != "" else []
        if isinstance(schema.get("pattern"), str):
            pattern = _searched(schema["pattern"])
            if self.rules.accepts(pattern):
                conditions.append(pattern)
            else:
                self._left_out("pattern")
        elif schema.get("format") in _FORMATS:
            conditions.append(f"({_FORMATS[schema['format']]})")
        return self.rules.terminal(" & ".join(conditions)) if conditions else "TEXT"

    def _array(self, schema: Mapping[str, Any]) -> str:
        first = [self.value(item) for item in schema.get("prefixItems") or ()]
        items, least, most = schema.get("items", True), schema.get("minItems", 0), schema.get("maxItems")
        rest = (
            None if items is False or (first and "items" not in schema and least <= len(first)) else self.value(items)
        )
        if (most is not None and least > most) or (rest is None and least > len(first)):
            raise _ImpossibleError("it asks for more items than it allows")
        return self.rules.array(first if most is None else first[:most], rest, least, most)

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties, required = schema.get("properties") or {}, schema.get("required") or ()
        others = schema.get("additionalProperties", not ("properties" in schema or "patternProperties" in schema))
        undeclared = [key for key in required if key not in properties]
        if undeclared and others is False and "additionalProperties" in schema:
            raise _ImpossibleError(f"it requires {undeclared[0]!r} and forbids it")
        known = {**properties, **dict.fromkeys(undeclared, True if others is False else others)}
        pairs = []  # in the order in which the template sorts
        for key in sorted(known, key=lambda key: (key.lower(), key)):
            try:
                pairs.append((f"{_key(key)} {self.value(known[key])}", key in required))
            except _ImpossibleError:
                if key in required:
                    raise
        if not pairs and others is not False:
            return self.rules.open_object(self.value(others))
        return self._pairs(pairs, None if others is False else self._other(known, self.value(others)))

    def _other(self, known: Mapping[str, Any], value: str) -> str:
        """A pair whose key is none of those that are known."""
        names = " | ".join(_text(key) for key in known)
        return self.rules.rule(f'{self.rules.terminal(f"KEY & ~({names})")} ":" {value}')

    def _pairs(self, pairs: Sequence[tuple[str, bool]], other: str | None) -> str:
        """An object of pairs in this order, some required, then of others."""
        after = self.rules.rule(f'("," {other})*' if other else '""')
        begin = self.rules.rule(f'"" | {other} {after}' if other else '""')
        for pair, required in reversed(pairs):
            begin = self.rules.rule(f"{pair} {after}" + ("" if required else f" | {begin}"))
            after = self.rules.rule(f'"," {pair} {after}' + ("" if required else f" | {after}"))
        return self.rules.rule(f'"{{" {begin} "}}"')


_TYPES_OF = {
    "properties": "object", "required": "object", "additionalProperties": "object", "patternProperties": "object",
    "items": "array", "prefixItems": "array", "minItems": "array", "maxItems": "array", "minLength": "string",
    "maxLength": "string", "pattern": "string", "format": "string", "type": "",
} | dict.fromkeys(_RANGE, "number")  # fmt: skip
_ASKS = {*_TYPES_OF, *_LEFT_OUT, "enum", "const", "nullable"}


def _types(schema: Mapping[str, Any]) -> list[str]:
    """The types that a schema names, or that its other keywords are about; none: it says nothing of them."""
    named = schema.get("type")
    found = [kind.lower() for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str)]
    if not found and named is None:
        found = [kind for key, kind in _TYPES_OF.items() if key in schema and kind][:1]
    if "number" in found:
        found = [kind for kind in found if kind != "integer"]
    if found and schema.get("nullable") is True and "null" not in found:
        found.append("null")
    return found


def _kinds(value: Any) -> tuple[str, ...]:
    """The types that a value is of."""
    if isinstance(value, bool) or value is None:
        return ("null" if value is None else "boolean",)
    if isinstance(value, int | float):
        return ("number", "integer") if float(value).is_integer() else ("number",)
    return ("string",) if isinstance(value, str) else ("array",) if isinstance(value, list) else ("object",)


def _literal(value: Any) -> str:
    """The expression of one value."""
    if isinstance(value, str):
        return f"{_QUOTE} {_text(value)} {_QUOTE}"
    if isinstance(value, list):
        return ' "," '.join([_literal(item) for item in value]).join(('"[" ', ' "]"')) if value else '"[]"'
    if isinstance(value, Mapping):
        keys = sorted(value, key=lambda key: (key.lower(), key))
        return ' "," '.join([f"{_key(key)} {_literal(value[key])}" for key in keys]).join(('"{" ', ' "}"'))
    return _text(json.dumps(value))


def _key(key: str) -> str:
    return _text(key + ":") if _BARE_KEY.fullmatch(key) else f'{_QUOTE} {_text(key)} {_QUOTE} ":"'


def _text(text: str) -> str:
    """A string of Lark's."""
    return json.dumps(text).replace("\x7f", "\\u007f")


def _searched(pattern: str) -> str:
    """The terminal of texts in which a pattern is found somewhere, as JSON Schema means it."""
    choices = []
    for choice in _choices(pattern):
        begin = "" if choice.startswith("^") else "(?s:.*)"
        whole = choice.endswith("$") and (len(choice) - len(choice[:-1].rstrip("\\"))) % 2 == 1
        choices.append(f"{begin}(?:{choice.removeprefix('^')[: -1 if whole else None]}){'' if whole else '(?s:.*)'}")
    return f"/{regex_to_lark('|'.join(choices), 'dw')}/"


def _choices(pattern: str) -> list[str]:
    """A pattern cut at the bars that stand in no brackets."""
    found, depth, in_class, at = [""], 0, False, 0
    while at < len(pattern):
        step = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        in_class = step == "[" or (in_class and step != "]")
        if not in_class:
            depth += (step == "(") - (step == ")")
        if step == "|" and depth == 0 and not in_class:
            found.append("")
        else:
            found[-1] += step
        at += len(step)
    return found
