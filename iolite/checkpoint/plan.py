"""What a model takes in memory, computed from its config alone, and what of it fits. No torch, no weights.

    plan(config, context=32_768, quantize="int4", memory=16_000_000_000).verdict

A plan is of the moment that takes most: every sequence as long as its context, one more chunk of a prompt under way.
Bytes of weights and cache are exact (`iolite/checkpoint/sizes.py`); those of scratch memory, tokenizer and interpreter
follow measurements. All are of this process: of 16 GB leave out what the system and other programs need.

Letters: n tokens of a pass, M hidden size, F feed-forward size.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from iolite.checkpoint import sizes
from iolite.checkpoint.sizes import BYTES, SHORT, TILE_BYTES
from iolite.config import ModelConfig
from iolite.errors import UsageError
from iolite.memory import RUNTIME, human_bytes

KV = ("auto", "bf16", "float32", "int8")
CHUNKS = (512, 256, 128, 64)  # tokens of a prompt in one pass; the first that fits is taken
LEAST_CONTEXT = 2048  # less is not offered: a picture and a question would hardly fit

# 256 MB were resident for a tokenizer of 262,144 entries made by 400,000 merges.
TOKENIZER_ENTRY = 1000
# What passes take besides their tensors: memory that threads keep for their tasks, and holes in the heap, which may
# become as large as all tensors of a pass. Of six layers of the 12B a chunk of 512 took 120 to 280 MB, varying from run
# to run (116 MB with a heap that gives everything back), one of 256 took 106 MB and one of 128 took 51 MB; this makes
# 235, 130 and 78.
_THREADS = 25_000_000
_HOLES = 2
_MOST_SCORES = 1 << 25  # of the reference's attention at a time

_NAMES = {
    "embedding": "token embedding",
    "head": "head",
    "decoder": "decoder",
    "vision": "picture embedder",
    "audio": "sound embedder",
}


@dataclass(frozen=True)
class Part:
    """One line of a plan. kind: "weights", "drafter", "cache", "media", "scratch" or "process"."""

    name: str
    kind: str
    bytes: int
    dtype: str | None = None


@dataclass(frozen=True)
class Advice:
    """A change of a plan's settings, and what it takes then: no more than there is."""

    change: Mapping[str, Any]  # of `plan`'s arguments: context, quantize, kv, parallel
    total_bytes: int

    def __str__(self) -> str:
        c, words = self.change, []
        if "context" in c:
            words.append(f"a context of {c['context']:,} tokens")
        if "quantize" in c:
            words.append(f"{c['quantize']} weights")
        if "kv" in c:
            words.append(f"kv {c['kv']}")
        if "parallel" in c:
            words.append("one sequence at a time" if c["parallel"] == 1 else f"{c['parallel']} sequences at a time")
        return f"{', '.join(words)} ({human_bytes(self.total_bytes)})"


@dataclass(frozen=True)
class Plan:
    """What a model takes with these settings, and whether that fits. Made by `plan`."""

    context: int
    parallel: int
    chunk: int  # tokens of a prompt in one pass
    scheme: str | None  # "int4" or "int8" of packed weights
    dtype: str  # computed in
    kv: str  # what keys and values are kept in
    parts: tuple[Part, ...]
    cache_bytes_per_token: int  # of one sequence, once its rings are full
    memory: int | None  # what there is; None: not known
    max_context: int  # the largest that fits, 0 when none does; the model's own limit when memory is not known
    advice: tuple[Advice, ...]  # when it does not fit: what does

    @property
    def weights_bytes(self) -> int:
        """Of the model; without the drafter's."""
        return self._sum("weights")

    @property
    def cache_bytes(self) -> int:
        """Of all sequences together, each as long as the context."""
        return self._sum("cache")

    @property
    def total_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool | None:
        """None where it is not known how much memory there is."""
        return None if self.memory is None else self.total_bytes <= self.memory

    @property
    def verdict(self) -> str:
        """One line for people."""
        total = human_bytes(self.total_bytes)
        if self.memory is None:
            return f"takes {total}; how much memory there is here is not known"
        there = human_bytes(self.memory)
        if self.fits:
            return f"fits in {there}: takes {total}; the largest context that fits is {self.max_context:,} tokens"
        return f"does not fit in {there}: takes {total}; {self.advice_text}"

    @property
    def advice_text(self) -> str:
        if not self.advice:
            return "no context, format or number of sequences makes it fit"
        return "what fits: " + "; or ".join(map(str, self.advice))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "context": self.context,
            "parallel": self.parallel,
            "chunk": self.chunk,
            "scheme": self.scheme,
            "dtype": self.dtype,
            "kv": self.kv,
            "weights_bytes": self.weights_bytes,
            "cache_bytes": self.cache_bytes,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "total_bytes": self.total_bytes,
            "memory_bytes": self.memory,
            "fits": self.fits,
            "max_context": self.max_context,
            "parts": [{"name": p.name, "kind": p.kind, "bytes": p.bytes, "dtype": p.dtype} for p in self.parts],
            "advice": [{**a.change, "total_bytes": a.total_bytes} for a in self.advice],
        }

    def _sum(self, kind: str) -> int:
        return sum(part.bytes for part in self.parts if part.kind == kind)


