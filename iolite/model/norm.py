"""The one norm of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iolite.kernels import ops
from iolite.kernels.contracts import replaceable


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a weight that multiplies as it is."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    @replaceable
    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def added_to(self, residual: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(residual + norm(x)) * scale: how both halves of a decoder block end."""
        return ops.add_rms_norm(residual, x, self.weight, self.eps, scale)
