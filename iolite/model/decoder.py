"""The stack of decoder blocks, from scaled embeddings to normalised hidden states."""

from __future__ import annotations

from torch import Tensor, nn

from iolite.config import FULL, SLIDING, TextConfig
from iolite.kernels import ops
from iolite.model.batch import Batch
from iolite.model.embedders import TokenEmbedding
from iolite.model.layers import DecoderLayer
from iolite.model.norm import RMSNorm


class Decoder(nn.Module):
    """`language_model` of the checkpoint."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of ids, times sqrt(M) rounded to their dtype as the reference does (62.0 in bf16)."""
        x = self.embed_tokens(ids).to(self.norm.weight.dtype)  # rows of a packed table come as float32
        return x * x.new_full((), self.config.hidden_size**0.5)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """x [N, M], already scaled, with soft tokens in place -> hidden states [N, M] after the final norm."""
        angles = {kind: self._angles(kind, batch.positions) for kind in (SLIDING, FULL)}
        hidden = ops.stack(self.layers, x, angles[SLIDING], angles[FULL], batch.plain)
        if hidden is None:
            with ops.beside_torch(self.layers[0], x):
                hidden = self._one_by_one(x, angles, batch)
        batch.finish()
        return self.norm(hidden)

    def _one_by_one(self, x: Tensor, angles: dict[str, tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            attend = batch.attend(i, layer.self_attn.k_norm.weight)
            x = layer(x, angles[self.config.layer_types[i]], attend)
        return x

    def _angles(self, kind: str, positions: Tensor) -> tuple[Tensor, Tensor]:
        full = kind == FULL
        head_dim = self.config.global_head_dim if full else self.config.head_dim
        rope = self.config.rope_full if full else self.config.rope_sliding
        return ops.rope_angles(positions, head_dim, rope.theta, rope.num_angles(head_dim))
