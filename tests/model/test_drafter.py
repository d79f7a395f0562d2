"""The drafter against Transformers' own, step by step down a chain, over every kind of cache.

`support/tiny_drafter.py` says which of Transformers' faults are mended for that, and how.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.compare import assert_near, sample_for
from support.drafting import drafts
from support.oracle import Audio, Image, Piece, Sample, Text
from support.tiny import TINY
from support.tiny_drafter import DRAFTERS, reading_only, reference_keys, reference_steps, save_reference_drafter
from torch import Tensor
from transformers import Gemma4UnifiedTextConfig

from iolite.cache import KVCache
from iolite.checkpoint.drafter import load_drafter
from iolite.checkpoint.gguf_drafter import drafter_shapes
from iolite.checkpoint.synthetic import drafter_config
from iolite.config import ModelConfig
from iolite.kernels import ops
from iolite.model.batch import Media, RaggedBatch, Segment
from iolite.model.drafter import CachedView, Drafter, likeliest
from iolite.model.prefill import prefill
from iolite.model.unified import Unified

Load = Callable[[str], Unified]
LoadDrafter = Callable[[str], Drafter]
DEEPEST = 8
TOKEN = 33  # the newest one, any

PROMPTS: dict[str, tuple[Piece, ...]] = {
    "shorter than the window": (Text(4),),
    "longer than the window": (Text(150),),
    "one before the window": (Text(14),),  # with its BOS, for a window of 16
    "a picture": (Text(9), Image(4, 3), Text(2)),
    "a picture last, and sound": (Text(5), Audio(21), Text(1), Image(2, 3)),
}


@pytest.fixture(scope="session")
def tiny_drafter(tmp_path_factory: pytest.TempPathFactory) -> LoadDrafter:
    """name of the model -> its drafter in float32, out of the folder that Transformers saves."""

    @functools.cache
    def load(name: str) -> Drafter:
        folder = save_reference_drafter(name, tmp_path_factory.mktemp(name))
        return load_drafter(folder, dtype=torch.float32)

    return load


@torch.inference_mode()
def read(model: Unified, cache: KVCache, sample: Sample, chunk_size: int = 16) -> Tensor:
    """The prompt into the cache; -> hidden states [tokens, M]."""
    return torch.cat(list(prefill(model, sample.prompt(), cache, chunk_size=chunk_size)))


@torch.inference_mode()
def go_on(model: Unified, cache: KVCache, token: int) -> Tensor:
    """One more token; -> its hidden state [1, M]."""
    batch = RaggedBatch(model.config.text, [Segment(cache, 1)], Media(), torch.device("cpu"))
    return model(torch.tensor([token]), batch)


@torch.inference_mode()
def steps(drafter: Drafter, model: Unified, hidden: Tensor, cache: KVCache, count: int = DEEPEST) -> Tensor:
    """[count, vocabulary]: the scores of a greedy chain behind TOKEN."""
    view, token, found = CachedView(model, [cache]), torch.tensor([TOKEN]), []
    for _ in range(count):
        scores, hidden = drafter(model.language_model.embed(token), hidden, view)
        token = scores.argmax(-1)
        found.append(scores)
    return torch.cat(found)


def expected_steps(name: str, sample: Sample) -> Tensor:
    shared, hidden = reference_keys(name, sample)
    return torch.stack(list(reference_steps(name, shared, TOKEN, hidden, len(sample.ids), DEEPEST)))


def longer(sample: Sample, ids: Sequence[int]) -> Sample:
    return Sample([*sample.ids, *ids], sample.placed)


@pytest.mark.parametrize("pieces", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_equal_to_transformers(
    name: str, pieces: tuple[Piece, ...], load_tiny: Load, tiny_drafter: LoadDrafter
) -> None:
    """After a prompt, 1 to 8 steps deep."""
    model, sample = load_tiny(name), sample_for(name, *pieces)
    cache = KVCache(model.config.text)
    hidden = read(model, cache, sample)[-1:]
    assert_near(steps(tiny_drafter(name), model, hidden, cache), expected_steps(name, sample))


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", ["published", "narrow"])
def test_after_decoding_and_going_back(name: str, kernels: bool, load_tiny: Load, tiny_drafter: LoadDrafter) -> None:
    """The ring has wrapped, and what lies behind the end of the sequence is another sequence's."""
    model, drafter, window = load_tiny(name), tiny_drafter(name), TINY[name].window
    prompt = sample_for(name, Text(9), Image(4, 3), Text(2 * window))
    cache = KVCache(model.config.text, slack=12)
    read(model, cache, prompt)
    ids = [20 + 7 * i % 70 for i in range(3 * window)]
    with torch.no_grad() if kernels else ops.only_reference():
        states = torch.cat([go_on(model, cache, token) for token in ids])
        for length in (cache.length, cache.length - 3, cache.earliest):  # no more than a window is left at the end
            cache.rewind(length)
            count = length - len(prompt.ids)
            found = steps(drafter, model, states[count - 1 : count], cache)
            assert_near(found, expected_steps(name, longer(prompt, ids[:count])))
    assert 0 < count < len(ids) - 3


