"""Attention of the C++ kernels against the reference in float64, on every code path that runs here.

The bound of an output, with u = 2^-24: errors of the weights e^(score) times the values they weigh.
- A score sums D products. If roundings are independent its error stays below 4 sqrt(D) u * sum |q k| but for odds of
  1 in 15,000 (Higham and Mary, 2019), and it enters twice: in the weight and in the sum of the weights.
- The exponential, 1.2e-7, enters twice as well.
- Sums over keys are made of blocks of 64, joined with two operations a block, merged over at most 32 ranges.

- Few new tokens with many heads for a key, over bfloat16 or int8, go through bfloat16 products on processors that have
  them. The score then has twice as many products, of query parts that leave out 2^-17 of the query. Each weight p is
  rounded within 2^-8 of it: with independent roundings the sum of p times values up to V is off by more than
  6 * 2^-8 * sqrt(sum p²) * V for odds of 1 in 30 million (Hoeffding, 1963). That enters twice too: the values it weighs
  are those less their mean.

The mask is exact: a key too many or too few is far outside the bound. For bfloat16 products, whose bound is wide, there
are tests of their own in which one key has all the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cpu_kernels import ISAS, UNIT, assert_within, code_path
from support.emulated import Emulated
from torch import Tensor

from iolite.cache_layouts import to_int8
from iolite.kernels import cpu, reference
from iolite.kernels.contracts import Keys

EXP = 1.2e-7  # relative error of the kernels' exponential

BFLOAT16 = 2.0**-8  # rounding to bfloat16, relative
CPU = Path("/proc/cpuinfo")
HAS_PAIRS = CPU.exists() and "avx512_bf16" in CPU.read_text().split()

paths = pytest.mark.parametrize("isa", ISAS)


@dataclass(frozen=True)
class Case:
    """N new tokens behind `past` others, in a cache whose first key lies in row `first` of `room`."""

    n: int
    past: int
    kv_heads: int = 2
    group: int = 2  # query heads of a key-value head
    size: int = 64
    first: int = 0
    slack: int = 0  # rows of the room beyond the keys
    window: int = 0
    dtype: torch.dtype = torch.float32
    loud: float = 1.0  # scores' standard deviation

    def check(self, blocks: Tensor | None = None, kernels: Any = cpu) -> None:
        random = torch.Generator().manual_seed(self.n + 1000 * self.past)
        count = self.past + self.n
        room = count + self.slack
        # Keys and values overlap in one buffer, neither aligned nor without gaps; rows of no key hold NaN, or have
        # such scales.
        rows = (torch.arange(count) + self.first) % room
        wide = torch.full((room, self.kv_heads, 2 * self.size + 3), torch.nan)
        wide[rows] = torch.randn(count, *wide.shape[1:], generator=random)
        buffer, scale = to_int8(wide) if self.dtype is torch.int8 else (wide.to(self.dtype), None)
        k, v = buffer[..., 1 : self.size + 1], buffer[..., self.size // 2 : self.size // 2 + self.size]
        q = torch.randn(self.n, self.kv_heads * self.group, self.size, generator=random)
        q *= self.loud / self.size**0.5
        wide_scale = None if scale is None else scale.double()  # whose products with bytes are exact
        keys = Keys(k, v, self.first, count, room, wide_scale, wide_scale)
        exact = reference.attend(q.double(), keys, self.window or None, blocks)
        ours = kernels.attention(
            q, k, v, first=self.first, room=room, keys=count, past=self.past, window=self.window, blocks=blocks,
            k_scale=scale, v_scale=scale,
        )  # fmt: skip
        read_k, read_v = (reference.to_float(t, scale, rows, torch.float32) for t in (k, v))
        terms = largest_terms(q, read_k)
        scores = 4 * self.size**0.5 * UNIT * terms
        sums = 64 + 2 * (count // 64 + 1) + 2 * 32 + 8 + 1  # and a product with the scale
        weights = torch.zeros(())
        if kernels is cpu and self.in_pairs():
            scores = (4 * (2 * self.size) ** 0.5 * UNIT + 2.0**-17) * terms
            weights = 6 * BFLOAT16 * self.spread(q, read_k, blocks)
        bound = 2 * (scores + EXP + sums * UNIT + weights).double() * read_v.abs().max().item()
        assert_within(ours, exact, bound[..., None])

    def in_pairs(self) -> bool:
        """Whether the code path in use takes bfloat16 products for this."""
        narrow = self.dtype in (torch.bfloat16, torch.int8) and self.size % 64 == 0
        return HAS_PAIRS and cpu.isa() == "avx512" and narrow and self.n <= 8 and self.n * self.group > 12

    def spread(self, q: Tensor, k: Tensor, blocks: Tensor | None) -> Tensor:
        """sqrt(sum p²) over the weights p of each query and head: [N, H] for q [N, H, D], k [S, K, D]."""
        at = torch.arange(len(k))
        key_blocks = None if blocks is None else torch.cat((blocks.new_zeros(self.past), blocks))
        seen = reference.may_look(at[self.past :], at, blocks, key_blocks, self.window or None)
        scores = torch.einsum("nkgd,skd->nkgs", q.unflatten(1, (self.kv_heads, -1)), k).flatten(1, 2)
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).square().sum(-1).sqrt()


def largest_terms(q: Tensor, k: Tensor) -> Tensor:
    """The largest sum of |q k| over any key: [N, H] for q [N, H, D], k [S, K, D]."""
    groups = q.abs().unflatten(1, (k.shape[1], -1))  # [N, K, G, D]
    return torch.einsum("nkgd,skd->nkgs", groups, k.float().abs()).amax(-1).flatten(1)


# Around the rows of a vector, of a product and of a task (96 rows, so 48 tokens of two heads).
NEW = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 50, 64, 95, 96, 97, 100, 130)


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("window", [0, 5, 40, 1024])
def test_every_number_of_new_tokens(isa: str, window: int, dtype: torch.dtype) -> None:
    for threads in (1, 3):
        with code_path(isa, threads):
            for n in NEW:
                Case(n, past=min(37 * n, 300), window=window, dtype=dtype).check()


@paths
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 193, 257, 1000])
def test_every_number_of_keys(isa: str, count: int) -> None:
    for threads in (1, 2, 3):
        with code_path(isa, threads):
            Case(1, count - 1).check()
            Case(1, count - 1, kv_heads=1, group=16).check()
            Case(1, count - 1, kv_heads=1, group=16, dtype=torch.bfloat16).check()
            Case(1, count - 1, kv_heads=1, group=13, dtype=torch.int8).check()
            Case(1, count - 1, size=17).check()
            Case(1, count - 1, size=17, dtype=torch.int8).check()


@paths
@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 100, 127, 128, 129, 192, 260, 577])
@pytest.mark.parametrize("group", [1, 3, 5])
def test_any_head(isa: str, size: int, group: int) -> None:
    with code_path(isa, 2):
        for n in (1, 3, 40):
            Case(n, 90, kv_heads=3, group=group, size=size).check()


@paths
@pytest.mark.parametrize("n", [1, 4, 7, 16, 60])
@pytest.mark.parametrize(("kv_heads", "group", "size", "window"), [(8, 2, 256, 1024), (1, 16, 512, 0)])
def test_the_heads_of_the_large_model(isa: str, n: int, kv_heads: int, group: int, size: int, window: int) -> None:
    with code_path(isa, 2):
        for dtype in (torch.bfloat16, torch.int8):
            Case(n, 1023, kv_heads, group, size, first=700, slack=9, window=window, dtype=dtype).check()


@paths
@pytest.mark.parametrize("before", [1, 7, 63, 64, 65, 110])
@pytest.mark.parametrize("n", [1, 2, 13, 55])
def test_keys_around_the_end_of_a_ring(isa: str, before: int, n: int) -> None:
    """`before` of them come before the end."""
    with code_path(isa, 3):
        for slack in (0, 5, 64):
            first = 110 + n + slack - before
            Case(n, 110, first=first, slack=slack, window=60).check()
            Case(n, 110, first=first, slack=slack, size=20).check()
            Case(n, 110, 1, 16, first=first, slack=slack, dtype=torch.bfloat16).check()


TWO_WAY = {
    "inside": lambda n: (torch.arange(n) // 7 % 2) * (torch.arange(n) // 14 + 1),
    "all one": lambda n: torch.ones(n, dtype=torch.int64),
    "one after another": lambda n: torch.arange(n) // 30 + 1,
    "scattered": lambda n: torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(n)),
    "none": lambda n: torch.zeros(n, dtype=torch.int64),
    "negative, which is none": lambda n: torch.full((n,), -1),
}


@paths
@pytest.mark.parametrize("kind", TWO_WAY)
@pytest.mark.parametrize("window", [0, 3, 25, 64, 500])
def test_two_way_blocks(isa: str, kind: str, window: int) -> None:
    """Also longer than the window, which they never widen; a full layer does not know them."""
    for n, past in ((1, 30), (4, 0), (5, 70), (90, 33), (140, 0)):
        with code_path(isa, 2):
            Case(n, past, window=window).check(TWO_WAY[kind](n))
            Case(n, past, window=window, size=16, first=past // 2).check(TWO_WAY[kind](n))


@paths
@pytest.mark.parametrize("group", [1, 2, 16])
def test_scores_of_any_size(isa: str, group: int) -> None:
    with code_path(isa, 2):
        for n in (1, 6, 50):
            for loud in (1e-6, 30.0, 1e3):
                Case(n, 200, group=group, loud=loud).check()
                Case(n, 200, group=group, loud=loud, dtype=torch.bfloat16).check()


@paths
@pytest.mark.parametrize("size", [3, 64])
@pytest.mark.parametrize("top", [-1e30, -1e5, 1e5, 1e30])
def test_far_apart_scores_choose_one_key(isa: str, size: int, top: float) -> None:
    """Keys with scores near `top`, the last one's twice its neighbours' (or half): all weight is on the largest."""
    k = torch.zeros(300, 1, size)
    k[:, 0, 0] = top
    k[250, 0, 0] = 2 * top if top > 0 else 0.5 * top
    v = torch.randn(300, 1, size, generator=torch.Generator().manual_seed(0))
    for heads, n in ((1, 1), (2, 1), (16, 1), (2, 30)):
        q = torch.zeros(n, heads, size)
        q[..., 0] = 1
        with code_path(isa, 2):
            out = cpu.attention(q, k, v, keys=300, past=300 - n)
        assert torch.equal(out, v[250].expand_as(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("window", [0, 3, 63, 64, 100])
@pytest.mark.parametrize("newest", [True, False])
def test_the_mask_of_bfloat16_products(dtype: torch.dtype, window: int, newest: bool) -> None:
    """Scores rise by 100 a key, or fall: all weight is on the last key that a query may look at, or on the first."""
    keys, room, first = 333, 340, 150
    s = torch.arange(keys)
    k, v = torch.full((2, room, 1, 64), 0.0 if dtype is torch.int8 else torch.nan)
    rows = (s + first) % room
    k[rows, 0] = 0
    k[rows, 0, 0], k[rows, 0, 5] = (s // 16).float(), (s % 16).float()
    v[rows] = torch.randint(-100, 100, (keys, 1, 64), generator=torch.Generator().manual_seed(0)).float()
    scale = torch.full((room, 1), torch.nan).index_fill(0, rows, 1.0) if dtype is torch.int8 else None
    blocks = torch.tensor([1, 1, 1, 0, 2, 2, 3, 0])
    for n in (1, 2, 5, 8):
        q = torch.zeros(n, 16, 64)
        q[..., 0], q[..., 5] = (1600, 100) if newest else (-1600, -100)
        all_blocks = torch.cat((torch.zeros(keys - n, dtype=torch.int64), blocks[:n]))
        seen = reference.may_look(s[-n:], s, blocks[:n], all_blocks, window or None)
        one = [int(row.nonzero().flatten()[-1 if newest else 0]) for row in seen]
        for threads in (1, 2):
            with code_path("avx512", threads):
                out = cpu.attention(
                    q, k.to(dtype), v.to(dtype), first=first, room=room, keys=keys, past=keys - n, window=window,
                    blocks=blocks[:n], k_scale=scale, v_scale=scale,
                )  # fmt: skip
            assert torch.equal(out, v[rows[one]].expand_as(out))


@paths
@pytest.mark.parametrize("n", [1, 8, 9])
def test_the_mean_of_equal_values_is_that_value(isa: str, n: int) -> None:
    """Also where weights are rounded: they are divided by the sum of what they were rounded to."""
    q, k = torch.randn(n + 300, 16, 64, generator=torch.Generator().manual_seed(n)).split((n, 300))
    v = torch.ones(300, 1, 64, dtype=torch.bfloat16)
    with code_path(isa, 2):
        out = cpu.attention(q / 8, k[:, :1].bfloat16(), v, keys=300, past=300 - n)
    assert_within(out, torch.ones_like(out).double(), torch.tensor(300 * UNIT, dtype=torch.float64))


@paths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bfloat16", "int8"])
def test_queries_keep_what_bfloat16_has_no_room_for(isa: str, dtype: torch.dtype) -> None:
    """Two keys, whose scores 64 q and 64 are apart by less than rounding q to bfloat16 would change them."""
    k, v = torch.zeros(2, 2, 1, 64)
    k[0, 0, 7], k[1, 0, 60], v[0] = 64, 64, 1
    extra = torch.linspace(-(2.0**-8), 2.0**-8, 100)
    q = torch.zeros(1, 100, 64)
    q[0, :, 7], q[0, :, 60] = 1 + extra, 1
    scale = torch.ones(2, 1) if dtype is torch.int8 else None
    with code_path(isa):
        out = cpu.attention(q, k.to(dtype), v.to(dtype), keys=2, past=1, k_scale=scale, v_scale=scale)
    exact = torch.sigmoid(64 * (q[0, :, 7].double() - 1))[:, None].expand_as(out)
    # Of the query; and of the smaller weight, at most half of the sum that it is divided by.
    assert_within(out, exact, torch.tensor(64 * 1.01 * 2.0**-17 / 4 + BFLOAT16 / 2 + 1e-6, dtype=torch.float64))


@pytest.mark.skipif(not CPU.exists(), reason="what the processor has is read from /proc/cpuinfo")
def test_bfloat16_products_where_the_processor_has_them() -> None:
    """Float32 arithmetic does not tell a bfloat16 cache from the same numbers in float32; bfloat16 products do."""
    random = torch.Generator().manual_seed(0)
    k = torch.randn(300, 1, 64, generator=random).bfloat16()
    for n, heads, size in ((1, 16, 64), (8, 16, 64), (1, 12, 64), (9, 16, 64), (1, 16, 60)):
        q = torch.randn(n, heads, size, generator=random) / 8
        with code_path("avx512", 2):
            kinds = (k[..., :size], k[..., :size].float())
            narrow, wide = (cpu.attention(q, x, x, keys=300, past=300 - n) for x in kinds)
        assert torch.equal(narrow, wide) != (HAS_PAIRS and n <= 8 and heads == 16 and size == 64)


@paths
@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("heads", [2, 4096])
def test_the_exponential(isa: str, size: int, heads: int) -> None:
    """Two keys with scores 0 and x, values 0 and 1: the output is e^x / (1 + e^x), three roundings after e^x."""
    xs = torch.cat((torch.linspace(-87, 0, 4094), torch.tensor([-1e-4, -1e-30])))
    k, v = torch.zeros(2, 1, size), torch.zeros(2, 1, size)
    k[1], v[1] = 1, 1
    for x in (xs if heads > 2 else xs[::64]).split(heads):
        q = torch.zeros(1, heads, size)
        q[0, :, 0] = x
        with code_path(isa):
            out = cpu.attention(q, k, v, keys=2, past=1)[0, :, 0]
        exact = torch.sigmoid(x.double())
        assert_within(out, exact, exact * (EXP + 4 * UNIT))


@paths
def test_nothing_in_nothing_out(isa: str) -> None:
    with code_path(isa):
        buffer = torch.zeros(4, 2, 8)
        assert cpu.attention(torch.zeros(0, 4, 8), buffer, buffer, keys=3, past=3).shape == (0, 4, 8)
        assert cpu.attention(torch.zeros(0, 4, 8), buffer[:0], buffer[:0], keys=0, past=0).shape == (0, 4, 8)


@paths
def test_the_same_every_time(isa: str) -> None:
    """Threads take tasks as they come free; that must not show."""
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 16, 512, generator=random), torch.randn(900, 1, 512, generator=random)
    with code_path(isa, 3):
        first = cpu.attention(q, k, k, keys=900, past=897)
        for _ in range(20):
            assert torch.equal(cpu.attention(q, k, k, keys=900, past=897), first)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["neon", "portable"])
@pytest.mark.parametrize("threads", [1, 3])
def test_on_arm(aarch64: Emulated, isa: str, threads: int) -> None:
    aarch64.use(isa, threads)
    for n in NEW:
        dtype = (torch.float32, torch.bfloat16, torch.int8)[n % 3]
        Case(n, 50, window=40 * (n % 2), dtype=dtype).check(kernels=aarch64)
    for size in (1, 3, 4, 5, 17, 100, 260):
        Case(1, 200, size=size).check(kernels=aarch64)
        Case(9, 60, kv_heads=3, group=3, size=size, first=30, slack=4).check(kernels=aarch64)
    for n in (1, 3):
        Case(n, 500, 8, 2, 256, first=300, slack=9, window=400, dtype=torch.bfloat16).check(kernels=aarch64)
        Case(n, 300, 1, 16, 512, dtype=torch.bfloat16).check(kernels=aarch64)
        Case(n, 300, 1, 16, 512, dtype=torch.int8).check(kernels=aarch64)
    for kind in TWO_WAY:
        Case(90, 33, window=25).check(TWO_WAY[kind](90), kernels=aarch64)
        Case(3, 33, window=25).check(TWO_WAY[kind](3), kernels=aarch64)
    Case(20, 100, loud=1e3).check(kernels=aarch64)
