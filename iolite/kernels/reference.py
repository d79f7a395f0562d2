"""The mathematics of the decoder in plain torch: the definition of correct that every faster kernel is compared with.

Letters: N tokens (any leading shape), S cached tokens, H query heads, K key-value heads, D head size, M hidden size.
Source of the formulas: `modeling_gemma4_unified.py` of Transformers 5.23.0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32, returned in x's dtype.

    The weight multiplies as it is: unlike Gemma 1 to 3 there is no `1 + weight`. None means no weight.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight.float()).to(x.dtype)


def rope_angles(positions: Tensor, head_dim: int, theta: float, num_angles: int) -> tuple[Tensor, Tensor]:
    """cos and sin [..., D/2] in float32 for positions [...].

    Pair j turns by positions * theta^(-2j/D); pairs from num_angles on do not turn ("proportional" rope). The
    divisor is the whole head size D also when only a part of it turns.
    """
    j = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / (theta ** (j / head_dim))
    frequencies[num_angles:] = 0
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x [..., H, D] by the angles [..., D/2]; pair j is (x[j], x[j + D/2]), the half-split of GPT-NeoX."""
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)  # [..., 1, D/2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q·kᵀ + mask)·v with scale 1: q_norm and k_norm carry the scale.

    q [B, N, H, D], k and v [B, S, K, D], mask bool broadcastable to [B, 1, N, S] (True: may look), or None for all.
    Query head i reads key-value head i // (H/K). Returns [B, N, H, D].
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        scale=1.0,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh form of gelu."""
    return F.gelu(gate, approximate="tanh") * up


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap): bounds the logits smoothly. None leaves them."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
