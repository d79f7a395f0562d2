"""One run of `iolite train drafter`, from its settings to the written drafter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iolite.checkpoint.drafter import check_pair
from iolite.errors import UsageError
from iolite.generate.model import Model
from iolite.model.drafter import Drafter
from iolite.train.drafter import data as files
from iolite.train.drafter import nano as recipe
from iolite.train.drafter.measure import Acceptance
from iolite.train.drafter.reading import Dialogue, read
from iolite.train.drafter.trainer import (
    Chaining,
    DrafterTrainer,
    Shape,
    begin_folder,
    continued_drafter,
    finish,
    new_drafter,
    shaped_config,
)
from iolite.train.trainer import Settings, Source

NANO = "nano"  # in place of a file: the recipe of the embedded model
_MINUTES = 25.0
_ROWS = {True: 48, False: 8}  # of the recipe, of a file
_HELD_OUT, _MOST_HELD_OUT = 256, 64  # of the recipe, of a file

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What the command line asks for, besides the model itself. None: chosen here."""

    data: str
    out: Path
    minutes: float | None = None
    max_steps: int | None = None
    resume: bool = False
    start: str | None = None
    layers: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    drafts: int = 4
    rows: int | None = None
    chains: int = 256
    labels: str = "soft"
    answers: str = "data"
    max_tokens: int = 256
    held_out: int | None = None
    store: Path | None = None
    learning_rate: float | None = None
    seed: int = 0
    evaluate_every: float = 180.0

    @property
    def recipe(self) -> bool:
        return self.data == NANO

    def check(self) -> None:
        """Raises UsageError for settings that do not go together, before a model is loaded."""
        shape = {"--layers": self.layers, "--hidden": self.hidden, "--intermediate": self.intermediate}
        given = [name for name, value in shape.items() if value is not None]
        if self.start is not None and given:
            raise UsageError(f"{given[0]} is for a new drafter, and --from goes on with one", f"leave {given[0]} out")
        if self.start is not None and not Path(self.start).exists():
            raise UsageError(f"there is no drafter {self.start!r}", "give its folder or .gguf file")
        if self.recipe and self.answers == "target":
            raise UsageError("the recipe brings its own answers", "leave --answers out")
        if not self.recipe and self.store is not None:
            raise UsageError("--store is for the recipe of the embedded model", "leave it out, or give --data nano")
        if not self.recipe and not Path(self.data).is_file():
            raise UsageError(f"there is no file {self.data!r}", f"give a .jsonl file of dialogues, or {NANO!r}")
        if self.max_steps == 0 and self.start is None and not self.resume:
            raise UsageError("--max-steps 0 measures a drafter, and there is none", "give --from or --resume")
        begin_folder(self.out, self.resume)

    @property
    def settings(self) -> Settings:
        minutes = self.minutes or (_MINUTES if self.max_steps is None else math.inf)
        return Settings(
            minutes=minutes,
            max_steps=self.max_steps,
            evaluate_every=self.evaluate_every,
            compile=False,
            autocast=False,
        )


def run(plan: Plan, model: Model, say: Say) -> dict[str, Acceptance]:
    """Trains, writes OUT/drafter and says how far it gets. `plan` has been checked.

    Raises UsageError, before work starts, for data or a drafter that cannot be used.
    """
    drafter = None if plan.start is None else continued_drafter(Path(plan.start), model)
    source, held_out = _dialogues(plan, model, say)
    if drafter is None:
        drafter = _new(plan, model, source)
    count = sum(p.numel() for p in drafter.parameters())
    say(f"a drafter of {count:,} parameters for {model.name}, {drafter.config.num_hidden_layers} layers")
    trainer = DrafterTrainer(
        drafter,
        model.network,
        source,
        plan.rows or _ROWS[plan.recipe],
        plan.out,
        plan.settings,
        Chaining(plan.drafts, plan.chains, plan.labels == "soft"),
        rate=plan.learning_rate,
        seed=plan.seed,
        held_out=held_out,
        report=lambda record: _report(record, say),
    )
    if plan.resume:
        trainer.resume()
    if plan.max_steps is None or trainer.step_number < plan.max_steps:
        trainer.run()
    found = finish(trainer, model, average_is_better(plan.out / "log.jsonl"))
    for line in table(found):
        say(line)
    return found


