"""Products with packed weights of the C++ kernels against their exact definition, on every code path that runs here.

The definition: activations become integers block by block exactly as here (`rounded`); integer sums are exact; then
every block is a term (weights' scale * activations' scale) * integer sum, and int4m adds minimum * (scale * sum). That
is done here in float64. In float32 a term has at most three roundings (a product of scales or of scale and sum, its
product, and half of it again for the sum's conversion, which is exact), and takes part in at most as many additions as
there are terms: |error| <= u (terms + 3) sum|term|, u = 2^-24, to first order; 1 % covers the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.cpu_kernels import ISAS, UNIT, assert_within, code_path
from torch import Tensor
from torch.nn import functional as F

from iolite.kernels import cpu
from iolite.quant.formats import BLOCK, FORMATS, INT4, INT4M, INT8, Blocks, Format, PackedMatrix, pack, unpack

HERE = [pytest.param((isa, threads), id=f"{isa}-{threads}") for isa in ISAS for threads in (1, 3)]
ARM = [pytest.param(("arm", 2), id="arm-2", marks=pytest.mark.slow)]

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)


@pytest.fixture(name="kernels", params=HERE + ARM)
def _kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The functions of `iolite.kernels.cpu`, here or under an emulator."""
    isa, threads = request.param
    if isa == "arm":
        emulated = request.getfixturevalue("aarch64")
        emulated.use("neon", threads)
        yield emulated
    else:
        with code_path(isa, threads):
            yield cpu


