"""Grouped-query attention with normalised queries, keys and values.

The module computes q, k and v of the new tokens; who may look at whom, and what is remembered, is the batch's affair
(`iolite/model/batch.py`), handed in as one function.

Letters: N new tokens (any leading shape), M hidden size, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from iolite.config import TextConfig
from iolite.kernels import reference as ops
from iolite.model.norm import RMSNorm

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [N, H, D], k [N, K, D], v [N, K, D]) of the new tokens -> their attention output [N, H, D]."""


class Attention(nn.Module):
    """One layer's attention. A full layer with K = V has no v_proj: its value is the raw key projection."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        size, self.eps = config.hidden_size, config.rms_norm_eps
        self.head_dim = config.layer_head_dim(layer)
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.layer_kv_heads(layer) * self.head_dim
        self.q_proj = nn.Linear(size, q_size, bias=False)
        self.k_proj = nn.Linear(size, kv_size, bias=False)
        self.v_proj = None if config.shares_kv(layer) else nn.Linear(size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, self.eps)
        self.k_norm = RMSNorm(self.head_dim, self.eps)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads)  # [N, H, D]
        k = self.k_proj(x).unflatten(-1, heads)  # [N, K, D]
        v = k if self.v_proj is None else self.v_proj(x).unflatten(-1, heads)  # before k's norm and rotation
        q = ops.apply_rope(self.q_norm(q), *angles)
        k = ops.apply_rope(self.k_norm(k), *angles)
        v = ops.rms_norm(v, None, self.eps)  # never rotated, no weight
        return self.o_proj(attend(q, k, v).flatten(-2))
