"""What the int8 cache costs: next-token KL against a cache in bfloat16, which is itself measured against float32.

    python bench/kv.py [--limit 200] [--tokens 3000] [--json]

Two models, both with float32 weights, so that nothing but the cache differs:

    nano    the prompts of `iolite eval nano` with the right answers behind them: at every token of an answer
    random  12 layers with the 12B's heads, window and full layers, hidden size 512, random weights, on random tokens:
            at every position past the window. Its k_norm gives scores a standard deviation of 3

KL is the sum over the vocabulary of p log(p / q), its mean and median over positions; `changed` counts positions whose
likeliest token is another one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import iolite
from iolite.cache import KVCache
from iolite.checkpoint.assemble import assemble
from iolite.checkpoint.synthetic import SyntheticSource, config_of
from iolite.config import FULL, SLIDING
from iolite.evals import nano
from iolite.evals.speed import digits
from iolite.model.layers import DecoderLayer
from iolite.model.prefill import prefill
from iolite.model.unified import Unified
from iolite.prompt import Prompt

FORMATS = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
PAIRS = (("float32", "bf16"), ("bf16", "int8"), ("float32", "int8"))
SPREAD = 3.0  # of the random model's scores


@dataclass(frozen=True)
class Cost:
    """Of using `used` in place of `kept`."""

    model: str
    kept: str
    used: str
    kl: float
    kl_median: float
    changed: float
    positions: int


@dataclass(frozen=True)
class Question:
    prompt: Prompt
    first: int  # the first position whose next token counts


def answers(model: iolite.Model, limit: int) -> Iterator[Question]:
    data = nano.open_store(nano.default_store(), lambda *_: None)
    for task in nano.NAMES:
        for asked in nano.questions(data, task, limit):
            prompt = model.prompt(asked.messages)
            ids = prompt.ids + model.tokenizer.encode(asked.answer + "<turn|>")
            yield Question(Prompt(ids, prompt.text, prompt.spans), len(prompt.ids) - 1)


def random_model() -> Unified:
    config = config_of("12b")
    text = replace(
        config.text,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=12,
        layer_types=((SLIDING,) * 5 + (FULL,)) * 2,
    )
    source = SyntheticSource(replace(config, text=text, vision=None, audio=None), None)
    weights = {name: source.weight(name) for name in source.names()}
    network = assemble(source.config, weights, dtype=torch.float32).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(1)
    for block in network.language_model.layers:
        assert isinstance(block, DecoderLayer)
        size = block.self_attn.head_dim
        uneven = 0.5 + torch.rand(size, generator=random)
        block.self_attn.k_norm.weight.copy_(SPREAD / size**0.5 * uneven)
    return network


@torch.inference_mode()
def log_probabilities(network: Unified, question: Question, dtype: torch.dtype) -> Tensor:
    """[positions, vocabulary]"""
    cache = KVCache(network.config.text, len(question.prompt.ids), dtype)
    hidden = torch.cat(list(prefill(network, question.prompt, cache)))[question.first : -1]
    return network.logits(hidden).log_softmax(-1)


def costs(name: str, network: Unified, questions: list[Question]) -> Iterator[Cost]:
    found: dict[tuple[str, str], tuple[list[Tensor], list[Tensor]]] = {pair: ([], []) for pair in PAIRS}
    for question in questions:
        scores = {format: log_probabilities(network, question, dtype) for format, dtype in FORMATS.items()}
        for (kept, used), (kl, changed) in found.items():
            p, q = scores[kept], scores[used]
            kl.append((p.exp() * (p - q)).sum(-1))
            changed.append(p.argmax(-1) != q.argmax(-1))
    for (kept, used), (kl, changed) in found.items():
        every, other = torch.cat(kl), torch.cat(changed).float()
        yield Cost(name, kept, used, float(every.mean()), float(every.median()), float(other.mean()), len(every))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="questions of each task (200)")
    parser.add_argument("--tokens", type=int, default=3000, help="tokens for the random model (3000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    arguments = parser.parse_args()
    model = iolite.load("nano", dtype="float32", device="cpu")
    found = list(costs("nano", model.network, list(answers(model, arguments.limit))))
    network = random_model()
    ids = torch.randint(3, network.config.text.vocab_size, (arguments.tokens,)).tolist()
    window = network.config.text.sliding_window
    found += costs("random", network, [Question(Prompt(ids, ""), min(window, arguments.tokens // 2))])
    if arguments.json:
        print(json.dumps([vars(cost) for cost in found], indent=2))
        return
    print("| model | cache | instead of | KL | median | changed | positions |\n|---|---|---|---|---|---|---|")
    for c in found:
        print(
            f"| {c.model} | {c.used} | {c.kept} | {c.kl:.1e} | {c.kl_median:.1e} | {digits(100 * c.changed)} % "
            f"| {c.positions:,} |"
        )


if __name__ == "__main__":
    main()
