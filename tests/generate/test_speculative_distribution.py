"""Drawn answers have the model's distribution, whatever is drafted: 200,000 continuations of three tokens a setting.

The scores are a tiny network's for every continuation there is, each computed once. What is expected is exact: the
product of the probabilities that the sampler's own `logits` give. Drafts come from a random drafter's chains, from a
source that always proposes the likeliest token, and from one that proposes at random, in turns, 0 to 3 at a time.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from support.compare import sample_for
from support.oracle import Text
from support.tiny import VOCABULARY
from support.tiny_drafter import save_reference_drafter

from iolite.cache import KVCache
from iolite.checkpoint.drafter import load_drafter
from iolite.generate.continuation import Continuation
from iolite.generate.sampling import Sampler, SamplingParams
from iolite.model.drafter import Chains
from iolite.model.prefill import prefill
from iolite.prompt import Prompt

COUNT, LENGTH = 200_000, 3
ALPHABET = (30, 41, 52, 63, 74, 85)
SETTINGS = {
    "temperature 1": SamplingParams(temperature=1.0),
    "temperature 0.6": SamplingParams(temperature=0.6),
    "top-p and penalties": SamplingParams(temperature=1.2, top_p=0.9, repetition_penalty=1.2, logit_bias={41: 0.5}),
    "grammar": SamplingParams(temperature=1.0, top_k=4),
}


def grammar(ids, logits):
    """Words over the alphabet in which no letter stands beside itself and the third never comes first."""
    banned = [ids[-1]] + ([ALPHABET[2]] if ids[-1] not in ALPHABET else [])
    return logits.index_fill(0, torch.tensor(banned), -math.inf)


class Known:
    """Scores and drafts behind a prompt and each continuation of it, computed once."""

    def __init__(self, network, drafter, prompt: Prompt) -> None:
        self.network, self.drafter, self.prompt = network, drafter, prompt
        self.logits, self.drafts = cache(self._logits), cache(self._drafts)
        self._others = torch.ones(VOCABULARY, dtype=torch.bool)
        self._others[list(ALPHABET)] = False

    @torch.inference_mode()
    def _read(self, drawn: tuple[int, ...]) -> tuple[KVCache, torch.Tensor]:
        own = KVCache(self.network.config.text)
        return own, list(prefill(self.network, Prompt([*self.prompt.ids, *drawn], ""), own))[-1][-1:]

    def _logits(self, drawn: tuple[int, ...]) -> torch.Tensor:
        """[V] of what follows; the network has no other tokens than the alphabet."""
        return self.network.logits(self._read(drawn)[1])[0].masked_fill(self._others, -math.inf)

    def _drafts(self, drawn: tuple[int, ...]) -> tuple[int, ...]:
        """Three by the drafter's chain, which starts behind the newest token."""
        own, hidden = self._read(drawn[:-1])
        chains = Chains(self.drafter, self.network, torch.tensor(drawn[-1:]), hidden, [own])
        return tuple(int(chains.step()[0]) for _ in range(LENGTH))


@pytest.fixture(scope="module")
def known(load_tiny, tmp_path_factory) -> Known:
    drafter = load_drafter(save_reference_drafter("narrow", tmp_path_factory.mktemp("narrow")), dtype=torch.float32)
    return Known(load_tiny("narrow"), drafter, sample_for("narrow", Text(12)).prompt())


def sampler_for(name: str, seed: int) -> Sampler:
    sampler = Sampler(replace(SETTINGS[name], seed=seed))
    if name == "grammar":
        sampler.processors.append(grammar)
    return sampler


