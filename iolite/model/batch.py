"""What one forward pass is about: which tokens, at which positions, with which media, and who may look at whom.

Two kinds answer the model's one question ("attend for layer i"):

- `PaddedBatch`: whole sequences in a [B, T] rectangle, no memory. Slow, obvious, differentiable: the reference.
- `RaggedBatch`: the new tokens of several sequences end to end, each with its own cache. Unequal prompts need no
  padding, and a chunk of one prompt can run beside the single new tokens of others.

The mask (FACTS of the family): a full layer is causal. A sliding layer sees `window` tokens up to and including the
query's own, and inside one picture or one video frame both ways, but never outside the window.

Letters: B sequences, T padded length, N tokens, S keys, H query heads, K key-value heads, D head size, P patches,
A frames of sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from iolite.cache import KVCache
from iolite.config import TextConfig
from iolite.kernels import ops
from iolite.kernels.reference import may_look
from iolite.model.attention import Attend

if TYPE_CHECKING:
    from iolite.prompt import Prompt, Span


@dataclass(frozen=True)
class Media:
    """Raw pictures and sounds, and the rows of the flattened ids that they replace."""

    pixels: Tensor | None = None  # [P, side * side * 3] in [0, 1]
    positions: Tensor | None = None  # [P, 2] (column, row)
    pixel_index: Tensor | None = None  # [P]
    frames: Tensor | None = None  # [A, samples per token]
    frame_index: Tensor | None = None  # [A]


class Batch(Protocol):
    """What the model asks of a batch."""

    media: Media
    positions: Tensor
    plain: Sequence[Segment] | None
    """All tokens by sequence, where one call may go through all layers and write to the caches; else None."""

    def attend(self, layer: int, key_weight: Tensor | None = None) -> Attend:
        """The attention function of one layer. key_weight [D] is the weight of its k_norm, which a cache that keeps the
        value in place of the key needs."""
        ...

    def finish(self) -> None:
        """Called once after the last layer."""
        ...


class PaddedBatch:
    """B whole sequences, padded at the end to T; padding is computed and ignored (no real token looks at it)."""

    plain = None

    def __init__(self, config: TextConfig, ids: Tensor, lengths: Tensor, blocks: Tensor | None, media: Media) -> None:
        """ids [B, T], lengths [B], blocks [B, T] (0: no two-way block), media indexed into ids.flatten()."""
        self.config, self.ids, self.lengths, self.media = config, ids, lengths, media
        self.positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        row = self.positions[:1]
        self._full = may_look(row, row, None, None, None)[:, None]  # [1, 1, T, T]
        sliding = may_look(row if blocks is None else self.positions, row, blocks, blocks, config.sliding_window)
        self._sliding = sliding[:, None]  # [B or 1, 1, T, T]

    @classmethod
    def from_prompts(
        cls, config: TextConfig, prompts: Sequence[Prompt], device: torch.device | str = "cpu"
    ) -> PaddedBatch:
        longest = max(len(p.ids) for p in prompts)
        ids = np.zeros((len(prompts), longest), np.int64)
        blocks = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.ids)] = prompt.ids
            blocks[row, : len(prompt.ids)] = prompt.blocks()
        media = gather_media(
            [(row * longest, span) for row, prompt in enumerate(prompts) for span in prompt.spans], device
        )
        lengths = torch.tensor([len(p.ids) for p in prompts], device=device)
        two_way = torch.from_numpy(blocks).to(device) if blocks.any() else None
        return cls(config, torch.from_numpy(ids).to(device), lengths, two_way, media)

    def attend(self, layer: int, key_weight: Tensor | None = None) -> Attend:
        mask = self._full if self.config.is_full(layer) else self._sliding
        return lambda q, k, v: ops.attention(q, k, v, mask)

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class Segment:
    """The new tokens of one sequence: n of them, continuing its cache. blocks [n] as in `may_look`, or None."""

    cache: KVCache
    n: int
    blocks: Tensor | None = None


class RaggedBatch:
    """The new tokens of several sequences, end to end: ids [N] with N the sum of the segments' n."""

    def __init__(self, config: TextConfig, segments: Sequence[Segment], media: Media, device: torch.device) -> None:
        self.config, self.segments, self.media = config, segments, media
        positions = [p for s in segments for p in range(s.cache.length, s.cache.length + s.n)]
        self.positions = torch.tensor(positions, device=device)
        self.plain = segments if all(segment.blocks is None for segment in segments) else None

    @classmethod
    def from_parts(
        cls, config: TextConfig, caches: Sequence[KVCache], parts: Sequence[Prompt], device: torch.device
    ) -> RaggedBatch:
        """parts[i], with the media among its tokens, continues caches[i]."""
        segments, placed, offset = [], [], 0
        for cache, part in zip(caches, parts, strict=True):
            two_way = None
            if part.spans:
                placed += [(offset, span) for span in part.spans]
                if (blocks := part.blocks()).any():
                    two_way = torch.from_numpy(blocks).to(device)
            segments.append(Segment(cache, len(part.ids), two_way))
            offset += len(part.ids)
        return cls(config, segments, gather_media(placed, device) if placed else Media(), device)

    def attend(self, layer: int, key_weight: Tensor | None = None) -> Attend:
        window = None if self.config.is_full(layer) else self.config.sliding_window

        def attend_one(segment: Segment, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = segment.cache.layers[layer]
            keys = rows.extend(k, v, segment.cache.length, key_weight)
            attended = ops.attend(rows.layout.queries(q, key_weight), keys, window, segment.blocks)
            return rows.layout.output(attended)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if len(self.segments) == 1:
                return attend_one(self.segments[0], q, k, v)
            sizes = [segment.n for segment in self.segments]
            parts = zip(self.segments, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
            return torch.cat([attend_one(*part) for part in parts])

        return attend

    def finish(self) -> None:
        for segment in self.segments:
            segment.cache.length += segment.n


def gather_media(placed: Sequence[tuple[int, Span]], device: torch.device | str) -> Media:
    """Tensors of several spans; each comes with what to add to its start to get its row in the flattened ids."""

    def join(kinds: tuple[str, ...]) -> tuple[Tensor, Tensor, list[Span]] | None:
        chosen = [(offset, span) for offset, span in placed if span.kind in kinds]
        if not chosen:
            return None
        rows = np.concatenate([np.arange(span.length) + offset + span.start for offset, span in chosen])
        arrays = np.concatenate([span.array for _, span in chosen])
        return torch.from_numpy(arrays).to(device), torch.from_numpy(rows).to(device), [s for _, s in chosen]

    vision, audio = join(("image", "video")), join(("audio",))
    positions = None
    if vision:
        positions = torch.from_numpy(np.concatenate([span.positions for span in vision[2]])).to(device)
    return Media(
        pixels=vision and vision[0],
        positions=positions,
        pixel_index=vision and vision[1],
        frames=audio and audio[0],
        frame_index=audio and audio[1],
    )
