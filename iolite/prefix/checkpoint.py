"""A place in a sequence that can be gone back to after the rings of the sliding layers were overwritten.

A ring holds its window and some slack. An answer, or the thoughts before it, may be longer than the slack, and the next
prompt may leave them out: without the rows around the end of the prompt the whole sequence would have to be read again.
They are copied just before they would be lost, which few answers come to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from iolite.cache import KVCache


class Checkpoint:
    """The rows that the rings of a cache need at lengths from `earliest` to `length`."""

    def __init__(self, length: int, earliest: int, rows: Sequence[Sequence[Tensor]]) -> None:
        """rows: of the stores of each ring, the last of them that of position length - 1."""
        self.length, self.earliest, self._rows = length, earliest, rows

    @classmethod
    @torch.inference_mode()
    def of(cls, cache: KVCache, length: int, margin: int) -> Checkpoint:
        """Copied from a cache that can still go back to `length`; reaches `margin` tokens further back, if it can."""
        assert cache.earliest <= length <= cache.length
        firsts = [max(ring.oldest, length - margin - ring.window + 1) for ring in cache.rings]
        rows = [ring.last(length, length - first) for ring, first in zip(cache.rings, firsts, strict=True)]
        reached = [first + ring.window - 1 if first else 0 for ring, first in zip(cache.rings, firsts, strict=True)]
        return cls(length, max(reached, default=0), rows)

    @property
    def num_bytes(self) -> int:
        return sum(store.numel() * store.element_size() for rows in self._rows for store in rows)

    def reaches(self, length: int) -> bool:
        return self.earliest <= length <= self.length

    @torch.inference_mode()
    def restore(self, cache: KVCache, length: int) -> None:
        """Takes the sequence back to a length that the checkpoint reaches. The cache is the one that it was made from,
        which has gone on since."""
        assert self.reaches(length) and self.length <= cache.length
        for ring, rows in zip(cache.rings, self._rows, strict=True):
            first = self.length - rows[0].shape[0]
            ring.write(rows, first)
            ring.oldest = first
        cache.length = length

    def state(self) -> dict[str, Tensor]:
        """What a file has to keep beside the two lengths, by name."""
        return {f"{i}.{j}": store for i, rows in enumerate(self._rows) for j, store in enumerate(rows)}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], length: int, earliest: int, cache: KVCache) -> Checkpoint:
        """What `state` gave, for a cache that has taken up its own. Raises ValueError for tensors of other forms."""
        names = {f"{i}.{j}" for i, ring in enumerate(cache.rings) for j in range(len(ring.stores))}
        if set(tensors) != names or not 0 <= earliest <= length <= cache.length:
            raise ValueError(f"not the checkpoint of this cache: {length} of {cache.length} tokens")
        rows = [[tensors[f"{i}.{j}"] for j in range(len(ring.stores))] for i, ring in enumerate(cache.rings)]
        for ring, own in zip(cache.rings, rows, strict=True):
            count = own[0].shape[0]
            if count > min(length, ring.limit) or (count < length and earliest - (length - count) < ring.window - 1):
                raise ValueError(f"a checkpoint of {count} rows for lengths from {earliest} to {length}")
            for store, row in zip(ring.stores, own, strict=True):
                if row.shape != (count, *store.shape[1:]) or row.dtype != store.dtype:
                    raise ValueError(f"rows of shape {tuple(row.shape)} in {row.dtype}")
        device = cache.rings[0].stores[0].device if cache.rings else None
        return cls(length, earliest, [[row.to(device, copy=True) for row in own] for own in rows])