def plan(
    config: ModelConfig,
    *,
    context: int | None = None,
    parallel: int = 1,
    quantize: str | None = None,
    kv: str = "auto",
    dtype: str | None = None,
    memory: int | None = None,
    drafter: Part | None = None,
    tiles: Mapping[str, int] | None = None,
    compiled: bool = True,
) -> Plan:
    """The plan for `parallel` sequences of up to `context` tokens (None: all that the model was made for).

    quantize is the scheme that the weights are packed in or will be, None for floats; kv is the format of the cache;
    dtype is computed in (None: what a CPU would take). memory is what there is, in bytes; without it nothing is said
    about what fits. drafter: one that is loaded beside the model. tiles: bytes of a tile of each packed tensor, by our
    names, for a file that mixes formats.
    compiled: False where there are no C++ kernels. Raises UsageError for settings that cannot be.
    """
    limit = config.text.max_position_embeddings
    if context is not None and not 0 < context <= limit:
        raise UsageError(f"the context of {context} tokens is not possible", f"this model takes 1 to {limit}")
    if parallel < 1:
        raise UsageError(f"{parallel} sequences at a time are not possible", "give a positive number")
    if quantize is not None and quantize not in TILE_BYTES:
        raise UsageError(f"there is no quantisation {quantize!r}", f"use {' or '.join(TILE_BYTES)}")
    if kv not in KV:
        raise UsageError(f"there is no kv format {kv!r}", f"there are {', '.join(KV)}")
    if dtype is not None and SHORT.get(dtype, dtype) not in SHORT.values():
        raise UsageError(f"cannot compute in {dtype!r}", "use float32, bfloat16 or float16")
    need = _Need(config, parallel, quantize, kv, dtype, drafter, tiles, compiled)
    return need.plan(context or limit, memory)


