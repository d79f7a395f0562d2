"""Where long recordings are cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iolite.generate.transcribe import cut_at_silences

RATE = 16_000


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * RATE)).astype(np.float32)


def test_a_short_recording_is_one_piece():
    assert cut_at_silences(noise(30), 30 * RATE) == [(0, 30 * RATE)]
    assert cut_at_silences(noise(0.01), 30 * RATE) == [(0, 160)]


def test_cuts_lie_in_the_pauses():
    samples = noise(70)
    pauses = [(24.0, 24.5), (27.0, 27.1), (50.0, 50.4)]  # the second is too short to be one
    for start, end in pauses:
        samples[int(start * RATE) : int(end * RATE)] *= 0.01
    cuts = [stop / RATE for _, stop in cut_at_silences(samples, 30 * RATE)]
    assert len(cuts) == 3
    assert 24.05 < cuts[0] < 24.45
    assert 50.05 < cuts[1] < 50.35
    assert cuts[2] == 70


def test_in_silence_pieces_are_as_long_as_they_may_be():
    pieces = cut_at_silences(np.zeros(65 * RATE, np.float32), 30 * RATE)
    assert len(pieces) == 3
    assert pieces[0][1] >= 29.8 * RATE


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200_000), st.integers(6_400, 40_000))
def test_the_pieces_are_the_whole_recording(length, longest):
    pieces = cut_at_silences(noise(length / RATE)[:length], longest)
    assert pieces[0][0] == 0 and pieces[-1][1] == min(length, int(length / RATE * RATE))
    assert all(0 < stop - start <= longest for start, stop in pieces)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))


@pytest.mark.parametrize("longest", [6_400, 8_000])
def test_pieces_shorter_than_the_search_still_end(longest):
    assert sum(stop - start for start, stop in cut_at_silences(noise(5), longest)) == 5 * RATE
