"""The whole network: text, pictures and sound become one stream of M-wide tokens, and one decoder reads it.

`state_dict()` has the published names without their leading "model."; an untied head is `lm_head.weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iolite.config import ModelConfig
from iolite.kernels import ops
from iolite.model.batch import Batch, Media
from iolite.model.decoder import Decoder
from iolite.model.embedders import VisionEmbedder, audio_projection, vision_projection


class Unified(nn.Module):
    """Gemma 4 Unified at any size its config can describe."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.text.hidden_size
        self.language_model = Decoder(config.text)
        if config.vision:
            self.vision_embedder = VisionEmbedder(config.vision)
            self.embed_vision = vision_projection(config.vision, size)
        if config.audio:
            self.embed_audio = audio_projection(config.audio, size)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(size, config.text.vocab_size, bias=False)

    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        """Token ids (any leading shape N) and what the batch knows of them -> hidden states [N, M]."""
        return self.language_model(self.embed(ids, batch.media), batch)

    def embed(self, ids: Tensor, media: Media) -> Tensor:
        """Text embeddings with the soft tokens of media put in the placeholders' rows (unscaled).

        A placeholder that no media stand behind, one that the model itself has drawn, is padding, as in the reference.
        """
        x = self.language_model.embed(self._without_placeholders(ids))
        flat = x.flatten(0, -2)
        if media.pixels is not None and media.positions is not None and media.pixel_index is not None:
            soft = self.embed_vision(self.vision_embedder(media.pixels, media.positions))
            flat = flat.index_copy(0, media.pixel_index, soft.to(flat.dtype))
        if media.frames is not None and media.frame_index is not None:
            soft = self.embed_audio(media.frames)
            flat = flat.index_copy(0, media.frame_index, soft.to(flat.dtype))
        return flat.view_as(x)

    def _without_placeholders(self, ids: Tensor) -> Tensor:
        """The ids with padding in place of those that stand for media."""
        c = self.config
        media = (c.image_token_id, c.audio_token_id, c.video_token_id)
        if _is_short(ids) and not any(token in media for token in ids.flatten().tolist()):
            return ids  # what is nearly always so while drawing, when each operation of torch's costs as much as this
        placeholder = (ids == media[0]) | (ids == media[1]) | (ids == media[2])
        return ids.masked_fill(placeholder, c.text.pad_token_id)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token [N, vocabulary] in float32, soft-capped, for hidden states [N, M]."""
        scores = self.language_model.embed_tokens.scores if self.lm_head is None else self.lm_head
        return ops.softcap(scores(hidden).float(), self.config.text.final_logit_softcapping)


def _is_short(ids: Tensor) -> bool:
    """Whether there are few, and they can be looked at: those of a subclass of torch's tensors may have no values."""
    return type(ids) is Tensor and ids.is_cpu and ids.numel() <= 16 and not torch.compiler.is_compiling()
