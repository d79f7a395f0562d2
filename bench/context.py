"""What a long context costs: drawing one token behind up to all 262,144, by how keys and values are kept.

    python bench/context.py MODEL [--depth 0,8192,32768,131072,262080] [--repeat 7] [--without-transformers]
    python bench/context.py MODEL --memory 4096,32768,131072

Kept "once" is one vector for the key and the value of a full layer, "twice" is a buffer for each. The caches hold
random numbers. Two tables:

    step       a whole token, weights included: milliseconds, bytes of the cache it reads, and all bytes it reads as a
               share of the bandwidth measured right before and after
    attention  what the cache alone costs: writing one token to all layers and attending over them, as `iolite` calls it
               layer by layer and as Transformers does (its DynamicCache and its sdpa attention, in bfloat16). The
               weights of a large model do not fit beside Transformers' own, so it is compared here

Kinds take turns within a depth. --memory measures something else: the peak of a fresh process for each context, which
loads the model for it, fills the cache to the end, reads a last chunk of a prompt and draws a token, beside the plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import iolite
from iolite.cache import KVCache
from iolite.checkpoint.plan import plan
from iolite.config import TextConfig
from iolite.evals.machine import Probe, hardware, memory
from iolite.evals.speed import Spread, cache_bytes, decode_weight_bytes, digits, filled_cache, likeliest, share_of
from iolite.generate.model import Model
from iolite.kernels import ops
from iolite.model.layers import DecoderLayer
from iolite.model.prefill import prefill
from iolite.prompt import Prompt

KINDS = {
    "once, bf16": (torch.bfloat16, True),
    "once, int8": (torch.int8, True),
    "twice, bf16": (torch.bfloat16, False),
    "twice, int8": (torch.int8, False),
}


@dataclass
class Samples:
    """Of one kind at one depth."""

    seconds: list[float]
    shares: list[float]  # of the bandwidth
    limits: list[float]  # that bandwidth, GB/s


def in_turns(work: Mapping[str, Callable[[], object]], sizes: Mapping[str, int], repeat: int) -> dict[str, Samples]:
    """Every kind's work once in each turn, after one that does not count. sizes: bytes that it reads."""
    found = {kind: Samples([], [], []) for kind in work}
    probe = Probe()
    for once in work.values():
        once()
    for _ in range(repeat):
        for kind, once in work.items():
            before = probe.bandwidth()
            once()  # the first after a probe finds the caches emptied
            times: list[float] = []
            while sum(times) < 0.3 or len(times) < 2:
                begin = time.perf_counter()
                once()
                times.append(time.perf_counter() - begin)
            took = sum(times) / len(times)
            found[kind].seconds.append(took)
            around = (before, probe.bandwidth())
            found[kind].shares.append(share_of(sizes[kind] / took / 1e9, around))
            found[kind].limits += around
    return found


def row(depth: int, kind: str, size: int, samples: Samples) -> str:
    took, share = Spread.of(samples.seconds).times(1e3), Spread.of(samples.shares).times(100)
    return f"| {depth:,} | {kind} | {took} | {digits(size / 1e6)} | {share} | {Spread.of(samples.limits)} |"


def steps(model: Model, depth: int, repeat: int) -> Iterator[str]:
    network, text = model.network, model.config.text
    caches = {kind: filled_cache(network, depth, dtype, shared) for kind, (dtype, shared) in KINDS.items()}
    ids, weights = torch.tensor([7]), decode_weight_bytes(network)

    def step(cache: KVCache) -> None:
        likeliest(network, ids, cache)
        cache.rewind(depth)

    read = {kind: cache_bytes(cache, text, depth) for kind, cache in caches.items()}
    work = {kind: lambda cache=cache: step(cache) for kind, cache in caches.items()}  # type: ignore[misc]
    for kind, samples in in_turns(work, {kind: size + weights for kind, size in read.items()}, repeat).items():
        yield row(depth, kind, read[kind], samples)


@torch.inference_mode()
def attention(model: Model, depth: int, repeat: int) -> Iterator[str]:
    text = model.config.text
    kinds = {kind: settings for kind, settings in KINDS.items() if settings[0] is torch.bfloat16}
    caches = {kind: filled_cache(model.network, depth, *settings) for kind, settings in kinds.items()}
    sizes = {kind: cache_bytes(cache, text, depth) for kind, cache in caches.items()}
    work: dict[str, Callable[[], object]] = {
        kind: lambda cache=cache: layer_by_layer(model, cache, depth)  # type: ignore[misc]
        for kind, cache in caches.items()
    }
    work["Transformers, bf16"], sizes["Transformers, bf16"] = transformers_cache(text, depth), sizes["twice, bf16"]
    for kind, samples in in_turns(work, sizes, repeat).items():
        yield row(depth, kind, sizes[kind], samples)


