"""The drafter: a small decoder that guesses the next tokens out of what its model has computed already.

Its layers have queries only. Sliding layers look at the keys and values of the model's last sliding layer, full layers
at those of its last full layer, as they lie in the model's cache; the drafter writes nothing, and there is no prompt
for it to read. A draft of several tokens is a chain: each step takes the newest token's embedding and the hidden state
that the token was drawn from, the model's own at first and then what the step before has projected back to the model's
width. Every step of a chain stands at one position, that of the first of these tokens: the cache ends just before it.

Names are the checkpoint's. Letters: N sequences, M hidden size of the model, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from iolite.cache import KVCache, RingCache
from iolite.config import FULL, TextConfig
from iolite.kernels import ops
from iolite.kernels.contracts import Keys
from iolite.model.layers import Block
from iolite.model.norm import RMSNorm
from iolite.model.unified import Unified

Look = Callable[[Tensor], Tensor]
"""Queries [N, H, D] -> what they have seen [N, H, D]."""


class View(Protocol):
    """What a drafter asks of its surroundings: where it stands, and what there is to see."""

    positions: Tensor
    """[N], where the newest tokens stand."""

    def look(self, kind: str) -> Look:
        """For layers of a kind, sliding or full."""
        ...


class CachedView:
    """Every row of the batch looks into one sequence's cache, which must neither grow nor go back meanwhile.

    A full layer sees all tokens of the cache, a sliding layer the `window` - 1 last ones: what the model's own layer
    would see from the new position, less the new token itself. As many are there also after a rewind.
    """

    def __init__(self, model: Unified, caches: Sequence[KVCache]) -> None:
        """Raises ValueError for a cache without tokens."""
        if not all(cache.length for cache in caches):
            raise ValueError("a draft goes on from a cache that holds tokens")
        self.caches = caches
        self._decoder = model.language_model
        self._last = {kind: i for i, kind in enumerate(model.config.text.layer_types)}  # of each kind
        device = self._decoder.norm.weight.device
        self.positions = torch.tensor([cache.length for cache in caches], device=device)

    def look(self, kind: str) -> Look:
        layer = self._last[kind]
        weight = self._decoder.get_parameter(f"layers.{layer}.self_attn.k_norm.weight")

        def look_into(cache: KVCache, q: Tensor) -> Tensor:
            layout = cache.layers[layer].layout
            return layout.output(ops.attend(layout.queries(q, weight), held(cache, layer), None, None))

        def look(q: Tensor) -> Tensor:
            if len(self.caches) == 1:
                return look_into(self.caches[0], q)
            return torch.cat([look_into(*pair) for pair in zip(self.caches, q.split(1), strict=True)])

        return look


def held(cache: KVCache, layer: int) -> Keys:
    """The keys of a layer that a query at the cache's end may look at, without one of its own."""
    rows, length = cache.layers[layer], cache.length
    count = min(length, rows.window - 1) if isinstance(rows, RingCache) else length
    return rows.keys(rows.stores, (length - count) % rows.limit, count, rows.limit)


class QueryAttention(nn.Module):
    """Attention without keys and values of its own."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        size, self.eps = config.hidden_size, config.rms_norm_eps
        self.head_dim = config.layer_head_dim(layer)
        q_size = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(size, q_size, bias=False)
        self.o_proj = nn.Linear(q_size, size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, self.eps)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], look: Look) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [N, H, D]
        q = ops.norm_rope(q, self.q_norm.weight, self.eps, *angles)
        return self.o_proj(look(q).flatten(-2))


class DrafterLayer(Block):
    """A block around attention that has queries only."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__(config, QueryAttention(config, layer))


class DrafterDecoder(nn.Module):
    """`model` of the checkpoint: the blocks, and the vocabulary's table, which a drafter only reads as its head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.layers = nn.ModuleList(DrafterLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, view: View) -> Tensor:
        """x [N, hidden size] -> hidden states after the final norm."""
        kinds = set(self.config.layer_types)
        angles = {kind: self._angles(kind, view.positions) for kind in kinds}
        looks = {kind: view.look(kind) for kind in kinds}
        for kind, layer in zip(self.config.layer_types, self.layers, strict=True):
            x = layer(x, angles[kind], looks[kind])
        return self.norm(x)

    def _angles(self, kind: str, positions: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        size, rope = (c.global_head_dim, c.rope_full) if kind == FULL else (c.head_dim, c.rope_sliding)
        return ops.rope_angles(positions, size, rope.theta, rope.num_angles(size))


class Drafter(nn.Module):
    """The decoder between two projections, from the model's width and back to it. `state_dict()` has the published
    names."""

    def __init__(self, config: TextConfig, backbone_hidden_size: int) -> None:
        super().__init__()
        self.config, self.backbone_hidden_size = config, backbone_hidden_size
        self.model = DrafterDecoder(config)
        self.pre_projection = nn.Linear(2 * backbone_hidden_size, config.hidden_size, bias=False)
        self.post_projection = nn.Linear(config.hidden_size, backbone_hidden_size, bias=False)

    def forward(self, embedded: Tensor, hidden: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """One step of N chains: the newest tokens' scaled embeddings [N, M], and the hidden states [N, M] that they
        were drawn from -> scores of the next token [N, vocabulary] in float32, without a soft-cap, and the hidden
        states [N, M] of the step after."""
        x = torch.cat((embedded, hidden), -1).to(self.model.norm.weight.dtype)
        x = self.model(self.pre_projection(x), view)
        return self.model.embed_tokens(x).float(), self.post_projection(x)


class Chains:
    """Guesses for N sequences, step by step; whoever has enough leaves.

    tokens [N] are the newest ones, which the caches do not hold yet; hidden [N, M] is what they were drawn from: the
    model's hidden states, after its final norm, of the caches' last tokens.
    """

    def __init__(
        self, drafter: Drafter, model: Unified, tokens: Tensor, hidden: Tensor, caches: Sequence[KVCache]
    ) -> None:
        self._drafter, self._model = drafter, model
        self._tokens, self._hidden = tokens, hidden
        self._view = CachedView(model, caches)

    @torch.inference_mode()
    def step(self) -> tuple[Tensor, Tensor]:
        """The likeliest next tokens [N] and their probabilities [N] in the drafter's eyes."""
        embedded = self._model.language_model.embed(self._tokens)
        scores, self._hidden = self._drafter(embedded, self._hidden, self._view)
        self._tokens, probabilities = likeliest(scores)
        return self._tokens, probabilities

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only, numbered from then on as they are listed."""
        if len(rows) < len(self._view.caches):
            index = torch.tensor(rows, device=self._tokens.device)
            self._tokens, self._hidden = self._tokens[index], self._hidden[index]
            self._view = CachedView(self._model, [self._view.caches[row] for row in rows])


def likeliest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row of float32 scores [N, V], and its probability: [N], [N]."""
    if scores.device.type != "cpu":
        best, tokens = scores.max(-1)
        return tokens, (best - scores.logsumexp(-1)).exp()
    # By NumPy, on one thread: torch's threads would first have to get hold of the cores on which the kernels' threads
    # wait for their next job, which takes ten times as long as the work.
    rows = scores.numpy()
    chosen = rows.argmax(-1)
    largest = np.take_along_axis(rows, chosen[:, None], -1)
    return torch.from_numpy(chosen), torch.from_numpy(1 / np.exp(rows - largest).sum(-1))
