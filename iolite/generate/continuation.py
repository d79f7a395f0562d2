"""A sequence that is being drawn, and the one rule by which drafts become part of it.

A drafted token is taken if it is the very token that the sampler draws at its place, from the model's own scores, with
everything that the sampler does. So a draft changes when a token is computed and never which one: greedy answers are
the same token for token, and drawn ones have the model's distribution, whatever the drafts are. (The rule of Leviathan
et al., arXiv 2211.17192, for drafts that are one token and not a distribution; with the same random numbers as without
drafts.)

Letters: n tokens of a pass, M hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from iolite.cache import KVCache
from iolite.generate.logprobs import Logprobs, logprobs_of
from iolite.generate.lookup import PromptLookup
from iolite.generate.reply import Drafting
from iolite.generate.sampling import Sampler


@dataclass(eq=False)
class Continuation:
    """The prompt and what was drawn so far: all of `ids` but the newest is in the cache, once a token was drawn."""

    cache: KVCache
    ids: list[int]
    sampler: Sampler
    stop_ids: frozenset[int]
    left: int  # tokens that may still be drawn
    drafts: int | None = None  # to be proposed in a round, None: as many as pay
    hidden: Tensor | None = None  # [M], what the newest token was drawn from
    drafting: Drafting = field(default_factory=Drafting)
    logprobs: list[Logprobs | None] = field(default_factory=list)  # of what was drawn last, None: nobody asked for them
    lookup: PromptLookup = field(init=False)

    def __post_init__(self) -> None:
        self.lookup = PromptLookup(self.ids)

    @property
    def over(self) -> bool:
        return self.left == 0 or self.ids[-1] in self.stop_ids

    def take(self, drafts: Sequence[int], hidden: Tensor, logits: Tensor) -> list[int]:
        """Draws on after a pass over the newest token and its drafts, for as long as the drafts are right: hidden
        [n, M] and logits [n, V] of these n = 1 + len(drafts) tokens -> what was drawn, one token at least.

        The cache forgets the drafts that were wrong or came after the end.
        """
        first, self.logprobs = len(self.ids), []
        try:
            for i in range(len(drafts) + 1):
                self.hidden = hidden[i]
                self.ids.append(self.sampler(self.ids, logits[i]))
                self.left -= 1
                self.logprobs.append(self._logprobs(logits[i]))
                if self.over or i == len(drafts) or self.ids[-1] != drafts[i]:
                    break
        finally:  # whoever breaks this off may go on with the cache
            self.cache.rewind(len(self.ids) - 1)
        return self.ids[first:]

    def _logprobs(self, logits: Tensor) -> Logprobs | None:
        """Of the newest token, by the scores [V] that it was drawn from."""
        asked = self.sampler.params.logprobs
        return None if asked is None else logprobs_of(logits, self.ids[-1], asked)
