"""Sequences drawn together with drafts, and drafts of which it is known how many are right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from iolite.cache import KVCache
from iolite.generate.continuation import Continuation
from iolite.generate.costs import Costs
from iolite.generate.passes import Passes
from iolite.generate.sampling import Sampler, SamplingParams
from iolite.generate.speculative import Proposal, Speculator
from iolite.model.drafter import Chains, Drafter
from iolite.model.prefill import prefill
from iolite.model.unified import Unified
from iolite.prompt import Prompt

# A pass of n tokens takes 1 + n / 50 seconds, a token of context and a drafter's step nearly nothing.
CHEAP = Costs([1 + n / 50 for n in range(1, 10)], [1e-9] * 9, draft=0.01)


class Scripted(Speculator):
    """Proposes the right tokens, and wrong ones among them: each draft is right with a chance."""

    def __init__(self, network: Unified, answers: Sequence[Sequence[int]], chance: float, seed: int = 0) -> None:
        """answers: the prompts of the sequences with what plain decoding draws after them."""
        super().__init__(network, CHEAP)
        self.answers, self.chance, self.random = answers, chance, random.Random(seed)

    def propose(self, sequences: Sequence[Continuation]) -> list[Proposal]:
        return [self._guess(s.ids, min(s.drafts or 0, s.left - 1)) for s in sequences]

    def _guess(self, ids: list[int], most: int) -> Proposal:
        answer = next((a for a in self.answers if list(a[: len(ids)]) == ids), [])
        size, proposal = self.network.config.text.vocab_size, Proposal()
        for token in answer[len(ids) : len(ids) + most]:
            right = self.random.random() < self.chance
            proposal.add(token if right else self.random.randrange(size), self.chance)
        return proposal


@torch.inference_mode()
def draw(
    network: Unified,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    speculator: Speculator | None = None,
    drafts: Sequence[int | None] = (None,),
    cache: Callable[[Unified], KVCache] = lambda network: KVCache(network.config.text),
) -> list[Continuation]:
    """Draws after all prompts together, in rounds; those that are over leave. drafts: one for each prompt, or for all.
    Without a speculator each is drawn by itself, a token at a time."""
    run, found = Passes(network), []
    for i, prompt in enumerate(prompts):
        own, asked = cache(network), drafts[i % len(drafts)]
        hidden = list(prefill(network, prompt, own))[-1][-1:]
        sequence = Continuation(own, list(prompt.ids), Sampler(params), params.stop_ids, params.max_tokens, asked)
        sequence.take((), hidden, network.logits(hidden))
        found.append(sequence)
    while going := [sequence for sequence in found if not sequence.over]:
        if speculator:
            speculator.round(run, going)
            continue
        for sequence in going:
            sequence.take((), *run([sequence.cache], [sequence.ids[-1:]]))
    return found


def drafts(
    drafter: Drafter, model: Unified, tokens: Tensor, hidden: Tensor, caches: Sequence[KVCache], count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` steps of `Chains`."""
    chains = Chains(drafter, model, tokens, hidden, caches)
    for _ in range(count):
        yield chains.step()
