"""How far a drafter gets: the passes that its model needs for answers it would give anyway, counted, not made.

Of an answer the prompt's own pass draws the first token. Then rounds follow: K drafts behind the newest token, one pass
of the model over them, which keeps those before the first wrong one and adds a token of the model's own. With the
answer known, the kept drafts of a chain from every token of it come out of one batch, and the rounds are walked.

The mean accepted length is tokens (the end token included, the first one not) / passes, the model's own token counted;
accepted drafts a pass do not count it. An answer that is one token has no pass to count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from iolite.model.drafter import Drafter
from iolite.model.unified import Unified
from iolite.train.drafter.chains import chains, kept_drafts, unroll
from iolite.train.drafter.reading import Dialogue, read

_TOKENS = 4096  # of a pass over several dialogues
_RESAMPLES = 2000


@dataclass(frozen=True)
class Rounds:
    """Of one answer, or of several."""

    tokens: int  # drawn by the passes
    passes: int
    accepted: int  # drafts

    @staticmethod
    def walk(kept: Sequence[int]) -> Rounds:
        """kept[i] drafts are right behind the i-th token of an answer; there are len(kept) tokens after its first."""
        at = passes = accepted = 0
        while at < len(kept):
            passes += 1
            accepted += kept[at]
            at += kept[at] + 1
        return Rounds(len(kept), passes, accepted)


@dataclass(frozen=True)
class Acceptance:
    """Rounds of many answers together. ci95: of the mean accepted length, by resampling answers."""

    answers: int
    tokens: int
    passes: int
    accepted: int
    best_passes: int  # if every draft were right
    ci95: tuple[float, float]

    @property
    def mean_length(self) -> float:
        return self.tokens / self.passes if self.passes else float("nan")

    @property
    def drafts_a_pass(self) -> float:
        return self.accepted / self.passes if self.passes else float("nan")

    @property
    def most(self) -> float:
        """The mean accepted length if every draft were right: short answers leave little to draft."""
        return self.tokens / self.best_passes if self.best_passes else float("nan")

    def to_dict(self) -> dict[str, object]:
        return {
            "mean_accepted_length": self.mean_length,
            "ci95": list(self.ci95),
            "accepted_drafts_a_pass": self.drafts_a_pass,
            "if_all_were_right": self.most,
            "answers": self.answers,
            "tokens": self.tokens,
            "passes": self.passes,
        }


def acceptance(rounds: Sequence[Rounds], drafts: int) -> Acceptance:
    """Sums, and an interval of the ratio of sums."""
    counts = np.array([(r.tokens, r.passes, r.accepted) for r in rounds], np.int64).reshape(-1, 3)
    tokens, passes, accepted = counts.sum(0).tolist()
    best = sum(-(-r.tokens // (drafts + 1)) for r in rounds)
    low = high = float("nan")
    if passes:
        some = np.random.default_rng(0).integers(len(counts), size=(_RESAMPLES, len(counts)))
        sums = counts[some].sum(1)
        means = sums[sums[:, 1] > 0, 0] / sums[sums[:, 1] > 0, 1]
        low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return Acceptance(len(rounds), tokens, passes, accepted, best, (low, high))


def portions(dialogues: Sequence[Dialogue]) -> Iterator[list[int]]:
    """Indices of dialogues, of like lengths together, in portions that one pass takes."""
    some: list[int] = []
    for i in sorted(range(len(dialogues)), key=lambda i: dialogues[i].length):
        if some and (len(some) + 1) * dialogues[i].length > _TOKENS:
            yield some
            some = []
        some.append(i)
    if some:
        yield some


@torch.no_grad()
def count_rounds(drafter: Drafter, network: Unified, answered: Sequence[Dialogue], drafts: int) -> list[Rounds]:
    """Of each dialogue, whose reply is the model's own greedy answer, with `drafts` tokens drafted in every round."""
    kept: list[list[int]] = [[] for _ in answered]
    for some in portions(answered):
        reading = read(network, [answered[i] for i in some])
        found = chains(reading, drafts)
        if not len(found.newest):
            continue
        scores = torch.stack(list(unroll(drafter, network, reading, found)))
        counts = kept_drafts(scores, found.truth(reading), found.real)
        for owner, count in zip(found.owners.tolist(), counts.tolist(), strict=True):
            kept[some[owner]].append(count)
    return [Rounds.walk(counts) for counts in kept]


def measure(
    drafter: Drafter, network: Unified, held_out: Mapping[str, Sequence[Dialogue]], drafts: int
) -> dict[str, Acceptance]:
    """By the name of each set of dialogues."""
    return {name: acceptance(count_rounds(drafter, network, some, drafts), drafts) for name, some in held_out.items()}
