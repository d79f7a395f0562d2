"""One pass of the model over the newest tokens of several sequences, each with its own cache.

Letters: N tokens of the pass, M hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from iolite.cache import KVCache
from iolite.errors import CheckpointError
from iolite.generate import graph
from iolite.model.batch import Media, RaggedBatch, Segment
from iolite.model.unified import Unified


class Passes:
    """Runs the passes of one answer or of several together; on a CUDA device those of a single sequence are played
    back as they were recorded (`iolite/generate/graph.py`)."""

    def __init__(self, network: Unified) -> None:
        self.network = network
        self.device = network.language_model.embed_tokens.weight.device
        self._recorded: dict[tuple[int, int], graph.StaticStep] = {}  # by cache and number of tokens

    @torch.inference_mode()
    def __call__(self, caches: Sequence[KVCache], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """tokens[i] continue caches[i] -> hidden states [N, M] of all of them end to end, and the float32 scores [N, V]
        of what follows each. The next pass may overwrite both. Raises CheckpointError for scores that are no numbers.
        """
        if len(caches) == 1 and graph.wanted(self.device):
            hidden, logits = self._record(caches[0], len(tokens[0]))(tokens[0])
        else:
            flat = torch.tensor([token for own in tokens for token in own], device=self.device)
            segments = [Segment(cache, len(own)) for cache, own in zip(caches, tokens, strict=True)]
            hidden = self.network(flat, RaggedBatch(self.network.config.text, segments, Media(), self.device))
            logits = self.network.logits(hidden)
        check_numbers(logits)
        return hidden, logits

    def _record(self, cache: KVCache, count: int) -> graph.StaticStep:
        key = id(cache), count
        if key not in self._recorded:
            self._recorded[key] = graph.StaticStep(self.network, cache, count)
        return self._recorded[key]


def are_numbers(logits: Tensor) -> bool:
    """Whether every score is one."""
    # On a CPU by NumPy, on one thread: torch's would wait for the cores on which the kernels' threads spin.
    return not (np.isnan(logits.numpy()).any() if logits.is_cpu else logits.isnan().any())


def check_numbers(logits: Tensor) -> None:
    """Raises CheckpointError when a score is not a number."""
    if not are_numbers(logits):
        raise CheckpointError(
            "the model computed values that are not numbers (NaN)",
            "its weights are damaged, or the number format is too narrow for it: try float32 or bfloat16",
        )
