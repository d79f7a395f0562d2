"""How the key and the value of one token lie in a cache: apart, or as one vector where both are one projection.

On a full-attention layer of this family the value is the raw key projection, normalised. The key is that times k_norm's
weight, turned by rope in some dimensions only. So beside the value just the turned dimensions have to be kept:

    [ value, turned dims | value, the rest | key, turned dims ]
      <-------- value: D numbers ------->
                           <------- key: D numbers ------>      after the weight and with its dimensions re-ordered

Key and value are two overlapping views of one buffer, and attention reads them as they lie. What the key lacks, the
query brings: its dimensions in the same order, multiplied with k_norm's weight where the key is the bare value.

Letters: n tokens, K key-value heads, D head size, R turned dimensions, H query heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from iolite.config import TextConfig


class Layout(Protocol):
    """How one layer's keys and values are kept."""

    heads: int
    turned: int
    """Dimensions that rope turns, where key and value share a vector; 0 where they do not."""
    factor: Tensor | None
    """[D], what queries are multiplied with; None for nothing."""
    unit: float
    """What the turned part of a key is kept in."""

    def take(self, key_weight: Tensor | None) -> None:
        """Sets factor and unit for a weight [D] of k_norm. encode and queries do so too."""
        ...

    def forget(self) -> None:
        """Has the weight looked at anew the next time: its numbers may be others."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the buffers."""
        ...

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers that a token takes in each buffer, for one key-value head."""
        ...

    def encode(self, k: Tensor, v: Tensor, key_weight: Tensor | None) -> tuple[Tensor, ...]:
        """k and v [n, K, D] as attention computes them -> what goes into each buffer, [n, K, width].

        key_weight [D] is k_norm's: v times it, turned by rope, is k on layers that share them; others ignore it.
        """
        ...

    def views(self, buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Buffers [rows, K, width] -> keys and values [rows, K, D] in them."""
        ...

    def queries(self, q: Tensor, key_weight: Tensor | None) -> Tensor:
        """q [n, H, D] as the kept keys want it."""
        ...

    def output(self, attended: Tensor) -> Tensor:
        """What attention made of the kept values, [n, H, D], with its dimensions in the model's order."""
        ...


class Apart:
    """A buffer of keys and a buffer of values."""

    names = ("k", "v")

    def __init__(self, heads: int, size: int) -> None:
        self.heads, self.widths, self.turned, self.unit = heads, (size, size), 0, 1.0
        self.factor: Tensor | None = None

    def take(self, key_weight: Tensor | None) -> None:
        pass

    def forget(self) -> None:
        pass

    def encode(self, k: Tensor, v: Tensor, key_weight: Tensor | None) -> tuple[Tensor, ...]:
        return k, v

    def views(self, buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        k, v = buffers
        return k, v

    def queries(self, q: Tensor, key_weight: Tensor | None) -> Tensor:
        return q

    def output(self, attended: Tensor) -> Tensor:
        return attended


class Shared:
    """One buffer of D + R numbers a token, for values that are keys before k_norm's weight and rope."""

    names = ("kv",)

    def __init__(self, heads: int, size: int, angles: int) -> None:
        """angles: rope turns the pairs j and j + size / 2 for j below it."""
        self.heads, self.size, self.turned = heads, size, 2 * angles
        self.widths = (size + self.turned,)
        self._weight: Tensor | None = None
        self.factor: Tensor | None = None
        self.unit = 1.0

    def encode(self, k: Tensor, v: Tensor, key_weight: Tensor | None) -> tuple[Tensor, ...]:
        self.take(key_weight)
        turned, _ = self._parts(k)
        return (torch.cat((*self._parts(v), turned / self.unit), -1),)

    def views(self, buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        (both,) = buffers
        return both[..., self.turned :], both[..., : self.size]

    def queries(self, q: Tensor, key_weight: Tensor | None) -> Tensor:
        self.take(key_weight)
        assert self.factor is not None
        turned, rest = self._parts(q)
        return (torch.cat((rest, turned), -1) * self.factor).to(q.dtype)

    def output(self, attended: Tensor) -> Tensor:
        # Two parts of each half of a head, as _parts took them out. Slices, since indexing by a tensor starts torch's
        # own threads, which on a CPU wait for those of the kernels.
        half = self.turned // 2
        rest = (self.size - self.turned) // 2
        a, b, c, d = attended.split((half, half, rest, rest), -1)
        return torch.cat((a, c, b, d), -1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] -> its turned dimensions [..., R] and the rest [..., D - R]."""
        half, middle = self.turned // 2, self.size // 2
        turned = torch.cat((x[..., :half], x[..., middle : middle + half]), -1)
        return turned, torch.cat((x[..., half:middle], x[..., middle + half :]), -1)

    def take(self, key_weight: Tensor | None) -> None:
        """Takes up a weight. The turned part of a key is kept in units of a power of two near the weight's size there:
        its numbers are then about as large as those of the value, with which it may have to share one int8 scale."""
        if key_weight is self._weight and self.factor is not None:
            return
        assert key_weight is not None, "a layer that shares keys and values needs k_norm's weight"
        turned, rest = self._parts(key_weight.detach().float())
        size = float(turned.square().mean().sqrt()) if self.turned else 1.0
        self.unit = 2.0 ** round(math.log2(size)) if 1e-30 < size < 1e30 else 1.0
        self.factor, self._weight = torch.cat((rest, torch.full_like(turned, self.unit))), key_weight

    def forget(self) -> None:
        self.factor = self._weight = None


def layout_of(config: TextConfig, layer: int, shared: bool = True) -> Layout:
    """The layout of a layer. shared=False keeps keys and values apart everywhere: the reference of the other way."""
    heads, size = config.layer_kv_heads(layer), config.layer_head_dim(layer)
    if shared and config.shares_kv(layer):
        return Shared(heads, size, config.rope_full.num_angles(size))
    return Apart(heads, size)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, K, width] -> int8 of the same shape and float32 scales [n, K]: x is about q times its scale, the largest
    magnitude of each vector / 127. Within half a scale; zeros and what is below 2^-120 become zeros."""
    x = x.float()
    most = x.abs().amax(-1)
    # Of two tensors: a number over a tensor is to torch its reciprocal times the number, not what the kernels compute.
    inverse = torch.where(most > 2.0**-120, most.new_full((), 127.0) / most, 0.0)
    return (x * inverse[..., None]).round().to(torch.int8), most / 127
