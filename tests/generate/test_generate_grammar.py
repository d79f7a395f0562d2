"""Answers that must fulfil a schema or a grammar, from models that would rather not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drafting import CHEAP
from support.folder import random_folder
from support.writing import constraint, end_ids, grammars, ids_of, write

import iolite
from iolite.errors import BusyError, UsageError
from iolite.generate import matcher
from iolite.generate.sampling import Sampler, SamplingParams
from iolite.generate.speculative import Speculator

DEEP: dict = {}
for _ in range(300):
    DEEP = {"items": DEEP}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["rot", "grün", "<|turn>", 'a"b']}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/home"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {"home": {"type": "object", "properties": {"zip": {"pattern": "^[0-9]{5}$", "type": "string"}}}},
}
WORD = {"regex": "[a-z]{2,9}"}

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=6)
simple = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({}),
    st.builds(
        lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, st.integers(0, 4), st.integers(0, 9)
    ),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, st.integers(-99, 99), st.integers(0, 9)
    ),
    st.builds(lambda a: {"type": "number", "exclusiveMinimum": a, "maximum": a + 2}, st.integers(-9, 9)),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.one_of(names, st.integers(-(2**53), 2**53), st.none()), min_size=1, max_size=4),
    ),
    st.just({"type": "string", "format": "date"}),
    st.just({"type": "string", "format": "no-such-format"}),
    st.just({"type": "string", "pattern": "^[ab]{1,3}x?$"}),
)


def made_of(schemas):
    objects = st.dictionaries(names, schemas, max_size=4).flatmap(
        lambda properties: st.builds(
            lambda required, more: {"type": "object", "properties": properties, "required": required, **more},
            st.lists(st.sampled_from(sorted(properties)), unique=True) if properties else st.just([]),
            st.sampled_from([{}, {"additionalProperties": False}]),
        )
    )
    arrays = st.builds(lambda items, a, b: {"type": "array", "items": items, "minItems": a, "maxItems": a + b}, schemas,
                       st.integers(0, 2), st.integers(0, 2))  # fmt: skip
    return objects | arrays | st.builds(lambda choices: {"anyOf": choices}, st.lists(schemas, min_size=1, max_size=3))


schemas = st.recursive(simple, made_of, max_leaves=8)


def text_of(ids) -> str:
    return grammars().tokenizer.decode(ids)


# What may be drawn


@settings(max_examples=120)
@given(schemas, st.integers(0, 2**32))
def test_whatever_the_model_and_the_schema_the_answer_is_valid(schema, seed):
    ids, ended = write(constraint(schema=schema), seed)
    assert not set(ids) & grammars().tokenizer.special_ids
    if ended:
        jsonschema.validate(json.loads(text_of(ids)), schema)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.1, "repetition_penalty": 1.3}])
def test_it_is_valid_however_it_is_drawn(sampling):
    done = 0
    for seed in range(20):
        ids, ended = write(constraint(schema=PERSON), seed, **sampling)
        done += ended
        if ended:
            jsonschema.validate(json.loads(text_of(ids)), PERSON)
    assert done > 5


def test_any_object_and_any_json():
    for seed in range(10):
        ids, ended = write(constraint(schema={"type": "object"}), seed)
        assert not ended or isinstance(json.loads(text_of(ids)), dict)
    ids, ended = write(constraint(schema={}), 1)
    assert ended and json.loads(text_of(ids)) is not Ellipsis


@pytest.mark.parametrize("pattern", ["[0-9]{3}-[a-zé]{2,5}", "(ja|nein)( 世界)?", "<turn\\|>|\\[\\]"])
def test_a_regular_expression_is_matched_from_end_to_end(pattern):
    for seed in range(10):
        ids, ended = write(constraint(grammar={"regex": pattern}), seed)
        assert ended and re.fullmatch(pattern, text_of(ids))


def test_a_lark_grammar():
    grammar = 'start: "(" list ")"\nlist: item ("," item)*\nitem: WORD | "(" list ")"\nWORD: /[a-z]{1,4}/'
    for seed in range(20):
        ids, ended = write(constraint(grammar=grammar), seed)
        text = text_of(ids)
        assert not ended or (text.count("(") == text.count(")") and re.fullmatch(r"[a-z(),]+", text))


def test_only_an_end_follows_what_is_complete_and_none_comes_before():
    answer = constraint(grammar={"regex": "ab|cd"})
    allowed = {int(i) for i in answer.mask().nonzero()[0]}
    assert not allowed & end_ids() and set(ids_of("a", "c")) <= allowed
    for token in ids_of("c", "d"):
        answer.saw(token)
    assert {int(i) for i in answer.mask().nonzero()[0]} == end_ids()


def test_a_bias_yields_to_the_grammar_and_else_counts():
    (a, b, x) = ids_of("a", "b", "x")
    logits = torch.zeros(grammars().vocab_size)
    forbids = SamplingParams(temperature=0, logit_bias={a: -math.inf, b: -math.inf, x: 50.0})
    assert Sampler(forbids, constraint(grammar={"regex": "a"}))([], logits) in {a, *ids_of("<0x61>")}
    sampler = Sampler(SamplingParams(temperature=0, logit_bias={b: 1.0}), constraint(grammar={"regex": "a|b"}))
    assert sampler([], logits) == b


def test_a_token_that_ends_answers_is_no_text():
    """Whatever a caller ends answers with: within the grammar it cannot come."""
    from iolite.generate.grammar import constrain

    a, b = ids_of("a", "b")
    answer = constrain(grammars(), [], {a}, grammar={"regex": "[ab]"})
    assert answer.mask()[b] and not answer.mask()[a]
    answer.saw(b)
    assert {int(i) for i in answer.mask().nonzero()[0]} == {a}


# Thoughts


def test_a_thought_comes_first_or_not_at_all():
    opens, closes, turn = ids_of("<|channel>", "<channel|>", "<turn|>")
    answer = constraint(schema=PERSON, thinking=True)
    assert answer.mask()[opens] and answer.mask()[ids_of("{")[0]] and not answer.mask()[turn]
    answer.saw(opens)
    for token in grammars().tokenizer.encode("thought\nany } text\n"):
        assert answer.mask()[token]
        answer.saw(token)
    assert answer.mask()[closes] and not answer.mask()[turn] and not answer.mask()[opens]
    answer.saw(closes)
    assert answer.phase == "start" and not answer.mask()[opens]
    assert not constraint(schema=PERSON).mask()[opens]


def test_a_prompt_may_end_in_a_thought():
    opens, closes = ids_of("<|channel>", "<channel|>")
    assert constraint([opens], schema=PERSON).phase == "thought"
    assert constraint([opens, closes], schema=PERSON).phase == "start"


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("asked", [{}, {"schema": {"type": "boolean"}}])
def test_a_budget_closes_the_thought(budget, asked):
    opens, closes = ids_of("<|channel>", "<channel|>")
    answer = constraint([opens], thinking=True, thinking_budget=budget, **asked)
    for _ in range(budget):
        answer.saw(ids_of("a")[0])
    assert list(answer.mask().nonzero()[0]) == [closes]
    if budget == 0:
        mask = constraint(thinking=True, thinking_budget=0, **asked).mask()
        assert not mask[opens]


# What cannot be honoured


def test_limits_and_properties_are_no_values_to_choose_from():
    limits = {"type": "integer", "maximum": 2**63 - 1}
    constraint(schema={"properties": {"enum": limits, "const": limits}, "enum": [{"properties": 3}]})


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"schema": {"type": "nonsense"}}, "nonsense"),
        ({"schema": {"not": {}}}, "not"),
        ({"schema": {"type": "string", "pattern": "(?=a)"}}, "regex"),
        ({"schema": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"schema": {"$ref": "https://example.org/a.json"}}, "schema cannot be used"),
        ({"schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "schema cannot be used"),
        ({"schema": [1]}, "list"),
        ({"schema": {"enum": [{1}]}}, "not JSON"),
        ({"schema": DEEP}, "schema cannot be used"),
        ({"schema": {"enum": [float("nan")]}}, "schema cannot be used"),
        ({"schema": {"items": {"enum": [2**53, {"a": -(2**53) - 1}]}}}, "-9007199254740993 is beyond 2^53"),
        ({"grammar": "begin: x"}, "grammar cannot be used"),
        ({"grammar": "start: <turn|>"}, "names the token <turn|>"),
        ({"grammar": "start: <[16]>"}, "names the token"),
        ({"grammar": {"regex": "(a"}}, "regular expression"),
        ({"grammar": {"peg": "a"}}, "no known kind"),
        ({"grammar": 3}, "no known kind"),
        ({"schema": {}, "grammar": "start: /a/"}, "both"),
        ({"schema": {}, "thinking_budget": -1}, "thinking_budget"),
    ],
    ids=lambda asked: str(asked)[:60],
)
def test_what_cannot_be_honoured_is_refused_at_once(asked, named):
    with pytest.raises(UsageError, match=re.escape(named)) as found:
        constraint(**asked)
    assert len(str(found.value)) < 400 and found.value.hint


def test_a_grammar_that_leads_nowhere_says_so():
    """Here the vocabulary has no token for what must come: the end of answers is the only one."""
    from iolite.generate.grammar import constrain

    every = [i for i in range(grammars().vocab_size) if b"a" in grammars().tokenizer.token_bytes(i)]
    answer = constrain(grammars(), [], every, grammar={"regex": "a"})
    with pytest.raises(UsageError, match="goes on with the grammar"):
        answer.mask()


def test_several_threads_share_the_grammars():
    """Each with its own answers: the same ones as alone."""

    def texts(seeds):
        return [text_of(write(constraint(schema=PERSON), seed)[0]) for seed in seeds]

    alone = texts(range(4))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(texts, [range(4)] * 4)) == [alone] * 4


# With a model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return iolite.load(random_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def script(model, monkeypatch) -> Callable[[str], None]:
    """Makes the model want to say a text, and after it nothing in particular."""

    def use(text: str) -> None:
        ids = iter(model.tokenizer.encode(text))
        random = torch.Generator().manual_seed(0)

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            rows = torch.randn(hidden.shape[0], model.config.text.vocab_size, generator=random)
            if (token := next(ids, None)) is not None:
                rows[-1, token] = 30.0
            return rows

        monkeypatch.setattr(model.network, "logits", logits)

    return use


COLOUR = {"type": "object", "properties": {"c": {"enum": ["red", "blue"]}}, "required": ["c"]}
COLOUR = COLOUR | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("said", "thinking", "thought"),
    [
        ("<|channel>thought\nred {or} blue?\n<channel|>I say red", True, "red {or} blue?"),
        ("I say red", True, ""),
        ("I say red", False, ""),
        ("<|channel>thought\nno\n<channel|>", False, ""),
        ("<|channel>thought\nno<turn|><eos>", True, "no"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_answer_is_valid_after_a_thought_without_one_and_with_thinking_off(
    model, script, said, thinking, thought, temperature
):
    for asked in ({"thinking": thinking}, {} if not thinking else {"thinking": True}):
        script(said)
        reply = model.chat("which", schema=COLOUR, temperature=temperature, seed=1, max_tokens=300, **asked)
        if reply.finish_reason == "length":
            assert reply.reasoning.startswith(thought) and reply.notice
            continue
        assert reply.finish_reason == "stop" and reply.reasoning.startswith(thought)
        jsonschema.validate(json.loads(reply.text), COLOUR)


def test_streamed_is_what_is_not_streamed_and_a_seed_is_a_seed(model):
    asked = {"schema": PERSON, "seed": 3, "temperature": 1.0, "max_tokens": 60}
    whole = model.chat("who", **asked)
    stream = model.chat("who", **asked, stream=True)
    assert "".join(event.text for event in stream) == whole.text == model.chat("who", **asked).text
    assert model.chat("who", **asked | {"seed": 4}).text != whole.text


def test_a_stop_string_still_ends_an_answer(model):
    reply = model.chat("who", schema=PERSON, stop=['"name"'], max_tokens=300)
    assert reply.finish_reason == "stop" and reply.text.strip() == "{"


def test_too_few_tokens_are_said_to_be(model):
    reply = model.chat("who", schema=PERSON, max_tokens=3)
    assert reply.finish_reason == "length" and "cut off" in reply.notice


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 4}], ids=str)
def test_drafts_change_nothing(model, settings):
    """Copies of the text so far, whose brackets and keys come again: some are right and some are not."""
    schema = {"type": "array", "items": COLOUR, "minItems": 5, "maxItems": 7}
    plain = model.chat("which", schema=schema, max_tokens=150, **settings)
    object.__setattr__(model, "speculator", Speculator(model.network, CHEAP))
    try:
        drafted = model.chat("which", schema=schema, max_tokens=150, **settings, drafts=3)
        assert drafted.text == plain.text and drafted.usage.completion_tokens == plain.usage.completion_tokens
        told = drafted.timings.drafting
        assert 0 < told.accepted < told.drafted
    finally:
        object.__setattr__(model, "speculator", None)
    if plain.finish_reason == "stop":
        jsonschema.validate(json.loads(plain.text), schema)


def test_the_constraint_of_a_word(model):
    reply = model.chat("which", grammar=WORD, temperature=1.0, seed=0)
    assert re.fullmatch(WORD["regex"], reply.text) and reply.finish_reason == "stop"


def test_a_grammar_that_takes_very_long(monkeypatch):
    """Each text that must be in it makes it twice as large. The next grammar does not wait for it."""
    monkeypatch.setattr(matcher, "SECONDS", 0.2)
    with pytest.raises(UsageError, match="takes more than"):
        grammars().lark("start: T\nT: " + " & ".join(f"/.*a{i}.*/" for i in range(20)))
    monkeypatch.setattr(matcher, "SECONDS", 60.0)
    assert grammars().lark('start: "next"')


def test_without_memory_for_another_thread_others_are_not_kept_waiting(monkeypatch):
    def fails(thread):
        raise RuntimeError("can't start new thread")

    found, answer = grammars(), {"type": "object", "properties": {"a_thread": {"type": "integer"}}}
    with monkeypatch.context() as patch:
        patch.setattr(matcher.threading.Thread, "start", fails)
        for _ in range(20):
            with pytest.raises(BusyError, match="no memory"):
                found.schema(answer)
    assert found.schema(answer)
