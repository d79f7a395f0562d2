"""Products with packed weights on a GPU, by Triton: y [M, R] = x [M, C] · wᵀ, with sums in float32.

Three kernels for three amounts of tokens, because different things bound them:

    up to 4      `few`: bound by reading the weights. Each is read once, as a part of a 32-bit word, and multiplied in
                 float32 without tensor cores; the columns are split among programs when the rows are too few for all
                 multiprocessors.
    up to 64     `some`: weights become the tokens' dtype in registers and go through tensor cores (`tl.dot`).
    more         `unpack`: the matrix is decoded into memory once and multiplied by the library. Writing and reading it
                 costs eight times the packed bytes, which that many tokens outweigh.

A word holds 4 bytes of one row: part p of it (p = 0..7 of 4 bits, 0..3 of 8) is that row's column
`_column(word) + _step(p)`. The sum over columns may be taken in any order, so a product is made part by part and
nothing has to be moved between threads.

Everything here runs under Triton's interpreter on a CPU and compiles for compute capability 8.0 to 9.0. It has not run
on a GPU yet: the borders 4 and 64 and the lists of block sizes come from counting instructions and bytes, and nothing
is known about speed.

Letters: M tokens, R rows, C columns, Ct tiles along the columns.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from iolite.kernels.triton.dot import INTERPRETED, OPTIONS, dot

FEW, SOME = 4, 64  # the most tokens of the first and the second kernel

# The constants of a format, by the bytes of its tile. ZERO is the quant of weight 0 once int8 has lost its sign.
_FORMATS: dict[int, dict[str, Any]] = {
    576: {"BITS": 4, "ZERO": 8, "MINIMA": False},
    640: {"BITS": 4, "ZERO": 0, "MINIMA": True},
    1088: {"BITS": 8, "ZERO": 128, "MINIMA": False},
}


@triton.jit
def _part(words, p: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr):
    """Part p of words, less ZERO, times `1 / _unit(p)`: exact, in float32, in two or three instructions.

    The bits stay where they are in the word and become the mantissa of a float32 of 2^23 and more, whose last bit
    counts 1. (Converting an integer would take a unit that is eight times slower than the one that subtracts.)
    """
    per_half: tl.constexpr = 16 // BITS
    shift: tl.constexpr = (p % per_half) * BITS
    half = words if p < per_half else words >> 16
    bits = (half & (((1 << BITS) - 1) << shift)) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + ZERO * (1 << shift))


@triton.jit
def _unit(p: tl.constexpr, BITS: tl.constexpr):
    return 1.0 / (1 << ((p % (16 // BITS)) * BITS))


@triton.jit
def _column(word, BITS: tl.constexpr):
    """The column in its tile of part 0 of word `word` (0 .. 2 * BITS - 1) of a row."""
    return (word // BITS) * 32 + (word % BITS) * 4


@triton.jit
def _step(p: tl.constexpr, BITS: tl.constexpr):
    """How many columns after part 0 part p is: of a byte's two nibbles the high one is 16 columns further."""
    per_byte: tl.constexpr = 8 // BITS
    return p // per_byte + 16 * (p % per_byte)


