"""Which tensors a scheme packs, and into which format.

Packed are the matrices that every token reads: the projections of the decoder's layers, the vocabulary's table and an
untied head. Norms, the embedders of pictures and sounds and the table of picture positions keep their float dtype:
together they are under 0.5 % of the 12B, and every picture goes through them once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from iolite.errors import CheckpointError, UsageError
from iolite.quant.formats import INT4, INT8, Format, PackedMatrix, quantise

_PROJECTION = re.compile(
    r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight", re.ASCII
)
TABLES = ("language_model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Scheme:
    """A name, the format of the layers' projections, and the format of the vocabulary's table and the head."""

    name: str
    layers: Format
    head: Format


SCHEMES = {s.name: s for s in (Scheme("int4", INT4, INT4), Scheme("int8", INT8, INT8))}


def scheme_named(name: str) -> Scheme:
    """Raises UsageError for a name that is not in SCHEMES."""
    if name not in SCHEMES:
        raise UsageError(f"there is no quantisation {name!r}", f"use {' or '.join(SCHEMES)}")
    return SCHEMES[name]


def format_for(name: str, shape: Sequence[int], scheme: str, *, head: Format | None = None) -> Format | None:
    """The format that a scheme packs the tensor `name` (ours, "language_model...") into; None: it stays as it is.

    `head` replaces the scheme's own format of the vocabulary's table and the head.
    """
    chosen = scheme_named(scheme)
    if len(shape) != 2:
        return None
    if name in TABLES:
        return head or chosen.head
    return chosen.layers if _PROJECTION.fullmatch(name) else None


def quantise_named(name: str, weight: Tensor, format: Format) -> PackedMatrix:
    """`formats.quantise`, with a CheckpointError that names the tensor for weights that cannot be packed."""
    try:
        return quantise(weight, format)
    except ValueError as error:
        raise CheckpointError(f"cannot quantise {name}: {error}") from None
