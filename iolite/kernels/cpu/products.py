"""Products of activations with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from iolite.kernels.contracts import Matrix
from iolite.kernels.cpu.library import MatrixArg, loaded

FLOAT = 32
"""The format of a float matrix, as the library knows it."""

# What C is told about matrices, by where they lie. A pointer stays valid as long as a call's matrices do.
_arguments: dict[tuple[tuple[int, int, int, int], ...], Any] = {}
_MOST_ARGUMENTS = 1 << 14


def linear(x: Tensor, matrices: Sequence[Matrix]) -> list[Tensor]:
    """x [..., C] float32 times each packed matrix [R, C], transposed: [..., R] for each.

    x is rounded to int8 with a scale for each 32 of its columns, once for all. Raises ValueError for tensors that do
    not fit together.
    """
    rows, n, stride = _tokens(x, matrices[0].cols)
    count = len(matrices)
    outs = [x.new_empty((*x.shape[:-1], m.rows)) for m in matrices]
    if n:
        pointers = (c_void_p * count)(*[out.data_ptr() for out in outs])
        strides = (c_int64 * count)(*[m.rows for m in matrices])
        library = loaded()
        library.linear(library.pool, rows.data_ptr(), stride, n, count, _argument(matrices), pointers, strides)
    return outs


def float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., C] times weight [R, C] transposed, both float32: [..., R]. The numbers of one row of x are the same
    whatever the others are. Raises ValueError for an x that does not fit."""
    rows, n, stride = _tokens(x, weight.shape[1])
    assert weight.dtype is torch.float32 and weight.is_cpu and weight.is_contiguous()
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if n:
        library, told = loaded(), MatrixArg(weight.data_ptr(), *weight.shape, FLOAT)
        at, step = c_void_p(out.data_ptr()), c_int64(weight.shape[0])
        library.linear(library.pool, rows.data_ptr(), stride, n, 1, byref(told), byref(at), byref(step))
    return out


def gated(x: Tensor, gate: Matrix, up: Matrix) -> Tensor:
    """gelu(x · gateᵀ) * (x · upᵀ) with the tanh form of gelu: x [..., C], both matrices [R, C], result [..., R]."""
    if gate.rows != up.rows:
        raise ValueError(f"a gate of {gate.rows} rows and an up projection of {up.rows}")
    rows, n, stride = _tokens(x, gate.cols)
    out = x.new_empty((*x.shape[:-1], gate.rows))
    if n:
        library = loaded()
        both = _argument((gate, up))
        library.gated(library.pool, rows.data_ptr(), stride, n, both[0], both[1], out.data_ptr(), gate.rows)
    return out


def _tokens(x: Tensor, cols: int) -> tuple[Tensor, int, int]:
    """x as rows [n, C] of unbroken floats: (the rows, n, floats between them)."""
    if x.dtype is not torch.float32 or x.device.type != "cpu" or x.shape[-1] != cols:
        raise ValueError(f"{x.dtype} {list(x.shape)} on {x.device}: not float32 with {cols} columns on the CPU")
    rows = x if x.dim() == 2 else x.reshape(-1, cols)
    if rows.stride(1) != 1 and cols > 1:
        rows = rows.contiguous()
    return rows, rows.shape[0], rows.stride(0)


def _argument(matrices: Sequence[Matrix]) -> Any:
    """An array of iol_matrix."""
    key = tuple([(m.data.data_ptr(), m.rows, m.cols, m.data.shape[-1]) for m in matrices])
    found = _arguments.get(key)
    if found is None:
        if len(_arguments) >= _MOST_ARGUMENTS:
            _arguments.clear()
        found = _arguments[key] = (MatrixArg * len(matrices))(*[matrix_argument(m, matrices[0].cols) for m in matrices])
    return found


def matrix_argument(matrix: Matrix, cols: int) -> MatrixArg:
    """What C is told about a matrix. Raises ValueError when it has other columns or does not lie as C reads it."""
    data, tiles = matrix.data, (-(-matrix.rows // 16), -(-matrix.cols // 64))
    if matrix.cols != cols:
        raise ValueError(f"matrices of {cols} and of {matrix.cols} columns")
    if data.dtype is not torch.uint8 or data.device.type != "cpu" or not data.is_contiguous():
        raise ValueError("packed weights are one stretch of uint8 on the CPU")
    if tuple(data.shape[:2]) != tiles:
        raise ValueError(f"packed weights {list(data.shape)} for {matrix.rows} rows and {matrix.cols} columns")
    return MatrixArg(data.data_ptr(), matrix.rows, matrix.cols, matrix.format.code)
