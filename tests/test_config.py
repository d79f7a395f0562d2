"""config.json and its siblings: both spellings, and values refused because they would change the mathematics."""

from __future__ import annotations

import copy
import json

import pytest

from iolite.config import FULL, GenerationConfig, ModelConfig, ProcessorConfig, read_json
from iolite.errors import ConfigError

TINY = {
    "model_type": "gemma4_unified",
    "image_token_id": 11,
    "audio_token_id": 14,
    "video_token_id": 16,
    "boi_token_id": 10,
    "eoi_token_id": 12,
    "boa_token_id": 13,
    "eoa_token_index": 15,
    "eos_token_id": [1, 17],
    "text_config": {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 16,
        "final_logit_softcapping": 30.0,
    },
    "vision_config": {"mm_embed_dim": 48, "mm_posemb_size": 20},
    "audio_config": {"audio_embed_dim": 24},
}


def changed(**changes):
    data = copy.deepcopy(TINY)
    for path, value in changes.items():
        *outer, last = path.split("__")
        target = data
        for key in outer:
            target = target[key]
        target[last] = value
    return data


def test_published_spelling():
    config = ModelConfig.from_hf(TINY)
    assert config.text.layer_types.count(FULL) == 1
    assert config.text.layer_head_dim(5) == 16
    assert config.text.layer_kv_heads(5) == 1
    assert config.text.layer_head_dim(0) == 8
    assert config.eoa_token_id == 15
    assert config.eos_token_ids == (1, 17)
    assert config.modalities == ("text", "image", "video", "audio")


def test_spelling_that_transformers_saves():
    data = changed(text_config__per_layer_config={"5": {"head_dim": 16, "num_key_value_heads": 1}})
    for key in ("global_head_dim", "num_global_key_value_heads"):
        del data["text_config"][key]
    assert ModelConfig.from_hf(data) == ModelConfig.from_hf(TINY)


def test_what_we_write_we_read():
    config = ModelConfig.from_hf(TINY)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_without_k_eq_v_full_layers_have_the_sliding_layers_kv_heads():
    config = ModelConfig.from_hf(changed(text_config__attention_k_eq_v=False))
    assert config.text.layer_kv_heads(5) == 2
    assert not config.text.shares_kv(5)


