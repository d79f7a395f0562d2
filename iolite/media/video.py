"""Video, from a file or a list of frames, to the frames that the model sees, their times, and the sound."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from iolite.errors import MediaError
from iolite.media import worker
from iolite.media.audio import mono, sound_room
from iolite.media.child import sample_indices
from iolite.media.fetch import Source, label_of, read_source
from iolite.media.image import decode_image
from iolite.media.limits import DEFAULT_LIMITS, Limits

__all__ = ["Video", "decode_video", "sample_indices", "timestamp_text"]

_FILES = (str, os.PathLike, bytes, bytearray, memoryview)
DEFAULT_FPS = 24.0  # of a list of frames whose rate nobody told: as in Transformers


@dataclass(frozen=True)
class Video:
    """The frames sampled from a video.

    frames: uint8 RGB [H, W, 3] each.
    timestamps: seconds since the first frame, one for each.
    audio: the whole sound track, float32 [samples] at 16 kHz mono, or None where there is none.
    """

    frames: list[np.ndarray]
    timestamps: list[float]
    audio: np.ndarray | None = None


def decode_video(
    source: Source | Sequence[Source | Image.Image | np.ndarray] | np.ndarray,
    *,
    num_frames: int = 32,
    fps: float | None = None,
    limits: Limits = DEFAULT_LIMITS,
    media_root: Path | None = None,
    allow_urls: bool = False,
) -> Video:
    """Sample `num_frames` frames evenly (all, if there are no more), or `fps` a second when that is given.

    source: a path, a data: URI or bytes in any of `child.CONTAINERS`, decoded in a child process; or the frames
        themselves, as a sequence of all that `decode_image` takes or an array [frames, H, W, 3]. Frames given are all
        used, and `fps` then says how fast they follow one another (24 when it is not given).
    media_root, allow_urls: see `fetch.read_source`. Raises MediaError.
    """
    if num_frames < 1 or (fps is not None and not 0 < fps < math.inf):
        raise MediaError("a video needs one frame at least, and more than 0 frames per second")
    if (isinstance(source, np.ndarray) and not source.ndim) or not isinstance(source, (*_FILES, Sequence, np.ndarray)):
        raise MediaError(
            f"{type(source).__name__} is nothing that a video can be read from",
            "give a path, a data: URI, bytes, or the frames as a list or an array [frames, height, width, 3]",
        )
    if not isinstance(source, _FILES):
        return _from_frames(source, fps or DEFAULT_FPS, limits, media_root, allow_urls)
    data = read_source(source, kind="video", limits=limits, media_root=media_root, allow_urls=allow_urls)
    label = label_of(source, "video")
    # A row of a frame may be padded: to 64 bytes in FFmpeg, so at most that much times a height below max_pixels.
    room = 3 * limits.max_video_pixels + 64 * limits.max_pixels + sound_room(limits)
    frames, timestamps, sound = [], [], []
    for header, array in worker.decode("video", data, limits, label=label, room=room, num_frames=num_frames, fps=fps):
        if header.get("track") == "frame":
            frames.append(_frame(array, header))
            timestamps.append(float(header["seconds"]))
        else:
            sound.append(mono(array))
    if not frames:
        raise worker.media_error("video", label, limits, "unreadable", {})
    return Video(frames, timestamps, np.concatenate(sound) if sound else None)


def _frame(rows: np.ndarray, header: dict[str, int]) -> np.ndarray:
    """uint8 [H, bytes of a row] without the padding of its rows, and turned as the camera was held: [H, W, 3]."""
    width = header["width"]
    frame = rows[:, : 3 * width].reshape(rows.shape[0], width, 3)
    return np.ascontiguousarray(np.rot90(frame, header["turn"]))


def _from_frames(
    frames: Sequence[Source | Image.Image | np.ndarray] | np.ndarray,
    fps: float,
    limits: Limits,
    media_root: Path | None,
    allow_urls: bool,
) -> Video:
    if len(frames) == 0:
        raise MediaError("the video has no frames", "give one frame at least")
    if len(frames) > limits.max_frames:
        raise worker.media_error("video", "the video", limits, "frames", {"frames": len(frames)})
    decoded: list[np.ndarray] = []
    room = limits.max_video_pixels
    for frame in frames:
        decoded.append(decode_image(frame, limits=limits, media_root=media_root, allow_urls=allow_urls))
        height, width = decoded[-1].shape[:2]
        room -= height * width
        if room < 0:
            values = {"frames": len(frames), "width": width, "height": height}
            raise worker.media_error("video", "the video", limits, "video_pixels", values)
    return Video(decoded, [index / fps for index in range(len(decoded))])


def timestamp_text(seconds: float) -> str:
    """The stamp before a frame: "MM:SS", rounded down; minutes go on past 59."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"
