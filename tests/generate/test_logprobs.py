"""What is told of how likely tokens were: the softmax of the model's own scores, whatever else shapes the draw."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.compare import TOLERANCE, sample_for
from support.drafting import Scripted
from support.engine import Stepped, model_of
from support.oracle import Audio, Image, Text

import iolite
from iolite.errors import UsageError
from iolite.generate import continuation
from iolite.generate.logprobs import Logprobs, ScoredDelta, logprobs_of
from iolite.generate.loop import Decoding, prompt_logits
from iolite.generate.sampling import SamplingParams
from iolite.prompt import Prompt

SETTINGS = (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.02, "seed": 1},
    {"temperature": 1.3, "repetition_penalty": 1.3, "logit_bias": {30: 5.0}, "suppress_tokens": (25, 26), "seed": 2},
)
PROMPT = sample_for("published", Text(3), Image(4, 3), Text(2), Audio(5), Text(1)).prompt()


@pytest.fixture(scope="module")
def nano():
    return iolite.load("nano")


def drawn(network, settings, speculator=None, drafts=None):
    params = SamplingParams(**settings, max_tokens=12, logprobs=4)
    return list(Decoding(network, PROMPT, params, context=400, speculator=speculator, drafts=drafts))


def assert_logprobs(found: Logprobs, scores: torch.Tensor, token: int, count: int) -> None:
    expected = scores.double().log_softmax(-1)
    assert found.drawn == pytest.approx(float(expected[token]), abs=TOLERANCE)
    assert len({i for i, _ in found.top}) == len(found.top) == min(count, len(scores))
    assert [value for _, value in found.top] == pytest.approx(
        expected.topk(len(found.top)).values.tolist(), abs=TOLERANCE
    )
    for i, value in found.top:
        assert value == pytest.approx(float(expected[i]), abs=TOLERANCE)


def assert_of_the_model(network, tokens) -> None:
    """By one pass over the prompt and the whole answer."""
    read = Prompt([*PROMPT.ids, *(token.id for token in tokens)], "", PROMPT.spans)
    scores = prompt_logits(network, read)[len(PROMPT.ids) - 1 : -1]
    for token, row in zip(tokens, scores, strict=True):
        assert_logprobs(token.logprobs, row, token.id, 4)


@pytest.mark.parametrize("size", [1, 2, 20, 255, 256 * 21 + 5])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_the_softmax_of_scores(size, count):
    random = torch.Generator().manual_seed(size)
    for scale in (0.0, 1.0, 300.0):
        scores = scale * torch.randn(size, generator=random)
        assert_logprobs(logprobs_of(scores, size // 2, count), scores, size // 2, count)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_models_own_scores_count(load_tiny, settings):
    tokens = drawn(load_tiny("published"), settings)
    assert len(tokens) == 12
    assert_of_the_model(load_tiny("published"), tokens)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("chance", [0.5, 1.0])
def test_drafts_change_nothing(load_tiny, settings, chance):
    network = load_tiny("published")
    plain = drawn(network, settings)
    answer = [*PROMPT.ids, *(token.id for token in plain)]
    found = drawn(network, settings, Scripted(network, [answer], chance), drafts=4)
    assert [token.id for token in found] == [token.id for token in plain]
    assert_of_the_model(network, found)


def test_in_the_engine(load_tiny):
    network = load_tiny("published")
    engine = Stepped(model_of(network), slots=3)
    asked = [SamplingParams(**settings, max_tokens=12, logprobs=4) for settings in SETTINGS]
    running = [engine.submit(PROMPT, params) for params in asked]
    silent = engine.submit(PROMPT, SamplingParams(temperature=0, max_tokens=12))
    engine.finish()
    for one in running:
        assert_of_the_model(network, list(one))
    assert [token.logprobs for token in silent] == [None] * 12
    engine.close()


def test_who_does_not_ask_pays_nothing(load_tiny, monkeypatch):
    def fail(*_):
        raise AssertionError("nobody has asked")

    monkeypatch.setattr(continuation, "logprobs_of", fail)
    params = SamplingParams(temperature=0, max_tokens=3)
    tokens = list(Decoding(load_tiny("published"), PROMPT, params, context=400))
    assert [token.logprobs for token in tokens] == [None] * 3


@pytest.mark.parametrize("count", [-1, 21, True, 1.0, "3"])
def test_numbers_that_make_no_sense(count):
    with pytest.raises(UsageError, match="logprobs"):
        SamplingParams(logprobs=count)


def test_a_constraint_does_not_hide_what_the_model_thinks(nano):
    question = "who are you?"
    reply = nano.chat(question, temperature=0, grammar={"regex": "(seven|four)-(seven|four)"}, logprobs=2)
    assert "".join(token.text for token in reply.logprobs) == reply.text
    scores = nano.logits(nano.prompt(question))[-1]
    first = reply.logprobs[0]
    assert_logprobs(Logprobs(first.logprob, tuple((o.id, o.logprob) for o in first.top)), scores, first.id, 2)
    assert first.logprob < math.log(0.01)  # it would have said something else
    assert first.top[0].text == nano.chat(question, temperature=0, logprobs=0).logprobs[0].text


def test_pieces_and_replies_tell(nano):
    pieces = list(nano.generate("who are you?", temperature=0, logprobs=1))
    assert [piece.logprobs.id for piece in pieces] == [piece.id for piece in pieces]
    reply = nano.chat("who are you?", temperature=0, logprobs=1)
    assert reply.logprobs == [piece.logprobs for piece in pieces[:-1]]  # not the end token, which is no text
    told = json.loads(reply.to_json())["logprobs"]
    assert bytes(b for token in told for b in token["bytes"]).decode() == reply.text
    assert all(token["top"][0]["id"] == token["id"] for token in told)
    assert nano.chat("who are you?", max_tokens=2).logprobs is None
    assert all(piece.logprobs is None for piece in nano.generate("x", max_tokens=2))


@pytest.fixture
def say(nano, monkeypatch):
    """Has the model say a text, and reads it as a stream: the parts with their tokens, and the reply."""

    def read(text: str, **settings):
        ids = iter([*nano.tokenizer.encode(text), nano.tokenizer.token_id("<turn|>")])

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            rows = torch.zeros((hidden.shape[0], nano.config.text.vocab_size))
            rows[-1, next(ids)] = 20.0
            return rows

        monkeypatch.setattr(nano.network, "logits", logits)
        stream = nano.chat("x", stream=True, temperature=0, logprobs=0, drafts=0, **settings)
        parts = [
            (event.text, b"".join(t.bytes for t in event.logprobs)) for event in stream if type(event) is ScoredDelta
        ]
        return parts, stream.reply

    return read


def test_thoughts_and_calls_are_no_text(say):
    call = '<|tool_call>call:add{a:<|"|>x<|"|>}<tool_call|>'
    _, reply = say("<|channel>thought\nhm, well\n<channel|>so it is " + call, thinking=True)
    assert reply.text == "so it is "
    assert len(reply.tool_calls) == 1
    assert "".join(token.text for token in reply.logprobs) == reply.text


def test_tokens_come_with_the_text_that_begins_in_them(say):
    parts, reply = say("the € and 🙂🙂 are signs")
    assert all(text.encode() == spelled for text, spelled in parts)
    assert b"".join(token.bytes for token in reply.logprobs).decode() == reply.text == "the € and 🙂🙂 are signs"
    assert any(token.text == "\ufffd" for token in reply.logprobs)  # a part of a character


def test_what_a_stop_string_takes_away_is_not_told(say):
    parts, reply = say("one two three four", stop=["three"])
    assert reply.text == "one two "
    told = "".join(token.text for token in reply.logprobs)
    assert told.startswith(reply.text.rstrip())
    assert "four" not in told
    assert b"".join(spelled for _, spelled in parts).decode() == told
    held, whole = say("one two three", stop=["two five"])
    assert whole.text == "one two three"
    assert b"".join(spelled for _, spelled in held).decode() == whole.text
