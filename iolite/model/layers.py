"""One decoder block: normalised attention and a gated feed-forward net, each added to the stream after its own norm.

Names are the checkpoint's. Letters: N tokens (any leading shape), M hidden size, F feed-forward size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from iolite.config import TextConfig
from iolite.kernels import ops
from iolite.kernels.contracts import replaceable
from iolite.model.attention import Attend, Attention
from iolite.model.norm import RMSNorm


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    @replaceable
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.gated(x, self.gate_proj, self.up_proj))


class Block(nn.Module):
    """Attention of some kind and an MLP, with four norms and a learnt scalar that keeps activations small (a buffer: it
    is not trained here)."""

    layer_scalar: Tensor

    def __init__(self, config: TextConfig, attention: nn.Module) -> None:
        """attention(x, angles, attend) -> what is added to the stream after its norm."""
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = attention
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Callable[..., Tensor]) -> Tensor:
        h = self.self_attn(self.input_layernorm(x), angles, attend)
        x = self.post_attention_layernorm.added_to(x, h)
        h = self.mlp(self.pre_feedforward_layernorm(x))
        return self.post_feedforward_layernorm.added_to(x, h, self.layer_scalar)


class DecoderLayer(Block):
    """A block of the decoder."""

    self_attn: Attention

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__(config, Attention(config, layer))

    @replaceable
    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        if (block := ops.block(self, x)) is not None:  # the same in two calls
            return block.end(x, attend(*block.begin(x, *angles)))
        return super().forward(x, angles, attend)
