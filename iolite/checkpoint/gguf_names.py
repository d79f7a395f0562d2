"""The names that llama.cpp's GGUF files give to a checkpoint's tensors, and how the embedders' tensors lie in them.

A model is up to three files: the decoder with its tokenizer (`general.architecture` gemma4), the embedders of pictures
and sounds (clip, "mmproj-….gguf"), and the drafter (gemma4-assistant, "mtp-….gguf"). Names on our side are those of
`iolite.checkpoint.names`. Three tensors of the mmproj file lie otherwise than ours (S pixels: side of a patch):

    v.patch_embd.weight      columns in the order channel, row, column; ours: row, column, channel   [E, 3·S·S]
    v.patch_norm.1.*         likewise                                                                [3·S·S]
    v.position_embd.weight   [2, P, E]; ours [P, 2, E]
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from iolite.checkpoint import names

if TYPE_CHECKING:
    from torch import Tensor

ROPE = "rope_freqs.weight"  # 1 for every angle of the full layers that turns, 1e30 for the others; no weight

_WHOLE = {
    names.EMBEDDING: "token_embd.weight",
    "language_model.norm.weight": "output_norm.weight",
    names.LM_HEAD: "output.weight",
    "vision_embedder.patch_dense.weight": "v.patch_embd.weight",
    "vision_embedder.patch_dense.bias": "v.patch_embd.bias",
    "vision_embedder.patch_ln1.weight": "v.patch_norm.1.weight",
    "vision_embedder.patch_ln1.bias": "v.patch_norm.1.bias",
    "vision_embedder.patch_ln2.weight": "v.patch_norm.2.weight",
    "vision_embedder.patch_ln2.bias": "v.patch_norm.2.bias",
    "vision_embedder.pos_norm.weight": "v.patch_norm.3.weight",
    "vision_embedder.pos_norm.bias": "v.patch_norm.3.bias",
    "vision_embedder.pos_embedding": "v.position_embd.weight",
    "embed_vision.embedding_projection.weight": "mm.input_projection.weight",
    "embed_audio.embedding_projection.weight": "mm.a.input_projection.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
}

# The drafter's tensors, by the names in its safetensors file without "model.".
_DRAFTER = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "pre_projection.weight": "nextn.pre_projection.weight",
    "post_projection.weight": "nextn.post_projection.weight",
}

_OURS_LAYER = re.compile(r"language_model\.layers\.(\d+)\.(.+)")
_DRAFTER_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_THEIRS_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,3})\.(.+)", re.ASCII)

_WHOLE_BACK = {theirs: ours for ours, theirs in _WHOLE.items()}
_LAYER_BACK = {theirs: ours for ours, theirs in _LAYER.items()}
_DRAFTER_BACK = {theirs: ours for ours, theirs in _DRAFTER.items()}

_PATCH_TENSORS = ("vision_embedder.patch_dense.weight", "vision_embedder.patch_ln1.")
_POSITIONS = "vision_embedder.pos_embedding"


def to_gguf(name: str) -> str:
    """llama.cpp's name of one of our tensors. Raises KeyError for a name that is none of ours."""
    layer = _OURS_LAYER.fullmatch(name)
    return f"blk.{layer[1]}.{_LAYER[layer[2]]}" if layer else _WHOLE[name]


def from_gguf(name: str) -> str | None:
    """Our name of a tensor of the model or of the mmproj file; None for a tensor that is no part of the family."""
    layer = _THEIRS_LAYER.fullmatch(name)
    if not layer:
        return _WHOLE_BACK.get(name)
    ours = _LAYER_BACK.get(layer[2])
    return ours and f"language_model.layers.{layer[1]}.{ours}"


def drafter_to_gguf(name: str) -> str | None:
    """llama.cpp's name of a drafter's tensor, from its name in the safetensors file; None for what it leaves out."""
    plain = name.removeprefix("model.")
    layer = _DRAFTER_LAYER.fullmatch(plain)
    if not layer:
        return _DRAFTER.get(plain)
    theirs = _LAYER.get(layer[2])
    return theirs and f"blk.{layer[1]}.{theirs}"


def drafter_from_gguf(name: str) -> str | None:
    """The name in the safetensors file of a drafter's tensor; None for a tensor that is no part of one."""
    layer = _THEIRS_LAYER.fullmatch(name)
    if layer:
        ours = _LAYER_BACK.get(layer[2])
        return ours and f"model.layers.{layer[1]}.{ours}"
    plain = _DRAFTER_BACK.get(name)
    return plain and (plain if "projection" in plain else f"model.{plain}")


def gguf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that our tensor `name` of this shape has in a GGUF file."""
    return (shape[1], shape[0], shape[2]) if name == _POSITIONS else shape


def to_gguf_layout(name: str, tensor: Tensor) -> Tensor:
    """Our tensor `name` as it lies in a GGUF file. Copies only what lies otherwise."""
    if name == _POSITIONS:
        return tensor.transpose(0, 1).contiguous()
    if name.startswith(_PATCH_TENSORS):
        return tensor.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2)
    return tensor


def from_gguf_layout(name: str, tensor: Tensor) -> Tensor:
    """The inverse of `to_gguf_layout`."""
    if name == _POSITIONS:
        return tensor.transpose(0, 1).contiguous()
    if name.startswith(_PATCH_TENSORS):
        return tensor.unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2)
    return tensor
