"""The training loop: step, measure, save, and go on where it stopped.

The budget is wall-clock time: the learning rate is a function of the fraction of it that is spent, and time spent
before a resume counts. One file holds the whole state (safetensors, written beside and renamed), so a killed run loses
at most `save_every` seconds.

A loop knows nothing of tasks or files of a recipe: it is given a model, parameter groups, a source of batches and a
function that measures. What is minimised is its subclass's affair: `Trainer` here trains a model on labelled tokens,
`iolite/train/drafter/trainer.py` a drafter.
"""

from __future__ import annotations

import json
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from iolite.checkpoint.safetensors import SafetensorsFile, save_safetensors
from iolite.errors import CheckpointError
from iolite.model.unified import Unified
from iolite.train.data import Arrays, BucketBatch, Layout
from iolite.train.loss import Loss, labelled_loss
from iolite.train.parallel import FlatGradients, Group

Scores = dict[str, tuple[int, int]]  # task -> (right, asked), or another count and what it is a share of

Network = TypeVar("Network", bound=nn.Module)
Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)


class Source(Protocol[Batch_co]):
    """Where batches come from. After `start(step)` each `next_batch` belongs to the next step."""

    def start(self, step: int) -> None: ...

    def next_batch(self, fraction: float) -> Batch_co:
        """fraction of the time budget that is spent, for a curriculum."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Settings:
    """Everything about a run that is not the model or the data."""

    minutes: float
    max_steps: int | None = None  # an end for tests; the schedule follows the time all the same
    warmup_steps: int = 40
    flat_until: float = 0.5  # fraction of the time at which the learning rate begins its line down to zero
    max_norm: float = 1.0
    dense_weight: float = 0.3
    average_every: int = 4  # steps between two updates of the weight average
    average_decay: float = 0.997  # per update
    average_from: float = 0.25  # fraction of the time before which the average is just the weights
    log_every: float = 20.0  # seconds
    evaluate_every: float = 180.0
    save_every: float = 120.0
    compile: bool = True
    autocast: bool = True

    def rate(self, step: int, fraction: float) -> float:
        """What to multiply every learning rate by."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return warm * min(1.0, max(0.0, (1 - fraction) / (1 - self.flat_until)))


_FRACTION, _STOP, _EVALUATE, _SAVE, _FIGURES = range(5)  # what rides along with the gradients


class Minimised(Protocol):
    """The outcome of a forward pass."""

    @property
    def total(self) -> Tensor: ...


Outcome = TypeVar("Outcome", bound=Minimised)


