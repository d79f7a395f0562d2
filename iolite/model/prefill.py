"""A prompt goes through the model in chunks, so that scratch memory does not grow with its length.

A chunk may end anywhere but inside a picture or a video frame: their tokens look at each other both ways, so they
must be in one pass. A picture longer than the chunk makes its chunk longer. Sound is causal and may be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from iolite.cache import KVCache
from iolite.model.batch import RaggedBatch, Segment, gather_media
from iolite.model.unified import Unified
from iolite.prompt import Prompt, Span

DEFAULT_CHUNK = 512


def chunks(length: int, spans: tuple[Span, ...], size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each chunk of about size tokens; none ends inside a picture or a frame."""
    start = 0
    while start < length:
        stop = min(start + size, length)
        for span in spans:
            if span.kind != "audio" and span.start < stop < span.stop:
                stop = span.start if span.start > start else span.stop
        yield start, stop
        start = stop


@torch.inference_mode()
def prefill(
    model: Unified,
    prompt: Prompt,
    cache: KVCache,
    *,
    chunk_size: int = DEFAULT_CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Runs what the cache does not hold yet; yields the hidden states [n, M] of each chunk.

    progress(done, total) is called after each chunk. The cache must end outside pictures.
    """
    device = model.language_model.embed_tokens.weight.device
    blocks = prompt.blocks()
    ids = np.asarray(prompt.ids, np.int64)
    done = cache.length
    spans = tuple(s for s in prompt.spans if s.stop > done)
    rest = tuple(_cut(s, done, len(ids), done) for s in spans)
    for start, stop in [(a + done, b + done) for a, b in chunks(len(ids) - done, rest, chunk_size)]:
        inside = [(0, _cut(s, start, stop, start)) for s in spans if s.start < stop and s.stop > start]
        own = blocks[start:stop]
        two_way = torch.from_numpy(own).to(device) if own.any() else None
        batch = RaggedBatch(
            model.config.text, [Segment(cache, stop - start, two_way)], gather_media(inside, device), device
        )
        yield model(torch.from_numpy(ids[start:stop]).to(device), batch)
        if progress:
            progress(stop, len(ids))


def _cut(span: Span, start: int, stop: int, origin: int) -> Span:
    """The part of a span inside [start, stop), counted from origin."""
    a, b = max(span.start, start), min(span.stop, stop)
    rows = slice(a - span.start, b - span.start)
    positions = None if span.positions is None else span.positions[rows]
    return Span(span.kind, a - origin, b - a, span.array[rows], positions, span.digest)