def _new(plan: Plan, model: Model, source: Source[list[Dialogue]]) -> Drafter:
    config = shaped_config(model.config, Shape(plan.layers or 4, plan.hidden, plan.intermediate))
    check_pair(model.config.text, config, model.config.text.hidden_size)
    source.start(0)
    drafter = new_drafter(model.network, config, read(model.network, source.next_batch(0.0)), plan.seed)
    source.close()
    return drafter


def _dialogues(plan: Plan, model: Model, say: Say) -> tuple[Source[list[Dialogue]], dict[str, list[Dialogue]]]:
    """What to learn from, and what to measure with."""
    rows = plan.rows or _ROWS[plan.recipe]
    if plan.recipe:
        recipe.check_target(model)
        store = recipe.open_store(plan.store or plan.out / "store", say)
        count = plan.held_out or _HELD_OUT
        sets = recipe.held_out(model, store, count, _counter("held-out answers", say))
        return recipe.NanoSource(model, store, rows, plan.seed), sets
    questions = files.read_questions(Path(plan.data), model, plan.answers == "target")
    lines = len({q.line for q in questions})
    learnt, kept = files.split(questions, plan.held_out or min(_MOST_HELD_OUT, max(1, lines // 10)), plan.seed)
    answers = files.Answers(plan.out / "answers.jsonl", model, plan.max_tokens)
    measured = answers.of(kept, _counter("held-out answers", say))
    learnt = [q for q in learnt if q.reply is not None] + answers.of(
        [q for q in learnt if q.reply is None], _counter("answers to learn from", say)
    )
    say(f"{len(learnt)} answers to learn from, {len(measured)} to measure with, of {lines} dialogues")
    sets = {"held out": [Dialogue(files.build(model, q), q.reply or ()) for q in measured]}
    return files.FileSource(model, learnt, rows, plan.seed), sets


def _counter(what: str, say: Say) -> Callable[[int, int], None]:
    """Says how far it has come, ten times."""

    def note(done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            say(f"{what}: {done} of {total}")

    return note


def _report(record: Mapping[str, Any], say: Say) -> None:
    start = f"{record['minutes']:6.1f} min  step {record['step']:6d}"
    if record["kind"] == "train":
        say(
            f"{start}  {record['samples_per_second']:4.0f}/s  loss {record['loss']:.3f}  "
            f"drafts right in a chain {record['accepted']:.2f}  norm {record['norm']:.2f}  rate {record['rate']:.2f}"
        )
        return
    for key, what in (("tasks", "mean accepted length"), ("averaged", "  with averaged weights")):
        if key in record:
            say(f"{start}  {what}: " + "  ".join(f"{name} {value:.3f}" for name, value in record[key].items()))


def average_is_better(log: Path) -> bool:
    """Whether the last evaluation of a log found that the average of the weights drafts better, over all sets."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    last: dict[str, Any] = next((r for r in reversed(records) if r["kind"] == "eval"), {})
    return "averaged" in last and sum(last["averaged"].values()) > sum(last["tasks"].values())


def table(found: Mapping[str, Acceptance]) -> Sequence[str]:
    """Lines that people read."""
    width = max(len(name) for name in found)
    head = f"{'':{width}}  mean accepted length  95 % interval  at most  accepted drafts a pass  answers"
    rows = [
        f"{name:{width}}  {one.mean_length:20.3f}  {one.ci95[0]:.3f} to {one.ci95[1]:.3f}  {one.most:6.3f}"
        f"  {one.drafts_a_pass:22.3f}  {one.answers:7d}"
        for name, one in found.items()
    ]
    return [head, *rows]
