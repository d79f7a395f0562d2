"""The whole network against Transformers 5.23.0 on tiny random checkpoints: every position, float32, within 1e-4.

1e-4 is absolute, on logits of a standard deviation of about 1.5. What float32 itself leaves between two right
implementations here is at most about 4e-5 (twelve layers), and every mistake in `test_a_mistake_would_show` moves
the logits by more than 1e-3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.compare import TOLERANCE, assert_near, our_logits, sample_for
from support.oracle import Audio, Image, Piece, Text, Video, reference_batch, reference_logits
from support.tiny import TINY, reference_model
from transformers import Gemma4UnifiedForConditionalGeneration

from iolite.checkpoint.folder import load_folder
from iolite.config import RopeConfig
from iolite.model.norm import RMSNorm
from iolite.model.unified import Unified

NARROW = TINY["narrow"].window
Load = Callable[[str], Unified]
Folder = Callable[[str], Path]

PIECES: dict[str, tuple[Piece, ...]] = {
    "text": (Text(40),),
    "one token": (),
    "image": (Text(6), Image(4, 3), Text(12)),
    "image first": (Image(5, 2), Text(9)),
    "image last": (Text(9), Image(3, 4)),
    "images side by side": (Text(3), Image(4, 2), Image(1), Image(2, 5), Text(8)),
    "video": (Text(4), Video(5, 3, 2), Text(10)),
    "audio": (Text(5), Audio(23), Text(7)),
    "everything": (Text(8), Image(6, 3), Text(5), Audio(12), Text(9), Video(3, 2, 3), Image(2, 2), Audio(1), Text(14)),
}


def accepted(name: str, pieces: tuple[Piece, ...]) -> bool:
    tiny = TINY[name]
    kinds = {type(p) for p in pieces}
    return (tiny.vision or not kinds & {Image, Video}) and (tiny.audio or Audio not in kinds)


@pytest.mark.parametrize(
    ("name", "prompt"), [(n, p) for n in TINY for p, pieces in PIECES.items() if accepted(n, pieces)]
)
def test_logits(name: str, prompt: str, load_tiny: Load) -> None:
    sample = sample_for(name, *PIECES[prompt])
    assert_near(our_logits(load_tiny(name), sample)[0], reference_logits(reference_model(name), sample))


@pytest.mark.parametrize("name", [n for n in TINY if n != "wide-window"])
def test_several_windows_long(name: str, load_tiny: Load) -> None:
    window = TINY[name].window
    media = (Image(7, 5), Video(2, 4)) if TINY[name].vision else ()
    sound = (Audio(window + 9),) if TINY[name].audio else ()
    sample = sample_for(name, Text(2 * window + 3), *media, Text(window + 1), *sound, Text(window // 2))
    assert len(sample.ids) > 3 * window
    assert_near(our_logits(load_tiny(name), sample)[0], reference_logits(reference_model(name), sample))


@pytest.mark.parametrize("size", [(40, 28), (28, 40), (1120, 1)])
def test_a_picture_larger_than_the_window(size: tuple[int, int], load_tiny: Load) -> None:
    """1,120 tokens in a window of 1,024: patches farther apart than the window must not see each other."""
    sample = sample_for("wide-window", Text(30), Image(*size), Text(40))
    ours = our_logits(load_tiny("wide-window"), sample)[0]
    assert_near(ours, reference_logits(reference_model("wide-window"), sample))


def test_two_full_windows_of_text(load_tiny: Load) -> None:
    sample = sample_for("wide-window", Text(2200))
    ours = our_logits(load_tiny("wide-window"), sample)[0]
    assert_near(ours, reference_logits(reference_model("wide-window"), sample))


@pytest.mark.parametrize("patches", [NARROW - 1, NARROW, NARROW + 1, 2 * NARROW + 3])
@pytest.mark.parametrize("start", [2 * NARROW - 1, 2 * NARROW, 2 * NARROW + 1])
def test_pictures_on_the_borders_of_windows(patches: int, start: int, load_tiny: Load) -> None:
    """A picture about one window long that begins just before, on, and just after a multiple of the window."""
    before = start - 2  # bos and boi come before the first patch too
    sample = sample_for("narrow", Text(before), Image(patches), Text(NARROW + 2), seed=start)
    assert sample.placed[0].start == start
    assert_near(our_logits(load_tiny("narrow"), sample)[0], reference_logits(reference_model("narrow"), sample))


@pytest.mark.parametrize("name", ["published", "narrow", "own-values", "two-global-heads"])
def test_batches(name: str, load_tiny: Load) -> None:
    """Prompts of unequal length and unlike media in one padded batch: each as if alone, as in the reference."""
    samples = [
        sample_for(name, Text(31), seed=1),
        sample_for(name, Text(3), Image(4, 2), Text(50), Audio(3), Text(2), seed=2),
        sample_for(name, seed=3),
        sample_for(name, Audio(9), Text(6), Video(2, 2), Image(3, 3), Text(4), seed=4),
    ]
    ours = our_logits(load_tiny(name), *samples)
    together = reference_batch(reference_model(name), samples)
    for row, reference, sample in zip(ours, together, samples, strict=True):
        assert_near(row, reference)
        assert_near(row, reference_logits(reference_model(name), sample))
        # The same sums in another order: a few roundings of float32 apart.
        assert_near(row, our_logits(load_tiny(name), sample)[0], tolerance=TOLERANCE / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["published", "own-values", "two-global-heads"])
def test_half_precision_is_as_near_as_the_references(name: str, dtype: torch.dtype, tiny_folder: Folder) -> None:
    """Rounding to 8 or 11 bits at every step cannot be avoided; how far it leads is measured on the reference itself.

    Both run in the same dtype with the same weights, so their errors against float32 on the rounded weights are two
    draws of the same size. Over some 10,000 logits the root mean square of either is known to a few per cent; a
    factor of 1.5 leaves room for what the order of roundings changes and none for a step done in the wrong precision.
    """
    sample = sample_for(name, *PIECES["everything"])
    rounded = copy.deepcopy(reference_model(name)).to(dtype).float()
    exact = reference_logits(rounded, sample)
    folder = tiny_folder(name)
    half = Gemma4UnifiedForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    ours = our_logits(load_folder(folder, dtype=dtype, device="cpu")[1], sample)[0]
    theirs = reference_logits(half, sample)
    assert ours.isfinite().all()
    assert (ours - exact).square().mean().sqrt() <= 1.5 * (theirs - exact).square().mean().sqrt()


MISTAKES: dict[str, Callable[[Unified], object]] = {
    "epsilon of the first LayerNorm": lambda m: setattr(m.vision_embedder.patch_ln1, "eps", 1e-6),
    "epsilon of the second LayerNorm": lambda m: setattr(m.vision_embedder.patch_ln2, "eps", 1e-6),
    "epsilon before the picture's projection": lambda m: setattr(m.embed_vision, "eps", 1e-3),
    "epsilon before the sound's projection": lambda m: setattr(m.embed_audio, "eps", 1e-5),
    "epsilon of the decoder's norms": lambda m: [
        setattr(n, "eps", 1e-3) for n in m.modules() if isinstance(n, RMSNorm)
    ],
    "axes of the position table": lambda m: m.vision_embedder.pos_embedding.set_(
        m.vision_embedder.pos_embedding.data.flip(1)
    ),
    "a layer's scalar": lambda m: m.language_model.layers[2].layer_scalar.fill_(1),
    "a weight taken as 1 + weight": lambda m: m.language_model.layers[5].self_attn.k_norm.weight.add_(1),
    "window one longer": lambda m: change_text(m, sliding_window=TINY["published"].window + 1),
    "window one shorter": lambda m: change_text(m, sliding_window=TINY["published"].window - 1),
    "share of the full heads that turns": lambda m: change_text(m, rope_full=RopeConfig(1e6, 0.5)),
    "base of the full layers": lambda m: change_text(m, rope_full=RopeConfig(1e4, 0.25)),
    "base of the sliding layers": lambda m: change_text(m, rope_sliding=RopeConfig(1e6)),
    "soft cap": lambda m: change_text(m, final_logit_softcapping=None),
}


def norms(model: Unified) -> list[RMSNorm]:
    return [module for module in model.modules() if isinstance(module, RMSNorm)]


def change_text(model: Unified, **changes: object) -> None:
    model.config = replace(model.config, text=replace(model.config.text, **changes))
    model.language_model.config = model.config.text


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_show(mistake: str, load_tiny: Load) -> None:
    """The comparison compares what it should: each of these, done to a right model, is far over the tolerance."""
    sample = sample_for("published", *PIECES["everything"])
    wrong = copy.deepcopy(load_tiny("published"))
    MISTAKES[mistake](wrong)
    error = (our_logits(wrong, sample)[0] - reference_logits(reference_model("published"), sample)).abs().max()
    assert error > 10 * TOLERANCE
