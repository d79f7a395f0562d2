"""Speech and whole samples: voices kept apart, clips, labels, the store and every task."""

import random
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from iolite.errors import UsageError
from iolite.train.nano import fonts, speech, store
from iolite.train.nano.speech import FRAME, RATE, Noises, Voice
from iolite.train.nano.store import SplitSize, StoreSize, build_store
from iolite.train.nano.tasks import TASKS, NanoData, Sample

needs_espeak = pytest.mark.usefixtures("espeak")
TINY = StoreSize(SplitSize(12, 3, 3, 2, 4), SplitSize(6, 2, 2, 2, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "store"
    split = fonts.find_fonts([Path(matplotlib.get_data_path()) / "fonts" / "ttf"])
    report = build_store(path, processes=1, size=TINY, fonts=split)
    assert report.parts_made == 6
    return path


@needs_espeak
def test_no_voice_is_on_both_sides() -> None:
    trained, held = speech.variants()
    assert not set(trained) & set(held)
    assert not set(speech.TRAIN_ACCENTS) & set(speech.HELD_OUT_ACCENTS)
    for voice in speech.voices("held_out", 60):
        assert voice.accent in speech.HELD_OUT_ACCENTS or voice.variant in held
    for voice in speech.voices("train", 60):
        assert voice.accent in speech.TRAIN_ACCENTS
        assert voice.variant in trained


@needs_espeak
def test_voices_are_deterministic_and_different() -> None:
    assert speech.voices("train", 50) == speech.voices("train", 50)
    assert len(set(speech.voices("train", 50))) == 50


@needs_espeak
def test_a_clip_is_trimmed_16_khz_speech() -> None:
    clip = speech.speak("seven", Voice("en-us", "", 180, 50))
    assert clip.dtype == np.int16
    assert 0.2 < len(clip) / RATE < 0.8
    peak = np.abs(clip.astype(int)).max()
    assert np.abs(clip[: RATE // 50].astype(int)).max() > 0.01 * peak  # sound begins within 20 ms
    assert np.abs(clip[-RATE // 50 :].astype(int)).max() > 0.01 * peak


def test_resampling_keeps_a_tone() -> None:
    time = np.arange(22_050) / 22_050
    tone = np.rint(16_000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)
    out = speech.resample(tone, 22_050)
    assert abs(len(out) - RATE) <= 2
    assert int(np.abs(np.fft.rfft(out[:RATE])).argmax()) == 440
    # the root mean square of a sine is its peak / sqrt(2); FFmpeg's pass band is flat to about 0.1 dB
    assert np.sqrt(np.mean(out[1000:-1000].astype(float) ** 2)) == pytest.approx(16_000 / np.sqrt(2), rel=0.015)


def test_joined_clips_carry_exact_labels() -> None:
    clips = [np.full(6400, 8000, np.int16), np.full(3200, 8000, np.int16)]
    words = [[("3", 0.0, 1.0)], [("9", 0.0, 1.0)]]
    for seed in range(50):
        sound = speech.compose_speech(clips, words, random.Random(seed), Noises.make(0, 1 << 18), difficulty=0.0)
        assert len(sound.labels) == -(-len(sound.samples) // FRAME)
        heard = [label for label in sound.labels if label]
        assert heard == sorted(heard)  # all "3" before all "9"
        assert Counter(heard)["3"] in (9, 10, 11)
        assert Counter(heard)["9"] in (4, 5, 6)
        loudness = [np.abs(sound.samples[i * FRAME :][:FRAME]).sum() / FRAME for i in range(len(sound.labels))]
        full = np.abs(sound.samples).max()
        first = next(i for i, label in enumerate(sound.labels) if label)
        assert max(loudness[:first], default=0) <= 0.51 * full  # a frame belongs to a word that fills half of it
        assert min(value for value, label in zip(loudness, sound.labels, strict=True) if label) >= 0.49 * full


def test_sound_stays_within_range() -> None:
    clip = np.random.default_rng(0).integers(-32768, 32767, 8000).astype(np.int16)
    noises = Noises.make(0, 1 << 18)
    for seed in range(50):
        sound = speech.compose_speech([clip], [[]], random.Random(seed), noises, difficulty=1.0)
        assert np.abs(sound.samples).max() <= 1
        assert sound.samples.dtype == np.float32


def test_words_spread_in_proportion() -> None:
    assert speech.spread_words(["", "colour"], [1, 3]) == [("colour", 0.25, 1.0)]


def test_length_does_not_tell_the_number_of_digits() -> None:
    noises = Noises.make(0, 1 << 18)
    clip = np.full(5600, 8000, np.int16)  # 350 ms
    lengths = {
        count: [
            len(speech.compose_speech([clip] * count, [[]] * count, random.Random(seed), noises, 0.0).samples)
            for seed in range(200)
        ]
        for count in (1, 2)
    }
    assert np.quantile(lengths[1], 0.9) > np.quantile(lengths[2], 0.25)


@needs_espeak
def test_a_finished_store_is_not_built_again(folder: Path) -> None:
    assert build_store(folder, processes=1, size=TINY).parts_made == 0
    with pytest.raises(UsageError, match="another version or size"):
        build_store(folder, processes=1)


@needs_espeak
def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    split = fonts.find_fonts([Path(matplotlib.get_data_path()) / "fonts" / "ttf"])
    seen: list[str] = []

    class Stop(Exception):
        pass

    def stop_after_two(done: int, total: int, name: str) -> None:
        seen.append(name)
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        build_store(tmp_path, processes=1, size=TINY, fonts=split, progress=stop_after_two)
    with pytest.raises(UsageError, match="no finished store"):
        NanoData(tmp_path, "train")
    report = build_store(tmp_path, processes=1, size=TINY, fonts=split)
    assert report.parts_made == 4
    assert len(store.Store(tmp_path, "train").singles) == TINY.train.voices


def test_a_missing_store_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished store"):
        NanoData(tmp_path, "train")


def check(sample: Sample) -> None:
    """What must hold for a sample of any task."""
    kinds = [part["type"] for turn in sample.messages if turn["role"] == "user" for part in turn["content"]]
    assert kinds.count("image") == len(sample.images) == len(sample.image_dense)
    assert kinds.count("audio") == len(sample.sounds) == len(sample.audio_dense)
    assert [turn["role"] for turn in sample.messages] == ["user", "assistant"] * (len(sample.messages) // 2)
    assert sample.answer == sample.messages[-1]["content"] == sample.answer.lower() != ""
    for image, labels in zip(sample.images, sample.image_dense, strict=True):
        assert image.dtype == np.uint8
        assert image.shape == (48, 48 * len(labels), 3)
    for sound, labels in zip(sample.sounds, sample.audio_dense, strict=True):
        assert sound.dtype == np.float32
        assert len(labels) == -(-len(sound) // FRAME)


@needs_espeak
@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("task", TASKS)
def test_samples_are_well_formed(folder: Path, split: str, task: str) -> None:
    data, rng = NanoData(folder, split), np.random.default_rng(1)
    for i in range(60):
        sample = data.sample(task, rng, difficulty=i % 2)
        assert sample.task == task
        check(sample)
        if task in ("transcribe", "read"):
            assert sample.answer.isdigit()
            dense = (sample.audio_dense or sample.image_dense)[0]
            assert set(dense) - {""} <= set(sample.answer)


@needs_espeak
def test_equal_seeds_make_equal_samples(folder: Path) -> None:
    first, second = (NanoData(folder, "train").sample("both", np.random.default_rng(7)) for _ in range(2))
    assert first.messages == second.messages
    assert np.array_equal(first.images[0], second.images[0])
    assert np.array_equal(first.sounds[0], second.sounds[0])


@needs_espeak
def test_texts_cover_every_question_and_answer(folder: Path) -> None:
    data, rng = NanoData(folder, "train"), np.random.default_rng(2)
    known = set(" ".join(data.texts()).replace(",", " ").split())
    for task in TASKS:
        for _ in range(40):
            for word in data.sample(task, rng).answer.replace(",", " ").split():
                assert word in known or word.isdigit()


def test_shares_of_the_tasks_sum_to_one() -> None:
    assert sum(TASKS.values()) == pytest.approx(1)
