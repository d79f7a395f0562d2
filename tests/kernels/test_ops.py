"""What goes to the C++ kernels: what they compute is what the reference computes, and what they would misread, such as
tensors whose numbers lie elsewhere, is left to the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from iolite.kernels import cpu, ops
from iolite.quant.formats import FORMATS, PackedMatrix, quantise
from iolite.quant.linear import QuantLinear

pytestmark = pytest.mark.skipif(cpu.load() is None, reason=f"no C++ kernels: {cpu.reason()}")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32, device="cpu")


def packed(rows: int = 48, cols: int = 64) -> PackedMatrix:
    return quantise(randn(rows, cols), FORMATS["int8"])


def every_operation() -> dict[str, Callable[[], Tensor]]:
    """By name, each with tensors of its own."""
    x, heads, weight, matrix = randn(3, 64), randn(3, 2, 32), randn(64), packed()
    angles, ids = (randn(3, 16), randn(3, 16)), torch.tensor([1, 40, 3], device="cpu")
    layers, table = [QuantLinear(matrix) for _ in range(2)], randn(48, 64)
    return {
        "rms_norm": lambda: ops.rms_norm(x, weight, 1e-6),
        "add_rms_norm": lambda: ops.add_rms_norm(x, 2 * x, weight, 1e-6),
        "norm_rope": lambda: ops.norm_rope(heads, weight[:32], 1e-6, *angles),
        "geglu": lambda: ops.geglu(x, 2 * x),
        "softcap": lambda: ops.softcap(x, 3.0),
        "linear": lambda: ops.linear(x, matrix),
        "project": lambda: torch.cat(ops.project(x, *layers)),
        "gated": lambda: ops.gated(x, *layers),
        "scores": lambda: ops.scores(x, table),
        "embed": lambda: ops.embed(matrix, ids),
    }


@pytest.mark.parametrize("name", list(every_operation()))
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
def test_what_torch_makes_by_default_changes_nothing(name: str, default: torch.dtype | torch.device) -> None:
    """Results were made in the default dtype once, which in bfloat16 is half the memory that is written to."""
    operation = every_operation()[name]
    expected = operation()
    if isinstance(default, torch.device):
        with default:
            found = operation()
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            found = operation()
        finally:
            torch.set_default_dtype(before)
    assert found.dtype is torch.float32 and torch.equal(found, expected)
