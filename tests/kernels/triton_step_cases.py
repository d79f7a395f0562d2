"""A whole decode step of a network with packed weights, through the doors that a CUDA device uses.

Run by `test_triton_step.py` in a process of their own. Under the interpreter the tensors are on the CPU, and the doors
are told to take Triton all the same.
"""

from __future__ import annotations

import pytest
import torch

from iolite.cache import KVCache
from iolite.checkpoint.folder import load_folder
from iolite.generate.graph import StaticStep
from iolite.generate.loop import advance
from iolite.kernels import ops, triton
from iolite.kernels.triton.dot import INTERPRETED
from iolite.model.prefill import prefill
from iolite.model.unified import Unified
from iolite.prompt import Prompt
from iolite.quant.linear import quantize_

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Unified:
    from support.tiny import save_reference

    _, network = load_folder(
        save_reference("full-first", tmp_path_factory.mktemp("model")), dtype=torch.float32, device="cpu"
    )
    network.eval().requires_grad_(False)
    quantize_(network, "int4")
    return network.to(DEVICE)


@torch.inference_mode()
def test_a_step_has_the_references_logits(network: Unified, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers, full and sliding, a prompt past the window; drawn one at a time and three at a time."""
    ids = [30, 41, 52]
    with ops.only_reference():
        cache = read(network)
        expected = torch.cat([network.logits(advance(network, token, cache)) for token in ids])
    monkeypatch.setattr(ops, "_packed", lambda x: triton if ops._allowed else None)
    one, three = StaticStep(network, read(network)), StaticStep(network, read(network), 3)
    singly = torch.cat([one([token])[1].clone() for token in ids])
    # float32 throughout: sums in another order, through 4 layers, for logits of size 10.
    torch.testing.assert_close(singly, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(three(ids)[1], expected, rtol=0, atol=1e-4)


def read(network: Unified) -> KVCache:
    cache = KVCache(network.config.text, 64)
    with ops.only_reference():
        for _ in prefill(network, Prompt(list(range(20, 35)), ""), cache):
            pass
    return cache
