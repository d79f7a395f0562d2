"""From one format of a checkpoint to another: folders and GGUF files, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iolite.checkpoint import names, packed_folder
from iolite.checkpoint.files import replacing
from iolite.checkpoint.folder import INDEX, WEIGHTS
from iolite.checkpoint.gguf_drafter import open_drafter, write_drafter
from iolite.checkpoint.gguf_export import KINDS, Contents, mmproj_name, write_embedders, write_model
from iolite.checkpoint.safetensors import streaming
from iolite.checkpoint.source import Progress, Source
from iolite.errors import CheckpointError, UsageError
from iolite.quant.formats import PackedMatrix
from iolite.text.template import COMPLETION_TEMPLATE
from iolite.text.tokenizer import SPECIAL_TOKENS, tokenizer_config

_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Beside:
    """What is written beside a GGUF model: its embedders, and the drafter in this folder."""

    embedders: bool = True
    drafter: Path | None = None


def drafter_to_gguf(folder: Path, path: Path, to: str | None, progress: Progress | None = None) -> list[Path]:
    """Writes the drafter in a folder as a GGUF file; -> the file."""
    write_drafter(path, open_drafter(folder), to or "bf16", progress)
    return [path]


def to_gguf(source: Source, path: Path, to: str | None, beside: Beside, progress: Progress | None = None) -> list[Path]:
    """Writes a model as the GGUF file `path`, and what belongs to it beside; -> the files.

    to: one of `gguf_export.KINDS`; None: as the source has it, bf16 for floats and q4_0 or q8_0 for packed weights.
    """
    contents = contents_of(source)
    to = to or {None: "bf16", "int4": "q4_0", "int8": "q8_0"}[source.scheme]
    assert to in KINDS
    write_model(path, contents, to, progress)
    written = [path]
    if beside.embedders and (source.config.vision or source.config.audio):
        written.append(mmproj_name(path))
        write_embedders(written[-1], contents, to, progress)
    if beside.drafter is not None:
        written.append(path.with_name(f"mtp-{path.name}"))
        write_drafter(written[-1], open_drafter(beside.drafter, contents.tokenizer), to, progress)
    return written


def contents_of(source: Source) -> Contents:
    """What goes into GGUF files; tensors are read when it is their turn, and let go before the next."""

    def weight(name: str) -> Tensor | PackedMatrix:
        source.release()
        return source.weight(name)

    return Contents(
        name=source.folder.resolve().name if source.folder == Path(source.name) else source.name,
        config=source.config,
        tokenizer=source.tokenizer(),
        template=source.template(),
        generation=source.generation(),
        processor=source.processor(),
        weight=weight,
        packed=source.packed_formats(),
    )


def to_folder(source: Source, folder: Path, to: str | None, progress: Progress | None = None) -> list[Path]:
    """Writes a model as a folder in the Hugging Face layout, config.json last; -> the folder.

    to: f32, f16 or bf16 for floats; None: as the source has it, packed matrices in iolite's own packed layout.
    """
    if to is not None and to not in _FLOATS:
        raise UsageError(f"a folder cannot hold {to}", "use f32, f16 or bf16, or `iolite quantize` for packed weights")
    if (folder / "config.json").exists() and folder.resolve() == source.folder.resolve():
        raise UsageError(f"{folder} is where the model is read from", "write into another folder")
    config, scheme = source.config, None if to else source.scheme
    config = replace(config, dtype=_FLOATS[to] if to else config.dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror})") from None
    for old in (*folder.glob("model*.safetensors"), folder / INDEX, folder / "config.json"):
        old.unlink(missing_ok=True)  # an earlier model's must not be taken for this one's
    _write_settings(source, folder)
    metadata = {"format": "pt"}  # Transformers refuses a file without it
    published = [names.published(name) for name in source.names()]
    with streaming(folder / WEIGHTS, metadata, published) as out:
        for name, tensor in _weights(source, config.dtype, scheme, progress):
            out.write(names.published(name), tensor)
    data = config.to_hf() | ({"quantization_config": packed_folder.quantization_config(scheme)} if scheme else {})
    _write_json(folder / "config.json", data)
    return [folder]


def _weights(source: Source, dtype: str, scheme: str | None, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they are stored: packed bytes first, so that they are aligned, then floats."""
    packed = source.packed_formats()
    order = sorted(source.names(), key=lambda name: name not in packed)
    for done, name in enumerate(order):
        if progress:
            progress(done, len(order), name)
        weight = source.weight(name)
        if isinstance(weight, PackedMatrix):
            weight = weight.data if scheme else weight.to_float()
        yield name, weight if weight.dtype is torch.uint8 else weight.to(getattr(torch, dtype))
        source.release()


def _write_settings(source: Source, folder: Path) -> None:
    """All but config.json and the weights, in the files of the Hugging Face layout."""
    tokenizer, template = source.tokenizer(), source.template().source
    _write_text(folder / "tokenizer.json", tokenizer.to_json())
    special = {token: name for token, name in SPECIAL_TOKENS.items() if tokenizer.token_id(token) is not None}
    _write_json(folder / "tokenizer_config.json", tokenizer_config(special))
    if template != COMPLETION_TEMPLATE:
        _write_text(folder / "chat_template.jinja", template)
    _write_json(folder / "generation_config.json", source.generation().to_hf())
    _write_json(folder / "processor_config.json", source.processor().to_hf())


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
