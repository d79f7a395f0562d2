"""Sampling functions against Transformers' warpers, and what they promise at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iolite.config import GenerationConfig
from iolite.errors import UsageError
from iolite.generate.sampling import (
    Sampler,
    SamplingParams,
    add_bias,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repeats,
    suppress,
)

VOCAB = 97


def random_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def reference_logits(ids: list[int], logits: torch.Tensor, **settings: float) -> torch.Tensor:
    """The same chain, by Transformers."""
    from transformers.generation import logits_process as hf

    chain = [
        hf.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]),
        hf.SuppressTokensLogitsProcessor([3, 5]),
        hf.TemperatureLogitsWarper(settings["temperature"]),
        hf.TopKLogitsWarper(settings["top_k"]),
        hf.TopPLogitsWarper(settings["top_p"]),
        hf.MinPLogitsWarper(settings["min_p"]),
    ]
    scores = logits[None]
    for step in chain:
        scores = step(torch.tensor([ids]), scores)
    return scores[0]


@pytest.mark.parametrize("seed", range(20))
def test_the_chain_gives_the_distribution_of_transformers(seed):
    generator = torch.Generator().manual_seed(seed)
    asked = {
        "repetition_penalty": 1.3,
        "temperature": 0.3 + torch.rand((), generator=generator).item(),
        "top_k": int(torch.randint(1, VOCAB, (), generator=generator)),
        "top_p": 0.3 + 0.6 * torch.rand((), generator=generator).item(),
        "min_p": 0.05,
    }
    ids = torch.randint(VOCAB, (9,), generator=generator).tolist()
    logits = random_logits(seed)
    ours = Sampler(SamplingParams(**asked, suppress_tokens=(3, 5))).logits(ids, logits).softmax(-1)
    theirs = reference_logits(ids, logits, **asked).softmax(-1)
    assert torch.equal(ours == 0, theirs == 0)
    # One softmax and one division in float32: a few roundings of 2^-24 on values of at most 1.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_greedy_takes_the_largest_and_still_obeys_bias_and_suppression():
    logits = torch.tensor([1.0, 5.0, 4.0, 3.0])
    assert Sampler(SamplingParams(temperature=0))([], logits) == 1
    assert Sampler(SamplingParams(temperature=0, suppress_tokens=(1,)))([], logits) == 2
    assert Sampler(SamplingParams(temperature=0, logit_bias={0: 10.0}))([], logits) == 0
    assert Sampler(SamplingParams(temperature=0, logit_bias={1: -math.inf}))([], logits) == 2


def test_the_same_seed_draws_the_same_tokens_and_touches_no_global_state():
    logits = random_logits()
    before = torch.random.get_rng_state()
    runs = []
    for seed in (7, 7, 8):
        sampler = Sampler(SamplingParams(seed=seed))
        runs.append([sampler([], logits) for _ in range(40)])
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_without_a_seed_two_samplers_differ():
    logits = torch.zeros(1000)
    runs = [[Sampler(SamplingParams())([], logits) for _ in range(4)] for _ in range(2)]
    assert runs[0] != runs[1]  # equal by chance once in 10^12


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    generator = torch.Generator().manual_seed(1)
    n = 4000
    counts = torch.zeros(5)
    for _ in range(n):
        counts[draw(probabilities.log(), generator)] += 1
    assert counts[1] == counts[4] == 0
    # Four standard deviations of a binomial count: 4 * sqrt(p (1 - p) / n) <= 4 * 0.5 / sqrt(4000) = 0.032.
    assert (counts / n - probabilities).abs().max() < 0.032


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(1e-6, 1), st.integers(1, 200))
def test_a_filter_always_leaves_the_likeliest_token(seed, p, min_p, k):
    logits = random_logits(seed)
    for kept in (keep_top_k(logits, k), keep_top_p(logits, p), keep_min_p(logits, min_p)):
        assert kept.argmax() == logits.argmax()
        assert torch.equal(kept[kept > -math.inf], logits[kept > -math.inf])
    assert (keep_top_k(logits, k) > -math.inf).sum() == min(k, VOCAB)


def test_top_p_sees_only_what_top_k_left():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert (keep_top_p(keep_top_k(logits, 2), 0.5) > -math.inf).tolist() == [True, False, False, False]
    assert (keep_top_p(logits, 0.5) > -math.inf).tolist() == [True, True, False, False]


def test_a_tiny_temperature_is_greedy_and_never_overflows():
    sampler = Sampler(SamplingParams(temperature=1e-38, seed=0))
    logits = random_logits()
    assert {sampler([], logits) for _ in range(5)} == {int(logits.argmax())}


def test_each_processor_leaves_its_input_as_it_was():
    logits = random_logits()
    copy = logits.clone()
    add_bias([], logits, bias={1: 2.0})
    penalise_repeats([1, 2], logits, penalty=2.0)
    suppress([], logits, tokens=(1,))
    Sampler(SamplingParams(top_k=3, top_p=0.5, min_p=0.1))([1], logits)
    assert torch.equal(logits, copy)


def test_half_precision_logits_are_shaped_in_float32():
    assert Sampler(SamplingParams()).logits([], random_logits().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": True}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": {1.5: 1.0}}, "logit_bias"),
        ({"stop_ids": 5}, "stop_ids"),
        ({"stop_ids": ["x"]}, "stop_ids"),
        ({"suppress_tokens": 5}, "suppress_tokens"),
        ({"suppress_tokens": "57"}, "suppress_tokens"),
        ({"suppress_tokens": [1.5]}, "suppress_tokens"),
        ({"temprature": 1.0}, "temprature"),
    ],
)
def test_senseless_settings_are_refused_by_name(asked, named):
    with pytest.raises(UsageError, match=named):
        SamplingParams.from_defaults(GenerationConfig(), **asked)


def test_what_is_not_asked_for_is_the_checkpoints_own():
    defaults = GenerationConfig(temperature=0.7, top_k=5, top_p=0.8, eos_token_ids=(1, 9), suppress_tokens=(4,))
    params = SamplingParams.from_defaults(defaults, top_k=None, seed=3, stop="x", logit_bias={"7": 1})
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 5, 0.8)
    assert params.stop_ids == {1, 9}
    assert (params.suppress_tokens, params.stop, params.logit_bias) == ((4,), ("x",), {7: 1})
    assert SamplingParams.from_defaults(GenerationConfig(do_sample=False)).temperature == 0
    params = SamplingParams.from_defaults(GenerationConfig(min_p=0.1, repetition_penalty=1.2))
    assert (params.min_p, params.repetition_penalty) == (0.1, 1.2)


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(UsageError, match="token 97"):
        add_bias([], random_logits(), bias={97: 1.0})


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-30])
def test_a_temperature_close_to_zero_takes_the_likeliest(temperature):
    sampler = Sampler(SamplingParams(temperature=temperature, top_p=0.9, seed=0))
    assert [sampler([0], torch.tensor([1.0, 3.0, 2.0])) for _ in range(5)] == [1] * 5
