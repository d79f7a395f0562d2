"""Drafters: found, held against the model that they are to draft for, made into a network, and written to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iolite.checkpoint import packed_folder
from iolite.checkpoint.files import replacing
from iolite.checkpoint.folder import WEIGHTS
from iolite.checkpoint.gguf_drafter import MODEL_TYPE, DrafterSource, open_drafter, open_gguf_drafter
from iolite.checkpoint.gguf_source import is_gguf
from iolite.checkpoint.safetensors import streaming
from iolite.checkpoint.source import Progress
from iolite.config import FULL, SLIDING, ModelConfig, TextConfig
from iolite.errors import CheckpointError, UsageError
from iolite.model.drafter import Drafter
from iolite.quant.formats import PackedMatrix
from iolite.quant.linear import install
from iolite.quant.schemes import quantise_named, scheme_named
from iolite.text.tokenizer import SPECIAL_TOKENS, Tokenizer, tokenizer_config

_HINT = "use the drafter that was trained for this model"


def find_drafter(path: Path) -> DrafterSource:
    """The drafter in a folder or in a GGUF file. Raises CheckpointError for anything else; no weight is read."""
    return open_gguf_drafter(path) if is_gguf(path) else open_drafter(path)


def check_pair(model: TextConfig, drafter: TextConfig, backbone_hidden_size: int) -> None:
    """Raises UsageError, with both sizes, unless the drafter can read the model's hidden states, keys and values.

    What has to agree is the width, the vocabulary, and for every kind of layer that the drafter has: that the model has
    it too, and its key-value heads, their size, rope and the window.
    """
    kinds = sorted(set(drafter.layer_types))
    if missing := [kind for kind in kinds if kind not in model.layer_types]:
        raise UsageError(
            f"the drafter has {_layers(drafter)}, but the model {_layers(model)}: it would read the keys of a "
            f"{missing[0].replace('_', ' ')} layer",
            _HINT,
        )
    facts: list[tuple[str, float, float]] = [
        ("hidden states of {}", backbone_hidden_size, model.hidden_size),
        ("a vocabulary of {}", drafter.vocab_size, model.vocab_size),
    ]
    for kind in kinds:
        place, theirs, ours = kind.replace("_", " "), _reads(drafter, kind), _reads(model, kind)
        facts += [(f"{place} {what}", theirs[what], ours[what]) for what in theirs]
    for what, wanted, found in facts:
        if wanted != found:
            raise UsageError(f"the drafter is for {what.format(wanted)}, but the model has {found}", _HINT)
    if SLIDING in kinds and model.sliding_window < 2:
        raise UsageError("a window of 1 token holds nothing that a drafter could look at", "leave the drafter out")


def _layers(config: TextConfig) -> str:
    full = sum(config.is_full(i) for i in range(config.num_hidden_layers))
    return f"{config.num_hidden_layers - full} sliding and {full} full layers"


def _reads(config: TextConfig, kind: str) -> dict[str, float]:
    """What keys and values of a kind of layer are like, by a text that has room for the number."""
    layer = config.layer_types.index(kind)
    size, rope = config.layer_head_dim(layer), config.rope_full if kind == FULL else config.rope_sliding
    facts = {
        "over {} key-value heads": config.layer_kv_heads(layer),
        "over heads of {}": size,
        "with {} angles of rope": rope.num_angles(size),
        "with the rope base {}": rope.theta,
    }
    return facts if kind == FULL else facts | {"in a window of {}": config.sliding_window}


def assemble_drafter(
    source: DrafterSource,
    scheme: str | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Drafter:
    """The network with its weights: float ones in dtype, matrices packed where they are so in the source.

    scheme ("int4", "int8") packs the others; what is packed keeps its format. progress(done, in all, what) is called
    for every tensor. Raises CheckpointError for weights that cannot be packed.
    """
    with torch.device("meta"):
        network = Drafter(source.text, source.backbone_hidden_size)
    state: dict[str, Tensor] = {}
    for name, weight in read_weights(source, scheme, progress):
        if isinstance(weight, PackedMatrix):
            install(network, name, PackedMatrix(weight.data.to(device), weight.rows, weight.cols))
            state[name] = network.get_buffer(name)
        else:
            state[name] = weight.to(device=device, dtype=dtype)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def load_drafter(
    path: Path, scheme: str | None = None, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Drafter:
    """`find_drafter`, then `assemble_drafter`."""
    return assemble_drafter(find_drafter(path), scheme, dtype=dtype, device=device)


def read_weights(
    source: DrafterSource, scheme: str | None, progress: Progress | None = None
) -> Iterator[tuple[str, Tensor | PackedMatrix]]:
    """All tensors by the names in the safetensors file, matrices first; packed by the scheme if one is given."""
    chosen = scheme_named(scheme) if scheme else None
    order = sorted(source.shapes.items(), key=lambda item: -len(item[1]))
    for done, (name, shape) in enumerate(order):
        if progress:
            progress(done, len(order), f"drafter: {name}")
        weight: Tensor | PackedMatrix | None = source.packed(name) if len(shape) == 2 else None
        if weight is None:
            weight = source.weight(name)
            if chosen and len(shape) == 2:
                format = chosen.head if name == "model.embed_tokens.weight" else chosen.layers
                weight = quantise_named(name, weight, format)
        yield name, weight


def trained_source(name: str, network: Drafter, read_tokenizer: Callable[[], Tokenizer]) -> DrafterSource:
    """A network of float weights as a source, for `write_folder`: in bfloat16, as drafters are published."""
    state = network.state_dict()
    return DrafterSource(
        name,
        network.config,
        network.backbone_hidden_size,
        read_tokenizer,
        {key: tuple(tensor.shape) for key, tensor in state.items()},
        lambda key: state[key].detach().to("cpu", torch.bfloat16),
    )


def write_folder(
    folder: Path,
    source: DrafterSource,
    scheme: str | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> None:
    """A drafter in the published layout, or packed by a scheme in iolite's own; config.json comes last.

    Without a scheme packed matrices become floats; with one they keep their formats. A tokenizer is written beside.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror})") from None
    (folder / "config.json").unlink(missing_ok=True)  # an earlier drafter's must not be taken for this one's
    metadata = {"format": "pt"}  # Transformers refuses a file without it
    if scheme:
        metadata["iolite"] = f"{scheme} {packed_folder.VERSION}"
        weights = read_weights(source, scheme, progress)
    else:
        weights = ((name, source.weight(name)) for name in source.shapes)
    floats = torch.float32
    with streaming(folder / WEIGHTS, metadata, list(source.shapes)) as out:
        for name, weight in weights:
            if isinstance(weight, PackedMatrix):
                out.write(name, weight.data)
            else:
                out.write(name, weight)
                floats = weight.dtype
    if tokenizer:
        special = {token: name for token, name in SPECIAL_TOKENS.items() if tokenizer.token_id(token) is not None}
        _write_text(folder / "tokenizer.json", tokenizer.to_json())
        _write_text(folder / "tokenizer_config.json", json.dumps(tokenizer_config(special), indent=2) + "\n")
    data = drafter_json(source.text, source.backbone_hidden_size, str(floats).removeprefix("torch."))
    if scheme:
        data["quantization_config"] = packed_folder.quantization_config(scheme)
    _write_text(folder / "config.json", json.dumps(data, indent=2) + "\n")


def drafter_json(text: TextConfig, backbone_hidden_size: int, dtype: str) -> dict[str, Any]:
    """A drafter's config.json, in the published spelling."""
    inner = ModelConfig(text=text, vision=None, audio=None).to_hf()["text_config"]
    return {
        "architectures": ["Gemma4UnifiedAssistantForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "backbone_hidden_size": backbone_hidden_size,
        "use_ordered_embeddings": False,
        "tie_word_embeddings": True,
        "text_config": inner | {"num_kv_shared_layers": text.num_hidden_layers},
    }


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