class Loop(ABC, Generic[Network, Batch, Outcome]):
    """One process of a run. With several, each calls the same methods in the same order."""

    figures: tuple[str, ...] = ("loss",)
    """Names in the log of what `_figures` tells of every step."""

    def __init__(
        self,
        model: Network,
        groups: Sequence[Mapping[str, Any]],
        source: Source[Batch],
        rows: int,
        folder: Path,
        settings: Settings,
        *,
        group: Group | None = None,
        evaluate: Callable[[Network], Scores] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """groups as torch's AdamW takes them, each with "lr"; rows: samples of a step of one process; report gets
        every record of the log (lead only)."""
        self.model, self.source, self.rows, self.folder = model, source, rows, folder
        self.settings, self.group = settings, group or Group()
        self.device = next(model.parameters()).device
        self.evaluate, self.report = evaluate, report
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        parameters = list(self.names)
        self.optimizer = torch.optim.AdamW(
            [{**g, "base_lr": g["lr"]} for g in groups], betas=(0.9, 0.97), eps=1e-8, fused=True
        )
        if {p for g in self.optimizer.param_groups for p in g["params"]} != set(parameters):
            raise ValueError("the parameter groups do not cover the model's parameters exactly")
        self.average = [p.detach().clone() for p in parameters]
        self.gradients = FlatGradients(parameters, extra=_FIGURES + len(self.figures))
        self.step_number, self.seconds, self.samples = 0, 0.0, 0
        self.norm = 0.0
        self._stop = False
        self._saved = self._evaluated = self._logged = 0.0
        self._window = self._nothing()  # sums of the figures, and steps, since the last line

    def _nothing(self) -> list[float]:
        return [0.0] * (len(self.figures) + 1)

    @abstractmethod
    def _loss(self, batch: Batch) -> Outcome:
        """The forward pass over what the source gave."""

    def _figures(self, loss: Outcome) -> tuple[Tensor, ...]:
        """What the log tells of a step, in the order of `figures`."""
        return (loss.total.detach(),)

    # One step

    def step(self) -> Outcome:
        """Forward, backward, average over the processes, update."""
        batch = self.source.next_batch(self.fraction)
        self.gradients.zero_()
        loss = self._loss(batch)
        loss.total.backward()
        self._ride_along(loss)
        self.norm = self.gradients.average_(self.group, self.settings.max_norm)
        rate = self.settings.rate(self.step_number, float(self.gradients.extra[_FRACTION]))
        for g in self.optimizer.param_groups:
            g["lr"] = g["base_lr"] * rate
        self.optimizer.step()
        self.step_number += 1
        self.samples += self.rows * self.group.size
        self._update_average()
        return loss

    @property
    def fraction(self) -> float:
        """Of the time budget, spent."""
        return min(1.0, self.seconds / (60 * self.settings.minutes))

    def _ride_along(self, loss: Outcome) -> None:
        """The lead decides what happens after this step; all processes read it from the summed buffer."""
        extra = self.gradients.extra
        for place, figure in enumerate(self._figures(loss), start=_FIGURES):
            extra[place] = figure
        if not self.group.leads:
            return
        s, done = self.settings, self.step_number + 1 == self.settings.max_steps
        stop = self._stop or self.fraction >= 1 or done
        extra[_FRACTION] = self.fraction
        extra[_STOP] = stop
        extra[_SAVE] = stop or self.seconds - self._saved >= s.save_every
        extra[_EVALUATE] = (stop and not self._stop) or self.seconds - self._evaluated >= s.evaluate_every

    def _update_average(self) -> None:
        s = self.settings
        if not self.group.leads or self.step_number % s.average_every:
            return
        weight = 1 - s.average_decay if self.fraction > s.average_from else 1.0
        torch._foreach_lerp_(self.average, [p.detach() for p in self.names], weight)

    # The run

    def run(self) -> None:
        """Steps until the time is spent, or until SIGINT or SIGTERM, after which the state is saved."""
        signals = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.signal(number, self._asked_to_stop) for number in signals]
        self._saved = self._evaluated = self._logged = self.seconds
        self.source.start(self.step_number)
        parent = os.getppid()
        try:
            while self._turn(parent):
                pass
        finally:
            self.source.close()
            for number, handler in zip(signals, handlers, strict=True):
                signal.signal(number, handler)

    def _asked_to_stop(self, *_: object) -> None:
        self._stop = True

    def _turn(self, parent: int) -> bool:
        begin = time.monotonic()
        self.step()
        self.seconds += time.monotonic() - begin
        extra = self.gradients.extra.tolist()
        self._window = [a + b for a, b in zip(self._window, (*extra[_FIGURES:], 1.0), strict=True)]
        if self.seconds - self._logged >= self.settings.log_every or extra[_STOP]:
            self._log_training()
        if extra[_EVALUATE]:
            self._evaluate()
        if extra[_SAVE]:
            self.save()
            self._saved = self.seconds
        return not extra[_STOP] and os.getppid() == parent

    def _log_training(self) -> None:
        *sums, steps = self._window
        spent = max(self.seconds - self._logged, 1e-9)
        count = steps * self.group.size
        self._record(
            {
                "kind": "train",
                **{name: value / count for name, value in zip(self.figures, sums, strict=True)},
                "norm": self.norm,
                "rate": self.settings.rate(self.step_number, self.fraction),
                "samples_per_second": steps * self.rows * self.group.size / spent,
            }
        )
        self._window, self._logged = self._nothing(), self.seconds

    def _record(self, record: dict[str, Any]) -> None:
        if not self.group.leads:
            return
        where = {"step": self.step_number, "minutes": self.seconds / 60, "samples": self.samples}
        record = {**where, **record}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.report:
            self.report(record)

    def _evaluate(self) -> None:
        """Scores the weights and, once it differs from them, their average. Time spent here is training time."""
        self._evaluated = self.seconds
        if self.evaluate is None:
            return
        begin = time.monotonic()
        record: dict[str, Any] = {"kind": "eval", "tasks": self._shares(self.evaluate(self.model))}
        averaging = float(self.gradients.extra[_FRACTION]) > self.settings.average_from
        if averaging:
            self.group.copy_from_lead_(self.average)
            self._swap()
            record["averaged"] = self._shares(self.evaluate(self.model))
            self._swap()
        self.seconds += time.monotonic() - begin
        record["seconds"] = time.monotonic() - begin
        self._record(record)

    def _swap(self) -> None:
        """Exchanges the weights and their average."""
        with torch.no_grad():
            for parameter, average in zip(self.names, self.average, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(kept)

    def _shares(self, scores: Scores) -> dict[str, float]:
        """Right answers over questions of the whole group."""
        counts = self.group.sum_(torch.tensor(list(scores.values()), dtype=torch.float64))
        return {task: float(right / max(asked, 1)) for task, (right, asked) in zip(scores, counts, strict=True)}

    # State

    def save(self) -> None:
        """Writes the state, lead only."""
        if not self.group.leads:
            return
        numbers = {"version": 1, "step": self.step_number, "seconds": self.seconds, "samples": self.samples}
        state = {name: tensor.cpu() for name, tensor in self._state().items()}
        save_safetensors(self.folder / "state.safetensors", state, {"run": json.dumps(numbers)})

    def resume(self) -> bool:
        """Takes up the state in the folder, if there is one. Raises CheckpointError when it is another model's."""
        path = self.folder / "state.safetensors"
        if not path.is_file():
            return False
        file = SafetensorsFile(path)
        numbers = json.loads(file.metadata.get("run", "{}"))
        state = self._state()
        if (
            not numbers
            or set(file.keys()) != set(state)
            or any(file.shape(k) != tuple(t.shape) for k, t in state.items())
        ):
            raise CheckpointError(f"{path} is the state of another model", "give another --out folder")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(file.tensor(name))
        self.step_number, self.seconds, self.samples = (numbers[k] for k in ("step", "seconds", "samples"))
        return True

    def _state(self) -> dict[str, Tensor]:
        """Every tensor of the run, by name: weights, their average, AdamW's moments and step counts."""
        found: dict[str, Tensor] = {}
        for (parameter, name), average in zip(self.names.items(), self.average, strict=True):
            moments = self.optimizer.state[parameter]
            if not moments:  # as torch makes them at the first step
                moments["step"] = torch.zeros((), device=parameter.device)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            found |= {f"weights.{name}": parameter.detach(), f"average.{name}": average}
            found |= {f"{key}.{name}": value for key, value in moments.items()}
        return found


class Trainer(Loop[Unified, Arrays, Loss]):
    """Trains a model on the labelled tokens of batches of one layout."""

    figures = ("loss", "dense")

    def __init__(
        self,
        model: Unified,
        groups: Sequence[Mapping[str, Any]],
        source: Source[Arrays],
        layout: Layout,
        folder: Path,
        settings: Settings,
        *,
        group: Group | None = None,
        evaluate: Callable[[Unified], Scores] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """As `Loop`; layout: the shape of every batch."""
        super().__init__(
            model, groups, source, layout.num_rows, folder, settings, group=group, evaluate=evaluate, report=report
        )
        self.layout = layout
        if settings.compile:
            for layer in model.language_model.layers:
                layer.compile(dynamic=False)

    def _loss(self, batch: Arrays) -> Loss:
        made = BucketBatch(self.model.config.text, self.layout, batch, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.autocast):
            hidden = self.model(made.ids, made)
            logits = self.model.logits(hidden.index_select(0, made.label_index))
        return labelled_loss(logits, made.labels, made.label_kind, self.settings.dense_weight)

    def _figures(self, loss: Loss) -> tuple[Tensor, ...]:
        return loss.answer, loss.dense
