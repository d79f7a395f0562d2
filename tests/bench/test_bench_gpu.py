"""`bench/gpu.py`: without a GPU it says so; its model is the 12B's shape, and what it times runs on the CPU too."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iolite.config import ModelConfig

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so():
    command = [sys.executable, str(ROOT / "bench" / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "no CUDA device\n"), done.stderr


def test_the_shape_is_the_12b(bench):
    published = ModelConfig.from_hf(json.loads((ROOT / "tests/data/gemma-4-12B-config.json").read_text()))
    assert bench.config_12b().text == published.text


def test_what_is_timed_runs(bench, monkeypatch, capsys):
    """On the CPU, small, with clocks that say a second."""
    monkeypatch.setattr(bench, "seconds", lambda work, **settings: (work(), 1.0)[1])
    monkeypatch.setattr(bench, "bandwidth", lambda device: 1e9)
    config = bench.config_12b(6)
    small = replace(config.text, vocab_size=300_000, hidden_size=32, intermediate_size=64, head_dim=16)
    small = replace(small, global_head_dim=16, sliding_window=20)
    network = bench.random_network(replace(config, text=small), "int4", torch.float32, CPU)
    bench.report_decode(network, [0, 30], [1, 4], torch.float32)
    bench.report_prompts(network, [7], torch.float32)
    shown = capsys.readouterr().out
    assert "4 behind     30: 1000.00 ms      4.0 tokens/s" in shown
    assert "7:   1000.0 ms         7 tokens/s" in shown
    hidden = network.language_model.embed(torch.tensor([5, 9]))
    assert hidden.isfinite().all() and hidden.std() > 0
