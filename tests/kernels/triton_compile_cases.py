"""Machine code for compute capability 8.0 and 9.0, which needs no GPU; run by `test_triton_compiles.py`.

The sizes are those of the 12B. A kernel must find its registers and its shared memory: what spills is slow, and 99 KB
is what the smallest of these GPUs gives a program.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from iolite.kernels.triton import matmul, reason
from iolite.quant.formats import FORMATS, INT4

attention = sys.modules["iolite.kernels.triton.attention"]

PRODUCT = {
    "x": "*bf16", "words": "*i32", "scales": "*fp16", "out": "*fp32",
    **dict.fromkeys(("x_stride", "M", "R", "C", "tile_cols", "tiles_each"), "i32"),
}  # fmt: skip
TABLE = {"data": "*u8", "scales": "*fp16", "ids": "*i64", "out": "*bf16", "R": "i32", "C": "i32", "tile_cols": "i32"}
RING = {
    "q": "*bf16", "k": "*bf16", "v": "*bf16", "k_scale": "*fp32", "v_scale": "*fp32",
    "totals": "*fp32", "stats": "*fp32", "length": "*i64", "out": "*bf16",
}  # fmt: skip
ALIGNED = {"x", "words", "scales", "out", "data", "x_stride", "R", "C", *RING} | {
    f"{t}_{s}" for t in "qkv" for s in ("token", "head", "row")
}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int) -> Any:
    """The kernel for arguments of these types, addresses and the model's sizes being multiples of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    attributes = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in ALIGNED - constants.keys()
    }
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)
def test_few(format: Any) -> None:
    """Whole 16-byte loads of weights, one load of x for each part of a word: nothing loaded twice."""
    constants = {**matmul._FORMATS[format.tile_bytes], "TOKENS": 1, "ROWS": 32, "TILES": 16 // format.bits}
    code = compiled(matmul._few, PRODUCT, constants, 80, 4).asm["ptx"]
    assert code.count("ld.global.v4.b32") >= 3
    assert code.count("ld.global.b16") == 32 // format.bits


@pytest.mark.parametrize("capability", [80, 90])
def test_some(capability: int) -> None:
    constants = {**matmul._FORMATS[INT4.tile_bytes], "TOKENS": 16, "ROWS": 64, "TILES": 2}
    made = compiled(matmul._some, PRODUCT, constants, capability, 4)
    assert "mma" in made.asm["ptx"] and made.metadata.shared <= 99 << 10


def test_decoding() -> None:
    constants = matmul._FORMATS[INT4.tile_bytes]
    assert compiled(matmul._unpack, TABLE, {**constants, "ROWS": 16, "COLUMNS": 128}, 80, 4).asm["cubin"]
    assert compiled(matmul._embed, TABLE, {**constants, "COLUMNS": 1024}, 80, 4).asm["cubin"]


@pytest.mark.parametrize(("capability", "size", "group", "queries"), [(80, 256, 2, 16), (90, 512, 16, 32)])
@pytest.mark.parametrize("kept", ["*bf16", "*i8"])
def test_attention(capability: int, size: int, group: int, queries: int, kept: str) -> None:
    constants = {
        "GROUP": group, "D": size, "WIDTH": size, "QUERIES": queries, "KEYS": 32 if size <= 256 else 16, "PARTS": 32,
        "ON_DEVICE": True, "SCALED": kept == "*i8",
    }  # fmt: skip
    made = compiled(attention._attend, RING | {"k": kept, "v": kept}, constants, capability, 4 if size <= 256 else 8)
    assert "cp.async" in made.asm["ptx"] and made.metadata.shared <= 99 << 10
    assert compiled(attention._merge, RING, {"D": size, "WIDTH": 64, "PARTS": 128}, capability, 4).asm["cubin"]


def test_without_a_device_the_kernels_are_not_offered() -> None:
    import torch

    assert (reason() is None) == torch.cuda.is_available()
