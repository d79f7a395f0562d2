"""The grammar of tool calls: round trips, drift that is read, damage that is named, coercion by schema."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iolite.text.calls import MAX_DEPTH, CallReader, coerce, format_call, schemas_of
from iolite.text.template import ChatTemplate

QUOTE = '<|"|>'


def read(text, *, tools=None, closed=True):
    """The reader after a call's text, in which <|"|> opens and closes strings."""
    reader = CallReader(schemas_of(tools))
    for number, piece in enumerate(text.split(QUOTE)):
        if number % 2:
            reader.string(piece)
        else:
            reader.text(piece)
    reader.end(closed)
    return reader


def tool(properties, name="f"):
    return [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    ]


TEXT = st.text(st.characters(codec="utf-8")).filter(lambda s: QUOTE not in s)
KEYS = st.from_regex(r"[A-Za-z_][\w]*( \w+)?", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)

# No limits of time: the machine that runs the tests may be busy.
RANDOM = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@RANDOM
@given(
    name=st.from_regex(r"[\w.-]([\w.:-]*[\w.-])?", fullmatch=True), arguments=st.dictionaries(KEYS, VALUES, max_size=4)
)
def test_what_is_written_reads_back(name, arguments):
    text = format_call(name, arguments).removeprefix("<|tool_call>").removesuffix("<tool_call|>")
    reader = read(text)
    assert (reader.error, reader.name, reader.arguments) == (None, name, arguments)
    assert json.loads(reader.take_fragment()) == arguments


def test_written_as_the_template_writes():
    arguments = {"b": True, "City": "Zürich", "d": 1.5e-05, "n": None, "o": {"k": [1, "t", []]}, "e": {}}
    template = ChatTemplate.from_folder(Path(__file__).parents[2] / "iolite/nano")
    calls = [{"function": {"name": "get.it", "arguments": arguments}}]
    text = template.render([{"role": "assistant", "content": "", "tool_calls": calls}], add_generation_prompt=False)
    assert text == f"<bos><|turn>model\n{format_call('get.it', arguments)}<|tool_response>"


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("call:f{}", "f", {}),
        ("call:f", "f", {}),
        ("f{a:1}", "f", {"a": 1}),
        (":f{a:1}", "f", {"a": 1}),
        (" call: ns:f.g-h {a:1} ", "ns:f.g-h", {"a": 1}),
        ("call:f(a=1, b = [1,2])", "f", {"a": 1, "b": [1, 2]}),
        ('call:f({"a": 1, "b": {"c": "x"}})', "f", {"a": 1, "b": {"c": "x"}}),
        ("call:f{a=1,b = true}", "f", {"a": 1, "b": True}),
        ("call:f{a b:1,\n c d : 2,}", "f", {"a b": 1, "c d": 2}),
        ('call:f{<|"|>a b<|"|>:1}', "f", {"a b": 1}),
        ('call:f{"a":"x, }\\n\\"y\\"\\u00e9","b":1}', "f", {"a": 'x, }\n"y"é', "b": 1}),
        ("call:f{a:'it is, {so}',b:`c\\`d`}", "f", {"a": "it is, {so}", "b": "c`d"}),
        ('call:f{a:<|"|>{},:[]"\\\n<|tool_call><|"|>}', "f", {"a": '{},:[]"\\\n<|tool_call>'}),
        ("call:f{a:New York,b:12:30,c:http://x/?y=1,d:-0.5,e:1e3,f:007,g:None}", "f",
         {"a": "New York", "b": "12:30", "c": "http://x/?y=1", "d": -0.5, "e": 1000.0, "f": "007", "g": None}),
        ("call:f{a:[[1,[2,{b:[]}]],[],x y]}", "f", {"a": [[1, [2, {"b": []}]], [], "x y"]}),
        ("call:f{a:1,a:2}", "f", {"a": 2}),
        ("call:f{a:1}}", "f", {"a": 1}),
        ("call:f{a:1e999,b:-Infinity,c:NaN}", "f", {"a": "1e999", "b": "-Infinity", "c": "NaN"}),
        ("call:f{a:" + "9" * 5000 + "}", "f", {"a": "9" * 5000}),
        ("call:f{,a:1}", "f", {"a": 1}),
    ],
)  # fmt: skip
def test_reads_drift(text, name, arguments):
    reader = read(text)
    assert (reader.error, reader.name, reader.arguments) == (None, name, arguments)
    assert json.loads(reader.take_fragment()) == arguments


