"""What every test shares: no network, one thread a process, and an honest way to skip."""

from __future__ import annotations

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def need_program(name: str, package: str | None = None) -> None:
    """Skips a test, saying why, when a system program is missing; fails instead where all are promised.

    `.ci/run` installs every program and sets IOLITE_TEST_ALL=1, so that nothing is skipped there for that reason.
    """
    if shutil.which(name):
        return
    reason = f"{name} is not installed (Debian package {package or name})"
    if os.environ.get("IOLITE_TEST_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def espeak() -> None:
    """Needs the speech synthesiser."""
    need_program("espeak-ng")
