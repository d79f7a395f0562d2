"""Prompts over every modality, and Transformers' logits for them with the masks the model was trained with.

Plain `forward()` of Transformers 5.23.0 builds other masks for pictures than the ones its own docstring of
`create_masks_for_vision_model` states, so the masks come from `create_masks_for_generate` and are passed in; that
they say what the family's rule says is itself tested, position by position (`test_reference_masks.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import Gemma4UnifiedForConditionalGeneration

from iolite.prompt import Prompt, Span
from support.tiny import FIRST_TEXT, MEDIA_TOKENS, VOCABULARY

BOS = 2
TOKEN = {name.removesuffix("_token_id").removesuffix("_token_index"): i for name, i in MEDIA_TOKENS.items()}


@dataclass(frozen=True)
class Text:
    tokens: int


@dataclass(frozen=True)
class Image:
    columns: int
    rows: int = 1


@dataclass(frozen=True)
class Video:
    """Frames of one size, each after a two-token time stamp."""

    frames: int
    columns: int
    rows: int = 1


@dataclass(frozen=True)
class Audio:
    tokens: int


Piece = Text | Image | Video | Audio
Kind = Literal["image", "video", "audio"]


@dataclass
class Placed:
    """One picture, one video frame or one sound, and where its placeholders stand."""

    kind: Kind
    start: int
    array: np.ndarray  # [tokens, features]
    positions: np.ndarray | None = None  # [tokens, 2] (column, row)

    @property
    def length(self) -> int:
        return len(self.array)


@dataclass
class Sample:
    """One prompt: token ids with the placeholders in place, and the raw media behind them."""

    ids: list[int] = field(default_factory=list)
    placed: list[Placed] = field(default_factory=list)

    def prompt(self) -> Prompt:
        """The same prompt as iolite's input type."""
        spans = [
            Span(p.kind, p.start, p.length, p.array, p.positions, f"digest {number}")
            for number, p in enumerate(self.placed)
        ]
        return Prompt(self.ids, "", tuple(spans))

    def blocks(self) -> np.ndarray:
        """[tokens]: which picture or video frame a token is part of, counted from 1; 0 for everything else."""
        blocks = np.zeros(len(self.ids), np.int64)
        vision = [p for p in self.placed if p.kind != "audio"]
        for number, item in enumerate(vision, 1):
            blocks[item.start : item.start + item.length] = number
        return blocks

    def token_types(self) -> np.ndarray:
        """Transformers' `mm_token_type_ids`: 0 text, 1 image, 2 video, 3 audio."""
        types = np.zeros(len(self.ids), np.int64)
        for item in self.placed:
            types[item.start : item.start + item.length] = {"image": 1, "video": 2, "audio": 3}[item.kind]
        return types


def make_sample(
    *pieces: Piece, patch_dim: int = 48, samples_per_token: int = 24, seed: int = 0, bos: bool = True
) -> Sample:
    """A prompt of the pieces in their order, with random text and random media.

    Some patches are nearly flat and some frames nearly silent, where the epsilons of the norms decide the result.
    """
    rng = np.random.default_rng(seed)
    sample = Sample([BOS] if bos else [])

    def text(count: int) -> None:
        sample.ids += rng.integers(FIRST_TEXT, VOCABULARY, count).tolist()

    def media(kind: Kind, brackets: tuple[str, str], array: np.ndarray, positions: np.ndarray | None = None) -> None:
        sample.ids.append(TOKEN[brackets[0]])
        sample.placed.append(Placed(kind, len(sample.ids), array, positions))
        sample.ids += [TOKEN[kind]] * len(array)
        sample.ids.append(TOKEN[brackets[1]])

    def picture(kind: Kind, columns: int, rows: int) -> None:
        array = rng.random((columns * rows, patch_dim), np.float32)
        array[::3] = 0.5 + 0.003 * array[::3]
        grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
        media(kind, ("boi", "eoi"), array, grid)

    for piece in pieces:
        if isinstance(piece, Text):
            text(piece.tokens)
        elif isinstance(piece, Image):
            picture("image", piece.columns, piece.rows)
        elif isinstance(piece, Video):
            for _ in range(piece.frames):
                text(2)
                picture("video", piece.columns, piece.rows)
        else:
            array = rng.uniform(-1, 1, (piece.tokens, samples_per_token)).astype(np.float32)
            array[1::3] *= 1e-3
            array[4::5] = 0
            media("audio", ("boa", "eoa"), array)
    return sample


def reference_media(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Transformers' keyword arguments for the media of a batch, padded as its processors pad them."""
    inputs: dict[str, Tensor] = {}
    placed = [item for sample in samples for item in sample.placed]
    images, frames, sounds = ([p for p in placed if p.kind == kind] for kind in ("image", "video", "audio"))
    if images:
        inputs["pixel_values"] = pad_rows([p.array for p in images], 0.0)
        inputs["image_position_ids"] = pad_rows([p.positions for p in images if p.positions is not None], -1)
    if frames:
        inputs["pixel_values_videos"] = pad_rows([p.array for p in frames], 0.0)
        inputs["video_position_ids"] = pad_rows([p.positions for p in frames if p.positions is not None], -1)
        inputs["num_frames_per_video"] = torch.tensor([len(frames)])
    if sounds:
        inputs["input_features"] = pad_rows([p.array for p in sounds], 0.0)
        inputs["input_features_mask"] = pad_rows([np.ones(p.length, bool) for p in sounds], False)
    return inputs


def pad_rows(arrays: list[np.ndarray], value: float) -> Tensor:
    """Stacks arrays of unequal length, and always one row longer than the longest, so that padding is never absent."""
    longest = max(map(len, arrays)) + 1
    out = np.full((len(arrays), longest, *arrays[0].shape[1:]), value, arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)


def reference_masks(
    model: Gemma4UnifiedForConditionalGeneration, token_types: Tensor, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """{layer type: additive mask [B, 1, T, T]} with the masks of the family's training. token_types [B, T]."""
    batch, length = token_types.shape
    hidden = model.config.get_text_config().hidden_size
    return model.create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.zeros(batch, length, hidden, dtype=model.dtype),
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=torch.arange(length)[None],
        mm_token_type_ids=token_types,
        is_first_iteration=True,
    )


@torch.no_grad()
def reference_batch(model: Gemma4UnifiedForConditionalGeneration, samples: Sequence[Sample]) -> list[Tensor]:
    """[tokens, vocabulary] for each prompt: Transformers' logits at every position, run as one batch padded right."""
    lengths = [len(s.ids) for s in samples]

    def rectangle(rows: Iterable[Sequence[int]]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    ids = rectangle(s.ids for s in samples)
    real = rectangle([1] * length for length in lengths)
    masks = reference_masks(model, rectangle(s.token_types().tolist() for s in samples), real)
    logits = model(ids, attention_mask=masks, use_cache=False, **reference_media(samples)).logits
    return [row[:length].float() for row, length in zip(logits, lengths, strict=True)]


def reference_logits(model: Gemma4UnifiedForConditionalGeneration, sample: Sample) -> Tensor:
    """[tokens, vocabulary]: Transformers' logits at every position of one prompt."""
    return reference_batch(model, [sample])[0]
