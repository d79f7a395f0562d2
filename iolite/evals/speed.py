"""How fast a loaded model is, beside what its machine could do at best in the same moments.

`Subject` does the work that generation does (the network through a `RaggedBatch`, the head, the likeliest token) and
times it. The `measure_…` functions take turns between pieces of work, so that a change of the machine's mood falls on
all of them, and set each sample between two probes: a share of the limit is a sample divided by their mean.

A cache of any length is made of random keys and values instead of reading a prompt: what is read does not change what
reading costs. After a pass the cache's length is set back, which leaves the next pass in the same place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from iolite.cache import KVCache
from iolite.config import TextConfig
from iolite.evals.machine import disk_bytes, memory
from iolite.generate import sampling
from iolite.generate.loop import Decoding
from iolite.generate.model import Model
from iolite.generate.sampling import SamplingParams
from iolite.model.batch import Media, RaggedBatch, Segment
from iolite.model.layers import DecoderLayer
from iolite.model.prefill import prefill
from iolite.model.unified import Unified
from iolite.prompt import Prompt, Span

Say = Callable[[str], None]
"""Takes a line for people as soon as something is known."""

_CHUNK = 512  # tokens of a cache that are filled at once
_LEAST_SECONDS = 0.5  # a sample of short steps is made of as many as fill this


@dataclass(frozen=True)
class Spread:
    """The median of n samples and the range that all of them lie in."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """Of one sample or more."""
        values = sorted(samples)
        return cls(statistics.median(values), values[0], values[-1], len(values))

    def times(self, factor: float) -> Spread:
        return Spread(factor * self.median, factor * self.low, factor * self.high, self.n)

    def __str__(self) -> str:
        """As "4.61 (4.50–4.75)": the median, and the range where there is one."""
        low, middle, high = digits(self.low), digits(self.median), digits(self.high)
        return middle if low == high else f"{middle} ({low}–{high})"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def digits(value: float) -> str:
    """Three digits, or all before the point: "4.61", "46.1", "4,610"."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


class Probing(Protocol):
    """Who says what the machine can do at this moment: `iolite.evals.machine.Probe`."""

    def bandwidth(self) -> float: ...
    def int8(self) -> float | None: ...


class Timed(Protocol):
    """Who is timed: a `Subject`, or another engine that can do the same."""

    def prefill(self, length: int) -> float:
        """Seconds to read a new prompt of that many tokens and to choose the token after it."""
        ...

    def step(self, depth: int, tokens: int = 1, times: int = 1) -> float:
        """Seconds of one pass over `tokens` tokens behind `depth` cached ones: the mean of `times` in a row."""
        ...


class Subject:
    """A model with random keys and values in its cache."""

    def __init__(self, model: Model, depth: int = 0) -> None:
        """depth: the longest cache that `step` will be asked for."""
        self.model, self.network = model, model.network
        self.device = self.network.language_model.embed_tokens.weight.device
        self._rng = np.random.default_rng(0)
        self.depth = depth
        self._cache: KVCache | None = None

    def prefill(self, length: int) -> float:
        prompt = Prompt(self._ids(length), "")
        cache = new_cache(self.model, length)
        begin = time.perf_counter()
        with torch.inference_mode():
            for hidden in prefill(self.network, prompt, cache):
                last = hidden[-1:]
            sampling.likeliest(self.network.logits(last))
        return time.perf_counter() - begin

    def step(self, depth: int, tokens: int = 1, times: int = 1) -> float:
        cache = self._filled()
        assert depth <= self.depth, "the cache was filled for less"
        ids = torch.tensor(self._ids(tokens), device=self.device)
        begin = time.perf_counter()
        for _ in range(times):
            cache.length = depth
            likeliest(self.network, ids, cache)
        return (time.perf_counter() - begin) / times

    def bytes_per_token(self, depth: int) -> int:
        """Bytes that drawing one token reads: weights, and keys and values of what the token sees."""
        return decode_weight_bytes(self.network) + cache_bytes(self._filled(), self.network.config.text, depth)

    def macs(self, length: int) -> int:
        """Multiply-adds of the linear layers in reading a prompt, of whose last token alone the head is computed."""
        layers, head = linear_sizes(self.network)
        return length * layers + head

    def _filled(self) -> KVCache:
        if self._cache is None:
            self._cache = filled_cache(self.network, self.depth, self.model.kv_dtype)
        return self._cache

    def _ids(self, count: int) -> list[int]:
        return self._rng.integers(3, self.model.config.text.vocab_size, count).tolist()