def tokens(n: int, cols: int) -> Tensor:
    """Activations of very different sizes, with blocks of zeros and of almost nothing."""
    g = torch.Generator().manual_seed(1000 * n + cols)
    x = torch.randn(n, cols, generator=g) * torch.logspace(-3, 3, cols)[torch.randperm(cols, generator=g)]
    x[n // 2, : cols // 2] = 0
    x[0, cols // 2 :: 3] *= 1e-37
    return x


def weights(rows: int, cols: int, format: Format, seed: int = 0) -> PackedMatrix:
    """Every quant that the format can hold, -128 included, scales of either sign, denormal ones too."""
    g = torch.Generator().manual_seed(seed + 31 * rows + cols)
    low, high = (-128, 128) if format is INT8 else (0, 16)
    quants = torch.randint(low, high, (rows, cols), generator=g).to(format.quant_dtype)
    scales = torch.randn(rows, -(-cols // BLOCK), generator=g)
    scales[::3, ::2] *= 1e-6
    mins = torch.randn(scales.shape, generator=g).half() if format.has_minima else None
    return pack(Blocks(format, quants, scales.half(), mins))


def in_blocks(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [n, B, 32] and scales [n, B] that x [n, C] becomes, as float64; each operation is one of float32."""
    blocks = in_blocks(x)
    most = blocks.abs().amax(-1)
    zero = most < 2.0**-120
    inverse, scale = torch.where(zero, 0, 127 / most), torch.where(zero, 0, most / 127)
    return (blocks * inverse[..., None]).round().double(), scale.double()


def exact(x: Tensor, matrix: PackedMatrix) -> tuple[Tensor, Tensor]:
    """The product [n, R] in float64, and what float32 may be off by."""
    q, scale = rounded(x)
    plain = unpack(matrix)
    quants = in_blocks(plain.quants.double() - (8 if plain.format is INT4 else 0))
    sums = torch.einsum("nbk,rbk->nrb", q, quants)
    terms = sums * scale[:, None] * plain.scales.double()
    if plain.mins is not None:
        terms = torch.cat((terms, (scale * q.sum(-1))[:, None] * plain.mins.double()), dim=-1)
    return terms.sum(-1), 1.01 * UNIT * (terms.shape[-1] + 3) * terms.abs().sum(-1)


def check(kernels: Any, x: Tensor, matrices: Sequence[PackedMatrix]) -> None:
    outs = kernels.linear(x, matrices)
    assert len(outs) == len(matrices)
    for out, matrix in zip(outs, matrices, strict=True):
        assert_within(out, *exact(x.reshape(-1, matrix.cols), matrix))


SHAPES = [(1, 1), (15, 17), (16, 64), (17, 33), (33, 100), (64, 128), (100, 96), (65, 576), (130, 321)]


@every_format
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_linear_for_every_number_of_tokens(kernels: Any, rows: int, cols: int, format: Format) -> None:
    """1 to 8 tokens meet the weights together, up to 24 in groups, more in panels and groups of three or eight."""
    matrix = weights(rows, cols, format)
    for n in (*range(1, 34), 49):
        check(kernels, tokens(n, cols), [matrix])


@every_format
def test_more_tokens_than_one_pass_holds(kernels: Any, format: Format) -> None:
    check(kernels, tokens(400, 70), [weights(70, 70, format)])


def test_long_rows(kernels: Any) -> None:
    """Rows of a large model, at which threads share the rounding too."""
    for format in FORMATS.values():
        check(kernels, tokens(6, 15360), [weights(20, 15360, format)])


def test_matrices_of_different_rows_and_formats_in_one_call(kernels: Any) -> None:
    formats = [INT4, INT8, INT4M]
    matrices = [weights(1 + 13 * i, 200, formats[i % 3], seed=i) for i in range(19)]
    for n in (1, 5, 30):
        check(kernels, tokens(n, 200), matrices)


def gelu(g: Tensor) -> tuple[Tensor, Tensor]:
    """gelu in float64, and the relative error of the kernels': four roundings in the exponent, then the exponential's
    own error and six more roundings; 2e-6 wherever the result is not lost beside 1e-6."""
    u = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    return g / (1 + torch.exp(-2 * u)), 1.2e-7 + UNIT * (6 + 4 * 2 * u.abs())


@every_format
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (17, 33), (100, 96), (130, 321)])
def test_gated(kernels: Any, rows: int, cols: int, format: Format) -> None:
    gate, up = weights(rows, cols, format, seed=1), weights(rows, cols, INT4, seed=2)
    for n in (1, 3, 8, 9, 25, 31):
        x = tokens(n, cols) / 300
        g, g_error = exact(x, gate)
        u, u_error = exact(x, up)
        value, error = gelu(g)
        # gelu grows by 1.13 at most, for each step of the gate.
        bound = u.abs() * (1.13 * g_error + value.abs() * error) + value.abs() * u_error + UNIT * (value * u).abs()
        # Below the smallest normal floats nothing is promised but that.
        assert_within(kernels.gated(x, gate, up), value * u, bound + 2.0**-126 * (1 + u.abs()))


def test_gelu_to_two_millionths(kernels: Any) -> None:
    """One column of weight 1 lets every gate through as it is: 127 steps of a block's largest value."""
    matrix = pack(Blocks(INT8, torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1).half()))
    x = torch.linspace(-4, 4, 2001)[:, None]
    g = (x.sign() * 127 * (x.abs() / 127))[:, 0].double()  # as float32 rounds it
    reference = F.gelu(g, approximate="tanh") * g
    assert_within(kernels.gated(x, matrix, matrix)[:, 0], reference, 2e-6 * reference.abs())


@every_format
def test_memory_at_any_address_and_tokens_any_way_apart(kernels: Any, format: Format) -> None:
    matrix = weights(35, 130, format)
    for offset in (1, 2, 3):
        room = torch.empty(matrix.nbytes + 64, dtype=torch.uint8)
        moved = room[offset : offset + matrix.nbytes].view(matrix.data.shape)
        moved.copy_(matrix.data)
        wide = torch.full((27, 140 + offset), torch.nan)
        x = wide[:, offset : offset + 130]
        x.copy_(tokens(27, 130))
        for n in (1, 4, 27):
            out = kernels.linear(x[:n], [PackedMatrix(moved, 35, 130)])[0]
            assert_within(out, *exact(x[:n], matrix))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [3, 26])
def test_what_is_not_a_number_spoils_its_own_token_only(kernels: Any, n: int, bad: float) -> None:
    matrix = weights(40, 100, INT4)
    x = tokens(n, 100)
    clean = kernels.linear(x, [matrix])[0]
    x[1, 50] = bad
    spoilt = kernels.linear(x, [matrix])[0]
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, *range(2, n)]], clean[[0, *range(2, n)]])
