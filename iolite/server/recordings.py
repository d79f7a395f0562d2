"""Recordings that are being written down: how much sound all of them may hold at once.

A small file may hold an hour, and an hour of samples takes 230 MB for as long as the model listens to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from iolite.errors import BusyError

MOST_SAMPLES = 4 * 3600 * 16_000  # four of the longest that are decoded, 0.9 GB


class Recordings:
    """Counts samples."""

    def __init__(self) -> None:
        self.held = 0

    @contextmanager
    def holding(self, samples: np.ndarray) -> Iterator[None]:
        """While these samples are here. BusyError where there are too many; some that are alone have room."""
        if self.held and self.held + len(samples) > MOST_SAMPLES:
            raise BusyError("too much sound is being written down", "send it again later", retry_after=30.0)
        self.held += len(samples)
        try:
            yield
        finally:
            self.held -= len(samples)