@torch.inference_mode()
def likeliest(network: Unified, ids: Tensor, cache: KVCache) -> list[int]:
    """One pass over ids [n], which continue the cache: the likeliest token after each."""
    batch = RaggedBatch(network.config.text, [Segment(cache, len(ids))], Media(), ids.device)
    return sampling.likeliest(network.logits(network(ids, batch)))  # a list: it waits for the device


def new_cache(model: Model, room: int) -> KVCache:
    """A cache as generation makes it."""
    return KVCache(model.config.text, room, model.kv_dtype)


@torch.inference_mode()
def filled_cache(network: Unified, depth: int, dtype: torch.dtype | None, shared: bool = True) -> KVCache:
    """A cache of depth tokens, and room for the passes behind them, with keys and values drawn at random."""
    decoder = network.language_model
    text, weight = network.config.text, decoder.norm.weight
    cache = KVCache(text, depth + _CHUNK, dtype, shared=shared)
    rng = torch.Generator().manual_seed(0)
    for number, (layer, block) in enumerate(zip(cache.layers, decoder.layers, strict=True)):
        assert isinstance(block, DecoderLayer)
        shape = (2, min(max(depth, 1), _CHUNK), text.layer_kv_heads(number), text.layer_head_dim(number))
        k, v = torch.randn(shape, generator=rng).to(weight.device, weight.dtype)
        first = 0 if text.is_full(number) else max(0, depth - layer.limit) // _CHUNK * _CHUNK  # what a ring keeps
        for start in range(first, max(depth, 1), _CHUNK):
            some = slice(depth - start if depth else 1)
            layer.extend(k[some], v[some], start, block.self_attn.k_norm.weight)
    cache.length = depth
    return cache


def cache_bytes(cache: KVCache, text: TextConfig, depth: int) -> int:
    """Bytes of keys and values that one new token reads behind depth others, its own included."""
    seen = (depth + 1 if text.is_full(i) else min(depth + 1, text.sliding_window) for i in range(len(cache.layers)))
    return sum(rows * layer.row_bytes for rows, layer in zip(seen, cache.layers, strict=True))


def decode_weight_bytes(network: Unified) -> int:
    """Bytes of the decoder's tensors that one token reads: all but an untied embedding, of which it reads one row.

    Tensors as they are stored, packed ones packed, each counted once. A tied embedding is the head and read whole.
    """
    decoder = network.language_model
    embedding = decoder.embed_tokens.weight
    tensors = [*decoder.parameters(), *decoder.buffers()]
    if network.lm_head is not None:
        tensors += [*network.lm_head.parameters(), *network.lm_head.buffers()]
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    if network.lm_head is not None:
        sizes[embedding.data_ptr()] = embedding.nbytes // network.config.text.vocab_size
    return sum(sizes.values())


def linear_sizes(network: Unified) -> tuple[int, int]:
    """Multiply-adds of one token in the linear layers of (the decoder's layers, the head)."""
    layers = 0
    for module in network.language_model.layers.modules():
        matrix = getattr(module, "matrix", None)
        if matrix is not None:
            layers += matrix.rows * matrix.cols
        elif isinstance(module, nn.Linear):
            layers += module.in_features * module.out_features
    text = network.config.text
    return layers, text.hidden_size * text.vocab_size


# --- the measurements ---


