"""Passes with a cache against Transformers' one pass over the whole prompt, on every position.

However a prompt is cut into passes - chunks of any size, token by token, beside other sequences - its logits are
those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import TOLERANCE, assert_near, our_logits, sample_for
from support.oracle import Audio, Image, Piece, Sample, Text, Video, reference_logits
from support.tiny import TINY, reference_model
from torch import Tensor

from iolite.cache import KVCache, RingCache
from iolite.checkpoint.folder import load_folder
from iolite.model.batch import RaggedBatch, Segment, gather_media
from iolite.model.prefill import chunks, prefill
from iolite.model.unified import Unified
from iolite.prompt import Prompt

Load = Callable[[str], Unified]

EVERYTHING: tuple[Piece, ...] = (
    *(Text(9), Image(4, 3), Text(2), Image(2), Image(3, 3), Audio(21), Text(13)),
    *(Video(3, 3, 2), Text(5), Audio(2), Text(30)),
)
NARROW = TINY["narrow"].window
SLACK = 64  # of rings, where a test wants them to wrap


def head(sample: Sample, stop: int) -> Prompt:
    """The first stop tokens, with the media among them; stop must not cut a picture or a sound."""
    prompt = sample.prompt()
    spans = tuple(s for s in prompt.spans if s.start < stop)
    assert all(s.stop <= stop for s in spans)
    return replace(prompt, ids=prompt.ids[:stop], spans=spans)


@torch.inference_mode()
def run_prefill(model: Unified, prompt: Prompt, cache: KVCache, chunk_size: int) -> Tensor:
    return torch.cat([model.logits(hidden) for hidden in prefill(model, prompt, cache, chunk_size=chunk_size)])


@torch.inference_mode()
def run_ragged(model: Unified, parts: Sequence[tuple[KVCache, Sequence[int], Prompt | None]]) -> list[Tensor]:
    """One pass over the new tokens of several sequences; a part's prompt holds their media, counted from its ids."""
    segments, placed, at = [], [], 0
    for cache, ids, prompt in parts:
        blocks = None if prompt is None else torch.from_numpy(prompt.blocks())
        segments.append(Segment(cache, len(ids), blocks))
        placed += [(at, span) for span in (prompt.spans if prompt else ())]
        at += len(ids)
    batch = RaggedBatch(model.config.text, segments, gather_media(placed, "cpu"), torch.device("cpu"))
    logits = model.logits(model(torch.tensor([i for _, ids, _ in parts for i in ids]), batch))
    return list(logits.split([len(ids) for _, ids, _ in parts]))


def one_by_one(model: Unified, cache: KVCache, ids: Sequence[int]) -> Tensor:
    return torch.cat([run_ragged(model, [(cache, [i], None)])[0] for i in ids])


def prompt_for(name: str, pieces: tuple[Piece, ...] = EVERYTHING) -> tuple[Piece, ...]:
    tiny = TINY[name]
    taken = {Text} | ({Image, Video} if tiny.vision else set()) | ({Audio} if tiny.audio else set())
    return tuple(p for p in pieces if type(p) in taken)


@pytest.mark.parametrize("name", [n for n in TINY if n != "wide-window"])
def test_decoding_equals_recomputing(name: str, load_tiny: Load) -> None:
    """A prompt with media, then more than three windows token by token."""
    model, window = load_tiny(name), TINY[name].window
    sample = sample_for(name, *prompt_for(name), Text(3 * window + 5))
    start = len(sample.ids) - 3 * window - 5
    cache = KVCache(model.config.text)
    ours = torch.cat(
        (run_prefill(model, head(sample, start), cache, 1000), one_by_one(model, cache, sample.ids[start:]))
    )
    assert cache.length == len(sample.ids)
    assert_near(ours, reference_logits(reference_model(name), sample))


@pytest.mark.parametrize("name", ["published", "narrow", "own-values", "full-first"])
def test_decoding_from_the_first_token(name: str, load_tiny: Load) -> None:
    model = load_tiny(name)
    sample = sample_for(name, Text(2 * TINY[name].window + 3), Audio(1), Text(4))
    sound = sample.placed[0].start
    cache = KVCache(model.config.text)
    before = one_by_one(model, cache, sample.ids[:sound])
    middle = run_prefill(model, head(sample, sound + 1), cache, 7)
    after = one_by_one(model, cache, sample.ids[sound + 1 :])
    assert_near(torch.cat((before, middle, after)), reference_logits(reference_model(name), sample))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 8, 9, 15, 16, 17, 23, 24, 25, 64, 100, 1000])
