"""A tiny random model that GGUF can hold: the embedded model's tokenizer and template, and head sizes of its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch

from iolite.checkpoint.folder import save_folder
from iolite.checkpoint.gguf_drafter import MODEL_TYPE, drafter_shapes
from iolite.checkpoint.hub import nano_folder
from iolite.checkpoint.safetensors import save_safetensors
from iolite.config import FULL, SLIDING, ModelConfig, ProcessorConfig, RopeConfig, TextConfig
from iolite.model.unified import Unified
from support.tiny import randomise

# Rows are whole blocks of 256, so that every type of GGUF can hold them; no two sizes that could be confused are equal.
SIZES = {
    "published": {},
    "own-values": {
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": False,
        "final_logit_softcapping": None,
        "rms_norm_eps": 1e-3,
        "rope_sliding": RopeConfig(1000.0),
        "rope_full": RopeConfig(50_000.0, 0.5),
        "layer_types": (FULL, SLIDING, FULL, FULL),
        "num_hidden_layers": 4,
    },
}

DRAFTER = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "layer_types": (SLIDING, SLIDING, SLIDING, FULL),
    "final_logit_softcapping": None,
}


def tiny_text(name: str) -> TextConfig:
    nano = ModelConfig.from_folder(nano_folder()).text
    plain = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": 16,
    }
    return dataclasses.replace(nano, **(plain | SIZES[name]))


def save_tiny(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, tied: bool = True) -> Path:
    """Writes the model's folder and returns it."""
    nano = nano_folder()
    config = dataclasses.replace(ModelConfig.from_folder(nano), text=tiny_text(name), tie_word_embeddings=tied)
    model = Unified(config)
    randomise(model, seed=3)
    save_folder(folder, model.to(dtype), config, processor=ProcessorConfig.from_folder(nano, config), base=nano)
    return folder


def save_tiny_drafter(folder: Path) -> Path:
    """Writes the folder of a tiny random drafter for the model "published", and returns it."""
    text, width = dataclasses.replace(tiny_text("published"), **DRAFTER), tiny_text("published").hidden_size
    rng = torch.Generator().manual_seed(5)
    shapes = drafter_shapes(text, width)
    tensors = {name: torch.randn(shape, generator=rng).bfloat16() for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    model = dataclasses.replace(ModelConfig.from_folder(nano_folder()), text=text, vision=None, audio=None)
    config = model.to_hf() | {
        "architectures": ["Gemma4UnifiedAssistantForCausalLM"],
        "model_type": MODEL_TYPE,
        "backbone_hidden_size": width,
        "use_ordered_embeddings": False,
    }
    config["text_config"] |= {"num_kv_shared_layers": text.num_hidden_layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(nano_folder() / name, folder / name)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "suppress_tokens": [21, 22]}', encoding="utf-8")
    return folder
