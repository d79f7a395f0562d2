"""What passes and drafts cost on this machine: measured when a drafter is loaded, kept true while it is used.

A pass reads all weights whatever the number of its tokens, so a few tokens more cost little; what they do cost decides
how many drafts pay. On top of that every token of context costs something for each token of the pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch

from iolite.cache import KVCache
from iolite.config import FULL
from iolite.generate.passes import Passes
from iolite.kernels import ops
from iolite.model.drafter import Chains, Drafter
from iolite.model.unified import Unified

MOST_DRAFTS = 8
_SETTLES = 0.2  # share of what a new measurement changes of the machine's speed: it changes from one second to the next
_LEARNS = 0.05  # and of the cost of a number of tokens against another
_DEPTH = 4096  # tokens of context that the cost of context is measured at


@dataclass
class Costs:
    """Seconds of a pass of n tokens and of a drafter's step, by tokens of context."""

    passes: list[float]  # of 1, 2, ... tokens without context
    context: list[float]  # what each token of context adds, by tokens of the pass
    draft: float = 0.0  # a drafter's step without context
    draft_context: float = 0.0
    speed: float = 1.0  # by how much slower all of it is now than when it was measured
    learnt: dict[int, float] = field(default_factory=dict)  # by how much slower a pass of n tokens is than that
    learnt_draft: float = 1.0  # and a drafter's step

    def of_pass(self, tokens: Sequence[int], contexts: Sequence[int]) -> float:
        """A pass over tokens[i] of a sequence of contexts[i] tokens, for all i."""
        total = sum(tokens)
        seconds = _at(self.passes, total)
        seconds += sum(_at(self.context, n) * context for n, context in zip(tokens, contexts, strict=True))
        return self.speed * self.learnt.get(total, 1.0) * seconds

    def of_draft(self, contexts: Sequence[int]) -> float:
        """One step of the drafter for sequences of these lengths together."""
        return self.speed * self.learnt_draft * (self.draft + self.draft_context * sum(contexts))

    def saw(self, tokens: Sequence[int], contexts: Sequence[int], seconds: float) -> None:
        """Takes a pass into account that took so long."""
        off, total = _bounded(seconds / self.of_pass(tokens, contexts)), sum(tokens)
        self.speed *= off**_SETTLES
        self.learnt[total] = _bounded(self.learnt.get(total, 1.0) * off**_LEARNS)

    def saw_drafts(self, steps: int, contexts: Sequence[int], seconds: float) -> None:
        """Takes steps of the drafter into account that took so long together, what comes with them included."""
        if expected := steps * self.of_draft(contexts):
            self.learnt_draft = _bounded(self.learnt_draft * _bounded(seconds / expected) ** _LEARNS, 4.0)


def _bounded(factor: float, most: float = 2.0) -> float:
    """A factor between 1 / most and most: what something else has held up says nothing about the next time."""
    return min(most, max(1 / most, factor))


def _at(values: Sequence[float], n: int) -> float:
    """values[n - 1], and beyond the end as it goes on from the last two."""
    if n <= len(values):
        return values[n - 1]
    return values[-1] + (n - len(values)) * (values[-1] - values[-2])


def measure(network: Unified, drafter: Drafter | None, kv_dtype: torch.dtype | None = None) -> Costs:
    """Times passes of 1 to MOST_DRAFTS + 1 tokens, attention over a context, and the drafter's step: about as long as
    it takes to draw ten tokens, or a fifth of a second."""
    passes, draft = _time_passes(network, drafter, kv_dtype)
    context = _time_context(network, kv_dtype, len(passes))
    if drafter is None:
        return Costs(passes, context)
    layers = sum(kind == FULL for kind in drafter.config.layer_types) / max(1, len(_full_layers(network)))
    return Costs(passes, context, draft, context[0] * layers)


def _time_passes(network: Unified, drafter: Drafter | None, kv_dtype: torch.dtype | None) -> tuple[list[float], float]:
    """Seconds of a pass of 1, 2, ... tokens, and of a drafter's step (0.0 without one)."""
    cache, run = KVCache(network.config.text, None, kv_dtype), Passes(network)
    hidden = run([cache], [[0, 0]])[0][-1:].clone()
    length, token = cache.length, torch.zeros(1, dtype=torch.int64, device=run.device)

    def one_pass(count: int) -> None:
        run([cache], [[0] * count])
        cache.rewind(length)

    def one_draft() -> None:
        if drafter:
            Chains(drafter, network, token, hidden, [cache]).step()[1].item()

    counts = range(1, min(MOST_DRAFTS + 1, cache.max_length - length) + 1)
    work = [partial(one_pass, count) for count in counts]
    if run.device.type != "cpu":
        for record in work:  # the first time they are recorded
            record()
    one_draft()
    # Once more the one that all others are compared with.
    *passes, draft, again = _medians([*work, one_draft, work[0]])
    passes[0] = min(passes[0], again)
    # More tokens cannot cost less: where they seem to, it is noise.
    return list(accumulate(passes, max)), draft


@torch.inference_mode()
def _time_context(network: Unified, kv_dtype: torch.dtype | None, most: int) -> list[float]:
    """Seconds that a token of context adds to a pass of 1, 2, ... `most` tokens: attention of all full layers."""
    full, text = _full_layers(network), network.config.text
    if not full:
        return [0.0] * most
    layer, depth = full[0], min(_DEPTH, text.max_position_embeddings) - most
    if depth <= 0:
        return [0.0] * most
    rows = KVCache(text, None, kv_dtype).layers[layer]
    weight = network.language_model.get_parameter(f"layers.{layer}.self_attn.k_norm.weight")
    size, heads = text.layer_head_dim(layer), text.layer_kv_heads(layer)
    k = torch.randn(depth, heads, size, dtype=weight.dtype, device=weight.device)
    rows.extend(k, k, 0, weight)
    q = torch.randn(most, text.num_attention_heads, size, dtype=weight.dtype, device=weight.device)

    def attend(count: int) -> None:
        keys = rows.extend(k[:count], k[:count], depth, weight)
        rows.layout.output(ops.attend(rows.layout.queries(q[:count], weight), keys, None, None))[0, 0, 0].item()

    attend(most)
    seconds = _medians([partial(attend, count) for count in range(1, most + 1)])
    return [took * len(full) / depth for took in accumulate(seconds, max)]


def _full_layers(network: Unified) -> list[int]:
    return [i for i, kind in enumerate(network.config.text.layer_types) if kind == FULL]


def _medians(work: Sequence[Callable[[], None]]) -> list[float]:
    """Seconds of each, the median of ten turns, or of as many as fit into a fifth of a second."""
    turns: list[list[float]] = []
    begin = time.perf_counter()
    while not turns or (len(turns) < 10 and time.perf_counter() - begin < 0.2):
        turns.append([_time(once) for once in work])
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def _time(once: Callable[[], None]) -> float:
    begin = time.perf_counter()
    once()
    return time.perf_counter() - begin
