"""Caches on their own: how rows lie, how far a ring goes back, and that a copy or a file's tensors are the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from iolite import cache as caches
from iolite.cache import KVCache, RingCache
from iolite.cache_layouts import Apart, Shared, to_int8
from iolite.config import FULL, SLIDING, ModelConfig, TextConfig
from iolite.kernels import reference
from iolite.kernels.reference import apply_rope, attend, rms_norm, rope_angles, to_float

DATA = Path(__file__).parent / "data"
PUBLISHED = ModelConfig.from_hf(json.loads((DATA / "gemma-4-12B-config.json").read_text())).text
WINDOW, SLACK = 7, 5
SMALL = replace(
    PUBLISHED,
    num_hidden_layers=3,
    layer_types=(SLIDING, SLIDING, FULL),
    sliding_window=WINDOW,
    num_key_value_heads=2,
    head_dim=6,
    num_global_key_value_heads=2,
    global_head_dim=16,
)


def projections(config: TextConfig, layer: int, n: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, k_norm's weight) of n tokens, as the model would compute them from random projections."""
    random = torch.Generator().manual_seed(1000 * layer + start)
    heads, size = config.layer_kv_heads(layer), config.layer_head_dim(layer)
    weight = torch.rand(size, generator=torch.Generator().manual_seed(layer)) + 0.1
    raw = torch.randn(n, heads, size, generator=random)
    v = rms_norm(raw, None, config.rms_norm_eps)
    if not config.shares_kv(layer):
        return torch.randn(n, heads, size, generator=random), v, weight
    angles = config.rope_full.num_angles(size)
    cos, sin = rope_angles(torch.arange(start, start + n), size, config.rope_full.theta, angles)
    return apply_rope(v * weight, cos, sin), v, weight


def extend(cache: KVCache, n: int) -> None:
    """n more tokens; what they are follows from their positions."""
    for i, layer in enumerate(cache.layers if n else ()):
        k, v, weight = (t.clone() for t in stack(cache.config, i, cache.length, n))
        layer.extend(k, v, cache.length, weight)
    cache.length += n


def stack(config: TextConfig, layer: int, start: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    one = [projections(config, layer, 1, at) for at in range(start, start + n)]
    return torch.cat([k for k, _, _ in one]), torch.cat([v for _, v, _ in one]), one[0][2]


def kept(cache: KVCache) -> list[Tensor]:
    """What every layer still knows of the last window of tokens (a full layer: of all)."""
    found = []
    for layer in cache.layers if cache.length else ():
        if isinstance(layer, RingCache):
            found += layer.last(cache.length, min(cache.length, WINDOW - 1))
        else:
            found += [store[: cache.length].clone() for store in layer.stores]
    return found


def assert_same(a: KVCache, b: KVCache) -> None:
    assert a.length == b.length
    for x, y in zip(kept(a), kept(b), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("rotary", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (3, 8), (2, 512)])
@pytest.mark.parametrize("weight_size", [1e-3, 1.0, 300.0])
def test_one_vector_is_key_and_value(rotary: float, heads: int, size: int, weight_size: float) -> None:
    """Scores and outputs are those of keys and values apart, for any share of turned dimensions.

    A score sums D products in float32, in another order and with each product rounded once more; as the outputs are
    means of values of size 1, so differ they: by sqrt(D) * 2^-22 times the scores' size, with a margin of 4.
    """
    angles = int(rotary * size // 2)
    random = torch.Generator().manual_seed(size)
    weight = (torch.rand(size, generator=random) + 0.1) * weight_size
    v = rms_norm(torch.randn(9, heads, size, generator=random), None, 1e-6)
    k = apply_rope(v * weight, *rope_angles(torch.arange(200_000, 200_009), size, 1e6, angles))
    q = torch.randn(4, 2 * heads, size, generator=random) / size**0.5 / weight_size
    config = replace(SMALL, num_global_key_value_heads=heads, global_head_dim=size)
    config = replace(config, rope_full=replace(config.rope_full, partial_rotary_factor=rotary))
    one, two = (KVCache(config, 9, shared=shared).layers[2] for shared in (True, False))
    assert isinstance(one.layout, Shared) and isinstance(two.layout, Apart)
    assert config.rope_full.num_angles(size) == angles
    keys = one.extend(k, v, 0, weight)
    found = one.layout.output(attend(one.layout.queries(q, weight), keys, None, None))
    expected = attend(q, two.extend(k, v, 0), None, None)
    assert keys.k.data_ptr() != keys.v.data_ptr() or rotary == 0
    assert keys.k.untyped_storage().data_ptr() == keys.v.untyped_storage().data_ptr()
    torch.testing.assert_close(found, expected, rtol=0, atol=16 * size**0.5 * 2**-22)


@pytest.mark.parametrize(
    ("dtype", "per_token"), [(torch.float32, 20_480), (torch.bfloat16, 10_240), (torch.int8, 5_152)]
)
def test_bytes_of_a_token_in_the_published_size(dtype: torch.dtype, per_token: int) -> None:
    """Of the allocation: 8 full layers of 640 numbers, in int8 with a float32 scale for each; rings are full."""
    allocated = []
    for length in (3000, 3500):
        cache = KVCache(PUBLISHED, 4096, dtype)
        for i, layer in enumerate(cache.layers):
            heads, size = PUBLISHED.layer_kv_heads(i), PUBLISHED.layer_head_dim(i)
            k = torch.zeros(length, heads, size)
            layer.extend(k, k, 0, torch.ones(size))
        cache.length = length
        allocated.append(cache.num_bytes)
        for layer in cache.layers:
            assert layer.row_bytes == sum(store[0].numel() * store.element_size() for store in layer.stores)
            assert all(store.untyped_storage().nbytes() == layer.limit * store[0].nbytes for store in layer.stores)
    assert allocated[1] - allocated[0] == 500 * per_token


def test_apart_takes_sixty_per_cent_more() -> None:
    sizes = []
    for shared in (True, False):
        layer = KVCache(PUBLISHED, 64, torch.bfloat16, shared=shared).layers[5]
        layer.extend(torch.zeros(1, 1, 512), torch.zeros(1, 1, 512), 0, torch.ones(512))
        sizes.append(layer.row_bytes)
    assert sizes == [1280, 2048]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.int8])
