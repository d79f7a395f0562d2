"""Attention of few tokens over keys in a ring, by the kernels, against the reference.

Run by `test_triton_attention.py` in a process of their own.
"""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from torch import Tensor

from iolite.cache_layouts import to_int8
from iolite.kernels import ring, triton
from iolite.kernels.contracts import Keys
from iolite.kernels.reference import attend, to_float
from iolite.kernels.triton.dot import INTERPRETED

attention = sys.modules["iolite.kernels.triton.attention"]  # the package has a function of that name

DEVICE = "cpu" if INTERPRETED else "cuda"

# Tokens, query heads, key-value heads, head size: groups of 1, 2, 4 and 16, head sizes that are no power of two, more
# queries of one key-value head than a program takes.
SHAPES = [(1, 4, 2, 16), (3, 4, 1, 20), (2, 3, 3, 7), (5, 16, 1, 32)]
RINGS = [(None, 150), (24, 33)]  # window, rows


def tensors(n: int, heads: int, kv_heads: int, size: int, room: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(n)
    shapes = ((n, heads, size), (room, kv_heads, size), (room, kv_heads, size))
    return tuple(torch.randn(shape, generator=rng).to(DEVICE, dtype) for shape in shapes)


def ring_of(k: Tensor, v: Tensor) -> Keys:
    return Keys(k, v, 0, 0, k.shape[0])


def assert_attention(found: Tensor, q: Tensor, keys: Keys, window: int | None) -> None:
    """Within float32 rounding of the reference; in bfloat16, where each share of the softmax is rounded once and the
    result once, within two units in the last place (2^-7) of the largest value."""
    every = slice(None)
    k, v = (to_float(t, scale, every, torch.float32) for t, scale in ((keys.k, keys.k_scale), (keys.v, keys.v_scale)))
    wide = Keys(k, v, keys.first, keys.count, keys.room)
    expected = attend(q.float(), wide, window, None)
    allowed = 2e-5 if q.dtype is torch.float32 else 2 * 2**-7 * float(wide.v.abs().max())
    assert found.dtype is q.dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("window", "room"), RINGS)
@pytest.mark.parametrize("length", [0, 23, 100])
def test_attention(shape: tuple[int, int, int, int], window: int | None, room: int, length: int) -> None:
    """With the length on the host and on the device, over rings that are empty, filling and wrapped."""
    q, k, v = tensors(*shape, room, torch.float32)
    past = length if window is None else min(length, window - 1)
    keys = Keys(k, v, (length - past) % room, past + len(q), room)
    found = triton.attention(
        q, k, v, first=keys.first, room=room, keys=keys.count, past=past, window=window or 0, blocks=None
    )
    assert_attention(found, q, keys, window)
    at = torch.tensor(length, device=DEVICE)
    assert_attention(triton.attend_ring(q, ring_of(k, v), at, window), q, keys, window)


