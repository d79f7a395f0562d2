"""Triton's cases run in a process of their own: its interpreter is chosen once, before Triton is imported.

TRITON_INTERPRET=1 changes every kernel of a process, those of torch.compile too, so the suite's own process must not
set it. On a machine with a CUDA device the same cases run on that as well.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETER, CUDA, COMPILER = "interpreter", "cuda", "compiler"
MODES = (INTERPRETER, CUDA) if torch.cuda.is_available() else (INTERPRETER,)

CASES = Path(__file__).parent.parent / "kernels"


def run_cases(name: str, mode: str, folder: Path) -> None:
    """Runs the tests of the file tests/kernels/NAME in another process; folder holds what Triton compiles."""
    if importlib.util.find_spec("triton") is None:
        if os.environ.get("IOLITE_TEST_ALL") == "1" and sys.platform == "linux":
            pytest.fail("Triton is not installed")
        pytest.skip("Triton is not installed (there are packages for Linux only)")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    kept |= {"TRITON_INTERPRET": str(int(mode == INTERPRETER)), "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES / name)],
        env=kept, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
