"""Attention of one to eight new tokens over a cache on a GPU, by Triton: `flash-decoding`.

The keys are split among programs, since one token has too few heads to fill a GPU. A program takes one key-value head
and reads its keys and values once for all query heads that share it and all new tokens; a second kernel merges the
parts. Keys lie in a ring: key s is in row (first + s) % room. How many there are may be a number on the device, so that
a captured CUDA graph goes on being right while the sequence grows; the number of programs then follows from the room.

Tested under Triton's interpreter and compiled for compute capability 8.0 and 9.0. It has not run on a GPU yet.

Letters: N new tokens, H query heads, K key-value heads, D head size, P parts that the keys are split into.
Source of the idea: "Flash-Decoding for long-context inference", https://pytorch.org/blog/flash-decoding/.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iolite.kernels.triton.dot import OPTIONS, dot
from iolite.kernels.triton.matmul import multiprocessors

_MAX_PARTS = 128
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)  # the hardware has exp2


@triton.jit(do_not_specialize=["first", "past"])
def _attend(
    q, k, v, k_scale, v_scale, totals, stats, length, first, past, room, window, tokens, heads,
    q_token, q_head, k_row, k_head, v_row, v_head, scale_row, scale_head,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PARTS: tl.constexpr, ON_DEVICE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """totals [P, N * H, D] and stats [P, N * H, 2]: sums of values not yet divided, and their (maximum, divisor).

    SCALED: k and v are int8, and a score is multiplied with its key's scale, a weight with its value's.

    Row r of a program's queries is token r // GROUP and head r % GROUP of those that share the key-value head.
    """
    if ON_DEVICE:
        before = tl.load(length).to(tl.int32)
        past = before if window == 0 else tl.minimum(before, window - 1)
        first = (before - past) % room
    head, part = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, WIDTH)
    token, query_head = row // GROUP, head * GROUP + row % GROUP
    query_inside = (token < tokens)[:, None] & (d < D)[None, :]
    query = tl.load(q + token[:, None] * q_token + query_head[:, None] * q_head + d[None, :], query_inside, 0.0)

    keys = past + tokens
    each = tl.cdiv(tl.cdiv(keys, PARTS), KEYS) * KEYS
    stop = tl.minimum((part + 1) * each, keys)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    mass = tl.zeros((QUERIES,), tl.float32)
    total = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(part * each, stop, KEYS):
        s = start + tl.arange(0, KEYS)
        at = ((first + s) % room).to(tl.int64)
        inside = (s < stop)[:, None] & (d < D)[None, :]
        key = tl.load(k + at[:, None] * k_row + head.to(tl.int64) * k_head + d[None, :], inside, 0.0)
        key = key.to(tl.float32).to(query.dtype)  # by way of float32, in which int8 is exact
        score = dot(query, tl.trans(key), tl.zeros((QUERIES, KEYS), tl.float32))
        if SCALED:
            score *= tl.load(k_scale + at * scale_row + head * scale_head, s < stop, 0.0)[None, :]
        distance = past + token[:, None] - s[None, :]
        looks = (s < stop)[None, :] & (distance >= 0) & ((window == 0) | (distance < window))
        score = tl.where(looks, score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # no key so far: exp2(-inf - 0) is 0
        weight = tl.exp2((score - base[:, None]) * _LOG2E)
        shrink = tl.exp2((top - base) * _LOG2E)
        mass = mass * shrink + tl.sum(weight, axis=1)
        if SCALED:
            weight *= tl.load(v_scale + at * scale_row + head * scale_head, s < stop, 0.0)[None, :]
        value = tl.load(v + at[:, None] * v_row + head.to(tl.int64) * v_head + d[None, :], inside, 0.0)
        total = dot(weight.to(query.dtype), value.to(tl.float32).to(query.dtype), total * shrink[:, None])
        top = new_top
    out = (part * tokens + token) * heads + query_head
    tl.store(totals + out[:, None].to(tl.int64) * D + d[None, :], total, query_inside)
    tl.store(stats + out * 2, top, token < tokens)
    tl.store(stats + out * 2 + 1, mass, token < tokens)


@triton.jit
def _merge(totals, stats, out, rows, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """out [N * H, D]: the parts of each row, weighed by their shares of the softmax. Every row saw at least itself."""
    row, part = tl.program_id(0), tl.arange(0, PARTS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = part * rows + row
    top = tl.load(stats + at * 2)
    share = tl.exp2((top - tl.max(top, axis=0)) * _LOG2E)
    mass = tl.sum(share * tl.load(stats + at * 2 + 1), axis=0)
    total = tl.load(totals + at[:, None].to(tl.int64) * D + d[None, :], (d < D)[None, :], 0.0)
    result = tl.sum(total * share[:, None], axis=0) / mass
    tl.store(out + row.to(tl.int64) * D + d, result.to(out.dtype.element_ty), d < D)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    room: int,
    window: int,
    past: int = 0,
    first: int = 0,
    length: Tensor | None,
) -> Tensor:
    """softmax(q · k) · v with scale 1 for q [N, H, D], N small, over buffers k, v [rows, K, D] -> [N, H, D].

    scales [rows, K] of keys and values in int8; both of the same strides.
    Query i stands at key past + i and sees the keys up to there, the last `window` of them unless that is 0. With
    `length`, an integer tensor on the device that counts the tokens before the new ones, past and first follow from
    it: the token at position p lies in row p % room, and min(length, window - 1) of the past are looked at.
    """
    (tokens, heads, size), kv_heads = q.shape, k.shape[1]
    assert k.stride(-1) == v.stride(-1) == 1
    q = q if q.stride(-1) == 1 else q.contiguous()
    group = heads // kv_heads
    queries = 16 if tokens * group <= 16 else 32
    width = max(16, triton.next_power_of_2(size))
    step = 32 if width <= 256 else 16  # keys at a time: with the queries they have to fit in 100 KB
    blocks = triton.cdiv(tokens * group, queries)
    most = past + tokens if length is None else min(room, window + tokens - 1) if window else room
    parts = _parts(most, step, kv_heads * blocks, q.device)
    totals = q.new_empty(parts, tokens * heads, size, dtype=torch.float32)
    stats = q.new_empty(parts, tokens * heads, 2, dtype=torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_scale, v_scale = (stats if scale is None else scale for scale in scales)
    with torch.cuda.device_of(q):
        _attend[(kv_heads, parts, blocks)](
            q, k, v, k_scale, v_scale, totals, stats, stats if length is None else length, first, past, room, window,
            tokens, heads, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            k_scale.stride(0), k_scale.stride(1),
            GROUP=group, D=size, WIDTH=width, QUERIES=queries, KEYS=step, PARTS=parts, ON_DEVICE=length is not None,
            SCALED=scales[0] is not None, num_warps=4 if width <= 256 else 8, num_stages=2, **OPTIONS,
        )  # fmt: skip
        block = min(64, width)
        _merge[(tokens * heads, triton.cdiv(size, block))](
            totals, stats, out, tokens * heads, D=size, WIDTH=block, PARTS=parts, **OPTIONS
        )
    return out


def _parts(keys: int, step: int, programs: int, device: torch.device) -> int:
    """A power of two: about two programs a multiprocessor, but no part of fewer than two steps."""
    wanted = min(2 * multiprocessors(device) // programs, keys // (2 * step), _MAX_PARTS)
    return triton.next_power_of_2(max(1, wanted))


def ring(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, length: Tensor, window: int
) -> Tensor:
    return attend(q, k, v, (k_scale, v_scale), room=k.shape[0], window=window, length=length)


ring_op = torch.library.custom_op("iolite::attend_ring", ring, mutates_args=())
"""`attend` with a length on the device, as an operator that torch.compile takes as it is."""


@ring_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, length: Tensor, window: int
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
