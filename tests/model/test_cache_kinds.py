"""What the caches make of a sequence: one vector for key and value against both, int8, and going back.

That the usual cache gives Transformers' logits is tested in `test_cached_passes.py`. Here it is compared with the one
that keeps keys and values apart, where Transformers would take too long or cannot go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from support.compare import TOLERANCE, assert_near, sample_for
from support.oracle import Audio, Image, Text, Video
from torch import Tensor

from iolite.cache import KVCache
from iolite.kernels import ops
from iolite.kernels.reference import apply_rope, rms_norm, rope_angles
from iolite.model.batch import Media, RaggedBatch, Segment
from iolite.model.layers import DecoderLayer
from iolite.model.prefill import prefill
from iolite.model.unified import Unified
from iolite.prompt import Prompt

Load = Callable[[str], Unified]
PIECES = (Text(9), Image(4, 3), Text(2), Audio(21), Text(13), Video(2, 3, 2), Text(25))


@torch.inference_mode()
def read(model: Unified, cache: KVCache, prompt: Prompt, chunk_size: int = 16) -> Tensor:
    return torch.cat([model.logits(hidden) for hidden in prefill(model, prompt, cache, chunk_size=chunk_size)])


@torch.inference_mode()
def go_on(model: Unified, parts: Sequence[tuple[KVCache, Sequence[int]]]) -> list[Tensor]:
    """One pass over new ids of several sequences: the logits of each."""
    segments = [Segment(cache, len(ids)) for cache, ids in parts]
    batch = RaggedBatch(model.config.text, segments, Media(), torch.device("cpu"))
    logits = model.logits(model(torch.tensor([i for _, ids in parts for i in ids]), batch))
    return list(logits.split([len(ids) for _, ids in parts]))


def both(model: Unified, **settings: int | torch.dtype | None) -> tuple[KVCache, KVCache]:
    one, two = (KVCache(model.config.text, shared=shared, **settings) for shared in (True, False))  # type: ignore[arg-type]
    return one, two


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernels"])
@pytest.mark.parametrize("name", ["published", "narrow", "full-first"])
def test_key_and_value_in_one_are_key_and_value_apart(name: str, reference: bool, load_tiny: Load) -> None:
    """Prefill in chunks, going back, decoding, and a pass over several sequences of unequal lengths."""
    model, sample = load_tiny(name), sample_for(name, *PIECES)
    prompt = sample.prompt()
    with ops.only_reference() if reference else torch.no_grad():
        found, expected = ([], [])
        for out, cache, other in zip((found, expected), both(model), both(model), strict=True):
            out.append(read(model, cache, prompt))
            cache.rewind(len(prompt.ids) - 20)
            for token in (40, 41, 42):
                out += go_on(model, [(cache, [token])])
            read(model, other, Prompt(sample.ids[:9], ""))
            out += go_on(model, [(cache, [50, 51]), (other, [60, 61, 62, 63, 64])])
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE)


def far_along(model: Unified, length: int, **settings: torch.dtype | None) -> tuple[KVCache, KVCache]:
    """Both kinds of cache with the same random past of `length` tokens, as the model's own layers would leave it."""
    text = replace(model.config.text, max_position_embeddings=262_144)
    pair = KVCache(text, shared=True, **settings), KVCache(text, shared=False, **settings)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(0)
    for i, block in enumerate(model.language_model.layers):
        assert isinstance(block, DecoderLayer)
        attention, size, full = block.self_attn, text.layer_head_dim(i), text.is_full(i)
        count = length if full else min(length, text.sliding_window)
        shape, rope = (count, text.layer_kv_heads(i), size), text.rope_full if full else text.rope_sliding
        raw = torch.randn(shape, generator=rng)
        v = rms_norm(raw if text.shares_kv(i) else torch.randn(shape, generator=rng), None, attention.eps)
        angles = rope_angles(torch.arange(length - count, length), size, rope.theta, rope.num_angles(size))
        k = apply_rope(rms_norm(raw, attention.k_norm.weight, attention.eps), *angles)
        for cache in pair:
            cache.layers[i].extend(k, v, length - count, attention.k_norm.weight)
    for cache in pair:
        cache.length = length
    return pair


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernels"])
@pytest.mark.parametrize("length", [1000, 200_001, 262_100])
def test_far_along(length: int, reference: bool, load_tiny: Load) -> None:
    """Up to the last of all positions. A score there sums what 200,000 keys weigh; a logit is still within 1e-4."""
    model = load_tiny("published")
    with ops.only_reference() if reference else torch.no_grad():
        found, expected = ([], [])
        for out, cache in zip((found, expected), far_along(model, length), strict=True):
            out += go_on(model, [(cache, list(range(30, 50)))])
            cache.rewind(length + 13)
            out += go_on(model, [(cache, [70])])
            out += go_on(model, [(cache, [71, 72])])
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE)
        assert one.isfinite().all()


@pytest.mark.parametrize("shared", [True, False])
def test_int8_is_near(shared: bool, load_tiny: Load) -> None:
    """Keys and values are off by up to half a 127th of the largest of their vector: about 1/300 of a typical number
    each, which moves a logit by some hundredths of its spread. Half of one would be a mistake."""
    model, sample = load_tiny("published"), sample_for("published", *PIECES)
    exact = read(model, KVCache(model.config.text, shared=shared), sample.prompt())
    found = read(model, KVCache(model.config.text, dtype=torch.int8, shared=shared), sample.prompt())
    error = (found - exact).square().mean().sqrt() / exact.std()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8], ids=str)
def test_going_back_gives_the_logits_of_never_having_been_there(dtype: torch.dtype | None, load_tiny: Load) -> None:
    model, sample = load_tiny("narrow"), sample_for("narrow", Text(9), Image(2), Text(40))
    ids, wrong = sample.ids, [77] * 30
    cache, straight = (KVCache(model.config.text, dtype=dtype, slack=32) for _ in range(2))
    read(model, cache, sample.prompt())
    read(model, straight, sample.prompt())
    go_on(model, [(cache, wrong)])
    cache.rewind(len(ids))
    for tokens in ([30, 31], [32]):
        assert_near(go_on(model, [(cache, tokens)])[0], go_on(model, [(straight, tokens)])[0])
