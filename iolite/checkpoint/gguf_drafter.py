"""A drafter's settings and tensors, in a folder or in a GGUF file.

A drafter is a decoder without keys and values of its own (it reads those of the model that it drafts for) between two
projections, from the model's width and back to it. Names of tensors here are those of its safetensors file. Matrices
may be packed: in a folder as `iolite/checkpoint/packed_folder.py` has it, in a GGUF file by its own types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from iolite.checkpoint import gguf_metadata, packed_folder
from iolite.checkpoint.folder import WEIGHT_FORMATS, read_quantization
from iolite.checkpoint.gguf_blocks import DECODED, PACKED, dequantize, repack
from iolite.checkpoint.gguf_export import KINDS, Planned, Progress, fitting_kind, general_metadata, write_file
from iolite.checkpoint.gguf_names import ROPE, drafter_from_gguf, drafter_to_gguf
from iolite.checkpoint.gguf_source import open_gguf, rope_angles
from iolite.checkpoint.safetensors import SafetensorsFile
from iolite.config import DRAFTER_TYPE as MODEL_TYPE
from iolite.config import ModelConfig, TextConfig, read_json
from iolite.errors import CheckpointError, ConfigError
from iolite.quant.formats import INT8, Format, PackedMatrix, format_of_tile, packed_shape
from iolite.text.tokenizer import Tokenizer

_HINT = "iolite drafts with the drafters of the Gemma 4 Unified family only"


class Kept(NamedTuple):
    """How a tensor is stored: the format's name, the bytes, and for a packed matrix iolite's format of it."""

    kind: str
    nbytes: int
    format: Format | None


@dataclass(frozen=True)
class DrafterSource:
    """A drafter that was found and whose headers were checked; no weight has been read.

    shapes, `stored`, `weight` (floats, whatever the file has) and `packed` (a packed matrix as it lies, None for
    floats) are by the names in its safetensors file. files are what the weights are read from; `populate` brings those
    that are mapped into memory. What never was in a file has none of them.
    """

    name: str
    text: TextConfig
    backbone_hidden_size: int
    read_tokenizer: Callable[[], Tokenizer]
    shapes: Mapping[str, tuple[int, ...]]
    weight: Callable[[str], Tensor]
    packed: Callable[[str], PackedMatrix | None] = lambda _: None
    stored: Mapping[str, Kept] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    populate: Callable[[], None] = lambda: None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.read_tokenizer()

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the tensors by the format that they are stored in."""
        sizes: dict[str, int] = {}
        for item in self.stored.values():
            sizes[item.kind] = sizes.get(item.kind, 0) + item.nbytes
        return sizes

    @property
    def scheme(self) -> str | None:
        """int4 or int8, after what most bytes of its matrices are packed in; None when none is packed."""
        sizes = {"int4": 0, "int8": 0}
        for item in self.stored.values():
            if item.format:
                sizes["int8" if item.format is INT8 else "int4"] += item.nbytes
        return max(sizes, key=lambda scheme: sizes[scheme]) if any(sizes.values()) else None


def read_drafter_config(folder: Path) -> tuple[TextConfig, int]:
    """(decoder, width of the model that it drafts for) of a drafter's folder. Raises ConfigError for another model."""
    data = read_json(folder / "config.json")
    text, width = data.get("text_config"), data.get("backbone_hidden_size")
    if data.get("model_type") != MODEL_TYPE or not isinstance(text, dict):
        raise ConfigError(f"config.json: model_type is {data.get('model_type')!r}, not {MODEL_TYPE!r}", _HINT)
    layers = text.get("num_hidden_layers")
    if text.get("num_kv_shared_layers") != layers or data.get("use_ordered_embeddings"):
        raise ConfigError("config.json: only drafters whose layers all read their model's keys are supported", _HINT)
    if type(width) is not int or not 0 < width <= 1 << 20:
        raise ConfigError(f"config.json: backbone_hidden_size must be a whole number, not {width!r}", _HINT)
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


