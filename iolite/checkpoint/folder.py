"""A model's folder in the Hugging Face layout: config.json, weights in one safetensors file or in shards, settings.

Nothing in a folder is executed: it is JSON, safetensors and a template, and pickled weights are refused. Every name,
shape and format is checked before the model is made, so a wrong checkpoint costs no time and no memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iolite.checkpoint import names
from iolite.checkpoint.files import replacing
from iolite.checkpoint.safetensors import DTYPES, SafetensorsFile, save_safetensors
from iolite.config import DRAFTER_TYPE, GenerationConfig, ModelConfig, ProcessorConfig, read_json
from iolite.errors import CheckpointError

if TYPE_CHECKING:  # a folder is described (`iolite show`, `iolite list`) without importing torch
    import torch

    from iolite.model.unified import Unified

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FORMATS = ("F32", "BF16", "F16")
QUANT_METHODS = ("iolite", "compressed-tensors")

# What a fine-tuned model takes over from the one it began as.
SETTINGS = ("generation_config.json", "processor_config.json", "preprocessor_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: the file, and what the file calls it."""

    file: SafetensorsFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.name)

    @property
    def dtype(self) -> str:
        return self.file.dtype(self.name)

    @property
    def nbytes(self) -> int:
        return self.file.nbytes(self.name)

    def tensor(self) -> torch.Tensor:
        return self.file.tensor(self.name)


def load_folder(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> tuple[ModelConfig, Unified]:
    """The config and the model with its weights, in `dtype` (the config's own when None) on `device`.

    Weights that stay on the CPU in the file's own format are views of the mapped file and take no memory until they
    are used; all others are converted one by one. Raises ConfigError or CheckpointError before any weight is read.
    """
    import torch

    from iolite.checkpoint.assemble import empty_network

    folder = Path(path)
    config = read_config(folder)
    stored = open_weights(folder)
    check_weights(config, stored)
    wanted = _torch_dtype(config.dtype if dtype is None else dtype)
    if config.tie_word_embeddings and names.LM_HEAD in stored:
        head = stored.pop(names.LM_HEAD).tensor()
        if not torch.equal(head, stored[names.EMBEDDING].tensor()):
            raise CheckpointError("config.json ties the head to the embedding, but lm_head.weight differs from it")
    model = empty_network(config)
    state = {name: item.tensor().to(device=device, dtype=wanted) for name, item in stored.items()}
    model.load_state_dict(state, assign=True)
    return config, model


def save_folder(
    path: str | os.PathLike[str],
    model: Unified,
    config: ModelConfig,
    *,
    generation: GenerationConfig | None = None,
    processor: ProcessorConfig | None = None,
    base: Path | None = None,
    max_shard_bytes: int = 50_000_000_000,
) -> None:
    """Writes a folder that this program, Transformers and others load; config.json comes last and completes it.

    Tokenizer, template and settings are copied from the folder `base`; settings given as objects replace the copied
    ones. More than max_shard_bytes of weights are split into shards of at most that size (one tensor at least).
    """
    folder = Path(path)
    state = model.state_dict()
    expected = names.expected_shapes(config)
    assert {name: tuple(t.shape) for name, t in state.items()} == expected, "the model does not fit its config"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if base is not None:
            _copy_settings(base, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror})") from None
    _save_weights(folder, {names.published(name): state[name] for name in expected}, max_shard_bytes)
    if generation is not None:
        _save_json(folder / "generation_config.json", generation.to_hf())
    if processor is not None:
        _save_json(folder / "processor_config.json", processor.to_hf())
    dtype = str(state[names.EMBEDDING].dtype).removeprefix("torch.")
    _save_json(folder / "config.json", dataclasses.replace(config, dtype=dtype).to_hf())


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """The config's `quantization_config`, None for float weights; CheckpointError for a method that we do not read."""
    found = read_json(folder / "config.json").get("quantization_config")
    if found is None or found == {}:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method not in QUANT_METHODS:
        raise CheckpointError(
            f"{folder} holds weights that were quantised by {str(method)[:40]!r}",
            f"iolite reads {', '.join(WEIGHT_FORMATS)}, GGUF, compressed-tensors w4a16 and its own packed weights",
        )
    return found


def read_config(folder: Path) -> ModelConfig:
    """The folder's config.json; raises ConfigError for another architecture and CheckpointError for packed weights."""
    config = ModelConfig.from_folder(folder)
    if read_json(folder / "config.json").get("quantization_config"):
        raise CheckpointError(
            f"{folder} holds quantised weights", f"iolite reads {', '.join(WEIGHT_FORMATS)} checkpoints"
        )
    return config


