"""The pages of a PDF: their words, and pictures of them. Both are made by PDFium, in a limited child process.

The child opens no files: fonts that a PDF names and does not carry are replaced by PDFium's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from iolite.media import worker
from iolite.media.limits import DEFAULT_LIMITS, Limits

_BEFORE = b"\xef\xbb\xbf\r\n\t \0"  # what some programs write before the mark


@dataclass(frozen=True)
class Page:
    """text: its text layer, "" when it has none. Sides are in points, as it is shown; empty: nothing is on it."""

    text: str
    height: float
    width: float
    empty: bool


def is_pdf(data: bytes) -> bool:
    return data[:1024].lstrip(_BEFORE).startswith(b"%PDF-")


def read_pages(data: bytes, *, limits: Limits = DEFAULT_LIMITS, label: str = "the PDF") -> tuple[Page, ...]:
    """All pages. MediaError for a PDF that is damaged, locked or over the limits; label: what the error calls it."""
    pages = []
    for header, text in worker.decode("pdf", data, limits, label=label, room=4 * limits.max_text):
        height, width = header.get("height"), header.get("width")
        if text.ndim != 1 or not _is_side(height) or not _is_side(width):
            raise worker.media_error("pdf", label, limits, "unreadable", {})
        pages.append(Page(text.tobytes().decode("utf-8", "replace"), height, width, header.get("empty") is True))
    if not 0 < len(pages) <= limits.max_pages:
        raise worker.media_error("pdf", label, limits, "unreadable", {})
    return tuple(pages)


def _is_side(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 < value < math.inf


def draw_pages(
    data: bytes, wanted: Sequence[tuple[int, int, int]], *, limits: Limits = DEFAULT_LIMITS, label: str = "the PDF"
) -> Iterator[np.ndarray]:
    """Pages as uint8 RGB [height, width, 3], each drawn when the one before was taken.

    wanted: (number of the page, from 0, height, width) of each, drawn at just that size.
    """
    room = sum(3 * height * width for _, height, width in wanted)
    drawn = worker.decode("pages", data, limits, label=label, room=room, pages=wanted)
    shapes = [(height, width, 3) for _, height, width in wanted]
    for _, pixels in drawn:
        if pixels.dtype != np.uint8 or not shapes or pixels.shape != shapes.pop(0):
            raise worker.media_error("pages", label, limits, "unreadable", {})
        yield pixels
    if shapes:
        raise worker.media_error("pages", label, limits, "unreadable", {})
