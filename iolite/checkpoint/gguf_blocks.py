"""The block codes of GGUF tensors: to float32, to iolite's packed formats, and back.

A row is cut into blocks of 32 or 256 values; a block holds small whole numbers q and what turns them into weights, all
of it little endian. Sizes in bytes, in the file's order (ggml/src/ggml-common.h in
https://github.com/ggml-org/llama.cpp):

    Q4_0   32   d fp16, 16 bytes of two nibbles                           w = d * (q - 8)
    Q4_1   32   d fp16, m fp16, 16                                        w = d * q + m
    Q5_0   32   d fp16, 4 with the fifth bits, 16                         w = d * (q - 16)
    Q5_1   32   d fp16, m fp16, 4, 16                                     w = d * q + m
    Q8_0   32   d fp16, 32 signed bytes                                   w = d * q
    Q4_K  256   d fp16, dmin fp16, 12 with 8 six-bit pairs (s, m), 128    w = d * s * q - dmin * m   for each 32
    Q5_K  256   the same with 32 for the fifth bits before the 128
    Q6_K  256   128 low nibbles, 64 high pairs of bits, 16 signed s, d    w = d * s * (q - 32)       for each 16

In 32 values the low nibbles are the first 16 and the high nibbles the last 16; in Q4_K and Q5_K 32 bytes are 64 values,
low nibbles first. Every product above fits float32 exactly (at most 11 + 7 + 5 bits), so that float32 arithmetic gives
ggml's values bit for bit in whatever order it is done.

Letters: n blocks, V values of a block, G groups of a block that share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iolite.checkpoint.gguf import TYPES, tensor_bytes
from iolite.errors import CheckpointError
from iolite.quant.formats import BLOCK, INT4, INT4M, INT8, TILE_ROWS, Blocks, Format, PackedMatrix, pack, packed_shape

# What each type becomes. Q4_0, Q4_1, Q5_0 and Q8_0 lose nothing.
PACKED: dict[str, Format] = {
    "Q4_0": INT4,
    "Q4_1": INT4M,
    "Q4_K": INT4M,
    "Q5_0": INT8,
    "Q5_1": INT8,
    "Q5_K": INT8,
    "Q6_K": INT8,
    "Q8_0": INT8,
}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DECODED = (*_FLOATS, *PACKED)

# Values decoded or encoded at a time: a few MB of float32, whatever the size of the tensor.
_CHUNK = 1 << 20


class _Parts(NamedTuple):
    """Blocks taken apart: quants [n, V] (uint8, or int8 where the offset is taken off), scales and mins [n, G]."""

    quants: Tensor
    scales: Tensor
    mins: Tensor | None = None

    def to_float(self) -> Tensor:
        """float32 [n, V]."""
        groups = self.quants.float().unflatten(1, (self.scales.shape[1], -1)).mul_(self.scales[..., None])
        return (groups if self.mins is None else groups.add_(self.mins[..., None])).flatten(1)


def dequantize(raw: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that `raw` (uint8, as `GgufFile.raw` gives it) holds, float32 of `shape`; ggml's values exactly.

    Raises CheckpointError for a type that is not decoded here.
    """
    _check(raw, kind, shape)
    if kind in _FLOATS:
        return raw.view(_FLOATS[kind]).reshape(shape).float()
    out = torch.empty(math.prod(shape))
    values = TYPES[kind].values
    blocks = raw.view(-1, TYPES[kind].nbytes)
    for start, stop in _chunks(len(blocks), values):
        out[start * values : stop * values] = _SPLIT[kind](blocks[start:stop]).to_float().flatten()
    return out.view(shape)


