"""iolite's logits for the prompts of `oracle.py`, and the one comparison of logits that all tests make."""

from __future__ import annotations

import torch
from torch import Tensor

from iolite.model.batch import PaddedBatch
from iolite.model.unified import Unified
from support.oracle import Piece, Sample, make_sample
from support.tiny import TINY

TOLERANCE = 1e-4  # absolute, on logits with a standard deviation of about 1.5


def sample_for(name: str, *pieces: Piece, seed: int = 0) -> Sample:
    """A prompt whose patches and frames have the named checkpoint's sizes."""
    tiny = TINY[name]
    side = tiny.patch[0] * tiny.patch[1]
    return make_sample(*pieces, patch_dim=3 * side**2, samples_per_token=tiny.samples_per_token, seed=seed)


@torch.no_grad()
def our_logits(model: Unified, *samples: Sample) -> list[Tensor]:
    batch = PaddedBatch.from_prompts(model.config.text, [s.prompt() for s in samples])
    logits = model.logits(model(batch.ids, batch))
    return [row[: len(s.ids)] for row, s in zip(logits, samples, strict=True)]


def assert_near(ours: Tensor, reference: Tensor, tolerance: float = TOLERANCE) -> None:
    """Every position, every token of the vocabulary; the message names the worst."""
    assert ours.shape == reference.shape
    assert ours.dtype == torch.float32
    error = (ours - reference).abs()
    worst = int(error.argmax())
    position, token = divmod(worst, ours.shape[-1])
    assert error.max() <= tolerance, (
        f"position {position}, token {token}: {ours[position, token]:.6f}, not {reference[position, token]:.6f}; "
        f"{int((error.amax(-1) > tolerance).sum())} of {len(ours)} positions are off"
    )
