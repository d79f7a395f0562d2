"""Dialogues of the embedded model's recipe, for training its drafter: samples composed as they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from iolite.errors import UsageError
from iolite.generate.model import Model
from iolite.train.drafter.data import END_OF_TURN, answer
from iolite.train.drafter.reading import Dialogue
from iolite.train.nano.recipe import stretched
from iolite.train.nano.store import build_store
from iolite.train.nano.tasks import TASKS, NanoData

MIXTURE = "mixture"  # of all tasks, in the recipe's proportions
_SHARES = np.cumsum(list(TASKS.values())) / sum(TASKS.values())
_LONGEST = 64  # tokens of an answer
# A word and its end leave one draft to be made, which never saves a pass. The share of such samples that is used.
_SHORT = 0.2


def check_target(model: Model) -> None:
    """Raises UsageError for a model that cannot see and hear, as the recipe's tasks want."""
    if missing := {"image", "audio"} - set(model.config.modalities):
        raise UsageError(
            f"the recipe of the embedded model asks about pictures and sound; {model.name} does not take "
            f"{' and '.join(sorted(missing))}",
            "give a .jsonl file of dialogues as --data",
        )


def open_store(folder: Path, say: Callable[[str], None]) -> Path:
    """The folder, with a finished store in it: one that is there is taken whatever its size, else it is made.

    Raises UsageError when it must be made and espeak-ng or the fonts are missing.
    """
    if not (folder / "store.json").is_file():
        build_store(folder, progress=lambda done, total, name: say(f"store: {done}/{total} parts"))
    return folder


class NanoSource:
    """Steps of samples from the training half of a store, each from its own step's dice; replies are the recipe's.

    As in the training of the model itself six in ten are as hard as can be, and six in ten recordings are played faster
    or slower.
    """

    def __init__(self, model: Model, store: Path, rows: int, seed: int) -> None:
        self.model, self.rows, self.seed = model, rows, seed
        self.data = NanoData(store, "train", seed)
        self.step = 0

    def start(self, step: int) -> None:
        self.step = step

    def next_batch(self, fraction: float) -> list[Dialogue]:
        rng = np.random.default_rng((self.seed, self.step))
        self.step += 1
        found: list[Dialogue] = []
        while len(found) < self.rows:
            sample = self.data.sample(_task(rng), rng, 1.0 if rng.random() < 0.6 else rng.random())
            reply = tuple(self.model.tokenizer.encode(sample.answer + END_OF_TURN))
            if len(reply) < 3 and rng.random() >= _SHORT:
                continue
            if sample.sounds and rng.random() < 0.6:
                sample = stretched(sample, math.exp(rng.uniform(-0.14, 0.14)))
            found.append(Dialogue(self.model.prompt(sample.question()), reply))
        return found

    def close(self) -> None:
        pass


def held_out(model: Model, store: Path, count: int, note: Callable[[int, int], None]) -> dict[str, list[Dialogue]]:
    """`count` dialogues in the recipe's mixture and as many of each task, from the held-out half of the store, with the
    model's own greedy answers. Always the same ones. note(done, in all) after each."""
    data = NanoData(store, "held_out", 2)
    sets: dict[str, list[Dialogue]] = {name: [] for name in (MIXTURE, *TASKS)}
    for number, (name, some) in enumerate(sets.items()):
        for i in range(count):
            rng = np.random.default_rng([i, *name.encode()])
            task = _task(rng) if name == MIXTURE else name
            prompt = model.prompt(data.sample(task, rng).question())
            some.append(Dialogue(prompt, answer(model, prompt, _LONGEST)))
            note(number * count + i + 1, count * len(sets))
    return sets


def _task(rng: np.random.Generator) -> str:
    return list(TASKS)[min(int(np.searchsorted(_SHARES, rng.random())), len(TASKS) - 1)]
