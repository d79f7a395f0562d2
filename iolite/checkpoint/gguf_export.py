"""Writing GGUF files that llama.cpp runs: the decoder, the embedders (mmproj), the drafter; tensor by tensor.

Keys, names and types are those of llama.cpp's own converter. Norms, biases, the vision embedder and its positions are
stored in float32, the projections of the embedders in the floats that were asked for, and the decoder's matrices as

    f32, f16, bf16   floats; packed weights are decoded
    q8_0             as ggml quantises them; packed 8-bit weights are re-ordered, no bit is lost
    q4_0             on the lattice where the weights lie on one (quantisation-aware training), else with the scale of
                     least error; packed weights keep their own type (int4 Q4_0, int4m Q4_1, int8 Q8_0), no bit is
                     lost. A float vocabulary table becomes Q8_0: it is the head as well, and costs more than it saves.

A matrix whose rows are not whole blocks of 32 is stored as bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iolite.checkpoint import gguf_metadata, names
from iolite.checkpoint.gguf import create_gguf
from iolite.checkpoint.gguf_blocks import encode
from iolite.checkpoint.gguf_names import ROPE, gguf_shape, to_gguf, to_gguf_layout
from iolite.config import FULL, GenerationConfig, ModelConfig, ProcessorConfig, TextConfig
from iolite.errors import CheckpointError
from iolite.quant.formats import (
    BLOCK,
    INT4,
    INT4M,
    INT8,
    TILE_ROWS,
    Blocks,
    Format,
    PackedMatrix,
    unpack,
)
from iolite.quant.formats import encode as quantise_blocks
from iolite.text.template import COMPLETION_TEMPLATE, ChatTemplate
from iolite.text.tokenizer import Tokenizer

KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_PACKED_AS = {INT4: "Q4_0", INT4M: "Q4_1", INT8: "Q8_0"}
_TABLES = (names.EMBEDDING, names.LM_HEAD)
_CHUNK = 1 << 22  # values written at a time

Progress = Callable[[int, int, str], None]
Weight = Tensor | PackedMatrix


@dataclass(frozen=True)
class Contents:
    """What goes into the files. `weight` gives a tensor by our name when it is its turn; `packed` says beforehand
    which of them it will give packed, and how."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    generation: GenerationConfig
    processor: ProcessorConfig
    weight: Callable[[str], Weight]
    packed: Mapping[str, Format] = field(default_factory=dict)


def mmproj_name(model: Path) -> Path:
    """Where the embedders of a model's file are written."""
    return model.with_name(f"mmproj-{model.name}")


def write_model(path: Path, contents: Contents, to: str, progress: Progress | None = None) -> None:
    """The decoder, with tokenizer, template and settings, as a GGUF file. `to` is one of KINDS."""
    config, template = contents.config, contents.template.source
    plan = [
        Planned(name, to_gguf(name), shape, _decoder_kind(name, shape, KINDS[to], contents.packed.get(name)))
        for name, shape in names.expected_shapes(config).items()
        if names.part(name) not in ("vision", "audio")
    ]
    metadata = {
        **general_metadata(gguf_metadata.MODEL, "model", contents.name, KINDS[to], plan),
        **gguf_metadata.sampling_metadata(contents.generation),
        **gguf_metadata.text_metadata(config.text, gguf_metadata.MODEL),
        **gguf_metadata.tokenizer_metadata(
            contents.tokenizer,
            config.text,
            contents.generation.suppress_tokens,
            None if template == COMPLETION_TEMPLATE else template,
        ),
    }
    write_file(path, metadata, plan, contents.weight, config.text, progress)


def write_embedders(path: Path, contents: Contents, to: str, progress: Progress | None = None) -> None:
    """The embedders of pictures and sounds as a mmproj file. Raises CheckpointError for a model without any, and for
    sizes that llama.cpp has fixed otherwise."""
    config = contents.config
    shapes = {n: s for n, s in names.expected_shapes(config).items() if names.part(n) in ("vision", "audio")}
    if not shapes:
        raise CheckpointError(f"{contents.name} reads text only: there are no embedders to write")
    projection = KINDS[to] if to in ("f32", "f16") else "BF16"
    plan = [
        Planned(name, to_gguf(name), gguf_shape(name, shape), projection if "projection" in name else "F32")
        for name, shape in shapes.items()
    ]
    metadata = {
        **general_metadata(gguf_metadata.EMBEDDERS, "mmproj", contents.name, projection, plan),
        **gguf_metadata.embedder_metadata(config),
    }
    if (settings := gguf_metadata.processor_json(contents.processor, config)) is not None:
        metadata[gguf_metadata.PROCESSOR] = settings
    write_file(
        path, metadata, plan, lambda name: to_gguf_layout(name, _as_float(contents.weight(name))), None, progress
    )


