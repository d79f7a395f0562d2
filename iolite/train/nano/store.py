"""The store: everything slow to make, made once, in a folder of .npy files that training maps into memory.

`build_store` draws digits and shapes and speaks clips in several processes, about 200 parts in all. A part that is
already there is kept, so an interrupted build goes on where it stopped. At the end the parts are joined:

    FOLDER/store.json                  sizes, font designs, voices; written last, so its presence means "complete"
    FOLDER/{train,held_out}/*.npy      see `Store`
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from iolite.errors import UsageError
from iolite.train.nano.fonts import Face, FontSplit, find_fonts
from iolite.train.nano.pictures import SHAPES, random_look, render_digits, render_shape
from iolite.train.nano.speech import DIGIT_WORDS, SPOKEN_QUESTIONS, Voice, espeak_path, speak, voices

VERSION = 1
SPLITS = ("train", "held_out")
QUESTION_KINDS = tuple(SPOKEN_QUESTIONS)
_LOOKS_PER_PART, _VOICES_PER_PART = 200, 20

Progress = Callable[[int, int, str], None]  # parts done, parts in all, what was just made


@dataclass(frozen=True)
class SplitSize:
    """How much of everything one split holds."""

    looks: int  # sets of ten digit masks
    shapes: int  # masks of each shape
    voices: int  # each speaks the ten digits
    numbers: int  # whole utterances of one to three digits, per voice
    questions: int  # spoken questions, per voice


@dataclass(frozen=True)
class StoreSize:
    """Sizes of both splits; the default is about 800 MB and takes two processes about four minutes."""

    train: SplitSize = SplitSize(looks=12_000, shapes=4_000, voices=1_600, numbers=4, questions=3)
    held_out: SplitSize = SplitSize(looks=1_500, shapes=300, voices=60, numbers=12, questions=9)

    def of(self, split: str) -> SplitSize:
        """The size of a split by its name."""
        return self.train if split == "train" else self.held_out


@dataclass(frozen=True)
class StoreReport:
    """What a build found and did."""

    folder: Path
    seconds: float
    parts_made: int
    designs: dict[str, int]  # font designs, by split
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    split: str
    kind: str  # "digits", "shapes" or "speech"
    number: int
    count: int  # looks, shapes of each kind, or voices
    size: SplitSize
    faces: tuple[Face, ...] = field(default=(), repr=False)
    voices: tuple[Voice, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        return f"{self.split}-{self.kind}-{self.number:04d}"


def build_store(
    folder: str | os.PathLike[str],
    *,
    processes: int = 2,
    progress: Progress | None = None,
    size: StoreSize | None = None,
    fonts: FontSplit | None = None,
) -> StoreReport:
    """Fill `folder`, or what is missing of it, and return what was done.

    Raises UsageError when espeak-ng or fonts are missing, or when the folder holds a store of other sizes.
    """
    start, folder, size = time.monotonic(), Path(folder), size or StoreSize()
    plan_text = {"version": VERSION, **asdict(size)}
    if (folder / "store.json").exists():
        known = json.loads((folder / "store.json").read_text())
        if {key: known.get(key) for key in plan_text} != plan_text:
            raise UsageError(f"{folder} holds a store of another version or size", "give another folder, or remove it")
        return StoreReport(folder, 0.0, 0, known["designs"])
    espeak_path()
    fonts = fonts or find_fonts()
    parts_folder = folder / "parts"
    parts_folder.mkdir(parents=True, exist_ok=True)
    parts = _plan(size, fonts)
    missing = [part for part in parts if not (parts_folder / f"{part.name}.npz").exists()]
    done = len(parts) - len(missing)
    for name in _make_all(parts_folder, missing, processes):
        done += 1
        if progress:
            progress(done, len(parts), name)
    for split in SPLITS:
        _join(folder / split, [(part, parts_folder / f"{part.name}.npz") for part in parts if part.split == split])
    designs = {split: len({face.design for face in getattr(fonts, split)}) for split in SPLITS}
    facts = {**plan_text, "designs": designs, "fonts": _font_names(fonts)}
    (folder / "store.json.new").write_text(json.dumps(facts, indent=1))
    os.replace(folder / "store.json.new", folder / "store.json")
    shutil.rmtree(parts_folder)
    return StoreReport(folder, time.monotonic() - start, len(missing), designs, fonts.notes)


class Store:
    """One split of a built store. All arrays are memory-mapped and read-only.

    digits_pixels uint8 [bytes]; digits_start int64 [looks, 10]; digits_geometry float32 [looks, 10, 5] (see
    `pictures.Glyphs`); digits_angle float32 [looks]; shapes uint8 [kinds, count, 48, 48];
    clips int16 [samples]; singles int64 [voices, 10, 2], numbers int64 [n, 2] and questions int64 [m, 2] are
    (start, end) of clips; number_digits uint8 [n, 3] with 255 for none; number_weights float32 [n, 3], how long each
    digit is; question_kind and question_phrase uint8 [m].
    """

    def __init__(self, folder: str | os.PathLike[str], split: str) -> None:
        root = Path(folder)
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
        if not (root / "store.json").exists():
            raise UsageError(f"no finished store in {root}", "build it first; an interrupted build can be continued")

        def load(name: str) -> np.ndarray:
            return np.asarray(np.load(root / split / f"{name}.npy", mmap_mode="r"))

        self.digits_pixels, self.digits_start = load("digits_pixels"), load("digits_start")
        self.digits_geometry, self.digits_angle = load("digits_geometry"), load("digits_angle")
        self.shapes = load("shapes")
        self.clips, self.singles = load("clips"), load("singles")
        self.numbers, self.number_digits = load("numbers"), load("number_digits")
        self.number_weights = load("number_weights")
        self.questions, self.question_kind = load("questions"), load("question_kind")
        self.question_phrase = load("question_phrase")

    def clip(self, span: np.ndarray) -> np.ndarray:
        """The int16 samples of a (start, end) pair."""
        return self.clips[int(span[0]) : int(span[1])]

    def digit_mask(self, look: int, digit: int, geometry: list[list[float]]) -> np.ndarray:
        """The mask of one digit of a look whose `geometry` is digits_geometry[look] as lists."""
        start, h, w = int(self.digits_start[look, digit]), int(geometry[digit][0]), int(geometry[digit][1])
        return self.digits_pixels[start : start + h * w].reshape(h, w)


def _plan(size: StoreSize, fonts: FontSplit) -> list[_Part]:
    parts = []
    for split in SPLITS:
        amount = size.of(split)
        faces: tuple[Face, ...] = getattr(fonts, split)
        people = voices(split, amount.voices)
        for number, first in enumerate(range(0, amount.voices, _VOICES_PER_PART)):
            some = tuple(people[first : first + _VOICES_PER_PART])
            parts.append(_Part(split, "speech", number, len(some), amount, voices=some))
        for number, first in enumerate(range(0, amount.looks, _LOOKS_PER_PART)):
            count = min(_LOOKS_PER_PART, amount.looks - first)
            parts.append(_Part(split, "digits", number, count, amount, faces=faces))
        parts.append(_Part(split, "shapes", 0, amount.shapes, amount))
    return parts


def _make_all(folder: Path, parts: list[_Part], processes: int) -> Iterator[str]:
    if processes <= 1:
        for part in parts:
            yield _make(folder, part)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_make, folder, part) for part in parts]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _make(folder: Path, part: _Part) -> str:
    """Make one part and write it under its final name only when it is whole."""
    dice = random.Random(f"{part.name} {VERSION}")
    arrays = {"digits": _make_digits, "shapes": _make_shapes, "speech": _make_speech}[part.kind](part, dice)
    unfinished = folder / f"{part.name}.{os.getpid()}.new"
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(unfinished, folder / f"{part.name}.npz")
    return part.name


def _make_digits(part: _Part, dice: random.Random) -> dict[str, np.ndarray]:
    designs: dict[str, list[Face]] = {}
    for face in part.faces:
        designs.setdefault(face.design, []).append(face)
    names = list(designs)
    weights = [len(designs[name]) ** 0.5 for name in names]  # a design of eighteen weights should not drown the others
    glyphs = [
        render_digits(dice.choice(designs[dice.choices(names, weights)[0]]), random_look(dice))
        for _ in range(part.count)
    ]
    areas = np.array([[mask.size for mask in one.masks] for one in glyphs], np.int64)
    starts = np.concatenate([[0], areas.ravel().cumsum()[:-1]]).reshape(areas.shape)
    return {
        "digits_pixels": np.concatenate([mask.ravel() for one in glyphs for mask in one.masks]),
        "digits_start": starts,
        "digits_geometry": np.stack([one.geometry for one in glyphs]),
        "digits_angle": np.array([one.angle for one in glyphs], np.float32),
    }


def _make_shapes(part: _Part, dice: random.Random) -> dict[str, np.ndarray]:
    return {"shapes": np.stack([[render_shape(shape, dice) for _ in range(part.count)] for shape in SHAPES])}


def _make_speech(part: _Part, dice: random.Random) -> dict[str, np.ndarray]:
    clips: list[np.ndarray] = []
    ends = [0]

    def keep(clip: np.ndarray) -> tuple[int, int]:
        clips.append(clip)
        ends.append(ends[-1] + len(clip))
        return ends[-2], ends[-1]

    singles, numbers, digits, weights, questions, kinds, phrases = [], [], [], [], [], [], []
    for voice in part.voices:
        spans = [keep(speak(word, voice)) for word in DIGIT_WORDS]
        singles.append(spans)
        for _ in range(part.size.numbers):
            chosen = [dice.randrange(10) for _ in range(dice.choices((1, 2, 3), (1, 4, 6))[0])]
            text = dice.choice((" ", " ", ", ")).join(DIGIT_WORDS[digit] for digit in chosen)
            numbers.append(keep(speak(text, voice)))
            digits.append(chosen + [255] * (3 - len(chosen)))
            weights.append([float(spans[d][1] - spans[d][0]) for d in chosen] + [0.0] * (3 - len(chosen)))
        for _ in range(part.size.questions):
            kind = dice.randrange(len(QUESTION_KINDS))
            phrase = dice.randrange(len(SPOKEN_QUESTIONS[QUESTION_KINDS[kind]]))
            questions.append(keep(speak(SPOKEN_QUESTIONS[QUESTION_KINDS[kind]][phrase], voice)))
            kinds.append(kind)
            phrases.append(phrase)
    return {
        "clips": np.concatenate(clips),
        "singles": np.array(singles, np.int64),
        "numbers": np.array(numbers, np.int64).reshape(-1, 2),
        "number_digits": np.array(digits, np.uint8).reshape(-1, 3),
        "number_weights": np.array(weights, np.float32).reshape(-1, 3),
        "questions": np.array(questions, np.int64).reshape(-1, 2),
        "question_kind": np.array(kinds, np.uint8),
        "question_phrase": np.array(phrases, np.uint8),
    }


def _join(folder: Path, parts: list[tuple[_Part, Path]]) -> None:
    """Join the parts of a split; offsets into a flat array move by what came before it."""
    folder.mkdir(parents=True, exist_ok=True)
    pointers = {"digits_start": "digits_pixels", "singles": "clips", "numbers": "clips", "questions": "clips"}
    joined: dict[str, list[np.ndarray]] = {}
    length: dict[str, int] = {}
    for _, path in parts:
        with np.load(path) as arrays:
            for name in arrays.files:
                array = arrays[name]
                joined.setdefault(name, []).append(array + length.get(pointers[name], 0) if name in pointers else array)
            for flat in {"digits_pixels", "clips"} & set(arrays.files):
                length[flat] = length.get(flat, 0) + len(joined[flat][-1])
    for name, arrays_of_name in joined.items():
        np.save(folder / f"{name}.npy", np.concatenate(arrays_of_name))


def _font_names(fonts: FontSplit) -> dict[str, list[str]]:
    return {split: sorted({face.family for face in getattr(fonts, split)}) for split in SPLITS}
