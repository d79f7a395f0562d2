"""A decoder block in two calls: the same bits as operation by operation, and only where it may be used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.cpu_kernels import ISAS, code_path
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization
from torch.testing._internal.two_tensor import TwoTensor

from iolite.checkpoint.assemble import assemble
from iolite.checkpoint.synthetic import SyntheticSource, config_of
from iolite.kernels import cpu, ops
from iolite.model.decoder import Decoder
from iolite.model.layers import DecoderLayer
from iolite.model.norm import RMSNorm
from iolite.quant.linear import QuantLinear, quantize_

pytestmark = pytest.mark.skipif(cpu.load() is None, reason=f"no C++ kernels: {cpu.reason()}")
SLIDING, FULL = 0, 5  # layers of the tiny shape; the full one's values are its raw keys


def decoder_of(scheme: str | None) -> Decoder:
    source = SyntheticSource(config_of("tiny"), scheme)
    weights = {name: source.weight(name) for name in source.names()}
    network = assemble(source.config, weights, dtype=torch.float32).eval().requires_grad_(False)
    with torch.no_grad():  # of synthetic models the norms are ones
        g = torch.Generator().manual_seed(3)
        for layer in network.language_model.layers:
            for vector in (*layer.parameters(), layer.layer_scalar):
                if vector.dim() == 1:
                    vector.mul_(0.5 + torch.rand(vector.shape, generator=g))
    return network.language_model


@pytest.fixture(params=["int4", "int8"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return decoder_of(request.param)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def example(decoder: Decoder, number: int, n: int) -> tuple[DecoderLayer, Tensor, tuple[Tensor, Tensor]]:
    layer = decoder.layers[number]
    assert isinstance(layer, DecoderLayer)
    x = torch.randn(n, decoder.config.hidden_size, generator=torch.Generator().manual_seed(n))
    return layer, x, decoder._angles(decoder.config.layer_types[number], torch.arange(7, 7 + n))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No attention, but something that depends on all three."""
    repeat = q.shape[1] // k.shape[1]
    return q * k.repeat_interleave(repeat, 1) + v.repeat_interleave(repeat, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", [SLIDING, FULL])
def test_the_same_bits_as_operation_by_operation(decoder, number, isa, monkeypatch):
    with code_path(isa):
        for n in (1, 2, 3, 8, 9, 24, 40):
            layer, x, angles = example(decoder, number, n)
            assert ops.block(layer, x) is not None
            fused = layer(x, angles, attend)
            with monkeypatch.context() as context:
                context.setattr(ops, "block", lambda layer, x: None)
                assert torch.equal(fused, layer(x, angles, attend))


def test_it_sees_weights_that_were_replaced(decoder, monkeypatch):
    layer, x, angles = example(decoder, SLIDING, 2)
    before = layer(x, angles, attend)
    other = decoder.layers[1]

    def changed() -> None:
        after = layer(x, angles, attend)
        with monkeypatch.context() as context:
            context.setattr(ops, "block", lambda layer, x: None)
            assert torch.equal(after, layer(x, angles, attend))
        assert not torch.equal(after, before)

    layer.mlp.down_proj = other.mlp.down_proj  # a module
    changed()
    layer.self_attn.q_proj.weight = other.self_attn.q_proj.weight  # a buffer
    changed()
    layer.self_attn.q_norm.weight = nn.Parameter(torch.full_like(layer.self_attn.q_norm.weight, 0.3), False)
    changed()
    layer.layer_scalar = torch.full((1,), 0.125)
    changed()
    layer.input_layernorm.weight.mul_(2)  # in place: read where it lies
    changed()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", [SLIDING, FULL])
def test_float_weights_are_read_where_they_lie(number, isa, monkeypatch):
    decoder = decoder_of(None)
    with code_path(isa):
        for n in (1, 2, 3, 8, 9, 24, 40):
            layer, x, angles = example(decoder, number, n)
            fused = layer(x, angles, attend)
            with monkeypatch.context() as context:
                context.setattr(ops, "block", lambda layer, x: None)
                expected = layer(x, angles, attend)
            torch.testing.assert_close(fused, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
            assert torch.equal(fused[-1:], layer(x[-1:], tuple(a[-1:] for a in angles), attend))
        layer.mlp.gate_proj.weight.mul_(2)
        assert not torch.equal(layer(x, angles, attend), fused)


def test_it_sees_weights_that_were_moved(decoder, monkeypatch):
    """`Module.to` leaves a parameter what it is and gives it other memory; so does whoever sets its data."""
    layer, x, angles = example(decoder, SLIDING, 2)
    before = layer(x, angles, attend)
    with torch.inference_mode(False), torch.no_grad():
        layer.pre_feedforward_layernorm.bfloat16()
        assert ops.block(layer, x) is None
        layer.pre_feedforward_layernorm.float()
        layer.mlp.up_proj.weight.data = layer.mlp.gate_proj.weight.data.clone()
    assert ops.block(layer, x) is not None
    after = layer(x, angles, attend)
    assert not torch.equal(after, before)
    with monkeypatch.context() as context:
        context.setattr(ops, "block", lambda layer, x: None)
        assert torch.equal(after, layer(x, angles, attend))


def test_attention_may_answer_in_bfloat16(decoder):
    """As it does under autocast; read as float32 that would be twice the memory that is there."""
    layer, x, angles = example(decoder, SLIDING, 3)
    rounded = layer(x, angles, lambda q, k, v: attend(q, k, v).bfloat16().float())
    assert torch.equal(layer(x, angles, lambda q, k, v: attend(q, k, v).bfloat16()), rounded)


def test_other_weights_and_norms_adapters_and_hooks_go_operation_by_operation(decoder):
    layer, x, angles = example(decoder, SLIDING, 2)
    assert ops.block(layer, x) is not None
    layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)  # as an adapter wraps it
    assert ops.block(layer, x) is None
    assert layer(x, angles, attend).isfinite().all()
    layer, x, angles = example(decoder, 1, 2)
    layer.self_attn.k_norm.bfloat16()
    assert ops.block(layer, x) is None
    assert layer(x, angles, attend).isfinite().all()
    layer, x, angles = example(decoder, 2, 2)
    assert ops.block(layer, x) is not None
    layer.mlp.up_proj = nn.Linear(layer.mlp.up_proj.matrix.cols, layer.mlp.up_proj.matrix.rows, bias=False)  # one alone
    assert ops.block(layer, x) is None
    floats = decoder_of(None).layers
    assert ops.block(floats[0], x) is not None
    hook = floats[0].mlp.register_forward_hook(lambda *_: None)
    assert ops.block(floats[0], x) is None
    hook.remove()
    assert ops.block(floats[0], x) is not None
    floats[1].mlp.up_proj = type("Scaled", (nn.Linear,), {})(x.shape[1], 8, bias=False)
    floats[2].mlp.up_proj.bias = nn.Parameter(torch.zeros(1))
    floats[3].mlp.up_proj.bfloat16()
    assert [ops.block(layer, x) for layer in floats[1:4]] == [None] * 3


def test_few_tokens_without_gradient_and_not_for_the_reference(decoder, monkeypatch):
    layer, x, _ = example(decoder, SLIDING, cpu.most_tokens(decoder.config.hidden_size))
    assert ops.block(layer, x) is not None
    assert ops.block(layer, torch.cat((x, x[:1]))) is None
    assert ops.block(layer, x[:0]) is None
    assert ops.block(layer, x[None]) is None
    assert ops.block(layer, x.bfloat16()) is None
    with ops.only_reference():
        assert ops.block(layer, x) is None
    with torch.inference_mode(False), torch.enable_grad():
        assert ops.block(layer, x) is None


def test_few_tokens_are_as_many_as_are_few_numbers():
    assert cpu.most_tokens(3840) == cpu.most_tokens(8192) == 24
    assert cpu.most_tokens(192) == 20 * 24


def test_a_layer_that_is_gone_is_forgotten():
    from iolite.kernels.cpu.block import _blocks

    held = len(_blocks)
    layer, x, _ = example(decoder_of("int4"), SLIDING, 1)
    block = ops.block(layer, x)
    assert len(_blocks) == held + 1
    assert block is ops.block(layer, x)
    del layer, block
    assert len(_blocks) == held


def test_layers_packed_after_loading(monkeypatch):
    decoder = decoder_of(None)
    layer, x, angles = example(decoder, FULL, 3)
    before = layer(x, angles, attend)
    model = nn.ModuleDict({"language_model": decoder})
    with torch.inference_mode(False):
        quantize_(model, "int8")
    assert isinstance(layer.mlp.gate_proj, QuantLinear)
    assert ops.block(layer, x) is not None
    after = layer(x, angles, attend)
    assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_what_torch_makes_by_default_changes_nothing(decoder, default):
    layer, x, angles = example(decoder, FULL, 3)
    expected = layer(x, angles, attend)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(layer(x, angles, attend), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def other_norm(layer: DecoderLayer) -> None:
    layer.input_layernorm = nn.LayerNorm(len(layer.input_layernorm.weight))


def other_eps(layer: DecoderLayer) -> None:
    layer.post_feedforward_layernorm.eps = 0.5


def other_eps_of_heads(layer: DecoderLayer) -> None:
    layer.self_attn.eps = 50.0


def computed_weight(layer: DecoderLayer) -> None:
    layer.input_layernorm = RMSNorm(len(layer.input_layernorm.weight), layer.input_layernorm.eps)
    register_parametrization(layer.input_layernorm, "weight", nn.Tanh())


def other_forward(layer: DecoderLayer) -> None:
    before = layer.mlp.forward
    layer.mlp.forward = lambda x: before(x).abs()


def subclass(layer: DecoderLayer) -> None:
    class Positive(QuantLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    layer.self_attn.o_proj = Positive(layer.self_attn.o_proj.matrix)


@pytest.mark.parametrize(
    "change", [other_norm, other_eps, other_eps_of_heads, computed_weight, other_forward, subclass]
)
def test_what_the_kernels_would_compute_otherwise_goes_operation_by_operation(decoder, change):
    """What the reference makes of the layer then, to within what rounding activations to int8 leaves."""
    layer, x, angles = example(decoder, SLIDING, 2)
    with ops.only_reference():
        before = layer(x, angles, attend)
        with torch.inference_mode(False):
            change(layer)
        expected = layer(x, angles, attend)
    assert ops.block(layer, x) is None
    found = layer(x, angles, attend)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert (expected - before).abs().max() > 0.1 * float(expected.abs().max())


def test_a_forward_of_its_own_is_noticed_later(decoder):
    layer, x, _ = example(decoder, SLIDING, 2)
    assert ops.block(layer, x) is not None
    layer.mlp.down_proj.forward = layer.mlp.down_proj.forward
    assert ops.block(layer, x) is None
    del layer.mlp.down_proj.forward
    assert ops.block(layer, x) is not None
    hook = register_module_forward_hook(lambda *_: None)
    assert ops.block(layer, x) is None
    hook.remove()
    assert ops.block(layer, x) is not None


def test_sizes_that_do_not_fit_together_are_refused_by_torch(decoder):
    """The library would write as many rows as there are to where it has room for fewer."""
    floats = decoder_of(None).layers
    _, x, angles = example(decoder, SLIDING, 2)
    size, wide = floats[0].mlp.up_proj.in_features, floats[0].mlp.up_proj.out_features
    floats[0].mlp.up_proj = nn.Linear(size, 8 * wide, bias=False)
    floats[1].self_attn.v_proj = nn.Linear(size, floats[1].self_attn.v_proj.out_features // 2, bias=False)
    floats[2].pre_feedforward_layernorm.weight = nn.Parameter(torch.ones(1))
    for layer in floats[:3]:
        assert ops.block(layer, x) is None
    with ops.only_reference(), pytest.raises(RuntimeError, match="size of tensor"):
        floats[0](x, angles, attend)


def test_weights_whose_numbers_lie_elsewhere():
    """A subclass of torch's tensors, as libraries of quantised weights have them: float32 on the CPU at address 0."""
    decoder = decoder_of(None)
    layer, x, angles = example(decoder, SLIDING, 2)
    expected, weight = layer(x, angles, attend), layer.mlp.up_proj.weight.data
    layer.mlp.up_proj.weight = nn.Parameter(TwoTensor(weight, weight.clone()), False)
    assert ops.block(layer, x) is None
    torch.testing.assert_close(layer(x, angles, attend).a, expected)
