"""`/v1/completions` as harnesses that measure models use it: ids, many prompts, prompts scored. The real client."""

from __future__ import annotations

import openai
import pytest
from support.serving import KEY, serving, wait_for

PROMPTS = ["what is", "who are you?", "3 0 9"]
GREEDY = {"model": "x", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def text_of(client, prompt, **more) -> str:
    return client.completions.create(prompt=prompt, **GREEDY | more).choices[0].text


def scores_of(nano, ids: list[int]):
    """log p of each of the ids but the first, by the public Python interface."""
    from iolite.prompt import Prompt

    found = nano.logits(Prompt(ids, "")).double().log_softmax(-1)
    return [float(found[place, token]) for place, token in enumerate(ids[1:])]


def test_token_ids(client, nano):
    ids, bos = nano.tokenizer.encode(PROMPTS[1]), nano.config.text.bos_token_id
    expected = client.completions.create(prompt=PROMPTS[1], **GREEDY)
    for same in (ids, [bos, *ids], [ids]):
        found = client.completions.create(prompt=same, **GREEDY)
        assert found.choices[0].text == expected.choices[0].text
        assert found.usage.prompt_tokens == expected.usage.prompt_tokens == len(ids) + 1


def test_many_prompts(client, nano):
    expected = [text_of(client, prompt) for prompt in PROMPTS]
    ids = [nano.tokenizer.encode(prompt) for prompt in PROMPTS]
    for prompts in (PROMPTS, ids):
        found = client.completions.create(prompt=prompts, **GREEDY)
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        assert [choice.text for choice in found.choices] == expected
        assert found.usage.prompt_tokens == sum(map(len, ids)) + 3
        assert found.usage.completion_tokens <= 18
    several = {"n": 2, "seed": 7, "temperature": 3.0, "top_p": 1}
    apart = [choice.text for prompt in PROMPTS for choice in
             client.completions.create(prompt=prompt, **GREEDY | several).choices]  # fmt: skip
    found = client.completions.create(prompt=PROMPTS, **GREEDY | several)
    assert [choice.text for choice in found.choices] == apart
    assert len(set(apart)) > 3
    chunks = client.completions.create(
        prompt=PROMPTS, stream=True, stream_options={"include_usage": True}, **GREEDY | several
    )
    texts = [""] * 6
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == apart
    assert chunk.usage.prompt_tokens == found.usage.prompt_tokens


@pytest.mark.parametrize(
    ("more", "about"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [[]]}, "no tokens"),
        ({"prompt": [10**6]}, "vocabulary"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": ["a", "<|image|>"]}, "placeholder"),
        ({"prompt": ["a"] * 69}, "69 answers"),
        ({"prompt": ["a"] * 9, "n": 8}, "72 answers"),
        ({"prompt": "a", "max_tokens": 0}, "echo"),
        ({"prompt": "a", "max_tokens": 0, "echo": True, "stream": True}, "stream"),
        ({"prompt": "word " * 5000, "echo": True, "logprobs": 1}, "context"),
    ],
)
def test_prompts_that_are_refused(client, server, more, about):
    with pytest.raises(openai.BadRequestError, match=about):
        client.completions.create(**GREEDY | more)
    wait_for(lambda: server.app.state.service.answers._places == 0)


def test_echo(client, nano):
    ids = nano.tokenizer.encode(PROMPTS[0])
    answer = text_of(client, PROMPTS[0])
    for prompt in (PROMPTS[0], ids):
        assert text_of(client, prompt, echo=True) == PROMPTS[0] + answer
        assert text_of(client, prompt, echo=True, max_tokens=0) == PROMPTS[0]
        chunks = list(client.completions.create(prompt=prompt, echo=True, stream=True, **GREEDY))
        assert chunks[0].choices[0].text == PROMPTS[0]
        assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPTS[0] + answer
    assert text_of(client, "<bos>a", echo=True, max_tokens=0) == "<bos>a"


def test_how_likely_a_prompt_is(client, nano):
    bos, ids = nano.config.text.bos_token_id, nano.tokenizer.encode("what number is this? " * 30)
    expected = scores_of(nano, [bos, *ids])
    for prompt, first in ((ids, 1), ([bos, *ids], 0), ("what number is this? " * 30, 1)):
        choice = client.completions.create(model="x", prompt=prompt, echo=True, logprobs=2, max_tokens=0).choices[0]
        found = choice.logprobs
        assert "".join(found.tokens) == choice.text
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert found.token_logprobs[1:] == pytest.approx(expected[first:], abs=1e-3)
        assert all(
            top[token] == value and len(top) in (2, 3)
            for token, value, top in zip(
                found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True
            )
        )
        for token, start in zip(found.tokens, found.text_offset, strict=True):
            assert choice.text[start:].startswith(token)
        assert choice.finish_reason == "length"
    assert client.completions.create(model="x", prompt="", echo=True, logprobs=0, max_tokens=0).choices[0].text == ""


def test_prompts_and_their_answers_are_scored_in_one_list(client):
    settings = GREEDY | {"prompt": PROMPTS, "echo": True, "logprobs": 1}
    whole = client.completions.create(**settings)
    for choice, prompt in zip(whole.choices, PROMPTS, strict=True):
        told = choice.logprobs
        alone = client.completions.create(**GREEDY | {"prompt": prompt, "logprobs": 1}).choices[0]
        assert choice.text == prompt + alone.text
        assert told.text_offset[-1] >= len(prompt)
        count = len(alone.logprobs.tokens)
        text = [start for start in told.text_offset if len(prompt) <= start < len(choice.text)]
        assert len(text) == count
        end = len(told.tokens) - (choice.finish_reason == "stop")
        assert told.token_logprobs[end - count : end] == pytest.approx(alone.logprobs.token_logprobs, abs=1e-3)
    streamed = [[] for _ in PROMPTS]
    for chunk in client.completions.create(stream=True, **settings):
        for choice in chunk.choices:
            if choice.logprobs:
                streamed[choice.index] += zip(
                    choice.logprobs.tokens, choice.logprobs.text_offset, choice.logprobs.token_logprobs, strict=True
                )
    for choice, found in zip(whole.choices, streamed, strict=True):
        assert [token for token, _, _ in found] == choice.logprobs.tokens
        assert [start for _, start, _ in found] == choice.logprobs.text_offset


def test_what_a_harness_asks(script, scripted):
    """lm-evaluation-harness takes the last of the tokens for the one that was drawn, also where it ends the answer."""
    encode = script.model.tokenizer.encode
    context, end = encode("what number "), encode("is this?")
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key=KEY, max_retries=0) as client:
        script.say("")
        found = client.completions.create(
            model="x", prompt=[[*context, *end]], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
        ).choices[0]
    told = found.logprobs
    assert found.finish_reason == "stop" and found.text == "what number is this?"
    assert told.tokens[-1] == "<turn|>"
    assert len(told.token_logprobs[len(context) : -1]) == len(end)
    assert len(told.tokens) == len(told.top_logprobs) == len(told.text_offset) == len(context) + len(end) + 1


def test_scoring_takes_a_place(nano, monkeypatch):
    with serving(nano, slots=1, waiting=0) as listener:
        monkeypatch.setattr(listener.app.state.service.answers, "_places", 1)
        client = openai.OpenAI(base_url=f"{listener.url}/v1", api_key=KEY, max_retries=0)
        with client, pytest.raises(openai.RateLimitError):
            client.completions.create(model="x", prompt="a", echo=True, logprobs=1, max_tokens=0)
