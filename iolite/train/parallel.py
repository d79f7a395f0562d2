"""Data parallelism over a few processes of one machine: equal replicas, gradients averaged in one flat buffer.

On a CPU and a small model, two processes of one thread beat one process of two threads, since most operations are too
short to be worth splitting.

The processes share memory, and meet by a byte through a pipe: no network, no port, no thread, no lock that a killed
process could keep. A pipe whose other end is gone says so at once, however long the others take.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawArray
from typing import Any

import torch
from torch import Tensor, nn

from iolite.errors import ProcessError

SLOT = 4 << 20  # bytes that each process has in the shared memory; larger tensors pass through it piece by piece


def group_of(size: int) -> list[Group]:
    """A group as each of its processes knows it, by rank, to be given to processes that are spawned (not forked).

    Whoever gives one away closes its own copy afterwards: a process is gone when nobody holds its end of the pipe.
    """
    if size == 1:
        return [Group()]
    shared = RawArray(ctypes.c_byte, size * SLOT)  # an unlinked file, in /dev/shm where there is room
    pipes = [Pipe() for _ in range(1, size)]
    peers = [Group(rank, size, [end], shared) for rank, (_, end) in enumerate(pipes, start=1)]
    return [Group(0, size, [end for end, _ in pipes], shared), *peers]


class Group:
    """This process among its peers, all of which make the same calls in the same order. A group of one does nothing.

    What waits for the others raises ProcessError when one of them has ended.
    """

    def __init__(self, rank: int = 0, size: int = 1, links: Sequence[Connection] = (), shared: Any = None) -> None:
        """links: of the lead to every other process, of the others to the lead; shared: SLOT bytes for each."""
        self.rank, self.size = rank, size
        self._links, self._shared = links, shared

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """values summed over the group, in place: the same bits in every process."""
        for part, slots in self._parts(values):
            slots[self.rank] = part
            self._meet()
            part.copy_(slots[0])
            for slot in slots[1:]:
                part += slot
            self._meet()
        return values

    def copy_from_lead_(self, tensors: Sequence[Tensor]) -> None:
        """Gives every process the lead's values."""
        for tensor in tensors:
            for part, slots in self._parts(tensor):
                if self.leads:
                    slots[0] = part
                self._meet()
                part.copy_(slots[0])
                self._meet()

    def close(self) -> None:
        """Leaves the group; who still waits for this process hears of it."""
        for link in self._links:
            link.close()

    def _parts(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The tensor piece by piece, (n,), each with what is shared for it, (processes, n)."""
        if self.size > 1:
            slots = torch.frombuffer(self._shared, dtype=tensor.dtype).view(self.size, -1)
            for part in tensor.detach().view(-1).split(slots.shape[1]):
                yield part, slots[:, : len(part)]

    def _meet(self) -> None:
        """Waits until all are here: each tells the lead, which tells each when it has heard of all."""
        try:
            if not self.leads:
                self._tell()
            missing = set(self._links)
            while missing:
                for link in wait(missing):
                    assert isinstance(link, Connection)
                    link.recv_bytes()
                    missing.remove(link)
            if self.leads:
                self._tell()
        except (EOFError, OSError):
            raise ProcessError(
                "another process of this run has ended",
                "its error stands above; if none does it was killed, perhaps for want of memory: try fewer processes",
            ) from None

    def _tell(self) -> None:
        for link in self._links:
            link.send_bytes(b".")


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
