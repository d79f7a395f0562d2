"""Models of a tiny network, an engine that steps when it is told to, and what plain decoding draws."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from iolite.cache import KVCache
from iolite.config import GenerationConfig
from iolite.device import Choice
from iolite.engine.engine import Engine
from iolite.engine.pace import Pace
from iolite.engine.running import Running
from iolite.generate.loop import Decoding
from iolite.generate.model import Model
from iolite.generate.sampling import Sampler, SamplingParams
from iolite.generate.speculative import Speculator
from iolite.model.prefill import prefill
from iolite.model.unified import Unified
from iolite.prompt import Prompt
from support.compare import TOLERANCE


def model_of(network: Unified, speculator: Speculator | None = None, **settings: Any) -> Model:
    """Without a tokenizer: for prompts that are ids already."""
    given = {"context": 400, "chunk": 40, "kv_dtype": None, "scheme": None, "load_seconds": 0.0}
    return Model(
        "tiny",
        Path(),
        network,
        Choice(torch.device("cpu"), torch.float32, ""),
        SimpleNamespace(config=network.config),
        GenerationConfig(),
        **(given | settings),
        speculator=speculator,
    )


class AtRandom(Pace):
    """Reads another number of tokens in each step, whatever the clock says."""

    def __init__(self, seed: int, chunk: int = 40) -> None:
        super().__init__(chunk)
        self.random = random.Random(seed)

    def tokens(self, drawing: int) -> int:
        return self.random.choice((1, 3, 8, 21)) if drawing else self.random.choice((5, self.chunk))


class Stepped(Engine):
    """Has no thread at work: a test calls `step()`."""

    def __init__(self, model: Model, seed: int = 0, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._thread.join()
        self._step.pace = AtRandom(seed)

    def _run(self) -> None:
        pass

    def finish(self) -> None:
        """Steps until there is nothing more to do."""
        while self._stirs():
            self.step()


def ids(running: Running) -> list[int]:
    return [drawn.id for drawn in running]


def plain(model: Model, prompt: Prompt, params: SamplingParams) -> list[int]:
    """What is drawn by itself, after reading everything."""
    decoding = Decoding(model.network, prompt, params, context=model.context, kv_dtype=model.kv_dtype)
    return [drawn.id for drawn in decoding]


@torch.inference_mode()
def assert_same(
    model: Model, prompt: Prompt, params: SamplingParams, found: Sequence[int], expected: Sequence[int]
) -> None:
    """The same tokens, up to the first place where rounding decides: there plain decoding has to draw the found token
    as well when its scores are changed by no more than the order of sums may change them."""
    if list(found) == list(expected):
        return
    assert params.seed is not None or params.temperature == 0
    pairs = zip(found, expected, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
    assert at < min(len(found), len(expected)), f"{len(found)} tokens and not {len(expected)}"
    before = [*prompt.ids, *expected[:at]]
    cache = KVCache(model.config.text, dtype=model.kv_dtype)
    *_, hidden = prefill(model.network, replace(prompt, ids=before), cache)
    logits = model.network.logits(hidden[-1:])[0]
    noise, drawn = torch.Generator().manual_seed(0), set()
    for _ in range(50):
        sampler = Sampler(params)
        torch.rand(at, dtype=torch.float64, generator=sampler.generator)  # one number for each token before
        drawn.add(sampler(before, logits + TOLERANCE * (2 * torch.rand(logits.shape, generator=noise) - 1)))
    assert found[at] in drawn, f"token {at} is {found[at]}, not {expected[at]}"
