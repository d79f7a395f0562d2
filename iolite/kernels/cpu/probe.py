"""What the machine can do: the rates that kernels are judged by."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

from iolite.kernels.cpu.library import loaded

_PIECE = 128 << 10  # what a thread claims at a time, as in a product


class Memory:
    """Bytes to be read, in huge pages where the system gives them: reading is as fast as it gets.

    Kept from probe to probe. Where a virtual machine tells its host of free memory, giving back as much holds up what
    is computed in the two seconds after.
    """

    def __init__(self, size: int) -> None:
        """size: in bytes, rounded down to 128 KiB."""
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory comes in small pages
        memory = mmap.mmap(-1, max(1, size // _PIECE) * _PIECE, flags=private)
        with suppress(AttributeError, OSError):  # another system, or a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(memory, np.uint8)
        self._bytes[:] = 1  # pages that nobody has written to would all be one page of zeros

    def bandwidth(self, seconds: float) -> float:
        """GB/s that all threads together read, going through it over and over for about `seconds`: the median.

        Each thread reads one stream. The first call tries a few ways to read and keeps to the best.
        """
        library, size = loaded(), self._bytes.size
        return float(library.probe_bandwidth(library.pool, self._bytes.ctypes.data, size, seconds))


def int8_rate(seconds: float) -> float:
    """Billions of int8 multiply-adds a second, in registers, by all threads, with the code path in use."""
    library = loaded()
    return float(library.probe_int8(library.pool, seconds))
