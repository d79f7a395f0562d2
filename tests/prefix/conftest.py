"""One small model, caches with little slack, and a store for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.prefix import NAME, SLACK, Reader

from iolite.cache import KVCache
from iolite.model.unified import Unified
from iolite.prefix.memory import PrefixCache


@pytest.fixture
def network(load_tiny: Callable[[str], Unified]) -> Unified:
    return load_tiny(NAME)


@pytest.fixture
def make(network: Unified) -> Callable[[], KVCache]:
    return lambda: KVCache(network.config.text, 1024, slack=SLACK)


@pytest.fixture
def read(network: Unified, make: Callable[[], KVCache]) -> Reader:
    return Reader(network, PrefixCache(make))
