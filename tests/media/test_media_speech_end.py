"""Where speech begins and ends: in silence, in noise, in pieces of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iolite.media.audio import audio_frames, decode_audio
from iolite.media.speech_end import SpeechEnd, levels

RATE, SIZE = 16_000, 640
DIGITS = decode_audio(str(Path(__file__).parents[2] / "docs" / "demo" / "digits.wav"))  # "3 0 9", then silence


def noise(seconds, db, seed=0):
    dice = np.random.default_rng(seed)
    return (10 ** (db / 20) * dice.standard_normal(round(seconds * RATE))).astype(np.float32)


def silence(seconds):
    return np.zeros(round(seconds * RATE), np.float32)


def utterances(ear, samples, step=1000):
    """What was spoken, in whole frames, of samples that come step by step; and whether the last is still going on."""
    found, current = [], []
    for at in range(0, len(samples), step):
        for frames, ended in ear.push(samples[at : at + step]):
            current.append(frames)
            if ended:
                found.append(np.concatenate(current))
                current = []
    return found, bool(current)


@pytest.mark.parametrize("background", [None, -65, -50, -42])
def test_words_with_pauses_are_one_utterance(background):
    samples = np.concatenate((silence(1.2), DIGITS, silence(2), DIGITS, silence(2)))
    if background is not None:
        samples = samples + noise(len(samples) / RATE, background)
    found, going_on = utterances(SpeechEnd(), samples)
    assert not going_on
    assert [1.4 < len(frames) * SIZE / RATE < 2.6 for frames in found] == [True, True]


@pytest.mark.parametrize("step", [50, 1000, 100_000])
def test_where_it_began_in_what_came(step):
    samples = np.concatenate((silence(1.21), DIGITS, silence(2.003), DIGITS))
    ear, begun = SpeechEnd(), {}
    for at in range(0, len(samples), step):
        for frames, _ in ear.push(samples[at : at + step]):
            begun.setdefault(ear.began, frames[0])
    assert len(begun) == (1 if step == 100_000 else 2), "of two in one piece it tells of the last"
    if step < 100_000:
        assert all((samples[at : at + SIZE] == frame).all() for at, frame in begun.items())
    last = list(begun)[-1]
    assert 0 < len(samples) - len(DIGITS) - last < 0.3 * RATE


def test_it_ends_after_the_silence_that_was_asked_for():
    lengths = []
    for asked in (0.2, 0.6, 1.5):
        found, _ = utterances(SpeechEnd(asked), np.concatenate((DIGITS, silence(3))))
        quiet = levels(found[-1])[::-1] < -50
        lengths.append(np.argmin(quiet) * SIZE / RATE)
    assert lengths == pytest.approx([0.2, 0.6, 1.5], abs=0.05)


def test_a_longer_pause_than_that_parts_two():
    word = DIGITS[:12_000]
    samples = np.concatenate((word, silence(0.4), word, silence(2)))
    assert [len(utterances(SpeechEnd(asked), samples)[0]) for asked in (0.24, 0.6)] == [2, 1]


def test_silence_noise_and_clicks_are_no_speech():
    click = silence(5)
    click[RATE] = 1.0
    for samples in (silence(5), noise(20, -60), click, silence(3) + np.float32(0.25)):
        assert utterances(SpeechEnd(), samples) == ([], False)


def test_a_fan_is_noise_after_a_while():
    ear = SpeechEnd()
    utterances(ear, np.concatenate((silence(1), noise(20, -30))))
    assert not ear.speaking
    talk = np.concatenate((3 * DIGITS, silence(2)))
    found, going_on = utterances(ear, talk + noise(len(talk) / RATE, -30))
    assert len(found) == 1 and not going_on


def test_the_beginning_of_a_word_is_kept():
    lead = noise(1, -70, seed=1)
    found, _ = utterances(SpeechEnd(), np.concatenate((lead, DIGITS, silence(1))))
    begin = found[0][0]
    at = next(i for i in range(0, len(lead), SIZE) if np.array_equal(lead[i : i + SIZE], begin))
    assert 0.1 < (len(lead) - at) / RATE < 0.5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4000), min_size=1, max_size=40))
def test_the_cut_of_the_stream_changes_nothing(cuts):
    samples = np.concatenate((silence(0.5), DIGITS, silence(1), DIGITS))
    whole, pieces = SpeechEnd(), SpeechEnd()
    expected, _ = utterances(whole, samples, len(samples))
    found, current, at = [], [], 0
    for count in [*cuts, len(samples)]:
        for frames, ended in pieces.push(samples[at : at + count]):
            current.append(frames)
            if ended:
                found.append(np.concatenate(current))
                current = []
        at += count
    assert len(found) == len(expected) == 1
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(whole.flush(), pieces.flush())


def test_without_an_end_everything_is_heard():
    """The very frames of the whole recording, however many samples it has."""
    for count in (1, 639, 640, 641, 9999):
        ear = SpeechEnd(None)
        found = [frames for at in range(0, count, 70) for frames, _ in ear.push(DIGITS[at : min(at + 70, count)])]
        assert np.array_equal(np.concatenate([*found, ear.flush()]), audio_frames(DIGITS[:count]))
        assert not len(ear.flush())


def test_reset_forgets_what_was_begun():
    ear = SpeechEnd()
    assert ear.push(DIGITS[:20_100])
    assert ear.speaking
    ear.reset()
    assert not ear.speaking and not len(ear.flush())
    assert utterances(ear, silence(2)) == ([], False)
