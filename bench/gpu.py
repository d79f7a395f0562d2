"""The 12B's shape with random packed weights on a CUDA device: products alone, whole decode steps, prompts.

    python bench/gpu.py [--scheme int4] [--depths 0,4096] [--tokens 1,2,4,8] [--prompts 512,2048] [--layers 48]

Decode steps are played back as a CUDA graph, where one can be recorded (the output says when not). GB/s are the bytes
that a step must read, weights and keys and values, over its time; beside them stands their share of the bandwidth of a
large copy, measured right before and after. Without a CUDA device it says so and does nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch

from iolite.cache import KVCache
from iolite.config import FULL, SLIDING, ModelConfig, TextConfig
from iolite.device import DTYPES
from iolite.evals.speed import cache_bytes, decode_weight_bytes, filled_cache
from iolite.generate.graph import StaticStep
from iolite.kernels import ops
from iolite.model.prefill import prefill
from iolite.model.unified import Unified
from iolite.prompt import Prompt
from iolite.quant.formats import Format, PackedMatrix, packed_shape
from iolite.quant.linear import install
from iolite.quant.schemes import SCHEMES, format_for, scheme_named

COPY_BYTES = 1 << 30  # far beyond any cache


def config_12b(layers: int = 48) -> ModelConfig:
    """The decoder of google/gemma-4-12B without its embedders of pictures and sounds."""
    text = TextConfig(
        vocab_size=262_144, hidden_size=3840, intermediate_size=15_360, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, global_head_dim=512,
        num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=1024,
        layer_types=tuple(FULL if layer % 6 == 5 else SLIDING for layer in range(layers)),
        final_logit_softcapping=30.0,
    )  # fmt: skip
    return ModelConfig(text=text, vision=None, audio=None)


def random_matrix(rows: int, cols: int, format: Format, device: torch.device) -> PackedMatrix:
    """Quants of any value; scales such that products keep the size of what they are given."""
    data = torch.randint(0, 256, packed_shape(rows, cols, format), dtype=torch.uint8, device=device)
    data[..., format.quant_bytes :].view(torch.float16).fill_(0.2 * 2.0 ** (4 - format.bits) / cols**0.5)
    return PackedMatrix(data, rows, cols)


def random_network(config: ModelConfig, scheme: str, dtype: torch.dtype, device: torch.device) -> Unified:
    with torch.device("meta"):
        network = Unified(config)
    state = {}
    for name, tensor in network.state_dict().items():
        format = format_for(name, tensor.shape, scheme)
        if format is None:
            state[name] = torch.ones(tensor.shape, dtype=dtype, device=device)
        else:
            install(network, name, random_matrix(*tensor.shape, format, device))
            state[name] = network.get_buffer(name)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def seconds(work: Callable[[], object], times: int = 10, rounds: int = 7) -> float:
    """The median over rounds of the mean time of `times` calls, after a round that does not count, on a CUDA device."""
    samples = []
    for _ in range(rounds + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / times)
    return statistics.median(samples[1:])


def bandwidth(device: torch.device) -> float:
    """Bytes a second read and written by a large copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), times=3)


def report_products(scheme: str, dtype: torch.dtype, device: torch.device) -> None:
    print("\nproduct [rows x columns], tokens: microseconds, GB/s of packed weights, TFLOP/s")
    for rows, cols in ((15_360, 3840), (3840, 15_360), (4096, 3840), (512, 3840), (262_144, 3840)):
        # Several matrices in turn, so that none stays in the GPU's cache.
        one = random_matrix(rows, cols, scheme_named(scheme).layers, device)
        count = max(1, min(16, (512 << 20) // one.nbytes))
        matrices = [PackedMatrix(one.data.clone(), rows, cols) for _ in range(count)]
        for tokens in (1, 2, 4, 8, 16, 64, 512):
            if tokens * rows > 1 << 27:
                continue
            x = torch.randn(tokens, cols, dtype=dtype, device=device)
            took = seconds(lambda m=matrices, x=x: [ops.linear(x, each) for each in m], times=2) / count
            rate, flops = one.nbytes / took / 1e9, 2 * tokens * rows * cols / took / 1e12
            print(f"  {rows:6} x {cols:5}, {tokens:3}: {1e6 * took:8.1f} µs {rate:7.0f} GB/s {flops:7.1f} TFLOP/s")


def report_decode(network: Unified, depths: list[int], tokens: list[int], dtype: torch.dtype) -> None:
    device = network.language_model.embed_tokens.weight.device
    print("\ndecode, tokens in a pass behind a depth: ms, tokens/s, GB/s, share of the bandwidth")
    for depth in depths:
        cache = filled_cache(network, depth, dtype)
        for n in tokens:
            step = StaticStep(network, cache, n)
            ids = list(range(100, 100 + n))

            def once(step: StaticStep = step, ids: list[int] = ids, depth: int = depth) -> None:
                step.cache.length = depth
                step(ids)

            before = bandwidth(device)
            took = seconds(once)
            share = decode_weight_bytes(network) + cache_bytes(cache, network.config.text, depth)
            limit = (before + bandwidth(device)) / 2
            print(
                f"  {n} behind {depth:6}: {1e3 * took:7.2f} ms {n / took:8.1f} tokens/s {share / took / 1e9:7.0f} GB/s "
                f"{100 * share / took / limit:5.1f} %{f'  ({step.note})' if step.note else ''}"
            )


def report_prompts(network: Unified, lengths: list[int], dtype: torch.dtype) -> None:
    print("\nprompt: ms, tokens/s")
    for length in lengths:
        ids = torch.randint(100, 200_000, (length,)).tolist()

        def once(ids: list[int] = ids) -> None:
            for hidden in prefill(network, Prompt(ids, ""), KVCache(network.config.text, len(ids), dtype)):
                last = hidden[-1:]
            network.logits(last)

        with torch.inference_mode():
            took = seconds(once, times=1, rounds=5)
        print(f"  {length:6}: {1e3 * took:8.1f} ms {length / took:9.0f} tokens/s")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", choices=list(SCHEMES), default="int4")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--depths", type=numbers, default=[0, 4096, 32_768])
    parser.add_argument("--tokens", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--prompts", type=numbers, default=[512, 2048])
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 0
    device, dtype = torch.device("cuda", torch.cuda.current_device()), DTYPES[asked.dtype]
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; copy {bandwidth(device) / 1e9:.0f} GB/s")
    report_products(asked.scheme, dtype, device)
    network = random_network(config_12b(asked.layers), asked.scheme, dtype, device)
    report_decode(network, asked.depths, asked.tokens, dtype)
    report_prompts(network, asked.prompts, dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