@dataclass(frozen=True)
class _Need:
    """What is asked for, but for the context: the arguments of `plan`."""

    config: ModelConfig
    parallel: int
    quantize: str | None
    kv: str
    asked_dtype: str | None
    drafter: Part | None
    tiles: Mapping[str, int] | None
    compiled: bool

    @cached_property
    def dtype(self) -> str:
        if self.asked_dtype is None:
            return sizes.computed_in(self.config, self.quantize is not None)
        return SHORT.get(self.asked_dtype, self.asked_dtype)

    @cached_property
    def stored(self) -> str:
        """The format of keys and values."""
        return sizes.kv_format(self.kv, self.dtype, self.quantize is not None)

    def plan(self, context: int, memory: int | None) -> Plan:
        """With the largest chunk that fits, the smallest where none does."""
        chunk = CHUNKS[0] if memory is None else self.chunk(context, memory)
        return Plan(
            context=context,
            parallel=self.parallel,
            chunk=chunk or CHUNKS[-1],
            scheme=self.quantize,
            dtype=self.dtype,
            kv=self.stored,
            parts=self.parts(context, chunk or CHUNKS[-1]),
            cache_bytes_per_token=sizes.cache_rows(self.config.text, self.stored)[0],
            memory=memory,
            max_context=self.max_context(memory),
            advice=() if chunk or memory is None else tuple(_advice(self, context, memory)),
        )

    def chunk(self, context: int, memory: int) -> int | None:
        """The largest chunk that fits; None: not even the smallest does."""
        return next((chunk for chunk in CHUNKS if self.total(context, chunk) <= memory), None)

    def max_context(self, memory: int | None) -> int:
        limit = self.config.text.max_position_embeddings
        if memory is None:
            return limit
        # More tokens never take fewer bytes, so the contexts that fit come first.
        return bisect.bisect_right(range(1, limit + 1), memory, key=self.total)

    def total(self, context: int, chunk: int = CHUNKS[-1]) -> int:
        return sum(part.bytes for part in self.parts(context, chunk))

    def parts(self, context: int, chunk: int) -> tuple[Part, ...]:
        text = self.config.text
        full, ring = (self.parallel * size for size in sizes.cache_rows(text, self.stored))
        many = f" of {self.parallel} sequences" if self.parallel > 1 else ""
        return (
            *self._weights,
            Part(f"full layers' cache{many}", "cache", full * context, self.stored),
            Part(f"sliding layers' cache{many}", "cache", ring * sizes.ring_rows(text, context), self.stored),
            Part(f"scratch of a pass of {chunk}", "scratch", self._scratch(context, chunk), self.dtype),
            *self._rest,
        )

    @cached_property
    def _weights(self) -> tuple[Part, ...]:
        config = self.config
        # Beside packed matrices the embedders stay bfloat16, as `iolite.checkpoint.assemble` has it.
        beside = "bfloat16" if self.quantize and self.dtype == "float32" else self.dtype
        found = sizes.weights(config, self.quantize, self.dtype, beside, self.tiles)
        packed = self.quantize or self.dtype
        dtypes = {"vision": beside, "audio": beside}
        parts = [Part(_NAMES[part], "weights", size, dtypes.get(part, packed)) for part, size in found.items()]
        if self.drafter:
            parts.append(self.drafter)
        return tuple(parts)

    @cached_property
    def _rest(self) -> tuple[Part, ...]:
        media = sizes.media_bytes(self.config)
        return (
            *([Part("a picture or a sound", "media", media, "float32")] if media else []),
            Part("tokenizer", "process", TOKENIZER_ENTRY * self.config.text.vocab_size),
            Part("Python and torch", "process", RUNTIME),
        )

    def _scratch(self, context: int, chunk: int) -> int:
        """The most of a pass. A picture goes through whole, however small the chunk; its usual size is taken here."""
        text, vision = self.config.text, self.config.vision
        n = min(context, max(chunk, vision.num_soft_tokens if vision else 0))
        scores = 2 * 4 * text.vocab_size * self.parallel  # of the next tokens: as they come, and soft-capped
        return _HOLES * n * self._activations + scores + self._reference(context, n) + _THREADS

    @cached_property
    def _activations(self) -> int:
        """Bytes for each token of a pass, where they are most: in attention or in the feed-forward net.

        Beside the stream there are its norm, what will be added, and one more. Packed products round their input to
        int8, 44 bytes for 32 numbers; others have a gate, its gelu, the other half and their product at once.
        """
        text, size = self.config.text, BYTES[self.dtype]
        stream, wide = 4 * size * text.hidden_size, text.intermediate_size
        gated = 2 * size * wide + 44 * -(-wide // 32) if self.quantize else 4 * size * wide
        heads = max(
            (text.num_attention_heads + text.layer_kv_heads(i)) * text.layer_head_dim(i)
            for i in range(text.num_hidden_layers)
        )
        return stream + max(gated, 4 * size * heads)

    def _reference(self, context: int, n: int) -> int:
        """What the reference takes where the C++ kernels are not for these tensors: scores, keys and values of a layer
        in the format that is computed in, and a packed matrix as float32."""
        if self.dtype == "float32" and self.compiled:
            return 0
        text = self.config.text
        most = 4 * min(_MOST_SCORES, text.num_attention_heads * n * context)
        if self.stored != self.dtype:
            most += BYTES[self.dtype] * max(
                (context if text.is_full(i) else sizes.ring_rows(text, context))
                * (2 * text.layer_kv_heads(i) * text.layer_head_dim(i))
                for i in range(text.num_hidden_layers)
            )
        if self.quantize and not self.compiled:
            most += 4 * sizes.largest_matrix(self.config)
        return most


def _advice(need: _Need, context: int, memory: int) -> Iterator[Advice]:
    """The nearest plans that fit: those with one setting changed; else with as few as will do; else, with the changes
    that leave the most room, a shorter context."""
    least = min(LEAST_CONTEXT, need.config.text.max_position_embeddings)
    longest = need.max_context(memory)
    shorter: list[dict[str, Any]] = [{"context": longest}] if longest >= least else []
    changes = sorted(_changes(need, context, memory), key=len)
    fitting = [change for change in changes if _changed(need, change).chunk(context, memory)]
    near = shorter + [change for change in fitting if len(change) == 1] or fitting[:1]
    if not near:
        room = [(_changed(need, change).max_context(memory), change) for change in changes]
        longest, change = max(room, key=lambda item: item[0], default=(0, {}))
        near = [{"context": longest, **change}] if longest >= least else []
    for change in near:
        changed, n = _changed(need, change), change.get("context", context)
        yield Advice(change, changed.total(n, changed.chunk(n, memory) or CHUNKS[-1]))


def _changed(need: _Need, change: Mapping[str, Any]) -> _Need:
    return replace(need, **{name: value for name, value in change.items() if name != "context"})


def _changes(need: _Need, context: int, memory: int) -> Iterator[dict[str, Any]]:
    """Every choice of a packing, int8 in the cache and fewer sequences: as many as fit, or one."""
    packings = [] if need.quantize else [{"quantize": "int8"}, {"quantize": "int4"}]
    caches = [] if need.kv == "int8" else [{"kv": "int8"}]
    for packing, cache in product([{}, *packings], [{}, *caches]):
        change: dict[str, Any] = packing | cache
        if change:
            yield change
        if need.parallel > 1:
            changed, fewer = _changed(need, change), range(1, need.parallel)
            fitting = bisect.bisect_right(fewer, memory, key=lambda p: replace(changed, parallel=p).total(context))
            yield change | {"parallel": max(1, fitting)}