def decode_blocks(raw: Tensor, kind: str, rows: int, cols: int) -> Blocks:
    """A quantised matrix [rows, cols] as blocks of iolite's format `PACKED[kind]`.

    Q4_0, Q4_1, Q5_0, Q8_0   exactly
    Q4_K                     scale d*s and minimum -dmin*m are each rounded to fp16: a weight is off by at most
                             u(scale) * q + u(minimum), with u(x) = max(|x| * 2**-11, 2**-25), half an fp16 step
    Q5_1, Q5_K, Q6_K         are quantised anew for each 32: a weight is off by at most half the new scale, which is
                             the largest magnitude of the 32 over 127 (and at most one fp16 step more)

    Raises CheckpointError for other types, and for scales that are not finite in fp16.
    """
    _check(raw, kind, (rows, cols), packed=True)
    format = PACKED[kind]
    quants = torch.empty(rows, cols, dtype=format.quant_dtype)
    scales = torch.empty(rows, cols // BLOCK, dtype=torch.float16)
    mins = torch.empty_like(scales) if format.has_minima else None
    for start, stop in _chunks(rows, cols):
        part = _decode_rows(raw.view(rows, -1)[start:stop], kind, cols)
        quants[start:stop], scales[start:stop] = part.quants, part.scales
        if mins is not None and part.mins is not None:
            mins[start:stop] = part.mins
    return Blocks(format, quants, scales, mins)


def repack(raw: Tensor, kind: str, rows: int, cols: int) -> PackedMatrix:
    """decode_blocks and pack at once: beside the result only a few MB are needed, however large the matrix."""
    _check(raw, kind, (rows, cols), packed=True)
    data = torch.empty(packed_shape(rows, cols, PACKED[kind]), dtype=torch.uint8)
    for start, stop in _chunks(rows, cols, TILE_ROWS):
        tiles = pack(_decode_rows(raw.view(rows, -1)[start:stop], kind, cols)).data
        data[start // TILE_ROWS : start // TILE_ROWS + len(tiles)] = tiles
    return PackedMatrix(data, rows, cols)


def encode(weight: Tensor, kind: str) -> Tensor:
    """The bytes of a tensor as ggml's reference quantiser writes them: uint8 [nbytes].

    kind: F32, F16, BF16, Q8_0 or Q4_0; rows of the last two must be whole blocks of 32. Raises ValueError for weights
    that are not finite, or not once they (or their scales) are in fp16.
    """
    size = tensor_bytes(tuple(weight.shape), kind)
    if kind in _FLOATS:
        stored = weight.to(_FLOATS[kind]).contiguous()
        if not stored.isfinite().all():
            raise ValueError(f"weights that are not finite in {kind}")
        return stored.reshape(-1).view(torch.uint8)
    write = {"Q4_0": _encode_q4_0, "Q8_0": _encode_q8_0}[kind]
    blocks = weight.reshape(-1, BLOCK)
    out = torch.empty(len(blocks), TYPES[kind].nbytes, dtype=torch.uint8)
    for start, stop in _chunks(len(blocks), BLOCK):
        scales, quants = write(blocks[start:stop].float())
        if not scales.isfinite().all():
            raise ValueError("weights that are not finite, or too large for a scale in fp16")
        out[start:stop, :2], out[start:stop, 2:] = scales[:, None].view(torch.uint8), quants
    assert out.numel() == size
    return out.view(-1)


def _check(raw: Tensor, kind: str, shape: tuple[int, ...], packed: bool = False) -> None:
    if kind not in (PACKED if packed else DECODED):
        known = ", ".join(PACKED if packed else DECODED)
        raise CheckpointError(f"GGUF tensors of type {kind} are not supported", f"supported are {known}")
    if raw.dtype != torch.uint8 or raw.numel() != tensor_bytes(shape, kind):
        raise ValueError(f"{raw.numel()} bytes are no {kind} tensor of shape {shape}")


def _chunks(count: int, values: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cuts `count` rows of `values` into runs of about _CHUNK values, their starts multiples of `multiple`."""
    step = max(1, _CHUNK // (values * multiple)) * multiple
    yield from ((start, min(start + step, count)) for start in range(0, count, step))


def _decode_rows(raw: Tensor, kind: str, cols: int) -> Blocks:
    """Blocks of the rows raw [R, bytes of a row]."""
    format, rows = PACKED[kind], len(raw)
    parts = _SPLIT[kind](raw.reshape(-1, TYPES[kind].nbytes))
    if kind in ("Q5_1", "Q5_K", "Q6_K"):
        quants, scales = _requantise(parts.to_float().view(-1, BLOCK))
    else:
        quants = parts.quants + 8 if kind == "Q4_0" else parts.quants
        quants, scales = quants.to(format.quant_dtype), parts.scales.half()
    mins = None if parts.mins is None or not format.has_minima else parts.mins.half()
    if not scales.isfinite().all() or (mins is not None and not mins.isfinite().all()):
        raise CheckpointError(
            f"a {kind} tensor has scales that are not finite or too large", "the file may be damaged; fetch it again"
        )
    return Blocks(format, quants.view(rows, cols), scales.view(rows, -1), None if mins is None else mins.view(rows, -1))


def _requantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, 32] in steps of the largest magnitude / 127: int8 [n, 32], fp16 [n]."""
    peak = x.abs().amax(1)
    scales = (peak / 127).half()
    # In the range where fp16 has few bits the scale may have become so small that 127 steps miss the peak.
    short = scales.float() * 127.5 < peak
    scales = torch.where(short, torch.nextafter(scales, scales.new_tensor(math.inf)), scales)
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    return (x * inverse[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


# Taking blocks [n, bytes] apart


def _half(raw: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of every block, float32 [n, 1]."""
    return raw[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """[..., b] -> [..., 2b]: all low nibbles, then all high ones."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)


def _bits(raw: Tensor, width: int) -> Tensor:
    """[..., b] -> [..., 8 / width, b]: the lowest `width` bits of every byte, then the next."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
    return (raw[..., None, :] >> shifts) & ((1 << width) - 1)


def _fifth_bits(raw: Tensor) -> Tensor:
    """[n, 4] -> [n, 32] of 0 or 16: bit i of the 32 belongs to value i."""
    return _bits(raw, 1).transpose(1, 2).flatten(1) << 4


def _split_q4_0(raw: Tensor) -> _Parts:
    return _Parts(_nibbles(raw[:, 2:]).to(torch.int8) - 8, _half(raw, 0))


def _split_q4_1(raw: Tensor) -> _Parts:
    return _Parts(_nibbles(raw[:, 4:]), _half(raw, 0), _half(raw, 2))


def _split_q5_0(raw: Tensor) -> _Parts:
    quants = _nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])
    return _Parts(quants.to(torch.int8) - 16, _half(raw, 0))


def _split_q5_1(raw: Tensor) -> _Parts:
    return _Parts(_nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8]), _half(raw, 0), _half(raw, 2))


def _split_q8_0(raw: Tensor) -> _Parts:
    return _Parts(raw[:, 2:].contiguous().view(torch.int8), _half(raw, 0))


def _split_q4_k(raw: Tensor) -> _Parts:
    quants = _nibbles(raw[:, 16:].unflatten(1, (4, 32))).flatten(1)
    return _Parts(quants, *_six_bit_scales(raw))


def _split_q5_k(raw: Tensor) -> _Parts:
    low = _nibbles(raw[:, 48:].unflatten(1, (4, 32))).flatten(1)
    high = _bits(raw[:, 16:48], 1).flatten(1)  # bit g of byte i: value i of the group g
    return _Parts(low | (high << 4), *_six_bit_scales(raw))


def _split_q6_k(raw: Tensor) -> _Parts:
    low = _nibbles(raw[:, :128].unflatten(1, (2, 64))).flatten(1)
    high = _bits(raw[:, 128:192].unflatten(1, (2, 32)), 2).flatten(1)
    scales = raw[:, 192:208].contiguous().view(torch.int8)
    return _Parts((low | (high << 4)).to(torch.int8) - 32, _half(raw, 208) * scales)


def _six_bit_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight groups [n, 8] of Q4_K and Q5_K, from the blocks' first 16 bytes.

    Of the 12 bytes after d and dmin, bytes 0 to 3 are s of the groups 0 to 3 and bytes 4 to 7 are m, six bits each;
    their two upper bits belong to the groups 4 to 7, whose lower four stand in bytes 8 to 11: s low, m high.
    """
    s, m, both = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = torch.cat((s & 63, (both & 15) | ((s >> 6) << 4)), dim=1)
    minima = torch.cat((m & 63, (both >> 4) | ((m >> 6) << 4)), dim=1)
    return _half(raw, 0) * scales, -(_half(raw, 2) * minima)


_SPLIT: dict[str, Callable[[Tensor], _Parts]] = {
    "Q4_0": _split_q4_0,
    "Q4_1": _split_q4_1,
    "Q5_0": _split_q5_0,
    "Q5_1": _split_q5_1,
    "Q8_0": _split_q8_0,
    "Q4_K": _split_q4_k,
    "Q5_K": _split_q5_k,
    "Q6_K": _split_q6_k,
}


# Writing blocks, as quantize_row_*_ref of ggml/src/ggml-quants.c do


def _encode_q4_0(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, 32] -> scales fp16 [n], nibbles uint8 [n, 16]. The first value of largest magnitude becomes -8."""
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))
    step = peak / -8
    quants = (x * _inverse(step) + 8.5).trunc_().clamp_(0, 15).to(torch.uint8)
    return step[:, 0].half(), quants[:, :16] | (quants[:, 16:] << 4)


def _encode_q8_0(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, 32] -> scales fp16 [n], signed bytes as uint8 [n, 32]. Halves are rounded away from zero."""
    step = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(step)
    whole = scaled.trunc()
    quants = whole + (2 * (scaled - whole)).trunc_()
    return step[:, 0].half(), quants.to(torch.int8).view(torch.uint8)


def _inverse(step: Tensor) -> Tensor:
    """1 / step; 0 for steps that are 0, or so small (2**-128) that fp16 holds 0 for them and 1 / step is infinite."""
    inverse = 1 / step
    return torch.where(inverse.isinf(), 0, inverse)
