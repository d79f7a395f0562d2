"""Weights that quantisation-aware training left on Q4_0's lattice are found again, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iolite.quant.formats import BLOCK, INT4, decode, encode, pack, recover_lattice


def on_a_lattice(
    rows: int, blocks: int, *, reach: int = 8, seed: int = 0, exponent: float = -6, negative: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 weights d * k with the largest |k| of every block equal to reach, their k and their fp16 d."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randint(-reach, min(reach, 7) + 1, (rows, blocks, BLOCK), generator=g)
    at = torch.randint(BLOCK, (rows, blocks, 1), generator=g)
    k.scatter_(-1, at, -reach)
    d = (torch.rand(rows, blocks, 1, generator=g) + 0.01) * 2**exponent
    if negative:
        d = d * torch.where(torch.rand(rows, blocks, 1, generator=g) < 0.5, -1, 1)
    d = d.half()
    return (d.float() * k).flatten(1), k.flatten(1), d[..., 0]


@pytest.mark.parametrize("reach", range(1, 9))
@given(seed=st.integers(0, 999), exponent=st.integers(-12, 10))
def test_rounded_lattices_are_found(reach: int, seed: int, exponent: int) -> None:
    exact, k, d = on_a_lattice(6, 4, reach=reach, seed=seed, exponent=exponent)
    weight = exact.bfloat16()
    blocks = recover_lattice(weight)
    assert blocks is not None
    assert torch.equal(decode(blocks).bfloat16(), weight)
    found, true = (q.view(6, 4, BLOCK).to(torch.int64) for q in (blocks.quants.to(torch.int64) - 8, k))
    if reach == 8:  # eight steps fit on one side only, which settles factor and sign
        assert torch.equal(found, true)
        # Any fp16 scale that gives the weights back is right; it is within bfloat16's 2^-8 of the one that made them.
        torch.testing.assert_close(blocks.scales, d, rtol=2**-7, atol=0)
    else:  # k is found up to a factor and the sign: every found k has the same ratio to the true one
        assert torch.equal(found * true.abs().amax(-1, keepdim=True), (found.abs().amax(-1, keepdim=True) * true) * (
            found * true).sum(-1, keepdim=True).sign())  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_lattices_of_other_precisions(dtype: torch.dtype) -> None:
    """Not rounded at all, and rounded to fp16; and bfloat16 numbers that were stored in another dtype."""
    exact, k, d = on_a_lattice(40, 8, exponent=0)
    weight = exact.to(dtype)
    blocks = recover_lattice(weight)
    assert blocks is not None
    assert torch.equal(decode(blocks).to(dtype), weight)
    assert torch.equal(blocks.quants.to(torch.int64) - 8, k)
    if dtype is torch.float32:
        assert torch.equal(blocks.scales, d)
    stored = exact.bfloat16().to(dtype)
    blocks = recover_lattice(stored)
    assert blocks is not None and torch.equal(decode(blocks).bfloat16(), stored.bfloat16())


def test_scales_that_were_bfloat16_are_found() -> None:
    """Trainers that keep scales in bfloat16: those are fp16 numbers too, but for the very small."""
    _, k, d = on_a_lattice(40, 8)
    scale = d.bfloat16().float().repeat_interleave(BLOCK, 1)
    weight = (scale * k).bfloat16()
    blocks = recover_lattice(weight)
    assert blocks is not None and torch.equal(decode(blocks).bfloat16(), weight)


def test_a_symmetric_range_is_found() -> None:
    weight = on_a_lattice(40, 8, reach=7)[0].bfloat16()
    blocks = recover_lattice(weight)
    assert blocks is not None and torch.equal(decode(blocks).bfloat16(), weight)


def test_zero_blocks() -> None:
    weight = on_a_lattice(8, 4)[0].bfloat16()
    weight[:, :32] = 0
    weight[3] = -0.0
    blocks = recover_lattice(weight)
    assert blocks is not None and torch.equal(decode(blocks).bfloat16(), weight)
    assert not blocks.scales[:, 0].any() and (blocks.quants[3] == 8).all()
    assert recover_lattice(torch.zeros(3, 5)) is not None


@given(cols=st.integers(1, 100), seed=st.integers(0, 99))
def test_columns_that_end_inside_a_block(cols: int, seed: int) -> None:
    weight = on_a_lattice(5, 4, seed=seed)[0].bfloat16()[:, :cols]
    blocks = recover_lattice(weight)
    assert blocks is not None and blocks.quants.shape == (5, cols)
    assert torch.equal(decode(blocks).bfloat16(), weight)
    assert torch.equal(pack(blocks).to_float().bfloat16(), weight)


def test_other_weights_are_on_none() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert recover_lattice(weight) is None


def test_nine_steps_both_ways_are_on_none() -> None:
    """-8 and 8 steps in one block: Q4_0 has only one of them."""
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([8.0, -8.0, 1.0, 3.0, 5.0, -7.0])
    assert recover_lattice(weight) is None


def test_encode_keeps_the_blocks_that_lie_on_one_and_rounds_the_rest() -> None:
    weight = on_a_lattice(32, 8)[0].bfloat16()
    other = torch.randn(32, 32, generator=torch.Generator().manual_seed(5)).bfloat16()
    weight[:, 64:96] = other
    values = decode(encode(weight, INT4)).bfloat16()
    rest = torch.ones(256, dtype=torch.bool)
    rest[64:96] = False
    assert torch.equal(values[:, rest], weight[:, rest])
    assert torch.equal(values[:, 64:96], decode(encode(other, INT4)).bfloat16())
    assert not torch.equal(values[:, 64:96], other)


def test_rounding_to_the_nearest_alone_would_lose_them() -> None:
    """Why it is done: blocks that use only a part of the range get another scale from the largest weight."""
    weight = on_a_lattice(32, 8, reach=6)[0].bfloat16()
    x = weight.float().view(-1, BLOCK)
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    naive = (peak / -8) * (x / (peak / -8)).round().clamp(-8, 7)
    assert (naive.bfloat16() != x.bfloat16()).float().mean() > 0.3
    assert torch.equal(decode(encode(weight, INT4)).bfloat16(), weight)


def test_the_smallest_and_the_largest_scales() -> None:
    """fp16's own subnormal scales, and scales whose weights are beyond fp16 themselves."""
    k = torch.tensor([[-8.0, 7.0, 3.0, -1.0] + [0.0] * 28])
    for d in (2.0**-24, 3 * 2.0**-24, 65_504.0):
        blocks = recover_lattice(d * k)
        assert blocks is not None and blocks.scales.item() == d
        assert torch.equal(decode(blocks), d * k)
