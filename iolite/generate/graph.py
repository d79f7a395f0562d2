"""The decode step with fixed shapes, which a GPU can play back as one CUDA graph.

Starting the thousand small kernels of a step from Python takes longer than running them. A CUDA graph records them once
and starts them all at once, but on the same tensors every time: so the new tokens' embeddings, the length of the
sequence and the cache's buffers stay where they are, and everything that depends on the length (positions, rows of the
cache, masks) is computed on the device from a tensor. `StaticBatch` is that view of a cache, `StaticStep` the step.

Used by `iolite/generate/loop.py` on CUDA devices; IOLITE_CUDA_GRAPH=0 in the environment turns it off. Everything but
the recording itself (`capture`) is tested on the CPU; a graph has not been recorded on a GPU yet.

Letters: n new tokens, M hidden size, V vocabulary.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iolite.cache import GrowingCache, KVCache, RingCache
from iolite.config import TextConfig
from iolite.kernels import ring
from iolite.model.attention import Attend
from iolite.model.batch import Media
from iolite.model.unified import Unified

Work = Callable[[], tuple[Tensor, Tensor]]


def wanted(device: torch.device) -> bool:
    """Whether single tokens are to be drawn by a `StaticStep` on this device."""
    return device.type == "cuda" and os.environ.get("IOLITE_CUDA_GRAPH") != "0"


class StaticBatch:
    """n new tokens of one sequence, whose length is a tensor on the device; its cache's buffers have room for them."""

    plain = None

    def __init__(self, config: TextConfig, cache: KVCache, length: Tensor, n: int) -> None:
        """length: how many tokens the cache holds, an integer tensor without dimensions; cache.length is not read."""
        self.config, self.cache, self.length, self.media = config, cache, length, Media()
        self.positions = length + torch.arange(n, device=length.device)

    def attend(self, layer: int, key_weight: Tensor | None = None) -> Attend:
        window = None if self.config.is_full(layer) else self.config.sliding_window
        rows = self.cache.layers[layer]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for store, new in zip(rows.stores, rows.encode(k, v, key_weight), strict=True):
                ring.write(store, new, self.length)
            keys = rows.keys(rows.stores, 0, 0, rows.buffers[0].shape[0])
            return rows.layout.output(ring.attend(rows.layout.queries(q, key_weight), keys, self.length, window))

        return attend

    def finish(self) -> None:
        pass


def reserve(cache: KVCache, tokens: int) -> None:
    """Makes room for that many tokens in a cache that has read some already."""
    for layer in cache.layers:
        old = layer.buffers[0]
        wanted = tokens if isinstance(layer, GrowingCache) else layer.limit
        layer.reserve(wanted, old.device, old.dtype)
        layer.used = max(layer.used, min(tokens, layer.limit))
        if isinstance(layer, RingCache):
            layer.oldest = max(layer.oldest, tokens - layer.limit)


class StaticStep:
    """Passes over n tokens each that continue one cache, in the same tensors every time.

    On a CUDA device the first pass is recorded and then played back; when the cache outgrows its buffers, it is
    recorded again. `note` says why a pass could not be recorded and is run operator by operator, None otherwise.
    """

    def __init__(self, network: Unified, cache: KVCache, n: int = 1, *, backend: str | None = None) -> None:
        """cache: one that a prompt has been read into. backend: a backend of torch.compile to compile the pass with."""
        self.network, self.cache, self.n = network, cache, n
        self.device = network.language_model.embed_tokens.weight.device
        self.length = torch.zeros((), dtype=torch.int64, device=self.device)
        self.hidden: Tensor | None = None  # [n, M], the new tokens' embeddings
        self.note: str | None = None
        self._compute = self._pass
        if backend is not None:
            self._compute = torch.compile(self._pass, backend=backend, fullgraph=True, dynamic=False)
        self._replay: Callable[[], None] | None = None
        self._found: tuple[Tensor, Tensor] | None = None
        self._kept: list[Tensor | None] = []

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states [n, M] of ids (n of them) and float32 scores [n, V] of what follows each. The next call
        overwrites them."""
        assert len(ids) == self.n
        reserve(self.cache, self.cache.length + self.n)
        kept = [part for layer in self.cache.layers for part in (layer.buffers[0], layer.layout.factor)]
        if any(new is not old for new, old in zip(kept, self._kept, strict=False)):
            self._replay = self._found = None  # whoever made the cache grow, or begin anew
        self._kept = kept
        # The embedding stays outside of what is recorded: it copies its scale from the host.
        embedded = self.network.embed(torch.tensor(ids, device=self.device), Media())
        if self.hidden is None:
            self.hidden = torch.empty_like(embedded)
        self.hidden.copy_(embedded)
        self.length.fill_(self.cache.length)
        found = self._run(self.hidden)
        self.cache.length += self.n
        return found

    def _run(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        def work() -> tuple[Tensor, Tensor]:
            return self._compute(hidden, self.length)

        if self._replay is None and self.note is None and wanted(self.device):
            try:
                self._replay, self._found = capture(work, self.device)
            except RuntimeError as error:
                self.note = f"the decode step could not be recorded as a CUDA graph: {str(error).splitlines()[0]}"
                warnings.warn(f"{self.note}; it runs without one", RuntimeWarning, stacklevel=3)
        if self._replay is None or self._found is None:
            return work()
        self._replay()
        return self._found

    def _pass(self, embedded: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        batch = StaticBatch(self.network.config.text, self.cache, length, self.n)
        hidden = self.network.language_model(embedded, batch)
        return hidden, self.network.logits(hidden)


def capture(work: Work, device: torch.device) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
    """Records the CUDA kernels that work starts: a function that starts them again, and the tensors they write to.

    Work runs once before it is recorded, which is when kernels are compiled and tried out and libraries take their
    memory. Raises RuntimeError when it does something that cannot be recorded, such as waiting for the device.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = work()
    return graph.replay, out
