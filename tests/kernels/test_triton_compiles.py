"""Every Triton kernel becomes machine code for GPUs that are not here; the cases are in `triton_compile_cases.py`."""

from __future__ import annotations

from pathlib import Path

from support.triton_process import COMPILER, run_cases


def test_kernels_compile_for_ampere_and_hopper(tmp_path: Path) -> None:
    run_cases("triton_compile_cases.py", COMPILER, tmp_path)
