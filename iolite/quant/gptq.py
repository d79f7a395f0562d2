"""Rounding to int4 that knows the inputs: what rounding one column spoils, the columns after it make good.

GPTQ (Frantar et al. 2022, arXiv:2210.17323). For inputs X [n, C] the error that matters is |X (W - Q)ᵀ|², that is
(W - Q) H (W - Q)ᵀ with H = XᵀX. Columns are rounded one after the other; each one's error, over its diagonal entry of
U, the upper Cholesky factor of H's inverse, times its row of U, is taken from the columns still to come. The scale of
32 columns is chosen when their turn comes, from what they have become by then.

Letters: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from iolite.quant.formats import BLOCK, INT4, Blocks, best_step, recover_lattice

# Share of the mean squared input that is added to every column's. On the embedded model the error of the hidden states
# is the same from 0.01 to 0.1; more of it keeps the inverse well conditioned in float32 when inputs are few.
DAMPING = 0.1


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """U [C, C], upper triangular with UᵀU the inverse of the damped hessian [C, C], for any number of matrices that
    read the same inputs. A column that never had an input counts as one that had the mean."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if mean == 0:
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    damped = hessian + torch.diag(torch.where(diagonal == 0, mean, 0) + damping * mean)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def gptq(weight: Tensor, factor: Tensor) -> Blocks:
    """int4 blocks for weight [R, C] and the `inverse_factor` [C, C] of its inputs.

    Weights that lie on a lattice already keep it. Raises ValueError for weights that are not finite or too large for an
    fp16 scale.
    """
    if not weight.isfinite().all():
        raise ValueError("weights that are not finite numbers")
    on_lattice = recover_lattice(weight)
    if on_lattice is not None:
        return on_lattice
    rest = weight.to(factor.dtype, copy=True)
    quants = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = []
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        k, scale, errors = _round_block(rest[:, block], factor[block, block])
        quants[:, block] = k
        scales.append(scale)
        rest[:, start + BLOCK :] -= errors @ factor[block, start + BLOCK :]
    blocks = Blocks(INT4, quants, torch.stack(scales, dim=1))
    if not blocks.scales.isfinite().all():
        raise ValueError("weights too large for a scale in float16")
    return blocks


def _round_block(weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [R, up to 32] in 0..15, the fp16 scales [R], and each column's error over its diagonal entry of the factor."""
    width = weight.shape[1]
    x = F.pad(weight.float(), (0, BLOCK - width))
    scales = best_step(x).half()
    step = scales.to(weight.dtype)
    inverse = torch.where(step == 0, 0, 1 / step)
    now, k, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for j in range(width):
        k[:, j] = (now[:, j] * inverse).round().clamp(-8, 7)
        errors[:, j] = (now[:, j] - k[:, j] * step) / factor[j, j]
        now[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
    return (k + 8).to(torch.uint8), scales, errors
