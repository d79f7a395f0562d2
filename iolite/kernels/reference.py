"""The mathematics of the decoder in plain torch: the definition of correct that every faster kernel is compared with.

Letters: N tokens (any leading shape), S cached tokens, H query heads, K key-value heads, D head size, M hidden size.
Source of the formulas: `modeling_gemma4_unified.py` of Transformers 5.23.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from iolite.kernels.contracts import Keys, Matrix

_MOST_SCORES = 1 << 25  # of attention at a time: 128 MB in float32


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32, returned in x's dtype.

    The weight multiplies as it is: unlike Gemma 1 to 3 there is no `1 + weight`. None means no weight.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight.float()).to(x.dtype)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """(residual + rms_norm(x, weight)) * scale: how both halves of a decoder block end. scale [1], or None for 1."""
    total = residual + rms_norm(x, weight, eps)
    return total if scale is None else total * scale


def rope_angles(positions: Tensor, head_dim: int, theta: float, num_angles: int) -> tuple[Tensor, Tensor]:
    """cos and sin [..., D/2] in float32 for positions [...].

    Pair j turns by positions * theta^(-2j/D); pairs from num_angles on do not turn ("proportional" rope). The
    divisor is the whole head size D also when only a part of it turns.
    """
    angles = positions[..., None].float() * rope_frequencies(head_dim, theta, num_angles, positions.device)
    return angles.cos(), angles.sin()


def rope_frequencies(head_dim: int, theta: float, num_angles: int, device: torch.device) -> Tensor:
    """By how much each pair turns from one position to the next: float32 [D/2]."""
    j = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequencies = 1.0 / (theta ** (j / head_dim))
    frequencies[num_angles:] = 0
    return frequencies


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x [..., H, D] by the angles [..., D/2]; pair j is (x[j], x[j + D/2]), the half-split of GPT-NeoX."""
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)  # [..., 1, D/2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [..., H, D], each normalised, then turned: how queries and keys are made."""
    return apply_rope(rms_norm(x, weight, eps), cos, sin)


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


def may_look(
    queries: Tensor, keys: Tensor, query_blocks: Tensor | None, key_blocks: Tensor | None, window: int | None
) -> Tensor:
    """The mask [..., N, S], True where a query at position queries [..., N] may look at a key at keys [..., S].

    window None is a full layer: causal. A sliding layer sees `window` tokens up to and including the query's own, and
    inside one picture or one video frame both ways, but never further back than the window. Blocks number the pictures
    and video frames a token belongs to, 0 for none.
    """
    q, k = queries[..., :, None], keys[..., None, :]
    allowed = k <= q
    if window is None:
        return allowed
    if query_blocks is not None and key_blocks is not None:
        qb, kb = query_blocks[..., :, None], key_blocks[..., None, :]
        allowed = allowed | ((qb == kb) & (qb > 0))
    return allowed & (k > q - window)


def attend(q: Tensor, keys: Keys, window: int | None, blocks: Tensor | None) -> Tensor:
    """Attention of the new tokens q [N, H, D] over a cache that already holds their own keys and values.

    Query i stands at key `keys.count - N + i`; blocks [N] are the new tokens' two-way blocks (see `may_look`): a block
    never spans two passes, so older keys belong to none. Returns [N, H, D] in q's dtype.
    """
    n, count = q.shape[0], keys.count
    rows = (torch.arange(count, device=q.device) + keys.first) % keys.room if keys.first else slice(0, count)
    k, v = to_float(keys.k, keys.k_scale, rows, q.dtype), to_float(keys.v, keys.v_scale, rows, q.dtype)  # [S, K, D]
    if n == 1 and (window is None or count <= window):
        return attention(q[None], k[None], v[None], None)[0]
    key_blocks = None if blocks is None else torch.cat((blocks.new_zeros(count - n), blocks))
    at = torch.arange(count, device=q.device)
    out = torch.empty_like(q)
    step = max(1, _MOST_SCORES // (q.shape[1] * count))
    for i in range(0, n, step):  # scores of some queries at a time: their number is that of all keys
        some = slice(i, i + step)
        mask = may_look(at[count - n :][some], at, None if blocks is None else blocks[some], key_blocks, window)
        out[some] = attention(q[None, some], k[None], v[None], mask)[0]
    return out


def to_float(x: Tensor, scale: Tensor | None, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
    """Rows of a cache's keys or values [rows, K, D] as numbers of dtype."""
    return x[rows].to(dtype) if scale is None else (x[rows].float() * scale[rows][..., None]).to(dtype)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh form of gelu."""
    return F.gelu(gate, approximate="tanh") * up


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap): bounds the logits smoothly. None leaves them."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """x [..., C] times a packed matrix [R, C], transposed: [..., R] in x's dtype. The weights are unpacked first."""
    return F.linear(x, matrix.to_float().to(x.dtype))


def gated(x: Tensor, gate: Matrix, up: Matrix) -> Tensor:
    """The first half of a gated feed-forward net on packed weights: [..., C] -> [..., R]."""
    return geglu(linear(x, gate), linear(x, up))


def embed(matrix: Matrix, ids: Tensor) -> Tensor:
    """Rows of a packed table: ids [...] -> float32 [..., C]."""
    return matrix.rows_to_float(ids.flatten()).view(*ids.shape, -1)