@pytest.mark.parametrize(
    ("text", "arguments", "error"),
    [
        ("", {}, "does not begin with"),
        ("call:{a:1}", {}, "does not begin with"),
        ("call:x:\nBEGIN_ARG city", {}, "does not begin with"),
        ("call:" + "x" * 300 + "{a:1}", {}, "does not begin with"),
        ("call:f{a:1,b:[1,2}", {"a": 1}, "before they are closed"),
        ("call:f{a:1,b}", {"a": 1}, "'b' has no value"),
        ("call:f{a:1,b,c:2}", {"a": 1}, "'b' has no value"),
        ("call:f{a:1,b:}", {"a": 1}, "'b' has no value"),
        ("call:f{:1}", {}, "'' has no value"),
        ('call:f{a:<|"|>x<|"|><|"|>y<|"|>}', {"a": "x"}, "none belongs"),
        ('call:f{a:<|"|>x<|"|> b:1}', {"a": "x"}, "'b' stands where"),
        ('call:f{<|"|>a<|"|> b:1}', {}, "no colon"),
        ("call:f{a:1}call:g{b:2}", {"a": 1}, "more text"),
        ("call:f{a:" + "[" * 100 + "]" * 100 + "}", {}, "nested too deeply"),
        ('call:f{a:"x}', {}, "before they are closed"),
    ],
)
def test_names_damage(text, arguments, error):
    reader = read(text)
    assert error in reader.error
    assert reader.arguments == arguments


def test_depth_at_the_limit():
    inner = MAX_DEPTH - 1
    assert read("call:f{a:" + "[" * inner + "]" * inner + "}").error is None
    assert read("call:f{a:" + "[" * (inner + 1) + "]" * (inner + 1) + "}").error


@pytest.mark.parametrize("length", range(len("call:f{a:1,b:[x]}") + 1))
def test_cut_off_anywhere(length):
    reader = read("call:f{a:1,b:[x]}"[:length], closed=False)
    assert "cut off" in reader.error
    assert reader.arguments in ({}, {"a": 1}, {"a": 1, "b": ["x"]})


@pytest.mark.parametrize(
    ("written", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("1.50", {"type": ["string", "null"]}, "1.50"),
        ("null", {"type": "string"}, None),
        ("5", {"type": "INTEGER"}, 5),
        ("5.0", {"type": "integer"}, 5),
        ("5.0", {"type": "number"}, 5.0),
        ("5.5", {"type": "integer"}, 5.5),
        ("True", {"type": "boolean"}, True),
        ("true", {"type": "string"}, "true"),
        ("five", {"type": "integer"}, "five"),
        ("1", {"enum": ["1", "2"]}, "1"),
        ("1", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "1"),
        ("'5'", {"type": "integer"}, 5),
        ("'5'", {}, "5"),
        ("'5'", {"type": ["integer", "string"]}, "5"),
        ("'true'", {"type": "boolean"}, True),
        ("'null'", {"type": ["integer", "null"]}, None),
        ("'x'", {"type": "integer"}, "x"),
        ("'[1, \"2\"]'", {"type": "array", "items": {"type": "integer"}}, [1, 2]),
        ('\'{"a": {"b": "1"}}\'', {"type": "object", "properties": {"a": {"type": "object"}}}, {"a": {"b": "1"}}),
        ("'{a:1,b:[x]}'", {"type": "object"}, {"a": 1, "b": ["x"]}),
        ("'[1e999]'", {"type": "array"}, ["1e999"]),
        ("'{}'", {"type": "array"}, "{}"),
        ("'{a'", {"type": "object"}, "{a"),
        ("[1,'2',x]", {"type": "array", "items": {"type": "string"}}, ["1", "2", "x"]),
        ("{k:7}", {"type": "object", "additionalProperties": {"type": "string"}}, {"k": "7"}),
        ("'" + "[" * 5000 + "'", {"type": "array"}, "[" * 5000),
    ],
)
def test_coercion(written, schema, value):
    found = read("call:f{k:" + written + "}", tools=tool({"k": schema}))
    assert found.error is None
    assert found.arguments["k"] == value
    assert type(found.arguments["k"]) is type(value)
    assert json.loads(found.take_fragment()) == {"k": value}


def test_schema_of_another_tool_is_not_used():
    assert read("call:g{k:5}", tools=tool({"k": {"type": "string"}})).arguments == {"k": 5}
    assert read("call:f{k:5}", tools=[{"name": "f"}, {"function": 3}, {"name": "g", "parameters": {}}]).error is None


@RANDOM
@given(pieces=st.lists(st.sampled_from([*"{}[](),:='\"`\\ \nax1-.", "call:f{", "a:", "null"])), strings=st.data())
def test_never_raises(pieces, strings):
    reader = CallReader(schemas_of(tool({"a": {"type": "object"}})))
    for piece in pieces:
        if strings.draw(st.booleans()):
            reader.string(piece)
        else:
            reader.text(piece)
    reader.end(closed=strings.draw(st.booleans()))
    fragment = reader.take_fragment()
    if reader.error is None:
        assert json.loads(fragment) == reader.arguments
    assert coerce(reader.arguments, {}) == reader.arguments