def test_bfloat16_and_strides() -> None:
    """Keys and values of one buffer, side by side, and queries that are a slice of a wider product."""
    wide_q, both, _ = tensors(3, 6, 4, 16, 60, torch.bfloat16)
    q, (k, v) = wide_q[:, :4], both.split(2, dim=1)
    found = triton.attention(q, k, v, first=41, room=60, keys=50, past=47, window=0)
    assert_attention(found, q, Keys(k, v, 41, 50, 60), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_keys_and_values(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """With scales of their own, on the host's length and the device's."""
    q, k, v = tensors(*shape, 60, dtype)
    (k, k_scale), (v, v_scale) = to_int8(k), to_int8(3 * v)
    keys = Keys(k, v, 41, 50, 60, k_scale, v_scale)
    past = 50 - len(q)
    found = triton.attention(q, k, v, first=41, room=60, keys=50, past=past, k_scale=k_scale, v_scale=v_scale)
    assert_attention(found, q, keys, None)
    at = torch.tensor(20, device=DEVICE)
    filled = Keys(k, v, 0, 20 + len(q), 60, k_scale, v_scale)
    assert_attention(triton.attend_ring(q, filled, at, None), q, filled, None)


def test_one_vector_for_key_and_value() -> None:
    """As the cache keeps them where both are one projection, in bfloat16 and in int8 with one scale."""
    wide, _, _ = tensors(1, 20, 1, 20, 60, torch.bfloat16)
    q = wide[:, :4, :16]
    rows = torch.randn(60, 1, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    packed, scale = to_int8(rows)
    for both, scales in ((rows.bfloat16(), (None, None)), (packed, (scale, scale))):
        keys = Keys(both[..., 4:], both[..., :16], 7, 50, 60, *scales)
        found = triton.attention(
            q, keys.k, keys.v, first=7, room=60, keys=50, past=49, k_scale=scales[0], v_scale=scales[1]
        )
        assert_attention(found, q, keys, None)


def test_keys_are_split_in_parts_some_of_which_are_empty() -> None:
    """One token of a long room: eight parts, of which seven have no key."""
    device = torch.device("cpu")
    assert attention._parts(keys=1000, step=32, programs=1, device=device) > 1
    q, k, v = tensors(1, 2, 1, 16, 1000, torch.float32)
    found = triton.attend_ring(q, ring_of(k, v), torch.tensor(3, device=DEVICE), None)
    assert_attention(found, q, Keys(k, v, 0, 4, 1000), None)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = tensors(2, 4, 2, 16, 40, torch.float32)
    found = triton.attention(q * 100, k, v, first=0, room=40, keys=30, past=28)
    assert_attention(found, q * 100, Keys(k, v, 0, 30, 40), None)


def test_more_tokens_and_pictures_are_left_to_the_reference() -> None:
    q, k, v = tensors(9, 4, 2, 16, 40, torch.float32)
    keys = Keys(k, v, 0, 30, 40)
    assert torch.equal(triton.attention(q, k, v, first=0, room=40, keys=30, past=21), attend(q, keys, None, None))
    q, blocks = q[:4], torch.tensor([0, 1, 1, 0], device=DEVICE)
    found = triton.attention(q, k, v, first=0, room=40, keys=30, past=26, window=20, blocks=blocks)
    assert torch.equal(found, attend(q, keys, 20, blocks))


def test_as_an_operator_of_torch_compile() -> None:
    q, k, v = tensors(2, 4, 2, 16, 40, torch.float32)
    length = torch.tensor(9, device=DEVICE)
    operands = (q, k, v, None, None, length, 12)
    torch.library.opcheck(attention.ring_op, operands, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(triton.attend_ring, backend="aot_eager", fullgraph=True)
    arguments = (q, ring_of(k, v), length, 12)
    assert torch.equal(compiled(*arguments), triton.attend_ring(*arguments))


def test_the_ring_in_plain_torch_is_the_same() -> None:
    q, k, v = tensors(2, 4, 2, 16, 40, torch.float32)
    at = torch.tensor(77, device=DEVICE)
    found = triton.attend_ring(q, ring_of(k, v), at, 24)
    torch.testing.assert_close(found, ring.attend_reference(q, ring_of(k, v), at, 24), rtol=0, atol=2e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reserves memory without taking it")
def test_heads_further_apart_than_32_bits_count() -> None:
    """Of a long context's rows the last head's begin after more than 2^31 numbers."""
    step = 1 << 30
    memory = mmap.mmap(-1, 3 * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    k = torch.frombuffer(memory, dtype=torch.int8).as_strided((4, 3, 16), (16, step, 1))
    k.copy_(torch.arange(4 * 3 * 16).view(4, 3, 16) % 19 - 9)
    if not INTERPRETED:
        k = torch.empty_strided(k.shape, k.stride(), dtype=k.dtype, device=DEVICE).copy_(k)
    q, scale = torch.ones(1, 3, 16, device=DEVICE), torch.full((4, 3), 0.1, device=DEVICE)
    found = triton.attention(q, k, k, first=0, room=4, keys=4, past=3, k_scale=scale, v_scale=scale)
    assert_attention(found, q, Keys(k, k, 0, 4, 4, scale, scale), None)
