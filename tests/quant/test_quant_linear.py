"""Modules with packed weights, alone and inside the network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from iolite.errors import CheckpointError
from iolite.kernels import ops
from iolite.model.batch import Media, PaddedBatch
from iolite.model.unified import Unified
from iolite.quant.formats import FORMATS, INT4, INT8, Format, PackedMatrix, quantise
from iolite.quant.linear import Packed, QuantEmbedding, QuantLinear, install, quantize_
from iolite.quant.schemes import SCHEMES, format_for

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)


def random_matrix(rows: int, cols: int, format: Format = INT4) -> PackedMatrix:
    return quantise(torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)), format)


@every_format
@pytest.mark.parametrize(("rows", "cols"), [(16, 64), (37, 100), (5, 31)])
def test_linear_is_a_product_with_the_decoded_weights(format: Format, rows: int, cols: int) -> None:
    matrix, x = random_matrix(rows, cols, format), torch.randn(2, 3, cols)
    with ops.only_reference():
        y = QuantLinear(matrix)(x)
    assert y.shape == (2, 3, rows) and y.dtype is torch.float32
    # The same product; float32 sums may be taken in another order.
    torch.testing.assert_close(y, x @ matrix.to_float().T)


@every_format
def test_embedding_and_scores(format: Format) -> None:
    matrix = random_matrix(37, 100, format)
    table, ids = QuantEmbedding(matrix), torch.tensor([[0, 36, 5], [16, 15, 36]])
    with ops.only_reference():
        rows, scores = table(ids), table.scores(torch.ones(3, 100))
    assert torch.equal(rows, matrix.to_float()[ids])
    torch.testing.assert_close(scores, matrix.to_float().sum(-1).expand(3, -1))


def test_state_has_the_name_of_the_float_module() -> None:
    layer = QuantLinear(random_matrix(16, 64))
    assert list(layer.state_dict()) == ["weight"] and not list(layer.parameters())
    other = random_matrix(16, 64, INT4)
    other.data[0, 0, 0] ^= 255
    layer.load_state_dict({"weight": other.data}, assign=True)
    assert torch.equal(layer.matrix.to_float(), other.to_float())
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.matrix.to_float(), other.to_float()) and twin.matrix.data is not other.data
    assert "16, 64, int4" in repr(layer)


def test_install_takes_the_place_of_linear_and_embedding() -> None:
    model = nn.Module()
    model.inner = nn.ModuleList([nn.Linear(64, 16, bias=False, device="meta"), nn.Embedding(16, 64, device="meta")])
    install(model, "inner.0.weight", random_matrix(16, 64))
    install(model, "inner.1.weight", random_matrix(16, 64))
    assert isinstance(model.inner[0], QuantLinear) and isinstance(model.inner[1], QuantEmbedding)
    install(model, "inner.1.weight", random_matrix(16, 64, INT8))  # packed already: replaced
    assert isinstance(model.inner[1], QuantEmbedding) and model.inner[1].matrix.format is INT8


def test_install_refuses_what_does_not_fit() -> None:
    model = nn.Sequential(nn.Linear(64, 16, bias=False), nn.LayerNorm(64), nn.Linear(64, 16))
    with pytest.raises(ValueError, match="packed matrix"):
        install(model, "0.weight", random_matrix(16, 65))
    for name in ("1.weight", "2.weight"):
        with pytest.raises(ValueError, match="no packed form"):
            install(model, name, random_matrix(16, 64))
    with pytest.raises(AttributeError):
        install(model, "3.weight", random_matrix(16, 64))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["published", "no-vision"])
def test_a_quantised_network_is_the_float_network_of_the_decoded_weights(
    load_tiny: Callable[[str], Unified], scheme: str, name: str
) -> None:
    plain = load_tiny(name)
    packed, rounded = copy.deepcopy(plain), copy.deepcopy(plain)
    seen: list[tuple[int, int, str]] = []
    quantize_(packed, scheme, progress=lambda *step: seen.append(step))
    state = dict(plain.state_dict())
    chosen = {n: f for n, t in state.items() if (f := format_for(n, t.shape, scheme))}
    assert [s[2] for s in seen] == list(chosen) and [s[0] for s in seen] == list(range(len(chosen)))
    assert {n for n, m in packed.named_modules() if isinstance(m, Packed)} == {
        n.removesuffix(".weight") for n in chosen
    }
    assert set(packed.state_dict()) == set(state)
    rounded.load_state_dict(state | {n: quantise(state[n], f).to_float() for n, f in chosen.items()})
    ids = torch.randint(20, 96, (2, 40), generator=torch.Generator().manual_seed(1))

    def logits(model: Unified) -> torch.Tensor:
        batch = PaddedBatch(plain.config.text, ids, torch.tensor([40, 40]), None, Media())
        with torch.inference_mode():
            return model.logits(model(ids, batch))

    with ops.only_reference():
        given, expected, unquantised = logits(packed), logits(rounded), logits(plain)
    torch.testing.assert_close(given, expected)
    assert not torch.allclose(given, unquantised, atol=1e-4)


def test_norms_become_float32(load_tiny: Callable[[str], Unified]) -> None:
    model = copy.deepcopy(load_tiny("published")).bfloat16()
    quantize_(model, "int8", head=INT4)
    assert model.language_model.norm.weight.dtype is torch.float32
    assert model.language_model.layers[0].layer_scalar.dtype is torch.float32
    assert model.embed_vision.embedding_projection.weight.dtype is torch.bfloat16
    assert model.language_model.embed_tokens.weight.dtype is torch.uint8
    assert model.language_model.embed_tokens.matrix.format is INT4


def test_weights_that_are_not_numbers_are_named(load_tiny: Callable[[str], Unified]) -> None:
    model = copy.deepcopy(load_tiny("published"))
    model.language_model.layers[2].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight.*not finite"):
        quantize_(model, "int4")
