"""Norms, rope, gated gelu, softcap and rows of packed tables on the CPU; `reference.py` defines them.

Tensors are float32 on the CPU. One that does not lie as the kernel reads it is copied first. Results are made by
`new_empty`: what torch makes by default may have been set to another dtype or device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iolite.kernels.contracts import Matrix
from iolite.kernels.cpu.library import loaded
from iolite.kernels.cpu.products import matrix_argument


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., size], weight [size] or None."""
    assert x.dtype is torch.float32
    x, size = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    if x.numel():
        w = _weight(weight, size)
        library = loaded()
        library.rms_norm(library.pool, x.data_ptr(), _at(w), eps, x.numel() // size, size, out.data_ptr())
    return out


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """(residual + rms_norm(x, weight)) * scale, residual and x [..., size]."""
    assert residual.shape == x.shape and residual.dtype is x.dtype is torch.float32
    residual, x, size = residual.contiguous(), x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    if x.numel():
        w = _weight(weight, size)
        library = loaded()
        library.add_rms_norm(
            library.pool, residual.data_ptr(), x.data_ptr(), _at(w), eps, scale, x.numel() // size, size, out.data_ptr()
        )
    return out


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Heads x [n, H, D] normalised, then turned by cos and sin [n, D/2], or not turned where they are None.

    x may be a part of a larger projection: its heads side by side, its tokens any distance apart.
    """
    assert x.dtype is torch.float32
    n, heads, size = x.shape
    if x.stride(2) != 1 or x.stride(1) != size:
        x = x.contiguous()
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    w, c, s = _weight(weight, size), None, None
    if cos is not None and sin is not None:
        assert size % 2 == 0 and cos.shape == sin.shape == (n, size // 2)
        c, s = cos.float().contiguous(), sin.float().contiguous()
    library = loaded()
    library.norm_rope(
        library.pool, x.data_ptr(), x.stride(0), _at(w), eps, _at(c), _at(s), n, heads, size, out.data_ptr()
    )
    return out


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh form of gelu."""
    assert gate.shape == up.shape and gate.dtype is up.dtype is torch.float32
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    library = loaded()
    library.geglu(library.pool, gate.data_ptr(), up.data_ptr(), out.numel(), out.data_ptr())
    return out


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    assert x.dtype is torch.float32
    x = x.contiguous()
    out = torch.empty_like(x)
    library = loaded()
    library.softcap(library.pool, x.data_ptr(), cap, out.numel(), out.data_ptr())
    return out


def embed(matrix: Matrix, ids: Tensor, scale: float = 1.0) -> Tensor:
    """Rows ids [...] of a packed table [R, C], times scale: float32 [..., C].

    Raises IndexError for an id that the table has no row for, ValueError for a table that does not lie as C reads it.
    """
    flat = ids.to(torch.int64).contiguous()
    table = matrix_argument(matrix, matrix.cols)
    out = matrix.data.new_empty((*ids.shape, matrix.cols), dtype=torch.float32)
    if not flat.numel():
        return out
    if flat.numel() == 1:
        low = high = int(flat.item())
    else:
        low, high = (int(t) for t in flat.aminmax())
    if low < 0 or high >= matrix.rows:
        raise IndexError(f"id {low if low < 0 else high} of a table with {matrix.rows} rows")
    library = loaded()
    library.embed(library.pool, table, flat.data_ptr(), flat.numel(), scale, out.data_ptr())
    return out


def _weight(weight: Tensor | None, size: int) -> Tensor | None:
    """As the kernel reads it: float32 [size] without gaps."""
    if weight is None:
        return None
    assert weight.shape == (size,)
    return weight.float().contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
