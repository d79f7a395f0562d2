"""What the kernels need to be the same on a GPU and under Triton's interpreter: a product of tiles, and options."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)  # TRITON_INTERPRET=1 was set before Triton was imported

# A product and a sum may become one instruction; Triton's own default depends on its version.
OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": True}

_WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, total):
    """total + a [M, K] · b [K, N] in float32, M and N and K at least 16; float32 factors are not shortened."""
    if _WIDEN:  # the interpreter takes the bits of a bfloat16 for an integer; as float32 it is the same number
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")
