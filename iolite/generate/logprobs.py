"""How likely tokens were: logarithms of the model's own probabilities.

They are the log-softmax of the model's scores as they come, before temperature, penalties, biases, filters and
constraints: what the model thinks, and not what it was made to draw from. So a token may have been drawn that is
unlikely here, or the likeliest be one that was forbidden.

Letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iolite.generate.reply import Alternative, TokenLogprobs
from iolite.generate.sampling import no_smaller_than_kth
from iolite.text.stream import ContentDelta
from iolite.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprobs:
    """Of the place of one token: its own, and the likeliest ids with theirs, best first."""

    drawn: float
    top: tuple[tuple[int, float], ...] = ()

    def spelled(self, token: int, tokenizer: Tokenizer) -> TokenLogprobs:
        """With the texts of all tokens; token: the one that was drawn."""
        top = tuple(Alternative(i, tokenizer.token_bytes(i), value) for i, value in self.top)
        return TokenLogprobs(token, tokenizer.token_bytes(token), self.drawn, top)


def logprobs_of(logits: Tensor, token: int, count: int) -> Logprobs:
    """Of a token, and of the `count` likeliest, by the model's scores [V]."""
    if not logits.is_cpu:
        found = torch.log_softmax(logits.float(), -1)
        best = torch.topk(found, min(count, len(found)))
        return Logprobs(float(found[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
    # By NumPy for the reason that `iolite/generate/sampling.py` gives.
    values = logits.float().numpy()
    largest = values.max()
    total = float(largest) + math.log(np.exp(values - largest).sum(dtype=np.float64))
    candidates = no_smaller_than_kth(values, count) if count else np.arange(0)
    order = candidates[np.argsort(-values[candidates], kind="stable")][:count]
    return Logprobs(float(values[token]) - total, tuple((int(i), float(values[i]) - total) for i in order))


@dataclass(frozen=True)
class ScoredDelta(ContentDelta):
    """More of the answer's text, with the tokens that begin in it."""

    logprobs: tuple[TokenLogprobs, ...] = ()


class Scores:
    """Hands out what is known of a text's tokens together with the text, which may be shown later than they come: a
    character may take several, and a stop string be looked for."""

    def __init__(self) -> None:
        self.told: list[TokenLogprobs] = []
        self._waiting = deque[tuple[int, TokenLogprobs]]()  # with the characters before each
        self._came = self._shown = 0  # characters

    def came(self, text: str, found: TokenLogprobs | None) -> None:
        """The text that became certain with one more token; found: of that token, None where it is no text."""
        if found:
            self._waiting.append((self._came, found))
        self._came += len(text)

    def shown(self, text: str) -> tuple[TokenLogprobs, ...]:
        """The tokens that begin in the next of the text."""
        self._shown += len(text)
        first = len(self.told)
        while self._waiting and self._waiting[0][0] < self._shown:
            self.told.append(self._waiting.popleft()[1])
        return tuple(self.told[first:])
