"""Training a drafter for a model that stays as it is: one pass of the model over whole dialogues gives hidden states,
keys and values, chains of drafts from the tokens of their replies give the loss, and its gradient goes through all
steps of a chain into the drafter's weights alone.

    iolite train drafter --target nano --data nano --out runs/drafter --minutes 25

`reading.py` has the model's pass, `chains.py` the chains, `loss.py` what is minimised, `measure.py` what is measured,
and `data.py` and `nano.py` where dialogues come from.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iolite.checkpoint.drafter import (
    check_pair,
    find_drafter,
    load_drafter,
    trained_source,
    write_folder,
)
from iolite.checkpoint.files import replacing
from iolite.checkpoint.synthetic import drafter_config
from iolite.config import FULL, SLIDING, ModelConfig, TextConfig
from iolite.errors import UsageError
from iolite.generate.model import Model
from iolite.model.drafter import Drafter
from iolite.model.unified import Unified
from iolite.train.drafter.chains import chains, unroll
from iolite.train.drafter.loss import ChainLoss, chain_loss
from iolite.train.drafter.measure import Acceptance, count_rounds, measure
from iolite.train.drafter.reading import Dialogue, Reading, read
from iolite.train.trainer import Loop, Scores, Settings, Source

OUT = "drafter"  # the folder in a run's folder that the finished drafter is written to
_DECAY = 0.05  # of matrices


@dataclass(frozen=True)
class Shape:
    """Sizes of a new drafter; None is in proportion to its model."""

    layers: int = 4
    hidden: int | None = None
    intermediate: int | None = None


@dataclass(frozen=True)
class Chaining:
    """How a step makes chains of its dialogues, and what they are to learn."""

    drafts: int = 4
    most: int = 256  # chains of a step; with a vocabulary of 262,144 each is a megabyte for every draft
    soft: bool = True  # the model's whole distribution, or its likeliest token alone


def shaped_config(model: ModelConfig, shape: Shape) -> TextConfig:
    """A drafter's decoder: the last layer full and the others sliding, where the model has both kinds."""
    kinds = set(model.text.layer_types)
    under = SLIDING if SLIDING in kinds and model.text.sliding_window > 1 else FULL
    last = FULL if FULL in kinds else SLIDING
    usual = drafter_config(model)
    hidden = shape.hidden or usual.hidden_size
    return dataclasses.replace(
        usual,
        hidden_size=hidden,
        intermediate_size=shape.intermediate or usual.intermediate_size * hidden // usual.hidden_size,
        num_hidden_layers=shape.layers,
        layer_types=(under,) * (shape.layers - 1) + (last,),
    )


def new_drafter(model: Unified, config: TextConfig, reading: Reading, seed: int) -> Drafter:
    """First weights. Outputs of matrices begin at about unit size, whatever the size of the embeddings and hidden
    states of the model, which are taken from the reading; attention's scores do so by q_norm, since k_norm is the
    model's; and what each half of a layer adds begins at 1/sqrt(2L)."""
    drafter = Drafter(config, model.config.text.hidden_size).to(reading.hidden.device)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in drafter.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(
                    torch.empty(module.weight.shape).normal_(0, module.in_features**-0.5, generator=rng)
                )
            elif name.endswith(("post_attention_layernorm", "post_feedforward_layernorm")):
                module.get_parameter("weight").fill_((2 * config.num_hidden_layers) ** -0.5)
        last = {kind: i for i, kind in enumerate(model.config.text.layer_types)}
        for number, kind in enumerate(config.layer_types):
            theirs = _size(model.get_parameter(f"language_model.layers.{last[kind]}.self_attn.k_norm.weight"))
            own = drafter.get_parameter(f"model.layers.{number}.self_attn.q_norm.weight")
            own.fill_(1 / (theirs * len(own) ** 0.5))
        width = model.config.text.hidden_size
        hidden = _size(reading.hidden)
        drafter.pre_projection.weight[:, :width] /= _size(model.language_model.embed(reading.ids))
        drafter.pre_projection.weight[:, width:] /= hidden
        drafter.post_projection.weight *= hidden
    return drafter


def _size(x: Tensor) -> float:
    """Root of the mean square, of which to divide by."""
    return max(float(x.float().square().mean().sqrt()), 1e-6)


def continued_drafter(path: Path, model: Model) -> Drafter:
    """The drafter in a folder or GGUF file, in float32, to be trained on. Raises UsageError when it does not fit."""
    source = find_drafter(path)
    check_pair(model.config.text, source.text, source.backbone_hidden_size)
    drafter = Drafter(source.text, source.backbone_hidden_size)
    drafter.load_state_dict({name: source.weight(name).float() for name in source.shapes})
    return drafter.to(model.choice.device)


