"""On how many threads torch computes beside the kernels, which have threads of their own.

Those wait for their next job without sleeping, and so do torch's: each has to get hold of a core that the other's
threads keep busy with waiting. For the little arithmetic of a few tokens of a small model, or of a sampler, that takes
longer than the work; and of a large model, whose layers go from the kernels to torch and back, it makes a pass over 32
tokens take half as long again.
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
