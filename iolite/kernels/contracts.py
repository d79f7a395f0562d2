"""What kernels are handed besides tensors: a packed matrix, the keys and values of a cache, new tokens for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Code(Protocol):
    """A packed format; `iolite/quant/formats.py` has them."""

    @property
    def code(self) -> int:
        """The number by which the kernels know it."""
        ...


class Matrix(Protocol):
    """A packed weight matrix of `rows` by `cols`; `iolite/quant/formats.py` defines the bytes in `data`."""

    @property
    def data(self) -> Tensor: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def format(self) -> Code: ...
    def to_float(self) -> Tensor:
        """float32 [rows, cols]."""
        ...

    def rows_to_float(self, ids: Tensor) -> Tensor:
        """float32 [n, cols] for ids [n]."""
        ...


class Segment(Protocol):
    """The new tokens of one sequence: n of them, continuing its cache (`iolite/cache.py`)."""

    @property
    def cache(self) -> object: ...
    @property
    def n(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Keys:
    """`count` keys and values in order: key s lies in row (first + s) % room of the buffers k and v [rows, K, D].

    rows may be less than room as long as no key lies beyond it. The newest tokens are the last of the keys. k and v may
    be views of one buffer. In int8 a key or value is its numbers times its scale, float32 [rows, K].
    """

    k: Tensor
    v: Tensor
    first: int
    count: int
    room: int
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
