"""Quantises a network to int4 by the data that goes through it, in one forward pass of all calibration tokens.

The pass goes through the network as always, layer by layer. Each projection, when its input arrives, first rounds its
own weight for just this input (`gptq.py`) and then goes on with the rounded weight, so that every later one sees, and
makes good, what the ones before it really put out. At most one projection is in float32 at a time.

    batch = PaddedBatch.from_prompts(network.config.text, prompts)  # with text, pictures and sounds
    calibrate_(network, lambda: network(batch.ids, batch), batch.lengths)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from iolite.errors import CheckpointError
from iolite.quant.formats import Format, pack
from iolite.quant.gptq import gptq, inverse_factor
from iolite.quant.linear import float_norms_, install
from iolite.quant.schemes import TABLES, format_for, quantise_named

# Inputs summed at a time: 2048 of the 12B's widest, 15,360 values each, are 126 MB in float32.
_TOKENS = 2048


class _Inputs:
    """The factor of the inputs that came last: query, key and value projection read the same tensor."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self._last: Tensor | None = None
        self._factor = torch.empty(0)

    def factor(self, x: Tensor) -> Tensor:
        """For x [B, T, C], of which the first lengths[b] of T are no padding."""
        if x is not self._last:
            self._last = x
            real = torch.arange(x.shape[1], device=x.device) < self.lengths.to(x.device)[:, None]  # [B, T]
            hessian = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
            for rows in real.nonzero().split(_TOKENS):
                part = x[rows[:, 0], rows[:, 1]].float()
                hessian.addmm_(part.T, part)
            self._factor = inverse_factor(hessian)
        return self._factor


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    forward: Callable[[], Any],
    lengths: Tensor,
    *,
    head: Format | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Packs a float model into scheme "int4" in place. `forward()` runs it once over B padded sequences of lengths [B].

    The vocabulary's table and the head are quantised without data, first. progress(done, count, name) is called before
    each tensor. Raises CheckpointError for weights that are not finite or that no input has reached.
    """
    parameters = dict(model.named_parameters())
    formats = {name: format_for(name, p.shape, "int4", head=head) for name, p in parameters.items()}
    chosen = {name: format for name, format in formats.items() if format is not None}
    waiting, inputs = set(chosen), _Inputs(lengths)

    def begin(name: str) -> None:
        if progress:
            progress(len(chosen) - len(waiting), len(chosen), name)
        waiting.remove(name)

    def learn(name: str, layer: nn.Linear, x: Tensor) -> None:
        begin(name)
        try:
            matrix = pack(gptq(layer.weight, inputs.factor(x)))
        except ValueError as error:
            raise CheckpointError(f"cannot quantise {name}: {error}") from None
        install(model, name, matrix)
        # This call of the float layer goes on, with the rounded weights; it is the last one.
        layer.weight = nn.Parameter(matrix.to_float().to(x.dtype), requires_grad=False)

    for name in chosen.keys() & set(TABLES):
        begin(name)
        install(model, name, quantise_named(name, parameters[name], chosen[name]))
    float_norms_(model)
    for name in chosen.keys() - set(TABLES):
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda layer, x, name=name: learn(name, layer, x[0]))
    del parameters
    forward()
    if waiting:
        raise CheckpointError(f"no calibration input reached {min(waiting)}")
