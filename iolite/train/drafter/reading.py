"""What a drafter learns from: whole dialogues, read by its model in one pass that keeps what a drafter may look at.

A flat stream without padding: sequences lie end to end, attention goes over one after another, with the kernels that
generation uses. No gradient and no cache; the model may be packed.

Letters: B sequences, N tokens of all of them, M hidden size, K key-value heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from iolite.config import TextConfig
from iolite.kernels import ops
from iolite.kernels.contracts import Keys
from iolite.model.attention import Attend
from iolite.model.batch import gather_media
from iolite.model.unified import Unified
from iolite.prompt import Prompt


@dataclass(frozen=True)
class Dialogue:
    """A prompt and the tokens that followed it, the one that ended them included."""

    prompt: Prompt
    reply: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.reply)


@dataclass(frozen=True)
class Reading:
    """What the model has made of dialogues. kept: by the kind of layer the keys and values [N, K, D] of its last one,
    as attention uses them."""

    dialogues: tuple[Dialogue, ...]
    ids: Tensor  # [N]
    hidden: Tensor  # [N, M] after the final norm
    kept: dict[str, tuple[Tensor, Tensor]]

    @cached_property
    def starts(self) -> list[int]:
        """Where each dialogue begins in the stream."""
        return [0, *itertools.accumulate(d.length for d in self.dialogues)][:-1]


class ReadingBatch:
    """Whole sequences, in the form that the model asks for (its `Batch`)."""

    plain = None

    def __init__(self, config: TextConfig, dialogues: Sequence[Dialogue], device: torch.device) -> None:
        self.config, self.sizes = config, [d.length for d in dialogues]
        starts = [0, *itertools.accumulate(self.sizes)]
        ids = [token for d in dialogues for token in (*d.prompt.ids, *d.reply)]
        self.ids = torch.tensor(ids, device=device)
        self.positions = torch.cat([torch.arange(size) for size in self.sizes]).to(device)
        placed = [(start, span) for start, d in zip(starts, dialogues, strict=False) for span in d.prompt.spans]
        self.media = gather_media(placed, device)
        self.blocks = [_blocks(d, device) for d in dialogues]
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._last = {kind: i for i, kind in enumerate(config.layer_types)}  # of each kind

    def attend(self, layer: int, key_weight: Tensor | None = None) -> Attend:
        kind = self.config.layer_types[layer]
        window = None if self.config.is_full(layer) else self.config.sliding_window

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer == self._last[kind]:
                self.kept[kind] = k, v
            parts = zip(q.split(self.sizes), k.split(self.sizes), v.split(self.sizes), self.blocks, strict=True)
            return torch.cat([ops.attend(q, Keys(k, v, 0, len(q), len(q)), window, own) for q, k, v, own in parts])

        return attend

    def finish(self) -> None:
        pass


def _blocks(dialogue: Dialogue, device: torch.device) -> Tensor | None:
    """The numbers of the pictures that tokens belong to, None without pictures; a reply has none."""
    own = dialogue.prompt.blocks()
    if not own.any():
        return None
    return torch.from_numpy(np.pad(own, (0, len(dialogue.reply)))).to(device)


@torch.no_grad()
def read(network: Unified, dialogues: Sequence[Dialogue]) -> Reading:
    """One pass over whole dialogues. Nothing in it is an inference tensor: a drafter's gradient may pass by."""
    batch = ReadingBatch(network.config.text, dialogues, network.language_model.norm.weight.device)
    hidden = network(batch.ids, batch)
    return Reading(tuple(dialogues), batch.ids, hidden, batch.kept)
