"""Packing a checkpoint tensor by tensor while it is read, and keeping the result to be mapped the next time.

The packed file lies in `${IOLITE_CACHE:-~/.cache/iolite}/packed/`, in a folder named by a digest of the source files'
names, sizes and times of change, the scheme and the version of the layout. It is written beside and renamed, so that
it is whole or not there. Deleting the folder costs nothing but the next packing.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from iolite.checkpoint import names, packed_folder
from iolite.checkpoint.files import WriteError
from iolite.checkpoint.folder import Stored
from iolite.checkpoint.safetensors import SafetensorsFile
from iolite.checkpoint.source import FolderSource, Progress, Source
from iolite.config import GenerationConfig, ProcessorConfig
from iolite.errors import CheckpointError, UsageError
from iolite.text.template import ChatTemplate
from iolite.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from iolite.quant.formats import Format, PackedMatrix

    Weights: TypeAlias = dict[str, Tensor | PackedMatrix]

SMALL = 128 << 20  # bytes of source files under which packing again is quicker than keeping


def cache_folder() -> Path:
    """IOLITE_CACHE, or iolite's folder in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("IOLITE_CACHE") or os.path.join(home, "iolite"))


def read_weights(source: Source, scheme: str | None, progress: Progress | None = None) -> Weights:
    """All weights by our names, packed by `scheme` ("int4", "int8") or as they are stored (None).

    What is packed comes out of the cache when it was packed before. Raises UsageError when a packed source is asked
    for another scheme, CheckpointError for weights that cannot be packed.
    """
    if scheme and source.scheme and scheme != source.scheme:
        raise UsageError(f"{source.name} is packed as {source.scheme} already", f"leave {scheme} out")
    scheme = scheme or source.scheme
    if isinstance(source, FolderSource) and (scheme is None or source.is_packed):
        if source.is_packed:
            source.populate(progress)
        return {name: source.weight(name) for name in source.names()}
    if scheme is None or sum(path.stat().st_size for path in source.files) < SMALL:
        return dict(_packed(source, scheme, progress))
    try:
        return _through_cache(source, scheme, progress)
    except WriteError as error:
        print(f"note: the packed weights are not kept: {error}", file=sys.stderr)
        return dict(_packed(source, scheme, progress))


def _through_cache(source: Source, scheme: str, progress: Progress | None) -> Weights:
    path = kept_folder(source.files, scheme) / "model.safetensors"
    kept = _open_kept(path, source, scheme)
    if kept is None:
        make_room(path.parent, bytes_needed(source, scheme))
        packed_folder.write(path, scheme, source.names(), _packed(source, scheme, progress))
        kept = SafetensorsFile(path)
    kept.populate(progress and (lambda done, size: progress(done, size, "reading weights")))
    shapes = names.expected_shapes(source.config)
    return {name: _kept(kept, name, shapes[name]) for name in source.names()}


def kept_folder(files: Sequence[Path], scheme: str) -> Path:
    """Where the packed weights of these files are kept, or would be."""
    digest = hashlib.sha256(f"{packed_folder.VERSION} {scheme}".encode())
    for path in files:
        stat = path.stat()
        digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return cache_folder() / "packed" / digest.hexdigest()[:24]


def make_room(folder: Path, needed: int) -> None:
    """Makes a folder for so many bytes; raises WriteError where it cannot be made, or its disk has hardly so many."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(folder).free
    except OSError as error:
        raise WriteError(f"{folder} cannot be made ({error.strerror})") from None
    if room < needed + (256 << 20):
        raise WriteError(f"{folder} has {room >> 20} MB free and needs {needed >> 20} MB")


def _open_kept(path: Path, source: Source, scheme: str) -> SafetensorsFile | None:
    """The packed file of an earlier time, None when there is none or it is not whole."""
    if not path.is_file():
        return None
    try:
        kept = SafetensorsFile(path)
        stored = {names.from_file(name): Stored(kept, name) for name in kept.keys()}  # noqa: SIM118 (not a dict)
        packed_folder.check(source.config, packed_folder.quantization_config(scheme), stored)
    except CheckpointError:
        return None  # damaged since: packed again, and replaced
    return kept


def _kept(file: SafetensorsFile, name: str, shape: tuple[int, ...]) -> Tensor | PackedMatrix:
    from iolite.quant.formats import PackedMatrix

    published = names.published(name)
    tensor = file.tensor(published)
    return PackedMatrix(tensor, *shape) if file.dtype(published) == "U8" else tensor


def _packed(
    source: Source, scheme: str | None, progress: Progress | None
) -> Iterator[tuple[str, Tensor | PackedMatrix]]:
    """Every tensor, packed where the scheme says so. Matrices come first, each let go before the next is read."""
    from iolite.quant.schemes import format_for

    shapes = names.expected_shapes(source.config)
    matrices = [name for name in source.names() if format_for(name, shapes[name], scheme or "int4")]
    order = [*matrices, *(name for name in source.names() if name not in set(matrices))]
    chosen = PackingSource(source, scheme) if scheme else source
    for done, name in enumerate(order):
        if progress:
            progress(done, len(order), f"packing {name}" if scheme else f"reading {name}")
        yield name, chosen.weight(name)
        source.release()


class PackingSource:
    """A source whose matrices are packed by a scheme when their turn comes: what is written is a packed checkpoint.

    Raises UsageError when the source is packed in another scheme.
    """

    def __init__(self, source: Source, scheme: str) -> None:
        if source.scheme not in (None, scheme):
            raise UsageError(
                f"{source.name} is packed as {source.scheme} already", f"{scheme} needs a float version of the model"
            )
        self.name, self.folder, self.config = source.name, source.folder, source.config
        self._source, self._scheme = source, scheme
        self._shapes = names.expected_shapes(source.config)

    @property
    def files(self) -> list[Path]:
        return self._source.files

    @property
    def scheme(self) -> str:
        return self._scheme

    def names(self) -> list[str]:
        return self._source.names()

    def sizes(self) -> Mapping[str, int]:
        return self._source.sizes()

    def packed_formats(self) -> dict[str, Format]:
        """By the scheme; a matrix that the source has packed keeps its own format."""
        from iolite.quant.schemes import format_for

        chosen = {name: format_for(name, shape, self._scheme) for name, shape in self._shapes.items()}
        own = self._source.packed_formats()
        return {name: own.get(name, format) for name, format in chosen.items() if format is not None}

    def weight(self, name: str) -> Tensor | PackedMatrix:
        from iolite.quant.formats import PackedMatrix
        from iolite.quant.schemes import format_for, quantise_named

        weight = self._source.weight(name)
        format = format_for(name, self._shapes[name], self._scheme)
        if format is None or isinstance(weight, PackedMatrix):
            return weight
        return quantise_named(name, weight, format)

    def release(self) -> None:
        self._source.release()

    def tokenizer(self) -> Tokenizer:
        return self._source.tokenizer()

    def template(self) -> ChatTemplate:
        return self._source.template()

    def processor(self) -> ProcessorConfig:
        return self._source.processor()

    def generation(self) -> GenerationConfig:
        return self._source.generation()


def bytes_needed(source: Source, scheme: str) -> int:
    """The size of a source's weights once they are packed, or a little more."""
    from iolite.quant.formats import INT8, packed_bytes
    from iolite.quant.schemes import format_for

    total = 0
    for name, shape in names.expected_shapes(source.config).items():
        if format := format_for(name, shape, scheme):
            rows, cols = shape
            total += packed_bytes(rows, cols, INT8 if source.scheme else format)  # GGUF mixes formats: the widest
        else:
            total += 4 * math.prod(shape)
    return total
