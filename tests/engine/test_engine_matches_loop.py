"""In any company, at any step, with any drafts, each answer is the one that `Decoding` gives by itself."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.compare import sample_for
from support.drafting import CHEAP, Scripted
from support.engine import Stepped, assert_same, ids, model_of, plain
from support.oracle import Audio, Image, Text, Video
from support.tiny_drafter import save_reference_drafter

import iolite
from iolite.checkpoint.drafter import load_drafter
from iolite.engine.engine import Engine
from iolite.generate.sampling import SamplingParams
from iolite.generate.speculative import Speculator

PIECES = (
    (Text(5),),
    (Text(31),),
    (Text(3), Image(4, 3), Text(2)),
    (Text(2), Audio(9), Text(1), Image(2, 2), Image(5, 2)),
    (Video(2, 3, 2), Text(4)),
    (Text(150), Image(6, 5), Text(20)),
)
SETTINGS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.3, "repetition_penalty": 1.3, "logit_bias": {30: 2.0, 41: -5.0}, "suppress_tokens": (25, 26)},
)


def requests(name, count, seed):
    """(prompt, params) of a random mix; the same prompt comes again with other settings, and so finds what was read."""
    rng = random.Random(seed)
    for i in range(count):
        kind = rng.randrange(4)
        prompt = sample_for(name, *rng.choice(PIECES), seed=kind).prompt()
        prompt = replace(prompt, spans=tuple(replace(s, digest=f"{kind} {s.digest}") for s in prompt.spans))
        stops = frozenset(rng.sample(range(20, 96), 2))
        settings = rng.choice(SETTINGS)
        yield prompt, SamplingParams(**settings, seed=i, max_tokens=rng.randrange(1, 20), stop_ids=stops)


def together(model, wanted, expected, seed, slots, drafts=(None,)):
    """Submits at random steps and cancels some at random; checks every answer and that nobody is left out."""
    rng, engine, running = random.Random(seed), Stepped(model, seed, slots=slots, waiting=len(wanted)), []
    coming, cancelled = list(wanted), set()
    while coming or len(engine._scheduler):
        for _ in range(rng.choice((0, 0, 1, 3))):
            if coming:
                asked = drafts[len(running) % len(drafts)]
                running.append(engine.submit(*coming.pop(0), drafts=asked))
        engine.step()
        if rng.random() < 0.02:
            cancelled.add(at := rng.randrange(len(running)))
            running[at].cancel()
    for i, (one, (prompt, params)) in enumerate(zip(running, wanted, strict=True)):
        found = ids(one)
        assert len(found) == len(expected[i]) or i in cancelled
        assert_same(model, prompt, params, found, expected[i][: len(found)])
        assert one.count == len(found)
    stats = engine.stats()
    assert stats.finished + stats.cancelled == stats.submitted == len(wanted)
    assert stats.running == stats.waiting == stats.failed == 0
    engine.close()
    return stats


@pytest.mark.parametrize("name", ["published", "narrow", "own-values", "two-global-heads", "full-first"])
def test_random_company(load_tiny, name):
    network, wanted = load_tiny(name), list(requests(name, 24, 1))
    expected = [plain(model_of(network), *one) for one in wanted]
    for seed, slots in enumerate((1, 2, 4, 7)):
        stats = together(model_of(network), wanted, expected, seed, slots)
        assert stats.cached_tokens > 50


def test_random_company_with_drafts(load_tiny, tmp_path):
    """Drafts of a random drafter and of the text so far, and those of which many are right, each request its own."""
    name = "two-global-heads"
    network, wanted = load_tiny(name), list(requests(name, 24, 2))
    drafter = load_drafter(save_reference_drafter(name, tmp_path), dtype=torch.float32)
    expected = [plain(model_of(network), *one) for one in wanted]
    answers = [[*prompt.ids, *answer] for (prompt, _), answer in zip(wanted, expected, strict=True)]
    accepted = 0
    for seed, speculator in enumerate((
        Speculator(network, CHEAP, drafter), Speculator(network, CHEAP), Scripted(network, answers, 0.7)
    )):  # fmt: skip
        model = model_of(network, speculator)
        together(model, wanted, expected, seed, 4, drafts=(None, 1, 8, 0, 3))
    engine = Stepped(model, slots=3)
    running = [engine.submit(*one, drafts=5) for one in wanted]
    engine.finish()
    for one, answer in zip(running, expected, strict=True):
        assert len(ids(one)) == len(answer)
        assert one.drafting.tokens == len(answer) - 1  # the first token is the prompt's
        accepted += one.drafting.accepted
    assert accepted > 50


def test_caches_in_other_formats(load_tiny):
    """bfloat16 keeps what is read; rounding may then differ by more, so only that all answers end is compared."""
    network, wanted = load_tiny("published"), list(requests("published", 12, 3))
    model = model_of(network, kv_dtype=torch.bfloat16)
    engine = Stepped(model, slots=3)
    running = [engine.submit(*one) for one in wanted]
    engine.finish()
    same = sum(ids(one) == plain(model, *given) for one, given in zip(running, wanted, strict=True))
    assert same >= 10


def test_the_embedded_model_in_threads():
    """Pictures, sound and text, greedy and drawn, through the engine's own thread, chunks as its clock has them."""
    model, rng = iolite.load("nano"), np.random.default_rng(0)
    wanted = []
    for i in range(12):
        parts = [{"type": "text", "text": f"What do you see or hear, {i}?"}]
        if i % 2:
            parts.append({"type": "image", "image": rng.integers(0, 255, (48, 96, 3), np.uint8)})
        if i % 3:
            parts.append({"type": "audio", "audio": rng.standard_normal(9000, np.float32) / 20, "sampling_rate": 16000})
        temperature = 0.0 if i % 4 else 1.0
        params = model.sampling(temperature=temperature, seed=i, max_tokens=24)
        wanted.append((model.prompt([{"role": "user", "content": parts}]), params))
    expected = [plain(model, *one) for one in wanted]
    with Engine(model, slots=3) as engine:
        running = [engine.submit(*one) for one in itertools.chain(wanted, reversed(wanted))]
        answers = [*expected, *reversed(expected)]
        for one, answer in zip(running, answers, strict=True):
            assert_same(model, one.prompt, one.params, ids(one), answer)
            assert one.prefill_seconds > 0
    assert sum(one.cached_tokens for one in running) > 100
