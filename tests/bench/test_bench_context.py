"""`bench/context.py` on the embedded model: every kind at every depth, and the peak of a process beside its plan."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "bench" / "context.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "nano", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_every_kind_at_every_depth():
    done = run("--depth", "0,300", "--repeat", "1")
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^\| (\d+) \| ([^|]+) \| ([\d.–() ]+) \| ([\d.]+) \| ([\d.–() ]+) \| [\d.–() ]+ \|$", done.stdout, re.MULTILINE
    )
    kinds = ["once, bf16", "once, int8", "twice, bf16", "twice, int8"]
    beside = ["once, bf16", "twice, bf16", "Transformers, bf16"]
    expected = [(depth, kind) for group in (kinds, beside) for depth in ("0", "300") for kind in group]
    assert [(depth, kind) for depth, kind, *_ in rows] == expected
    megabytes = {(depth, kind): float(size) for depth, kind, _, size, _ in rows}
    for format in ("bf16", "int8"):
        assert 0 < megabytes["300", f"once, {format}"] < megabytes["300", f"twice, {format}"]


@pytest.mark.slow
def test_the_peak_beside_the_plan():
    done = run("--memory", "700,1400")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| ([\d,]+) \| (bf16|int8) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|$", done.stdout, re.MULTILINE)
    assert [(context, kv) for context, kv, _ in rows] == [(c, kv) for kv in ("bf16", "int8") for c in ("700", "1,400")]
    # Of a model this small the interpreter and torch are nine tenths, which other versions of theirs change.
    assert all(0.5 < float(ratio) < 2 for *_, ratio in rows)


def test_depths_come_in_rising_order():
    assert run("--depth", "5,3").returncode == 2
