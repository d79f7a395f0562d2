"""Ids -> text and events: nothing half, nothing lost, the same for every cut of the same answer."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iolite.text.calls import format_call
from iolite.text.stream import (
    ContentDelta,
    EventParser,
    ReasoningDelta,
    TokenStream,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    join_deltas,
    parse_events,
    prompt_start,
)
from iolite.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from iolite.train.nano.tokenizer import train_tokenizer

# No limits of time: the machine that runs the tests may be busy.
RANDOM = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

CALL = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
CALL_EVENTS = [ToolCallStart(0, "f"), ToolCallDelta(0, '{"a": "x"}'), ToolCallEnd(0, "f", {"a": "x"}, True, None)]
CONTENT, THOUGHT = ContentDelta, ReasoningDelta


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Which shape is it? It is a red circle. call:get_weather{city: thoughts"] * 20, 600, path)
    return Tokenizer.from_folder(path)


def parse(tokenizer, text, **options):
    return parse_events(tokenizer, tokenizer.encode(text), **options)


def in_bytes(tokenizer, text):
    """The ids of text with every ordinary character as its bytes: the finest cut there is."""
    ids = []
    for i in tokenizer.encode(text):
        if i in tokenizer.special_ids:
            ids.append(i)
        else:
            ids += [tokenizer.token_id(f"<0x{byte:02X}>") for byte in tokenizer.token_bytes(i)]
    return ids


# ---- TokenStream ----


@RANDOM
@given(data=st.data())
def test_stream_equals_decoding(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3)))
    stream = TokenStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


def test_stream_holds_half_a_character_back(tokenizer):
    stream = TokenStream(tokenizer)
    pieces = [stream.push(i) for i in in_bytes(tokenizer, "é🙂 z")]
    assert [p for p in pieces if p] == ["é", "🙂", " ", "z"]
    assert stream.flush() == ""
    assert stream.push(in_bytes(tokenizer, "é")[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(in_bytes(tokenizer, "a")[0]) == "a"


# ---- answers ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi é🙂", [CONTENT("Hi é🙂")]),
        ("", []),
        ("<|channel>thought\nR\n<channel|>x<turn|>", [THOUGHT("R"), CONTENT("x")]),
        ("<|channel>thought\n<channel|>x", [CONTENT("x")]),
        ("<|channel>thought<channel|>x", [CONTENT("x")]),
        ("<|channel>analysis\nR\n\nS\n<channel|>x", [THOUGHT("R\n\nS"), CONTENT("x")]),
        ("<|channel>Well, no name\nR<channel|>x", [THOUGHT("Well, no name\nR"), CONTENT("x")]),
        ("<|channel>hm<channel|>x", [THOUGHT("hm"), CONTENT("x")]),
        ("<|channel>thought\nR\n", [THOUGHT("R\n")]),
        ("<|channel>thou", []),
        ("<|channel>thought\nR<turn|>ignored", [THOUGHT("R")]),
        ("<|channel>thought\nR\n<|channel>thought\nS\n<channel|>x", [THOUGHT("R\nS"), CONTENT("x")]),
        ("<|channel>thought\nR\n<channel|>x<|channel>thought\nS<channel|>y",
         [THOUGHT("R"), CONTENT("x"), THOUGHT("\nS"), CONTENT("y")]),
        ("<|channel>thought\n<channel|>" * 50, []),
        ("<|channel>" * 50 + "thought\nR", [THOUGHT("R")]),
        ("<channel|>x<tool_call|><|image|><pad><mask><tool_response|>y", [CONTENT("xy")]),
        ('say <|"|>a<|"|>', [CONTENT('say "a"')]),
        ("x<eos>y", [CONTENT("x")]),
        ("x<|tool_response>y", [CONTENT("x")]),
        (CALL, CALL_EVENTS),
        ("x" + CALL + "y", [CONTENT("x"), *CALL_EVENTS, CONTENT("y")]),
        ("<|channel>thought\nR" + CALL + "S\n<channel|>y", [THOUGHT("R"), *CALL_EVENTS, THOUGHT("S"), CONTENT("y")]),
        ("<|tool_call>call:f{a:1<|channel>thought\nR<channel|>x",
         [ToolCallStart(0, "f"), ToolCallEnd(0, "f", {}, False, "the arguments end before they are closed"),
          THOUGHT("R"), CONTENT("x")]),
        (CALL.removesuffix("<tool_call|>") + "<|tool_response>", CALL_EVENTS),
        (CALL.removesuffix("<tool_call|>"),
         [*CALL_EVENTS[:2], ToolCallEnd(0, "f", {"a": "x"}, False, "the call was cut off before its end")]),
        ('<|tool_call>call:f{a:<|"|><|tool_call><tool_call|><turn|><|channel><|"|>}<tool_call|>',
         [ToolCallStart(0, "f"), ToolCallDelta(0, '{"a": "<|tool_call><tool_call|><turn|><|channel>"}'),
          ToolCallEnd(0, "f", {"a": "<|tool_call><tool_call|><turn|><|channel>"}, True, None)]),
        ("<|tool_call><tool_call|>",
         [ToolCallStart(0, ""), ToolCallEnd(0, "", {}, False, "the call does not begin with call:NAME{")]),
    ],
)  # fmt: skip
def test_answers(tokenizer, text, expected):
    assert parse(tokenizer, text) == expected
    assert parse_events(tokenizer, in_bytes(tokenizer, text)) == expected


def test_parallel_calls_are_counted(tokenizer):
    text = format_call("f", {"a": 1}) + format_call("g", {}) + "<|tool_call>call:h{b:2<|tool_call>call:f{}<tool_call|>"
    ends = [e for e in parse(tokenizer, text) if isinstance(e, ToolCallEnd)]
    assert [(e.index, e.name, e.arguments, e.complete) for e in ends] == [
        (0, "f", {"a": 1}, True),
        (1, "g", {}, True),
        (2, "h", {}, False),
        (3, "f", {}, True),
    ]


def test_arguments_come_key_by_key(tokenizer):
    parser = EventParser(tokenizer)
    ids = tokenizer.encode(format_call("f", {"a": "x" * 20, "b": [1], "c": None}))
    events = [event for i in ids for event in parser.push(i)]
    assert [e.arguments_json_fragment for e in events if isinstance(e, ToolCallDelta)] == [
        '{"a": "' + "x" * 20 + '"',
        ', "b": [1]',
        ', "c": null}',
    ]
    assert events[0] == ToolCallStart(0, "f")
    assert parser.mode == "content"


def test_schema_of_the_tool_is_used(tokenizer):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "ids": {"type": "array"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    text = '<|tool_call>call:f{city:8000,ids:<|"|>[1, 2]<|"|>}<tool_call|>'
    assert parse(tokenizer, text, tools=tools)[-1].arguments == {"city": "8000", "ids": [1, 2]}


def test_hard_arguments(tokenizer):
    arguments = {
        "code": 'def f(x):\n    return {"a": [x, "}"], \'b\': "\\\\"}\n',
        "path with spaces": "C:\\new, [folder]\\",
        "text": "Zürich 東京 🙂 \u2028 \x00",
        "nested": [[["a,b"], {"k": [{"l": ""}]}], []],
    }
    *_, end = parse(tokenizer, format_call("write.file:v-2", arguments))
    assert end == ToolCallEnd(0, "write.file:v-2", arguments, True, None)


def test_truncated_anywhere(tokenizer):
    text = "<|channel>thought\nR 🙂\n<channel|>" + format_call("get_weather", {"city": "Zürich", "n": [1, "}"]})
    for ids in (tokenizer.encode(text), in_bytes(tokenizer, text)):
        for cut in range(len(ids)):
            events = parse_events(tokenizer, ids[:cut])
            assert not any(isinstance(e, ContentDelta) for e in events)
            assert all(not e.complete and e.error for e in events if isinstance(e, ToolCallEnd))
            starts, ends = ([e for e in events if isinstance(e, kind)] for kind in (ToolCallStart, ToolCallEnd))
            assert len(starts) == len(ends)
        assert parse_events(tokenizer, ids)[-1].complete


def test_endless_thought_is_a_thought(tokenizer):
    events = parse(tokenizer, "<|channel>thought\n" + "and so on " * 500)
    assert events == [THOUGHT("and so on " * 500)]


def test_mode_and_the_end(tokenizer):
    parser = EventParser(tokenizer)
    modes = []
    for token in ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<turn|>", "<|channel>"):
        parser.push(tokenizer.token_id(token))
        modes.append(parser.mode)
    assert modes == ["reasoning", "content", "tool_call", "content", "ended", "ended"]
    assert parser.finish() == parser.finish() == []


# ---- where the prompt ends ----


@pytest.mark.parametrize(
    ("prompt", "start", "answer", "expected"),
    [
        ("<bos><|turn>model\n", "content", "x", [CONTENT("x")]),
        ("<bos><|turn>model\n<|channel>thought\n<channel|>", "content", "x", [CONTENT("x")]),
        ("<|tool_response>a<tool_response|><|channel>thought\n", "reasoning", "R\n<channel|>x",
         [THOUGHT("R"), CONTENT("x")]),
        ("<|turn>model\n<|channel>", "reasoning", "thought\nR", [THOUGHT("R")]),
        ("<|turn>model\n<|channel>thought\nso far ", "reasoning", "R", [THOUGHT("R")]),
        ("<|channel>thought\n<turn|>\n<|turn>model\n", "content", "x", [CONTENT("x")]),
        ("", "content", "x", [CONTENT("x")]),
    ],
)  # fmt: skip
def test_start_from_the_prompt(tokenizer, prompt, start, answer, expected):
    ids = tokenizer.encode(prompt)
    assert prompt_start(tokenizer, ids) == start
    parser = EventParser.for_prompt(tokenizer, ids)
    events = [event for i in tokenizer.encode(answer) for event in parser.push(i)]
    assert join_deltas(events + parser.finish()) == expected


# ---- properties over random answers ----

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="▁<"), max_size=8)
MARKS = st.sampled_from(sorted(SPECIAL_TOKENS))
LETTERS = ("thought\n", "\n", "call:f{", "call:", "a:", "b=", "}", "]", "[", "{", ",", "1", "true", '"', "'", "é🙂")
STEPS = ("<|channel>thought\n", "<channel|>", "<|tool_call>call:f{a:", '<|"|>', "<tool_call|>", CALL)
GRAMMAR = st.sampled_from(LETTERS + STEPS)
ANSWERS = st.lists(WORDS | MARKS | GRAMMAR | GRAMMAR, max_size=20)


@RANDOM
@given(pieces=ANSWERS, cut=st.randoms(use_true_random=False))
def test_streaming_equals_one_shot_for_every_cut(tokenizer, pieces, cut):
    whole = tokenizer.encode("".join(pieces))
    expected = parse_events(tokenizer, whole)
    assert parse_events(tokenizer, in_bytes(tokenizer, "".join(pieces))) == expected
    mixed = [j for i in whole for j in (in_bytes(tokenizer, tokenizer.decode([i])) if cut.random() < 0.5 else [i])]
    if tokenizer.decode(mixed) == tokenizer.decode(whole):  # a token that is a part of a character has no such cut
        assert parse_events(tokenizer, mixed) == expected


@RANDOM
@given(pieces=ANSWERS, data=st.data())
def test_events_of_any_tokens_are_sound(tokenizer, pieces, data):
    ids = tokenizer.encode("".join(pieces))
    noise = data.draw(st.lists(st.tuples(st.integers(0, len(ids)), st.integers(0, 279)), max_size=5))
    for at, token_id in noise:  # special tokens and bytes anywhere
        ids.insert(at, token_id)
    events = parse_events(tokenizer, ids)
    open_call, fragments = None, ""
    for event in events:
        if isinstance(event, ContentDelta | ReasoningDelta):
            assert event.text and open_call is None
            assert not any(token in event.text for token in SPECIAL_TOKENS)
        elif isinstance(event, ToolCallStart):
            assert open_call is None
            open_call, fragments = event, ""
        elif isinstance(event, ToolCallDelta):
            fragments += event.arguments_json_fragment
        else:
            assert (open_call.index, open_call.name) == (event.index, event.name)
            assert event.complete == (event.error is None)
            if event.complete:
                assert json.loads(fragments) == event.arguments
            open_call = None
    assert open_call is None
