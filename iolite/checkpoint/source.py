"""Where a model's weights and settings come from: a folder or GGUF files, behind one protocol.

float checkpoint    config.json, model.safetensors (or shards) in BF16, F16 or F32
packed checkpoint   the same with iolite's own packed matrices (`iolite quantize` writes it)
compressed-tensors  the "w4a16" checkpoints of quantisation-aware training
GGUF                llama.cpp's files
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from iolite.checkpoint import compressed_tensors, names, packed_folder
from iolite.checkpoint.folder import Stored, check_weights, open_weights, read_quantization, weight_files
from iolite.checkpoint.hub import resolve
from iolite.checkpoint.safetensors import SafetensorsFile
from iolite.config import GenerationConfig, ModelConfig, ProcessorConfig
from iolite.errors import CheckpointError
from iolite.text.template import ChatTemplate
from iolite.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # a source is described without importing torch
    import torch

    from iolite.quant.formats import Format, PackedMatrix

Progress = Callable[[int, int, str], None]
"""Called with (done, in all, what is being worked on)."""


class Source(Protocol):
    """A model that was found and whose headers were checked; no weight has been read."""

    name: str
    folder: Path
    config: ModelConfig

    @property
    def files(self) -> list[Path]:
        """The files that the weights are read from."""
        ...

    @property
    def scheme(self) -> str | None:
        """The scheme that its matrices are packed in already, "int4" or "int8"; None for floats."""
        ...

    def names(self) -> list[str]:
        """Our names of all tensors."""
        ...

    def packed_formats(self) -> Mapping[str, Format]:
        """The tensors that `weight` gives packed, by our names, with their formats."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Bytes of the tensors by the format that they are stored in."""
        ...

    def weight(self, name: str) -> torch.Tensor | PackedMatrix:
        """One tensor: floats as they are stored, or a packed matrix."""
        ...

    def release(self) -> None:
        """Lets go of memory that reading has taken; tensors that were handed out stay good."""
        ...

    def tokenizer(self) -> Tokenizer: ...
    def template(self) -> ChatTemplate: ...
    def processor(self) -> ProcessorConfig: ...
    def generation(self) -> GenerationConfig: ...


class FolderSource:
    """A folder in the Hugging Face layout. Raises ConfigError or CheckpointError before any weight is read."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.name, self.folder = name or str(folder), folder
        self.config = ModelConfig.from_folder(folder)
        self.quantization = read_quantization(folder)
        stored = open_weights(folder)
        if self.quantization is None:
            check_weights(self.config, stored)
            if self.config.tie_word_embeddings:
                self._drop_copy_of_head(stored)
        elif self.quantization["quant_method"] == packed_folder.METHOD:
            packed_folder.check(self.config, self.quantization, stored)
        else:
            stored = compressed_tensors.check(self.config, self.quantization, stored)
        self._stored = stored

    @property
    def files(self) -> list[Path]:
        return weight_files(self.folder)

    @property
    def scheme(self) -> str | None:
        if self.quantization is None:
            return None
        return self.quantization["scheme"] if self.is_packed else compressed_tensors.SCHEME

    @property
    def is_packed(self) -> bool:
        """Whether the matrices lie in the file as the kernels read them."""
        return self.quantization is not None and self.quantization["quant_method"] == packed_folder.METHOD

    def names(self) -> list[str]:
        return list(names.expected_shapes(self.config))

    def packed_formats(self) -> Mapping[str, Format]:
        if self.quantization is None:
            return {}
        if not self.is_packed:
            return compressed_tensors.packed_formats(self._stored, names.expected_shapes(self.config))
        from iolite.quant.formats import format_of_tile

        return {n: format_of_tile(item.shape[2]) for n, item in self._stored.items() if item.dtype == "U8"}

    def sizes(self) -> Mapping[str, int]:
        packed = {id(self._stored[name]): format.name for name, format in self._own_packed().items()}
        sizes: dict[str, int] = {}
        for item in self._stored.values():
            kind = packed.get(id(item), item.dtype)
            sizes[kind] = sizes.get(kind, 0) + item.nbytes
        return sizes

    def _own_packed(self) -> Mapping[str, Format]:
        """Those of `packed_formats` that are one tensor in the file."""
        return self.packed_formats() if self.is_packed else {}

    def weight(self, name: str) -> torch.Tensor | PackedMatrix:
        shape = names.expected_shapes(self.config)[name]
        if self.quantization is not None and not self.is_packed:
            return compressed_tensors.read(self._stored, name, shape)
        stored = self._stored[name]
        return packed_folder.matrix(stored, shape) if stored.dtype == "U8" else stored.tensor()

    def release(self) -> None:
        for file in self._open_files():
            file.release()

    def populate(self, progress: Progress | None = None) -> None:
        """Brings the mapped weights into memory."""
        for file in self._open_files():
            file.populate(progress and (lambda done, size: progress(done, size, "reading weights")))

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder)

    def template(self) -> ChatTemplate:
        return ChatTemplate.from_folder(self.folder)

    def processor(self) -> ProcessorConfig:
        return ProcessorConfig.from_folder(self.folder, self.config)

    def generation(self) -> GenerationConfig:
        return GenerationConfig.from_folder(self.folder, self.config)

    def _open_files(self) -> list[SafetensorsFile]:
        return list({id(item.file): item.file for item in self._stored.values()}.values())

    @staticmethod
    def _drop_copy_of_head(stored: dict[str, Stored]) -> None:
        if names.LM_HEAD not in stored:
            return
        import torch

        if not torch.equal(stored.pop(names.LM_HEAD).tensor(), stored[names.EMBEDDING].tensor()):
            raise CheckpointError("config.json ties the head to the embedding, but lm_head.weight differs from it")


def open_source(name: str) -> Source:
    """The source behind a name: "nano", a folder, a .gguf file, a Hugging Face id, or one of these with `:QUANT`."""
    path = resolve(name)
    if path.is_dir():
        return FolderSource(path, name)
    from iolite.checkpoint.gguf_source import GgufSource

    return GgufSource(path, name)
