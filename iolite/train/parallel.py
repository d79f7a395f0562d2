"""Data parallelism over a few processes of one machine: equal replicas, gradients averaged in one flat buffer.

On a CPU and a small model, two processes of one thread beat one process of two threads, since most operations are too
short to be worth splitting.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Group:
    """This process among its peers. A group of one does nothing and needs no network."""

    def __init__(self, rank: int = 0, size: int = 1, port: int = 0) -> None:
        self.rank, self.size = rank, size
        if size > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """values summed over the group, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def copy_from_lead_(self, tensors: Sequence[Tensor]) -> None:
        """Gives every process the lead's values."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class FlatGradients:
    """All gradients of a model as views into one buffer, with a few numbers of the run riding along in its tail."""

    def __init__(self, parameters: Sequence[nn.Parameter], extra: int) -> None:
        sizes = [p.numel() for p in parameters]
        self.buffer = torch.zeros(sum(sizes) + extra, device=parameters[0].device)
        self.gradients = self.buffer[: sum(sizes)]
        self.extra = self.buffer[sum(sizes) :]
        for parameter, part in zip(parameters, self.gradients.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def zero_(self) -> None:
        self.buffer.zero_()

    def average_(self, group: Group, max_norm: float) -> float:
        """Averages the gradients over the group, sums the extra numbers, and clips; returns the norm before it."""
        group.sum_(self.buffer)
        norm = float(self.gradients.norm()) / group.size
        self.gradients.mul_(min(1.0, max_norm / (norm + 1e-6)) / group.size)
        return norm
