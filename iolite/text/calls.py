"""The grammar of a tool call: `call:NAME{key:value,...}`, read character by character, coerced by the tool's schema.

    value = string | number | true | false | null | [value,...] | {key:value,...}

Strings come from outside as a whole, since they stand between two tokens and are literal. Everything else is read
leniently, because models drift: `key=value`, JSON's own quotes, `NAME(...)`, keys with spaces, words without quotes.
Nothing here raises: a call that cannot be read has an `error` and must not be run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Schema = Mapping[str, Any]

MAX_DEPTH = 64  # of nested arrays and objects
MAX_HEADER = 256  # characters before the arguments

_HEADER = re.compile(r"\s*(?:call\s*:|:)?\s*([\w.-](?:[\w.:-]*[\w.-])?)\s*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_CLOSERS = {"{": "}", "[": "]", "(": ")"}


class Bare(str):
    """A value that was written without quotes and is not yet known to be a number, a word or a text."""


@dataclass
class _Frame:
    """An object or array that is being read."""

    container: dict[str, Any] | list[Any]
    closer: str
    key: str = ""


class CallReader:
    """Reads one call. `name` is None until it is known, `arguments` grows by one key at a time."""

    def __init__(self, schemas: Mapping[str, Schema]) -> None:
        self.name: str | None = None
        self.arguments: dict[str, Any] = {}
        self.error: str | None = None
        self._schemas = schemas
        self._stack: list[_Frame] = []
        self._buffer = ""
        self._quote = ""
        self._fragments: list[str] = []
        self._state: Callable[[str], None] = self._in_header
        self._after_quote: Callable[[str], None] = self._end_value

    def text(self, text: str) -> None:
        """Takes what stands outside strings."""
        for character in text:
            self._state(character)

    def string(self, value: str) -> None:
        """Takes a whole literal string."""
        if self._state in (self._in_header, self._in_quotes):
            self._buffer += value
        elif self._state == self._in_key and not self._buffer.strip():
            self._end_quoted_key(value)
        elif self._state == self._at_value:
            self._end_value(value)
        else:
            self._fail("a string stands where none belongs")

    def take_fragment(self) -> str:
        """The JSON text of the arguments that has become certain since the last time."""
        fragment = "".join(self._fragments)
        self._fragments.clear()
        return fragment

    def end(self, closed: bool) -> None:
        """No more is to come. closed: the call was ended on purpose, and not cut off."""
        if self.error is None and not closed:
            self._fail("the call was cut off before its end")
        elif self._state == self._in_header:
            self._open_arguments("")
        elif self._state != self._done:
            self._fail("the arguments end before they are closed")
        self.name = self.name or ""

    # ---- states: each takes one character ----

    def _in_header(self, character: str) -> None:
        if character in "{(":
            self._open_arguments(character)
        elif len(self._buffer) >= MAX_HEADER:
            self._fail("the call does not begin with call:NAME{")
        else:
            self._buffer += character

    def _in_key(self, character: str) -> None:
        blank = not self._buffer.strip()
        if character in ":=" and not blank:
            self._frame.key = self._buffer.strip()
            self._buffer, self._state = "", self._at_value
        elif character == self._frame.closer and blank:
            self._close()
        elif character == "{" and blank and self._frame.closer == ")":
            self._frame.closer = "}"  # NAME({...}); what closes the parenthesis is let pass after the end
        elif character in "\"'`" and blank:
            self._begin_quotes(character, self._end_quoted_key)
        elif character in ",:=}" and not (blank and character == ","):
            self._fail(f"the argument {self._buffer.strip()[:80]!r} has no value")
        else:
            self._buffer = "" if blank and character == "," else self._buffer + character

    def _at_separator(self, character: str) -> None:
        if character in ":=":
            self._state = self._at_value
        elif not character.isspace():
            self._fail(f"no colon after the key {self._frame.key[:80]!r}")

    def _at_value(self, character: str) -> None:
        in_list = isinstance(self._frame.container, list)
        if character in "{[":
            self._open(character)
        elif character in "\"'`":
            self._begin_quotes(character, self._end_value)
        elif in_list and character == "]":
            self._close()
        elif character == self._frame.closer or (character == "," and not in_list):
            self._fail(f"the argument {self._frame.key[:80]!r} has no value")
        elif not character.isspace() and character != ",":
            self._buffer, self._state = character, self._in_bare

    def _in_bare(self, character: str) -> None:
        if character == "," or character == self._frame.closer:
            self._end_value(Bare(self._buffer.strip()))
            self._state(character)
        else:
            self._buffer += character

    def _in_quotes(self, character: str) -> None:
        if character == self._quote and (len(self._buffer) - len(self._buffer.rstrip("\\"))) % 2 == 0:
            self._after_quote(_unescape(self._buffer, self._quote))
        else:
            self._buffer += character

    def _after_value(self, character: str) -> None:
        if character == ",":
            self._state = self._at_value if isinstance(self._frame.container, list) else self._in_key
            self._buffer = ""
        elif character == self._frame.closer:
            self._close()
        elif not character.isspace():
            self._fail(f"{character!r} stands where a comma or {self._frame.closer!r} belongs")

    def _done(self, character: str) -> None:
        if not character.isspace() and character not in ")}":
            self._fail("more text follows after the arguments")

    def _failed(self, character: str) -> None:
        """Whatever follows an error says nothing."""

    # ---- steps between them ----

    @property
    def _frame(self) -> _Frame:
        return self._stack[-1]

    def _fail(self, error: str) -> None:
        self.error = self.error or error
        self._state = self._failed

    def _open_arguments(self, opener: str) -> None:
        """opener: "{", "(", or nothing, when the call ends with its name."""
        header = _HEADER.fullmatch(self._buffer)
        if not header:
            self._fail("the call does not begin with call:NAME{")
            return
        self.name = header[1]
        self._stack.append(_Frame(self.arguments, _CLOSERS.get(opener, "")))
        self._buffer, self._state = "", self._in_key
        if not opener:
            self._close()

    def _open(self, opener: str) -> None:
        if len(self._stack) == MAX_DEPTH:
            self._fail("the arguments are nested too deeply")
            return
        self._stack.append(_Frame({} if opener == "{" else [], _CLOSERS[opener]))
        self._buffer, self._state = "", self._in_key if opener == "{" else self._at_value

    def _close(self) -> None:
        frame = self._stack.pop()
        if self._stack:
            self._end_value(frame.container)
        else:
            self._fragments.append("}" if self.arguments else "{}")
            self._state = self._done

    def _begin_quotes(self, quote: str, then: Callable[[Any], None]) -> None:
        self._quote, self._after_quote = quote, then
        self._buffer, self._state = "", self._in_quotes

    def _end_quoted_key(self, key: str) -> None:
        self._frame.key = key
        self._buffer, self._state = "", self._at_separator

    def _end_value(self, value: Any) -> None:
        frame = self._frame
        self._buffer, self._state = "", self._after_value
        if isinstance(frame.container, list):
            frame.container.append(value)
        elif len(self._stack) > 1:
            frame.container[frame.key] = value
        else:
            self._end_argument(frame.key, value)

    def _end_argument(self, key: str, value: Any) -> None:
        schema = _property(self._schemas.get(self.name or "", {}), key)
        try:
            value = coerce(value, schema)
            fragment = f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
        except RecursionError:
            self._fail("the arguments are nested too deeply")
            return
        self._fragments.append((", " if self.arguments else "{") + fragment)
        self.arguments[key] = value


def schemas_of(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Schema]:
    """Each tool's name with the schema of its parameters; tools in OpenAI's form, or their inner objects."""
    found = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, Mapping) else None
        if isinstance(parameters, Mapping) and isinstance(function.get("name"), str):
            found[function["name"]] = parameters
    return found


def coerce(value: Any, schema: Schema) -> Any:
    """value as plain JSON data, turned into what the schema asks for where that can be done without loss.

    A value that does not fit is left as it is: validation is the caller's.
    """
    if isinstance(value, Mapping):
        return {key: coerce(item, _property(schema, key)) for key, item in value.items()}
    if isinstance(value, list):
        items = schema.get("items")
        return [coerce(item, items if isinstance(items, Mapping) else {}) for item in value]
    if not isinstance(value, str):
        return value
    types = _types(schema)
    if isinstance(value, Bare):
        literal = _literal(value)
        if literal is None or not types:
            return literal
        return _fit(literal, types, otherwise=str(value) if "string" in types else literal)
    if not types or "string" in types:
        return value
    if types & {"object", "array"} and value.lstrip()[:1] in ("{", "["):
        found = _parse(value)
        if (isinstance(found, dict) and "object" in types) or (isinstance(found, list) and "array" in types):
            return coerce(found, schema)
        return value
    return _fit(_literal(value.strip()), types, otherwise=value)


def format_call(name: str, arguments: Mapping[str, Any]) -> str:
    """The call as the model writes it. A string that holds the quote token cannot be written so that it reads back."""
    return f"<|tool_call>call:{name}{_format(arguments)}<tool_call|>"


def _format(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = sorted(value, key=lambda key: (key.lower(), key))
        return "{" + ",".join(f"{key}:{_format(value[key])}" for key in keys) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_format, value)) + "]"
    return f'<|"|>{value}<|"|>' if isinstance(value, str) else json.dumps(value)


def _property(schema: Schema, key: str) -> Schema:
    properties = schema.get("properties")
    known = properties.get(key) if isinstance(properties, Mapping) else None
    found = schema.get("additionalProperties") if known is None else known
    return found if isinstance(found, Mapping) else {}


def _types(schema: Schema) -> set[str]:
    """The JSON types that a schema allows, in lower case; empty when it, or one of its choices, does not say."""
    named = schema.get("type")
    found = {t.lower() for t in (named if isinstance(named, list) else [named]) if isinstance(t, str)}
    for choice in (c for key in ("anyOf", "oneOf") for c in schema.get(key) or () if isinstance(c, Mapping)):
        types = _types(choice)
        if not types:
            return set()
        found |= types
    if not found and isinstance(schema.get("enum"), list) and all(isinstance(e, str) for e in schema["enum"]):
        found = {"string"}
    return found


def _fit(literal: Any, types: set[str], otherwise: Any) -> Any:
    """literal when one of the types is its own, else otherwise."""
    if literal is None:
        return None if "null" in types else otherwise
    if isinstance(literal, bool):
        return literal if "boolean" in types else otherwise
    if isinstance(literal, float) and literal.is_integer() and types & {"integer", "number"} == {"integer"}:
        return int(literal)
    if isinstance(literal, int) and types & {"integer", "number"}:
        return literal
    return literal if isinstance(literal, float) and "number" in types else otherwise


def _literal(text: str) -> Any:
    """The number or word that text is, or text."""
    if text in _WORDS:
        return _WORDS[text]
    number = _NUMBER.fullmatch(text)
    if number and len(text) <= 1000:  # Python itself reads no more than 4,300 digits
        value = float(text) if number[1] or number[2] else int(text)
        if math.isfinite(value) if isinstance(value, float) else True:
            return value
    return str(text)


def _unescape(text: str, quote: str) -> str:
    if quote == '"':
        try:
            found = json.loads(f'"{text}"', strict=False)
            assert isinstance(found, str)
            found.encode()  # an escaped half of a surrogate pair is no text
            return found
        except ValueError:
            return text
    return text.replace("\\" + quote, quote)


def _parse(text: str) -> Any:
    """The object or array that a string holds, in JSON or in the grammar of calls; None when it holds neither."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # no infinity, no half of a surrogate pair
        return found
    except (ValueError, RecursionError):
        reader = CallReader({})
        reader.text("call:x{x:" + text + "}")
        reader.end(closed=True)
        return reader.arguments.get("x") if reader.error is None and len(reader.arguments) == 1 else None
