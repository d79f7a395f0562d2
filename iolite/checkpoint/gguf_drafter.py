"""A drafter's settings and tensors, in a folder or in a GGUF file.

A drafter is a decoder without keys and values of its own (it reads those of the model that it drafts for) between two
projections, from the model's width and back to it. Names of tensors here are those of its safetensors file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from iolite.checkpoint import gguf_metadata
from iolite.checkpoint.gguf_blocks import dequantize
from iolite.checkpoint.gguf_export import KINDS, Planned, Progress, fitting_kind, general_metadata, write_file
from iolite.checkpoint.gguf_names import ROPE, drafter_from_gguf, drafter_to_gguf
from iolite.checkpoint.gguf_source import open_gguf, rope_angles
from iolite.checkpoint.safetensors import SafetensorsFile
from iolite.config import ModelConfig, TextConfig, read_json
from iolite.errors import CheckpointError, ConfigError
from iolite.text.tokenizer import Tokenizer

MODEL_TYPE = "gemma4_unified_assistant"


@dataclass(frozen=True)
class Drafter:
    """A drafter: a decoder without keys and values of its own, and two projections from and to its model's width.

    shapes and `weight` are by the names in its safetensors file.
    """

    name: str
    text: TextConfig
    backbone_hidden_size: int
    tokenizer: Tokenizer
    shapes: Mapping[str, tuple[int, ...]]
    weight: Callable[[str], Tensor]


def read_drafter_config(folder: Path) -> tuple[TextConfig, int]:
    """(decoder, width of the model that it drafts for) of a drafter's folder. Raises ConfigError for another model."""
    data = read_json(folder / "config.json")
    text, width = data.get("text_config"), data.get("backbone_hidden_size")
    if data.get("model_type") != MODEL_TYPE or not isinstance(text, dict):
        raise ConfigError(f"config.json: model_type is {data.get('model_type')!r}, not {MODEL_TYPE!r}")
    layers = text.get("num_hidden_layers")
    if text.get("num_kv_shared_layers") != layers or data.get("use_ordered_embeddings"):
        raise ConfigError("config.json: only drafters whose layers all read their model's keys are supported")
    if type(width) is not int or not 0 < width <= 1 << 20:
        raise ConfigError(f"config.json: backbone_hidden_size must be a whole number, not {width!r}")
    own = dict(text) | {"num_kv_shared_layers": 0}
    return ModelConfig.from_hf({"model_type": "gemma4_unified", "text_config": own}).text, width


def drafter_shapes(text: TextConfig, backbone: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a drafter's safetensors file, with its shape."""
    hidden, ff = text.hidden_size, text.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (text.vocab_size, hidden)}
    for layer in range(text.num_hidden_layers):
        head_dim = text.layer_head_dim(layer)
        query = text.num_attention_heads * head_dim
        own = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.q_norm.weight": (head_dim,),
            "self_attn.o_proj.weight": (hidden, query),
            "post_attention_layernorm.weight": (hidden,),
            "pre_feedforward_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (ff, hidden),
            "mlp.up_proj.weight": (ff, hidden),
            "mlp.down_proj.weight": (hidden, ff),
            "post_feedforward_layernorm.weight": (hidden,),
            "layer_scalar": (1,),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes | {
        "model.norm.weight": (hidden,),
        "pre_projection.weight": (hidden, 2 * backbone),
        "post_projection.weight": (backbone, hidden),
    }


def open_drafter(folder: Path, tokenizer: Tokenizer | None = None) -> Drafter:
    """The drafter in a folder; its weights are mapped. `tokenizer`: its model's, for a folder without one.

    Raises CheckpointError for a tensor that is missing or of another shape.
    """
    text, backbone = read_drafter_config(folder)
    file, shapes = SafetensorsFile(folder / "model.safetensors"), drafter_shapes(text, backbone)
    for name, shape in shapes.items():
        if name not in file or file.shape(name) != shape:
            found = f"has the shape {list(file.shape(name))}" if name in file else "is missing"
            raise CheckpointError(f"{folder}: tensor {name} {found}; config.json makes it {list(shape)}")
    if extra := [name for name in file.keys() if name not in shapes]:  # noqa: SIM118 (not a dict)
        raise CheckpointError(f"{folder}: tensor {extra[0]} is not a part of a drafter")
    if tokenizer is None or (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_folder(folder)
    return Drafter(folder.name, text, backbone, tokenizer, shapes, file.tensor)


def open_gguf_drafter(path: Path) -> Drafter:
    """The drafter in a GGUF file; `weight` decodes a tensor. Raises CheckpointError for anything else."""
    prefix, file = gguf_metadata.DRAFTER, open_gguf(path, gguf_metadata.DRAFTER)
    tensors = {drafter_from_gguf(name): tensor for name, tensor in file.tensors.items() if name != ROPE}
    keys = gguf_metadata.Keys(file.metadata, prefix, path.name)
    layers, backbone = keys.get("block_count", int), keys.get("embedding_length_out", int)
    table = tensors.get("model.embed_tokens.weight")
    text_json = gguf_metadata.read_text_config(
        file.metadata,
        path.name,
        prefix=prefix,
        shares_kv=True,
        angles=rope_angles(file, prefix),
        vocab_size=table.shape[0] if table and table.shape else 0,
        more={"attention.shared_kv_layers": layers, "nextn_predict_layers": layers, "embedding_length_out": backbone},
    )
    text = ModelConfig.from_hf({"model_type": "gemma4_unified", "text_config": text_json}).text
    shapes = drafter_shapes(text, backbone)
    for name in shapes.keys() ^ tensors.keys():
        raise CheckpointError(f"{path.name}: tensor {name} is missing, or not a part of a drafter")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(f"{path.name}: {name} has the shape {list(tensors[name].shape)}, not {list(shape)}")

    def weight(name: str) -> Tensor:
        tensor = tensors[name]
        return dequantize(file.raw(tensor.name), tensor.type, tensor.shape)

    return Drafter(
        path.stem,
        text,
        backbone,
        gguf_metadata.read_tokenizer(file.metadata, path.name),
        shapes,
        weight,
    )


def write_drafter(path: Path, drafter: Drafter, to: str, progress: Progress | None = None) -> None:
    """A drafter as a GGUF file."""
    text, kind = drafter.text, KINDS[to]
    plan = [
        Planned(name, theirs, shape, "F32" if len(shape) == 1 else fitting_kind(kind, shape[-1]))
        for name, shape in drafter.shapes.items()
        if (theirs := drafter_to_gguf(name))
    ]
    own = {
        "attention.shared_kv_layers": text.num_hidden_layers,
        "embedding_length_out": drafter.backbone_hidden_size,
        "nextn_predict_layers": text.num_hidden_layers,
    }
    metadata = {
        **general_metadata(gguf_metadata.DRAFTER, "model", drafter.name, kind, plan),
        **gguf_metadata.text_metadata(text, gguf_metadata.DRAFTER),
        **{f"{gguf_metadata.DRAFTER}.{key}": value for key, value in own.items()},
        **gguf_metadata.tokenizer_metadata(drafter.tokenizer, text, None, None),
    }
    if text.final_logit_softcapping is None:  # a model's file must say so, a drafter's need not
        del metadata[f"{gguf_metadata.DRAFTER}.final_logit_softcapping"]
    write_file(path, metadata, plan, drafter.weight, text, progress)