def parameter_groups(drafter: Drafter, rate: float) -> list[dict[str, Any]]:
    """What AdamW is given: matrices, and norms and the head at twice their rate and without decay."""
    matrices = [p for name, p in drafter.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in drafter.named_parameters() if p.dim() != 2 or "embed" in name]
    return [
        {"params": matrices, "lr": rate, "weight_decay": _DECAY},
        {"params": others, "lr": 2 * rate, "weight_decay": 0.0},
    ]


def usual_rate(config: TextConfig) -> float:
    """The peak learning rate for a drafter of this width."""
    return min(2e-3, 0.25 / config.hidden_size)


class DrafterTrainer(Loop[Drafter, list[Dialogue], ChainLoss]):
    """Trains a drafter; its model is read and never written."""

    figures = ("loss", "accepted")

    def __init__(
        self,
        drafter: Drafter,
        model: Unified,
        source: Source[list[Dialogue]],
        rows: int,
        folder: Path,
        settings: Settings,
        chaining: Chaining,
        *,
        rate: float | None = None,
        seed: int = 0,
        held_out: Mapping[str, Sequence[Dialogue]] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """held_out: dialogues with the model's own greedy answers, by the name of the set."""
        groups = parameter_groups(drafter, rate or usual_rate(drafter.config))
        evaluate = self._count if held_out else None
        super().__init__(drafter, groups, source, rows, folder, settings, evaluate=evaluate, report=report)
        self.network, self.chaining, self.seed, self.held_out = model, chaining, seed, held_out or {}

    @property
    def fraction(self) -> float:
        """Of the time that is spent; of the steps where the time is not limited."""
        steps = self.settings.max_steps
        if math.isinf(self.settings.minutes) and steps:
            return min(1.0, self.step_number / steps)
        return super().fraction

    def _loss(self, batch: list[Dialogue]) -> ChainLoss:
        rng = torch.Generator().manual_seed((self.seed << 32) + self.step_number)
        reading = read(self.network, batch)
        found = chains(reading, self.chaining.drafts, self.chaining.most, rng)
        if not len(found.newest):  # answers of one token each
            nothing = torch.stack([p.sum() for p in self.model.parameters()]).sum() * 0
            return ChainLoss(nothing, nothing.detach())
        with torch.no_grad():
            wanted = self.network.logits(reading.hidden[found.inputs.flatten()]).softmax(-1)
        scores = torch.stack(list(unroll(self.model, self.network, reading, found)))
        return chain_loss(scores, wanted.view_as(scores), found.truth(reading), found.real, soft=self.chaining.soft)

    def _figures(self, loss: ChainLoss) -> tuple[Tensor, ...]:
        return loss.total.detach(), loss.accepted

    def _count(self, drafter: Drafter) -> Scores:
        """Tokens and passes: their ratio, which the log has, is the mean accepted length."""
        found = {}
        for name, some in self.held_out.items():
            rounds = count_rounds(drafter, self.network, some, self.chaining.drafts)
            found[name] = sum(r.tokens for r in rounds), sum(r.passes for r in rounds)
        return found

    def choose(self, averaged: bool) -> None:
        """Takes the average of the weights in their place, if it is to be taken."""
        if averaged:
            self._swap()


def finish(trainer: DrafterTrainer, model: Model, averaged: bool) -> dict[str, Acceptance]:
    """Writes the drafter, in bfloat16, and measures what was written. OUT/evaluation.json has the figures too."""
    trainer.choose(averaged)
    folder = trainer.folder / OUT
    source = trained_source(folder.name, trainer.model, lambda: model.tokenizer)
    write_folder(folder, source, tokenizer=model.tokenizer)
    written = load_drafter(folder, dtype=torch.float32, device=model.choice.device)
    found = measure(written, model.network, trainer.held_out, trainer.chaining.drafts)
    report = {
        "target": model.name,
        "drafts": trainer.chaining.drafts,
        "steps": trainer.step_number,
        "minutes": trainer.seconds / 60,
        "parameters": sum(tensor.numel() for tensor in written.state_dict().values()),
        "sets": {name: one.to_dict() for name, one in found.items()},
    }
    with replacing(trainer.folder / "evaluation.json") as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())
    return found


def begin_folder(folder: Path, resume: bool) -> None:
    """Makes a run's folder. Raises UsageError when it holds a run that is not to be gone on with, or cannot be made."""
    if (folder / "state.safetensors").exists() and not resume:
        raise UsageError(f"{folder} holds a run already", "give --resume to go on with it, or another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({error.strerror})", "give another --out") from None
