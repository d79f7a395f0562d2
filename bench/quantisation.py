"""What quantised weights cost: the embedded model against itself in float32, on pictures, sounds and text.

    python bench/quantisation.py [--limit 2000] [--calibration 1024] [--json]

For every question of `iolite eval nano` the right answer is put after the prompt, and both networks say how likely each
token of it is:

    KL       the sum over the vocabulary of p log(p / q), p by float32, q quantised; its mean over answers, with the
             standard error of that mean, and its median. An answer's own is the mean over its tokens.
    changed  answers of which a token is another one
    right    answers that greedy decoding would give: every token is the likeliest; the mean over the tasks
    worst    the task that loses most, and what it loses, in percentage points

The data-driven variant is calibrated on the training half of the fonts and voices, with other seeds: it has seen
nothing of what it is measured on. That needs espeak-ng and fonts, once, for a small store in the cache.

Quantised products are computed as `iolite` computes them on this machine: with the C++ kernels, if they are there,
whose rounding of activations to 8 bits is part of what is measured. IOLITE_KERNELS=reference leaves it out.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import iolite
from iolite.checkpoint.gguf_blocks import encode, repack
from iolite.evals import nano
from iolite.generate.model import Model
from iolite.model.batch import PaddedBatch
from iolite.model.unified import Unified
from iolite.prompt import Prompt
from iolite.quant.calibrate import calibrate_
from iolite.quant.formats import INT4, INT8, Format
from iolite.quant.linear import install, quantize_
from iolite.quant.schemes import format_for
from iolite.train.nano.store import SplitSize, StoreSize, build_store
from iolite.train.nano.tasks import TASKS, NanoData

CALIBRATION_SEED = 4711
# The held-out half is not used: as little of it as can be made.
CALIBRATION_STORE = StoreSize(
    train=SplitSize(looks=300, shapes=60, voices=40, numbers=4, questions=3),
    held_out=SplitSize(looks=1, shapes=1, voices=1, numbers=1, questions=1),
)


@dataclass(frozen=True)
class Asked:
    """A prompt with its right answer behind it."""

    task: str
    prompt: Prompt
    answer: int  # index of the answer's first token

    @property
    def wanted(self) -> Tensor:
        return torch.tensor(self.prompt.ids[self.answer :])


@dataclass(frozen=True)
class Cost:
    """One variant against float32: the columns of the module's docstring."""

    variant: str
    kl: float
    kl_error: float
    kl_median: float
    changed: float
    right: float
    tasks: dict[str, float]


def asked(model: Model, task: str, messages: list[dict[str, object]], answer: str) -> Asked:
    prompt = model.prompt(messages)
    ids = prompt.ids + model.tokenizer.encode(answer + "<turn|>")
    return Asked(task, Prompt(ids, prompt.text, prompt.spans), len(prompt.ids))


def evaluation(model: Model, limit: int) -> list[Asked]:
    data = nano.open_store(nano.default_store(), said)
    return [asked(model, t, q.messages, q.answer) for t in nano.NAMES for q in nano.questions(data, t, limit)]


def calibration(model: Model, folder: Path, count: int) -> list[Asked]:
    """Samples of all tasks in turn, from the training half of a store, which is made when it is missing."""
    if not (folder / "store.json").is_file():
        build_store(folder, processes=min(4, os.cpu_count() or 1), progress=said, size=CALIBRATION_STORE)
    data, names = NanoData(folder, "train", CALIBRATION_SEED), tuple(TASKS)
    samples = [data.sample(names[i % len(names)], np.random.default_rng([CALIBRATION_SEED, i])) for i in range(count)]
    return [asked(model, s.task, s.question(), s.answer) for s in samples]


def said(done: int, total: int, _: str) -> None:
    print(f"making glyphs and clips: {done}/{total}", file=sys.stderr)


def log_probabilities(network: Unified, questions: Sequence[Asked], size: int = 64) -> Iterator[Tensor]:
    """For each question float32 [tokens of the answer, vocabulary]; questions of a like length go together."""
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        batch = PaddedBatch.from_prompts(network.config.text, [q.prompt for q in part])
        with torch.inference_mode():
            hidden = network(batch.ids, batch)
            rows = [hidden[i, q.answer - 1 : len(q.prompt.ids) - 1] for i, q in enumerate(part)]
            yield from network.logits(torch.cat(rows)).log_softmax(-1).split([len(r) for r in rows])


