"""Packed weights: 4 or 8 bits for a weight, one fp16 scale for every 32 of a row, in tiles that kernels read in order.

A matrix [rows R, columns C] is cut into tiles of 16 rows by 64 columns (R and C padded with zeros). The packed tensor
is uint8 [ceil(R/16), ceil(C/64), tile bytes], contiguous: the tiles of 16 rows follow one another along the columns.
A tile has two blocks b of 32 columns for each of its rows r.

    int4    576 bytes   weight = scale * (q - 8), q in 0..15
                        byte b*256 + v*64 + 4*r + j, v and j in 0..3: low nibble is column b*32 + 4v + j of row r, high
                        nibble column b*32 + 16 + 4v + j; at 512: 32 scales [b][r]
    int4m   640 bytes   weight = scale * q + minimum, q in 0..15
                        nibbles and scales as above; at 576: 32 minima [b][r]
    int8   1088 bytes   weight = scale * q, q in -128..127
                        byte b*512 + v*64 + 4*r + j, v in 0..7: column b*32 + 4v + j of row r; at 1024: 32 scales [b][r]

A row's block of int4 is a block of GGUF's Q4_0, re-ordered; int4m holds Q4_1 and Q4_K, int8 holds Q8_0. The C++ and the
Triton kernels read these bytes; what stands here is the definition.

Letters: R rows, C columns, B = ceil(C/32) blocks of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from iolite.errors import CheckpointError
from iolite.quant.lattice import on_lattice

BLOCK = 32
TILE_ROWS = 16
TILE_COLS = 64

# Where int4 tries to put the value of largest magnitude, in steps. Q4_0 puts it at -8 always. A larger step reaches
# further on the other side, which ends at 7; a smaller one rounds the rest better and cuts the largest off at -8. On
# normally distributed weights these five leave 5.7 % less error than -8 alone, and eighty leave 5.9 % less.
_PEAKS = (-8.0, -7.2, -7.6, -8.4, -8.8)

# Elements encoded or decoded at a time: about 1 MB of float32, so that the passes over them stay in the cache.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Format:
    """One of the three codes. `code` is its number in the kernels; -> the module's docstring."""

    name: str
    code: int
    quant_bytes: int  # of a tile; the scales follow
    has_minima: bool = False

    @property
    def tile_bytes(self) -> int:
        return self.quant_bytes + (128 if self.has_minima else 64)

    @property
    def bits(self) -> int:
        """Bits of a quant, without its share of the scale."""
        return self.quant_bytes * 8 // (TILE_ROWS * TILE_COLS)

    @property
    def quant_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits == 8 else torch.uint8


INT4 = Format("int4", 4, 512)
INT4M = Format("int4m", 5, 512, has_minima=True)
INT8 = Format("int8", 8, 1024)
FORMATS = {f.name: f for f in (INT4, INT4M, INT8)}


def format_of_tile(tile_bytes: int) -> Format:
    """The format whose tiles have this size. Raises CheckpointError when none has."""
    for candidate in FORMATS.values():
        if candidate.tile_bytes == tile_bytes:
            return candidate
    raise CheckpointError(f"no packed format has tiles of {tile_bytes} bytes")