def test_going_back_is_never_having_been_there(dtype: torch.dtype | None) -> None:
    """For every length that a cache says it can go back to, after which it goes on as if nothing had happened."""
    for back in range(0, SLACK + 3):
        cache, straight = (KVCache(SMALL, 100, dtype, slack=SLACK) for _ in range(2))
        extend(cache, 40)
        possible = back <= SLACK + 1  # a query sees WINDOW - 1 tokens before itself
        assert (cache.earliest <= 40 - back) == possible
        if not possible:
            with pytest.raises(ValueError, match="can go back to"):
                cache.rewind(40 - back)
            continue
        cache.rewind(40 - back)
        extend(straight, 40 - back)
        assert_same(cache, straight)
        extend(cache, 9)
        extend(straight, 9)
        assert_same(cache, straight)


def test_going_back_to_nothing_is_always_possible() -> None:
    cache = KVCache(SMALL, 100, slack=SLACK)
    extend(cache, 60)
    cache.rewind(0)
    assert cache.length == 0 and cache.earliest == 0
    extend(cache, 3)
    cache.rewind(1)
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="can go back to"):
            cache.rewind(wrong)


def test_what_was_overwritten_before_going_back_stays_lost() -> None:
    cache = KVCache(SMALL, 100, slack=SLACK)
    extend(cache, 30)
    cache.rewind(25)
    earliest = cache.earliest
    extend(cache, 1)
    assert cache.earliest == earliest == 30 - SLACK - 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("length", [0, 1, WINDOW - 1, WINDOW + SLACK, 40])
@pytest.mark.parametrize("back", [0, 1, SLACK])
def test_a_copy_and_a_state_are_the_same_cache(dtype: torch.dtype | None, length: int, back: int) -> None:
    cache = KVCache(SMALL, 100, dtype, slack=SLACK)
    extend(cache, length)
    cache.rewind(max(0, length - back))
    copy, restored = cache.copy(cache.length), KVCache(SMALL, 100, dtype, slack=SLACK)
    state = {name: tensor.clone() for name, tensor in cache.state().items()}
    restored.load_state(state, cache.length)
    assert_same(copy, cache)
    assert_same(restored, cache)
    assert copy.earliest == cache.earliest
    assert restored.earliest >= cache.earliest or cache.length == 0
    again = KVCache(SMALL, 100, dtype, slack=SLACK)
    extend(again, cache.length)
    for other in (copy, restored, again):
        extend(other, 3)
    assert_same(copy, again)
    assert_same(restored, again)
    assert cache.length == max(0, length - back), "a copy is independent"
    extend(cache, 3)
    assert_same(cache, again)


