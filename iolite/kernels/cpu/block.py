"""The two halves of a decoder block around attention, each as one call.

Between two kernels Python takes some ten microseconds, in which nothing is read from memory; a model of 48 blocks calls
six hundred kernels for a token, or two hundred with these. They call the same kernels and give the same numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from ctypes import byref
from itertools import repeat
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from iolite.kernels.contracts import hooks_of, is_replaceable
from iolite.kernels.cpu.library import BlockArg, MatrixArg, loaded
from iolite.kernels.cpu.products import FLOAT, matrix_argument

_MOST_TOKENS, _MOST_NUMBERS = 24, 24 * 3840
"""Beyond that many tokens the kernels of a large model take longer than what is between them, and what lies between
them gets large; of a small model as many tokens are few as are no more numbers."""

Link = tuple[dict[str, Any], str, Any]

_VECTORS = {
    "input_norm": "input_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    "pre_feedforward_norm": "pre_feedforward_layernorm.weight",
    "post_feedforward_norm": "post_feedforward_layernorm.weight",
    "scalar": "layer_scalar",
}
_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_MATRICES = {"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}

_blocks: WeakKeyDictionary[nn.Module, Block] = WeakKeyDictionary()


def most_tokens(size: int) -> int:
    """How many tokens of `size` numbers are few."""
    return max(_MOST_TOKENS, _MOST_NUMBERS // size)


def block(layer: nn.Module) -> Block | None:
    """The block of a decoder layer (`iolite/model/layers.py`); None where its weights are neither packed nor float32,
    its norms are not float32 or not alike, the sizes do not fit together, or a module in it does or has to do more."""
    found = _blocks.get(layer)
    if found is not None and found.made_of.hold():
        return found
    made = Block.of(layer)
    if made is not None:
        _blocks[layer] = made
    return made


class Links:
    """What a description was made of. It is looked at before every pass, so in loops that are not Python's."""

    def __init__(self, links: Sequence[Link], hooks: Sequence[Any], own: Sequence[dict[str, Any]]) -> None:
        """hooks: where those would be that the kernels do not call; own: what modules have as their own, where a
        `forward` would be."""
        self.links, self.hooks, self.own = links, list({id(places): places for places in hooks}.values()), own
        self._holders, self._names, self._values = zip(*links, strict=True)
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._places = self._places_now()

    def hold(self) -> bool:
        """Whether everything is still where it was, and no module has got a hook or a `forward` of its own."""
        now = map(dict.get, self._holders, self._names)
        same = all(map(operator.is_, now, self._values)) and self._places_now() == self._places
        return same and not any(self.hooks) and not any(map(dict.get, self.own, repeat("forward")))

    def _places_now(self) -> list[int]:
        """Where the tensors lie: `Module.to` gives other memory to the same ones."""
        return list(map(Tensor.data_ptr, self._tensors))


