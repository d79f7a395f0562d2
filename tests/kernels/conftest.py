"""The C++ kernels for a processor that this machine does not have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.emulated import Emulated, aarch64


@pytest.fixture(name="aarch64", scope="session")
def _aarch64() -> Iterator[Emulated]:
    with aarch64() as kernels:
        yield kernels