def test_a_shorter_copy_can_be_taken() -> None:
    cache, straight = (KVCache(SMALL, 100, slack=SLACK) for _ in range(2))
    extend(cache, 40)
    extend(straight, 37)
    copy = cache.copy(37)
    assert_same(copy, straight)
    with pytest.raises(ValueError, match="copied"):
        cache.copy(20)
    with pytest.raises(ValueError, match="copied"):
        cache.copy(41)


def test_states_that_are_not_of_this_cache_are_refused() -> None:
    cache = KVCache(SMALL, 100, torch.bfloat16, slack=SLACK)
    extend(cache, 20)
    state, other = cache.state(), replace(SMALL, head_dim=8)
    name = next(iter(state))
    wrong = {
        "another shape": (KVCache(other, 100, torch.bfloat16, slack=SLACK), state, 20),
        "another format": (KVCache(SMALL, 100, torch.int8, slack=SLACK), state, 20),
        "float32": (KVCache(SMALL, 100, torch.float32, slack=SLACK), state, 20),
        "kept apart": (KVCache(SMALL, 100, torch.bfloat16, slack=SLACK, shared=False), state, 20),
        "longer than told": (KVCache(SMALL, 100, torch.bfloat16, slack=SLACK), state, 19),
        "shorter than told": (KVCache(SMALL, 100, torch.bfloat16, slack=SLACK), state, 21),
        "too long": (KVCache(SMALL, 10, torch.bfloat16, slack=SLACK), state, 20),
        "one missing": (KVCache(SMALL, 100, torch.bfloat16, slack=SLACK), dict(list(state.items())[1:]), 20),
        "one too many": (KVCache(SMALL, 100, torch.bfloat16, slack=SLACK), state | {"more": state[name]}, 20),
        "not a window": (KVCache(SMALL, 100, torch.bfloat16, slack=SLACK), state | {name: state[name][-3:]}, 20),
    }
    for what, (into, tensors, length) in wrong.items():
        with pytest.raises(ValueError, match=r"cannot take up|not the tensors|rows"):
            into.load_state(tensors, length)
        assert into.length == 0, what


def test_memory_comes_as_it_is_written_to() -> None:
    """Of the whole context's room only what holds tokens is resident, and no copy is made on the way."""
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("this system does not say how much memory a process has")
    before = int(resident.read_text().split()[1])
    cache = KVCache(PUBLISHED, 262_144, torch.bfloat16)
    layer = cache.layers[5]
    layer.extend(torch.zeros(512, 1, 512), torch.zeros(512, 1, 512), 0, torch.ones(512))
    used = (int(resident.read_text().split()[1]) - before) * 4096
    assert layer.buffers[0].untyped_storage().nbytes() == 262_144 * 1280
    assert used < 100e6 < 262_144 * 1280


def test_a_cache_grows_where_the_system_promises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_pages", lambda shape, dtype: None)
    grown = KVCache(SMALL, 300, slack=SLACK)
    for _ in range(20):
        extend(grown, 10)
    assert grown.layers[2].buffers[0].shape[0] < 300
    monkeypatch.undo()
    reserved = KVCache(SMALL, 300, slack=SLACK)
    extend(reserved, 200)
    assert_same(grown, reserved)


def test_int8_is_within_half_a_scale() -> None:
    x = torch.randn(50, 3, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-40, 30, 50)[:, None, None]
    x[7] = 0
    q, scale = to_int8(x)
    assert q.dtype is torch.int8 and scale.dtype is torch.float32 and scale.shape == (50, 3)
    back = to_float(q, scale, slice(None), torch.float32)
    assert bool(((back - x).abs() <= 0.5001 * scale[..., None] + 2.0**-120).all())
    assert torch.equal(back[7], x[7])
    assert int(q[10].abs().amax()) == 127


def test_long_prompts_need_no_more_scores_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference goes through the queries in parts; what it computes is the same."""
    cache = KVCache(SMALL, 100)
    k, v, weight = stack(SMALL, 2, 0, 60)
    keys = cache.layers[2].extend(k, v, 0, weight)
    q = torch.randn(25, 4, 16, generator=torch.Generator().manual_seed(0))
    blocks = torch.arange(25) // 5
    whole = [attend(q, keys, window, blocks) for window in (None, 9)]
    monkeypatch.setattr(reference, "_MOST_SCORES", 4 * 60 * 7)
    for window, expected in zip((None, 9), whole, strict=True):
        torch.testing.assert_close(attend(q, keys, window, blocks), expected, rtol=0, atol=1e-6)
