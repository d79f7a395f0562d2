"""The tasks of the embedded model, on fonts, voices, shapes and layouts that its training never saw.

Every question goes the whole way: messages with pictures and sounds as arrays, template, tokenizer, prefill, greedy
decoding, text. Samples are made from the held-out half of a store of glyphs and clips; the same store and the same
count give the same questions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from iolite.evals.task import Question
from iolite.train.nano.pictures import COLOURS
from iolite.train.nano.store import SplitSize, StoreSize, build_store
from iolite.train.nano.tasks import TASKS, NanoData, Sample

NAMES = tuple(TASKS)
# The training half is not asked about: as little of it as can be made.
STORE = StoreSize(train=SplitSize(looks=1, shapes=1, voices=1, numbers=1, questions=1))


def default_store() -> Path:
    """Where the store for evaluation is kept: the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "iolite" / "nano-held-out"


def open_store(folder: Path, progress: Callable[[int, int, str], None] | None = None) -> NanoData:
    """The held-out samples of a store; it is made first (half a minute) unless the folder holds one of any size.

    Raises UsageError when it must be made and espeak-ng or the fonts are missing.
    """
    if not (folder / "store.json").is_file():
        build_store(folder, processes=min(4, os.cpu_count() or 1), progress=progress, size=STORE)
    return NanoData(folder, "held_out", 2)


def questions(data: NanoData, task: str, count: int) -> Iterator[Question]:
    """`count` questions of a task, always the same ones, the first of them also when count is smaller."""
    for i in range(count):
        sample = data.sample(task, np.random.default_rng([i, *task.encode()]), difficulty=1.0)
        yield Question(sample.question(), sample.answer, group(sample))


def group(sample: Sample) -> str:
    """What a sample is counted under besides its task: the number of digits, or the kind of answer."""
    answer = sample.answer
    if sample.task in ("read", "transcribe"):
        return f"{len(answer)} digit" + "s" * (len(answer) > 1)
    if sample.task == "talk":
        return ""
    if answer in ("yes", "no"):
        return "yes or no"
    words = answer.replace(",", "").split()
    kinds = ["number" if w.isdigit() else "colour" if w in COLOURS else "shape" for w in words]
    return " + ".join(kinds)
