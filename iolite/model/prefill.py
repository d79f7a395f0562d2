"""A prompt goes through the model in chunks, so that scratch memory does not grow with its length.

A chunk may end anywhere but inside a picture or a video frame: their tokens look at each other both ways, so they
must be in one pass. A picture longer than the chunk makes its chunk longer. Sound is causal and may be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from iolite.cache import KVCache
from iolite.model.batch import RaggedBatch
from iolite.model.unified import Unified
from iolite.prompt import Prompt, Span

DEFAULT_CHUNK = 512


def chunks(length: int, spans: Sequence[Span], size: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """(start, stop) of each chunk of about size tokens; none ends inside a picture or a frame."""
    while start < length:
        stop = chunk_end(start, length, spans, size)
        yield start, stop
        start = stop


def chunk_end(start: int, length: int, spans: Sequence[Span], size: int) -> int:
    """Where the chunk of about size tokens that begins at start ends."""
    stop = min(start + size, length)
    for span in spans:
        if span.kind != "audio" and span.start < stop < span.stop:
            stop = span.start if span.start > start else span.stop
    return stop


def part_of(prompt: Prompt, start: int, stop: int) -> Prompt:
    """Tokens start..stop of a prompt and the media among them, counted from start."""
    spans = tuple(_cut(span, start, stop) for span in prompt.spans if span.start < stop and span.stop > start)
    return Prompt(prompt.ids[start:stop], "", spans)


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
    for start, stop in chunks(len(prompt.ids), prompt.spans, chunk_size, cache.length):
        part = part_of(prompt, start, stop)
        batch = RaggedBatch.from_parts(model.config.text, [cache], [part], device)
        yield model(torch.tensor(part.ids, device=device), batch)
        if progress:
            progress(stop, len(prompt.ids))


def _cut(span: Span, start: int, stop: int) -> Span:
    """The part of a span inside [start, stop), counted from start."""
    a, b = max(span.start, start), min(span.stop, stop)
    rows = slice(a - span.start, b - span.start)
    positions = None if span.positions is None else span.positions[rows]
    return Span(span.kind, a - start, b - a, span.array[rows], positions, span.digest)