@pytest.mark.parametrize("name", ["published", "narrow", "own-values"])
def test_chunked_prefill_equals_whole(name: str, chunk_size: int, load_tiny: Load) -> None:
    """Chunks below, at and above each window, down to one token; pictures larger than a chunk stay whole."""
    sample = sample_for(name, *EVERYTHING)
    model = load_tiny(name)
    ours = run_prefill(model, sample.prompt(), KVCache(model.config.text), chunk_size)
    assert_near(ours, reference_logits(reference_model(name), sample))


@pytest.mark.parametrize("chunk_size", [1, NARROW - 1, NARROW, NARROW + 1, 3 * NARROW])
@pytest.mark.parametrize("patches", [NARROW - 1, NARROW, NARROW + 1, 2 * NARROW + 3])
def test_chunks_and_pictures_on_the_borders_of_windows(patches: int, chunk_size: int, load_tiny: Load) -> None:
    model = load_tiny("narrow")
    for start in (NARROW, 2 * NARROW - 1, 2 * NARROW + 1):
        sample = sample_for("narrow", Text(start - 2), Image(patches), Image(patches), Text(2 * NARROW), seed=start)
        ours = run_prefill(model, sample.prompt(), KVCache(model.config.text), chunk_size)
        assert_near(ours, reference_logits(reference_model("narrow"), sample))


@pytest.mark.parametrize("chunk_size", [300, 512, 1024, 4000])
def test_a_picture_larger_than_the_window_in_chunks(chunk_size: int, load_tiny: Load) -> None:
    """1,120 tokens must go through in one pass, whatever the chunk, and the window of 1,024 still cuts them."""
    model = load_tiny("wide-window")
    sample = sample_for("wide-window", Text(20), Image(40, 28), Text(90))
    split = len(sample.ids) - 10
    cache = KVCache(model.config.text)
    ours = run_prefill(model, head(sample, split), cache, chunk_size)
    ours = torch.cat((ours, one_by_one(model, cache, sample.ids[split:])))
    assert_near(ours, reference_logits(reference_model("wide-window"), sample))


@pytest.mark.parametrize("name", ["published", "narrow", "own-values", "two-global-heads"])
def test_a_later_turn_prefills_only_what_is_new(name: str, load_tiny: Load) -> None:
    """Prompt, answer token by token, then a longer prompt over the same cache."""
    model = load_tiny(name)
    first = sample_for(name, Text(6), Image(3, 3), Text(8))
    sample = sample_for(name, Text(6), Image(3, 3), Text(8), Text(20), Image(2, 4), Audio(6), Video(2, 2), Text(11))
    turn, answer = len(first.ids), len(first.ids) + 20
    cache = KVCache(model.config.text)
    parts = [run_prefill(model, head(sample, turn), cache, 10), one_by_one(model, cache, sample.ids[turn:answer])]
    parts.append(run_prefill(model, sample.prompt(), cache, 10))
    assert len(parts[-1]) == len(sample.ids) - answer
    assert_near(torch.cat(parts), reference_logits(reference_model(name), sample))


@pytest.mark.parametrize("name", ["published", "narrow", "own-values", "two-global-heads"])
def test_sequences_side_by_side(name: str, load_tiny: Load) -> None:
    """A whole prompt with media, a chunk of another, and single tokens of two more in the same pass."""
    model, reference = load_tiny(name), reference_model(name)
    prompt = sample_for(name, Text(4), Image(3, 2), Audio(5), Text(40), Image(4, 2), Text(5), seed=1)
    text, long, short = (sample_for(name, Text(n), seed=s) for n, s in ((25, 2), (3 * TINY[name].window, 3), (4, 4)))
    caches = [KVCache(model.config.text) for _ in range(4)]
    done = [torch.empty(0, 96)] + [
        run_prefill(model, head(s, n), c, 11)
        for s, n, c in zip((text, long, short), (10, len(long.ids) - 1, 1), caches[1:], strict=True)
    ]
    together = run_ragged(
        model,
        [
            (caches[0], prompt.ids, prompt.prompt()),
            (caches[1], text.ids[10:], None),
            (caches[2], long.ids[-1:], None),
            (caches[3], short.ids[1:2], None),
        ],
    )
    short.ids[2:] = []
    for sample, before, new in zip((prompt, text, long, short), done, together, strict=True):
        assert_near(torch.cat((before, new)), reference_logits(reference, sample))


