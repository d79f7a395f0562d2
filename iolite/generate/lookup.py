"""Drafts out of the text so far: what followed the last time that its end was written.

Edited code, quotations and answers that repeat the question are mostly copies, and a copy is cheaper to guess than with
any drafter. (Prompt lookup decoding, Saxena 2023.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_MATCH = 2  # tokens; one alone says too little
MOST_MATCH = 16


class PromptLookup:
    """Looks in one sequence, which may grow between two calls."""

    def __init__(self, ids: Sequence[int]) -> None:
        """ids: is kept, and read again at every call."""
        self._ids = ids
        self._array = np.zeros(0, np.int64)
        self._length = 0

    def find(self, most: int) -> tuple[list[int], int]:
        """(up to `most` tokens that may come next, how many tokens before them agree with the end of the sequence).

        Of several places the one that agrees longest (up to MOST_MATCH), and of these the last; none: ([], 0).
        """
        ids = self._read()
        if most < 1 or len(ids) <= LEAST_MATCH:
            return [], 0
        ends = np.flatnonzero(ids[:-1] == ids[-1])  # where a match could end
        length = 1
        while len(ends) and length < MOST_MATCH:
            reach = ends[ends >= length]
            longer = reach[ids[reach - length] == ids[-1 - length]]
            if not len(longer):
                break
            ends, length = longer, length + 1
        if length < LEAST_MATCH or not len(ends):
            return [], 0
        start = int(ends[-1]) + 1
        return ids[start : start + most].tolist(), length

    def _read(self) -> np.ndarray:
        """The sequence [T]; only what is new of it is copied."""
        total = len(self._ids)
        if total > len(self._array):
            grown = np.zeros(2 * total, np.int64)
            grown[: self._length] = self._array[: self._length]
            self._array = grown
        self._array[self._length : total] = self._ids[self._length :]
        self._length = total
        return self._array[:total]
