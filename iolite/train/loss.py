"""What training minimises: cross-entropy on the answer, and a little on words that the media themselves show.

The head is applied to the labelled rows only: a vocabulary-wide row for each of the other tokens would be most of the
work of a small model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from iolite.train.data import ANSWER, DENSE


@dataclass(frozen=True)
class Loss:
    """total is what to minimise; answer and dense are the two means that it is made of."""

    total: Tensor
    answer: Tensor
    dense: Tensor


def labelled_loss(logits: Tensor, labels: Tensor, kinds: Tensor, dense_weight: float) -> Loss:
    """logits float32 [R, vocabulary], labels and kinds [R] -> mean over answer tokens + dense_weight * mean over dense
    labels. A batch without labels of one kind has 0 for it."""
    each = F.cross_entropy(logits, labels, reduction="none")
    answer, dense = (_mean(each, kinds == kind) for kind in (ANSWER, DENSE))
    return Loss(answer + dense_weight * dense, answer.detach(), dense.detach())


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def exact_rows(logits: Tensor, labels: Tensor, owners: Tensor, num_owners: int) -> Tensor:
    """bool [num_owners]: whether every label of an owner is its row's most likely token. With the true answer fed in
    this is the same event as "greedy decoding gives the answer"."""
    wrong = (logits.argmax(-1) != labels).to(torch.int64)
    return torch.zeros(num_owners, dtype=torch.int64).index_add_(0, owners, wrong) == 0
