"""Models of a true shape with random weights, for planning and benchmarks: the size and speed of a real one.

`SyntheticSource` is a `Source` like a folder, so it is written by the same code; each tensor is made when its turn has
come and then let go. Packed matrices are random tiles and never were floats.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iolite.checkpoint import names
from iolite.checkpoint.files import replacing
from iolite.checkpoint.gguf_drafter import MODEL_TYPE as DRAFTER_TYPE
from iolite.checkpoint.gguf_drafter import drafter_shapes
from iolite.checkpoint.hub import nano_folder
from iolite.checkpoint.safetensors import streaming
from iolite.checkpoint.source import Progress
from iolite.config import GenerationConfig, ModelConfig, ProcessorConfig, TextConfig, read_json
from iolite.errors import UsageError
from iolite.quant.formats import BLOCK, Format, PackedMatrix, packed_bytes, packed_shape
from iolite.quant.schemes import format_for
from iolite.text.template import ChatTemplate
from iolite.text.tokenizer import SPECIAL_TOKENS, Tokenizer

# The published config of the 12B; the rest is what every config of the family says and `ModelConfig` fills in.
_12B: dict[str, Any] = {
    "model_type": "gemma4_unified",
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
    "eos_token_id": [1, 106],
    "text_config": {
        "model_type": "gemma4_unified_text",
        "vocab_size": 262_144,
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 8,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 262_144,
    },
    "vision_config": {
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "mm_embed_dim": 3840,
        "mm_posemb_size": 1120,
        "output_proj_dims": 3840,
        "rms_norm_eps": 1e-6,
    },
    "audio_config": {"audio_embed_dim": 640, "rms_norm_eps": 1e-6},
}
# What differs from the 12B: (of the config's own keys, text_config, vision_config).
_SMALLER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "12b": ({}, {}),
    "small": (
        {
            "vocab_size": 16_384,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 12,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "global_head_dim": 256,
        },
        {"mm_embed_dim": 1024, "output_proj_dims": 1024},
    ),
    "tiny": (
        {
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "global_head_dim": 64,
            "sliding_window": 256,
            "max_position_embeddings": 8192,
        },
        {"mm_embed_dim": 128, "output_proj_dims": 128},
    ),
}
SHAPES = tuple(_SMALLER)

# Ids of the published tokenizer. A vocabulary too small for them has its special tokens at the beginning.
_PUBLISHED_IDS = {
    **{"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4},
    **{"<|tool>": 46, "<tool|>": 47, "<|tool_call>": 48, "<tool_call|>": 49, "<|tool_response>": 50},
    **{"<tool_response|>": 51, '<|"|>': 52, "<|think|>": 98, "<|channel>": 100, "<channel|>": 101},
    **{"<|turn>": 105, "<turn|>": 106, "<|image>": 255_999, "<|audio>": 256_000, "<|image|>": 258_880},
    **{"<|audio|>": 258_881, "<image|>": 258_882, "<audio|>": 258_883, "<|video|>": 258_884},
}
_WORDS = ("user", "model", "system", "thought")  # what the template writes; all else is single characters
_FIRST_BYTE = 238  # of the 256 byte tokens in the published vocabulary


def config_of(shape: str | Path) -> ModelConfig:
    """The config of one of SHAPES or of a config.json. Raises UsageError for a name that is neither."""
    if str(shape) not in SHAPES:
        path = Path(shape)
        if not path.is_file():
            raise UsageError(f"there is no shape {str(shape)!r}", f"use {', '.join(SHAPES)} or a config.json")
        return ModelConfig.from_hf(read_json(path))
    text, vision = _SMALLER[str(shape)]
    data = dict(_12B)
    data["text_config"] = _12B["text_config"] | text
    data["vision_config"] = _12B["vision_config"] | vision
    ids = special_ids(data["text_config"]["vocab_size"])
    data |= {
        "image_token_id": ids["<|image|>"],
        "audio_token_id": ids["<|audio|>"],
        "video_token_id": ids["<|video|>"],
        "boi_token_id": ids["<|image>"],
        "eoi_token_id": ids["<image|>"],
        "boa_token_id": ids["<|audio>"],
        "eoa_token_index": ids["<audio|>"],
        "eos_token_id": [ids["<eos>"], ids["<turn|>"]],
    }
    return ModelConfig.from_hf(data)


def special_ids(vocab_size: int) -> dict[str, int]:
    """Where the special tokens stand in a synthetic vocabulary."""
    if vocab_size > max(_PUBLISHED_IDS.values()):
        return _PUBLISHED_IDS
    return {token: i for i, token in enumerate(SPECIAL_TOKENS)}


class SyntheticSource:
    """Random weights of a config. The same seed gives the same model.

    scheme "int4" or "int8" packs what that scheme packs; None makes bfloat16.
    """

    def __init__(self, config: ModelConfig, scheme: str | None, seed: int = 0, name: str = "synthetic") -> None:
        self.config, self.scheme, self.name, self.folder = config, scheme, name, nano_folder()
        self.seed = seed
        self.files: list[Path] = []

    def names(self) -> list[str]:
        return list(names.expected_shapes(self.config))

    def packed_formats(self) -> Mapping[str, Format]:
        shapes = names.expected_shapes(self.config)
        found = {n: self.scheme and format_for(n, shape, self.scheme) for n, shape in shapes.items()}
        return {name: format for name, format in found.items() if format}

    def sizes(self) -> Mapping[str, int]:
        return {}  # nothing is stored

    def num_bytes(self) -> int:
        """What the tensors take when they are made."""
        formats, total = self.packed_formats(), 0
        for name, shape in names.expected_shapes(self.config).items():
            total += packed_bytes(shape[0], shape[1], formats[name]) if name in formats else 2 * math.prod(shape)
        return total

    def weight(self, name: str) -> Tensor | PackedMatrix:
        shape = names.expected_shapes(self.config)[name]
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
        format = format_for(name, shape, self.scheme) if self.scheme else None
        if format:
            rows, cols = shape
            return random_matrix(rows, cols, format, generator)
        return random_floats(name, shape, generator)

    def release(self) -> None:
        pass

    def tokenizer(self) -> Tokenizer:
        return synthetic_tokenizer(self.config.text.vocab_size)

    def template(self) -> ChatTemplate:
        return ChatTemplate.from_folder(self.folder)

    def processor(self) -> ProcessorConfig:
        return ProcessorConfig.from_hf({}, self.config)

    def generation(self) -> GenerationConfig:
        ids = special_ids(self.config.text.vocab_size)
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_p=0.95,
            top_k=64,
            eos_token_ids=(ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]),
            suppress_tokens=(ids["<image|>"], ids["<audio|>"]),
        )


def random_matrix(rows: int, cols: int, format: Format, generator: torch.Generator) -> PackedMatrix:
    """Random tiles, of the size that keeps a normalised input's outputs at about 1."""
    shape = packed_shape(rows, cols, format)
    data = torch.empty(math.prod(shape), dtype=torch.uint8)
    data.view(torch.int64).random_(-(2**63), None, generator=generator)  # all 64 bits: by default the sign is not drawn
    data = data.view(shape)
    # Uniform quants of b bits have a deviation of 2^b / sqrt(12). Signs at random take away the mean of -1/2.
    size = math.sqrt(12 / cols) / 2**format.bits
    blocks = data[..., format.quant_bytes :].view(torch.int16)
    signs = blocks & -0x8000
    blocks.copy_(torch.tensor(size, dtype=torch.float16).view(torch.int16) | signs)
    if cols % BLOCK or cols % 64 or rows % 16:
        _clear_padding(data, rows, cols, format)
    return PackedMatrix(data, rows, cols)


