"""Checkpoints in the "pack-quantized" form of compressed-tensors, 4 bits in groups of 32: the published w4a16 weights.

A linear layer X is three tensors (source: the library's `pack_quantized` compressor):

    X.weight_packed   int32 [R, C/8]    eight values of 4 bits, the first in the lowest bits, stored as value + 8
    X.weight_scale    float [R, C/32]
    X.weight_shape    int64 [2]         R, C

That is the lattice of our int4: only the scale's format changes, from bf16 to fp16. A bf16 number has fewer bits of
fraction, so nothing is lost unless it lies below 2^-14, where fp16 runs out of exponents; a scale is then off by at
most 2^-25, which is refused when it is more than one part in 2^9 of the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from iolite.checkpoint import names
from iolite.checkpoint.folder import WEIGHT_FORMATS, Stored, check_names
from iolite.config import ModelConfig
from iolite.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from iolite.quant.formats import Format, PackedMatrix

SCHEME = "int4"
_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def check(config: ModelConfig, quantization: Mapping[str, Any], stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors that are to be read. Raises CheckpointError for another form than the one above, and for tensors that
    are missing, unknown or of the wrong shape."""
    _check_form(quantization)
    expected = dict(names.expected_shapes(config))
    tied = config.tie_word_embeddings  # some programs write a copy of the head all the same
    found = {name: item for name, item in stored.items() if not (tied and name.startswith("lm_head."))}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in expected.items():
        base = name.removesuffix(".weight")
        if base + _PACKED in found and len(shape) == 2:
            rows, cols = shape
            if cols % 32:
                raise CheckpointError(f"{name} has {cols} columns, which are no groups of 32")
            wanted |= {base + _PACKED: (rows, cols // 8), base + _SCALE: (rows, cols // 32), base + _SHAPE: (2,)}
        else:
            wanted[name] = shape
    check_names(wanted, found)
    for name, shape in wanted.items():
        item = found[name]
        formats = {_PACKED: ("I32",), _SHAPE: ("I64", "I32")}.get(name[name.rfind(".") :], WEIGHT_FORMATS)
        if item.shape != shape or item.dtype not in formats:
            raise CheckpointError(f"tensor {item.name} is {list(item.shape)} {item.dtype}, wanted {list(shape)}")
    return found


def _check_form(quantization: Mapping[str, Any]) -> None:
    groups = quantization.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    wrong = not isinstance(weights, dict) or any(weights.get(key) != value for key, value in _WEIGHTS.items())
    stated = quantization.get("format")
    if wrong or stated != "pack-quantized" or (isinstance(group, dict) and group.get("input_activations")):
        raise CheckpointError(
            f"compressed-tensors weights of the form {str(stated)[:40]!r}, or not 4 bits in groups of 32",
            "use the w4a16 checkpoint, the float one, or a GGUF file",
        )
    if isinstance(weights, dict) and weights.get("actorder") not in (None, "static", "weight", False):
        raise CheckpointError("compressed-tensors weights with re-ordered groups are not supported")


def packed_formats(stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Format]:
    """Which of our names stand for matrices that stay packed."""
    from iolite.quant.formats import INT4

    return {name: INT4 for name, shape in shapes.items() if _stays_packed(stored, name, shape)}


def _stays_packed(stored: Mapping[str, Stored], name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is packed here, and is one that the kernels take so: those of the embedders are made floats."""
    from iolite.quant.schemes import format_for

    return name.removesuffix(".weight") + _PACKED in stored and format_for(name, shape, SCHEME) is not None


def read(stored: Mapping[str, Stored], name: str, shape: tuple[int, ...]) -> Tensor | PackedMatrix:
    """One tensor by our name: a packed matrix, or floats as they are stored."""
    import torch

    from iolite.quant.formats import BLOCK, INT4, Blocks, decode, pack

    base = name.removesuffix(".weight")
    if base + _PACKED not in stored:
        return stored[name].tensor()
    rows, cols = shape
    if stored[base + _SHAPE].tensor().tolist() != [rows, cols]:
        raise CheckpointError(f"{stored[base + _SHAPE].name} does not say {[rows, cols]}")
    packed = stored[base + _PACKED].tensor()
    # The lowest bits come first in each int32, and so in its first byte.
    nibbles = packed.view(torch.uint8).reshape(rows, cols // 2)
    quants = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).reshape(rows, cols)
    scales = stored[base + _SCALE].tensor()
    halves = scales.to(torch.float16)
    off = (halves.float() - scales.float()).abs()
    if not bool((off <= scales.float().abs() * 2**-9).all()):
        raise CheckpointError(f"{stored[base + _SCALE].name} holds scales that fp16 cannot")
    assert scales.shape[1] == cols // BLOCK
    blocks = Blocks(INT4, quants, halves, None)
    return pack(blocks) if _stays_packed(stored, name, shape) else decode(blocks)
