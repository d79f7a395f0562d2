"""Curves of a run from its log: loss, and the share of right answers of each task. `python -m … LOG.jsonl OUT.png`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def draw_in_background(log: Path, picture: Path) -> subprocess.Popen[bytes]:
    """Draws in a process of its own, so that training does not wait for it."""
    command = [sys.executable, "-m", "iolite.train.nano.curves", str(log), str(picture)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def draw(log: Path, picture: Path) -> None:
    """Reads the log and writes a PNG, beside and renamed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    training = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for key in ("loss", "dense"):
        left.plot([r["minutes"] for r in training], [r[key] for r in training], label=key, linewidth=0.9)
    left.set(xlabel="minutes", ylabel="cross-entropy (nats)", yscale="log")
    left.legend()
    for task in evals[-1]["tasks"] if evals else ():
        points = [(r["minutes"], r["tasks"][task]) for r in evals if task in r["tasks"]]
        right.plot(*zip(*points, strict=True), label=task, linewidth=1.2, linestyle="--" if "easy" in task else "-")
    right.set(xlabel="minutes", ylabel="right answers, held-out fonts and voices", ylim=(0, 1))
    if evals:
        right.legend(fontsize=8)
    partial = picture.with_name(f".{picture.name}")
    figure.savefig(partial, dpi=110, format="png")
    os.replace(partial, picture)


if __name__ == "__main__":
    os.nice(10)
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
