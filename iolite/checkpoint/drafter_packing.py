"""A drafter whose matrices are packed while it is loaded: the result is kept beside the packed models, and mapped.

What is kept is a drafter's folder as `iolite quantize` writes it, named as `iolite/checkpoint/packing.py` names those
of models. It is whole once it has its config.json, which is written last.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from iolite.checkpoint import packing
from iolite.checkpoint.drafter import find_drafter, write_folder
from iolite.checkpoint.files import WriteError
from iolite.checkpoint.gguf_drafter import DrafterSource
from iolite.checkpoint.gguf_source import is_gguf
from iolite.checkpoint.source import Progress
from iolite.errors import CheckpointError
from iolite.quant.formats import packed_bytes
from iolite.quant.schemes import scheme_named


def kept(source: DrafterSource, scheme: str | None, progress: Progress | None = None) -> DrafterSource:
    """The same drafter packed by the scheme, mapped from the cache, where it is written first if it is not there.

    It is the source itself without a scheme, when the source lies packed already or is small, and, with a note on
    stderr, when there is no room. Raises CheckpointError for weights that cannot be packed.
    """
    if scheme is None or _lies_packed(source) or sum(path.stat().st_size for path in source.files) < packing.SMALL:
        return source
    folder = packing.kept_folder(source.files, scheme)
    found = _open(folder, source)
    if found is None:
        try:
            packing.make_room(folder, bytes_needed(source, scheme))
            write_folder(folder, source, scheme, progress=progress)
        except WriteError as error:
            print(f"note: the packed drafter is not kept: {error}", file=sys.stderr)
            return source
        found = find_drafter(folder)
    return found


def bytes_needed(source: DrafterSource, scheme: str | None, float_bytes: int = 4) -> int:
    """Bytes of a drafter's weights: matrices packed as they are or by the scheme, floats of `float_bytes` each."""
    chosen, total = scheme_named(scheme) if scheme else None, 0
    for name, shape in source.shapes.items():
        own = source.stored[name].format if name in source.stored else None
        wanted = own or (chosen and (chosen.head if name == "model.embed_tokens.weight" else chosen.layers))
        total += packed_bytes(*shape, wanted) if wanted and len(shape) == 2 else math.prod(shape) * float_bytes
    return total


def _lies_packed(source: DrafterSource) -> bool:
    """Whether all its matrices are in its file as the kernels read them, or it has no file to know it by."""
    matrices = [source.stored[name] for name, shape in source.shapes.items() if len(shape) == 2 and source.stored]
    return not any(is_gguf(path) for path in source.files) and all(item.format for item in matrices)


def _open(folder: Path, source: DrafterSource) -> DrafterSource | None:
    """What was kept of a drafter at an earlier time; None when there is nothing, or nothing whole."""
    try:
        found = find_drafter(folder)
    except CheckpointError:
        return None
    same = (found.text, found.backbone_hidden_size) == (source.text, source.backbone_hidden_size)
    return found if same and found.scheme else None
