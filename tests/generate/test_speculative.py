"""Drafts change when a token is computed, never which one: answers are those of plain decoding, whatever is drafted.

Two passes over different numbers of tokens add up in different orders, so where two tokens nearly tie, plain decoding
itself is undecided; `same` allows a difference there and nowhere else.
"""

from __future__ import annotations

import functools
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from support.compare import TOLERANCE, sample_for
from support.drafting import CHEAP, Scripted, draw
from support.oracle import Audio, Image, Text, Video
from support.tiny_drafter import DRAFTERS, save_reference_drafter

import iolite
from iolite.cache import KVCache
from iolite.checkpoint.drafter import load_drafter
from iolite.generate.continuation import Continuation
from iolite.generate.loop import Decoding
from iolite.generate.sampling import SamplingParams
from iolite.generate.speculative import Speculator
from iolite.model.prefill import prefill
from iolite.prompt import Prompt

GREEDY = SamplingParams(temperature=0, max_tokens=10)
PIECES = (
    (Text(5),),
    (Text(31),),
    (Text(3), Image(4, 3), Text(2)),
    (Text(2), Audio(9), Text(1), Image(2, 2)),
    (Video(2, 3, 2), Text(4)),
    (Text(70),),
)
CACHES = {
    "float32": lambda network: KVCache(network.config.text),
    "float32, keys and values apart": lambda network: KVCache(network.config.text, shared=False),
    "bf16": lambda network: KVCache(network.config.text, dtype=torch.bfloat16),
    "int8": lambda network: KVCache(network.config.text, dtype=torch.int8),
    "small rings": lambda network: KVCache(network.config.text, slack=10),
}
# What the order of sums may change of a logit: float32 itself, and a key that is rounded to its other neighbour
# (2^-8 of its size in bfloat16, 1/127 of its vector's largest in int8), as in test_static_step.py.
UNDECIDED = {"bf16": 5e-3, "int8": 5e-2}


@functools.cache
def prompts_for(name: str, count: int) -> list[Prompt]:
    return [sample_for(name, *PIECES[i % len(PIECES)], seed=i).prompt() for i in range(count)]


@torch.inference_mode()
def same(network, prompt: Prompt, found: Continuation, expected: Continuation, cache, undecided: float) -> bool:
    """Whether both are the same tokens; True as well from a place on where plain decoding is undecided."""
    if found.ids == expected.ids:
        return True
    at = next(i for i, (a, b) in enumerate(zip(found.ids, expected.ids, strict=False)) if a != b)
    read = Prompt(expected.ids[:at], prompt.text, prompt.spans)
    hidden = list(prefill(network, read, cache(network)))[-1][-1:]
    logits = network.logits(hidden)[0]
    gap = float(logits.max() - logits[found.ids[at]])
    assert gap <= 2 * undecided, f"token {at - len(prompt.ids)}: {found.ids[at]}, by {gap:.1e} not the likeliest"
    return False


def compare(network, prompts, speculator_for, drafts, cache_name: str, together: int) -> int:
    """Asserts that all answers are those of plain decoding; how many were compared to their ends."""
    cache, equal = CACHES[cache_name], 0
    for start in range(0, len(prompts), together):
        some = prompts[start : start + together]
        expected = draw(network, some, GREEDY, cache=cache)
        found = draw(network, some, GREEDY, speculator_for(expected), drafts, cache)
        undecided = UNDECIDED.get(cache_name, TOLERANCE)
        for prompt, one, other in zip(some, found, expected, strict=True):
            assert one.cache.length == len(one.ids) - 1
            equal += same(network, prompt, one, other, cache, undecided)
    return equal


def scripted(network, chance: float, plain: list[Continuation]) -> Scripted:
    return Scripted(network, [one.ids for one in plain], chance)


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["published", "narrow", "own-values", "two-global-heads", "full-first"])
def test_greedy_answers_with_partly_right_drafts(load_tiny, name, cache):
    """1 to 8 drafts, 1 to 4 sequences with their own number of drafts, text and media: 2,000 prompts in all."""
    network, prompts, equal = load_tiny(name), prompts_for(name, 80), 0
    for turn, drafts in enumerate([(1,), (2, 7), (3, 8, 1), (4, 5, 6, 8)]):
        chance = (0.3, 0.6, 0.8, 0.95)[turn]
        own = prompts[20 * turn : 20 * turn + 20]
        equal += compare(network, own, partial(scripted, network, chance), drafts, cache, len(drafts))
    assert equal >= 76  # near-ties are rare: in int8 about one answer in a hundred


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_answers_with_a_random_drafter_and_copies(load_tiny, tmp_path, name):
    """Both sources of drafts, at every fixed number and at the one that is chosen."""
    network = load_tiny(name)
    drafter = load_drafter(save_reference_drafter(name, tmp_path), dtype=torch.float32)
    equal, speculator = 0, Speculator(network, CHEAP, drafter)
    for turn, drafts in enumerate([(1, 4), (8,), (None,), (None, 3, 0)]):
        prompts = prompts_for(name, 24)[6 * turn : 6 * turn + 6]
        equal += compare(network, prompts, lambda plain: speculator, drafts, "float32", 3)
    equal += compare(network, prompts_for(name, 6), lambda plain: Speculator(network, CHEAP), (None,), "float32", 2)
    assert equal >= 28


