"""All decoder blocks as one call, for few tokens of some sequences: the step that draws a token in each.

What Python does between kernels is time in which nothing is read from memory. The blocks' weights are described to the
library once (`block.py`), the cache's buffers whenever they are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from iolite.kernels.contracts import Keys
from iolite.kernels.cpu.attention import KINDS
from iolite.kernels.cpu.block import Block, Links, block
from iolite.kernels.cpu.library import BlockArg, CacheArg, SegmentArg, loaded

Angles = tuple[Tensor, Tensor]
Heads = tuple[int, int]  # how many keys a token has in a layer, and their size

_stacks: WeakKeyDictionary[nn.ModuleList, _Blocks] = WeakKeyDictionary()
_caches: WeakKeyDictionary[Any, _Rows] = WeakKeyDictionary()


class _Blocks:
    """The layers of a decoder, as the library is told."""

    def __init__(self, layers: nn.ModuleList, parts: list[Block]) -> None:
        self.argument = (BlockArg * len(parts))(*(part.argument for part in parts))
        self.size, self.heads = parts[0].size, [part.kept_heads for part in parts]
        self.key_weights = [part.key_weight for part in parts]
        own = [(layers._modules, name, layer) for name, layer in layers._modules.items()]
        made_of = [part.made_of for part in parts]
        self.made_of = Links(
            [*own, *(link for one in made_of for link in one.links)],
            [hooks for one in made_of for hooks in one.hooks],
            [attributes for one in made_of for attributes in one.own],
        )


class _Rows:
    """Where the buffers of a cache lie, as the library is told."""

    def __init__(self, cache: Any, heads: list[Heads]) -> None:
        self._kept = _kept(cache)  # keeps them alive, and their identities from being used again
        self._heads = heads  # of the blocks that write to it
        self.argument = (CacheArg * len(cache.layers))(*map(_argument, cache.layers))

    def is_current(self, cache: Any, heads: list[Heads]) -> bool:
        return heads is self._heads and all(a is b for a, b in zip(_kept(cache), self._kept, strict=True))


def _kept(cache: Any) -> list[Any]:
    return [part for layer in cache.layers for part in (layer.buffers, layer.layout.factor)]


def _all_rows(layer: Any) -> Keys:
    """-> `iolite/cache.py`: LayerCache."""
    rows: Keys = layer.keys(layer.stores, 0, 0, layer.limit)
    return rows


def _is_readable(cache: Any, heads: list[Heads]) -> bool:
    """Whether the buffers of a cache are in a format that kernels know, and for heads of such number and size. Where
    the cache leaves the format to who writes first, that may have been somebody who computes in another."""
    k = [_all_rows(layer).k for layer in cache.layers]
    return [tuple(t.shape[1:]) for t in k] == heads and all(t.dtype in KINDS and t.is_cpu for t in k)


def _argument(layer: Any) -> CacheArg:
    """-> `iolite/cache_layouts.py` for what turned, factor and unit are."""
    rows = _all_rows(layer)
    scales = (rows.k_scale, rows.v_scale)
    pointers = [t if t is None else t.data_ptr() for t in (rows.k, rows.v, *scales)]
    strides = (0, 0) if rows.k_scale is None else rows.k_scale.stride()
    factor, window = layer.layout.factor, getattr(layer, "window", 0)
    return CacheArg(
        *pointers, KINDS[rows.k.dtype], *rows.k.stride()[:2], *rows.v.stride()[:2], *strides, layer.limit, window,
        layer.layout.turned, None if factor is None else factor.data_ptr(), layer.layout.unit,
    )  # fmt: skip


def stack(layers: nn.ModuleList, x: Tensor, sliding: Angles, full: Angles, segments: Sequence[Any]) -> Tensor | None:
    """x [n, M] through decoder layers. Each segment says how many of its tokens continue which KVCache, whose keys and
    values are written after its `length` tokens; returns [n, M].

    None, with nothing computed, where a layer's weights cannot be read or a cache cannot be written in place.
    """
    blocks = _blocks_of(layers)
    if blocks is None or not all(_has_place(blocks, segment) for segment in segments):
        return None
    rows = [row for segment in segments if (row := _rows(segment.cache, blocks.heads)) is not None]
    if len(rows) < len(segments):
        return None
    assert x.shape == (sum([segment.n for segment in segments]), blocks.size)
    x = x.clone(memory_format=torch.contiguous_format)
    angles = [t.contiguous() for t in (sliding[0], full[0], sliding[1], full[1])]
    assert all(t.dtype is torch.float32 for t in (x, *angles))
    cos, sin = ((c_void_p * 2)(*(t.data_ptr() for t in pair)) for pair in (angles[:2], angles[2:]))
    count, library = len(segments), loaded()
    told = (SegmentArg * count)(
        *[SegmentArg(r.argument, s.n, s.cache.length) for r, s in zip(rows, segments, strict=True)]
    )
    library.stack(library.pool, blocks.argument, len(blocks.argument), told, count, x.data_ptr(), cos, sin)
    return x


def _blocks_of(layers: nn.ModuleList) -> _Blocks | None:
    found = _stacks.get(layers)
    if found is not None and len(layers) == len(found.argument) and found.made_of.hold():
        return found
    parts = [made for layer in layers if (made := block(layer)) is not None]
    if not parts or len(parts) < len(layers):
        return None
    found = _stacks[layers] = _Blocks(layers, parts)
    return found


def _has_place(blocks: _Blocks, segment: Any) -> bool:
    """Whether the tokens of a segment can be written to its cache, where they now have room."""
    cache, n = segment.cache, segment.n
    takes = (cache.dtype is None or cache.dtype in KINDS) and cache.length + n <= cache.max_length
    return takes and len(cache.layers) == len(blocks.heads) and cache.place(n, blocks.key_weights)


def _rows(cache: Any, heads: list[Heads]) -> _Rows | None:
    rows = _caches.get(cache)
    if rows is None or not rows.is_current(cache, heads):
        if not _is_readable(cache, heads):
            return None
        rows = _caches[cache] = _Rows(cache, heads)
    return rows
