"""Samples of every task: chat messages with their pictures and sounds, composed from the store in about 0.2 ms.

    data = NanoData("store", "train")
    sample = data.sample("read", np.random.default_rng(0), difficulty=0.5)
    sample.messages[-1]["content"]        # "47"

Tasks: `read` digits from a picture, name a `shape` and its colour, `ask` a typed question about a picture,
`transcribe` spoken digits, a `spoken` question about a picture, a picture and a recording `both`, and `talk`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iolite.train.nano import phrases
from iolite.train.nano.pictures import COLOURS, SHAPES, Picture, compose_digits, compose_shape, layout_digits
from iolite.train.nano.speech import DIGIT_WORDS, SPOKEN_QUESTIONS, Noises, Sound, compose_speech, spread_words
from iolite.train.nano.store import QUESTION_KINDS, Store

# Share of the samples. Long strings and speech are the last to be learnt and get the most.
TASKS: dict[str, float] = {
    "read": 0.28,
    "shape": 0.10,
    "ask": 0.16,
    "transcribe": 0.24,
    "spoken": 0.11,
    "both": 0.06,
    "talk": 0.05,
}

_COLOUR_NAMES = tuple(COLOURS)
_WIDTHS = {1: (48, 96, 144), 2: (96, 96, 144), 3: (144,), 4: (144,)}
_TRIES = 40


@dataclass(frozen=True)
class Sample:
    """One training or test example; the last message is the assistant's answer.

    `image_dense[i]` has a word for every 48-pixel patch of images[i] in raster order, `audio_dense[i]` one for every
    40 ms frame of sounds[i]; "" means none. They are for training only.
    """

    task: str
    messages: list[dict[str, Any]]
    images: list[np.ndarray] = field(default_factory=list)  # uint8 [H, W, 3]
    sounds: list[np.ndarray] = field(default_factory=list)  # float32 [n], 16 kHz
    image_dense: list[list[str]] = field(default_factory=list)
    audio_dense: list[list[str]] = field(default_factory=list)

    def question(self) -> list[dict[str, Any]]:
        """The messages but for the answer, with pictures and sounds put into their parts."""
        images, sounds = iter(self.images), iter(self.sounds)

        def filled(part: dict[str, Any]) -> dict[str, Any]:
            if part["type"] == "image":
                return {**part, "image": next(images)}
            if part["type"] == "audio":
                return {**part, "audio": next(sounds), "sampling_rate": 16_000}
            return part

        return [
            {**m, "content": [filled(p) for p in m["content"]] if isinstance(m["content"], list) else m["content"]}
            for m in self.messages[:-1]
        ]

    @property
    def answer(self) -> str:
        """What the assistant should say."""
        text: str = self.messages[-1]["content"]
        return text


@dataclass(frozen=True)
class _Shape:
    """A shape picture and the truth about it."""

    picture: Picture
    shape: str
    colour: str


class NanoData:
    """Samples composed at random from one split of a store. Cheap to make; one per process."""

    TASKS = TASKS

    def __init__(self, folder: str | os.PathLike[str], split: str, seed: int = 0) -> None:
        self.split = split
        self.store = Store(folder, split)
        self.noises = Noises.make(seed)

    def sample(self, task: str, rng: np.random.Generator, difficulty: float = 1.0) -> Sample:
        """One sample of a task. `difficulty` in [0, 1] widens papers, inks, noise, loudness and lengths."""
        # Python's generator draws a single number twenty times faster than NumPy's.
        dice = random.Random(int(rng.integers(1 << 62)))
        return getattr(self, f"_{task}")(dice, difficulty)

    def texts(self) -> Iterator[str]:
        """The corpus for the tokenizer."""
        return phrases.all_texts(_COLOUR_NAMES, SHAPES)

    # Tasks

    def _read(self, dice: random.Random, difficulty: float) -> Sample:
        text = _digits(dice, dice.choices((1, 2, 3, 4), _read_lengths(difficulty))[0])
        return _about_picture(
            "read", phrases.choose(phrases.READ, dice), text, self._number(text, dice, difficulty), dice
        )

    def _shape(self, dice: random.Random, difficulty: float) -> Sample:
        seen = self._coloured_shape(dice, difficulty)
        answer = f"{seen.colour} {seen.shape}"
        return _about_picture("shape", phrases.choose(phrases.NAME, dice, 0.2), answer, seen.picture, dice)

    def _ask(self, dice: random.Random, difficulty: float) -> Sample:
        if dice.random() < 0.3:
            text = _digits(dice, dice.choices((1, 2, 3), (5, 4, 1))[0])
            picture = self._number(text, dice, difficulty)
            question, answer = _number_question(text, dice)
            return _about_picture("ask", question, answer, picture, dice)
        seen = self._coloured_shape(dice, difficulty)
        question, answer = _shape_question(seen, dice)
        earlier = _shape_question(seen, dice) if dice.random() < 0.15 * difficulty else None
        return _about_picture("ask", question, answer, seen.picture, dice, earlier)

    def _transcribe(self, dice: random.Random, difficulty: float) -> Sample:
        text, sound = self._spoken_digits(dice, difficulty, _spoken_lengths(difficulty))
        question = {"type": "text", "text": phrases.as_typed(phrases.choose(phrases.TRANSCRIBE, dice, 0.4), dice)}
        parts = [question, {"type": "audio"}] if dice.random() < 0.6 else [{"type": "audio"}, question]
        return Sample("transcribe", _chat(parts, text), sounds=[sound.samples], audio_dense=[sound.labels])

    def _spoken(self, dice: random.Random, difficulty: float) -> Sample:
        row = dice.randrange(len(self.store.questions))
        kind = QUESTION_KINDS[self.store.question_kind[row]]
        phrase = SPOKEN_QUESTIONS[kind][self.store.question_phrase[row]]
        words = spread_words(
            [word if word == kind else "" for word in phrase.split()], [len(w) + 1 for w in phrase.split()]
        )
        sound = compose_speech([self.store.clip(self.store.questions[row])], [words], dice, self.noises, difficulty)
        if kind == "number":
            answer = _digits(dice, 1)
            picture = self._number(answer, dice, difficulty, widths=(48, 96))
        else:
            seen = self._coloured_shape(dice, difficulty)
            picture, answer = seen.picture, seen.colour if kind == "colour" else seen.shape
        parts = [{"type": "image"}]
        if dice.random() < 0.5:
            parts.append({"type": "text", "text": phrases.as_typed(phrases.choose(phrases.ANSWER_ALOUD, dice), dice)})
        return _with_both("spoken", [*parts, {"type": "audio"}], answer, picture, sound)

    def _both(self, dice: random.Random, difficulty: float) -> Sample:
        seen = self._coloured_shape(dice, difficulty)
        number, sound = self._spoken_digits(dice, difficulty, (2, 2, 0))
        kind = dice.random()
        if kind < 0.5:
            question = phrases.choose(phrases.SEE_AND_HEAR, dice)
            answer = f"{seen.colour} {seen.shape}, {number}"
        elif kind < 0.75:
            question, answer = dice.choice(("What do you hear?", "What number do you hear?", "What is said?")), number
        else:
            question, answer = _shape_question(seen, dice)
        text = {"type": "text", "text": phrases.as_typed(question, dice)}
        return _with_both("both", [{"type": "image"}, text, {"type": "audio"}], answer, seen.picture, sound)

    def _talk(self, dice: random.Random, difficulty: float) -> Sample:
        messages: list[dict[str, Any]] = []
        for _ in range(2 if dice.random() < 0.2 * difficulty else 1):
            question, answer = _small_talk(dice)
            messages += _chat([{"type": "text", "text": phrases.as_typed(question, dice)}], answer)
        return Sample("talk", messages)

    # Ingredients

    def _number(
        self, text: str, dice: random.Random, difficulty: float, widths: Sequence[int] | None = None
    ) -> Picture:
        """A picture of `text` in a random look, drawn again until it fits the chosen width."""
        store, width = self.store, dice.choice(widths or _WIDTHS[len(text)])
        for _ in range(_TRIES):
            look = dice.randrange(len(store.digits_angle))
            geometry = store.digits_geometry[look].tolist()
            corners = layout_digits(text, geometry, float(store.digits_angle[look]), width, dice)
            if corners is not None:
                masks = [store.digit_mask(look, int(digit), geometry) for digit in text]
                return compose_digits(text, masks, corners, width, dice, self.noises.white, difficulty)
        raise RuntimeError(f"no look of the store fits {len(text)} digits into {width} pixels")

    def _coloured_shape(self, dice: random.Random, difficulty: float) -> _Shape:
        kind, colour = dice.randrange(len(SHAPES)), dice.choice(_COLOUR_NAMES)
        mask = self.store.shapes[kind, dice.randrange(self.store.shapes.shape[1])]
        shape = SHAPES[kind]
        return _Shape(compose_shape(shape, colour, mask, dice, self.noises.white, difficulty), shape, colour)

    def _spoken_digits(self, dice: random.Random, difficulty: float, lengths: Sequence[float]) -> tuple[str, Sound]:
        """One to three digits, either joined from single clips of one voice or spoken in one breath."""
        store = self.store
        length = dice.choices((1, 2, 3), lengths)[0]
        rows = self._rows_of_length[length]
        if dice.random() < 0.5 or not len(rows):
            voice = store.singles[dice.randrange(len(store.singles))]
            text = _digits(dice, length)
            clips = [store.clip(voice[int(digit)]) for digit in text]
            words = [[(digit, 0.0, 1.0)] for digit in text]
            return text, compose_speech(clips, words, dice, self.noises, difficulty)
        row = int(rows[dice.randrange(len(rows))])
        text = "".join(str(digit) for digit in store.number_digits[row, :length])
        words = [spread_words(list(text), store.number_weights[row, :length].tolist())]
        return text, compose_speech([store.clip(store.numbers[row])], words, dice, self.noises, difficulty)

    @property
    def _rows_of_length(self) -> dict[int, np.ndarray]:
        """Rows of the store's whole utterances, by their number of digits."""
        if not hasattr(self, "_rows"):
            count = (self.store.number_digits < len(DIGIT_WORDS)).sum(1)
            self._rows = {length: np.flatnonzero(count == length) for length in (1, 2, 3)}
        return self._rows


