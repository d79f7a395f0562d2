"""What goes to the C++ kernels: what they compute is what the reference computes, and what they would misread, such as
tensors whose numbers lie elsewhere, is left to the reference."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from iolite.checkpoint.assemble import assemble
from iolite.checkpoint.synthetic import SyntheticSource, config_of
from iolite.kernels import cpu, ops
from iolite.model.batch import Media, PaddedBatch
from iolite.model.layers import DecoderLayer
from iolite.prompt import Prompt
from iolite.quant.formats import FORMATS, PackedMatrix, quantise
from iolite.quant.linear import QuantEmbedding, QuantLinear

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


def test_a_table_that_is_not_in_memory() -> None:
    """Where its address would be is nothing to read from."""
    table = QuantEmbedding(packed()).to("meta")
    assert table(torch.tensor([3])).is_meta
    with pytest.raises(ValueError, match="uint8 on the CPU"):
        cpu.embed(table.matrix, torch.tensor([3]))


@pytest.mark.parametrize("name", list(every_operation()))
def test_who_follows_the_operations_of_torch_sees_them(name: str) -> None:
    """What a C function does is in no trace, and no count; and tensors of shapes alone have nothing to read."""
    operation = every_operation()[name]
    expected = operation()
    seen: list[object] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watching():
        found = operation()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    with ops.only_reference(), Watching():
        count = len(seen)
        operation()
    assert len(seen) == 2 * count


def test_a_trace_holds_the_operations() -> None:
    weight = randn(64)
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(lambda x: ops.rms_norm(x, weight, 1e-6), randn(3, 64), check_trace=False)
        torch.testing.assert_close(traced(randn(5, 64)), ops.rms_norm(randn(5, 64), weight, 1e-6))


def test_tensors_whose_numbers_lie_elsewhere() -> None:
    """A subclass may say float32 on the CPU, and have an address of 0."""
    x, weight = randn(3, 64), randn(64)
    expected = ops.rms_norm(x, weight, 1e-6)
    for found in (
        ops.rms_norm(TwoTensor(x, x.clone()), weight, 1e-6).a,
        ops.rms_norm(x, TwoTensor(weight, weight.clone()), 1e-6).a,
        ops.add_rms_norm(TwoTensor(0 * x, 0 * x), x, weight, 1e-6).a,
    ):
        torch.testing.assert_close(found, expected)
    table = randn(48, 64)
    torch.testing.assert_close(ops.scores(x, TwoTensor(table, table.clone())).a, ops.scores(x, table))
    for norm in (ops.rms_norm, lambda x, weight, eps: ops.add_rms_norm(x, x, weight, eps)):
        with pytest.raises(RuntimeError, match="device"):
            norm(x, weight.to("meta"), 1e-6)


def test_two_dtypes_are_what_they_are_to_torch() -> None:
    """As where only one of two layers is packed, under autocast."""
    x, weight = randn(3, 64), randn(64)
    for operation in (ops.geglu, lambda a, b: ops.add_rms_norm(b, a, weight, 1e-6)):
        found = operation(x, x.bfloat16())
        with ops.only_reference():
            assert torch.equal(found, operation(x, x.bfloat16()))


class Doubled(QuantLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_layers_that_do_more_than_multiply_are_called() -> None:
    """A hook, a subclass, a `forward` put on one layer: as adapters and those who look on go about it."""
    x, matrix = randn(3, 64), packed()
    plain = QuantLinear(matrix)
    expected = torch.cat((plain(x), plain(x)))
    gated = ops.gated(x, plain, plain)
    hooked, patched = QuantLinear(matrix), QuantLinear(matrix)
    hooked.register_forward_hook(lambda module, given, found: 2 * found)
    patched.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    for layer in (hooked, patched, Doubled(matrix)):
        assert torch.equal(torch.cat(ops.project(x, plain, layer)), torch.cat((plain(x), 2 * plain(x))))
        torch.testing.assert_close(ops.gated(x, plain, layer), 2 * gated)
    assert torch.equal(torch.cat(ops.project(x, plain, plain)), expected)
    calls: list[nn.Module] = []
    hook = register_module_forward_hook(lambda module, given, found: calls.append(module))
    ops.project(x, plain, plain)
    hook.remove()
    assert calls == [plain, plain]


def test_a_gradient_is_not_lost_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels have none either."""
    kernels = types.ModuleType("kernels")
    monkeypatch.setattr(ops, "_triton", lambda: kernels)
    x = types.SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
    assert ops._packed(x) is kernels  # type: ignore[arg-type]
    with torch.inference_mode(False), torch.enable_grad():
        assert ops._packed(x) is None  # type: ignore[arg-type]


def test_beside_the_kernels_torch_has_one_thread(monkeypatch):
    """In layers that are gone through one by one; where the products are torch's it keeps its threads."""
    seen = []
    forward = DecoderLayer.forward

    def watched(layer, x, angles, attend):
        seen.append(torch.get_num_threads())
        return forward(layer, x, angles, attend)

    monkeypatch.setattr(DecoderLayer, "forward", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for scheme, count in (("int4", 1), (None, 2)):
            source = SyntheticSource(config_of("tiny"), scheme)
            weights = {name: source.weight(name) for name in source.names()}
            network = assemble(source.config, weights, dtype=torch.float32).eval()
            prompt, seen[:] = Prompt([7] * 1000, ""), []
            network(torch.tensor([prompt.ids]), PaddedBatch.from_prompts(network.config.text, [prompt]))
            assert set(seen) == {count}
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_ids_without_values_go_through_the_network():
    """As when somebody asks what shapes a pass has."""
    source = SyntheticSource(config_of("tiny"), None)
    network = assemble(source.config, {name: source.weight(name) for name in source.names()}, dtype=torch.float32)
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ids = mode.from_tensor(torch.tensor([5, 6, 7]))
        assert network.embed(ids, Media()).shape == (3, source.config.text.hidden_size)
