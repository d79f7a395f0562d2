"""Grouped-query attention with normalised queries, keys and values.

The module computes q, k and v of the new tokens; who may look at whom, and what is remembered, is the batch's affair
(`iolite/model/batch.py`), handed in as one function.

Letters: N new tokens (any leading shape), M hidden size, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from iolite.config import TextConfig
from iolite.kernels import ops
from iolite.kernels.contracts import replaceable
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

    @replaceable
    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        heads = (-1, self.head_dim)
        if self.v_proj is None:
            q, k = ops.project(x, self.q_proj, self.k_proj)
            v = k
        else:
            q, k, v = ops.project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (t.unflatten(-1, heads) for t in (q, k, v))  # [N, H, D], [N, K, D], [N, K, D]
        v = ops.rms_norm(v, None, self.eps)  # of the raw projection: never rotated, no weight
        q = ops.norm_rope(q, self.q_norm.weight, self.eps, *angles)
        k = ops.norm_rope(k, self.k_norm.weight, self.eps, *angles)
        return self.o_proj(attend(q, k, v).flatten(-2))
