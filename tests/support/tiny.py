"""Tiny random checkpoints, made by Transformers, in which no number sits at the value that hides a mistake.

Norm weights, `layer_scalar`, the position table and every epsilon are far from what a fresh model starts with: a
norm that is left out, a `1 + weight`, a swapped axis or the wrong epsilon then moves the logits by far more than the
tests allow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

SLIDING, FULL = "sliding_attention", "full_attention"
FIVE_TO_ONE = (SLIDING,) * 5 + (FULL,)

# A vocabulary of 96 with the family's special tokens inside; ids from FIRST_TEXT on are plain text.
VOCABULARY, FIRST_TEXT = 96, 20
MEDIA_TOKENS: dict[str, Any] = {
    "boi_token_id": 10,
    "image_token_id": 11,
    "eoi_token_id": 12,
    "boa_token_id": 13,
    "audio_token_id": 14,
    "eoa_token_index": 15,
    "video_token_id": 16,
}


@dataclass(frozen=True)
class Tiny:
    """One tiny checkpoint. Sizes are picked so that no two that could be confused are equal."""

    hidden: int = 48
    layers: tuple[str, ...] = FIVE_TO_ONE
    heads: int = 4
    kv_heads: int = 2
    full_kv_heads: int = 1
    head_dim: int = 8
    full_head_dim: int = 16
    window: int = 16
    share_kv: bool = True
    tied: bool = True
    softcap: float | None = 30.0
    rotary: float = 0.25
    theta: tuple[float, float] = (10_000.0, 1_000_000.0)  # sliding, full
    eps: float = 1e-6
    patch: tuple[int, int] = (2, 2)  # 16-pixel patches and how many make a token, shrunk: 4 x 4 pixels for one token
    vision: bool = True
    audio: bool = True
    samples_per_token: int = 24
    media_eps: float = 1e-6
    positions: int = 40
    seed: int = 0

    def hf_config(self) -> Gemma4UnifiedConfig:
        text = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden + 8,
            "num_hidden_layers": len(self.layers),
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "global_head_dim": self.full_head_dim,
            "num_global_key_value_heads": self.full_kv_heads,
            "attention_k_eq_v": self.share_kv,
            "sliding_window": self.window,
            "layer_types": list(self.layers),
            "final_logit_softcapping": self.softcap,
            "rms_norm_eps": self.eps,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": self.tied,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": self.theta[0]},
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": self.theta[1],
                    "partial_rotary_factor": self.rotary,
                },
            },
        }
        vision = {
            "patch_size": self.patch[0],
            "pooling_kernel_size": self.patch[1],
            "mm_embed_dim": self.hidden + 8,
            "output_proj_dims": self.hidden + 8,
            "mm_posemb_size": self.positions,
            "rms_norm_eps": self.media_eps,
        }
        audio = {"audio_embed_dim": self.samples_per_token, "rms_norm_eps": self.media_eps}
        return Gemma4UnifiedConfig(
            text_config=text,
            vision_config=vision if self.vision else None,
            audio_config=audio if self.audio else None,
            tie_word_embeddings=self.tied,
            **MEDIA_TOKENS,
        )


TINY = {
    # The proportions of the 12B: K = V and one key-value head on the full layers, twelve layers.
    "published": Tiny(hidden=64, layers=FIVE_TO_ONE * 2, head_dim=16, full_head_dim=32, seed=1),
    # The smallest heads, the smallest window, an untied head, no cap, half of each full head rotated.
    "narrow": Tiny(
        hidden=32, kv_heads=1, window=8, tied=False, softcap=None, rotary=0.5, theta=(1000.0, 50_000.0), seed=2
    ),
    # Values of their own everywhere; the full layers then keep the sliding layers' number of key-value heads.
    "own-values": Tiny(kv_heads=4, full_kv_heads=2, share_kv=False, window=24, softcap=5.0, eps=1e-3, seed=3),
    # Two key-value heads on the full layers, another pattern, a head size that 0.25 does not divide evenly.
    "two-global-heads": Tiny(
        hidden=96,
        layers=(SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL),
        heads=8,
        kv_heads=4,
        full_kv_heads=2,
        head_dim=20,
        full_head_dim=28,
        window=64,
        media_eps=1e-3,
        seed=4,
    ),
    # Full layers first and in a row; equal head sizes, as in the embedded model.
    "full-first": Tiny(layers=(FULL, SLIDING, FULL, FULL), head_dim=16, full_head_dim=16, window=10, seed=5),
    "text-only": Tiny(vision=False, audio=False, seed=6),
    "no-audio": Tiny(audio=False, kv_heads=4, seed=7),
    "no-vision": Tiny(vision=False, tied=False, seed=8),
    # The window of the 12B with its largest picture, 1,120 tokens: the one case where a block outgrows the window.
    "wide-window": Tiny(hidden=32, window=1024, positions=1120, seed=9),
    # Real 48 x 48 pixel patches and real 640-sample frames, so that the media pipelines can feed it.
    "real-media": Tiny(patch=(16, 3), samples_per_token=640, positions=300, seed=10),
}


@functools.cache
def reference_model(name: str) -> Gemma4UnifiedForConditionalGeneration:
    """The named checkpoint as Transformers' own model, float32, with its literal ("eager") attention."""
    tiny = TINY[name]
    config = tiny.hf_config()
    config._attn_implementation = "eager"
    model = Gemma4UnifiedForConditionalGeneration(config).eval()
    randomise(model, tiny.seed)  # in place, so a tied head stays tied
    return model.requires_grad_(False)