def _clear_padding(data: Tensor, rows: int, cols: int, format: Format) -> None:
    """Scales of rows and blocks beyond the matrix are zero; a block that is only partly there is made of whole numbers
    that meet zeros."""
    scales = data[..., format.quant_bytes : format.quant_bytes + 64].view(torch.int16).unflatten(-1, (2, 16))
    if rows % 16:
        scales[-1, :, :, rows % 16 :] = 0
    if 0 < cols % 64 <= BLOCK:
        scales[:, -1, 1] = 0


def random_floats(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """bfloat16: ones for norms and scalars, zeros for biases, and normal numbers that keep outputs at about 1."""
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if name.endswith("q_norm.weight"):  # scores of about 1: with larger ones every token looks at one other only
        return torch.full(shape, shape[0] ** -0.5, dtype=torch.bfloat16)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    out = torch.empty(shape, dtype=torch.bfloat16)
    deviation = 0.02 if "pos_embedding" in name else shape[-1] ** -0.5
    for part in out.flatten(0, -2).split(4096):  # normal numbers are drawn as float32
        part.copy_(torch.empty(part.shape).normal_(std=deviation, generator=generator))
    return out


def synthetic_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of the family's kind: special tokens at their ids, bytes, single letters, and unused names."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers

    special = special_ids(vocab_size)
    taken = {i: token for token, i in special.items()}
    first = _FIRST_BYTE if special is _PUBLISHED_IDS else len(special)
    if vocab_size < first + 256 + 100:
        raise UsageError(f"a vocabulary of {vocab_size} has no room for bytes and letters", "use at least 400")
    taken |= {first + byte: f"<0x{byte:02X}>" for byte in range(256)}
    steps = [word[:end] for word in _WORDS for end in range(2, len(word) + 1)]
    words = ["\n", "▁", *(chr(code) for code in range(0x21, 0x7F)), *steps]
    free = (i for i in range(first + 256, vocab_size) if i not in taken)
    taken |= dict(zip(free, words, strict=False))
    vocab = {taken.get(i, f"<unused{i}>"): i for i in range(vocab_size)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [(step[:-1], step[-1]) for step in steps], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return Tokenizer(backend)


def write_card(folder: Path, source: SyntheticSource, shape: str) -> None:
    """README.md, which says that the weights are random."""
    total = sum(math.prod(s) for n, s in names.expected_shapes(source.config).items() if not names.is_buffer(n))
    text = (
        f"# A synthetic model\n\nThe shape {shape} of Gemma 4 Unified, {total:,} parameters, "
        f"{source.scheme or 'bfloat16'}, with **random weights** (seed {source.seed}).\n\n"
        "Made by `iolite init` for planning and benchmarks: it takes the memory and the time of a real model and says "
        "nothing. Its tokenizer knows single characters only.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_drafter(folder: Path, source: SyntheticSource, progress: Progress | None = None) -> None:
    """A drafter of random weights for the model, in the published layout, bfloat16."""
    text, width = drafter_config(source.config), source.config.text.hidden_size
    shapes = drafter_shapes(text, width)
    folder.mkdir(parents=True, exist_ok=True)
    with streaming(folder / "model.safetensors", {"format": "pt"}, list(shapes)) as out:
        for done, (name, shape) in enumerate(shapes.items()):
            if progress:
                progress(done, len(shapes), f"drafter: {name}")
            generator = torch.Generator().manual_seed(source.seed + zlib.crc32(name.encode()))
            out.write(name, random_floats(name, shape, generator))
    inner = ModelConfig.from_hf({"model_type": "gemma4_unified", "text_config": _text_dict(text)}).to_hf()
    data = {
        "architectures": ["Gemma4UnifiedAssistantForCausalLM"],
        "model_type": DRAFTER_TYPE,
        "dtype": "bfloat16",
        "backbone_hidden_size": width,
        "use_ordered_embeddings": False,
        "tie_word_embeddings": True,
        "text_config": inner["text_config"] | {"num_kv_shared_layers": text.num_hidden_layers},
    }
    with replacing(folder / "config.json") as file:
        file.write((json.dumps(data, indent=2) + "\n").encode())


def drafter_config(config: ModelConfig) -> TextConfig:
    """Four layers over the model's last sliding and last full layer; a quarter of its width, or so."""
    own = config.text
    width = max(64, own.hidden_size * 1024 // 3840 // 64 * 64)
    return ModelConfig.from_hf(
        {
            "model_type": "gemma4_unified",
            "text_config": _text_dict(own)
            | {
                "hidden_size": width,
                "intermediate_size": 8 * width,
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
                "final_logit_softcapping": None,
            },
        }
    ).text


def _text_dict(text: TextConfig) -> dict[str, Any]:
    bare = ModelConfig.from_hf({"model_type": "gemma4_unified", "text_config": dict(_12B["text_config"])})
    import dataclasses

    found: dict[str, Any] = dataclasses.replace(bare, text=text).to_hf()["text_config"]
    return found
