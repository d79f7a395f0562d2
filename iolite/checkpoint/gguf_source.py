"""A model in GGUF files: the decoder in one (or in its numbered parts), the embedders in a mmproj file beside it.

Everything is read out of the files' metadata and checked against their tensors before a weight is touched. Float
tensors are views of the mapped file; quantised matrices of the decoder become iolite's packed ones, block for block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iolite.checkpoint import gguf_metadata, names
from iolite.checkpoint.gguf import GgufFile, GgufTensor, part_name
from iolite.checkpoint.gguf_names import ROPE, from_gguf, from_gguf_layout, gguf_shape
from iolite.config import DRAFTER_HINT, GenerationConfig, ModelConfig, ProcessorConfig
from iolite.errors import CheckpointError, ConfigError
from iolite.text.template import COMPLETION_TEMPLATE, ChatTemplate
from iolite.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # torch is imported by the functions that need it: models are described without it
    import torch

    from iolite.quant.formats import Format, PackedMatrix

_FLOATS = ("F32", "BF16", "F16")
_PART = re.compile(r"-(\d{5})-of-\d{5}$")
_PROJECTORS = {"vision": "gemma4uv", "audio": "gemma4ua"}
_MMPROJ_ORDER = ("bf16", "f32", "f16", "q8_0")  # the first that is there is taken


# Finding the files


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files in a folder and in its folders, of a model in parts the first; by name."""
    found = (path for pattern in ("*", "*/*") for path in folder.glob(pattern) if is_gguf(path) and path.is_file())
    return sorted(path for path in found if (part := _PART.search(path.stem)) is None or int(part[1]) == 1)


def model_files(folder: Path) -> list[Path]:
    """Those of `gguf_files` that hold a model, by their names: neither embedders nor drafters."""
    return [path for path in gguf_files(folder) if not (_is_embedders(path) or is_named_drafter(path))]


def choose_file(folder: Path, quant: str | None, name: str) -> Path:
    """The model's file in a folder: the one whose name ends with `quant` (in any letter case), or the only one.

    Raises CheckpointError, with the choices, when there is none or more than one. `name` is what the user called it.
    """
    files = model_files(folder)
    chosen = [path for path in files if quant is None or _names_quant(path, quant)]
    if quant and len(chosen) > 1:  # "UD-Q4_K_XL" is another file than "Q4_K_XL"
        plain = [path for path in chosen if not re.search(rf"ud-{re.escape(quant)}", path.stem, re.IGNORECASE)]
        chosen = plain or chosen
    if len(chosen) == 1:
        return chosen[0]
    if not files:
        raise CheckpointError(f"{name} holds no GGUF model")
    choices = ", ".join(_short(path, folder) for path in files[:20])
    fault = f"has {len(chosen)} GGUF files" + (f" of {quant}" if quant else "") if chosen else f"has no file {quant!r}"
    raise CheckpointError(f"{name} {fault}", f"add the ending of one with a colon (NAME:Q4_0): {choices}")


def embedders_beside(model: Path) -> Path | None:
    """The mmproj file that belongs to a model's file: the one named after it, or the folder's by precision.

    Raises CheckpointError when several are there and nothing says which one is meant.
    """
    places = [model.parent, *([model.parent.parent] if _PART.search(model.stem) else [])]
    found = [path for place in places for path in sorted(place.glob("*")) if is_gguf(path) and _is_embedders(path)]
    own = [path for path in found if path.stem.lower() == f"mmproj-{model.stem}".lower()]
    if own or len(found) <= 1:
        return next(iter(own or found), None)
    for precision in _MMPROJ_ORDER:
        same = [path for path in found if _names_quant(path, precision)]
        if len(same) == 1:
            return same[0]
    listed = ", ".join(path.name for path in found)
    raise CheckpointError(
        f"which embedders belong to {model.name}? There are {listed}", f"name one of them mmproj-{model.stem}.gguf"
    )


def _is_embedders(path: Path) -> bool:
    return "mmproj" in path.name.lower()


def is_named_drafter(path: Path) -> bool:
    """Whether a file is a drafter, by its name."""
    return re.search(r"(^|[-_.])(mtp|draft|drafter|assistant)([-_.]|$)", path.stem.lower()) is not None


