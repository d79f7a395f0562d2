"""Keys and values of one sequence: a growing buffer on full-attention layers, a ring on sliding ones.

A layer's cache takes the new tokens' keys and values and hands back everything that the new queries may need as
`Keys`: buffers, and in which rows of them the keys lie, so that attention reads them where they are.

Letters: n new tokens, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from iolite.config import TextConfig
from iolite.kernels.contracts import Keys

_FIRST_ROOM = 64  # tokens; doubled as needed, so that growing copies each value about once on average
SLACK = 64  # tokens a ring holds beyond its window: a pass of up to 65 is written and read in place


class LayerCache(Protocol):
    """What attention needs from a layer's cache."""

    def extend(self, k: Tensor, v: Tensor, start: int) -> Keys:
        """Stores k, v [n, K, D] of positions start..start+n and returns what the new queries may look at."""
        ...

    @property
    def num_bytes(self) -> int: ...


class _Rows:
    """A [rows, K, D] buffer pair that grows up to a limit, so a short chat does not pay for a long context.

    In memory the rows of one head follow one another, so that a thread that attends for it reads one stream.
    """

    def __init__(self, limit: int, dtype: torch.dtype | None) -> None:
        self.limit, self.dtype = limit, dtype
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def reserve(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers, with at least that many rows."""
        room = 0 if self.k is None else self.k.shape[0]
        if rows > room:
            rows = min(self.limit, max(rows, 2 * room, _FIRST_ROOM))
            heads, size = like.shape[1:]
            dtype = self.dtype or like.dtype
            grown = [like.new_zeros(heads, rows, size, dtype=dtype).transpose(0, 1) for _ in range(2)]
            for new, old in zip(grown, (self.k, self.v), strict=True):
                if old is not None:
                    new[:room] = old
            self.k, self.v = grown
        assert self.k is not None and self.v is not None
        return self.k, self.v

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.k, self.v) if t is not None)


class GrowingCache(_Rows):
    """Every token of the sequence, in order: for full-attention layers."""

    def extend(self, k: Tensor, v: Tensor, start: int) -> Keys:
        end = start + k.shape[0]
        keys, values = self.reserve(end, k)
        keys[start:end], values[start:end] = k, v
        return Keys(keys, values, 0, end, self.limit)


class RingCache(_Rows):
    """The last tokens, a window and some slack, at row position % limit: for sliding layers."""

    def __init__(self, window: int, dtype: torch.dtype | None, slack: int) -> None:
        super().__init__(window + slack, dtype)
        self.window = window

    def extend(self, k: Tensor, v: Tensor, start: int) -> Keys:
        n = k.shape[0]
        past = min(start, self.window - 1)  # the first new query sees that many tokens before itself
        if past + n <= self.limit:
            keys, values = self._write(k, v, start)
            return Keys(keys, values, (start - past) % self.limit, past + n, self.limit)
        # A chunk that would overwrite what its own first queries still look at is read from a copy.
        new_k, new_v = (t.to(self.dtype or t.dtype) for t in (k, v))
        if past and self.k is not None and self.v is not None:
            rows = torch.arange(start - past, start, device=k.device) % self.limit
            new_k, new_v = torch.cat((self.k[rows], new_k)), torch.cat((self.v[rows], new_v))
        self._write(k, v, start)
        return Keys(new_k, new_v, 0, past + n, past + n)

    def _write(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        end = start + k.shape[0]
        keys, values = self.reserve(min(end, self.limit), k)
        keep = min(k.shape[0], self.limit)  # of a long chunk only the end survives
        first, last = (end - keep) % self.limit, end % self.limit
        if first < last:
            keys[first:last], values[first:last] = k[-keep:], v[-keep:]
        else:
            rows = torch.arange(end - keep, end, device=k.device) % self.limit
            keys[rows], values[rows] = k[-keep:].to(keys.dtype), v[-keep:].to(values.dtype)
        return keys, values


class KVCache:
    """The caches of all layers of one sequence, and how many tokens they hold."""

    def __init__(
        self,
        config: TextConfig,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        slack: int = SLACK,
    ) -> None:
        """dtype is the format that keys and values are kept in; None keeps the one they are computed in."""
        self.max_length = min(max_length or config.max_position_embeddings, config.max_position_embeddings)
        window = config.sliding_window
        self.layers: Sequence[LayerCache] = [
            GrowingCache(self.max_length, dtype) if config.is_full(i) else RingCache(window, dtype, slack)
            for i in range(config.num_hidden_layers)
        ]
        self.length = 0

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)
