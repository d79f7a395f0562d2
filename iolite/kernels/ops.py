"""The operations that the network is made of, each handed to the fastest kernel that can take its tensors.

`reference.py` defines every one of them. The C++ kernels take float32 on the CPU, the Triton kernels packed weights
on a CUDA device, both when no gradient is wanted, and the reference takes the rest. IOLITE_KERNELS=reference in the
environment, or `only_reference()` around a call, leaves everything to the reference.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iolite.kernels import cpu, reference
from iolite.kernels.contracts import Keys, Matrix, Segment, matrix_of
from iolite.kernels.reference import attention
from iolite.kernels.threads import threads

__all__ = [
    "add_rms_norm", "attend", "attention", "beside_torch", "block", "embed", "gated", "geglu", "linear", "norm_rope",
    "only_reference", "project", "rms_norm", "rope_angles", "scores", "softcap", "stack",
]  # fmt: skip

Angles = tuple[Tensor, Tensor]

# Asked hundreds of times a token.
_wants_gradient, _is_compiling = torch.is_grad_enabled, torch.compiler.is_compiling
_count_watchers, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state

_PLAIN = frozenset((Tensor, nn.Parameter))
_allowed = os.environ.get("IOLITE_KERNELS", "") != "reference"


@contextlib.contextmanager
def only_reference() -> Iterator[None]:
    """Inside, the whole process computes with `reference.py`."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def _is_here(x: Tensor) -> bool:
    """Whether the numbers lie where `data_ptr` says, which they need not for a subclass of torch's tensors."""
    return type(x) in _PLAIN and x.is_cpu


def _is_watched() -> bool:
    """Whether somebody follows torch's operations, to whom what a C function does would be nothing: a count of them, a
    trace, or tensors that only have shapes."""
    return _count_watchers() > 0 or _tracing() is not None


def _on_cpu(x: Tensor) -> bool:
    return (
        _allowed
        and x.dtype is torch.float32
        and _is_here(x)
        and not _wants_gradient()
        and not _is_compiling()
        and not _is_watched()
        and cpu.load() is not None
    )


def _packed(x: Tensor) -> ModuleType | None:
    """The module whose kernels multiply x with packed matrices, None for the reference."""
    if _on_cpu(x):
        return cpu
    return _triton() if _on_cuda(x) else None


def _on_cuda(x: Tensor) -> bool:
    return _allowed and x.device.type == "cuda" and not _wants_gradient()


def _is_few(x: Tensor) -> bool:
    return x.dim() == 2 and 0 < x.shape[0] <= cpu.most_tokens(x.shape[1])


def _triton() -> ModuleType | None:
    from iolite.kernels import triton

    return triton if triton.available() else None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if _on_cpu(x) and (weight is None or _is_here(weight)):
        return cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    if _on_cpu(x) and residual.dtype is torch.float32 and _is_here(residual) and _is_here(weight):
        return cpu.add_rms_norm(residual, x, weight, eps, 1.0 if scale is None else scale.item())
    return reference.add_rms_norm(residual, x, weight, eps, scale)


def norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    if _on_cpu(x) and x.dim() == 3 and _is_here(weight) and _is_here(cos) and _is_here(sin):
        return cpu.norm_rope(x, weight, eps, cos, sin)
    return reference.norm_rope(x, weight, eps, cos, sin)


def rope_angles(positions: Tensor, head_dim: int, theta: float, num_angles: int) -> Angles:
    if not positions.is_cpu or _is_compiling():
        return reference.rope_angles(positions, head_dim, theta, num_angles)
    angles = positions[..., None].float() * _frequencies(head_dim, theta, num_angles)
    return angles.cos(), angles.sin()


@functools.cache
def _frequencies(head_dim: int, theta: float, num_angles: int) -> Tensor:
    """For the CPU. Of a small model's pass over one token a tenth would go into computing them anew."""
    with torch.inference_mode(False):
        return reference.rope_frequencies(head_dim, theta, num_angles, torch.device("cpu"))


def attend(q: Tensor, keys: Keys, window: int | None, blocks: Tensor | None) -> Tensor:
    if _on_cpu(q) and keys.k.dtype in cpu.KINDS and _is_here(keys.k):
        return cpu.attention(
            q, keys.k, keys.v, first=keys.first, room=keys.room, keys=keys.count, past=keys.count - q.shape[0],
            window=window or 0, blocks=blocks, k_scale=keys.k_scale, v_scale=keys.v_scale,
        )  # fmt: skip
    if _on_cuda(q) and blocks is None and q.shape[0] <= 8 and (gpu := _triton()):
        return gpu.attention(
            q, keys.k, keys.v, first=keys.first, room=keys.room, keys=keys.count, past=keys.count - q.shape[0],
            window=window or 0, k_scale=keys.k_scale, v_scale=keys.v_scale,
        )  # fmt: skip
    return reference.attend(q, keys, window, blocks)


def block(layer: nn.Module, x: Tensor) -> cpu.Block | None:
    """The two halves of a decoder layer around attention as one call each, for few tokens x [N, M];
    None where the layer has to be gone through operation by operation."""
    return cpu.block(layer) if _is_few(x) and _packed(x) is cpu else None


def stack(
    layers: nn.ModuleList, x: Tensor, sliding: Angles, full: Angles, segments: Sequence[Segment] | None
) -> Tensor | None:
    """Few new tokens x [N, M] of some sequences through all decoder layers in one call, writing to their caches;
    sliding and full are (cos, sin) [N, D/2] of the two kinds of layer. None where the layers have to be gone through
    one by one."""
    if segments is None or not _is_few(x) or _packed(x) is not cpu:
        return None
    return cpu.stack(layers, x, sliding, full, segments)


def beside_torch(layer: nn.Module, x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Around layers like this one that are gone through one by one with x: where their products are the C++ kernels',
    torch computes what is left on one thread."""
    if _packed(x) is cpu and any(matrix_of(module) is not None for module in layer.modules()):
        return threads(1)
    return contextlib.nullcontext()


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    if _on_cpu(gate) and up.dtype is torch.float32 and _is_here(up):
        return cpu.geglu(gate, up)
    return reference.geglu(gate, up)


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    if cap is not None and _on_cpu(logits):
        return cpu.softcap(logits, cap)
    return reference.softcap(logits, cap)


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    backend = _packed(x)
    return reference.linear(x, matrix) if backend is None else backend.linear(x, [matrix])[0]


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., C] times every row of a float table [R, C]: [..., R]."""
    if _is_few(x) and _on_cpu(x) and _is_here(weight) and weight.dtype is torch.float32 and weight.is_contiguous():
        return cpu.float_linear(x, weight)
    return F.linear(x, weight)


def embed(matrix: Matrix, ids: Tensor) -> Tensor:
    here = _allowed and _is_here(ids) and _is_here(matrix.data) and not _is_compiling() and not _is_watched()
    if here and cpu.load() is not None:
        return cpu.embed(matrix, ids)
    if _allowed and ids.device.type == "cuda" and (gpu := _triton()):
        return gpu.embed(matrix, ids)
    return reference.embed(matrix, ids)


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Several linear layers of one input. Those that only multiply with packed weights share one pass."""
    matrices = [matrix_of(layer) for layer in linears]
    if None in matrices or (backend := _packed(x)) is None:
        return tuple(layer(x) for layer in linears)
    return tuple(backend.linear(x, matrices))


def gated(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    """gelu(gate(x)) * up(x)."""
    matrices = [matrix_of(layer) for layer in (gate, up)]
    if None in matrices or (backend := _packed(x)) is None:
        return geglu(gate(x), up(x))
    return backend.gated(x, *matrices)
