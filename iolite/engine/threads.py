"""On how many threads torch computes in the engine's thread.

Beside the kernels' own threads, which wait for their next job without sleeping, torch's have to get hold of a core
first. For the little arithmetic of a few tokens of a small model, or of a sampler, that takes longer than the work, and
on a machine that does other things as well many times longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MUCH = 200_000_000  # multiplications: about 10 ms of one core


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, what this thread asks of torch is computed on so many. A thread that first computes meanwhile takes the
    number over."""
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)