def open_drafter(folder: Path, tokenizer: Tokenizer | None = None) -> DrafterSource:
    """The drafter in a folder; its weights are mapped. `tokenizer`: its model's, for a folder without one.

    Raises CheckpointError for a tensor that is missing, of another shape, or no weight.
    """
    text, backbone = read_drafter_config(folder)
    file, shapes = SafetensorsFile(folder / "model.safetensors"), drafter_shapes(text, backbone)
    quantization = read_quantization(folder)
    if quantization is not None:
        _check_quantization(folder, quantization)
    for name, shape in shapes.items():
        if name not in file:
            raise CheckpointError(f"{folder}: tensor {name} is missing; config.json makes it {list(shape)}")
        _check_tensor(folder, file, name, shape, packs=quantization is not None)
    if extra := [name for name in file.keys() if name not in shapes]:  # noqa: SIM118 (not a dict)
        raise CheckpointError(f"{folder}: tensor {extra[0]} is not a part of a drafter")

    def packed(name: str) -> PackedMatrix | None:
        return PackedMatrix(file.tensor(name), *shapes[name]) if file.dtype(name) == "U8" else None

    def weight(name: str) -> Tensor:
        matrix = packed(name)
        return file.tensor(name) if matrix is None else matrix.to_float()

    def read_tokenizer() -> Tokenizer:
        if tokenizer is None or (folder / "tokenizer.json").is_file():
            return Tokenizer.from_folder(folder)
        return tokenizer

    def stored(name: str) -> Kept:
        kind = file.dtype(name)
        format = format_of_tile(file.shape(name)[2]) if kind == "U8" else None
        return Kept(format.name if format else kind, file.nbytes(name), format)

    return DrafterSource(
        folder.name,
        text,
        backbone,
        read_tokenizer,
        shapes,
        weight,
        packed,
        {name: stored(name) for name in shapes},
        (file.path,),
        file.populate,
    )


def _check_quantization(folder: Path, found: Mapping[str, Any]) -> None:
    known = packed_folder.METHOD, packed_folder.VERSION
    if (found["quant_method"], found.get("version")) != known or found.get("scheme") not in packed_folder.SCHEMES:
        raise CheckpointError(
            f"{folder} holds a drafter packed by {found['quant_method']}, version {found.get('version')!r}, scheme "
            f"{found.get('scheme')!r}",
            "iolite reads drafters as floats, in its own int4 and int8 of version 1, and from GGUF files",
        )


def _check_tensor(folder: Path, file: SafetensorsFile, name: str, shape: tuple[int, ...], packs: bool) -> None:
    found, kind = file.shape(name), file.dtype(name)
    wanted = shape
    if packs and kind == "U8" and len(shape) == 2 and len(found) == 3:
        wanted = packed_shape(*shape, format_of_tile(found[2]))
    elif kind not in WEIGHT_FORMATS:
        raise CheckpointError(f"{folder}: tensor {name} is in {kind}, which is no weight")
    if found != wanted:
        raise CheckpointError(
            f"{folder}: tensor {name} has the shape {list(found)}; config.json makes it {list(wanted)}"
        )


def open_gguf_drafter(path: Path) -> DrafterSource:
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
        if (kind := tensors[name].type) not in DECODED or (len(shape) != 2 and kind in PACKED):
            raise CheckpointError(f"{path.name}: {name} is of the type {kind}, which is not supported there")

    def weight(name: str) -> Tensor:
        tensor = tensors[name]
        return dequantize(file.raw(tensor.name), tensor.type, tensor.shape)

    def packed(name: str) -> PackedMatrix | None:
        tensor = tensors[name]
        return repack(file.raw(tensor.name), tensor.type, *tensor.shape) if tensor.type in PACKED else None

    def read_tokenizer() -> Tokenizer:
        return gguf_metadata.read_tokenizer(file.metadata, path.name)

    found = {name: tensors[name] for name in shapes}
    stored = {name: Kept(tensor.type, tensor.nbytes, PACKED.get(tensor.type)) for name, tensor in found.items()}
    return DrafterSource(path.stem, text, backbone, read_tokenizer, shapes, weight, packed, stored, (path,))


def write_drafter(path: Path, drafter: DrafterSource, to: str, progress: Progress | None = None) -> None:
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
