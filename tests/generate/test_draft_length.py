"""How many drafts are proposed: with costs that are known and drafters whose quality is known, on a clock that counts
what the costs say. Nothing here is timed."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from iolite.generate.acceptance import Acceptance, first_guess, sureness
from iolite.generate.costs import Costs, measure
from iolite.generate.reply import Drafting
from iolite.generate.speculative import Speculator

# Of the 12B in 4 bits on two cores: passes of 1 to 9 tokens, and a drafter's step.
TWO_CORES = (1.0, 1.02, 1.04, 1.08, 1.2, 1.32, 1.45, 1.59, 1.9)
STEP = 0.08


class Fixed(Costs):
    """What drafts cost is known: they are not made by a network whose time would tell."""

    def saw_drafts(self, steps, contexts, seconds):
        pass


class Coin(Speculator):
    """A drafter whose guesses are right with a chance, if those before them were. It says how sure it is, or not."""

    def __init__(self, chance: float, says: float | None = None, costs: Costs | None = None) -> None:
        super().__init__(None, costs or Fixed(list(TWO_CORES), [0.0] * 9, STEP), SimpleNamespace(), copies=False)
        self.chance, self.says, self.random, self.steps = chance, says, random.Random(0), 0

    def chains(self, sequences):
        coin = self

        class Chains:
            count = len(sequences)

            def step(self):
                coin.steps += 1
                says = coin.chance if coin.says is None else coin.says
                right = [int(coin.random.random() < coin.chance) for _ in range(self.count)]
                return torch.tensor(right), torch.full((self.count,), says)

            def keep(self, rows):
                self.count = len(rows)

        return Chains()


def sequence(drafts: int | None = None, left: int = 10**9, length: int = 100):
    cache = SimpleNamespace(length=length)
    return SimpleNamespace(
        cache=cache, drafts=drafts, left=left, ids=[0], drafting=Drafting(), lookup=None, stop_ids=frozenset()
    )


def run(coin: Coin, rounds: int, drafts: int | None = None) -> tuple[float, float]:
    """(tokens drawn, time taken in plain passes), both a round."""
    one, tokens, seconds = sequence(drafts), 0, 0.0
    for _ in range(rounds):
        before = coin.steps
        (proposal,) = coin.propose([one])
        accepted = next((i for i, token in enumerate(proposal.tokens) if token != 1), len(proposal.tokens))
        coin.learn(proposal, [1] * (accepted + 1))
        tokens += 1 + accepted
        seconds += TWO_CORES[len(proposal.tokens)] + STEP * (coin.steps - before)
    return tokens / rounds, seconds / rounds


@pytest.mark.parametrize("says", [0.0, 0.1, 0.5, 0.9])
def test_a_useless_drafter_costs_next_to_nothing(says):
    """However sure it is of itself. Over 64 tokens, learning included, and over many."""
    for rounds in (64, 4000):
        tokens, seconds = run(Coin(0.0, says), rounds)
        assert tokens == 1
        assert seconds <= 1 / 0.97


@pytest.mark.parametrize("chance", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_about_as_fast_as_the_best_fixed_number(chance):
    """The best number is not known beforehand, and learning it costs a little: 5 %."""
    best = max(tokens / seconds for tokens, seconds in (run(Coin(chance), 4000, drafts) for drafts in range(9)))
    tokens, seconds = run(Coin(chance), 4000)
    assert tokens / seconds >= 0.95 * best


def test_a_perfect_drafter_is_used_as_far_as_passes_go():
    tokens, seconds = run(Coin(1.0), 400)
    assert tokens / seconds >= 0.95 * max((1 + k) / (TWO_CORES[k] + k * STEP) for k in range(9))


def test_a_drafter_that_becomes_good_is_noticed():
    coin = Coin(0.0, 0.5)
    run(coin, 1000)
    coin.chance = coin.says = 0.9
    run(coin, 300)
    tokens, seconds = run(coin, 1000)
    assert tokens / seconds > 1.8


def test_a_drafter_that_knows_when_it_is_right_is_stopped_early():
    """Half of its guesses are right and it knows which: the wrong ones are not judged."""
    coin = Coin(0.5)
    proposed, right = 0, 0
    for i in range(1000):
        coin.chance = coin.says = float(i % 2)
        (proposal,) = coin.propose([sequence()])
        coin.learn(proposal, [1] * 9)
        proposed, right = proposed + len(proposal.tokens), right + sum(proposal.tokens)
    assert right > 0.9 * proposed > 0


def test_a_number_that_was_asked_for_is_kept():
    coin = Coin(0.0, 0.0)
    assert len(coin.propose([sequence(drafts=5)])[0].tokens) == 5
    assert len(coin.propose([sequence(drafts=0)])[0].tokens) == 0
    assert len(coin.propose([sequence(drafts=8, left=4)])[0].tokens) == 3  # the pass itself draws the last one


def test_sequences_have_their_own_numbers():
    coin = Coin(0.9)
    asked = [2, None, 0, 7]
    counts = [len(proposal.tokens) for proposal in coin.propose([sequence(drafts) for drafts in asked])]
    assert counts[0] == 2 and counts[2] == 0 and counts[3] == 7
    assert 1 <= counts[1] <= 8


def test_nothing_is_drafted_behind_an_end_token():
    one = sequence(drafts=8)
    one.stop_ids = frozenset({1})
    assert Coin(1.0).propose([one])[0].tokens == [1]


def test_few_drafts_where_context_makes_every_token_dear():
    """At 260,000 tokens attention of a 12B costs as much as its weights, for each token of a pass."""
    costs = Fixed(list(TWO_CORES), [n * 1.0 / 260_000 for n in range(1, 10)], STEP)
    near, far = Coin(0.6, costs=costs), Coin(0.6, costs=costs)
    counts = []
    for coin, length in ((near, 100), (far, 260_000)):
        lengths = []
        for _ in range(300):
            (proposal,) = coin.propose([sequence(length=length)])
            accepted = next((i for i, token in enumerate(proposal.tokens) if token != 1), len(proposal.tokens))
            coin.learn(proposal, [1] * (accepted + 1))
            lengths.append(len(proposal.tokens))
        counts.append(sum(lengths[100:]))
    assert counts[1] < counts[0] / 2


def test_rates_follow_what_is_seen():
    rates = Acceptance()
    key = ("depth", 1)
    assert rates.rate(key) == first_guess(key) == 0.6
    for _ in range(200):
        rates.saw(key, 1.0)
    assert rates.rate(key) > 0.97
    for _ in range(60):
        rates.saw(key, 0.0)
    assert rates.rate(key) < 0.4
    for _ in range(2000):
        rates.passed_over(key)
    assert rates.rate(key) == pytest.approx(0.6, abs=0.01)
    assert [sureness(p)[1] for p in (0.0, 0.05, 0.1, 0.99, 1.0)] == [0, 0, 1, 9, 9]


def test_costs_follow_the_machine():
    """A machine that has become twice as slow changes all passes; one kind of pass that is dearer than it was measured
    is found out."""
    costs = Costs([1.0, 1.1, 1.2], [0.0] * 3, 0.1)
    for _ in range(100):
        costs.saw([1], [0], 2.0)
    assert costs.of_pass([1], [0]) == pytest.approx(2.0, rel=0.02)
    assert costs.of_pass([3], [0]) == pytest.approx(2.4, rel=0.3)
    for _ in range(300):
        costs.saw([1], [0], 2.0)
        costs.saw([3], [0], 3.6)
    assert costs.of_pass([3], [0]) / costs.of_pass([1], [0]) == pytest.approx(1.8, rel=0.05)
    one_hiccup = costs.of_pass([1], [0])
    costs.saw([1], [0], 500.0)
    assert costs.of_pass([1], [0]) < 1.3 * one_hiccup


def test_the_cost_of_drafts_is_learnt():
    costs = Costs([1.0, 1.1], [0.0] * 2, 0.1)
    for _ in range(200):
        costs.saw_drafts(3, [0], 0.6)
    assert costs.of_draft([0]) == pytest.approx(0.2, rel=0.02)


def test_costs_of_several_sequences_add_up():
    costs = Costs([1.0, 1.1, 1.2], [0.01, 0.02, 0.03], 0.1, 0.001)
    assert costs.of_pass([1, 2], [10, 100]) == pytest.approx(1.2 + 0.1 + 2.0)
    assert costs.of_pass([3, 2], [0, 0]) == pytest.approx(1.4)  # beyond what was measured, as it went on
    assert costs.of_draft([10, 20]) == pytest.approx(0.13)


@pytest.mark.parametrize("kv", [None, torch.bfloat16, torch.int8])
def test_measured_costs_rise_with_tokens(load_tiny, kv):
    costs = measure(load_tiny("published"), None, kv)
    assert len(costs.passes) == len(costs.context) == 9
    assert all(0 < a <= b for values in (costs.passes, costs.context) for a, b in pairwise(values))
    assert costs.draft == costs.draft_context == 0