def packed_shape(rows: int, cols: int, format: Format) -> tuple[int, int, int]:
    return -(-rows // TILE_ROWS), -(-cols // TILE_COLS), format.tile_bytes


def packed_bytes(rows: int, cols: int, format: Format) -> int:
    """Bytes of a packed [rows, cols] matrix, padding included."""
    return math.prod(packed_shape(rows, cols, format))


@dataclass(frozen=True)
class Blocks:
    """Quantised weights before packing: what a row's blocks hold, in plain order.

    quants [R, C]: uint8 with values 0 to 15, or int8; scales fp16 [R, B]; mins fp16 [R, B] for int4m, else None.
    """

    format: Format
    quants: Tensor
    scales: Tensor
    mins: Tensor | None = None


@dataclass(frozen=True)
class PackedMatrix:
    """A packed weight matrix: data uint8 [ceil(R/16), ceil(C/64), tile bytes], logical shape [rows, cols]."""

    data: Tensor
    rows: int
    cols: int

    @property
    def format(self) -> Format:
        return format_of_tile(self.data.shape[-1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def to_float(self) -> Tensor:
        """The weights as float32 [R, C]."""
        out = self.data.new_empty(self.shape, dtype=torch.float32)
        for start, stop in _row_chunks(self.rows, self.cols):
            out[start:stop] = decode(unpack(self._part(start, stop)))
        return out

    def rows_to_float(self, ids: Tensor) -> Tensor:
        """Some rows as float32 [n, C], for ids [n] in 0..R-1."""
        tile, row = ids // TILE_ROWS, ids % TILE_ROWS
        quants, scales, mins = _tile_views(self.data, self.format)
        # An index on either side of the others puts the picked dimension first: [n, Ct, 2, ...].
        picked = _join_quants(quants[tile, :, :, :, row], self.format).flatten(1)[:, : self.cols]
        count = -(-self.cols // BLOCK)
        blocks = [None if t is None else t[tile, :, :, row].flatten(1)[:, :count] for t in (scales, mins)]
        assert blocks[0] is not None
        return decode(Blocks(self.format, picked, blocks[0], blocks[1]))

    def _part(self, start: int, stop: int) -> PackedMatrix:
        """Rows start to stop, both multiples of 16 (or stop the end), without a copy."""
        return PackedMatrix(self.data[start // TILE_ROWS : -(-stop // TILE_ROWS)], stop - start, self.cols)


def quantise(weight: Tensor, format: Format) -> PackedMatrix:
    """encode and pack at once: weight [R, C], any float dtype. Scratch memory is a few MB however large the weight.

    Raises ValueError for weights that are not finite or too large for an fp16 scale.
    """
    rows, cols = weight.shape
    data = weight.new_empty(packed_shape(rows, cols, format), dtype=torch.uint8)
    for start, stop in _row_chunks(rows, cols):
        data[start // TILE_ROWS : -(-stop // TILE_ROWS)] = pack(_encode(weight[start:stop], format)).data
    return PackedMatrix(data, rows, cols)


def encode(weight: Tensor, format: Format) -> Blocks:
    """Quantises weight [R, C], any float dtype, block by block.

    int4    exactly, where the weights lie on a lattice that int4 can hold (`recover_lattice`); else to the nearest
            step of the scale that leaves the smallest squared error, of a few that are tried
    int4m   16 steps from the smallest value to the largest
    int8    to the nearest step, the largest magnitude becomes 127

    Raises ValueError for weights that are not finite or too large for an fp16 scale.
    """
    parts = [_encode(weight[a:b], format) for a, b in _row_chunks(*weight.shape)]
    mins = torch.cat([p.mins for p in parts if p.mins is not None]) if format.has_minima else None
    return Blocks(format, torch.cat([p.quants for p in parts]), torch.cat([p.scales for p in parts]), mins)


def recover_lattice(weight: Tensor) -> Blocks | None:
    """The int4 blocks that weight [R, C] was rounded from, or None when it was not: quantisation-aware training writes
    float weights d * (q - 8), rounded to bfloat16 say, and those need not be rounded a second time.

    The blocks decode to the weights exactly, once rounded to the weights' precision.
    """
    parts = []
    for start, stop in _row_chunks(*weight.shape):
        x = _in_blocks(weight[start:stop])
        quants, scales, found = on_lattice(x.flatten(0, 1), weight.dtype)
        if not found.all():
            return None
        parts.append(_as_blocks(INT4, weight[start:stop], quants, scales))
    return Blocks(INT4, torch.cat([p.quants for p in parts]), torch.cat([p.scales for p in parts]))


def decode(blocks: Blocks) -> Tensor:
    """The weights that blocks stand for, float32 [R, C]."""
    cols = blocks.quants.shape[1]
    quants = F.pad(blocks.quants, (0, -cols % BLOCK)).unflatten(-1, (-1, BLOCK)).float()  # [R, B, 32]
    scales = blocks.scales.float()[..., None]
    if blocks.mins is not None:
        x = quants.mul_(scales).add_(blocks.mins.float()[..., None])
    elif blocks.format == INT4:
        x = quants.sub_(8).mul_(scales)
    else:
        x = quants.mul_(scales)
    return x.flatten(1)[:, :cols]


def pack(blocks: Blocks) -> PackedMatrix:
    """Puts blocks into tiles."""
    format = blocks.format
    rows, cols = blocks.quants.shape
    data = blocks.quants.new_zeros(packed_shape(rows, cols, format), dtype=torch.uint8)
    quants, scales, mins = _tile_views(data, format)
    padded = F.pad(blocks.quants, (0, -cols % TILE_COLS, 0, -rows % TILE_ROWS)).view(torch.uint8)
    # Four neighbouring bytes of a row stay together: they are moved as one int32.
    split = _split_quants(padded.unflatten(0, (-1, TILE_ROWS)), format).view(torch.int32)  # [Rt, r, Ct, b, v, 1]
    quants.view(torch.int32).copy_(split.permute(0, 2, 3, 4, 1, 5))
    for view, values in ((scales, blocks.scales), (mins, blocks.mins)):
        if view is not None and values is not None:
            view.permute(0, 3, 1, 2).copy_(_padded_scales(values, rows, cols))
    return PackedMatrix(data, rows, cols)


def unpack(matrix: PackedMatrix) -> Blocks:
    """Takes blocks out of their tiles: the inverse of pack."""
    format, (rows, cols) = matrix.format, matrix.shape
    quants, scales, mins = _tile_views(matrix.data, format)
    split = quants.view(torch.int32).permute(0, 4, 1, 2, 3, 5).contiguous().view(torch.uint8)
    joined = _join_quants(split, format).flatten(2).flatten(0, 1)[:rows, :cols]
    count = -(-cols // BLOCK)
    plain = [
        None if t is None else t.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)[:rows, :count] for t in (scales, mins)
    ]
    assert plain[0] is not None
    return Blocks(format, joined, plain[0], plain[1])


def _row_chunks(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // (max(cols, 1) * TILE_ROWS)) * TILE_ROWS
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def _in_blocks(weight: Tensor) -> Tensor:
    """[R, C] -> float32 [R, B, 32], padded with zeros."""
    return F.pad(weight.float(), (0, -weight.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _as_blocks(format: Format, weight: Tensor, quants: Tensor, scales: Tensor, mins: Tensor | None = None) -> Blocks:
    """Blocks in weight's shape [R, C] from flat quants [R * B, 32] and scales [R * B]."""
    rows, cols = weight.shape
    count = -(-cols // BLOCK)
    plain = quants.to(format.quant_dtype).view(rows, count * BLOCK)[:, :cols]
    return Blocks(format, plain, scales.view(rows, count), None if mins is None else mins.view(rows, count))


def _encode(weight: Tensor, format: Format) -> Blocks:
    x = _in_blocks(weight).flatten(0, 1)  # [R * B, 32]
    low, high = x.aminmax(dim=-1)
    if not (low.isfinite() & high.isfinite()).all():
        raise ValueError("weights that are not finite numbers")
    if format == INT4M:
        quants, scales, mins = _nearest_between(x, low, high)
        blocks = _as_blocks(format, weight, quants, scales, mins)
    elif format == INT8:
        blocks = _as_blocks(format, weight, *_nearest(x, torch.maximum(high, -low) / 127, -127, 127))
    else:
        quants, scales, found = on_lattice(x, weight.dtype)
        if not found.all():
            nearest, steps = _nearest(x, best_step(x), -8, 7)
            quants = torch.where(found[:, None], quants, nearest.add_(8).to(torch.uint8))
            scales = torch.where(found, scales, steps)
        blocks = _as_blocks(format, weight, quants, scales)
    if not blocks.scales.isfinite().all() or (blocks.mins is not None and not blocks.mins.isfinite().all()):
        raise ValueError("weights too large for a scale in float16")
    return blocks


def _peak(x: Tensor) -> Tensor:
    """The value of largest magnitude in each block x [n, 32]; of two as large, the first, as ggml takes it."""
    low, high = x.aminmax(dim=-1)
    peak = torch.where(high > -low, high, low)
    tied = (high == -low).nonzero().squeeze(-1)
    peak[tied] = x[tied].gather(-1, x[tied].abs().argmax(-1, keepdim=True)).squeeze(-1)
    return peak


def _nearest(x: Tensor, step: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """x [n, 32] in whole steps [n], as floats, and the steps as fp16. The step is rounded first: what counts is the
    distance to the weights that will be decoded."""
    scales = step.half()
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    return (x * inverse[:, None]).round_().clamp_(lowest, highest), scales


def best_step(x: Tensor) -> Tensor:
    """The int4 step [n] for blocks x [n, 32].

    Whole numbers k leave the squared error |x - d k|² = |x|² - (x·k)² / |k|² with their best step d = x·k / |k|². They
    are tried as the value of largest magnitude becomes each of _PEAKS, and the best d is taken.
    """
    peak = _peak(x)
    best, step = torch.zeros_like(peak), peak / -8
    for target in _PEAKS:
        k = (x * torch.where(peak == 0, 0, target / peak)[:, None]).round_().clamp_(-8, 7)
        along = (x * k).sum(-1)
        length = k.square_().sum(-1).clamp_(min=1)
        gain = along.square() / length
        better = gain > best * (1 + 1e-6)  # by more than rounding
        best = torch.where(better, gain, best)
        step = torch.where(better, along / length, step)
    return step


def _nearest_between(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mins = low.half()
    quants, scales = _nearest(x - mins.float()[:, None], (high - mins.float()) / 15, 0, 15)
    return quants, scales, mins


def _padded_scales(values: Tensor, rows: int, cols: int) -> Tensor:
    """[R, B] -> [Rt, 16, Ct, 2]."""
    missing = (-(-cols // TILE_COLS)) * 2 - values.shape[1]
    return F.pad(values, (0, missing, 0, -rows % TILE_ROWS)).unflatten(0, (-1, TILE_ROWS)).unflatten(-1, (-1, 2))


def _tile_views(data: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """Views into packed data: bytes of quants [Rt, Ct, b, v, r, 4], scales and minima [Rt, Ct, b, r]."""
    end = format.quant_bytes
    quants = data[..., :end].unflatten(-1, (2, -1, TILE_ROWS, 4))
    scales = data[..., end : end + 64].view(torch.float16).unflatten(-1, (2, TILE_ROWS))
    mins = data[..., end + 64 :].view(torch.float16).unflatten(-1, (2, TILE_ROWS)) if format.has_minima else None
    return quants, scales, mins


def _split_quants(quants: Tensor, format: Format) -> Tensor:
    """uint8 [..., 64 * Ct], one byte for each column -> the bytes of a tile [..., Ct, b, v, 4]."""
    if format.bits == 8:
        return quants.unflatten(-1, (-1, 2, 8, 4))
    # Eight nibbles at a time: none is over 15, so the shift moves no bit into the neighbouring byte.
    halves = quants.contiguous().view(torch.int64).unflatten(-1, (-1, 2, 2, 2))  # [..., Ct, b, half, 2]
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).view(torch.uint8).unflatten(-1, (4, 4))


def _join_quants(split: Tensor, format: Format) -> Tensor:
    """The inverse of _split_quants, but for the shape: [..., Ct, b, v, 4] -> [..., Ct, 2, 32]."""
    flat = split.flatten(-2)
    if format.bits == 8:
        return flat.view(torch.int8)
    return torch.cat((flat & 15, flat >> 4), dim=-1)
