"""Whole models on packed weights: the kernels beside the reference, and what the rounding of activations explains.

The C++ products round their inputs to int8 with a scale for each 32 values, 1/127 of the largest of them. A rounding
error is uniform over one step, of deviation step / sqrt(12). The largest of 32 normal numbers is 2.4 deviations or
less on the average of squares, so a product's result is off by delta = 2.4 / 127 / sqrt(12) = 0.55 % of its own size;
the errors of different products are independent. Norms after every half of a block keep all branches of one size, so
the P products that a token passes in sequence add up to at most sqrt(P) delta; softmax and gates may double it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import iolite
from iolite.cache import KVCache
from iolite.checkpoint.assemble import assemble
from iolite.checkpoint.synthetic import SyntheticSource, config_of
from iolite.kernels import cpu, ops, reference
from iolite.kernels.contracts import Matrix
from iolite.model.batch import Media, RaggedBatch, Segment
from iolite.model.unified import Unified

DEMO = Path(__file__).parents[2] / "docs" / "demo"
DELTA = 2.4 / 127 / math.sqrt(12)

needs_library = pytest.mark.skipif(cpu.load() is None, reason=f"no C++ kernels: {cpu.reason()}")


@pytest.fixture(scope="module", params=["int4", "int8"])
def network(request: pytest.FixtureRequest) -> Unified:
    source = SyntheticSource(config_of("tiny"), request.param)
    weights = {name: source.weight(name) for name in source.names()}
    return assemble(source.config, weights, dtype=torch.float32).eval().requires_grad_(False)


@torch.inference_mode()
def logits(network: Unified, ids: list[int], chunk: int) -> Tensor:
    cache, found = KVCache(network.config.text), []
    for start in range(0, len(ids), chunk):
        part = torch.tensor(ids[start : start + chunk])
        batch = RaggedBatch(network.config.text, [Segment(cache, len(part))], Media(), torch.device("cpu"))
        found.append(network.logits(network(part, batch)))
    return torch.cat(found)


def rounded_linear(x: Tensor, matrix: Matrix) -> Tensor:
    """The reference's product with its input rounded as the kernels round it."""
    flat = x.reshape(-1, x.shape[-1])
    blocks = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 32)).unflatten(1, (-1, 32))
    most = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-120)
    near = (blocks * (127 / most)).round() * (most / 127)
    return torch.nn.functional.linear(near.flatten(1)[:, : flat.shape[1]].view_as(x), matrix.to_float())


@needs_library
@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_the_difference_is_the_rounding_of_activations(
    network: Unified, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(400, 1000, (60,), generator=torch.Generator().manual_seed(chunk)).tolist()
    ours = logits(network, ids, chunk)
    with ops.only_reference():
        exact = logits(network, ids, chunk)
        monkeypatch.setattr(reference, "linear", rounded_linear)
        rounded = logits(network, ids, chunk)
    size = exact.square().mean().sqrt()
    error, explained = ((other - exact).square().mean().sqrt() / size for other in (ours, rounded))
    products = 4 * network.config.text.num_hidden_layers + 1  # in sequence: q or k or v, o, gate or up, down; the head
    assert error <= 2 * DELTA * math.sqrt(products)
    assert error >= DELTA / 4  # it is there: the kernels were really used
    # And it is of the size that rounding alone gives. (Not the same numbers: where float32 tips one activation over to
    # the next integer, all that comes later is rounded otherwise. Single products are compared exactly elsewhere.)
    assert explained / 2 <= error <= 2 * explained


@needs_library
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_the_embedded_model_says_the_same_with_the_reference(scheme: str) -> None:
    model = iolite.load("nano", quantize=scheme, kv="float32")
    seconds = np.arange(16_000) / 16_000
    questions: list[list[dict[str, object]]] = [
        [{"type": "image", "image": str(DEMO / "number.png")}, {"type": "text", "text": "What number is this?"}],
        [{"type": "image", "image": str(DEMO / "shape.png")}, {"type": "text", "text": "What colour is the shape?"}],
        [{"type": "image", "image": str(DEMO / "shape.png")}, {"type": "text", "text": "Which shape is it?"}],
        [{"type": "audio", "audio": str(DEMO / "digits.wav")}],
        [{"type": "audio", "audio": np.sin(seconds * 3000).astype(np.float32), "sampling_rate": 16_000}],
        *([{"type": "text", "text": text}] for text in ("Hello!", "Who are you?", "What can you do?", "Thank you.")),
    ]
    for content in questions:
        messages = [{"role": "user", "content": content}]
        ours = model.chat(messages, temperature=0, max_tokens=40).text
        with ops.only_reference():
            assert model.chat(messages, temperature=0, max_tokens=40).text == ours


def test_without_the_library_the_reference_answers(network: Unified, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(500, 520))
    with ops.only_reference():
        wanted = logits(network, ids, 20)
    monkeypatch.setattr(cpu, "load", lambda: None)
    assert torch.equal(logits(network, ids, 20), wanted)
