"""A decode step through Triton's kernels; the cases are in `triton_step_cases.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.triton_process import MODES, run_cases


@pytest.mark.parametrize("mode", MODES)
def test_decode_step(mode: str, tmp_path: Path) -> None:
    run_cases("triton_step_cases.py", mode, tmp_path)
