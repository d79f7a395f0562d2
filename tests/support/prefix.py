"""Prompts of random ids, and reading them through a `PrefixCache` beside a model that has read nothing before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iolite.generate.loop import advance, prompt_logits
from iolite.model.prefill import prefill
from iolite.model.unified import Unified
from iolite.prefix.memory import PrefixCache
from iolite.prompt import Prompt
from support.compare import sample_for

NAME = "published"
SLACK, CHUNK = 24, 10  # so that the rings of a window of 16 are overwritten soon


def text(*runs: tuple[int, int]) -> list[int]:
    """(seed, tokens) runs of random ids of text; equal runs are equal."""
    made = []
    for seed, count in runs:
        rng = torch.Generator().manual_seed(seed)
        made += torch.randint(20, 96, (count,), generator=rng).tolist()
    return made


def prompt_of(*runs: tuple[int, int]) -> Prompt:
    return Prompt([2, *text(*runs)], "")


def with_media(*pieces, seed: int = 0) -> Prompt:
    prompt = sample_for(NAME, *pieces, seed=seed).prompt()
    return replace(prompt, spans=tuple(replace(s, digest=f"{seed} {s.digest}") for s in prompt.spans))


def joined(*prompts: Prompt) -> Prompt:
    """Prompts end to end, the later ones without what begins a text."""
    ids, spans = list(prompts[0].ids), list(prompts[0].spans)
    for prompt in prompts[1:]:
        spans += [replace(s, start=s.start - 1 + len(ids)) for s in prompt.spans]
        ids += prompt.ids[1:]
    return Prompt(ids, "", tuple(spans))


@dataclass
class Reader:
    """Reads prompts with one model, going on from what its store holds."""

    network: Unified
    prefixes: PrefixCache

    def __call__(self, prompt: Prompt, answer: Sequence[int] = ()) -> int:
        """Reads a prompt and then an answer, token by token; checks every score against reading it all at once. Returns
        how many tokens were found."""
        ids, scores = list(prompt.ids), []
        with torch.inference_mode(), self.prefixes.lend(prompt, ids) as lease:
            most = max([CHUNK, *(span.length for span in prompt.spans)])
            lease.before_pass(most)
            for hidden in prefill(self.network, prompt, lease.cache, chunk_size=CHUNK):
                scores.append(self.network.logits(hidden))
                lease.before_pass(most)
            for token in answer:
                ids.append(token)
                lease.before_pass(1)
                scores.append(self.network.logits(advance(self.network, token, lease.cache)))
        found = torch.cat(scores)
        assert len(found) == len(ids) - lease.reused >= 1
        # Sums of float32 in other orders: the tolerance of the passes in chunks against whole ones.
        wanted = self.whole(replace(prompt, ids=ids))[lease.reused :]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        return lease.reused

    def whole(self, prompt: Prompt) -> Tensor:
        return prompt_logits(self.network, prompt)