def is_drafter(folder: Path) -> bool:
    """Whether a folder holds a drafter, by its config.json."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == DRAFTER_TYPE


def open_weights(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder by our name, its file's header checked. Imports no torch.

    Raises CheckpointError for missing, pickled or damaged files and for an index that does not say what they hold.
    """
    files = {path.name: SafetensorsFile(path) for path in weight_files(folder)}
    if not (folder / WEIGHTS).exists():
        _check_index(_weight_map(folder), files)
    stored: dict[str, Stored] = {}
    for file in files.values():
        for name in file.keys():  # noqa: SIM118 (not a dict)
            ours = names.from_file(name)
            if ours in stored:
                raise CheckpointError(f"tensor {name} is there twice, the other time as {stored[ours].name}")
            stored[ours] = Stored(file, name)
    return stored


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, all of them present; the one-file form goes before an index, as in
    Transformers. Raises CheckpointError when there are none, or not all."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        paths = [folder / shard for shard in sorted(set(_weight_map(folder).values()))]
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(paths)} weight files are missing in {folder}, the first is {missing[0]}",
                "the download may be incomplete: `iolite pull` continues it",
            )
        return paths
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickled = [name for name in present if name.endswith(_PICKLED)]
    if pickled:
        raise CheckpointError(
            f"{folder} has its weights as pickle ({pickled[0]}), which can run any code when it is read",
            "use a safetensors version of this model",
        )
    gguf = [name for name in present if name.lower().endswith(".gguf")]
    if gguf:
        raise CheckpointError(f"{folder} holds GGUF weights ({gguf[0]})", "iolite reads safetensors weights")
    raise CheckpointError(f"{folder} holds no weights", f"expected {WEIGHTS} or {INDEX}")


def check_weights(config: ModelConfig, stored: Mapping[str, Stored]) -> None:
    """Raises CheckpointError unless the tensors are exactly those the config asks for, in a format we compute in."""
    expected = names.expected_shapes(config)
    tied_head = {names.LM_HEAD} if config.tie_word_embeddings else set()  # some programs write it all the same
    for name in tied_head & stored.keys():
        expected[name] = expected[names.EMBEDDING]
    packed = sorted({item.dtype for item in stored.values()} - set(WEIGHT_FORMATS))
    if packed:
        raise CheckpointError(
            f"weights in {', '.join(packed)} are not supported", f"iolite reads {', '.join(WEIGHT_FORMATS)}"
        )
    check_names(expected, stored)
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"tensor {stored[name].name} has the shape {list(stored[name].shape)}, "
                f"but config.json makes it {list(shape)}"
            )


def check_names(expected: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Raises CheckpointError unless just the expected tensors are there, by our names."""
    missing = [names.published(name) for name in expected if name not in stored]
    unexpected = [item.name for name, item in stored.items() if name not in expected]
    for fault, which in (("missing from the weights", missing), ("not a part of this architecture", unexpected)):
        if which:
            raise CheckpointError(f"{_some(which)} {fault}")


def _some(which: list[str]) -> str:
    if len(which) == 1:
        return f"tensor {which[0]} is"
    return f"{len(which)} tensors ({', '.join(which[:3])}{', …' if len(which) > 3 else ''}) are"


def _weight_map(folder: Path) -> dict[str, str]:
    """The index's `weight_map`, tensor -> file. A file must be a plain name in this very folder."""
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{INDEX} has no weight_map")
    for shard in found.values():
        plain = isinstance(shard, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", shard)
        if not plain:
            raise CheckpointError(f"{INDEX} names the file {shard!r}", "a shard must be a file of the same folder")
    return found


def _check_index(weight_map: Mapping[str, str], files: Mapping[str, SafetensorsFile]) -> None:
    for name, shard in weight_map.items():
        if name not in files[shard]:
            raise CheckpointError(f"{INDEX} says that {shard} holds {name}, but it does not")
    for shard, file in files.items():
        extra = [name for name in file.keys() if weight_map.get(name) != shard]  # noqa: SIM118 (not a dict)
        if extra:
            raise CheckpointError(f"{shard} holds {extra[0]}, which {INDEX} does not say")


def _torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    import torch

    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    formats = {getattr(torch, DTYPES[name][0]) for name in WEIGHT_FORMATS}
    if not isinstance(wanted, torch.dtype) or wanted not in formats:
        raise CheckpointError(f"weights cannot be held in {dtype!r}", "use float32, bfloat16 or float16")
    return wanted


def _copy_settings(base: Path, folder: Path) -> None:
    for name in (*TOKENIZER, *SETTINGS):
        source = base / name
        if source.is_file() and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)


def _save_weights(folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_bytes: int) -> None:
    shards = list(_shards(tensors, max_shard_bytes))
    metadata = {"format": "pt"}  # Transformers refuses a file without it
    written = {WEIGHTS}
    if len(shards) == 1:
        save_safetensors(folder / WEIGHTS, tensors, metadata)
    else:
        (folder / INDEX).unlink(missing_ok=True)  # until the new one is written, no index may name new and old shards
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for file, shard in zip(files, shards, strict=True):
            save_safetensors(folder / file, {name: tensors[name] for name in shard}, metadata)
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(_nbytes(tensor) for tensor in tensors.values())
        _save_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        written = {INDEX, *files}
    # What an earlier save left here must not be taken for these weights, and was good until now.
    for path in folder.iterdir():
        if path.name not in written and (path.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(path.name)):
            path.unlink()


def _shards(tensors: Mapping[str, torch.Tensor], limit: int) -> Iterator[list[str]]:
    """The names in their order, cut where a shard would grow beyond the limit."""
    shard: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if shard and size + _nbytes(tensor) > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += _nbytes(tensor)
    yield shard


def _nbytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _save_json(path: Path, data: Mapping[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
