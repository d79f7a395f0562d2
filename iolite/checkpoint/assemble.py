"""A network from weights: floats in the format that is computed in, packed matrices as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from iolite.checkpoint import names
from iolite.config import ModelConfig
from iolite.model.unified import Unified
from iolite.quant.formats import PackedMatrix
from iolite.quant.linear import install


def assemble(
    config: ModelConfig,
    weights: Mapping[str, Tensor | PackedMatrix],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Unified:
    """The network with these weights, by our names. dtype is that of the decoder's floats.

    Beside packed matrices the embedders of pictures and sounds stay bfloat16: they are read once for a prompt and not
    once for a token, and as float32 they would take twice the memory.
    """
    network = empty_network(config)
    packed = {name: weight for name, weight in weights.items() if isinstance(weight, PackedMatrix)}
    floats = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
    state = {name: tensor.to(device=device, dtype=_dtype(name, dtype, bool(packed))) for name, tensor in floats.items()}
    for name, matrix in packed.items():
        install(network, name, PackedMatrix(matrix.data.to(device), matrix.rows, matrix.cols))
        state[name] = network.get_buffer(name)
    network.load_state_dict(state, assign=True)
    return network


def empty_network(config: ModelConfig) -> Unified:
    """The network on the meta device: shapes without numbers."""
    with torch.device("meta"), _NothingDrawn():
        return Unified(config)


class _NothingDrawn(TorchFunctionMode):
    """Leaves out the drawing of normal numbers. On the meta device torch imports its compiler for that, only to find
    that there is nothing to fill: more than a second, and more than all the rest of loading."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.init.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _dtype(name: str, dtype: torch.dtype, beside_packed: bool) -> torch.dtype:
    decoder = name == names.LM_HEAD or name.startswith("language_model.")
    return torch.bfloat16 if beside_packed and not decoder and dtype is torch.float32 else dtype
