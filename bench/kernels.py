"""The products of the C++ kernels beside what the machine can do: milliseconds, GB/s, GMAC/s for each code path.

    python bench/kernels.py [--isa avx512,avx2] [--format int4] [--tokens 1,4,8,280] [--shape 15360x3840] [--rounds 15]

Weights are read from memory: the call goes through more matrices than any cache holds. Passes of all sizes and the
probes take turns, so that a slow moment of a shared machine hits all of them. "best" is the fastest turn, "ratio" the
median over turns of a pass's time to that of the first size in the same turn.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from iolite.errors import IoliteError
from iolite.kernels import cpu
from iolite.kernels.cpu import probe
from iolite.kernels.cpu.library import load
from iolite.quant.formats import FORMATS, Format, PackedMatrix, packed_bytes, packed_shape

CACHE_BYTES = 224 << 20  # more than processors keep


def random_matrix(rows: int, cols: int, format: Format) -> PackedMatrix:
    """Quants of any value, all scales alike: their values make no difference to the time."""
    data = torch.randint(0, 256, packed_shape(rows, cols, format), dtype=torch.uint8)
    data[..., format.quant_bytes :].view(torch.float16).fill_(0.01)
    return PackedMatrix(data, rows, cols)


def one_turn(matrices: list[PackedMatrix], tokens: int) -> float:
    """Seconds of one product, by the mean over all matrices, or the first few when a product takes long."""
    rows, cols = matrices[0].shape
    x = torch.randn(tokens, cols)
    some = matrices[: max(1, min(len(matrices), 2**32 // (tokens * rows * cols)))]
    begin = time.perf_counter()
    for matrix in some:
        cpu.linear(x, [matrix])
    return (time.perf_counter() - begin) / len(some)


def measure(isa: str, matrices: list[PackedMatrix], sizes: list[int], rounds: int) -> None:
    rows, cols = matrices[0].shape
    gb, gmac = matrices[0].nbytes / 1e9, rows * cols / 1e9
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    bandwidths, rates = [], []
    memory = probe.Memory(CACHE_BYTES)
    for _ in range(rounds):
        bandwidths.append(memory.bandwidth(0.02))
        rates.append(probe.int8_rate(0.02))
        for n in sizes:
            seconds[n].append(one_turn(matrices, n))
    bandwidth, rate = max(bandwidths), max(rates)
    print(
        f"\n{isa}, {matrices[0].format.name} {rows} x {cols}, {cpu.threads()} threads; best of {rounds} turns:", end=""
    )
    print(f" reads {bandwidth:.1f} GB/s (median {statistics.median(bandwidths):.1f}), int8 {rate:.0f} GMAC/s")
    print(f"{'tokens':>6} {'best ms':>8} {'ratio':>6} {'GB/s':>6} {'of read':>8} {'GMAC/s':>7} {'of int8':>8}")
    for n, times in seconds.items():
        best = min(times)
        ratio = statistics.median(t / first for t, first in zip(times, seconds[sizes[0]], strict=True))
        shares = gb / best / bandwidth, n * gmac / best / rate
        print(f"{n:>6} {best * 1e3:>8.3f} {ratio:>6.2f} {gb / best:>6.1f} {shares[0]:>8.1%}", end="")
        print(f" {n * gmac / best:>7.0f} {shares[1]:>8.1%}")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.replace("x", ",").split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="code paths, with commas between (default: all that run here)")
    parser.add_argument("--format", choices=FORMATS, default="int4")
    parser.add_argument("--tokens", type=numbers, default=[1, 2, 3, 4, 6, 8, 16, 64, 280])
    parser.add_argument("--shape", type=numbers, default=[15360, 3840])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    library = load()
    if library is None:
        raise SystemExit(f"error: {cpu.reason()}")
    torch.set_num_threads(1)
    rows, cols = arguments.shape
    format = FORMATS[arguments.format]
    count = CACHE_BYTES // packed_bytes(rows, cols, format) + 1
    matrices = [random_matrix(rows, cols, format) for _ in range(count)]
    for isa in arguments.isa.split(",") if arguments.isa else cpu.isas():
        if library.use_isa(isa.encode()):
            raise SystemExit(f"error: {isa} does not run here; {', '.join(cpu.isas())} do")
        measure(isa, matrices, arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    try:
        main()
    except IoliteError as error:
        raise SystemExit(f"error: {error}") from None
