"""Finds the 4-bit integers and the scales behind weights that quantisation-aware training left on a lattice.

Such a checkpoint stores float weights w = round(d * k), one scale d in fp16 for 32 weights, k a whole number from -8 to
7, round() to the checkpoint's precision. Rounding w to the nearest step of a scale taken from the largest weight
would often take another scale, and lose what the training had gained. So the scale is looked for exactly:

- let the largest |w| be n steps, n from 8 down to 1; that gives d to within the rounding, and with it every k;
- each weight then says between which limits d lies, since round(d * k) must be w; the limits of all 32 meet in an
  interval, and any fp16 number in it is a scale that gives all 32 weights back.

The integers are unique but for a common factor and the sign of d; the largest is made negative, as Q4_0 does.
"""

from __future__ import annotations

import torch
from torch import Tensor

# For a float32 bit pattern, what takes a number of fewer bits half a step up or down: the limits of what rounds to it.
# It is right at powers of two as well, where the step below is half of the step above.
_HALF_STEP = {torch.bfloat16: 1 << 15, torch.float16: 1 << 12, torch.float32: 0}

# Weight and largest weight are each off by up to 2^-8 of their size (bfloat16 has 8 bits), so a quotient of up to
# 8 steps is off by up to 8 * ((1 + 2^-8) / (1 - 2^-8) - 1) = 0.0628 steps.
_NEAR = 0.063


def on_lattice(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """For blocks x, finite float32 [n, 32] that were stored in dtype: q as uint8 [n, 32], fp16 scales [n], found [n].

    Where found, scale * (q - 8) rounded to the weights' precision is x; elsewhere q is 8 and the scale 0. Weights that
    are all bfloat16 numbers count as bfloat16, whatever dtype they are stored in.
    """
    if dtype is not torch.bfloat16 and bool((x == x.bfloat16()).all()):
        dtype = torch.bfloat16
    low, high = x.aminmax(dim=-1)
    peak = torch.where(high > -low, high, low)
    quants = torch.full_like(x, 8, dtype=torch.uint8)
    scales = torch.zeros_like(peak, dtype=torch.float16)
    found = peak == 0
    # A quarter of the weights is enough to see that a block is on no lattice of n steps: of blocks that are not, one
    # in ten thousand or fewer passes.
    some = x[:, :8] / peak[:, None]
    for n in range(8, 0, -1):
        steps = some * n
        near = (steps - steps.round()).abs_().amax(-1) < _NEAR
        rows = (near & ~found).nonzero().squeeze(-1)
        if len(rows) == 0:
            continue
        k, scale, fits = _solve(x[rows], peak[rows], n, dtype)
        rows = rows[fits]
        quants[rows] = (8 - k[fits]).to(torch.uint8)
        scales[rows] = scale[fits]
        found[rows] = True
    return quants, scales, found


def _solve(x: Tensor, peak: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers k [m, 32], scales [m] with x = -scale * k, and where that is so, if the peak [m] is n steps."""
    sign = peak.sign()
    k = (x * (n / peak)[:, None]).round_()
    size = k.abs()
    bits, half = x.abs().view(torch.int32), _HALF_STEP[dtype]
    low = ((bits - half).clamp_(min=0).view(torch.float32) / size.clamp(min=1)).amax(-1)
    high = ((bits + half).view(torch.float32) / size).nan_to_num_(nan=torch.inf, posinf=torch.inf).amin(-1)
    allowed = k.amin(-1) > -8  # 8 steps fit on one side only
    scale, fits = torch.zeros_like(peak, dtype=torch.float16), torch.zeros_like(allowed)
    # If any fp16 number lies inside the interval, the one nearest to its middle does; else one can only be an end.
    for guess in ((low + high) / 2, low, high):
        rest = (allowed & ~fits).nonzero().squeeze(-1)
        if len(rest) == 0:
            break
        tried = (guess[rest] * -sign[rest]).half()
        given = (tried.float()[:, None] * -k[rest]).to(dtype).float()
        good = (given == x[rest]).all(-1) & tried.isfinite()
        scale[rest[good]] = tried[good]
        fits[rest[good]] = True
    return k, scale, fits