def measure_decode(
    subject: Subject, probe: Probing, depths: Sequence[int], repeat: int, say: Say
) -> tuple[dict[str, Any], list[float]]:
    """Of each depth the tokens a second, the GB/s and their share of the bandwidth; and all bandwidths, in GB/s.

    Turns: probe, depth 1, probe, depth 2, …, so every sample has the machine's bandwidth right before and after it.
    """
    times = {depth: repetitions(subject, depth) for depth in depths}
    bandwidths = [probe.bandwidth()]
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    shares: dict[int, list[float]] = {depth: [] for depth in depths}
    for turn in range(repeat):
        for depth in depths:
            seconds[depth].append(steady_step(subject, depth, times[depth]))
            bandwidths.append(probe.bandwidth())
            rate = subject.bytes_per_token(depth) / seconds[depth][-1] / 1e9
            shares[depth].append(share_of(rate, bandwidths[-2:]))
            say(
                f"decode at {depth:,}: {1 / seconds[depth][-1]:.2f} tokens/s, {rate:.1f} GB/s, "
                f"{100 * shares[depth][-1]:.0f} % ({turn + 1} of {repeat})"
            )
    found = {}
    for depth in depths:
        size = subject.bytes_per_token(depth)
        found[str(depth)] = {
            "tok_s": Spread.of(1 / s for s in seconds[depth]).to_dict(),
            "gb_s": Spread.of(size / s / 1e9 for s in seconds[depth]).to_dict(),
            "fraction_of_bandwidth": Spread.of(shares[depth]).to_dict(),
            "bytes_per_token": size,
        }
    return found, bandwidths


def measure_passes(subject: Timed, sizes: Sequence[int], depth: int, repeat: int, say: Say) -> dict[str, Spread]:
    """How many times as long as one token a pass over several takes; each between two passes over one."""
    times = {n: repetitions(subject, depth, n) for n in {1, *sizes}}
    ratios: dict[int, list[float]] = {n: [] for n in sizes}
    for turn in range(repeat):
        before = subject.step(depth, 1, times[1])
        for n in sizes:
            if n == 1:
                ratios[1].append(1.0)  # by definition
                continue
            one = subject.step(depth, n, times[n])
            after = subject.step(depth, 1, times[1])
            ratios[n].append(share_of(one, (before, after)))
            before = after
        shown = ", ".join(f"{n}: {values[-1]:.2f}" for n, values in ratios.items())
        say(f"pass over n tokens / over one: {shown} ({turn + 1} of {repeat})")
    return {str(n): Spread.of(values) for n, values in ratios.items()}


def measure_prefill(
    subject: Subject, probe: Probing, lengths: Sequence[int], repeat: int, say: Say
) -> tuple[dict[str, Any], list[float]]:
    """Of each length the tokens a second and the share of the 8-bit peak (None without one); and all those peaks."""
    peaks = [probe.int8()]
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    shares: dict[int, list[float]] = {length: [] for length in lengths}
    for turn in range(repeat):
        for length in lengths:
            seconds[length].append(subject.prefill(length))
            peaks.append(probe.int8())
            around = [peak for peak in peaks[-2:] if peak is not None]
            if around:
                shares[length].append(share_of(subject.macs(length) / seconds[length][-1] / 1e9, around))
            share = f", {100 * shares[length][-1]:.0f} % of the 8-bit peak" if around else ""
            say(f"prompt of {length:,}: {length / seconds[length][-1]:.1f} tokens/s{share} ({turn + 1} of {repeat})")
    found = {
        str(length): {
            "tok_s": Spread.of(length / s for s in seconds[length]).to_dict(),
            "fraction_of_int8": Spread.of(shares[length]).to_dict() if shares[length] else None,
            "macs": subject.macs(length),
        }
        for length in lengths
    }
    return found, [peak for peak in peaks if peak is not None]


def share_of(value: float, around: Iterable[float]) -> float:
    """A sample over the mean of what was measured before and after it."""
    return value / statistics.fmean(around)


def repetitions(subject: Timed, depth: int, tokens: int = 1) -> int:
    """How many steps make a sample that a clock can measure; the two that tell are also the warm-up."""
    subject.step(depth, tokens)
    return max(1, round(_LEAST_SECONDS / subject.step(depth, tokens)))


def steady_step(subject: Timed, depth: int, times: int = 1) -> float:
    """Seconds of a step among steps, as tokens are drawn one after another.

    The first one after a pause or a probe finds the processor's caches emptied and is not counted.
    """
    subject.step(depth)
    return subject.step(depth, times=times)