@pytest.mark.parametrize("name", ["published", "full-first"])
@pytest.mark.parametrize(
    ("shared", "dtype", "most"),
    [
        (False, torch.float32, 1e-5),
        (True, torch.bfloat16, 0.02),
        (False, torch.bfloat16, 0.02),
        (True, torch.int8, 0.05),
        (False, torch.int8, 0.05),
    ],
)
def test_kinds_of_cache(
    shared: bool, dtype: torch.dtype, most: float, name: str, load_tiny: Load, tiny_drafter: LoadDrafter
) -> None:
    """The scores are off by a small part of their spread, also since the model's own later keys have come out of
    rounded ones: numbers are off by up to 1/512 in bfloat16, by about 1/300 of a typical one in int8, on each layer."""
    model, drafter, sample = load_tiny(name), tiny_drafter(name), sample_for(name, Text(9), Image(4, 3), Text(60))
    usual, other = KVCache(model.config.text), KVCache(model.config.text, dtype=dtype, shared=shared)
    hidden = read(model, usual, sample)[-1:]
    read(model, other, sample)
    expected, found = (steps(drafter, model, hidden, cache, 1) for cache in (usual, other))
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert error < most
    assert (error > 1e-5) == (dtype is not torch.float32)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("models", [torch.float32, torch.bfloat16], ids=str)
def test_number_formats(models: torch.dtype, own: torch.dtype, load_tiny: Load, tiny_drafter: LoadDrafter) -> None:
    """A drafter's format need not be its model's. From the same cache and state it is off by its own rounding only."""
    model, drafter = copy.deepcopy(load_tiny("published")).to(models), copy.deepcopy(tiny_drafter("published")).to(own)
    cache = KVCache(model.config.text)
    hidden = read(model, cache, sample_for("published", Text(9), Image(4, 3), Text(40)))[-1:]
    found = steps(drafter, model, hidden, cache, 1)
    expected = steps(tiny_drafter("published"), copy.deepcopy(model).float(), hidden.float(), cache, 1)
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert found.dtype is torch.float32
    assert error < (1e-5 if own is torch.float32 else 0.05)


def test_nothing_is_written(load_tiny: Load, tiny_drafter: LoadDrafter) -> None:
    model, sample = load_tiny("published"), sample_for("published", Text(50))
    cache = KVCache(model.config.text, slack=12)
    hidden = read(model, cache, sample)[-1:]
    before = {name: tensor.clone() for name, tensor in cache.state().items()}
    list(drafts(tiny_drafter("published"), model, torch.tensor([TOKEN]), hidden, [cache], DEEPEST))
    after = cache.state()
    assert cache.length == len(sample.ids)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_several_sequences(load_tiny: Load, tiny_drafter: LoadDrafter) -> None:
    """Of unequal lengths, together as each alone; probabilities are those of the tokens, and asking may end early."""
    model, drafter = load_tiny("published"), tiny_drafter("published")
    caches = [KVCache(model.config.text) for _ in range(3)]
    samples = [sample_for("published", Text(length), seed=length) for length in (3, 40, 90)]
    hidden = torch.cat([read(model, cache, sample)[-1:] for cache, sample in zip(caches, samples, strict=True)])
    together = list(drafts(drafter, model, torch.tensor([TOKEN] * 3), hidden, caches, 5))
    for row, cache in enumerate(caches):
        scores = steps(drafter, model, hidden[row : row + 1], cache, 5)
        assert torch.equal(torch.stack([tokens[row] for tokens, _ in together]), scores.argmax(-1))
        chances = torch.stack([probability[row] for _, probability in together])
        torch.testing.assert_close(chances, scores.softmax(-1).amax(-1), rtol=1e-4, atol=1e-6)
    ((tokens, _),) = itertools.islice(drafts(drafter, model, torch.tensor([TOKEN] * 3), hidden, caches, 5), 1)
    assert torch.equal(tokens, together[0][0])


def test_a_draft_needs_a_beginning(load_tiny: Load) -> None:
    model = load_tiny("published")
    with pytest.raises(ValueError, match="a cache that holds tokens"):
        CachedView(model, [KVCache(model.config.text)])


def test_the_12b_drafter_by_shape() -> None:
    """The published file has 48 tensors of 422,856,964 values."""
    config = Path(__file__).parents[1] / "data" / "gemma-4-12B-config.json"
    model = ModelConfig.from_hf(json.loads(config.read_text(encoding="utf-8")))
    text = drafter_config(model)
    with torch.device("meta"):
        state = Drafter(text, model.text.hidden_size).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == drafter_shapes(text, model.text.hidden_size)
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (48, 422_856_964)


def test_gradients_reach_every_weight(load_tiny: Load, tiny_drafter: LoadDrafter) -> None:
    """Training goes through the same steps."""
    model, cache = load_tiny("published"), KVCache(load_tiny("published").config.text)
    batch = RaggedBatch(model.config.text, [Segment(cache, 30)], Media(), torch.device("cpu"))
    with torch.no_grad():
        state = model(torch.arange(20, 50), batch)[-1:]
    drafter = Drafter(tiny_drafter("published").config, model.config.text.hidden_size)
    drafter.load_state_dict(tiny_drafter("published").state_dict())
    view = CachedView(model, [cache])
    for _ in range(2):
        scores, state = drafter(model.language_model.embed(torch.tensor([TOKEN])), state, view)
    scores.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in drafter.parameters())


def test_transformers_still_needs_mending() -> None:
    """When this fails, `support/tiny_drafter.py` can be simplified."""
    config = Gemma4UnifiedTextConfig(num_hidden_layers=4, num_kv_shared_layers=4)
    with pytest.raises(ValueError, match="producing a cache"):
        _ = config.kv_sharing_modes
    with reading_only():
        assert config.kv_sharing_modes == ["reuse"] * 4
    assert set(Gemma4UnifiedTextConfig(num_hidden_layers=6).kv_sharing_modes) == {None}


def test_the_likeliest_token_and_its_probability() -> None:
    scores = 5 * torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
    tokens, probabilities = likeliest(scores)
    expected = scores.double().softmax(-1).max(-1)
    assert torch.equal(tokens, expected.indices)
    # A float32 sum of 1,000 numbers, each off by a few units in the last place.
    torch.testing.assert_close(probabilities.double(), expected.values, rtol=1e-5, atol=0)
