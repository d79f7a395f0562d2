"""Packed formats: sizes, bytes, round trips and the error that a step allows."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from iolite.errors import CheckpointError
from iolite.quant import formats
from iolite.quant.formats import (
    BLOCK,
    FORMATS,
    INT4,
    INT4M,
    INT8,
    Blocks,
    Format,
    PackedMatrix,
    decode,
    encode,
    format_of_tile,
    pack,
    packed_bytes,
    quantise,
    unpack,
)

ALL = list(FORMATS.values())
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

every_format = pytest.mark.parametrize("format", ALL, ids=lambda f: f.name)
shapes = st.tuples(st.integers(1, 50), st.integers(1, 150))


def normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def random_blocks(rows: int, cols: int, format: Format, seed: int) -> Blocks:
    """Every value that a format can hold may appear."""
    g = torch.Generator().manual_seed(seed)
    low, high = (-128, 128) if format is INT8 else (0, 16)
    quants = torch.randint(low, high, (rows, cols), generator=g).to(format.quant_dtype)
    count = -(-cols // BLOCK)
    scales = torch.randn(rows, count, generator=g).half()
    mins = torch.randn(rows, count, generator=g).half() if format.has_minima else None
    return Blocks(format, quants, scales, mins)


def step_of(blocks: Blocks, cols: int) -> Tensor:
    return blocks.scales.float().abs().repeat_interleave(BLOCK, dim=1)[:, :cols]


def test_tile_sizes() -> None:
    assert [(f.name, f.code, f.tile_bytes, f.bits) for f in ALL] == [
        ("int4", 4, 576, 4),
        ("int4m", 5, 640, 4),
        ("int8", 8, 1088, 8),
    ]
    assert [format_of_tile(f.tile_bytes) for f in ALL] == ALL


def test_a_tile_of_another_size_is_no_format() -> None:
    with pytest.raises(CheckpointError, match="577"):
        format_of_tile(577)


def test_size_of_the_largest_tables() -> None:
    # 262144 x 3840 weights at 4.5 bits are what GGUF's Q4_0 takes; nothing is padded at these shapes.
    assert packed_bytes(262_144, 3840, INT4) == 262_144 * 3840 * 9 // 16
    assert packed_bytes(15_360, 3840, INT8) == 15_360 * 3840 * 17 // 16
    assert packed_bytes(17, 65, INT4) == 2 * 2 * 576


@every_format
@given(shape=shapes, seed=st.integers(0, 99))
def test_pack_and_unpack_are_inverse(format: Format, shape: tuple[int, int], seed: int) -> None:
    rows, cols = shape
    blocks = random_blocks(rows, cols, format, seed)
    matrix = pack(blocks)
    assert matrix.shape == shape and matrix.format is format
    assert matrix.nbytes == packed_bytes(rows, cols, format) == matrix.data.numel()
    back = unpack(matrix)
    assert torch.equal(back.quants, blocks.quants) and torch.equal(back.scales, blocks.scales)
    if blocks.mins is not None:
        assert back.mins is not None and torch.equal(back.mins, blocks.mins)
    else:
        assert back.mins is None
    assert torch.equal(matrix.to_float(), decode(blocks))
    ids = torch.randint(rows, (7,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(matrix.rows_to_float(ids), decode(blocks)[ids])


def weight_by_the_layout(matrix: PackedMatrix, row: int, col: int) -> float:
    """One weight, byte by byte from the description of the tile: shares nothing with the code under test."""
    tile = bytes(matrix.data[row // 16, col // 64].tolist())
    r, b, c = row % 16, col % 64 // 32, col % 32

    def half_at(start: int) -> float:
        return struct.unpack_from("<e", tile, start + 2 * (b * 16 + r))[0]

    if matrix.data.shape[-1] == 1088:
        byte = tile[b * 512 + c // 4 * 64 + 4 * r + c % 4]
        return half_at(1024) * (byte - 256 if byte > 127 else byte)
    byte = tile[b * 256 + c % 16 // 4 * 64 + 4 * r + c % 4]
    q = byte & 15 if c < 16 else byte >> 4
    return half_at(512) * (q - 8) if matrix.data.shape[-1] == 576 else half_at(512) * q + half_at(576)


@every_format
def test_the_bytes_are_those_of_the_layout(format: Format) -> None:
    rows, cols = 21, 100
    matrix = pack(random_blocks(rows, cols, format, seed=3))
    expected = torch.tensor([[weight_by_the_layout(matrix, r, c) for c in range(cols)] for r in range(rows)])
    # One product and one sum of fp16 numbers: in Python they are rounded once, here after each, by 2^-24 of a value.
    torch.testing.assert_close(matrix.to_float(), expected, rtol=0, atol=2**-23 * float(expected.abs().max()))


@every_format
def test_padding_is_zero(format: Format) -> None:
    rows, cols = 17, 65
    data = pack(random_blocks(rows, cols, format, seed=1)).data
    wide = PackedMatrix(data, 32, 128).to_float()
    whole = PackedMatrix(data, rows, cols).to_float()
    assert torch.equal(wide[:rows, :cols], whole)
    assert not wide[rows:].any()
    # The block that column 64 stands in has a scale (and a minimum); the one after it has none.
    assert not wide[:, 96:].any()


@pytest.mark.parametrize("format", [INT4M, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(shape=shapes, seed=st.integers(0, 99), exponent=st.integers(-8, 4))
def test_error_is_within_the_step(
    format: Format, dtype: torch.dtype, shape: tuple[int, int], seed: int, exponent: int
) -> None:
    weight = (normal(*shape, seed) * 2.0**exponent).to(dtype)
    blocks = encode(weight, format)
    error = (decode(blocks) - weight.float()).abs()
    step = step_of(blocks, shape[1])
    if format is INT8:
        # Half a step; the largest is 127 steps of an unrounded scale.
        bound = step / 2 + 127 * (2**-11 * step + 2**-25)
    else:
        # Half a step; 15 steps of an unrounded scale reach the largest value. The minimum is rounded before.
        bound = step / 2 + 15 * (2**-11 * step + 2**-25)
        bound = bound + 2**-11 * weight.float().abs().max()
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(shape=shapes, seed=st.integers(0, 99), exponent=st.integers(-6, 4))
@example(shape=(41, 144), seed=36, exponent=0)  # in bfloat16 two weights of opposite sign are the largest of a block
def test_int4_takes_the_nearest_step_of_a_scale_no_worse_than_that_of_ggml(
    dtype: torch.dtype, shape: tuple[int, int], seed: int, exponent: int
) -> None:
    weight = (normal(*shape, seed) * 2.0**exponent).to(dtype)
    blocks = encode(weight, INT4)
    x, values = weight.float(), decode(blocks)
    signed_step = blocks.scales.float().repeat_interleave(BLOCK, dim=1)[:, : shape[1]]
    all_values = signed_step[..., None] * torch.arange(-8, 8)
    nearest = (all_values - x[..., None]).abs().amin(-1)
    # A tie may go either way, and float32 decides what is one: x / step is off by 2^-22 of up to 8.8 steps.
    assert ((values - x).abs() <= nearest + 2**-18 * signed_step.abs()).all()

    def by_block(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (0, -shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))

    b = by_block(x)
    scale = b.gather(-1, b.abs().argmax(-1, keepdim=True)) / -8  # Q4_0: the largest magnitude becomes -8
    ggml = scale * torch.where(scale == 0, 0, b / scale).round().clamp(-8, 7)
    # Another scale is only taken for less error. Rounding it to fp16, by up to 2^-11 of itself or 2^-25, moves each of
    # 32 weights by up to 8 times that.
    slack = 32**0.5 * 8 * (2**-11 * scale.abs()[..., 0] + 2**-25)
    assert ((by_block(values) - b).norm(dim=-1) <= (ggml - b).norm(dim=-1) + slack).all()


def test_int4_leaves_less_error_than_the_largest_magnitude_alone() -> None:
    """The share that the comment on `_PEAKS` states: 5.7 % less than Q4_0's rule on normally distributed weights."""
    weight = normal(2000, 320)
    b = weight.view(-1, BLOCK)
    scale = b.gather(-1, b.abs().argmax(-1, keepdim=True)) / -8
    ggml = (scale * (b / scale).round().clamp(-8, 7)).view_as(weight)
    ratio = (decode(encode(weight, INT4)) - weight).norm() / (ggml - weight).norm()
    assert 0.938 < ratio < 0.948  # the average of 20,000 blocks, each within a tenth or so of it


