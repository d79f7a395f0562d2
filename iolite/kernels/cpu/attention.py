"""Attention over a cache on the CPU: `reference.attend` with the keys read where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from iolite.kernels.cpu.library import AttentionArgs, loaded

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""kv_type in iolite.h."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    first: int = 0,
    room: int | None = None,
    keys: int,
    past: int,
    window: int = 0,
    blocks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """softmax(q·kᵀ)·v with scale 1 for queries q [N, H, D] over `keys` cached keys; returns [N, H, D].

    k and v [rows, K, D] in float32 or bfloat16, or in int8 with scales float32 [rows, K] of equal strides; the last
    dimension without gaps; they may share memory. Key s lies in row (first + s) % room; room None is the number of
    rows. Query i stands at key past + i and looks at the keys `reference.may_look` says, with window 0 for a full layer
    and blocks [N] of the new tokens or None.
    """
    n, heads, size = q.shape
    rows, kv_heads = k.shape[0], k.shape[1]
    room = rows if room is None else room
    assert k.shape == v.shape and k.shape[2] == size and heads % kv_heads == 0 and q.dtype is torch.float32
    assert k.dtype is v.dtype and 0 <= first < max(room, 1) and past >= 0 and keys <= room
    assert (first + keys <= rows) if first + keys <= room else rows >= room
    assert (k_scale is not None) == (v_scale is not None) == (k.dtype is torch.int8)
    if k_scale is not None and v_scale is not None:
        assert k_scale.dtype is v_scale.dtype is torch.float32 and k_scale.shape == v_scale.shape == (rows, kv_heads)
        assert k_scale.stride() == v_scale.stride()
        scales: tuple[int | None, ...] = (k_scale.data_ptr(), v_scale.data_ptr(), *k_scale.stride())
    else:
        scales = (None, None, 0, 0)
    q = q.contiguous()
    k, v = (t if t.stride(2) == 1 or size == 1 else t.contiguous() for t in (k, v))
    if blocks is not None:
        assert blocks.shape == (n,)
        blocks = blocks.to(torch.int64).contiguous()
    out = torch.empty_like(q)
    library = loaded()
    library.attention(
        library.pool,
        AttentionArgs(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), KINDS[k.dtype],
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), *scales, n, heads, kv_heads, size,
            keys, first, room, past, window, None if blocks is None else blocks.data_ptr(), out.data_ptr(),
        ),
    )  # fmt: skip
    return out