def _read_lengths(difficulty: float) -> tuple[float, ...]:
    """Weights of 1, 2, 3 and 4 digits: one digit first, then more of the long ones."""
    return tuple(a + (b - a) * difficulty for a, b in zip((0.6, 0.3, 0.06, 0.04), (0.15, 0.25, 0.3, 0.3), strict=True))


def _spoken_lengths(difficulty: float) -> tuple[float, ...]:
    return tuple(a + (b - a) * difficulty for a, b in zip((0.7, 0.2, 0.1), (0.25, 0.35, 0.4), strict=True))


def _digits(dice: random.Random, length: int) -> str:
    return "".join(dice.choices("0123456789", k=length))


def _shape_question(seen: _Shape, dice: random.Random) -> tuple[str, str]:
    kind = dice.random()
    if kind < 0.32:
        return phrases.choose(phrases.COLOUR, dice).format(shape=seen.shape), seen.colour
    if kind < 0.64:
        return phrases.choose(phrases.SHAPE, dice), seen.shape
    yes = dice.random() < 0.5
    if kind < 0.82:
        shape = seen.shape if yes else dice.choice([other for other in SHAPES if other != seen.shape])
        return dice.choice(phrases.IS_SHAPE).format(shape=shape), "yes" if yes else "no"
    colour = seen.colour if yes else dice.choice([other for other in _COLOUR_NAMES if other != seen.colour])
    return dice.choice(phrases.IS_COLOUR).format(colour=colour), "yes" if yes else "no"


