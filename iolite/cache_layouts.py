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

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from iolite.config import TextConfig


class Layout(Protocol):
    """How one layer's keys and values are kept."""

    heads: int

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
        self.heads, self.widths = heads, (size, size)

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
        turned = [*range(angles), *range(size // 2, size // 2 + angles)]
        rest = sorted(set(range(size)) - set(turned))
        self.heads, self.size, self.turned = heads, size, len(turned)
        self.widths = (size + len(turned),)
        self._value_order = torch.tensor(turned + rest)
        self._key_order = torch.tensor(rest + turned)
        self._model_order = self._value_order.argsort()
        self._weight: Tensor | None = None
        self._factor = torch.ones(size)
        self._unit = 1.0

    def encode(self, k: Tensor, v: Tensor, key_weight: Tensor | None) -> tuple[Tensor, ...]:
        self._prepare(key_weight)
        turned = k[..., self._value_order[: self.turned]] / self._unit
        return (torch.cat((v[..., self._value_order], turned), -1),)

    def views(self, buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        (both,) = buffers
        return both[..., self.turned :], both[..., : self.size]

    def queries(self, q: Tensor, key_weight: Tensor | None) -> Tensor:
        self._prepare(key_weight)
        return (q[..., self._key_order] * self._factor).to(q.dtype)

    def output(self, attended: Tensor) -> Tensor:
        return attended[..., self._model_order]

    def _prepare(self, key_weight: Tensor | None) -> None:
        """Takes up a weight. The turned part of a key is kept in units of a power of two near the weight's size there:
        its numbers are then about as large as those of the value, with which it may have to share one int8 scale."""
        if key_weight is self._weight:
            return
        assert key_weight is not None, "a layer that shares keys and values needs k_norm's weight"
        device = key_weight.device
        self._value_order, self._key_order, self._model_order = (
            order.to(device) for order in (self._value_order, self._key_order, self._model_order)
        )
        factor = key_weight.detach().float()[self._key_order]
        size = float(factor[self.size - self.turned :].square().mean().sqrt()) if self.turned else 1.0
        self._unit = 2.0 ** round(torch.tensor(size).log2().item()) if 1e-30 < size < 1e30 else 1.0
        factor[self.size - self.turned :] = self._unit
        self._factor, self._weight = factor, key_weight


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
    inverse = torch.where(most > 2.0**-120, 127 / most, 0.0)
    return (x * inverse[..., None]).round().to(torch.int8), most / 127