def test_int8_uses_its_whole_range() -> None:
    weight = normal(64, 64)
    q = encode(weight, INT8).quants.view(64, 2, 32).to(torch.int16)
    assert (q.abs().amax(-1) == 127).all()


@every_format
def test_zeros_stay_zeros(format: Format) -> None:
    weight = normal(16, 128)
    weight[:, 32:64] = 0
    weight[5] = 0
    values = decode(encode(weight, format))
    assert not values[:, 32:64].any() and not values[5].any()
    assert not decode(encode(torch.zeros(3, 70), format)).any()


@every_format
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantise_is_encode_and_pack_whatever_the_chunks(
    format: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal(83, 200).to(dtype)
    whole = pack(encode(weight, format))
    monkeypatch.setattr(formats, "_CHUNK", 16 * 200)  # 16 rows at a time
    parts = quantise(weight, format)
    assert torch.equal(parts.data, whole.data) and parts.shape == (83, 200)
    assert torch.equal(parts.to_float(), decode(encode(weight, format)))


@every_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(format: Format, bad: float) -> None:
    weight = normal(20, 40)
    weight[19, 39] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight, format)


@pytest.mark.parametrize(("format", "largest"), [(INT4, 65_504.0 * 8), (INT8, 65_504.0 * 127), (INT4M, 65_504.0)])
def test_a_scale_beyond_float16_is_refused(format: Format, largest: float) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 40] = -largest
    assert decode(encode(weight, format))[1, 40] == -largest
    weight[1, 40] = -largest * 1.01
    with pytest.raises(ValueError, match="too large"):
        encode(weight, format)


def test_weights_under_the_smallest_scale_become_zero() -> None:
    weight = normal(2, 64).clamp(-3, 3) * 1e-9
    for format in (INT4, INT8):
        assert not decode(encode(weight, format)).any()


def test_int4m_is_closer_where_weights_lie_on_one_side() -> None:
    weight = normal(64, 64).abs() + 3
    errors = {f.name: float((decode(encode(weight, f)) - weight).square().mean()) for f in (INT4, INT4M)}
    assert errors["int4m"] < errors["int4"] / 4