def test_right_drafts_are_accepted(load_tiny):
    """All of them, and the pass's own token besides: 9 tokens in a pass."""
    network, (prompt,) = load_tiny("published"), prompts_for("published", 1)
    params = SamplingParams(temperature=0, max_tokens=28)
    (plain,) = draw(network, [prompt], params)
    (found,) = draw(network, [prompt], params, Scripted(network, [plain.ids], 1.0), [8])
    assert found.ids == plain.ids
    assert (found.drafting.passes, found.drafting.drafted, found.drafting.accepted) == (3, 24, 24)
    assert found.drafting.mean_accepted_length == 9


def test_an_answer_ends_at_an_end_token_among_the_drafts(load_tiny):
    network, prompts = load_tiny("published"), prompts_for("published", 12)
    settings = {"temperature": 1.0, "seed": 3, "max_tokens": 20}
    plain = draw(network, prompts, SamplingParams(**settings))[5].ids
    start = len(prompts[5].ids)
    end = next(at for at in range(start + 4, len(plain)) if plain[at] not in plain[start:at])
    params = SamplingParams(**settings, stop_ids=frozenset({plain[end]}))
    (found,) = draw(network, [prompts[5]], params, Scripted(network, [plain], 1.0), [8])
    assert found.ids == plain[: end + 1]
    assert found.cache.length == len(found.ids) - 1


@pytest.mark.parametrize("settings", [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.3, "repetition_penalty": 1.3, "logit_bias": {30: 2.0, 41: -5.0}, "suppress_tokens": (25, 26)},
])  # fmt: skip
def test_the_same_seed_draws_the_same_tokens(load_tiny, settings):
    """All samplers, penalties and bias in force: each token sees those before it, drafted or not."""
    network, prompts = load_tiny("two-global-heads"), prompts_for("two-global-heads", 12)
    params = SamplingParams(**settings, seed=7, max_tokens=16)
    plain = draw(network, prompts, params)
    found = draw(network, prompts, params, Scripted(network, [p.ids for p in plain], 0.7), [1, 3, 5, 8])
    assert [one.ids for one in found] == [one.ids for one in plain]
    assert sum(one.drafting.accepted for one in found) > 50


@pytest.fixture(scope="module")
def nano() -> iolite.Model:
    return iolite.load("nano", drafter="auto", dtype="float32", device="cpu")


def questions(model: iolite.Model, count: int) -> list[Prompt]:
    """With a picture, a recording, both and none."""
    rng, found = np.random.default_rng(0), []
    asked = ("What do you see or hear?", "Who are you?", "What can you do?", "What is it, and which colour?")
    for i in range(count):
        parts = [{"type": "text", "text": asked[i % len(asked)]}]
        if i % 2:
            parts.append({"type": "image", "image": rng.integers(0, 255, (48, 96, 3), np.uint8)})
        if i % 3 == 1:
            sound = rng.standard_normal(9000, np.float32) / 20
            parts.append({"type": "audio", "audio": sound, "sampling_rate": 16000})
        found.append(model.prompt([{"role": "user", "content": parts}]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
def test_greedy_answers_of_the_embedded_model_with_its_drafter(nano, cache):
    """1 to 8 drafts and as many as pay, 1 to 4 sequences together, answers that go on behind their ends."""
    prompts, equal, accepted = questions(nano, 40), 0, 0

    class Counted(Speculator):
        def learn(self, proposal, drawn):
            nonlocal accepted
            taken = super().learn(proposal, drawn)
            accepted += taken
            return taken

    speculator = Counted(nano.network, CHEAP, nano.speculator.drafter)
    for turn, drafts in enumerate([(1,), (2, 7), (3, 8, None), (4, 5, 6, None)]):
        own = prompts[10 * turn : 10 * turn + 10]
        equal += compare(nano.network, own, lambda plain: speculator, drafts, cache, len(drafts))
    assert equal >= 38
    assert accepted > 100


def test_answers_of_the_embedded_model_through_the_loop(nano):
    """One after another, with prefix reuse and one speculator for all, as a conversation has it."""
    params = SamplingParams(temperature=0, max_tokens=24, stop_ids=frozenset(nano.defaults.eos_token_ids))
    settings = {"context": nano.context, "prefixes": nano.prefixes}
    accepted = 0
    for prompt, drafts in zip(questions(nano, 16) * 2, itertools.cycle([None, 1, 4, 8]), strict=False):
        plain = [token.id for token in Decoding(nano.network, prompt, params, context=nano.context)]
        found = Decoding(nano.network, prompt, params, **settings, speculator=nano.speculator, drafts=drafts)
        assert [token.id for token in found] == plain
        assert found.drafting.tokens == len(plain) - 1
        accepted += found.drafting.accepted
    assert accepted > 30