def test_batches_decode_side_by_side(load_tiny: Load) -> None:
    """Unequal prompts, then several windows of single tokens in step."""
    model, steps = load_tiny("narrow"), 3 * NARROW
    samples = [
        sample_for("narrow", *pieces, Text(steps), seed=seed)
        for seed, pieces in enumerate(((Text(1),), (Text(19),), (Image(3, 3), Text(2)), (Audio(NARROW),)))
    ]
    caches = [KVCache(model.config.text) for _ in samples]
    rows = [[run_prefill(model, head(s, len(s.ids) - steps), c, 5)] for s, c in zip(samples, caches, strict=True)]
    for step in range(-steps, 0):
        new = run_ragged(model, [(c, [s.ids[step]], None) for s, c in zip(samples, caches, strict=True)])
        for row, logits in zip(rows, new, strict=True):
            row.append(logits)
    for sample, row in zip(samples, rows, strict=True):
        assert_near(torch.cat(row), reference_logits(reference_model("narrow"), sample))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes_as_it_prefills(dtype: torch.dtype, tiny_folder: Callable[[str], Path]) -> None:
    """The same sums in the same precision, in another order: as near to float32 as one pass is."""
    sample = sample_for("published", *EVERYTHING)
    exact = reference_logits(reference_model("published"), sample)
    _, model = load_folder(tiny_folder("published"), dtype=dtype, device="cpu")
    split = len(sample.ids) - 30
    cache = KVCache(model.config.text)
    ours = torch.cat((run_prefill(model, head(sample, split), cache, 17), one_by_one(model, cache, sample.ids[split:])))
    whole = our_logits(model, sample)[0]
    assert (ours - exact).square().mean().sqrt() <= 1.5 * (whole - exact).square().mean().sqrt()


def test_sliding_layers_never_hold_more_than_a_window_and_slack(load_tiny: Load) -> None:
    model = load_tiny("narrow")
    config = model.config.text
    for chunk_size in (1, 5, 100):
        cache = KVCache(config, slack=SLACK)
        run_prefill(model, sample_for("narrow", Text(9), Image(6, 5), Text(70 + SLACK)).prompt(), cache, chunk_size)
        for layer in cache.layers:
            if isinstance(layer, RingCache):
                assert layer.num_bytes == 2 * (NARROW + SLACK) * config.num_key_value_heads * config.head_dim * 4


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 40, 999])
def test_chunks_cover_everything_and_cut_no_picture(size: int) -> None:
    sample = sample_for("published", *EVERYTHING)
    spans = sample.prompt().spans
    found = list(chunks(len(sample.ids), spans, size))
    assert [start for start, _ in found] == [0] + [stop for _, stop in found[:-1]]
    assert found[-1][1] == len(sample.ids)
    largest = max(s.length for s in spans if s.kind != "audio")
    for start, stop in found:
        assert start < stop <= start + max(size, largest)
        assert not any(s.start < stop < s.stop for s in spans if s.kind != "audio")


@torch.no_grad()
def changed(model: Unified, sample: Sample, item: int, row: int) -> list[bool]:
    """At which positions the logits move when one patch or one frame of sound is another."""
    before = our_logits(model, sample)[0]
    other = Sample(sample.ids, [replace(p, array=p.array.copy()) for p in sample.placed])
    other.placed[item].array[row] = 1 - other.placed[item].array[row]
    return ((our_logits(model, other)[0] - before).abs().amax(-1) > TOLERANCE).tolist()


def test_pictures_look_both_ways_and_nothing_else_does(load_tiny: Load) -> None:
    """The last patch or frame of each item is changed: who before it notices?"""
    model = load_tiny("published")
    sample = sample_for("published", Text(5), Image(4), Audio(6), Video(2, 3), Text(5))
    image, sound, frame, last_frame = sample.placed
    for item, placed in enumerate((image, sound, frame, last_frame)):
        moved = changed(model, sample, item, -1)
        two_way = placed is not sound
        first = placed.start if two_way else placed.start + placed.length - 1
        assert not any(moved[:first])
        assert all(moved[first : placed.start + placed.length])


TEXTS = st.builds(Text, st.integers(0, 2 * NARROW + 2))
PICTURES = st.builds(Image, st.integers(1, 2 * NARROW + 2), st.integers(1, 2))
VIDEOS = st.builds(Video, st.integers(1, 3), st.integers(1, NARROW + 1))
SOUNDS = st.builds(Audio, st.integers(1, 2 * NARROW + 2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.one_of(TEXTS, PICTURES, VIDEOS, SOUNDS), max_size=6),
    chunk_size=st.integers(1, 4 * NARROW),
    answer=st.integers(1, 2 * NARROW),
    slack=st.sampled_from((0, 3, SLACK)),
    seed=st.integers(0, 1000),
)
def test_any_prompt_in_any_chunks(
    load_tiny: Load, pieces: list[Piece], chunk_size: int, answer: int, slack: int, seed: int
) -> None:
    model = load_tiny("narrow")
    sample = sample_for("narrow", *pieces, Text(answer), seed=seed)
    split = len(sample.ids) - answer
    cache = KVCache(model.config.text, slack=slack)
    ours = torch.cat(
        (run_prefill(model, head(sample, split), cache, chunk_size), one_by_one(model, cache, sample.ids[split:]))
    )
    reference = reference_logits(reference_model("narrow"), sample)
    assert_near(ours, reference)
    assert_near(our_logits(model, sample)[0], reference)
