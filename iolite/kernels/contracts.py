"""What kernels are handed besides tensors: a packed matrix, the keys and values of a cache, new tokens for one; and
which modules they may stand in for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as modules

Forward = TypeVar("Forward", bound=Callable[..., Any])


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


_replaceable: set[Callable[..., Any]] = {nn.Linear.forward}


def replaceable(forward: Forward) -> Forward:
    """Marks the `forward` of a module as one that kernels may stand in for. A subclass's own, or one that was put on a
    single module, is called."""
    _replaceable.add(forward)
    return forward


def is_replaceable(module: nn.Module) -> bool:
    """Whether nothing hangs on a call of the module but the outcome of a marked `forward`."""
    own = "forward" in module.__dict__ or type(module).forward not in _replaceable
    return not own and not any(hooks_of(module))


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """Where the hooks of a module are, and those of all modules."""
    return (
        module._forward_pre_hooks, module._forward_hooks,
        modules._global_forward_pre_hooks, modules._global_forward_hooks,
    )  # fmt: skip


def matrix_of(layer: nn.Module) -> Matrix | None:
    """The packed weights of a layer that has them, and only multiplies with them."""
    matrix: Matrix | None = getattr(layer, "matrix", None)
    return matrix if matrix is not None and is_replaceable(layer) else None