BAD = {
    "another architecture": ({"model_type": "llama"}, "model_type is 'llama'"),
    "no decoder": ({"text_config": None}, "text_config is missing"),
    "another activation": ({"text_config__hidden_activation": "silu"}, "hidden_activation = 'silu'"),
    "biases": ({"text_config__attention_bias": True}, "attention_bias"),
    "experts": ({"text_config__enable_moe_block": True}, "enable_moe_block"),
    "per-layer embeddings": ({"text_config__hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input"),
    "shared layers": ({"text_config__num_kv_shared_layers": 2}, "num_kv_shared_layers"),
    "all bidirectional": ({"text_config__use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    "attention soft-cap": ({"text_config__attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "yarn": ({"text_config__rope_parameters": {FULL: {"rope_type": "yarn"}}}, "rope_type 'yarn'"),
    "rotated more than whole": (
        {"text_config__rope_parameters": {FULL: {"partial_rotary_factor": 1.5}}},
        "partial_rotary_factor is 1.5",
    ),
    "no layers": ({"text_config__num_hidden_layers": 0}, "num_hidden_layers"),
    "layers as text": ({"text_config__num_hidden_layers": "6"}, "num_hidden_layers"),
    "a true number": ({"text_config__hidden_size": True}, "hidden_size"),
    "a huge number": ({"text_config__hidden_size": 1 << 40}, "hidden_size"),
    "unknown layer": ({"text_config__layer_types": ["linear_attention"] * 6}, "layer_types"),
    "too few layer types": ({"text_config__layer_types": [FULL]}, "layer_types"),
    "heads not divisible": ({"text_config__num_key_value_heads": 3}, "cannot share"),
    "odd heads": ({"text_config__head_dim": 7}, "even"),
    "infinite epsilon": ({"text_config__rms_norm_eps": float("inf")}, "rms_norm_eps"),
    "negative window": ({"text_config__sliding_window": -1}, "sliding_window"),
    "padding outside the vocabulary": ({"text_config__pad_token_id": 96}, "pad_token_id is 96, outside"),
    "two media tokens alike": ({"image_token_id": 16}, "same id"),
    "projection of another width": ({"vision_config__output_proj_dims": 47}, "output_proj_dims"),
    "patch of another size": ({"vision_config__model_patch_size": 32}, "model_patch_size"),
    "frames of another size": ({"audio_config__audio_samples_per_token": 25}, "audio_samples_per_token"),
    "end token as text": ({"eos_token_id": "end"}, "eos_token_id"),
    "sliding layer changed": (
        {"text_config__per_layer_config": {"0": {"head_dim": 4}, "5": {"head_dim": 16}}},
        "changes a sliding layer",
    ),
    "scaled rope": (
        {"text_config__rope_parameters": {FULL: {"rope_type": "proportional", "rope_theta": 1e6, "factor": 8.0}}},
        "rope factor 8.0",
    ),
    "per-layer key unknown": ({"text_config__per_layer_config": {"5": {"experts": 4}}}, "experts"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_honoured_is_refused(case):
    changes, words = BAD[case]
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf(changed(**changes))


def test_generation_defaults_suppress_the_closing_media_tokens(tmp_path):
    config = ModelConfig.from_hf(TINY)
    settings = GenerationConfig.from_folder(tmp_path, config)
    assert set(settings.suppress_tokens) == {12, 15}
    assert settings.eos_token_ids == (1, 17)
    assert (settings.temperature, settings.top_p, settings.top_k) == (1.0, 0.95, 64)


def test_a_placeholder_outside_the_vocabulary_is_legal():
    """It is embedded as padding, so Transformers takes such a config too."""
    assert ModelConfig.from_hf(changed(image_token_id=258_880)).image_token_id == 258_880


def test_a_silent_generation_config_means_what_it_means_to_transformers(tmp_path):
    (tmp_path / "generation_config.json").write_text("{}")
    settings = GenerationConfig.from_folder(tmp_path, ModelConfig.from_hf(TINY))
    assert (settings.do_sample, settings.top_p, settings.top_k) == (False, 1.0, 50)


PROCESSORS = {
    "bilinear": ({"image_processor": {"resample": 2}}, "image_processor.resample is 2"),
    "normalised": ({"image_processor": {"do_normalize": True, "image_mean": [0.5] * 3}}, "image_mean"),
    "other patches": ({"video_processor": {"patch_size": 14}}, "video_processor.patch_size is 14"),
    "not rescaled": ({"image_processor": {"do_rescale": False}}, "do_rescale is False"),
    "rescaled by another": ({"image_processor": {"rescale_factor": 0.5}}, "rescale_factor is 0.5"),
    "8 kHz": ({"feature_extractor": {"sampling_rate": 8000}}, "sampling_rate is 8000"),
    "other frames": ({"feature_extractor": {"feature_size": 640}}, "feature_size is 640; this model needs 24"),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_other_ways_to_make_pixels_and_frames_are_refused(tmp_path, case):
    data, words = PROCESSORS[case]
    (tmp_path / "processor_config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=words):
        ProcessorConfig.from_folder(tmp_path, ModelConfig.from_hf(TINY))


def test_the_published_processor_is_read(tmp_path):
    pixels = {"patch_size": 16, "pooling_kernel_size": 3, "do_resize": True, "rescale_factor": 0.00392156862745098}
    data = {
        "image_processor": {**pixels, "max_soft_tokens": 280, "do_normalize": False, "resample": 3},
        "video_processor": {**pixels, "max_soft_tokens": 70, "do_normalize": True, "image_mean": [0.0] * 3},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(data))
    assert ProcessorConfig.from_folder(tmp_path, ModelConfig.from_hf(TINY)).image_max_soft_tokens == 280


def test_generation_config_is_honoured(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": [3], "suppress_tokens": []}')
    settings = GenerationConfig.from_folder(tmp_path, ModelConfig.from_hf(TINY))
    assert (settings.temperature, settings.eos_token_ids, settings.suppress_tokens) == (0.5, (3,), ())
    (tmp_path / "generation_config.json").write_text('{"temperature": null, "min_p": 0.1, "repetition_penalty": 1.2}')
    settings = GenerationConfig.from_folder(tmp_path, ModelConfig.from_hf(TINY))
    assert (settings.temperature, settings.min_p, settings.repetition_penalty) == (1.0, 0.1, 1.2)


def test_processor_budgets(tmp_path):
    config = ModelConfig.from_hf(TINY)
    assert ProcessorConfig.from_folder(tmp_path, config).image_budgets == (70, 140, 280, 560, 1120)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"max_soft_tokens": 3}}))
    own = ProcessorConfig.from_folder(tmp_path, config)
    assert (own.image_max_soft_tokens, own.video_max_soft_tokens, own.image_budgets) == (3, 3, None)
    (tmp_path / "processor_config.json").write_text(json.dumps(own.to_hf()))
    assert ProcessorConfig.from_folder(tmp_path, config) == own


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as JSON"),
        ("[1]", "no JSON object"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"a": "\\ud800', "cannot be read as JSON"),
    ],
)
def test_json_that_is_none(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_json(path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is missing") as caught:
        ModelConfig.from_folder(tmp_path)
    assert caught.value.hint
