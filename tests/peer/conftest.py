"""llama.cpp is built from source for ten minutes, so its tests run only where `make test-peers` has installed it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.peer)


@pytest.fixture(scope="session")
def llama() -> ModuleType:
    """`support.llama`, which needs llama.cpp."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama.cpp is not installed; `make test-peers` installs it")
    from support import llama

    return llama


@pytest.fixture(scope="session")
def llama_sources() -> Path:
    """llama.cpp's own repository: its converter is not in the Python package."""
    where = os.environ.get("IOLITE_LLAMA_CPP", "")
    if not where:
        pytest.skip("IOLITE_LLAMA_CPP names no checkout of llama.cpp")
    assert (Path(where) / "convert_hf_to_gguf.py").is_file(), f"IOLITE_LLAMA_CPP={where} is no checkout of llama.cpp"
    return Path(where)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model in the published proportions, as a folder."""
    from support.gguf_model import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"), "published")
