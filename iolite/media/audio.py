"""Sound, from whatever holds it, to 16 kHz mono samples and the 40 ms frames that the model reads.

The model hears raw samples: no spectrum, no normalisation. Channels are averaged, as librosa does.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from iolite.errors import MediaError
from iolite.media import child, worker
from iolite.media.fetch import Source, label_of, read_source
from iolite.media.limits import DEFAULT_LIMITS, Limits


def decode_audio(
    source: Source | np.ndarray,
    *,
    sampling_rate_in: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    media_root: Path | None = None,
    allow_urls: bool = False,
) -> np.ndarray:
    """Sound as float32 [samples], 16 kHz mono, in [-1, 1] (a lossy codec or a resampler may go a little beyond).

    source: a path, a data: URI or bytes in any of `child.CONTAINERS` (also the sound of a video), decoded in a child
        process; or an array, [samples] or [samples, channels] or [channels, samples] (the longer side is time), float
        in [-1, 1] or whole numbers of up to 32 bits over their full range, with its rate in `sampling_rate_in`.
    media_root, allow_urls: see `fetch.read_source`. Raises MediaError, also for a sound of no samples.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, sampling_rate_in, limits)
    data = read_source(source, kind="audio", limits=limits, media_root=media_root, allow_urls=allow_urls)
    label = label_of(source, "audio")
    answers = worker.decode("audio", data, limits, label=label, room=sound_room(limits))
    pieces = [mono(piece) for _, piece in answers]
    if not sum(len(piece) for piece in pieces):
        raise worker.media_error("audio", label, limits, "empty", {})
    return np.concatenate(pieces)


def sound_room(limits: Limits) -> int:
    """The most bytes that a child may send as sound: 8 channels of float32 for the longest time allowed."""
    return int(limits.max_audio_seconds + 1) * child.RATE * 8 * 4


def mono(piece: np.ndarray) -> np.ndarray:
    """The mean of the channels of float32 [channels, samples]; one channel passes through untouched."""
    return piece[0] if piece.shape[0] == 1 else piece.mean(axis=0, dtype=np.float32)


def _from_array(array: np.ndarray, rate: int | None, limits: Limits) -> np.ndarray:
    if array.size == 0:
        raise worker.media_error("audio", "the sound", limits, "empty", {})
    channels = np.atleast_2d(array)  # [channels, samples], or its transpose
    channels = channels if channels.shape[0] <= channels.shape[-1] else channels.T
    # No sound has 64-bit whole numbers, but they are NumPy's own choice: over that range any sound would be silence.
    known = array.dtype.kind == "f" or (array.dtype.kind in "iu" and array.dtype.itemsize <= 4)
    if array.ndim not in (1, 2) or channels.shape[0] > 8 or not known:
        raise MediaError(
            f"an array of {array.dtype} {list(array.shape)} is not a sound",
            "give floats or whole numbers of up to 32 bits, as [samples] or [samples, channels], at most 8 channels",
        )
    if rate is None:
        raise MediaError("the sound is an array, and its sampling rate is not given", "give its sampling_rate, in Hz")
    if not 1000 <= rate <= 768_000:
        raise MediaError(f"a sampling rate of {rate} Hz is not believable", "give samples per second, such as 16000")
    if channels.shape[1] > rate * limits.max_audio_seconds:
        raise worker.media_error("audio", "the sound", limits, "seconds", {"seconds": channels.shape[1] / rate})
    samples = mono(_as_float(channels))
    if not np.isfinite(samples).all():
        raise MediaError("the sound holds values that are not numbers (NaN or infinity)")
    return samples if rate == child.RATE else _resample(samples, rate, limits)


def _as_float(array: np.ndarray) -> np.ndarray:
    """Whole numbers over their full range to float32 in [-1, 1); floats as they are."""
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    half = 2.0 ** (8 * array.dtype.itemsize - 1)
    return ((array - half if array.dtype.kind == "u" else array) / half).astype(np.float32)


def _resample(samples: np.ndarray, rate: int, limits: Limits) -> np.ndarray:
    """Through the same resampler as files, dressed as one; in this process, since the samples are the caller's own."""
    body = samples.astype("<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, rate, 4 * rate, 4, 32)  # 3: IEEE float, one channel
    wav = b"RIFF" + struct.pack("<I", 36 + len(body)) + b"WAVEfmt " + struct.pack("<I", len(form)) + form
    wav += b"data" + struct.pack("<I", len(body)) + body
    request = {"max_pixels": limits.max_pixels, "max_audio_seconds": limits.max_audio_seconds}
    pieces = [np.frombuffer(piece, np.float32) for _, piece in child.decode_audio(wav, request)]
    return np.concatenate(pieces)


def audio_frames(samples: np.ndarray, samples_per_token: int = 640) -> np.ndarray:
    """Cut float samples [s] into float32 [n, samples_per_token], n = ceil(s / samples_per_token): one token each.

    Only the end of the last frame is padded, with zeros. No samples at all is a MediaError.
    Source: `Gemma4UnifiedAudioFeatureExtractor` of Transformers 5.23.
    """
    if samples.size == 0:
        raise MediaError("the sound has no samples", "give a recording that is not empty")
    assert samples.ndim == 1, samples.shape
    padded = np.pad(samples.astype(np.float32, copy=False), (0, -len(samples) % samples_per_token))
    return padded.reshape(-1, samples_per_token)
