"""Calls of tools from models that would rather not: whatever they draw, our reader reads it and the schema fits."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.folder import random_folder
from support.writing import constraint, end_ids, grammars, ids_of, write

import iolite
from iolite.errors import UsageError
from iolite.text.calls import format_call
from iolite.text.stream import ToolCallEnd, parse_events


def tool(parameters, name="act", **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def strict(parameters):
    return tool(parameters, strict=True)


def doubling(key, **more):
    """A schema that refers twice to one that refers twice to another, and so on: some 30 million times in all."""
    steps = {f"s{n}": {key: [{"$ref": f"#/$defs/s{n + 1}"}] * 2, **more} for n in range(25)}
    return {"$defs": {**steps, "s25": {"type": "object"}}, key: [{"$ref": "#/$defs/s0"}] * 2}


NODE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "leaf": {"type": "boolean"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["leaf"],
        }
    },
}
MANY = {
    "type": "OBJECT",
    "properties": {
        "a key: with, {marks}": {"type": "STRING", "minLength": 1, "maxLength": 9},
        "Zahl": {"type": "number", "minimum": -0.5, "exclusiveMaximum": 7},
        "beta": {"type": "integer", "nullable": True},
        "alpha": {"type": ["boolean", "string"]},
        "list": {"type": "array", "items": {"type": "integer", "multipleOf": 3}, "minItems": 1, "maxItems": 3},
        "pair": {"prefixItems": [{"type": "string"}, {"type": "null"}], "items": False, "minItems": 1},
        "when": {"type": "string", "format": "date-time"},
        "code": {"type": "string", "pattern": "^a|b/c$", "maxLength": 12},
        "any": {},
    },
    "required": ["Zahl", "list", "code"],
}
BOTH = {
    "allOf": [
        {"properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]},
        {"properties": {"n": {"maximum": 5}, "m": {"enum": [1, "1", None, [True], {"k": "v"}]}}, "required": ["m"]},
    ]
}
OPEN = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}}

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=5)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(-1e9, 1e9), names),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
simple = st.one_of(
    st.sampled_from([{"type": kind} for kind in ("string", "integer", "number", "boolean", "null")]),
    st.just({"type": ["string", "null"], "maxLength": 5}),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, st.integers(-99, 99), st.integers(0, 9)
    ),
    st.builds(lambda found: {"enum": found}, st.lists(values, min_size=1, max_size=4)),
    st.builds(
        lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, st.integers(0, 3), st.integers(0, 5)
    ),
    st.just({"type": "string", "pattern": "[0-9]$"}),
)
schemas = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": [name for name, needed in zip(properties, required, strict=False) if needed],
            },
            st.dictionaries(names, inner, max_size=4),
            st.lists(st.booleans(), min_size=4, max_size=4),
        ),
        st.builds(lambda items, a, b: {"type": "array", "items": items, "minItems": a, "maxItems": a + b}, inner,
                  st.integers(0, 2), st.integers(0, 2)),
        st.builds(lambda choices: {"anyOf": choices}, st.lists(inner, min_size=1, max_size=3)),
        st.dictionaries(names, inner, min_size=1, max_size=1).map(
            lambda one: {"type": "object", "additionalProperties": next(iter(one.values()))}
        ),
    ),
    max_leaves=7,
)  # fmt: skip


def calls_of(ids, tools) -> list[ToolCallEnd]:
    return [event for event in parse_events(grammars().tokenizer, ids, tools=tools) if isinstance(event, ToolCallEnd)]


def check(parameters, seed, tools=None, **sampling) -> bool:
    """One call; whether it was written to its end."""
    tools = tools or [tool(parameters)]
    answer = constraint(tools=tools, tool_choice="required", parallel_tool_calls=False)
    ids, ended = write(answer, seed, **sampling)
    if ended:
        (call,) = calls_of(ids, tools)
        assert call.complete, (call.error, grammars().tokenizer.decode(ids))
        jsonschema.validate(call.arguments, lower_case(parameters))
    return ended


def lower_case(schema):
    """The schema with its types as the standard writes them, and with null where OpenAPI's nullable says so."""
    if isinstance(schema, list):
        return [lower_case(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: lower_case(value) for key, value in schema.items()}
    if isinstance(found.get("type"), str):
        found["type"] = found["type"].lower()
        if found.get("nullable") is True:
            found["type"] = [found["type"], "null"]
    return found


# Arguments


@settings(max_examples=120)
@given(schemas, st.integers(0, 2**32))
@example({"anyOf": [{"type": "string", "maxLength": 2}, {"enum": [500]}]}, 0)  # a number that is no string
def test_whatever_the_schema_the_call_is_read_and_valid(schema, seed):
    check({"type": "object", "properties": {"x": schema}, "required": ["x"]}, seed)


@pytest.mark.parametrize("parameters", [NODE, MANY, BOTH, OPEN, {"type": "object"}, {}], ids=lambda p: str(p)[:30])
def test_the_call_is_valid(parameters):
    assert sum(check(parameters, seed) for seed in range(15)) > 7


@pytest.mark.parametrize("parameters", [None, {"type": "object", "properties": {}}])
def test_a_function_without_parameters(parameters):
    tools = [tool(parameters)]
    ids, ended = write(constraint(tools=tools, tool_choice="required", parallel_tool_calls=False), 1)
    assert ended and grammars().tokenizer.decode(ids) == "<|tool_call>call:act{}<tool_call|>"


@pytest.mark.parametrize(
    "text",
    [
        'say "hi"',
        "back\\slash\\",
        "{braces}, [brackets]: =",
        "two\nlines\t\x01",
        "Grüße 世界 🎈",
        "<|turn> <tool_call|>",
        "",
    ],
)
def test_every_string_can_be_written_raw(text):
    """A string of a schema comes back as it is, and a free one may be any."""
    for parameters in ({"enum": [text]}, {"type": "string"}, {"type": "string", "minLength": len(text)}, {}):
        answer = constraint(tools=[tool({"type": "object", "properties": {"s": parameters}})])
        tokens = ids_for(format_call("act", {"s": text}), text)
        for token in tokens:
            assert (mask := answer.mask()) is None or mask[token], (parameters, grammars().tokenizer.id_to_token(token))
            answer.saw(token)
        (call,) = calls_of(tokens, [])
        assert call.arguments == {"s": text}


def ids_for(call: str, text: str) -> list[int]:
    """The ids of a call whose string is text and not the special tokens that it spells."""
    before, after = call.split(f'<|"|>{text}<|"|>')
    encode, (quote,) = grammars().tokenizer.encode, ids_of('<|"|>')
    inside = [i for part in re.split("(<)", text) for i in encode(part)]
    return [*encode(before), quote, *inside, quote, *encode(after)]


def test_arguments_come_in_the_order_in_which_the_template_writes_them():
    parameters = {
        "type": "object",
        "properties": {key: {"type": "null"} for key in "bAc"},
        "required": ["b", "A"],
    }
    found = set()
    for seed in range(20):
        ids, _ = write(constraint(tools=[tool(parameters)], tool_choice="required", parallel_tool_calls=False), seed)
        found.add(grammars().tokenizer.decode(ids))
    call = "<|tool_call>call:act{A:null,b:null%s}<tool_call|>"
    assert found == {call % "", call % ",c:null"}
    assert format_call("act", dict.fromkeys("bAc")) in found


# Which tools, and when

WEATHER = tool({"type": "object", "properties": {"city": {"enum": ["Oslo", "Rom"]}}, "required": ["city"]}, "weather")
ADD = tool({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, "add")["function"]
TOOLS = [WEATHER, ADD]


def allowed(answer) -> set[int]:
    return {int(i) for i in answer.mask().nonzero()[0]}


def test_auto_lets_the_model_write_what_it_likes_until_it_calls():
    opens, closes = ids_of("<|tool_call>", "<tool_call|>")
    answer = constraint(tools=TOOLS)
    for token in (*grammars().tokenizer.encode("some text"), opens):
        assert answer.mask() is None
        answer.saw(token)
    for token in (*grammars().tokenizer.encode('call:weather{city:<|"|>Oslo<|"|>}'), closes):
        assert answer.mask()[token]
        assert not answer.mask()[opens] and not allowed(answer) & end_ids()
        answer.saw(token)
    assert answer.mask() is None


def test_none_forbids_calls_and_nothing_else():
    mask = constraint(tools=TOOLS, tool_choice="none").mask()
    assert list((~mask).nonzero()[0]) == ids_of("<|tool_call>")


def test_required_calls_once_or_more_and_then_ends():
    opens = ids_of("<|tool_call>")[0]
    counts, called = set(), set()
    for seed in range(30):
        answer = constraint(tools=TOOLS, tool_choice="required")
        assert allowed(answer) == {opens}
        ids, ended = write(answer, seed, likely=3.0)
        if ended:
            calls = calls_of(ids, TOOLS)
            assert all(call.complete for call in calls) and ids[0] == opens
            counts.add(len(calls))
            called |= {call.name for call in calls}
    assert min(counts) == 1 and max(counts) > 1 and called == {"weather", "add"}


@pytest.mark.parametrize(
    "choice", [{"type": "function", "function": {"name": "add"}}, {"type": "function", "name": "add"}]
)
def test_one_by_name_is_called_once(choice):
    for seed in range(5):
        ids, ended = write(constraint(tools=TOOLS, tool_choice=choice), seed)
        assert ended and [call.name for call in calls_of(ids, TOOLS)] == ["add"]


def test_a_thought_comes_before_a_call_that_is_required():
    opens, thinks, closes = ids_of("<|tool_call>", "<|channel>", "<channel|>")
    answer = constraint(tools=TOOLS, tool_choice="required", thinking=True)
    assert allowed(answer) == {opens, thinks}
    answer.saw(thinks)
    assert not allowed(answer) & {opens, *end_ids()}
    answer.saw(closes)
    assert allowed(answer) == {opens}


def test_a_schema_beside_tools_leaves_the_choice():
    """The answer is a call, or it is JSON."""
    kinds = set()
    for seed in range(20):
        ids, ended = write(
            constraint(tools=TOOLS, schema={"type": "array", "items": {"type": "null"}}), seed, likely=4.0
        )
        calls = calls_of(ids, TOOLS)
        kinds.add(bool(calls))
        if ended and not calls:
            assert set(json.loads(grammars().tokenizer.decode(ids))) <= {None}
    assert kinds == {True, False}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "'sub'"),
        ({"tools": TOOLS, "tool_choice": "always"}, "'always'"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "'add'"),
        ({"tools": [tool({}, "two words")]}, "two words"),
        ({"tools": [tool({"properties": {"a": {"type": "nonsense"}}, "required": ["a"]})]}, "nonsense"),
        ({"tools": [tool({"properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]})]}, "nowhere"),
        ({"tools": [tool({"allOf": [{"$ref": "#"}]})]}, "itself"),
        ({"tools": [tool({"properties": [1]})]}, "no JSON Schema"),
        ({"tools": [tool("text")]}, "'act'"),
        ({"tools": [strict({"properties": {"a": {"type": "array", "uniqueItems": True}}})]}, "uniqueItems"),
        ({"tools": [strict({"properties": {"a": {"type": "string", "pattern": "(?=a)"}}})]}, "pattern"),
        ({"tools": [strict({"properties": {"a": {"oneOf": [{}, {}]}}})]}, "oneOf"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_at_once(asked, named):
    with pytest.raises(UsageError, match=re.escape(named)):
        constraint(**asked)


@pytest.mark.parametrize("parameters", [doubling("allOf"), doubling("anyOf", minLength=1)], ids=["allOf", "anyOf"])
def test_references_that_multiply_are_not_followed_to_their_end(parameters):
    with pytest.raises(UsageError, match="too much"):
        constraint(tools=[tool({"type": "object", **parameters})])


def test_what_no_grammar_can_say_is_left_out_for_a_tool_that_is_not_strict():
    parameters = {"properties": {"a": {"type": "array", "items": {"type": "null"}, "uniqueItems": True, "minItems": 2}}}
    ids, ended = write(constraint(tools=[tool(parameters)], tool_choice="required", parallel_tool_calls=False), 3)
    assert ended and calls_of(ids, [])[0].complete


def test_a_model_that_must_call_calls(tmp_path):
    model = iolite.load(random_folder(tmp_path / "m"))
    reply = model.chat(
        "weather?", tools=TOOLS, tool_choice={"type": "function", "function": {"name": "weather"}}, seed=1
    )
    assert reply.finish_reason == "tool_calls" and reply.notice is None
    assert reply.tool_calls[0].arguments["city"] in ("Oslo", "Rom")
