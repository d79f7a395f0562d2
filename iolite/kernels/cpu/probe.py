"""What the machine can do: the rates that kernels are judged by."""

from __future__ import annotations

from iolite.kernels.cpu.library import loaded


def bandwidth(bytes: int, seconds: float) -> float:
    """GB/s that all threads together read from memory, going through `bytes` over and over for about `seconds`.

    Memory in huge pages, one stream for each thread; the median. The first call tries a few ways to
    read and keeps to the best.
    """
    library = loaded()
    return float(library.probe_bandwidth(library.pool, bytes, seconds))


def int8_rate(seconds: float) -> float:
    """Billions of int8 multiply-adds a second, in registers, by all threads, with the code path in use."""
    library = loaded()
    return float(library.probe_int8(library.pool, seconds))
