"""Keys and values of one sequence: a growing buffer on full-attention layers, a ring of one window on sliding ones.

A layer's cache takes the new tokens' keys and values and hands back everything the new queries may need, together
with the positions, so that attention never asks which kind it talks to.

Letters: n new tokens, S tokens handed back, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from iolite.config import TextConfig

_FIRST_ROOM = 64  # tokens; doubled as needed, so that growing copies each value about once on average


class LayerCache(Protocol):
    """What attention needs from a layer's cache."""

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Stores k, v [n, K, D] of positions start..start+n and returns (k, v) [S, K, D] for the new queries."""
        ...

    def key_positions(self, start: int, n: int) -> range:
        """Positions of the S tokens that `extend` hands back for n new ones, in order."""
        ...

    @property
    def num_bytes(self) -> int: ...


class _Rows:
    """A [room, K, D] buffer pair that grows up to a limit, so a short chat does not pay for a long context."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def reserve(self, rows: int, like: Tensor) -> None:
        room = 0 if self.k is None else self.k.shape[0]
        if rows <= room:
            return
        rows = min(self.limit, max(rows, 2 * room, _FIRST_ROOM))
        grown = [like.new_zeros(rows, *like.shape[1:]) for _ in range(2)]
        for new, old in zip(grown, (self.k, self.v), strict=True):
            if old is not None:
                new[:room] = old
        self.k, self.v = grown

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.k, self.v) if t is not None)


class GrowingCache(_Rows):
    """Every token of the sequence, in order: for full-attention layers."""

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        end = start + k.shape[0]
        self.reserve(end, k)
        assert self.k is not None and self.v is not None
        self.k[start:end], self.v[start:end] = k, v
        return self.k[:end], self.v[:end]

    def key_positions(self, start: int, n: int) -> range:
        return range(start + n)


class RingCache(_Rows):
    """The last `window` tokens, at row position % window: for sliding layers."""

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        n = k.shape[0]
        past = self.key_positions(start, n)[:-n]
        if n == 1 or not past:
            self._write(k, v, start)
            if n > 1:
                return k, v
            assert self.k is not None and self.v is not None
            rows = min(start + 1, self.limit)  # after the write the ring holds just this query's window, in any order
            return self.k[:rows], self.v[:rows]
        assert self.k is not None and self.v is not None
        rows_of_past = torch.arange(past.start, past.stop, device=k.device) % self.limit
        both = torch.cat((self.k[rows_of_past], k)), torch.cat((self.v[rows_of_past], v))
        self._write(k, v, start)
        return both

    def _write(self, k: Tensor, v: Tensor, start: int) -> None:
        end = start + k.shape[0]
        self.reserve(min(end, self.limit), k)
        assert self.k is not None and self.v is not None
        keep = min(k.shape[0], self.limit)  # of a long chunk only the last window survives
        rows = torch.arange(end - keep, end, device=k.device) % self.limit
        self.k[rows], self.v[rows] = k[-keep:], v[-keep:]

    def key_positions(self, start: int, n: int) -> range:
        # The first new query sees window - 1 tokens before itself; the ring still holds them all.
        return range(max(0, start - self.limit + 1), start + n)


class KVCache:
    """The caches of all layers of one sequence, and how many tokens they hold."""

    def __init__(self, config: TextConfig, max_length: int | None = None) -> None:
        self.max_length = min(max_length or config.max_position_embeddings, config.max_position_embeddings)
        self.layers: Sequence[LayerCache] = [
            GrowingCache(self.max_length) if config.is_full(i) else RingCache(config.sliding_window)
            for i in range(config.num_hidden_layers)
        ]
        self.length = 0

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)