@triton.jit
def _load_words(words, scales, tiles, word, row, mask, BITS: tl.constexpr, MINIMA: tl.constexpr):
    """Words of quants [K, rows], and float32 scales and minima of the same shape, of tiles [K, rows].

    word [K, 1] counts the words of a row in a tile, row [1, rows] the rows in it.
    """
    quant_words: tl.constexpr = 32 * BITS
    tile_words: tl.constexpr = quant_words + (32 if MINIMA else 16)
    quants = tl.load(words + tiles * tile_words + word * 16 + row, mask, 0)
    if BITS == 8:
        quants ^= -2139062144  # 0x80808080: adds 128 to each byte
    at = tiles * (2 * tile_words) + 2 * quant_words + (word // BITS) * 16 + row
    scale = tl.load(scales + at, mask, 0.0).to(tl.float32)
    minimum = tl.load(scales + at + 32, mask, 0.0).to(tl.float32) if MINIMA else scale
    return quants, scale, minimum


@triton.jit
def _few(
    x, words, scales, out, x_stride, M, R, C, tile_cols, tiles_each,
    BITS: tl.constexpr, ZERO: tl.constexpr, MINIMA: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """out [splits, M, R]: each program has ROWS rows and tiles_each tiles of columns, TILES of them at a time.

    M is TOKENS, 1 to 4. The tokens are written out one by one: with a third dimension in their place the compiler
    moves the weights between threads and loads x eight times over.
    """
    k = tl.arange(0, TILES * 2 * BITS)[:, None]
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :]
    word = k % (2 * BITS)
    row_tile = (rows // 16).to(tl.int64) * tile_cols
    first = tl.program_id(1) * tiles_each
    stop = tl.minimum(first + tiles_each, tile_cols)
    total0 = tl.zeros((TILES * 2 * BITS, ROWS), tl.float32)
    total1, total2, total3 = total0, total0, total0
    for start in range(first, stop, TILES):
        tile = start + k // (2 * BITS)
        quants, scale, minimum = _load_words(
            words, scales, row_tile + tile, word, rows % 16, (tile < stop) & (rows < tl.cdiv(R, 16) * 16), BITS, MINIMA
        )
        product0 = tl.zeros((TILES * 2 * BITS, ROWS), tl.float32)
        sum0 = tl.zeros((TILES * 2 * BITS, 1), tl.float32)
        product1, product2, product3 = product0, product0, product0
        sum1, sum2, sum3 = sum0, sum0, sum0
        for p in tl.static_range(32 // BITS):
            part = _part(quants, p, BITS, ZERO)
            column = tile * 64 + _column(word, BITS) + _step(p, BITS)
            mask = (tile < stop) & (column < C)
            value = tl.load(x + column, mask, 0.0).to(tl.float32)
            product0, sum0 = product0 + (value * _unit(p, BITS)) * part, sum0 + value
            if TOKENS > 1:
                value = tl.load(x + x_stride + column, mask, 0.0).to(tl.float32)
                product1, sum1 = product1 + (value * _unit(p, BITS)) * part, sum1 + value
            if TOKENS > 2:
                value = tl.load(x + 2 * x_stride + column, mask, 0.0).to(tl.float32)
                product2, sum2 = product2 + (value * _unit(p, BITS)) * part, sum2 + value
            if TOKENS > 3:
                value = tl.load(x + 3 * x_stride + column, mask, 0.0).to(tl.float32)
                product3, sum3 = product3 + (value * _unit(p, BITS)) * part, sum3 + value
        total0 += product0 * scale + (sum0 * minimum if MINIMA else 0.0)
        total1 += product1 * scale + (sum1 * minimum if MINIMA else 0.0)
        total2 += product2 * scale + (sum2 * minimum if MINIMA else 0.0)
        total3 += product3 * scale + (sum3 * minimum if MINIMA else 0.0)
    at = out + tl.program_id(1).to(tl.int64) * M * R + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.program_id(0) * ROWS + tl.arange(0, ROWS) < R
    tl.store(at, tl.sum(total0, axis=0).to(out.dtype.element_ty), inside)
    if TOKENS > 1:
        tl.store(at + R, tl.sum(total1, axis=0).to(out.dtype.element_ty), inside)
    if TOKENS > 2:
        tl.store(at + 2 * R, tl.sum(total2, axis=0).to(out.dtype.element_ty), inside)
    if TOKENS > 3:
        tl.store(at + 3 * R, tl.sum(total3, axis=0).to(out.dtype.element_ty), inside)


@triton.jit
def _some(
    x, words, scales, out, x_stride, M, R, C, tile_cols, tiles_each,
    BITS: tl.constexpr, ZERO: tl.constexpr, MINIMA: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """As `_few`, on tensor cores: one product of [TOKENS, K] and [K, ROWS] for each part of the words."""
    k = tl.arange(0, TILES * 2 * BITS)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = k % (2 * BITS)
    row_tile = (rows // 16).to(tl.int64) * tile_cols
    row_inside = rows < tl.cdiv(R, 16) * 16
    first = tl.program_id(1) * tiles_each
    stop = tl.minimum(first + tiles_each, tile_cols)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(first, stop, TILES):
        tile = start + k // (2 * BITS)
        inside = tile < stop
        quants, scale, minimum = _load_words(
            words, scales, row_tile[None, :] + tile[:, None], word[:, None], (rows % 16)[None, :],
            inside[:, None] & row_inside[None, :], BITS, MINIMA,
        )  # fmt: skip
        for p in tl.static_range(32 // BITS):
            column = tile * 64 + _column(word, BITS) + _step(p, BITS)
            mask = (m < M)[:, None] & (inside & (column < C))[None, :]
            value = tl.load(x + m[:, None].to(tl.int64) * x_stride + column[None, :], mask, 0.0)
            weight = _part(quants, p, BITS, ZERO) * (scale * _unit(p, BITS))
            if MINIMA:
                weight += minimum
            total = dot(value, weight.to(value.dtype), total)
    at = (tl.program_id(1) * M + m).to(tl.int64)[:, None] * R + rows[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), (m < M)[:, None] & (rows < R)[None, :])


@triton.jit
def _decode(data, scales, rows, columns, tile_cols, mask, BITS: tl.constexpr, ZERO: tl.constexpr, MINIMA: tl.constexpr):
    """Weights in float32 at rows and columns, which broadcast against each other: neighbouring columns side by side."""
    quant_bytes: tl.constexpr = 128 * BITS
    tile_bytes: tl.constexpr = quant_bytes + (128 if MINIMA else 64)
    tile = (rows // 16).to(tl.int64) * tile_cols + columns // 64
    block, column = columns % 64 // 32, columns % 32
    low: tl.constexpr = 4 * BITS  # columns of a block before its bytes begin again, in the high nibbles
    at = block * (64 * BITS) + column % low // 4 * 64 + rows % 16 * 4 + column % 4
    byte = tl.load(data + tile * tile_bytes + at, mask, 0).to(tl.int32)
    quant = byte ^ 128 if BITS == 8 else (byte >> (column // low * 4)) & 15
    at_scale = tile * (tile_bytes // 2) + quant_bytes // 2 + block * 16 + rows % 16
    weight = (quant - ZERO).to(tl.float32) * tl.load(scales + at_scale, mask, 0.0).to(tl.float32)
    if MINIMA:
        weight += tl.load(scales + at_scale + 32, mask, 0.0).to(tl.float32)
    return weight


@triton.jit
def _unpack(
    data, scales, out, R, C, tile_cols,
    BITS: tl.constexpr, ZERO: tl.constexpr, MINIMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (rows < R) & (columns < C)
    weight = _decode(data, scales, rows, columns, tile_cols, mask, BITS, ZERO, MINIMA)
    tl.store(out + rows.to(tl.int64) * C + columns, weight.to(out.dtype.element_ty), mask)


@triton.jit
def _embed(
    data, scales, ids, out, R, C, tile_cols,
    BITS: tl.constexpr, ZERO: tl.constexpr, MINIMA: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(ids + number + tl.arange(0, 1))
    mask = (columns < C) & (row >= 0) & (row < R)
    weight = _decode(data, scales, row, columns, tile_cols, mask, BITS, ZERO, MINIMA)
    tl.store(out + number * C + columns, weight.to(out.dtype.element_ty), columns < C)


def _tuned(kernel: Any, configs: list[tuple[int, int, int, int]]) -> Any:
    """The kernel with block sizes tried out once for each shape, (ROWS, TILES, warps, stages); kept on disk.

    Without a GPU there is nothing to try: the caller names the sizes (`_sizes`).
    """
    if INTERPRETED:
        return kernel
    choices = [triton.Config({"ROWS": r, "TILES": t}, num_warps=w, num_stages=s) for r, t, w, s in configs]
    return triton.autotune(choices, key=["R", "C", "TOKENS", "BITS"], cache_results=True)(kernel)


def _sizes(rows: int, tiles: int) -> dict[str, int]:
    return {"ROWS": rows, "TILES": tiles} if INTERPRETED else {}


# Words in flight for each thread of `few`: ROWS * TILES * 8 / (32 * warps), 4 to 16 of them at 4 bits.
_few_tuned = _tuned(_few, [(16, 4, 2, 1), (16, 8, 4, 1), (32, 4, 4, 1), (32, 8, 4, 1), (64, 2, 4, 1), (64, 4, 4, 1)])
# tl.dot wants at least 16 along K: two tiles at 4 bits.
_some_tuned = _tuned(_some, [(32, 4, 4, 2), (64, 2, 4, 2), (64, 4, 4, 3), (128, 2, 8, 3), (128, 4, 8, 2)])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _tiles_each(row_tiles: int, tile_cols: int, device: torch.device) -> int:
    """Tiles along the columns of one program, so that there are about four programs of 32 rows a multiprocessor.

    At least eight tiles, since a program's part of the result is written and read again.
    """
    splits = 4 * multiprocessors(device) // max(1, -(-row_tiles // 2))
    return max(8, -(-tile_cols // max(1, splits)))


def multiply(x: Tensor, data: Tensor, rows: int) -> Tensor:
    """x [M, C] · wᵀ -> [M, rows] in x's dtype, for packed data uint8 [Rt, Ct, tile bytes] on x's device."""
    if x.shape[0] == 0:
        return x.new_empty(0, rows)
    x = x if x.stride(-1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        if x.shape[0] > SOME:
            return F.linear(x, unpack(data, rows, x.shape[1], x.dtype))
        return _fused(x, data, rows)


def _fused(x: Tensor, data: Tensor, rows: int) -> Tensor:
    tokens, cols = x.shape
    row_tiles, tile_cols = data.shape[:2]
    each = _tiles_each(row_tiles, tile_cols, x.device)
    splits = -(-tile_cols // each)
    out = x.new_empty(splits, tokens, rows, dtype=x.dtype if splits == 1 else torch.float32)
    kernel, block = (_few_tuned, tokens) if tokens <= FEW else (_some_tuned, _block(tokens))
    blocks = 1 if tokens <= FEW else triton.cdiv(tokens, block)
    kernel[lambda meta: (triton.cdiv(rows, meta["ROWS"]), splits, blocks)](
        x, data.view(torch.int32), data.view(torch.float16), out, x.stride(0), tokens, rows, cols, tile_cols, each,
        **_FORMATS[data.shape[-1]], TOKENS=block, **_sizes(32, 2), **OPTIONS,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


def _block(tokens: int) -> int:
    """Tokens of one program: tl.dot wants 16, and more than 64 leave too few registers."""
    return min(64, max(16, triton.next_power_of_2(tokens)))


def unpack(data: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """The weights [rows, cols] of packed data, rounded to dtype."""
    out = data.new_empty(rows, cols, dtype=dtype)
    _unpack[(triton.cdiv(rows, 16), triton.cdiv(cols, 128))](
        data, data.view(torch.float16), out, rows, cols, data.shape[1],
        **_FORMATS[data.shape[-1]], ROWS=16, COLUMNS=128, **OPTIONS,
    )  # fmt: skip
    return out


def rows_of(data: Tensor, ids: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Rows [n, cols] of packed data for ids [n]; zeros for an id that is not in 0 .. rows - 1."""
    out = data.new_empty(len(ids), cols, dtype=dtype)
    ids = ids.contiguous()
    if len(ids):
        with torch.cuda.device_of(data):
            _embed[(len(ids), triton.cdiv(cols, 1024))](
                data, data.view(torch.float16), ids, out, rows, cols, data.shape[1],
                **_FORMATS[data.shape[-1]], COLUMNS=1024, **OPTIONS,
            )  # fmt: skip
    return out


multiply_op = torch.library.custom_op("iolite::multiply_packed", multiply, mutates_args=())
"""`multiply` as an operator, which torch.compile takes as it is."""


@multiply_op.register_fake
def _(x: Tensor, data: Tensor, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)
