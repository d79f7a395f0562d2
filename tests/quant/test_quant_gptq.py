"""Rounding by data: closer where the inputs are, through one matrix and through a network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iolite.errors import CheckpointError
from iolite.kernels import ops
from iolite.model.batch import Media, PaddedBatch
from iolite.model.unified import Unified
from iolite.quant.calibrate import calibrate_
from iolite.quant.formats import INT4, INT8, decode, encode
from iolite.quant.gptq import gptq, inverse_factor
from iolite.quant.linear import Packed, quantize_


def uneven_inputs(n: int, cols: int, seed: int = 0) -> Tensor:
    """Inputs [n, C] in which some directions are a hundred times as strong as others, as in a network."""
    g = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(cols, cols, generator=g))
    return torch.randn(n, cols, generator=g) * torch.logspace(0, -2, cols) @ turn


def test_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    x = uneven_inputs(400, 40).double()
    factor = inverse_factor(x.T @ x, damping=0.01)
    damped = x.T @ x + 0.01 * (x.T @ x).diagonal().mean() * torch.eye(40)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(40, dtype=torch.float64))


@pytest.mark.parametrize(("rows", "cols"), [(64, 96), (100, 40), (60, 75)])
def test_products_with_the_inputs_are_as_close_as_the_theory_says(rows: int, cols: int) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    x = uneven_inputs(1000, cols)
    hessian = x.T @ x
    factor = inverse_factor(hessian)
    blocks = gptq(weight, factor)
    assert blocks.quants.shape == (rows, cols) and blocks.scales.shape == (rows, -(-cols // 32))
    assert int(blocks.quants.max()) < 16
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(cols)

    def error(values: Tensor) -> float:
        return float((((values - weight) @ damped) * (values - weight)).sum())

    # A rounding error of variance s in column j costs s * H_jj alone and s / U_jj² when the columns after it make good
    # what they can. Both variances are a twelfth of a squared step, but steps differ a little.
    theory = float(factor.diagonal().pow(-2).sum() / damped.diagonal().sum())
    measured = error(decode(blocks)) / error(decode(encode(weight, INT4)))
    assert theory < 0.7
    assert 0.75 * theory < measured < 1.25 * theory


@given(seed=st.integers(0, 99))
def test_inputs_without_a_direction_round_to_the_nearest(seed: int) -> None:
    """A Hessian that is a multiple of the identity has nothing to make good."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    blocks, plain = gptq(weight, inverse_factor(3 * torch.eye(64))), encode(weight, INT4)
    assert torch.equal(blocks.scales, plain.scales)
    # Ties apart, of which float32 decides.
    assert (blocks.quants != plain.quants).sum() <= 1


def test_columns_without_inputs_do_no_harm() -> None:
    weight, x = torch.randn(6, 64), uneven_inputs(100, 64)
    x[:, 10:20] = 0
    assert decode(gptq(weight, inverse_factor(x.T @ x))).isfinite().all()
    assert torch.equal(gptq(weight, inverse_factor(torch.zeros(64, 64))).scales, encode(weight, INT4).scales)


def test_a_lattice_is_kept() -> None:
    weight = (0.01 * torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(0))).bfloat16()
    x = uneven_inputs(100, 64)
    assert torch.equal(decode(gptq(weight, inverse_factor(x.T @ x))).bfloat16(), weight)


@pytest.mark.parametrize(("bad", "message"), [(float("nan"), "not finite"), (1e7, "too large")])
def test_bad_weights_are_refused(bad: float, message: str) -> None:
    weight = torch.randn(6, 64)
    weight[2, 40] = bad
    with pytest.raises(ValueError, match=message):
        gptq(weight, inverse_factor(torch.eye(64)))


def batch_of(model: Unified, seed: int) -> PaddedBatch:
    """Eight sequences of 20 to 60 tokens; what stands in the padding would ruin any statistics."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 61, (8,), generator=g)
    ids = torch.randint(20, 96, (8, 60), generator=g)
    return PaddedBatch(model.config.text, ids, lengths, None, Media())


def hidden(model: Unified, batch: PaddedBatch) -> Tensor:
    """The hidden states of the real tokens."""
    with torch.inference_mode(), ops.only_reference():
        out = model(batch.ids, batch)
    return out[torch.arange(60) < batch.lengths[:, None]]


def test_a_calibrated_network_is_closer_on_other_tokens(load_tiny: Callable[[str], Unified]) -> None:
    plain = load_tiny("own-values")
    rounded, learnt = copy.deepcopy(plain), copy.deepcopy(plain)
    quantize_(rounded, "int4", head=INT8)
    batch, seen = batch_of(plain, 1), []
    calibrate_(
        learnt, lambda: learnt(batch.ids, batch), batch.lengths, head=INT8, progress=lambda *step: seen.append(step)
    )
    packed = {f"{name}.weight": m for name, m in learnt.named_modules() if isinstance(m, Packed)}
    assert {s[2] for s in seen} == set(packed) and [s[0] for s in seen] == list(range(len(packed)))
    assert set(learnt.state_dict()) == set(plain.state_dict())
    assert packed["language_model.embed_tokens.weight"].matrix.format is INT8
    assert packed["language_model.layers.0.mlp.up_proj.weight"].matrix.format is INT4
    other = batch_of(plain, 2)
    wanted = hidden(plain, other)
    assert (hidden(learnt, other) - wanted).norm() < 0.9 * (hidden(rounded, other) - wanted).norm()


def test_padding_is_not_learnt_from(load_tiny: Callable[[str], Unified]) -> None:
    plain = load_tiny("own-values")
    batch, states = batch_of(plain, 1), []
    for filler in (20, 95):
        padding = torch.arange(60) >= batch.lengths[:, None]
        filled = PaddedBatch(plain.config.text, batch.ids.masked_fill(padding, filler), batch.lengths, None, Media())
        model = copy.deepcopy(plain)
        with ops.only_reference():
            calibrate_(model, lambda: model(filled.ids, filled), filled.lengths)  # noqa: B023 - called at once
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_network_in_bfloat16_is_taken(load_tiny: Callable[[str], Unified]) -> None:
    model = copy.deepcopy(load_tiny("own-values")).bfloat16()
    batch = batch_of(model, 1)
    calibrate_(model, lambda: model(batch.ids, batch), batch.lengths)
    assert model.language_model.norm.weight.dtype is torch.float32
    assert hidden(model, batch).dtype is torch.float32


def test_what_cannot_be_calibrated_is_named(load_tiny: Callable[[str], Unified]) -> None:
    model = copy.deepcopy(load_tiny("own-values"))
    with pytest.raises(CheckpointError, match=r"no calibration input reached language_model\.layers\.0"):
        calibrate_(model, lambda: None, torch.tensor([1]))
    model = copy.deepcopy(load_tiny("own-values"))
    batch = batch_of(model, 1)
    model.language_model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight.*not finite"):
        calibrate_(model, lambda: model(batch.ids, batch), batch.lengths)
