"""From raw pixels and raw samples to logits: both pipelines on the same picture, recording and frames.

iolite resizes, cuts and embeds with its own code, Transformers with its processors and torchvision.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.compare import assert_near, our_logits
from support.oracle import BOS, TOKEN, Placed, Sample, reference_masks
from support.tiny import reference_model
from transformers import BatchFeature
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import (
    Gemma4UnifiedAudioFeatureExtractor,
)
from transformers.models.gemma4_unified.image_processing_gemma4_unified import (
    Gemma4UnifiedImageProcessor,
)
from transformers.models.gemma4_unified.video_processing_gemma4_unified import (
    Gemma4UnifiedVideoProcessor,
)

from iolite.media.audio import audio_frames, decode_audio
from iolite.media.image import decode_image, image_patches
from iolite.model.unified import Unified

Load = Callable[[str], Unified]

# float32 in [0, 1] from the same bytes: at most one rounding of 255ths apart.
PIXELS = 1e-6


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]: smooth colour with sharp noise on it, so that the resize has both to deal with."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 120 * np.sin(x / 17 + c) * np.cos(y / (11 + c)) for c in range(3)], -1)
    noise = rng.integers(-90, 90, (height, width, 3)) * (rng.random((height, width, 1)) < 0.2)
    return (waves + noise).clip(0, 255).astype(np.uint8)


def extended(*parts: list[int] | tuple[str, np.ndarray, np.ndarray | None]) -> Sample:
    """A prompt of token ids and (kind, array, positions), each bracketed by its kind's tokens."""
    sample = Sample([BOS])
    for part in parts:
        if isinstance(part, list):
            sample.ids += part
            continue
        kind, array, positions = part
        begin, end = ("boa", "eoa") if kind == "audio" else ("boi", "eoi")
        sample.ids.append(TOKEN[begin])
        sample.placed.append(Placed(kind, len(sample.ids), array, positions))
        sample.ids += [TOKEN[kind]] * len(array) + [TOKEN[end]]
    return sample


def their_image(image: np.ndarray, budget: int) -> BatchFeature:
    processor = Gemma4UnifiedImageProcessor(max_soft_tokens=budget)
    return processor(torch.from_numpy(image).permute(2, 0, 1), return_tensors="pt")


def their_video(frames: np.ndarray) -> BatchFeature:
    processor = Gemma4UnifiedVideoProcessor(do_sample_frames=False)
    return processor([torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt")


@torch.no_grad()
def their_logits(sample: Sample, **media: torch.Tensor) -> torch.Tensor:
    model = reference_model("real-media")
    masks = reference_masks(model, torch.from_numpy(sample.token_types())[None])
    return model(torch.tensor([sample.ids]), attention_mask=masks, use_cache=False, **media).logits[0]


@pytest.mark.parametrize("budget", [70, 140, 280])
@pytest.mark.parametrize("size", [(572, 1024), (300, 200), (97, 1501), (480, 480), (31, 47)])
def test_pictures(size: tuple[int, int], budget: int, load_tiny: Load) -> None:
    image = picture(*size)
    ours = image_patches(decode_image(image), max_soft_tokens=budget)
    theirs = their_image(image, budget)
    n = int(theirs.pop("num_soft_tokens_per_image")[0])
    assert len(ours.pixels) == n
    assert np.abs(ours.pixels - theirs["pixel_values"][0, :n].numpy()).max() <= PIXELS
    assert np.array_equal(ours.positions, theirs["image_position_ids"][0, :n].numpy())
    sample = extended([30, 31], ("image", ours.pixels, ours.positions), [32, 33, 34])
    assert_near(our_logits(load_tiny("real-media"), sample)[0], their_logits(sample, **theirs))


def test_video_frames(load_tiny: Load) -> None:
    frames = np.stack([picture(120, 214, seed) for seed in range(4)])
    theirs = their_video(frames)
    n = int(theirs.pop("num_soft_tokens_per_video")[0])
    parts: list[list[int] | tuple[str, np.ndarray, np.ndarray | None]] = []
    for number, frame in enumerate(frames):
        ours = image_patches(frame, max_soft_tokens=70)
        assert len(ours.pixels) == n
        assert np.abs(ours.pixels - theirs["pixel_values_videos"][number, :n].numpy()).max() <= PIXELS
        assert np.array_equal(ours.positions, theirs["video_position_ids"][number, :n].numpy())
        parts += [[40 + number, 50], ("video", ours.pixels, ours.positions)]
    sample = extended(*parts, [60, 61])
    assert_near(our_logits(load_tiny("real-media"), sample)[0], their_logits(sample, **theirs))


@pytest.mark.parametrize("samples", [1, 639, 640, 641, 16_000, 12_345])
def test_sound(samples: int, load_tiny: Load) -> None:
    rng = np.random.default_rng(samples)
    wave = (0.3 * rng.standard_normal(samples)).clip(-1, 1).astype(np.float32)
    ours = audio_frames(decode_audio(wave, sampling_rate_in=16_000))
    theirs = Gemma4UnifiedAudioFeatureExtractor()(wave, return_tensors="pt")
    assert len(ours) == math.ceil(samples / 640)
    assert np.array_equal(ours, theirs["input_features"][0].numpy())
    sample = extended([30, 31], ("audio", ours, None), [32, 33])
    assert_near(our_logits(load_tiny("real-media"), sample)[0], their_logits(sample, **theirs))


def test_all_in_one_prompt(load_tiny: Load) -> None:
    image, frames = picture(200, 320), np.stack([picture(96, 144, seed) for seed in (1, 2)])
    wave = np.sin(np.arange(5000) / 9).astype(np.float32)
    pixels = Gemma4UnifiedImageProcessor(max_soft_tokens=70)(
        torch.from_numpy(image).permute(2, 0, 1), return_tensors="pt"
    )
    video = Gemma4UnifiedVideoProcessor(do_sample_frames=False)(
        [torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt"
    )
    sound = Gemma4UnifiedAudioFeatureExtractor()(wave, return_tensors="pt")
    del pixels["num_soft_tokens_per_image"], video["num_soft_tokens_per_video"]
    still, *moving = (image_patches(i, max_soft_tokens=70) for i in (image, *frames))
    sample = extended(
        [30],
        ("image", still.pixels, still.positions),
        [31, 32],
        ("video", moving[0].pixels, moving[0].positions),
        [33],
        ("video", moving[1].pixels, moving[1].positions),
        [34],
        ("audio", audio_frames(wave), None),
        [35, 36],
    )
    ours = our_logits(load_tiny("real-media"), sample)[0]
    assert_near(ours, their_logits(sample, **pixels, **video, **sound))