@torch.inference_mode()
def expected(known: Known, name: str) -> dict[tuple[int, ...], float]:
    """The probability of every continuation."""
    sampler, found = sampler_for(name, 0), {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for drawn, share in found.items():
            ids = [*known.prompt.ids, *drawn]
            each = sampler.logits(ids, known.logits(drawn)).double().softmax(-1)
            longer |= {(*drawn, token): share * float(each[token]) for token in ALPHABET if each[token] > 0}
        found = longer
    return found


@torch.inference_mode()
def drawn(known: Known, name: str, seed: int, drafting: bool) -> Counter[tuple[int, ...]]:
    sampler, counts, dice, start = sampler_for(name, seed), Counter(), random.Random(seed), len(known.prompt.ids)
    sources = itertools.cycle(range(3))
    for _ in range(COUNT):
        ids = list(known.prompt.ids)
        sequence = Continuation(SimpleNamespace(rewind=lambda length: None), ids, sampler, frozenset(), LENGTH)
        while not sequence.over:
            so_far = tuple(ids[start:])
            most = dice.randrange(LENGTH) if drafting and so_far else 0
            drafts = propose(known, so_far, next(sources), most, dice)
            logits = torch.stack([known.logits((*so_far, *drafts[:i])) for i in range(len(drafts) + 1)])
            sequence.take(drafts, logits, logits)
        counts[tuple(ids[start:])] += 1
    return counts


def propose(known: Known, so_far: tuple[int, ...], source: int, most: int, dice: random.Random) -> tuple[int, ...]:
    if not most:
        return ()
    if source == 0:
        return known.drafts(so_far)[:most]
    if source == 1:
        return tuple(dice.choices(ALPHABET, k=most))
    found = so_far
    for _ in range(most):
        found = (*found, int(known.logits(found).argmax()))
    return found[len(so_far) :]


def chi_square_p(observed: list[float], wanted: list[float], freedom: int, spread: list[float]) -> float:
    """P(at least as far off by chance), by the regularised gamma function."""
    statistic = sum((o - e) ** 2 / s for o, e, s in zip(observed, wanted, spread, strict=True))
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_drafts_leave_the_distribution_alone(known, name):
    """Against the exact probabilities, and against as many drawn without drafts."""
    shares = expected(known, name)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
    counts = drawn(known, name, seed=11, drafting=True)
    assert set(counts) <= set(shares), "a continuation of probability 0 was drawn"
    rare = {key for key, share in shares.items() if share * COUNT < 10}  # too few for chi-square: counted together
    cells = {key: shares[key] * COUNT for key in shares.keys() - rare}
    observed = [float(counts[key]) for key in cells]
    wanted = list(cells.values())
    if rare:
        observed.append(float(sum(counts[key] for key in rare)))
        wanted.append(sum(shares[key] for key in rare) * COUNT)
    assert len(wanted) > 20
    assert chi_square_p(observed, wanted, len(wanted) - 1, wanted) > 0.01
    without = drawn(known, name, seed=12, drafting=False)
    keys = [key for key in counts.keys() | without.keys() if counts[key] + without[key] >= 20]
    first, second = [float(counts[key]) for key in keys], [float(without[key]) for key in keys]
    both = [a + b for a, b in zip(first, second, strict=True)]
    assert chi_square_p(first, second, len(keys), both) > 0.01


def test_the_rule_of_acceptance_by_ratio_would_be_found_out(known):
    """What Transformers does with drafts that are argmaxes, accepting with min(1, p / q) of its drafter's own q, is not
    the distribution; this test's measure sees it at a hundredth of the count."""
    dice, probabilities = random.Random(0), known.logits(()).double().softmax(-1)
    q, counts, count = 0.9, Counter(), COUNT // 100
    draft = int(probabilities.argmax())
    rest = probabilities.clone()
    rest[draft] = max(0.0, float(probabilities[draft]) - q)
    for _ in range(count):
        accepted = dice.random() < min(1.0, float(probabilities[draft]) / q)
        weights = rest.tolist()
        counts[draft if accepted else dice.choices(range(VOCABULARY), weights)[0]] += 1
    wanted = [float(probabilities[token]) * count for token in ALPHABET]
    observed = [float(counts[token]) for token in ALPHABET]
    assert chi_square_p(observed, wanted, len(ALPHABET) - 1, wanted) < 1e-6
