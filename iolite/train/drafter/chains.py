"""Chains of drafts over dialogues that were read already: all of a batch at once, and with a gradient.

A chain starts at a token t of a reply: t is the newest token, the cache would end just before it, and step i guesses
token t + i. Step 1 takes token t and the model's hidden state at t - 1; step i takes token t + i - 1, the true one, and
what the drafter itself has projected in step i - 1. In use a wrong draft ends the chain, so up to there a true token is
what the drafter has drafted: the numbers of accepted drafts are those of use, for every start at once.

Letters: n chains, S steps, B dialogues, T longest of them, C most chains of one, H query heads, K key-value heads,
D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from iolite.config import SLIDING
from iolite.model.drafter import Drafter, Look
from iolite.model.unified import Unified
from iolite.train.data import dense_attention
from iolite.train.drafter.reading import Reading


@dataclass(frozen=True)
class Chains:
    """Where chains start, in the order of the dialogues, and what their steps are about; indices into the stream."""

    owners: Tensor  # [n], which dialogue
    positions: Tensor  # [n], of token t in its own dialogue
    newest: Tensor  # [n], the same in the stream
    inputs: Tensor  # [S, n], the token that a step takes; what it guesses is the next one
    real: Tensor  # bool [S, n], whether there is such a token to guess

    @property
    def steps(self) -> int:
        return len(self.inputs)

    def truth(self, reading: Reading) -> Tensor:
        """[S, n], the tokens to guess; any token where there is none."""
        return reading.ids[(self.inputs + 1).clamp(max=len(reading.ids) - 1)]


def chains(reading: Reading, steps: int, most: int | None = None, generator: torch.Generator | None = None) -> Chains:
    """A chain at every token of every reply but its last; or `most` of them, drawn by the generator."""
    device = reading.ids.device
    owners, positions, newest, left = [], [], [], []
    for number, (dialogue, start) in enumerate(zip(reading.dialogues, reading.starts, strict=True)):
        at = torch.arange(len(dialogue.prompt.ids), dialogue.length - 1)
        owners.append(torch.full_like(at, number))
        positions.append(at)
        newest.append(at + start)
        left.append(dialogue.length - 1 - at)  # tokens behind t
    found = [torch.cat(parts) for parts in (owners, positions, newest, left)]
    if most is not None and len(found[0]) > most:
        some = torch.randperm(len(found[0]), generator=generator)[:most].sort().values
        found = [part[some] for part in found]
    own, at, where, behind = (part.to(device) for part in found)
    ahead = torch.arange(steps, device=device)[:, None]
    real = ahead < behind
    return Chains(own, at, where, torch.where(real, where + ahead, where), real)


class ChainView:
    """What `iolite.model.drafter` asks of its surroundings (its `View`), for chains.

    A chain at position t sees the keys before t of its own dialogue, on sliding layers the `window` - 1 last of them:
    what `CachedView` sees in a cache that ends before t. Dialogues are padded to a rectangle.
    """

    def __init__(self, reading: Reading, found: Chains, window: int) -> None:
        self.positions, self._reading = found.positions, reading
        used, rows, counts = found.owners.unique_consecutive(return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts
        columns = torch.arange(len(rows), device=rows.device) - first[rows]
        self._shape = len(used), int(counts.max())  # B, C
        self._places = rows * self._shape[1] + columns  # of each chain in [B * C]
        device = found.positions.device
        starts = torch.tensor(reading.starts, device=device)[used]
        sizes = torch.tensor([d.length for d in reading.dialogues], device=device)[used]
        keys = torch.arange(int(sizes.max()), device=device)
        self._rows = starts[:, None] + torch.minimum(keys, sizes[:, None] - 1)  # [B, T]
        at = torch.ones(len(used) * self._shape[1], dtype=torch.int64, device=device)  # padding sees the first key
        at[self._places] = found.positions
        before = keys < at.view(*self._shape, 1)  # [B, C, T]; keys of padding lie behind every position
        near = keys > at.view(*self._shape, 1) - window
        self._masks = {kind: (before & near if kind == SLIDING else before)[:, None] for kind in reading.kept}
        self._keys: dict[str, tuple[Tensor, Tensor]] = {}

    def look(self, kind: str) -> Look:
        if kind not in self._keys:
            k, v = self._reading.kept[kind]
            self._keys[kind] = k[self._rows], v[self._rows]  # [B, T, K, D]
        k, v = self._keys[kind]

        def look(q: Tensor) -> Tensor:
            rows = q.new_zeros(self._shape[0] * self._shape[1], *q.shape[1:]).index_copy(0, self._places, q)
            seen = dense_attention(rows.unflatten(0, self._shape), k.to(q.dtype), v.to(q.dtype), self._masks[kind])
            return seen.flatten(0, 1)[self._places]

        return look


def unroll(drafter: Drafter, network: Unified, reading: Reading, found: Chains) -> Iterator[Tensor]:
    """Scores [n, V] of every step, with a gradient through all steps into the drafter's weights only."""
    view = ChainView(reading, found, network.config.text.sliding_window)
    hidden = reading.hidden[found.newest - 1]
    for inputs in found.inputs:
        with torch.no_grad():
            embedded = network.language_model.embed(reading.ids[inputs])
        scores, hidden = drafter(embedded, hidden, view)
        yield scores


def kept_drafts(scores: Tensor, truth: Tensor, real: Tensor) -> Tensor:
    """[n]: how many drafts a greedy model keeps, by scores [S, n, V] of chains: those before the first wrong one."""
    hits = (scores.argmax(-1) == truth) & real
    return hits.cumprod(0).sum(0)
