"""Spoken digits and questions, made by espeak-ng in many voices.

`Voice` is one accent, variant, speed and pitch. Two accents and a seventh of the variants are never trained on.
`speak` makes one clip exactly as a user's .wav file would arrive: espeak-ng's 16-bit sound at 22.05 kHz through the
same FFmpeg resampler as `iolite.media.audio`, 16 kHz mono, silence trimmed. Clips go into the store;
`compose_speech` joins, pads, scales and roughens them for every sample.
"""

from __future__ import annotations

import hashlib
import io
import random
import shutil
import subprocess
import wave
from collections.abc import Sequence
from dataclasses import dataclass

import av
import numpy as np

from iolite.errors import UsageError

RATE = 16_000
FRAME = 640  # samples of one token, 40 ms
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

TRAIN_ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-029")
HELD_OUT_ACCENTS = ("en-gb-x-gbcwmd", "en-us-nyc")
# Whispers have no pitch, the others are effects (echo, distortion) more than voices.
_NOT_VOICES = frozenset({"whisper", "whisperf", "fast", "Demonic", "announcer", "UniRobot", "Mr"})
_HELD_OUT_SHARE = 0.15

# What is asked aloud about a picture, by what is wanted.
SPOKEN_QUESTIONS: dict[str, tuple[str, ...]] = {
    kind: tuple(
        form.format(kind) for form in ("what {} is it", "what {} is this", "which {} is it", "what is the {}", last)
    )
    for kind, last in (("colour", "name the colour"), ("shape", "name the shape"), ("number", "read the number"))
}


@dataclass(frozen=True)
class Voice:
    """One way to speak: `variant` may be "" for the accent's own voice; speed in words a minute, pitch 0-99."""

    accent: str
    variant: str
    speed: int
    pitch: int

    @property
    def name(self) -> str:
        """As espeak-ng's -v takes it."""
        return f"{self.accent}+{self.variant}" if self.variant else self.accent


@dataclass(frozen=True)
class Sound:
    """A composed recording and, for every 40 ms frame, the word heard in it or ""."""

    samples: np.ndarray  # float32 [n], 16 kHz, within [-1, 1]
    labels: list[str]  # ceil(n / 640)


def espeak_path() -> str:
    """Where espeak-ng is. Raises UsageError when it is not installed."""
    path = shutil.which("espeak-ng")
    if path is None:
        raise UsageError(
            "espeak-ng is not installed; it speaks the training data", "on Debian: apt-get install espeak-ng"
        )
    return path


