"""From raw pixels and raw samples to soft tokens: all there is instead of a vision tower and an audio tower.

Letters: P patches, A frames of sound, E width of the picture embedder, M hidden size of the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iolite.config import AudioConfig, VisionConfig
from iolite.kernels import ops


class TokenEmbedding(nn.Embedding):
    """The vocabulary's table, which is also the tied head."""

    def scores(self, hidden: Tensor) -> Tensor:
        """hidden [N, M] times every row: [N, vocabulary]."""
        return ops.scores(hidden, self.weight)


class VisionEmbedder(nn.Module):
    """`vision_embedder`: LayerNorm, linear, LayerNorm, plus a learnt position for each axis, LayerNorm.

    The three LayerNorms use torch's own epsilon of 1e-5, not the config's.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.mm_embed_dim
        self.patch_ln1 = nn.LayerNorm(config.patch_dim)
        self.patch_dense = nn.Linear(config.patch_dim, size)
        self.patch_ln2 = nn.LayerNorm(size)
        self.pos_embedding = nn.Parameter(torch.zeros(config.mm_posemb_size, 2, size))
        self.pos_norm = nn.LayerNorm(size)

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """pixels [P, side * side * 3] in [0, 1], positions [P, 2] as (column, row) -> [P, E]."""
        x = self.patch_ln2(self.patch_dense(self.patch_ln1(pixels.to(self.patch_dense.weight.dtype))))
        columns, rows = positions.unbind(-1)
        return self.pos_norm(x + (self.pos_embedding[columns, 0] + self.pos_embedding[rows, 1]))


class MultimodalEmbedder(nn.Module):
    """`embed_vision` and `embed_audio`: RMS norm without a weight, then one projection into the decoder."""

    def __init__(self, size: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.embedding_projection = nn.Linear(size, hidden_size, bias=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[P or A, size] -> [P or A, M]."""
        return self.embedding_projection(ops.rms_norm(x.to(self.embedding_projection.weight.dtype), None, self.eps))


def vision_projection(config: VisionConfig, hidden_size: int) -> MultimodalEmbedder:
    return MultimodalEmbedder(config.mm_embed_dim, hidden_size, config.rms_norm_eps)


def audio_projection(config: AudioConfig, hidden_size: int) -> MultimodalEmbedder:
    return MultimodalEmbedder(config.audio_embed_dim, hidden_size, config.rms_norm_eps)