def cost(variant: str, network: Unified, questions: Sequence[Asked], reference: Sequence[Tensor]) -> Cost:
    kl, changed, right = [], [], {task: [] for task in nano.NAMES}  # type: ignore[var-annotated]
    for q, p, new in zip(questions, reference, log_probabilities(network, questions), strict=True):
        kl.append(float((p.exp() * (p - new)).sum(-1).mean()))
        changed.append(bool((p.argmax(-1) != new.argmax(-1)).any()))
        right[q.task].append(bool((new.argmax(-1) == q.wanted).all()))
    tasks = {task: float(np.mean(hits)) for task, hits in right.items()}
    error = float(np.std(kl) / len(kl) ** 0.5)
    mean_right = float(np.mean(list(tasks.values())))
    return Cost(variant, float(np.mean(kl)), error, float(np.median(kl)), float(np.mean(changed)), mean_right, tasks)


# The variants


def q4_0_(network: Unified, head: Format) -> None:
    """int4 as ggml rounds: the largest magnitude of a block becomes -8."""
    for name, weight in list(network.named_parameters()):
        if format_for(name, weight.shape, "int4", head=head) == INT4:
            install(network, name, repack(encode(weight, "Q4_0"), "Q4_0", *weight.shape))
    quantize_(network, "int4", head=head)  # what is left: a head in int8


def gptq_(network: Unified, head: Format, examples: Sequence[Asked]) -> None:
    batch = PaddedBatch.from_prompts(network.config.text, [q.prompt for q in examples])
    calibrate_(network, lambda: network(batch.ids, batch), batch.lengths, head=head)


def variants(examples: Sequence[Asked]) -> dict[str, Callable[[Unified], None]]:
    chosen: dict[str, Callable[[Unified], None]] = {"int8": lambda n: quantize_(n, "int8")}
    for head in (INT4, INT8):
        chosen |= {
            f"int4, Q4_0's rule, head {head.name}": lambda n, head=head: q4_0_(n, head),
            f"int4, head {head.name}": lambda n, head=head: quantize_(n, "int4", head=head),
            f"int4, GPTQ, head {head.name}": lambda n, head=head: gptq_(n, head, examples),
        }
    return chosen


def table(costs: Sequence[Cost]) -> str:
    base = costs[0]
    lines = [
        "| weights | KL | median | changed | right | worst |",
        "|---|---|---|---|---|---|",
    ]
    for c in costs:
        lost = {task: base.tasks[task] - share for task, share in c.tasks.items()}
        worst = max(lost, key=lambda task: lost[task])
        kl = f"{c.kl:.2e} ± {c.kl_error:.0e} | {c.kl_median:.1e} | {c.changed:.2%}" if c is not base else "| |"
        end = f"{worst} −{100 * lost[worst]:.2f}" if c is not base else ""
        lines.append(f"| {c.variant} | {kl} | {c.right:.2%} | {end} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=2000, help="questions of each task (2000)")
    parser.add_argument("--calibration", type=int, default=1024, help="prompts to calibrate with (1024)")
    parser.add_argument("--calibration-store", type=Path, default=nano.default_store().with_name("nano-calibration"))
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    arguments = parser.parse_args()
    model = iolite.load("nano", dtype="float32", device="cpu")
    questions = sorted(evaluation(model, arguments.limit), key=lambda q: len(q.prompt.ids))
    examples = calibration(model, arguments.calibration_store, arguments.calibration)
    reference = list(log_probabilities(model.network, questions))
    costs = [cost("float32", model.network, questions, reference)]
    for name, change in variants(examples).items():
        begin = time.monotonic()
        network = copy.deepcopy(model.network)
        change(network)
        changed = time.monotonic()
        costs.append(cost(name, network, questions, reference))
        print(f"{name}: {changed - begin:.1f} s + {time.monotonic() - changed:.1f} s", file=sys.stderr)
    report = {
        "questions": len(questions),
        "calibration": len(examples),
        "variants": [vars(c) for c in costs],
    }
    print(json.dumps(report, indent=2) if arguments.json else table(costs))


if __name__ == "__main__":
    main()
