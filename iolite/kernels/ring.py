"""Attention over a ring whose fill is a number on the device: what a step of fixed shapes needs.

The host then knows nothing of the sequence's length, so the step can be captured in a CUDA graph and played again as
the sequence grows. The token at position p lies in row p % room of the buffers; a full layer's buffers have a row for
every token and never wrap.

Letters: n new tokens, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iolite.kernels import ops
from iolite.kernels.contracts import Keys
from iolite.kernels.reference import attention, may_look, to_float

MAX_TOKENS = 8
"""The most new tokens that Triton's kernel takes; more are left to torch."""


def write(buffer: Tensor, new: Tensor, length: Tensor) -> None:
    """Puts new [n, ...] of positions length .. length + n - 1 into buffer [room, ...]."""
    rows = (length + torch.arange(new.shape[0], device=new.device)) % buffer.shape[0]
    buffer.index_copy_(0, rows, new.to(buffer.dtype))


def attend(q: Tensor, keys: Keys, length: Tensor, window: int | None) -> Tensor:
    """Attention of the new tokens q [n, H, D] over buffers [room, K, D] that hold them already -> [n, H, D].

    length: how many tokens came before them, an integer tensor without dimensions; of keys only the buffers count, not
    which rows are filled. Causal; window None is a full layer, else a query sees that many tokens, its own included.
    room is at least window + n - 1.
    """
    assert window is None or keys.k.shape[0] >= window + q.shape[0] - 1
    kernel = getattr(ops._packed(q), "attend_ring", None)  # Triton's module has one
    if kernel is not None and q.shape[0] <= MAX_TOKENS:
        return kernel(q, keys, length, window)
    return attend_reference(q, keys, length, window)


def attend_reference(q: Tensor, keys: Keys, length: Tensor, window: int | None) -> Tensor:
    """The same in plain torch, over every row of the buffers whether it is filled or not."""
    n, room = q.shape[0], keys.k.shape[0]
    queries = length + torch.arange(n, device=q.device)
    last = length + n - 1
    # Row j holds the latest position that is j modulo room; one below 0 has not been written.
    positions = last - (last - torch.arange(room, device=q.device)) % room
    mask = may_look(queries, positions, None, None, window) & (positions >= 0)
    every = slice(None)
    k, v = to_float(keys.k, keys.k_scale, every, q.dtype), to_float(keys.v, keys.v_scale, every, q.dtype)
    return attention(q[None], k[None], v[None], mask)[0]
