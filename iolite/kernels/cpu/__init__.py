"""C++ kernels for float32 on the CPU, called through ctypes. `iolite.h` is their interface, `build.py` compiles them.

`load()` gives the library or None, `reason()` why not; the operations follow `iolite/kernels/reference.py`.
"""

from iolite.kernels.cpu.attention import KINDS, attention
from iolite.kernels.cpu.block import Block, block, most_tokens
from iolite.kernels.cpu.library import isa, isas, load, reason, set_threads, threads
from iolite.kernels.cpu.products import float_linear, gated, linear
from iolite.kernels.cpu.rows import add_rms_norm, embed, geglu, norm_rope, rms_norm, softcap
from iolite.kernels.cpu.stack import stack

__all__ = [
    "KINDS", "Block", "add_rms_norm", "attention", "block", "embed", "float_linear", "gated", "geglu", "isa", "isas",
    "linear", "load", "most_tokens", "norm_rope", "reason", "rms_norm", "set_threads", "softcap", "stack", "threads",
]  # fmt: skip
