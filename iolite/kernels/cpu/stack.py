"""All decoder blocks as one call, for few tokens of one sequence: the step that draws a token.

What Python does between kernels is time in which nothing is read from memory. The blocks' weights are described to the
library once (`block.py`), the cache's buffers whenever they are others.
"""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import c_void_p
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from iolite.kernels.cpu.attention import KINDS
from iolite.kernels.cpu.block import MOST_TOKENS, block
from iolite.kernels.cpu.library import BlockArg, CacheArg, loaded

Angles = tuple[Tensor, Tensor]

_caches: WeakKeyDictionary[Any, _Rows] = WeakKeyDictionary()


class _Rows:
    """Where the buffers of a cache lie, as the library is told."""

    def __init__(self, cache: Any) -> None:
        self._kept = _kept(cache)  # keeps them alive, and their identities from being used again
        self.argument = (CacheArg * len(cache.layers))(*map(_argument, cache.layers))

    def is_current(self, cache: Any) -> bool:
        return all(a is b for a, b in zip(_kept(cache), self._kept, strict=True))


def _kept(cache: Any) -> list[Any]:
    return [part for layer in cache.layers for part in (layer.buffers, layer.layout.factor)]


def _argument(layer: Any) -> CacheArg:
    """-> `iolite/cache.py`: LayerCache, and `iolite/cache_layouts.py` for what turned, factor and unit are."""
    rows = layer.keys(layer.stores, 0, 0, layer.limit)
    scales = (rows.k_scale, rows.v_scale)
    pointers = [t if t is None else t.data_ptr() for t in (rows.k, rows.v, *scales)]
    strides = (0, 0) if rows.k_scale is None else rows.k_scale.stride()
    factor, window = layer.layout.factor, getattr(layer, "window", 0)
    return CacheArg(
        *pointers, KINDS[rows.k.dtype], *rows.k.stride()[:2], *rows.v.stride()[:2], *strides, layer.limit, window,
        layer.layout.turned, None if factor is None else factor.data_ptr(), layer.layout.unit,
    )  # fmt: skip


def stack(layers: Iterable[Any], x: Tensor, sliding: Angles, full: Angles, cache: Any) -> Tensor | None:
    """x [n, M] through decoder layers, their keys and values into a KVCache after its `length` tokens; returns [n, M].

    None, with nothing done, where a layer's weights are not packed or the cache cannot be written in place.
    """
    layers, n = list(layers), x.shape[0]
    blocks, weights = [block(layer) for layer in layers], [layer.self_attn.k_norm.weight for layer in layers]
    takes = cache.dtype is None or cache.dtype in KINDS
    if n > MOST_TOKENS or None in blocks or not takes or not cache.place(n, weights):
        return None
    if (rows := _caches.get(cache)) is None or not rows.is_current(cache):
        rows = _caches[cache] = _Rows(cache)
    arguments = (BlockArg * len(blocks))(*(b.argument for b in blocks if b is not None))
    x = x.clone(memory_format=torch.contiguous_format)
    angles = [t.contiguous() for t in (sliding[0], full[0], sliding[1], full[1])]
    cos, sin = ((c_void_p * 2)(*(t.data_ptr() for t in pair)) for pair in (angles[:2], angles[2:]))
    library = loaded()
    library.stack(library.pool, arguments, rows.argument, len(blocks), x.data_ptr(), n, cache.length, cos, sin)
    return x
