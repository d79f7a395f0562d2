"""Kernels for CUDA tensors, in Triton: products with packed weights, and attention of few new tokens over a cache.

Norms, rope, the gate and the soft-cap are left to torch: `torch.compile` fuses them, and a CUDA graph hides what
starting them costs. Where Triton is not installed (it comes with torch's CUDA packages for Linux) `available` is False
and everything is computed by `iolite/kernels/reference.py`.

Tested under Triton's interpreter and compiled for compute capability 8.0 and 9.0; none of it has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iolite.kernels import reference
from iolite.kernels.contracts import Keys, Matrix

_reason: str | None = None
try:
    from iolite.kernels.triton import attention as _attention
    from iolite.kernels.triton import matmul
    from iolite.kernels.triton.dot import INTERPRETED

    if not torch.cuda.is_available() and not INTERPRETED:
        _reason = "there is no CUDA device"
    elif torch.cuda.is_available() and not INTERPRETED and torch.cuda.get_device_capability() < (8, 0):
        _reason = "the kernels need compute capability 8.0 (Ampere) or later"
except ImportError as error:
    _reason = f"Triton cannot be imported: {error}"

MAX_TOKENS = 8
"""The most new tokens that `attention` computes itself."""


def available() -> bool:
    """Whether the kernels can run here."""
    return _reason is None


def reason() -> str | None:
    """Why they cannot, None when they can."""
    return _reason


def linear(x: Tensor, matrices: Sequence[Matrix]) -> list[Tensor]:
    """x [..., C] times each packed matrix [R, C], transposed: [..., R] in x's dtype, with sums in float32.

    bfloat16 and float16 weights are rounded to x's dtype where tensor cores multiply them (more than 4 tokens).
    """
    flat = x.reshape(-1, x.shape[-1])
    multiply = matmul.multiply_op if torch.compiler.is_compiling() else matmul.multiply
    return [multiply(flat, m.data, m.rows).view(*x.shape[:-1], m.rows) for m in matrices]


def gated(x: Tensor, gate: Matrix, up: Matrix) -> Tensor:
    """gelu(x · gateᵀ) * (x · upᵀ), with the tanh form of gelu: [..., C] -> [..., R]."""
    return reference.geglu(*linear(x, [gate, up]))


def embed(matrix: Matrix, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of a packed table: ids [...] -> [..., C]. An id outside the table gives zeros."""
    rows = matmul.rows_of(matrix.data, ids.flatten(), matrix.rows, matrix.cols, dtype)
    return rows.view(*ids.shape, matrix.cols)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    first: int,
    room: int,
    keys: int,
    past: int,
    window: int = 0,
    blocks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of new tokens q [N, H, D] over `keys` keys, of which key s lies in row (first + s) % room of k and v.

    Query i stands at key past + i; window 0 is none. k and v in int8 have scales [rows, K]. More than 8 tokens, or
    tokens of pictures (`blocks` [N]), are left to the reference, which is torch's own attention.
    """
    if blocks is not None or q.shape[0] > MAX_TOKENS:
        return reference.attend(q, Keys(k, v, first, keys, room, k_scale, v_scale), window or None, blocks)
    scales = (k_scale, v_scale)
    return _attention.attend(q, k, v, scales, room=room, window=window, past=past, first=first, length=None)


def attend_ring(q: Tensor, keys: Keys, length: Tensor, window: int | None) -> Tensor:
    """As `iolite.kernels.ring.attend`: the number of tokens before the new ones is a tensor on the device."""
    operator = _attention.ring_op if torch.compiler.is_compiling() else _attention.ring
    return operator(q, keys.k, keys.v, keys.k_scale, keys.v_scale, length, window or 0)
