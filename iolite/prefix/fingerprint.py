"""Which model it is whose keys and values lie in a file: a digest over its settings and samples of its weights.

Every tensor counts with name, shape and format; small ones whole, of large ones 16 pages spread evenly. Two checkpoints
of one shape, a fine-tuned one, other packing and merged adapters all differ in most of the numbers they differ in at
all, and so in a sample: 0.5 s for 7 GB that are in memory. (One row of the vocabulary changed by hand may go unseen.)
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import nn

PAGE, PAGES = 4096, 16


def fingerprint(network: nn.Module, settings: object) -> str:
    """32 hexadecimal digits. settings: a dataclass of plain values, the model's config."""
    digest = blake2b(f"iolite-model-1 {settings!r}".encode(), digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(_sample(tensor).numpy().data)
    return digest.hexdigest()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [n] of its bytes, on the CPU."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(raw) > PAGE * PAGES:
        # The first and the last page are among them.
        starts = [at * (len(raw) - PAGE) // (PAGES - 1) for at in range(PAGES)]
        raw = torch.cat([raw[start : start + PAGE] for start in starts])
    return raw.cpu()