def variants() -> tuple[list[str], list[str]]:
    """The voice variants that espeak-ng has here, (trained on, held out), by the hash of their names."""
    lines = subprocess.run(
        [espeak_path(), "--voices=variant"], capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()[1:]
    found = sorted({path for line in lines for path in line.split() if path.startswith("!v/")})
    names = [path.removeprefix("!v/") for path in found if path.removeprefix("!v/") not in _NOT_VOICES]
    held = [name for name in names if _place(_person(name)) < _HELD_OUT_SHARE]
    return [""] + [name for name in names if name not in held], held


def voices(split: str, count: int, seed: int = 0) -> list[Voice]:
    """`count` different voices of a split. Held-out ones have an unseen variant, an unseen accent, or both."""
    trained, held = variants()
    dice = random.Random(f"{split} {seed}")
    chosen: dict[Voice, None] = {}
    while len(chosen) < count:
        if split == "train":
            accent, variant = dice.choice(TRAIN_ACCENTS), dice.choice(trained)
        else:
            kind = dice.randrange(3)
            accent = dice.choice(HELD_OUT_ACCENTS if kind else TRAIN_ACCENTS)
            variant = dice.choice(trained if kind == 1 else held)
        speed = round(dice.triangular(120, 230, 185))
        chosen[Voice(accent, variant, speed, dice.randint(15, 85))] = None
    return list(chosen)


def speak(text: str, voice: Voice) -> np.ndarray:
    """One utterance, silence trimmed at both ends: int16 [n] at 16 kHz. Raises RuntimeError when nothing is heard."""
    command = [espeak_path(), "-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch), "--stdout", text]
    data = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    with wave.open(io.BytesIO(data)) as file:
        rate = file.getframerate()
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    clip = trim(resample(sound, rate))
    if len(clip) < RATE // 20:
        raise RuntimeError(f"espeak-ng said nothing for {text!r} in {voice}")
    return clip


def resample(sound: np.ndarray, rate: int) -> np.ndarray:
    """int16 mono at `rate` to int16 mono at 16 kHz, by FFmpeg."""
    frame = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
    parts = [part.to_ndarray()[0] for part in [*resampler.resample(frame), *resampler.resample(None)]]
    return np.clip(np.rint(np.concatenate(parts) * 32768), -32768, 32767).astype(np.int16)


def trim(clip: np.ndarray, margin: int = RATE // 100) -> np.ndarray:
    """Cut what is quieter than 1 % of the peak from both ends, but for 10 ms."""
    loud = np.flatnonzero(np.abs(clip.astype(np.int32)) > 0.01 * np.abs(clip.astype(np.int32)).max(initial=0))
    if len(loud) == 0:
        return clip[:0]
    return clip[max(0, loud[0] - margin) : loud[-1] + margin]


@dataclass(frozen=True)
class Noises:
    """Long stretches of noise of unit power, made once and cut from at random."""

    white: np.ndarray  # float32
    brown: np.ndarray

    @classmethod
    def make(cls, seed: int, samples: int = 1 << 20) -> Noises:
        rng = np.random.default_rng(seed)
        white = rng.standard_normal(samples).astype(np.float32)
        spectrum = np.fft.rfft(rng.standard_normal(samples))
        frequency = np.arange(len(spectrum)) * (RATE / samples)
        brown = np.fft.irfft(spectrum / np.maximum(frequency, 30), samples)  # 6 dB an octave, flat under 30 Hz
        return cls(white, (brown / brown.std()).astype(np.float32))

    def cut(self, length: int, dice: random.Random) -> np.ndarray:
        """`length` samples of one of the two."""
        bank = self.white if dice.random() < 0.5 else self.brown
        start = int(dice.random() * (len(bank) - length))
        return bank[start : start + length]


def compose_speech(
    clips: Sequence[np.ndarray],
    words: Sequence[Sequence[tuple[str, float, float]]],
    dice: random.Random,
    noises: Noises,
    difficulty: float,
) -> Sound:
    """Join int16 clips with gaps of 0-250 ms between random silences, and set loudness and noise.

    `words[i]` says what is heard in clip i: (label, start, end) with the times as fractions of the clip.
    The silence before and after is random enough that the length does not tell the number of digits.
    """
    lead = _silence(dice)
    length = lead + sum(map(len, clips))
    gaps = [int(dice.random() * 0.25 * RATE) for _ in clips[1:]] + [_silence(dice)]
    samples = np.zeros(length + sum(gaps), np.float32)
    labels = [""] * -(-len(samples) // FRAME)
    position = lead
    for clip, heard, gap in zip(clips, words, gaps, strict=True):
        samples[position : position + len(clip)] = clip
        for label, start, end in heard:
            first = (position + start * len(clip)) / FRAME
            last = (position + end * len(clip)) / FRAME
            for frame in range(round(first), max(round(last), round(first) + 1)):
                labels[frame] = label
        position += len(clip) + gap
    peak = max(1.0, float(samples.max()), -float(samples.min()))
    samples *= (10 ** dice.uniform(-0.8 * difficulty, -0.02)) / peak
    if dice.random() < 0.6 * difficulty:  # the rest keeps digital silence
        level = float(samples.max()) * 10 ** dice.uniform(-3.2, -1.6)  # 64 to 32 dB under the peak
        samples += level * noises.cut(len(samples), dice)
        np.clip(samples, -1, 1, out=samples)
    return Sound(samples, labels)


def spread_words(labels: Sequence[str], weights: Sequence[float]) -> list[tuple[str, float, float]]:
    """Words of one utterance laid end to end in proportion to `weights` (lengths, or letters)."""
    total, start, spread = sum(weights), 0.0, []
    for label, weight in zip(labels, weights, strict=True):
        spread.append((label, start, start + weight / total))
        start += weight / total
    return [word for word in spread if word[0]]


def _silence(dice: random.Random) -> int:
    """0-600 ms in samples, mostly short, sometimes none at all."""
    return 0 if dice.random() < 0.1 else int(dice.random() ** 2 * 0.6 * RATE)


def _person(variant: str) -> str:
    """Gene and Gene2 are one person; f1 and f2 are two."""
    return variant.rstrip("0123456789").lower() if len(variant) > 2 else variant


def _place(name: str) -> float:
    return int.from_bytes(hashlib.sha256(f"voice {name}".encode()).digest()[:6], "big") / 2**48
