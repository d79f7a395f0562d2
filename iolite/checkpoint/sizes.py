"""Bytes of a model's weights and of its cache, computed from its config. No torch: what stands in other files beside
tensors is repeated here, and tests hold the two together.

Letters: K key-value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from iolite.checkpoint import names
from iolite.config import OFFICIAL_IMAGE_BUDGETS, ModelConfig, TextConfig
from iolite.memory import SMALL_PARAMETERS

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # other spellings
TILE_BYTES = {"int4": 576, "int8": 1088}  # of 16 rows by 64 columns, as in iolite/quant/formats.py
SLACK = 1024  # rows of a ring beyond its window, as in iolite/cache.py

_PACKED_PARTS = ("decoder", "embedding", "head")  # their matrices; vectors and the other parts stay floats
_SOUND_TOKENS = 750  # the most at once: 30 s
# The 12B's drafter: sliding and full layers, hidden and feed-forward size. It has no keys and values of its own.
_DRAFTER_LAYERS, _DRAFTER_HIDDEN, _DRAFTER_FEED_FORWARD = (3, 1), 1024, 8192


def weights(
    config: ModelConfig, scheme: str | None, floats: str, embedders: str, tiles: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Bytes of each of `names.PARTS`. What is not packed is in the format `floats`, and of the embedders of pictures
    and sounds in `embedders`. tiles: bytes of a tile of each packed tensor, in place of the scheme's."""
    sizes: dict[str, int] = {}
    for name, shape in names.expected_shapes(config).items():
        part = names.part(name)
        tile = 0
        if scheme and part in _PACKED_PARTS and len(shape) == 2:
            tile = TILE_BYTES[scheme] if tiles is None else tiles.get(name, 0)
        if tile:
            size = -(-shape[0] // 16) * -(-shape[1] // 64) * tile
        else:
            size = math.prod(shape) * BYTES[floats if part in _PACKED_PARTS else embedders]
        sizes[part] = sizes.get(part, 0) + size
    return sizes


def largest_matrix(config: ModelConfig) -> int:
    """Numbers in the largest tensor."""
    return max(math.prod(shape) for shape in names.expected_shapes(config).values())


def drafter_values(config: ModelConfig) -> int:
    """Numbers in the 12B's drafter, with the vocabulary, the heads and the width of this model: 422,856,964."""
    text, hidden = config.text, _DRAFTER_HIDDEN
    total = text.vocab_size * hidden + hidden + 3 * text.hidden_size * hidden  # the table, a norm, both projections
    for count, size in zip(_DRAFTER_LAYERS, (text.head_dim, text.global_head_dim), strict=True):
        attention = 2 * text.num_attention_heads * size * hidden + size
        total += count * (attention + 3 * hidden * _DRAFTER_FEED_FORWARD + 4 * hidden + 1)
    return total


def media_bytes(config: ModelConfig) -> int:
    """Raw numbers, float32, of the largest picture or the longest sound; 0 for a model that takes neither."""
    vision, audio = config.vision, config.audio
    pixels = min(OFFICIAL_IMAGE_BUDGETS[-1], vision.mm_posemb_size) * vision.patch_dim if vision else 0
    samples = _SOUND_TOKENS * audio.audio_samples_per_token if audio else 0
    return 4 * max(pixels, samples)


def cache_rows(text: TextConfig, kv: str) -> tuple[int, int]:
    """Bytes of (a token on all full-attention layers, a row of all rings) in a format of BYTES.

    Where the value is the raw key projection, a row holds the value and the rotated part of the key once each: the rest
    of the key is the value times a weight. In int8 each vector has a float32 scale. The 12B in bfloat16: 10,240 and
    327,680.
    """
    full = ring = 0
    for layer in range(text.num_hidden_layers):
        heads, size = text.layer_kv_heads(layer), text.layer_head_dim(layer)
        values, vectors = 2 * size, 2
        if text.shares_kv(layer):
            values, vectors = size + 2 * text.rope_full.num_angles(size), 1
        row = heads * (values * BYTES[kv] + (4 * vectors if kv == "int8" else 0))
        if text.is_full(layer):
            full += row
        else:
            ring += row
    return full, ring


def ring_rows(text: TextConfig, context: int) -> int:
    """Rows of a sliding layer's ring."""
    return min(context, text.sliding_window + SLACK)


def cache_bytes(text: TextConfig, context: int, kv: str) -> int:
    """Keys and values of one sequence of `context` tokens, in a format of BYTES."""
    full, ring = cache_rows(text, kv)
    return full * context + ring * ring_rows(text, context)


def kv_format(kv: str, dtype: str, packed: bool) -> str:
    """What "auto" and the others stand for: a format of BYTES. Beside packed weights that compute in float32, "auto" is
    bfloat16: the cache is read for every token."""
    if kv == "auto":
        return "bfloat16" if packed and dtype == "float32" else dtype
    return SHORT.get(kv, kv)


def computed_in(config: ModelConfig, packed: bool) -> str:
    """As `iolite.device.choose` has it for a CPU with bfloat16 arithmetic."""
    values = sum(math.prod(shape) for shape in names.expected_shapes(config).values())
    small = values <= SMALL_PARAMETERS or config.dtype == "float32"
    return "float32" if packed or small else "bfloat16"
