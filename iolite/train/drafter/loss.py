"""What a drafter minimises: cross-entropy against its model's own distribution, each step weighted by what hangs on it.

Let q_i be the probability that step i gives to the true token. A draft counts only if all before it were right, so a
chain is worth E = q_1 + q_1 q_2 + q_1 q_2 q_3 + … accepted drafts, and

    dE/dq_i = (q_1 … q_{i-1}) * (1 + q_{i+1} + q_{i+1} q_{i+2} + …)

: the chance that step i is reached, times the drafts that its being right brings. That is the weight of step i here,
held constant in the gradient; in place of q_i itself its logarithm is raised (cross-entropy), whose gradient does not
vanish where q_i is small. Deep steps would learn nothing before the shallow ones are right, so every weight is at least
FLOOR.

The labels are soft: what the model would draw there, at temperature 1, with all its doubts. A token of the data need
not be what the model says.

Letters: n chains, S steps, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from iolite.train.drafter.chains import kept_drafts

FLOOR = 0.1


@dataclass(frozen=True)
class ChainLoss:
    """total is what to minimise; accepted is the mean number of drafts that would be kept of a chain."""

    total: Tensor
    accepted: Tensor


def step_weights(chances: Tensor, real: Tensor) -> Tensor:
    """[S, n] from the probabilities of the true tokens [S, n]; 0 where there is no token to guess."""
    chances = chances.detach() * real
    reached = torch.cat((torch.ones_like(chances[:1]), chances[:-1])).cumprod(0)
    ahead = torch.zeros_like(chances)
    for i in range(len(chances) - 2, -1, -1):
        ahead[i] = chances[i + 1] * (1 + ahead[i + 1])
    return (reached * (1 + ahead)).clamp(min=FLOOR) * real


def soft_cross_entropy(scores: Tensor, wanted: Tensor) -> Tensor:
    """[n]: of scores [n, V] against probabilities [n, V], both float32."""
    return -(wanted * scores.log_softmax(-1)).sum(-1)


def hard_cross_entropy(scores: Tensor, wanted: Tensor) -> Tensor:
    """The same against the likeliest token alone."""
    return F.cross_entropy(scores, wanted.argmax(-1), reduction="none")


def chain_loss(scores: Tensor, wanted: Tensor, truth: Tensor, real: Tensor, *, soft: bool = True) -> ChainLoss:
    """scores and the model's probabilities [S, n, V], true tokens and whether there are any [S, n]."""
    cross_entropy = soft_cross_entropy if soft else hard_cross_entropy
    each = torch.stack([cross_entropy(s, w) for s, w in zip(scores, wanted, strict=True)])
    with torch.no_grad():
        chosen = scores.gather(-1, truth[..., None])[..., 0]
        weights = step_weights((chosen - scores.logsumexp(-1)).exp(), real)
        accepted = kept_drafts(scores, truth, real).float().mean()
    return ChainLoss((weights * each).sum() / weights.sum().clamp(min=FLOOR), accepted)