def save_reference(name: str, folder: Path) -> Path:
    """Writes the checkpoint as Transformers 5.23.0 does."""
    reference_model(name).save_pretrained(folder)
    return folder


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Fresh weights: see the module's first lines. Products of matrices keep the size of what they are given."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=rng) * (high - low) + low

    def signed(like: Tensor, low: float, high: float) -> Tensor:
        sign = torch.where(torch.rand(like.shape, generator=rng) < 0.25, -1.0, 1.0)
        return sign * uniform(like, low, high)

    for name, tensor in model.state_dict().items():
        if name.endswith("layer_scalar"):
            value = uniform(tensor, 0.3, 1.1)
        elif "patch_ln" in name or "pos_norm" in name:
            value = signed(tensor, 0.3, 1.8) if name.endswith("weight") else uniform(tensor, -0.7, 0.7)
        elif "q_norm" in name or "k_norm" in name:
            # Scores are not divided by sqrt(D): these weights do it. Larger ones would make every softmax a hard
            # choice, and then the rounding of two right models would differ by more than a mistake does.
            value = signed(tensor, 0.2, 0.9) * (8 / len(tensor)) ** 0.25
        elif "norm" in name:
            value = signed(tensor, 0.3, 1.6)
        elif name.endswith("pos_embedding"):
            value = torch.randn(tensor.shape, generator=rng)
        elif name.endswith("patch_dense.weight"):
            # Small, so that the variance in the LayerNorm after it is near the epsilon of 1e-5 and shows it.
            value = 0.02 * torch.randn(tensor.shape, generator=rng) / tensor.shape[1] ** 0.5
        elif name.endswith("patch_dense.bias"):
            value = 0.005 * torch.randn(tensor.shape, generator=rng)
        elif "embed_tokens" in name or "lm_head" in name:
            value = 1.5 * torch.randn(tensor.shape, generator=rng) / tensor.shape[1] ** 0.5
        elif tensor.ndim == 2:
            value = torch.randn(tensor.shape, generator=rng) / tensor.shape[1] ** 0.5
        else:
            raise AssertionError(f"no rule for {name} {tuple(tensor.shape)}")
        tensor.copy_(value)
