"""Answers of a model that knows nothing but its constraint: random scores, with some tokens likelier than the rest."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

import iolite
from iolite.generate.grammar import Constraint, constrain
from iolite.generate.matcher import Grammars
from iolite.generate.sampling import Sampler, SamplingParams
from iolite.text.tokenizer import Tokenizer

LIKELY = ("<turn|>", "<tool_call|>", "<channel|>", '<|"|>', '"', "}", "]")  # so that texts come to their end
ENDS = ("<turn|>", "<eos>", "<|tool_response>")


@functools.cache
def grammars() -> Grammars:
    """Of the embedded model's tokenizer."""
    tokenizer = Tokenizer.from_folder(Path(iolite.__file__).parent / "nano")
    return Grammars(tokenizer, tokenizer.vocab_size + 5)  # scores may be of more tokens than there are


def end_ids() -> frozenset[int]:
    return frozenset(ids_of(*ENDS))


def ids_of(*tokens: str) -> list[int]:
    found = [grammars().tokenizer.token_id(token) for token in tokens]
    assert None not in found
    return [i for i in found if i is not None]


def constraint(prompt: Sequence[int] = (), **asked) -> Constraint:
    found = constrain(grammars(), prompt, end_ids(), **asked)
    assert found is not None
    return found


@torch.inference_mode()
def write(
    constraint: Constraint, seed: int, most: int = 400, likely: float = 5.0, **sampling
) -> tuple[list[int], bool]:
    """What random scores draw, without the end, and whether it came to its end."""
    size, random = grammars().vocab_size, torch.Generator().manual_seed(seed)
    sampler = Sampler(SamplingParams(seed=seed, **sampling), constraint)
    boost = torch.zeros(size)
    boost[ids_of(*LIKELY)] = likely
    ids: list[int] = []
    while len(ids) < most:
        ids.append(sampler([0, *ids], 2 * torch.randn(size, generator=random) + boost))
        if ids[-1] in end_ids():
            return ids[:-1], True
    return ids, False
