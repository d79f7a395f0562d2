"""iolite's own packed checkpoints: the Hugging Face layout with packed matrices, mapped and multiplied as they lie.

config.json says `"quantization_config": {"quant_method": "iolite", "scheme": "int4", "version": 1}`. In the weights a
packed matrix is U8 [row tiles, column tiles, bytes of a tile] (`iolite/quant/formats.py`) under its published name; its
format follows from the size of its tiles and its true shape from the config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iolite.checkpoint import names
from iolite.checkpoint.folder import WEIGHT_FORMATS, Stored, check_names
from iolite.checkpoint.safetensors import streaming
from iolite.config import ModelConfig
from iolite.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from iolite.quant.formats import PackedMatrix

METHOD, VERSION = "iolite", 1
SCHEMES = ("int4", "int8")


def quantization_config(scheme: str) -> dict[str, Any]:
    """What config.json says of a packed checkpoint."""
    return {"quant_method": METHOD, "scheme": scheme, "version": VERSION}


def check(config: ModelConfig, quantization: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Raises CheckpointError unless the tensors are just those of the config, each packed or in a float format."""
    from iolite.quant.formats import format_of_tile, packed_shape
    from iolite.quant.schemes import format_for

    if quantization.get("version") != VERSION or quantization.get("scheme") not in SCHEMES:
        raise CheckpointError(
            f"packed weights of version {quantization.get('version')!r} and scheme {quantization.get('scheme')!r}",
            "this iolite reads version 1 in int4 or int8; pack the model again with `iolite quantize`",
        )
    expected = names.expected_shapes(config)
    check_names(expected, stored)
    for name, shape in expected.items():
        item, wanted = stored[name], shape
        if item.dtype == "U8" and len(item.shape) == 3 and format_for(name, shape, quantization["scheme"]):
            rows, cols = shape
            wanted = packed_shape(rows, cols, format_of_tile(item.shape[2]))
        elif item.dtype not in WEIGHT_FORMATS:
            raise CheckpointError(f"tensor {item.name} is in {item.dtype}, which is no weight")
        if item.shape != wanted:
            raise CheckpointError(f"tensor {item.name} is {list(item.shape)}, but config.json makes it {list(wanted)}")


def matrix(stored: Stored, shape: tuple[int, ...]) -> PackedMatrix:
    from iolite.quant.formats import PackedMatrix

    return PackedMatrix(stored.tensor(), *shape)


def write(
    path: Path, scheme: str, order: Iterable[str], weights: Iterable[tuple[str, torch.Tensor | PackedMatrix]]
) -> None:
    """Writes the weights file one tensor at a time. `order` has all our names; `weights` may come in any order, but
    packed ones should come first, so that they are aligned."""
    from iolite.quant.formats import PackedMatrix

    metadata = {"format": "pt", "iolite": f"{scheme} {VERSION}"}
    with streaming(path, metadata, [names.published(name) for name in order]) as out:
        for name, weight in weights:
            out.write(names.published(name), weight.data if isinstance(weight, PackedMatrix) else weight)