def layer_by_layer(model: Model, cache: KVCache, depth: int) -> None:
    """Writes one token to every layer and attends for it."""
    text = model.config.text
    for number, (layer, block) in enumerate(zip(cache.layers, model.network.language_model.layers, strict=True)):
        assert isinstance(block, DecoderLayer)
        q, k, v = new_token(text, number, torch.float32)
        weight = block.self_attn.k_norm.weight
        keys = layer.extend(k[0], v[0], depth, weight)
        window = None if text.is_full(number) else text.sliding_window
        layer.layout.output(ops.attend(layer.layout.queries(q[0], weight), keys, window, None))


def new_token(text: TextConfig, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, 1, H, D], k and v [1, 1, K, D] of one token."""
    size, heads = text.layer_head_dim(layer), text.layer_kv_heads(layer)
    q = torch.full((1, 1, text.num_attention_heads, size), size**-0.5, dtype=dtype)
    return q, torch.ones(1, 1, heads, size, dtype=dtype), torch.ones(1, 1, heads, size, dtype=dtype)


def transformers_cache(text: TextConfig, depth: int) -> Callable[[], None]:
    """The same by Transformers: its cache appended to, its attention over it. What it appends is taken off again."""
    from transformers import Gemma4UnifiedTextConfig
    from transformers.cache_utils import DynamicCache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layers = range(text.num_hidden_layers)
    config = Gemma4UnifiedTextConfig(
        num_hidden_layers=text.num_hidden_layers, layer_types=list(text.layer_types), sliding_window=text.sliding_window
    )
    cache, rng = DynamicCache(config=config), torch.Generator().manual_seed(0)
    for number in layers:
        seen = depth if text.is_full(number) else min(depth, text.sliding_window - 1)
        shape = (1, text.layer_kv_heads(number), seen, text.layer_head_dim(number))
        k, v = (torch.empty(shape, dtype=torch.bfloat16).normal_(generator=rng) for _ in range(2))
        if seen:
            cache.update(k, v, number)
    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]

    def once() -> None:
        kept = [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]
        for number in layers:
            q, k, v = (t.transpose(1, 2) for t in new_token(text, number, torch.bfloat16))
            k, v = cache.update(k, v, number)
            module.num_key_value_groups = q.shape[1] // k.shape[1]  # type: ignore[assignment]
            sdpa_attention_forward(module, q, k, v, None, scaling=1.0)
            if kept[number] is not None:  # at once, or both are held for all layers
                cache.layers[number].keys, cache.layers[number].values = kept[number]

    return once


@torch.inference_mode()
def peak(name: str, context: int, kv: str) -> dict[str, Any]:
    """Of this process: the plan's bytes and the peak, in a run that fills the context."""
    model = iolite.load(name, context=context, kv=kv)
    planned = plan(
        model.config, context=context, quantize=model.scheme, kv=kv, dtype=model.choice.dtype_name, memory=1 << 62
    )
    last = min(model.chunk, context - 2) - 1
    cache = filled_cache(model.network, context - last - 2, model.kv_dtype)
    ids = torch.randint(3, model.config.text.vocab_size, (context - 2,)).tolist()
    for hidden in prefill(model.network, Prompt(ids, ""), cache, chunk_size=model.chunk):
        token = int(model.network.logits(hidden[-1:]).argmax())
    likeliest(model.network, torch.tensor([token]), cache)
    return {"context": context, "kv": kv, "planned": planned.total_bytes, "peak": memory()["peak"]}


def report_memory(name: str, contexts: list[int]) -> None:
    print("| context | cache | planned GB | peak GB | planned / peak |\n|---|---|---|---|---|")
    for kv in ("bf16", "int8"):
        for context in contexts:
            command = [sys.executable, __file__, name, "--memory", str(context), "--one", kv]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            planned, measured = found["planned"] / 1e9, found["peak"] / 1e9
            print(f"| {context:,} | {kv} | {planned:.2f} | {measured:.2f} | {planned / measured:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--depth", default="0,8192,32768,131072,262080", help="tokens before the one that is drawn")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--without-transformers", action="store_true", help="leave the second table out")
    parser.add_argument("--memory", metavar="CONTEXTS", help="measure the peak of a process for each of these contexts")
    parser.add_argument("--one", metavar="KV", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    depths = [int(text) for text in (arguments.memory or arguments.depth).split(",")]
    if not all(a < b for a, b in pairwise(depths)):
        parser.error("depths and contexts come in rising order")
    if arguments.one:
        print(json.dumps(peak(arguments.model, depths[0], arguments.one)))
        return
    if arguments.memory:
        report_memory(arguments.model, depths)
        return
    model = iolite.load(arguments.model)
    print(json.dumps(hardware()), file=sys.stderr)
    head = "| depth | kept | ms a token | cache MB | % of the bandwidth | that, GB/s |\n|---|---|---|---|---|---|"
    tables = {"step": steps} if arguments.without_transformers else {"step": steps, "attention": attention}
    for name, rows in tables.items():
        print(f"\n{name}\n\n{head}")
        for depth in depths:
            for line in rows(model, depth, arguments.repeat):
                print(line, flush=True)


if __name__ == "__main__":
    main()
