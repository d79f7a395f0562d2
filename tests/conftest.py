"""Fixtures of the whole suite. They import what they need when a test asks for them: a small run stays quick."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test reaches a network
os.environ["IOLITE_CHATS"] = "none"  # servers that tests start write nothing into the home of whoever runs them
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes run side by side; more threads only wait for each other
settings.register_profile("iolite", deadline=None)  # no timed assertions: machines that run tests are busy
settings.load_profile("iolite")

if TYPE_CHECKING:
    from iolite.model.unified import Unified


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of `support.tiny.TINY` -> the folder of that checkpoint, as Transformers saves it."""
    from support.tiny import save_reference

    @functools.cache
    def save(name: str) -> Path:
        return save_reference(name, tmp_path_factory.mktemp(name))

    return save


@pytest.fixture(scope="session")
def load_tiny(tiny_folder: Callable[[str], Path]) -> Callable[[str], Unified]:
    """name of `support.tiny.TINY` -> iolite's model of that checkpoint, in float32."""
    import torch

    from iolite.checkpoint.folder import load_folder

    @functools.cache
    def load(name: str) -> Unified:
        _, model = load_folder(tiny_folder(name), dtype=torch.float32, device="cpu")
        return model.eval().requires_grad_(False)

    return load


@pytest.fixture(scope="session")
def espeak() -> None:
    """Needs the speech synthesiser that speaks the embedded model's recordings."""
    from support.programs import need_program

    need_program("espeak-ng")