@dataclass(frozen=True)
class Planned:
    """One tensor to write: our name, theirs, its shape in the file, its type there."""

    name: str
    theirs: str
    shape: tuple[int, ...]
    kind: str


def general_metadata(architecture: str, kind: str, name: str, stored: str, plan: Sequence[Planned]) -> dict[str, Any]:
    """The keys that every file has; `stored` is the type of most of its matrices."""
    return {
        "general.architecture": architecture,
        "general.type": kind,
        "general.name": Path(name).name,
        "general.size_label": _size_label(sum(math.prod(tensor.shape) for tensor in plan)),
        "general.file_type": gguf_metadata.FILE_TYPES[stored],
        "general.quantization_version": 2,
    }


def _size_label(values: int) -> str:
    """12B, 3.2M: two digits, as llama.cpp's files say it."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if values >= unit or letter == "K":
            scaled = values / unit
            return f"{scaled:.{0 if round(scaled) >= 10 else 1}f}{letter}"
    raise AssertionError


def _decoder_kind(name: str, shape: tuple[int, ...], wanted: str, packed: Format | None) -> str:
    if len(shape) == 1:
        return "F32"
    if packed is not None and (wanted == "Q4_0" or (packed == INT8 and wanted == "Q8_0")):
        return fitting_kind(_PACKED_AS[packed], shape[-1])
    return fitting_kind("Q8_0" if wanted == "Q4_0" and name in _TABLES else wanted, shape[-1])


def fitting_kind(kind: str, cols: int) -> str:
    """The type that rows of `cols` values can have."""
    return "BF16" if kind.startswith("Q") and cols % BLOCK else kind


def write_file(
    path: Path,
    metadata: Mapping[str, Any],
    plan: Sequence[Planned],
    weight: Callable[[str], Weight],
    rope: TextConfig | None,
    progress: Progress | None,
) -> None:
    """The file; with rope's frequencies in front if the decoder has full layers."""
    tensors = [(tensor.theirs, tensor.shape, tensor.kind) for tensor in plan]
    freqs = None
    if rope is not None and FULL in rope.layer_types:
        freqs = torch.from_numpy(gguf_metadata.rope_freqs(rope))
        tensors.insert(0, (ROPE, tuple(freqs.shape), "F32"))
    with create_gguf(path, metadata, tensors) as writer:
        if freqs is not None:
            writer.write(ROPE, freqs.view(torch.uint8))
        for done, tensor in enumerate(plan):
            if progress:
                progress(done, len(plan), tensor.name)
            for raw in _encoded(tensor, weight(tensor.name)):
                writer.write(tensor.theirs, raw)


def _encoded(tensor: Planned, weight: Weight) -> Iterator[Tensor]:
    """The bytes of a tensor, some rows at a time. Raises CheckpointError for weights that its type cannot hold."""
    parts = _row_parts(weight) if isinstance(weight, PackedMatrix) or weight.ndim == 2 else iter([weight])
    for part in parts:
        try:
            if isinstance(part, PackedMatrix) and _PACKED_AS[part.format] == tensor.kind:
                yield block_bytes(unpack(part))
            elif tensor.kind == "Q4_0":
                yield block_bytes(quantise_blocks(_as_float(part), INT4))
            else:
                yield encode(_as_float(part), tensor.kind)
        except ValueError as error:
            raise CheckpointError(f"cannot write {tensor.name}: {error}") from None


def _row_parts(weight: Weight) -> Iterator[Weight]:
    """Some rows at a time, a multiple of a tile's."""
    rows, cols = weight.shape
    step = max(1, _CHUNK // (cols * TILE_ROWS)) * TILE_ROWS
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if isinstance(weight, PackedMatrix):
            yield PackedMatrix(weight.data[start // TILE_ROWS : -(-stop // TILE_ROWS)], stop - start, cols)
        else:
            yield weight[start:stop]


def _as_float(weight: Weight) -> Tensor:
    return weight.to_float() if isinstance(weight, PackedMatrix) else weight


def block_bytes(blocks: Blocks) -> Tensor:
    """The bytes of Q4_0, Q4_1 or Q8_0 that hold exactly these blocks, whose rows are whole ones: uint8."""
    quants = blocks.quants.unflatten(1, (-1, BLOCK))  # [R, B, 32]
    if blocks.format == INT8:
        body = quants.view(torch.uint8)
    else:
        body = quants[..., : BLOCK // 2] | (quants[..., BLOCK // 2 :] << 4)
    heads = [s.contiguous()[..., None].view(torch.uint8) for s in (blocks.scales, blocks.mins) if s is not None]
    return torch.cat((*heads, body), dim=-1).flatten()
