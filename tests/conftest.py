"""Fixtures of the whole suite. They import what they need when a test asks for them: a small run stays quick."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from iolite.model.unified import Unified


@pytest.fixture(scope="session")
def load_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Unified]:
    """name of `support.tiny.TINY` -> that checkpoint, saved by Transformers and loaded by iolite in float32."""
    import torch
    from support.tiny import save_reference

    from iolite.checkpoint.folder import load_folder

    @functools.cache
    def load(name: str) -> Unified:
        folder = save_reference(name, tmp_path_factory.mktemp(name))
        _, model = load_folder(folder, dtype=torch.float32, device="cpu")
        return model.eval().requires_grad_(False)

    return load
