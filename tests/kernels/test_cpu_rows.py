"""Norms, rope, gelu, softcap and embedding of the C++ kernels against float64, on every code path that runs here.

Bounds count roundings of float32, u = 2^-24 each. A norm's sum of squares has at least 16 partial sums (four vectors of
four), so an addend takes part in at most size/16 + 8 additions; the root halves that error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.cpu_kernels import ISAS, UNIT, assert_within, code_path
from torch import Tensor

from iolite.kernels import cpu, reference
from iolite.quant.formats import FORMATS, encode, pack

EXP = 1.2e-7  # relative error of the kernels' exponential
TANH = 3e-7  # of their tanh
EPS = 1e-6


HERE = [pytest.param((isa, threads), id=f"{isa}-{threads}") for isa in ISAS for threads in (1, 3)]
ARM = [pytest.param(("arm", threads), id=f"arm-{threads}", marks=pytest.mark.slow) for threads in (1, 3)]


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


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def exact_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    x = x.double()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return normed if weight is None else normed * weight.double()


def norm_error(size: int) -> float:
    """Relative: the halved error of the sum, of its division, of eps; then root, quotient and two products."""
    return UNIT * ((size / 16 + 8 + 3) / 2 + 4)


SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 63, 64, 65, 127, 255, 256, 3840)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(kernels: Any, size: int, weighted: bool) -> None:
    weight = randn(size) if weighted else None
    for n in (1, 2, 5, 40):
        x = randn(n, size, scale=30)
        exact = exact_norm(x, weight)
        assert_within(kernels.rms_norm(x, weight, EPS), exact, exact.abs() * norm_error(size))


@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm(kernels: Any, size: int) -> None:
    residual, x, weight = randn(6, size, scale=3), randn(6, size + 1)[:, :-1], randn(size)
    addend = exact_norm(x, weight)
    exact = (residual.double() + addend) * 0.625
    bound = 0.625 * (addend.abs() * norm_error(size) + 2 * UNIT * (residual.double().abs() + addend.abs()))
    assert_within(kernels.add_rms_norm(residual, x, weight, EPS, 0.625), exact, bound)


@pytest.mark.parametrize("n", [1, 3, 70])
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 6), (2, 34), (5, 64), (4, 256), (2, 512)])
def test_norm_rope(kernels: Any, n: int, heads: int, size: int) -> None:
    """Reads its heads out of a larger projection."""
    projection = randn(n, heads * size + 13)
    x = projection[:, 5 : 5 + heads * size].unflatten(-1, (heads, size))
    weight = randn(size)
    cos, sin = reference.rope_angles(torch.arange(n) * 37, size, 10_000.0, size // 2)
    normed = exact_norm(x, weight)
    exact = reference.apply_rope(normed, cos, sin)
    a, b = normed.abs().chunk(2, dim=-1)
    c, s = cos.double().abs()[:, None], sin.double().abs()[:, None]
    terms = torch.cat((a * c + b * s, b * c + a * s), dim=-1)
    assert_within(kernels.norm_rope(x, weight, EPS, cos, sin), exact, terms * (norm_error(size) + 3 * UNIT))


@pytest.mark.parametrize("size", [1, 5, 16, 33, 256])
def test_heads_that_are_not_turned(kernels: Any, size: int) -> None:
    """Values: no weight, no angles, any head size."""
    x = randn(4, 3, size)
    exact = exact_norm(x, None)
    assert_within(kernels.norm_rope(x, None, EPS, None, None), exact, exact.abs() * norm_error(size))


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100, 70_001])
def test_geglu(kernels: Any, count: int) -> None:
    """gelu is g / (1 + e^-y). 6 u of y are an error of 6 u y, relative, of e^-y, which counts by its share of the sum.

    Where e^-y would pass e^88 it stays there.
    """
    gate, up = randn(count, scale=4), randn(count + 1)[1:]
    g = gate.double()
    y = 2 * (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)
    exact = g * torch.sigmoid(y) * up.double()
    share = torch.sigmoid(-y)
    bound = exact.abs() * (share * (y.abs() * 6 * UNIT + EXP) + 4 * UNIT)
    floor = 1.01 * (g * up.double()).abs() * torch.e**-88
    assert_within(kernels.geglu(gate, up), exact, bound + floor)


def test_geglu_far_out(kernels: Any) -> None:
    gate = torch.tensor([-1e30, -1e4, -50.0, -0.0, 0.0, 50.0, 1e4, 1e30, torch.inf, torch.nan])
    out = kernels.geglu(gate, torch.ones(10))
    assert out[:5].abs().max() < 1e-7
    assert torch.equal(out[5:9], gate[5:9])
    assert out[9].isnan()


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_softcap(kernels: Any, cap: float) -> None:
    x = torch.cat(
        (randn(70_001, scale=cap), torch.logspace(-30, 30, 999), -torch.logspace(-30, 30, 999), torch.zeros(1))
    )
    exact = cap * torch.tanh(x.double() / cap)
    assert_within(kernels.softcap(x, cap), exact, exact.abs() * (TANH + 2 * UNIT))
    assert kernels.softcap(torch.tensor([torch.nan, torch.inf]), cap).tolist()[1] == cap
    assert kernels.softcap(torch.tensor([torch.nan]), cap).isnan().all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 31), (16, 32), (17, 33), (40, 64), (33, 97), (100, 200)])
def test_embed(kernels: Any, name: str, rows: int, cols: int) -> None:
    """A weight is exact but for int4m's one addition, in float32 both ways; the scale is one product more."""
    matrix = pack(encode(randn(rows, cols), FORMATS[name]))
    ids = torch.cat((torch.arange(rows), torch.randint(rows, (7,)))).view(-1, 1)
    expected = matrix.to_float()[ids] * 2.5
    assert torch.equal(kernels.embed(matrix, ids, 2.5), expected)
    assert torch.equal(kernels.embed(matrix, ids[-1], 1.0), matrix.to_float()[ids[-1]])


def test_embed_refuses_ids_without_a_row() -> None:
    matrix = pack(encode(randn(5, 40), FORMATS["int4"]))
    with code_path("portable"):
        for ids in ([5], [0, -1], [1, 5, 2]):
            with pytest.raises(IndexError, match="5 rows"):
                cpu.embed(matrix, torch.tensor(ids))
        assert cpu.embed(matrix, torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 40)


def test_nothing_in_nothing_out(kernels: Any) -> None:
    empty, weight = torch.zeros(0, 8), torch.ones(8)
    assert kernels.rms_norm(empty, weight, EPS).shape == (0, 8)
    assert kernels.add_rms_norm(empty, empty, weight, EPS, 1.0).shape == (0, 8)
    assert kernels.norm_rope(torch.zeros(0, 2, 8), weight, EPS, torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 2, 8)
    assert kernels.softcap(empty, 30.0).shape == (0, 8)
