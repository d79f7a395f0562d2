"""Names and shapes: the published 12B, without its weights, and every tiny config against the model itself."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny import TINY

from iolite.checkpoint.names import expected_shapes, from_file, is_buffer, part, published
from iolite.config import ModelConfig
from iolite.model.unified import Unified

FULL_LAYERS = (5, 11, 17, 23, 29, 35, 41, 47)


@pytest.fixture(scope="module")
def config_12b():
    """The published config.json, as far as it has to do with sizes."""
    return ModelConfig.from_hf(
        {
            "model_type": "gemma4_unified",
            "dtype": "bfloat16",
            "tie_word_embeddings": True,
            "text_config": {
                "hidden_size": 3840,
                "intermediate_size": 15360,
                "num_hidden_layers": 48,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 256,
                "global_head_dim": 512,
                "num_global_key_value_heads": 1,
                "attention_k_eq_v": True,
                "sliding_window": 1024,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 8,
                "vocab_size": 262144,
                "max_position_embeddings": 262144,
                "final_logit_softcapping": 30.0,
            },
            "vision_config": {
                "patch_size": 16,
                "pooling_kernel_size": 3,
                "model_patch_size": 48,
                "mm_embed_dim": 3840,
                "mm_posemb_size": 1120,
                "num_soft_tokens": 280,
                "output_proj_dims": 3840,
            },
            "audio_config": {"audio_embed_dim": 640, "audio_samples_per_token": 640, "output_proj_dims": 640},
        }
    )


def published_shapes():
    """The table of the published file, written out independently of the code."""
    table = {
        "model.language_model.embed_tokens.weight": (262144, 3840),
        "model.language_model.norm.weight": (3840,),
        "model.vision_embedder.patch_ln1.weight": (6912,),
        "model.vision_embedder.patch_ln1.bias": (6912,),
        "model.vision_embedder.patch_dense.weight": (3840, 6912),
        "model.vision_embedder.patch_dense.bias": (3840,),
        "model.vision_embedder.patch_ln2.weight": (3840,),
        "model.vision_embedder.patch_ln2.bias": (3840,),
        "model.vision_embedder.pos_norm.weight": (3840,),
        "model.vision_embedder.pos_norm.bias": (3840,),
        "model.vision_embedder.pos_embedding": (1120, 2, 3840),
        "model.embed_vision.embedding_projection.weight": (3840, 3840),
        "model.embed_audio.embedding_projection.weight": (3840, 640),
    }
    for i in range(48):
        full = i in FULL_LAYERS
        layer = f"model.language_model.layers.{i}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            table[f"{layer}.{norm}_layernorm.weight"] = (3840,)
        table[f"{layer}.self_attn.q_proj.weight"] = (8192 if full else 4096, 3840)
        table[f"{layer}.self_attn.k_proj.weight"] = (512 if full else 2048, 3840)
        if not full:
            table[f"{layer}.self_attn.v_proj.weight"] = (2048, 3840)
        table[f"{layer}.self_attn.o_proj.weight"] = (3840, 8192 if full else 4096)
        table[f"{layer}.self_attn.q_norm.weight"] = (512 if full else 256,)
        table[f"{layer}.self_attn.k_norm.weight"] = (512 if full else 256,)
        table[f"{layer}.mlp.gate_proj.weight"] = (15360, 3840)
        table[f"{layer}.mlp.up_proj.weight"] = (15360, 3840)
        table[f"{layer}.mlp.down_proj.weight"] = (3840, 15360)
        table[f"{layer}.layer_scalar"] = (1,)
    return table


def test_the_12b_has_the_published_names_shapes_and_parameters(config_12b):
    with torch.device("meta"):
        model = Unified(config_12b)
    assert sum(p.numel() for p in model.parameters()) == 11_959_730_176
    state = {published(name): tuple(t.shape) for name, t in model.state_dict().items()}
    assert state == published_shapes()
    assert sum(math.prod(shape) for shape in state.values()) == 11_959_730_224  # and 48 buffers of one value


def test_parameters_by_part(config_12b):
    count = {}
    for name, shape in expected_shapes(config_12b).items():
        if not is_buffer(name):
            count[part(name)] = count.get(part(name), 0) + math.prod(shape)
    assert count == {
        "embedding": 1_006_632_960,
        "decoder": 10_900_713_472 + 3_840,  # the layers and the last norm
        "vision": 26_542_080 + 3_840 + 8_601_600 + 13_824 + 7_680 + 7_680 + 14_745_600,
        "audio": 2_457_600,
    }


@pytest.mark.parametrize("name", TINY)
def test_expected_shapes_are_the_models(name):
    config = ModelConfig.from_hf(TINY[name].hf_config().to_dict())
    with torch.device("meta"):
        model = Unified(config)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == expected_shapes(config)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("model.vision_embedder.patch_ln1.bias", "vision_embedder.patch_ln1.bias"),
        ("model.embed_vision.patch_ln1.bias", "vision_embedder.patch_ln1.bias"),
        ("model.embed_vision.patch_dense.weight", "vision_embedder.patch_dense.weight"),
        ("model.embed_vision.pos_embedding", "vision_embedder.pos_embedding"),
        ("model.embed_vision.pos_norm.weight", "vision_embedder.pos_norm.weight"),
        (
            "model.embed_vision.multimodal_embedder.embedding_projection.weight",
            "embed_vision.embedding_projection.weight",
        ),
        ("model.embed_vision.embedding_projection.weight", "embed_vision.embedding_projection.weight"),
        ("model.embed_audio.embedding_projection.weight", "embed_audio.embedding_projection.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_every_spelling(theirs, ours):
    assert from_file(theirs) == ours
    assert from_file(published(ours)) == ours
