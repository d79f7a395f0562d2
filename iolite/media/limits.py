"""How much of a picture, sound, video or PDF is accepted. Checked before decoding, and named in the error."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one piece of media may be and may cost.

    There is no limit on the shape of a picture: 1 x 1 and 1 x 4000 pixels have their place in the model's resize.
    """

    max_bytes: int = 256 * 2**20  # of the file, before decoding
    max_pixels: int = 64_000_000  # of a picture, or of one frame of a video
    max_audio_seconds: float = 3600.0
    max_video_seconds: float = 3600.0
    max_frames: int = 1024  # taken from one video
    max_video_pixels: int = 512_000_000  # all frames taken from one video, together: 1.5 GB as RGB
    max_pages: int = 2_000  # of a PDF
    max_text: int = 1_000_000  # characters of a text, or of all pages of a PDF: four times the longest context
    max_page_pictures: int = 64  # pages of all PDFs of a prompt that are looked at: each takes 8 to 31 MB as patches
    max_decode_seconds: float = 120.0  # of the clock, and of processor time
    max_decode_memory: int = 3 * 2**30  # bytes that the decoder may ask for; held on Linux only


DEFAULT_LIMITS = Limits()
