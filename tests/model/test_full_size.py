"""The 12B itself, by shape only: on the meta device its 24 GB take no memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from iolite.checkpoint.names import expected_shapes, from_file, published
from iolite.config import ModelConfig
from iolite.model.unified import Unified

CONFIG = Path(__file__).parents[1] / "data" / "gemma-4-12B-config.json"  # google/gemma-4-12B's own config.json

HIDDEN, FEED_FORWARD, PATCH = 3840, 15360, 48 * 48 * 3


def published_tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published `model.safetensors`, written out."""
    found: dict[str, tuple[int, ...]] = {"model.language_model.embed_tokens.weight": (262_144, HIDDEN)}
    for layer in range(48):
        full = layer % 6 == 5
        query, key, head = (8192, 512, 512) if full else (4096, 2048, 256)
        tensors: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
            "pre_feedforward_layernorm.weight": (HIDDEN,),
            "post_feedforward_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (query, HIDDEN),
            "self_attn.k_proj.weight": (key, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, query),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            "mlp.gate_proj.weight": (FEED_FORWARD, HIDDEN),
            "mlp.up_proj.weight": (FEED_FORWARD, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, FEED_FORWARD),
            "layer_scalar": (1,),
        }
        if not full:
            tensors["self_attn.v_proj.weight"] = (key, HIDDEN)
        found |= {f"model.language_model.layers.{layer}.{name}": shape for name, shape in tensors.items()}
    found["model.language_model.norm.weight"] = (HIDDEN,)
    for norm, size in (("patch_ln1", PATCH), ("patch_ln2", HIDDEN), ("pos_norm", HIDDEN)):
        found |= {f"model.vision_embedder.{norm}.{part}": (size,) for part in ("weight", "bias")}
    return found | {
        "model.vision_embedder.patch_dense.weight": (HIDDEN, PATCH),
        "model.vision_embedder.patch_dense.bias": (HIDDEN,),
        "model.vision_embedder.pos_embedding": (1120, 2, HIDDEN),
        "model.embed_vision.embedding_projection.weight": (HIDDEN, HIDDEN),
        "model.embed_audio.embedding_projection.weight": (HIDDEN, 640),
    }


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_hf(json.loads(CONFIG.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> Unified:
    with torch.device("meta"):
        return Unified(config)


def test_number_of_parameters(model: Unified) -> None:
    assert sum(p.numel() for p in model.parameters()) == 11_959_730_176
    assert [b.shape for b in model.buffers()] == [(1,)] * 48
    assert sum(t.numel() for t in model.state_dict().values()) == 11_959_730_224


def test_every_published_name_and_shape(model: Unified, config: ModelConfig) -> None:
    ours = {published(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == published_tensors()
    assert {from_file(name): shape for name, shape in published_tensors().items()} == expected_shapes(config)


def test_the_names_in_transformers_memory_are_read_too() -> None:
    assert from_file("model.embed_vision.patch_ln1.weight") == "vision_embedder.patch_ln1.weight"
    assert from_file("model.embed_vision.patch_dense.bias") == "vision_embedder.patch_dense.bias"
    assert from_file("model.embed_vision.pos_embedding") == "vision_embedder.pos_embedding"
    assert from_file("model.embed_vision.pos_norm.bias") == "vision_embedder.pos_norm.bias"
    theirs = "model.embed_vision.multimodal_embedder.embedding_projection.weight"
    assert from_file(theirs) == "embed_vision.embedding_projection.weight"
