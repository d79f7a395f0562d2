"""Sounds and videos for tests, encoded through PyAV."""

from __future__ import annotations

import io

import av
import numpy as np


def tone(rate: int, seconds: float, channels: int = 1, hertz: float = 440.0) -> np.ndarray:
    """A sine of amplitude 0.5, float32 [channels, samples], the same in all channels."""
    t = np.arange(round(rate * seconds)) / rate
    return np.tile((0.5 * np.sin(2 * np.pi * hertz * t)).astype(np.float32), (channels, 1))


def encode_audio(samples: np.ndarray, rate: int, container: str, codec: str, layout: str) -> bytes:
    """float32 [channels, samples] as a file, through PyAV."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        output.mux([*stream.encode(frame), *stream.encode(None)])
    return buffer.getvalue()


def numbered_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [count, height, width, 3]: each frame one grey, a code of its number that survives a lossy codec."""
    grey = (np.arange(count) % 16 * 15 + 10).astype(np.uint8)
    high = (np.arange(count) // 16 * 15 + 10).astype(np.uint8)
    frames = np.repeat(grey[:, None, None, None], 3, axis=3) * np.ones((1, height, width, 1), np.uint8)
    frames[:, :, width // 2 :] = high[:, None, None, None]
    return frames


def number_of(frame: np.ndarray) -> int:
    """The number that `numbered_frames` wrote into a frame."""
    width = frame.shape[1]
    low, high = frame[:, : width // 4].mean(), frame[:, -width // 4 :].mean()
    return round((low - 10) / 15) + 16 * round((high - 10) / 15)


def encode_video(
    frames: np.ndarray,
    fps: int,
    container: str = "mp4",
    codec: str = "libx264",
    *,
    sound: np.ndarray | None = None,
    gop: int = 12,
) -> bytes:
    """uint8 [n, H, W, 3] as a file, with float32 [channels, samples] of sound at 48 kHz if given."""
    buffer = io.BytesIO()
    pixel_format = {"gif": "rgb8", "ffv1": "bgr0"}.get(codec, "yuv420p")
    with av.open(buffer, "w", format=container) as output:
        picture = output.add_stream(
            codec, rate=fps, width=frames.shape[2], height=frames.shape[1], pix_fmt=pixel_format
        )
        picture.gop_size = gop
        speech = None
        if sound is not None:
            codec = "libopus" if container == "webm" else "aac"
            layout = {1: "mono", 2: "stereo"}[len(sound)]
            speech = output.add_stream(codec, rate=48000, layout=layout)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index
            output.mux(picture.encode(frame))
        output.mux(picture.encode(None))
        if speech is not None:
            frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = 48000, 0
            output.mux([*speech.encode(frame), *speech.encode(None)])
    return buffer.getvalue()
