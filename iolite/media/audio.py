"""Sound, from whatever holds it, to 16 kHz mono samples and the 40 ms frames that the model reads."""

from __future__ import annotations

import numpy as np

from iolite.errors import MediaError


def audio_frames(samples: np.ndarray, samples_per_token: int = 640) -> np.ndarray:
    """Cut float samples [s] into float32 [n, samples_per_token], n = ceil(s / samples_per_token): one token each.

    Only the end of the last frame is padded, with zeros. No samples at all is a MediaError.
    """
    if samples.size == 0:
        raise MediaError("the sound has no samples", "give a recording that is not empty")
    assert samples.ndim == 1
    padded = np.pad(samples.astype(np.float32, copy=False), (0, -len(samples) % samples_per_token))
    return padded.reshape(-1, samples_per_token)