class Block:
    """Where the weights of a decoder layer lie, as the kernels are told."""

    def __init__(self, argument: BlockArg, made_of: Links, key_weight: Tensor) -> None:
        """made_of: keeps the argument's tensors alive. key_weight [D]: of the norm of the keys."""
        self.made_of, self.key_weight = made_of, key_weight
        self.argument, self._at = argument, byref(argument)
        q, k = argument.qkv[0].rows, argument.qkv[1].rows
        self.size, self._head_dim = argument.size, argument.head_dim
        self._heads, self._kv_heads = q // argument.head_dim, k // argument.head_dim
        self.kept_heads = self._kv_heads, self._head_dim

    @classmethod
    def of(cls, layer: Any) -> Block | None:
        names = [name for name in ("q_proj", "k_proj", "v_proj") if getattr(layer.self_attn, name) is not None]
        paths = [*(f"self_attn.{name}" for name in names), *_MATRICES.values()]
        modules = list(layer.modules())
        if not all(map(is_replaceable, modules)):
            return None
        matrices = [matrix for path in paths if (matrix := _matrix(layer.get_submodule(path)))]
        found = {name: _at(layer, path) for name, path in _VECTORS.items()}
        vectors = {name: vector for name, vector in found.items() if vector is not None and _is_float(vector)}
        norms = [layer.self_attn, *map(layer.get_submodule, _NORMS)]  # attention has the eps of its own norms
        if len(matrices) < len(paths) or len(vectors) < len(_VECTORS) or len({norm.eps for norm in norms}) > 1:
            return None
        qkv, (o, gate, up, down) = matrices[: len(names)], matrices[len(names) :]
        norm, head_dim = layer.input_layernorm, layer.self_attn.head_dim
        size, q, k, wide = norm.weight.shape[0], qkv[0].rows, qkv[1].rows, gate.rows
        shapes = [(q, size), *[(k, size)] * (len(qkv) - 1), (size, q), (wide, size), (wide, size), (size, wide)]
        sizes = [head_dim if name in ("q_norm", "k_norm") else 1 if name == "scalar" else size for name in vectors]
        if [(m.rows, m.cols) for m in matrices] != shapes or [v.numel() for v in vectors.values()] != sizes:
            return None  # for torch to complain of
        if k % head_dim or q % k:
            return None
        if any(_is_packed(a) != _is_packed(b) for a, b in ((qkv[0], qkv[1]), (qkv[0], qkv[-1]), (gate, up))):
            return None  # the library takes those of one input together
        argument = BlockArg(projections=len(qkv), size=size, head_dim=head_dim, eps=norm.eps)
        argument.o, argument.gate, argument.up, argument.down = o, gate, up, down
        for i, matrix in enumerate(qkv):
            argument.qkv[i] = matrix
        for name, vector in vectors.items():
            setattr(argument, name, vector.data_ptr())
        tensors = (*(f"{path}.weight" for path in paths), *_VECTORS.values())
        links = {(id(link[0]), link[1]): link for path in tensors for link in _links(layer, path)}  # each once
        hooks = [places for module in modules for places in hooks_of(module)]
        made_of = Links(list(links.values()), hooks, [module.__dict__ for module in modules])
        return cls(argument, made_of, vectors["k_norm"])

    def begin(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, M] -> queries [n, H, D], keys and values [n, K, D]: normalised, and turned by cos and sin [n, D/2]."""
        n, D = x.shape[0], self._head_dim
        assert x.shape == (n, self.size) and cos.shape == sin.shape == (n, D // 2)
        assert x.dtype is cos.dtype is sin.dtype is torch.float32
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        q, k, v = (x.new_empty(n, heads, D) for heads in (self._heads, self._kv_heads, self._kv_heads))
        library = loaded()
        library.block_begin(
            library.pool, self._at, x.data_ptr(), n, cos.data_ptr(), sin.data_ptr(),
            q.data_ptr(), k.data_ptr(), v.data_ptr(),
        )  # fmt: skip
        return q, k, v

    def end(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output [n, M] for its input x [n, M] and what attention gave, [n, H, D]."""
        assert attended.shape == (x.shape[0], self._heads, self._head_dim) and x.shape[1] == self.size
        assert x.dtype is torch.float32
        x, attended = x.contiguous(), attended.float().contiguous()  # under autocast attention may give bfloat16
        out = torch.empty_like(x)
        library = loaded()
        library.block_end(library.pool, self._at, x.data_ptr(), attended.data_ptr(), x.shape[0], out.data_ptr())
        return out


def _links(module: nn.Module, path: str) -> Iterator[Link]:
    """Every step from a module to a tensor below it: (a dictionary, a name in it, what it has there)."""
    *names, last = path.split(".")
    for name in names:
        yield module._modules, name, module._modules[name]
        module = module.get_submodule(name)
    holder = module._parameters if last in module._parameters else module._buffers
    yield holder, last, holder[last]


def _matrix(module: Any) -> MatrixArg | None:
    """What C is told about the weights of a linear layer; None where it reads no such ones, or the layer does more."""
    if type(module) is not nn.Linear and hasattr(module, "matrix"):
        return matrix_argument(module.matrix, module.matrix.cols)
    if type(module) is not nn.Linear or module.bias is not None or not _is_float(module.weight):
        return None
    return MatrixArg(module.weight.data_ptr(), *module.weight.shape, FLOAT)


def _is_packed(matrix: MatrixArg) -> bool:
    return bool(matrix.format != FLOAT)


def _is_float(tensor: Tensor) -> bool:
    """Whether it lies as C reads floats. A subclass of torch's tensors may have its numbers elsewhere."""
    plain = type(tensor) is nn.Parameter or type(tensor) is Tensor
    return plain and tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()


def _at(module: nn.Module, path: str) -> Tensor | None:
    """A parameter or buffer; None for what is neither, such as a weight that is computed when it is asked for."""
    owner, _, name = path.rpartition(".")
    holder = module.get_submodule(owner)
    return holder._parameters.get(name, holder._buffers.get(name))
