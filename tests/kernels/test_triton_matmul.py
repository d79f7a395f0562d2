"""Triton's products with packed weights; the cases are in `triton_matmul_cases.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.triton_process import MODES, run_cases


@pytest.mark.parametrize("mode", MODES)
def test_products_with_packed_weights(mode: str, tmp_path: Path) -> None:
    run_cases("triton_matmul_cases.py", mode, tmp_path)
