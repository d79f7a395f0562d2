"""Tiny random drafters for the checkpoints of `tiny.py`, made by Transformers, and its own steps with them.

Two faults of Transformers 5.23.0 stand in the way and are mended here, without a change to its mathematics:

- a model without shared layers does not give out its last keys and values: `reference_keys` marks the layers that do;
- a drafter, all of whose layers read another model's, is refused by `kv_sharing_modes`: `reading_only` answers for it.

A third is in how its generator feeds the drafter: it cuts keys and values to one more than are valid, and the drafter's
mask lets a sliding layer see window + 1 of what it is given. `reference_keys` gives out just what the new position may
see, all tokens before it and the window - 1 last ones, so that the mask has nothing to hide.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import Gemma4UnifiedAssistantConfig, Gemma4UnifiedAssistantForCausalLM, Gemma4UnifiedTextConfig

from support.oracle import Sample, reference_masks, reference_media
from support.tiny import FULL, SLIDING, TINY, randomise, reference_model

# By the name of the model: the drafter's layers, its width, and a soft-cap that it must not obey.
DRAFTERS: dict[str, tuple[tuple[str, ...], int, float | None]] = {
    "published": ((SLIDING, SLIDING, SLIDING, FULL), 40, None),
    "narrow": ((SLIDING, FULL), 24, 2.0),
    "own-values": ((SLIDING, SLIDING, SLIDING, FULL), 56, None),
    "two-global-heads": ((FULL, SLIDING, FULL), 24, 5.0),
    "full-first": ((FULL,), 32, None),
}

Shared = dict[str, tuple[Tensor, Tensor]]
"""By the kind of layer: keys and values [1, K, S, D]."""


@contextmanager
def reading_only() -> Iterator[None]:
    """Inside, Transformers makes text models all of whose layers read other keys and values."""
    modes = vars(Gemma4UnifiedTextConfig)["kv_sharing_modes"].fget

    def answer(config: Any) -> list[str | None]:
        layers = config.num_hidden_layers
        return ["reuse"] * layers if config.num_kv_shared_layers == layers else modes(config)

    with mock.patch.object(Gemma4UnifiedTextConfig, "kv_sharing_modes", property(answer)):
        yield


@functools.cache
def reference_drafter(name: str) -> Gemma4UnifiedAssistantForCausalLM:
    """A drafter for the model `name`, float32, with literal ("eager") attention."""
    layers, width, softcap = DRAFTERS[name]
    model: Any = TINY[name].hf_config().text_config
    text = model.to_dict() | {
        "hidden_size": width,
        "intermediate_size": 3 * width + 8,
        "num_hidden_layers": len(layers),
        "num_attention_heads": 2 * model.num_attention_heads,
        "layer_types": list(layers),
        "num_kv_shared_layers": len(layers),
        "final_logit_softcapping": softcap,
        "global_head_dim": TINY[name].full_head_dim,
        "num_global_key_value_heads": TINY[name].full_kv_heads,
    }
    del text["per_layer_config"]
    with reading_only():
        config = Gemma4UnifiedAssistantConfig(text_config=text, backbone_hidden_size=TINY[name].hidden)
        config._attn_implementation = "eager"
        drafter = Gemma4UnifiedAssistantForCausalLM(config).eval()
    randomise(drafter, TINY[name].seed + 100)
    return drafter.requires_grad_(False)


def save_reference_drafter(name: str, folder: Path) -> Path:
    """Writes the drafter as Transformers 5.23.0 does, but without a tokenizer."""
    reference_drafter(name).save_pretrained(folder)
    return folder


@torch.no_grad()
def reference_keys(name: str, sample: Sample) -> tuple[Shared, Tensor]:
    """What a drafter may see of the model `name` after a prompt, and the model's last hidden state [1, M]."""
    model, window = reference_model(name), TINY[name].window
    last = {kind: i for i, kind in enumerate(TINY[name].layers)}
    for i, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.store_full_length_kv = i in last.values()
    masks = reference_masks(model, torch.from_numpy(sample.token_types())[None])
    out = model(
        torch.tensor([sample.ids]),
        attention_mask=masks,
        use_cache=False,
        return_shared_kv_states=True,
        output_hidden_states=True,
        **reference_media([sample]),
    )
    cut = {FULL: len(sample.ids), SLIDING: window - 1}
    shared = {kind: (k[:, :, -cut[kind] :], v[:, :, -cut[kind] :]) for kind, (k, v) in out.shared_kv_states.items()}
    return shared, out.hidden_states[-1][:, -1]


@torch.no_grad()
def reference_steps(
    name: str, shared: Shared, token: int, hidden: Tensor, position: int, count: int
) -> Iterator[Tensor]:
    """The logits [vocabulary] of each step of a greedy chain; hidden [1, M]."""
    drafter, table = reference_drafter(name), reference_model(name).get_input_embeddings()
    for _ in range(count):
        inputs = torch.cat((table(torch.tensor([[token]])), hidden[:, None]), -1)
        out = drafter(
            inputs_embeds=inputs, position_ids=torch.tensor([[position]]), shared_kv_states=shared, use_cache=False
        )
        hidden, token = out.last_hidden_state[:, 0], int(out.logits.argmax())
        yield out.logits[0, 0]