def _names_quant(path: Path, quant: str) -> bool:
    stem = _PART.sub("", path.stem)
    begin = r"(^|[-.]|_(?=i?q\d|b?f\d))"  # model_q4_0 has q4_0 and not 0
    return re.search(rf"{begin}{re.escape(quant)}$", stem, re.IGNORECASE) is not None


def _short(path: Path, folder: Path) -> str:
    return _PART.sub("", str(path.relative_to(folder).with_suffix("")))


# Reading


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is."""

    file: GgufFile
    tensor: GgufTensor


class GgufSource:
    """A model in GGUF files, from the decoder's file. Raises CheckpointError before any weight is read.

    Without a mmproj file beside it the model reads text only: `config.modalities` says so.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or str(path)
        self.path, self.folder = path, path.parent
        self._file = open_gguf(path, gguf_metadata.MODEL)
        beside = embedders_beside(path)
        self._embedders = None if beside is None else open_gguf(beside, gguf_metadata.EMBEDDERS)
        self._stored = self._collect()
        self._vocab = self._vocabulary()
        self.config = self._config()
        self._check_shapes()

    @property
    def files(self) -> list[Path]:
        """The files that the weights are read from."""
        count = self._file.metadata.get("split.count", 1)
        parts = [self.path.with_name(part_name(self.path.name, i, count)) for i in range(2, count + 1)]
        return [self.path, *parts, *([self._embedders.path] if self._embedders else [])]

    @property
    def scheme(self) -> str | None:
        """int4 or int8, after what most bytes of the decoder's matrices are packed in; None when none is packed."""
        sizes = {"int4": 0, "int8": 0}
        for name, format in self.packed_formats().items():
            if (tensor := self._stored[name].tensor).type not in _FLOATS:
                sizes["int8" if format.name == "int8" else "int4"] += tensor.nbytes
        return max(sizes, key=lambda scheme: sizes[scheme]) if any(sizes.values()) else None

    def packed_formats(self) -> dict[str, Format]:
        """The tensors that `weight` gives packed, by our names, with their formats."""
        from iolite.checkpoint.gguf_blocks import PACKED
        from iolite.quant.formats import INT8

        if not self._is_quantised:
            return {}
        return {
            name: PACKED.get(stored.tensor.type, INT8)
            for name, stored in self._stored.items()
            if _can_pack(name, stored.tensor.shape)
        }

    @cached_property
    def _is_quantised(self) -> bool:
        return any(s.tensor.type not in _FLOATS and _can_pack(n, s.tensor.shape) for n, s in self._stored.items())

    def tokenizer(self) -> Tokenizer:
        return gguf_metadata.read_tokenizer(self._file.metadata, self.path.name)

    def template(self) -> ChatTemplate:
        source = self._file.metadata.get("tokenizer.chat_template", COMPLETION_TEMPLATE)
        if not isinstance(source, str):
            raise CheckpointError(f"{self.path.name}: tokenizer.chat_template is no text")
        return ChatTemplate(source)

    def processor(self) -> ProcessorConfig:
        with _named(self._settings_file.path.name):
            return ProcessorConfig.from_hf(self._processor_json, self.config)

    def generation(self) -> GenerationConfig:
        return gguf_metadata.read_generation(self._file.metadata, self.path.name, self.config)

    def names(self) -> list[str]:
        """Our names of all tensors, in the order of the config."""
        return list(names.expected_shapes(self.config))

    def weight(self, name: str) -> torch.Tensor | PackedMatrix:
        """One tensor by our name, mapped where it lies in the file as it is here.

        Quantised matrices of the decoder come packed; so do, in 8 bits, the float ones that a quantised file may have
        among them. The embedders' quantised matrices come as bfloat16.
        """
        from iolite.checkpoint.gguf_blocks import dequantize, repack
        from iolite.quant.formats import INT8
        from iolite.quant.schemes import quantise_named

        stored = self._stored[name]
        raw, tensor, packs = stored.file.raw(stored.tensor.name), stored.tensor, _can_pack(name, stored.tensor.shape)
        if tensor.type in _FLOATS:
            floats = from_gguf_layout(name, _view(raw, tensor.type, tensor.shape))
            return quantise_named(name, floats, INT8) if packs and self._is_quantised else floats
        if packs:
            return repack(raw, tensor.type, *tensor.shape)
        return from_gguf_layout(name, dequantize(raw, tensor.type, tensor.shape).bfloat16())

    def sizes(self) -> Mapping[str, int]:
        sizes: dict[str, int] = {}
        for stored in self._stored.values():
            sizes[stored.tensor.type] = sizes.get(stored.tensor.type, 0) + stored.tensor.nbytes
        return sizes

    def release(self) -> None:
        """Lets go of the pages that were read so far."""
        for file in (self._file, *([self._embedders] if self._embedders else [])):
            file.release()

    def _collect(self) -> dict[str, _Stored]:
        """All tensors by our names; CheckpointError for one that is no part of the family."""
        stored: dict[str, _Stored] = {}
        for file in (self._file, *([self._embedders] if self._embedders else [])):
            for tensor in file.tensors.values():
                ours = from_gguf(tensor.name)
                if tensor.name == ROPE and file is self._file:
                    continue
                if (
                    ours is None
                    or ours in stored
                    or (file is self._file) != ours.startswith(("language_model.", "lm_"))
                ):
                    raise CheckpointError(
                        f"{file.path.name}: tensor {tensor.name!r} is not a part of this architecture"
                    )
                stored[ours] = _Stored(file, tensor)
        return stored

    def _vocabulary(self) -> dict[str, int]:
        tokens = self._file.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise CheckpointError(f"{self.path.name} has no tokenizer")
        return {token: i for i, token in enumerate(tokens)}

    def _config(self) -> ModelConfig:
        metadata, file = self._file.metadata, self.path.name
        full = _full_layers(metadata)
        values = [f"language_model.layers.{i}.self_attn.v_proj.weight" in self._stored for i in full]
        text = gguf_metadata.read_text_config(
            metadata,
            file,
            prefix=gguf_metadata.MODEL,
            shares_kv=not any(values),
            angles=rope_angles(self._file, gguf_metadata.MODEL),
            vocab_size=self._shape(names.EMBEDDING)[0],
        )
        keys = gguf_metadata.Keys(metadata, "tokenizer.ggml", file)
        ends = gguf_metadata.end_tokens(metadata, self._vocab)
        text |= {"bos_token_id": keys.get("bos_token_id", int, 2), "pad_token_id": keys.get("padding_token_id", int, 0)}
        if len(metadata["tokenizer.ggml.tokens"]) != text["vocab_size"]:
            raise CheckpointError(f"{file}: {len(self._vocab)} tokens, but a table of {text['vocab_size']}")
        data = {
            "model_type": "gemma4_unified",
            "dtype": self._dtype(),
            "tie_word_embeddings": names.LM_HEAD not in self._stored,
            "eos_token_id": ends or [1],
            **gguf_metadata.token_ids(self._vocab),
            "text_config": text | {"eos_token_id": (ends or [1])[0]},
            **self._embedder_configs(),
        }
        with _named(file):
            return ModelConfig.from_hf(data)

    def _embedder_configs(self) -> dict[str, Any]:
        if self._embedders is None:
            return {}
        metadata, file, found = self._embedders.metadata, self._embedders.path.name, {}
        shapes = {name: s.tensor.shape for name, s in self._stored.items() if s.file is self._embedders}
        for part, kind in _PROJECTORS.items():
            if metadata.get(f"clip.has_{part}_encoder") is not True:
                continue
            stated = metadata.get(f"clip.{part}.projector_type", metadata.get("clip.projector_type"))
            if not isinstance(stated, str) or stated != kind:
                raise ConfigError(f"{file}: the {part} embedder is of the kind {stated!r}, not {kind!r}")
            if part == "audio":
                found["audio_config"] = gguf_metadata.read_audio_config(metadata, file)
            else:
                budgets = self._processor_json.get("image_processor") or {}
                soft = {"num_soft_tokens": budgets["max_soft_tokens"]} if "max_soft_tokens" in budgets else {}
                found["vision_config"] = gguf_metadata.read_vision_config(metadata, file, shapes) | soft
        return found

    @property
    def _settings_file(self) -> GgufFile:
        return self._embedders or self._file

    @cached_property
    def _processor_json(self) -> dict[str, Any]:
        file = self._settings_file
        text = file.metadata.get(gguf_metadata.PROCESSOR, "{}")
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError):
            data = None
        if not isinstance(data, dict) or not isinstance(data.get("image_processor") or {}, dict):
            raise ConfigError(f"{file.path.name}: {gguf_metadata.PROCESSOR} is no JSON object")
        return data

    def _dtype(self) -> str:
        kind = self._stored[names.EMBEDDING].tensor.type
        return {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16")

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._stored or len(self._stored[name].tensor.shape) != 2:
            raise CheckpointError(f"{self.path.name}: {name} is missing, or no matrix")
        return self._stored[name].tensor.shape

    def _check_shapes(self) -> None:
        """CheckpointError unless the tensors are exactly those that the metadata ask for, in types that are read."""
        from iolite.checkpoint.gguf_blocks import DECODED

        expected = names.expected_shapes(self.config)
        for name in expected.keys() ^ self._stored.keys():
            fault = "is missing" if name in expected else "is there, but the metadata ask for none"
            raise CheckpointError(f"{self.path.name}: tensor {name} {fault}")
        for name, shape in expected.items():
            file, tensor = self._stored[name].file.path.name, self._stored[name].tensor
            if tensor.shape != gguf_shape(name, shape):
                raise CheckpointError(
                    f"{file}: tensor {tensor.name} has the shape {list(tensor.shape)}, but the metadata make it "
                    f"{list(gguf_shape(name, shape))}"
                )
            if tensor.type not in (DECODED if len(shape) == 2 else _FLOATS):
                raise CheckpointError(
                    f"{file}: tensor {tensor.name} is of the type {tensor.type}, which is not supported",
                    f"supported are {', '.join(DECODED)}",
                )


def rope_angles(file: GgufFile, prefix: str) -> int:
    """How many angles of a full head turn, from `rope_freqs`; CheckpointError for frequencies of another kind."""
    tensor, name = file.tensors.get(ROPE), file.path.name
    if tensor is None or tensor.type != "F32" or len(tensor.shape) != 1:
        raise CheckpointError(f"{name}: {ROPE} is missing, or no row of float32")
    head = file.metadata.get(f"{prefix}.attention.key_length")
    if not isinstance(head, int) or head != 2 * tensor.shape[0]:
        raise CheckpointError(f"{name}: {ROPE} has {tensor.shape[0]} values for heads of {head}")
    return gguf_metadata.rope_angles(np.frombuffer(file.raw(ROPE).numpy().tobytes(), "<f4"), name)


def open_gguf(path: Path, architecture: str) -> GgufFile:
    """The file, if it holds this architecture; else a ConfigError that says what it holds."""
    file = GgufFile(path)
    found = file.metadata.get("general.architecture")
    if isinstance(found, str) and found == architecture:  # an array would compare element by element
        return file
    what = {
        gguf_metadata.EMBEDDERS: "holds embedders; name the model's file, and it is found beside it",
        gguf_metadata.DRAFTER: "holds a drafter, not a model",
    }.get(str(found), f"holds the architecture {found!r}, not {architecture!r}")
    hints = {gguf_metadata.DRAFTER: DRAFTER_HINT}
    raise ConfigError(f"{path.name} {what}", hints.get(str(found), "iolite runs the Gemma 4 Unified family only"))


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Errors of settings that were made into JSON name the file that they come from."""
    try:
        yield
    except ConfigError as error:
        message = re.sub(r"^(processor_)?config(\.json)?: ", "", str(error))
        raise ConfigError(f"{file}: {message}", error.hint) from None


def _full_layers(metadata: Mapping[str, Any]) -> list[int]:
    pattern = metadata.get("gemma4.attention.sliding_window_pattern")
    return [i for i, sliding in enumerate(pattern) if not sliding] if isinstance(pattern, np.ndarray) else []


def _can_pack(name: str, shape: Sequence[int]) -> bool:
    from iolite.quant.schemes import format_for

    return format_for(name, shape, "int8") is not None


def _view(raw: torch.Tensor, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return raw.view(dtypes[kind]).reshape(shape)