def measure_load(load: Callable[[], Model]) -> tuple[Model, dict[str, Any]]:
    """Loads a model and draws one token, which is when a mapped file's pages are read; says what came off the disk.

    `state` is "cold" when more than a twentieth of the weights that a token reads came off the disk, else "warm";
    None where the system does not count that.
    """
    before = disk_bytes()
    begin = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    start = torch.tensor([model.config.text.bos_token_id], device=model.choice.device)
    likeliest(model.network, start, new_cache(model, 8))
    first = time.perf_counter() - loaded
    after, size = disk_bytes(), decode_weight_bytes(model.network)
    read = written = state = None
    if before is not None and after is not None:
        read, written = after[0] - before[0], after[1] - before[1]
        state = "cold" if read > size / 20 else "warm"
    found = {"seconds": loaded - begin, "first_token_s": first, "state": state}
    return model, found | {"disk_read_bytes": read, "disk_written_bytes": written, "weight_bytes": size}


def measure_memory(model: Model, tokens: int = 64) -> dict[str, Any]:
    """The most memory that this process has held, after it has answered one prompt with that many tokens.

    The prompt has a picture of as many tokens as the model's settings give one, or 280 tokens of text for a model that
    takes none. Comes before probes, whose buffer is none of the model's memory.
    """
    loaded = memory()
    prompt = picture_prompt(model)
    length = min(tokens, model.context - len(prompt.ids))
    params = SamplingParams(temperature=0.0, max_tokens=length)
    for _ in Decoding(model.network, prompt, params, context=model.context):
        pass
    after = memory()
    return {
        "peak_rss_bytes": after["peak"],
        "loaded_peak_bytes": loaded["peak"],
        "file_bytes": after["file"],
        "anonymous_bytes": after["anonymous"],
        "prompt_tokens": len(prompt.ids),
        "drawn_tokens": length,
        "picture": bool(prompt.spans),
    }


def picture_prompt(model: Model) -> Prompt:
    """A picture of noise between the tokens that mark one, made without tokenizer or template."""
    c = model.config
    if c.vision is None:
        return Prompt([c.text.bos_token_id] * min(280, model.context // 2), "")
    tokens = model.processor.image_max_soft_tokens
    columns = int(np.ceil(tokens**0.5))
    grid = np.stack([np.arange(tokens) % columns, np.arange(tokens) // columns], axis=1)
    noise = np.random.default_rng(0).random((tokens, c.vision.patch_dim), dtype=np.float32)
    ids = [c.text.bos_token_id, c.boi_token_id, *[c.image_token_id] * tokens, c.eoi_token_id]
    return Prompt(ids, "", (Span("image", 2, tokens, noise, grid, ""),))


def drafting(model: Model) -> dict[str, Any]:
    """What a drafter's step and passes of several tokens take, as timed when the model was loaded, and what drafts gain
    by these costs at an acceptance (of a draft, those before it accepted): with the best number of them."""
    assert model.speculator is not None, "a model that was loaded with a drafter"
    costs = model.speculator.costs
    found = {"drafter": model.drafting, "draft_s": costs.draft, "pass_s": costs.passes}
    if not costs.draft:
        return found
    gains = {}
    for acceptance in (0.5, 0.6, 0.7, 0.8, 0.9):
        by_count = {
            count: sum(acceptance**i for i in range(count + 1))
            * costs.passes[0]
            / (costs.passes[count] + count * costs.draft)
            for count in range(len(costs.passes))
        }
        best = max(by_count, key=by_count.__getitem__)
        gains[str(acceptance)] = {"drafts": best, "times_plain": by_count[best]}
    return found | {"gain_by_acceptance": gains}


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures one asks for first, taken from the measured parts that are there."""
    figures: dict[str, Any] = {}
    if "load" in found:
        figures["load_s"] = found["load"]["seconds"]
    if "memory" in found:
        figures["peak_rss_bytes"] = found["memory"]["peak_rss_bytes"]
    for name, key in (("bandwidth", "bandwidth_gb_s"), ("int8", "int8_gmac_s")):
        if name in found:
            figures[key] = found[name]["median"]
    if "decode_by_depth" in found:
        shallow = next(iter(found["decode_by_depth"].values()))
        figures["decode_tok_s"] = shallow["tok_s"]["median"]
        figures["decode_fraction_of_bandwidth"] = shallow["fraction_of_bandwidth"]["median"]
    if "passes" in found:
        figures["pass_ratio"] = {n: spread["median"] for n, spread in found["passes"].items()}
    if "prefill" in found:
        figures["prefill_tok_s"] = {n: each["tok_s"]["median"] for n, each in found["prefill"].items()}
    return figures
