"""The C++ kernels in tests: each code path, with a number of threads, and the distance to exact results."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator

import pytest
from torch import Tensor

from iolite.kernels import cpu
from iolite.kernels.cpu.build import SETS, family

ISAS = tuple(SETS[family(platform.machine())])  # that the library has on this kind of machine
UNIT = 2.0**-24  # rounding of one float32 operation, relative


@contextlib.contextmanager
def code_path(name: str, threads: int = 1) -> Iterator[None]:
    """Inside, the kernels run on this code path; skips the test where the processor or the library lacks it."""
    library = cpu.load()
    if library is None:
        reason = f"no C++ kernels: {cpu.reason()}"
        if os.environ.get("IOLITE_TEST_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    before, before_threads = cpu.isa(), cpu.threads()
    if library.use_isa(name.encode()):
        pytest.skip(f"this processor does not run {name}")
    cpu.set_threads(threads)
    try:
        yield
    finally:
        library.use_isa(before.encode())
        cpu.set_threads(before_threads)


def assert_within(ours: Tensor, exact: Tensor, bound: Tensor) -> None:
    """|ours - exact| <= bound everywhere (exact and bound in float64); the message names the worst element."""
    assert ours.shape == exact.shape
    excess = (ours.double() - exact).abs() / bound.expand_as(exact)
    excess[(ours.double() == exact)] = 0
    bad = ~(excess <= 1)
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()} are off; the first at {bad.nonzero()[0].tolist()}: "
        f"{ours[bad][0].item():.9g}, not {exact[bad][0].item():.9g}, {excess[bad][0].item():.3g} times the bound"
    )
