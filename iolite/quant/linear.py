"""Modules with packed weights, and putting them in the place of float ones.

The packed bytes are a buffer named `weight`, so a quantised model's state has the names of a float one. There is no
gradient through them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from iolite.kernels import ops
from iolite.kernels.contracts import replaceable
from iolite.quant.formats import Format, PackedMatrix
from iolite.quant.schemes import format_for, quantise_named


class Packed(nn.Module):
    """A module whose weight is a packed matrix [R, C]."""

    weight: Tensor

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.register_buffer("weight", matrix.data)
        self._matrix = matrix

    @property
    def matrix(self) -> PackedMatrix:
        # .to(device) and load_state_dict(assign=True) replace the buffer.
        if self._matrix.data is not self.weight:
            self._matrix = PackedMatrix(self.weight, self._matrix.rows, self._matrix.cols)
        return self._matrix

    def extra_repr(self) -> str:
        return f"{self._matrix.rows}, {self._matrix.cols}, {self._matrix.format.name}"


class QuantLinear(Packed):
    """x [..., C] -> [..., R] in x's dtype, without a bias."""

    @replaceable
    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.matrix)


class QuantEmbedding(Packed):
    """The vocabulary's table, which is also the tied head: R tokens of C values."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> float32 [..., C]."""
        return ops.embed(self.matrix, ids)

    def scores(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] times every row: [..., R]."""
        return ops.linear(hidden, self.matrix)


def install(model: nn.Module, name: str, matrix: PackedMatrix) -> None:
    """Replaces the linear layer or embedding that owns the tensor `name` ("a.b.weight") by one with packed weights.

    The float module may be on the meta device. Raises ValueError when it is of another kind or shape, AttributeError
    when there is none.
    """
    path = name.removesuffix(".weight")
    owner = model.get_submodule(path)
    if not isinstance(owner, nn.Linear | nn.Embedding | Packed) or getattr(owner, "bias", None) is not None:
        raise ValueError(f"{path} is a {type(owner).__name__}, which has no packed form")
    shape = owner.matrix.shape if isinstance(owner, Packed) else tuple(owner.weight.shape)
    if matrix.shape != shape:
        raise ValueError(f"{path} is {list(shape)}, the packed matrix {list(matrix.shape)}")
    is_table = isinstance(owner, nn.Embedding | QuantEmbedding)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, (QuantEmbedding if is_table else QuantLinear)(matrix))


@torch.no_grad()
def quantize_(
    model: nn.Module,
    scheme: str,
    *,
    head: Format | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Packs a loaded float model in place, tensor by tensor; each float tensor is let go as soon as it is packed.

    model names its tensors as checkpoints do, without "model."; `head` is the format of the vocabulary's table and the
    head, if not the scheme's own. The decoder's norms become float32, which is what packed weights compute in on a CPU.
    progress(done, count, name) is called before each tensor. Raises UsageError for an unknown scheme, CheckpointError
    for weights that are not finite.
    """
    formats = {name: format_for(name, p.shape, scheme, head=head) for name, p in model.named_parameters()}
    chosen = {name: format for name, format in formats.items() if format is not None}
    for done, (name, format) in enumerate(chosen.items()):
        if progress:
            progress(done, len(chosen), name)
        install(model, name, quantise_named(name, model.get_parameter(name), format))
    float_norms_(model)


def float_norms_(model: nn.Module) -> None:
    """Makes the norms and the layer scalars of a decoder on the CPU float32: there, packed weights compute in it."""
    decoder = model.get_submodule("language_model")
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        if tensor.dim() == 1 and tensor.is_floating_point() and tensor.device.type == "cpu":
            tensor.data = tensor.data.float()
