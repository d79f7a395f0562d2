"""The llama.cpp side of `bench/engines.py`, with a tiny model of random weights."""

from __future__ import annotations

import importlib.util
import tempfile

import pytest
import torch

from iolite.checkpoint.gguf import create_gguf

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (make test-peers)"
    ),
]

HIDDEN, WIDE, LAYERS, HEADS, KV_HEADS, HEAD, VOCABULARY = 64, 128, 12, 4, 2, 32, 512


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A decoder with a window of 32 on five of six layers and no tokenizer."""
    shapes = {
        "attn_norm": (HIDDEN,), "attn_q": (HEADS * HEAD, HIDDEN), "attn_k": (KV_HEADS * HEAD, HIDDEN),
        "attn_v": (KV_HEADS * HEAD, HIDDEN), "attn_output": (HIDDEN, HEADS * HEAD), "attn_q_norm": (HEAD,),
        "attn_k_norm": (HEAD,), "post_attention_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "ffn_gate": (WIDE, HIDDEN),
        "ffn_up": (WIDE, HIDDEN), "ffn_down": (HIDDEN, WIDE), "post_ffw_norm": (HIDDEN,),
    }  # fmt: skip
    layers = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    tensors = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,), **layers}
    settings = {
        "context_length": 4096, "embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": WIDE,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD,
        "attention.value_length": HEAD, "attention.layer_norm_rms_epsilon": 1e-6, "attention.sliding_window": 32,
        "vocab_size": VOCABULARY, "rope.freq_base": 10_000.0,
    }  # fmt: skip
    metadata = {f"gemma3.{name}": value for name, value in settings.items()}
    metadata |= {"general.architecture": "gemma3", "tokenizer.ggml.model": "no_vocab"}
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    rng = torch.Generator().manual_seed(0)
    with create_gguf(path, metadata, [(name, shape, "F32") for name, shape in tensors.items()]) as writer:
        for name, shape in tensors.items():
            writer.write(name, torch.randn(shape, generator=rng).view(torch.uint8))
    return path


@pytest.fixture
def start(cpu, gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return lambda: cpu.Engine("llama.cpp", str(gguf), {"threads": 1, "depth": 100, "room": 300})


def test_everything_that_it_is_told(start, tmp_path):
    with start() as engine:
        assert engine.call("load")["seconds"] > 0
        assert engine.step(0, tokens=3, times=2) > 0
        assert engine.step(100, times=3) > 0
        assert engine.step(7) > 0
        assert engine.prefill(40) > 0
        assert engine.step(100) > 0
        assert engine.call("about")["threads"] == 1
    states = sorted((tmp_path / "iolite-bench").iterdir())
    assert [path.name.rpartition("-")[2] for path in states] == ["100.state", "7.state"]


def test_a_deep_cache_is_read_once(start, engines, gguf, tmp_path, monkeypatch):
    with start() as engine:
        engine.call("load")
        engine.step(100)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    again = engines.LlamaCpp(str(gguf), {"threads": 1, "depth": 100, "room": 300})
    again.load()
    counts = []
    real = again._decode
    monkeypatch.setattr(again, "_decode", lambda start, count, every: counts.append(count) or real(start, count, every))
    again.step(100, 2, 1)
    assert counts == [2]


def test_memory(start):
    with start() as engine:
        engine.call("load")
        found = engine.call("memory")
    assert found["peak_rss_bytes"] >= found["loaded_peak_bytes"] > 10_000_000
