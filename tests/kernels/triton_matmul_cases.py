"""Products, decoding and rows of packed weights, by the kernels, against the definition of the formats.

Run by `test_triton_matmul.py` in a process of their own. Letters as in `iolite/kernels/triton/matmul.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iolite.kernels import reference, triton
from iolite.kernels.triton import matmul
from iolite.kernels.triton.dot import INTERPRETED
from iolite.quant.formats import FORMATS, INT4, INT4M, INT8, Format, PackedMatrix, quantise

DEVICE = "cpu" if INTERPRETED else "cuda"

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)

# One unit in the last place, as a share of a number: the interpreter cuts a float32 off to make a bfloat16 of it, where
# a GPU rounds. float16 is rounded by both.
UNIT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def random_matrix(rows: int, cols: int, format: Format) -> PackedMatrix:
    rng = torch.Generator().manual_seed(rows * cols)
    made = quantise(torch.randn(rows, cols, generator=rng) + 0.3, format)
    return PackedMatrix(made.data.to(DEVICE), rows, cols)


def tokens(n: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, cols, generator=torch.Generator().manual_seed(n)).to(DEVICE, dtype)


def assert_product(y: Tensor, x: Tensor, matrix: PackedMatrix) -> None:
    """y = x · wᵀ, each element within what the roundings explain, of which the worst case is taken:

    every weight and the result once to x's dtype, and each of C sums once to float32.
    """
    w = matrix.to_float().double()
    expected, size = x.double() @ w.T, x.double().abs() @ w.abs().T
    allowed = (UNIT[x.dtype] + (x.shape[1] + 8) * UNIT[torch.float32]) * size + UNIT[x.dtype] * expected.abs()
    worst = ((y.double() - expected).abs() - allowed).flatten().argmax()
    at = divmod(int(worst), y.shape[1])
    assert y.dtype is x.dtype and y.shape == expected.shape
    assert (y[at].double() - expected[at]).abs() <= allowed[at], f"{at}: {y[at]}, not {expected[at]}"


FEW = [(1, 16, 64), (2, 37, 100), (3, 5, 31), (4, 20, 1100)]
SOME = [(5, 37, 100), (17, 40, 600)]


@every_format
@pytest.mark.parametrize(("n", "rows", "cols"), [*FEW, *SOME, (matmul.SOME + 1, 20, 70)])
def test_product(format: Format, n: int, rows: int, cols: int) -> None:
    """Whole tiles and parts of one, few tokens to many, columns that several programs share."""
    matrix, x = random_matrix(rows, cols, format), tokens(n, cols, torch.bfloat16)
    assert_product(matmul.multiply(x, matrix.data, rows), x, matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("n", [2, 6])
def test_other_dtypes(n: int, dtype: torch.dtype) -> None:
    matrix, x = random_matrix(37, 200, INT4M), tokens(n, 200, dtype)
    assert_product(matmul.multiply(x, matrix.data, 37), x, matrix)


def test_columns_are_split_where_rows_are_few() -> None:
    """The shapes above must cover both ways: one program along the columns, and several."""
    device = torch.device("cpu")
    assert matmul._tiles_each(row_tiles=2, tile_cols=18, device=device) < 18
    assert matmul._tiles_each(row_tiles=3, tile_cols=2, device=device) >= 2


def test_only_the_product_depends_on_the_padding() -> None:
    """Whatever stands behind x's last column in memory: it is a part of a wider tensor here."""
    matrix, wide = random_matrix(16, 40, INT8), tokens(2, 90, torch.float32)
    wide[:, 40:] = torch.nan
    assert_product(matmul.multiply(wide[:, :40], matrix.data, 16), wide[:, :40], matrix)


@every_format
def test_unpacked_and_rows_are_the_decoded_weights(format: Format) -> None:
    matrix = random_matrix(37, 100, format)
    expected = matrix.to_float()
    # scale * q + minimum may be one rounding or two.
    close = {"rtol": 2**-22, "atol": 2**-22} if format == INT4M else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(matmul.unpack(matrix.data, 37, 100, torch.float32), expected, **close)
    ids = torch.tensor([[0, 36, 5], [16, 15, 36]], device=DEVICE)
    torch.testing.assert_close(triton.embed(matrix, ids), expected[ids], **close)


def test_an_id_outside_the_table_reads_nothing() -> None:
    ids = torch.tensor([-1, 37, 1 << 40], device=DEVICE)
    assert not triton.embed(random_matrix(37, 100, INT4), ids).any()


def test_linear_and_gated_are_the_references() -> None:
    """Any leading shape, several matrices of one input; float32, so that both round alike."""
    gate, up = random_matrix(37, 100, INT4), random_matrix(37, 100, INT8)
    x = tokens(3, 100, torch.float32).view(1, 3, 100)
    for found, matrix in zip(triton.linear(x, [gate, up]), (gate, up), strict=True):
        torch.testing.assert_close(found, reference.linear(x, matrix), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(triton.gated(x, gate, up), reference.gated(x, gate, up), rtol=1e-4, atol=1e-3)
    assert triton.linear(x[:, :0], [gate])[0].shape == (1, 0, 37)


@pytest.mark.parametrize("n", [2, 6])
def test_as_an_operator_of_torch_compile(n: int) -> None:
    matrix = random_matrix(20, 70, INT4)
    arguments = (tokens(n, 70, torch.float32), matrix.data, 20)
    torch.library.opcheck(matmul.multiply_op, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda x: triton.linear(x, [matrix])[0], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(arguments[0]), matmul.multiply(*arguments))


def test_ids_that_do_not_lie_side_by_side() -> None:
    matrix, ids = random_matrix(37, 100, INT8), torch.arange(37, device=DEVICE)
    for some in (ids[::3], ids[5].expand(4)):
        assert torch.equal(triton.embed(matrix, some), triton.embed(matrix, some.clone()))