def _number_question(text: str, dice: random.Random) -> tuple[str, str]:
    kind = dice.random()
    if kind < 0.55:
        return phrases.choose(phrases.READ, dice), text
    if kind < 0.7:
        return dice.choice(phrases.NAME[:4]), text
    number, yes = text, dice.random() < 0.5
    while not yes and number == text:
        place = dice.randrange(len(text))
        number = text[:place] + dice.choice("0123456789") + text[place + 1 :]
    return dice.choice(phrases.IS_NUMBER).format(number=number), "yes" if yes else "no"


def _small_talk(dice: random.Random) -> tuple[str, str]:
    kind = dice.random()
    if kind < 0.65:
        wordings, answer = dice.choice(phrases.TALK)
        return dice.choice(wordings), answer
    if kind < 0.8:
        return phrases.unknown_question(dice), phrases.UNKNOWN
    if kind < 0.9:
        wordings = phrases.READ + phrases.COLOUR[:3] + phrases.SHAPE + phrases.NAME
        return dice.choice(wordings), phrases.NO_PICTURE
    return dice.choice(phrases.TRANSCRIBE), phrases.NO_SOUND


def _chat(parts: list[dict[str, str]], answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def _about_picture(
    task: str,
    question: str,
    answer: str,
    picture: Picture,
    dice: random.Random,
    earlier: tuple[str, str] | None = None,
) -> Sample:
    """A typed question under (seldom over) a picture, perhaps after an earlier question on the same picture."""
    first = question if earlier is None else earlier[0]
    text = {"type": "text", "text": phrases.as_typed(first, dice)}
    parts = [{"type": "image"}, text] if dice.random() < 0.85 else [text, {"type": "image"}]
    messages = _chat(parts, answer if earlier is None else earlier[1])
    if earlier is not None:
        messages += _chat([{"type": "text", "text": phrases.as_typed(question, dice)}], answer)
    return Sample(task, messages, images=[picture.pixels], image_dense=[picture.labels])


def _with_both(task: str, parts: list[dict[str, str]], answer: str, picture: Picture, sound: Sound) -> Sample:
    return Sample(
        task,
        _chat(parts, answer),
        images=[picture.pixels],
        sounds=[sound.samples],
        image_dense=[picture.labels],
        audio_dense=[sound.labels],
    )
