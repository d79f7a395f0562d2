"""Triton's attention over a cache; the cases are in `triton_attention_cases.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.triton_process import MODES, run_cases


@pytest.mark.parametrize("mode", MODES)
def test_attention_over_a_cache(mode: str, tmp_path: Path) -> None:
    run_cases("triton_attention_cases.py", mode, tmp_path)
