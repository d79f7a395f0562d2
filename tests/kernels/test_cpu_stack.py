"""All decoder layers in one call: the same bits as layer by layer, in what comes out and in what the cache keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.cpu_kernels import ISAS, code_path
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from iolite import cache as caches
from iolite.cache import KVCache
from iolite.checkpoint.assemble import assemble
from iolite.checkpoint.synthetic import SyntheticSource, config_of
from iolite.kernels import cpu, ops
from iolite.model.batch import Media, RaggedBatch, Segment
from iolite.model.unified import Unified

pytestmark = pytest.mark.skipif(cpu.load() is None, reason=f"no C++ kernels: {cpu.reason()}")
FORMATS = [None, torch.float32, torch.bfloat16, torch.int8]
WINDOW = 12


@pytest.fixture(scope="module", params=["shared", "apart", "floats"])
def network(request: pytest.FixtureRequest) -> Unified:
    """Of the tiny synthetic shape, with norms that are not ones and a short window."""
    return network_of(request.param != "apart", None if request.param == "floats" else "int4")


def network_of(shared: bool, scheme: str | None) -> Unified:
    config = config_of("tiny")
    text = replace(config.text, sliding_window=WINDOW, attention_k_eq_v=shared)
    source = SyntheticSource(replace(config, text=text), scheme)
    weights = {name: source.weight(name) for name in source.names()}
    model = assemble(source.config, weights, dtype=torch.float32).eval().requires_grad_(False)
    with torch.no_grad():
        g = torch.Generator().manual_seed(3)
        for layer in model.language_model.layers:
            for vector in (*layer.parameters(), layer.layer_scalar):
                if vector.dim() == 1:
                    vector.mul_(0.5 + torch.rand(vector.shape, generator=g))
    return model


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def run(network: Unified, cache: KVCache, sizes: list[int]) -> Tensor:
    """Hidden states of passes over so many tokens each."""
    out, config = [], network.config.text
    for n in sizes:
        ids = torch.arange(cache.length, cache.length + n) * 7 % 90 + 5
        out.append(network(ids, RaggedBatch(config, [Segment(cache, n)], Media(), torch.device("cpu"))))
    return torch.cat(out)


def assert_same_cache(a: KVCache, b: KVCache) -> None:
    assert a.length == b.length and a.earliest == b.earliest and a.num_bytes == b.num_bytes
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x.used == y.used
        for one, other in zip(x.stores, y.stores, strict=True):
            assert torch.equal(one[: x.used], other[: y.used])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_the_same_bits_as_layer_by_layer(network, dtype, shared, isa, monkeypatch):
    """Before and after the window and the ring are full, and with passes that go around the ring's end."""
    sizes = [1, 1, 5, 8, 1, 9, 24, 1, 3, 1, 17, 1, 28, 1]
    with code_path(isa):
        one, other = (KVCache(network.config.text, 200, dtype, slack=30, shared=shared) for _ in range(2))
        found = run(network, one, sizes)
        with monkeypatch.context() as context:
            context.setattr(cpu, "stack", lambda *arguments: None)
            expected = run(network, other, sizes)
    assert torch.equal(found, expected)
    assert_same_cache(one, other)


@pytest.mark.parametrize("isa", ISAS)
def test_sequences_together_are_the_same_bits_as_each_by_itself(network, isa, monkeypatch):
    """With caches of several kinds and ages, and one that has just begun."""
    config, device = network.config.text, torch.device("cpu")
    begun, sizes = [30, 3, 0, 11, 50], [1, 4, 2, 1, 9]

    def read() -> list[KVCache]:
        made = [KVCache(config, 200, dtype, slack=30) for dtype in (*FORMATS, torch.int8)]
        for cache, n in zip(made, begun, strict=True):
            if n:
                run(network, cache, [n])
        return made

    with code_path(isa):
        alone, together = read(), read()
        expected = torch.cat([run(network, cache, [n]) for cache, n in zip(alone, sizes, strict=True)])
        ids = [torch.arange(c.length, c.length + n) * 7 % 90 + 5 for c, n in zip(together, sizes, strict=True)]
        segments = [Segment(cache, n) for cache, n in zip(together, sizes, strict=True)]
        calls: list[bool] = []
        real = cpu.stack
        monkeypatch.setattr(cpu, "stack", lambda *given: (calls.append(True), real(*given))[1])
        found = network(torch.cat(ids), RaggedBatch(config, segments, Media(), device))
    assert calls and torch.equal(found, expected)
    for one, other in zip(together, alone, strict=True):
        assert_same_cache(one, other)


def test_it_is_used_for_few_tokens_without_two_way_blocks(network, monkeypatch):
    calls: list[bool] = []
    real = cpu.stack
    monkeypatch.setattr(cpu, "stack", lambda *arguments: (calls.append(True), real(*arguments))[1])
    config, device = network.config.text, torch.device("cpu")
    cache, most = KVCache(config, 2000), cpu.most_tokens(config.hidden_size)
    run(network, cache, [most])
    assert len(calls) == 1
    run(network, cache, [most + 1])
    two_way = Segment(cache, 3, torch.tensor([0, 1, 1]))
    network(torch.tensor([5, 6, 7]), RaggedBatch(config, [two_way], Media(), device))
    network(torch.tensor([5, 6, 7, 8]), RaggedBatch(config, [two_way, Segment(cache, 1)], Media(), device))
    with ops.only_reference():
        run(network, cache, [1])
    assert len(calls) == 1


def test_a_ring_too_small_is_left_to_the_layers(network, monkeypatch):
    cache, straight = KVCache(network.config.text, 100, slack=0), KVCache(network.config.text, 100)
    found, expected = run(network, cache, [30, 2, 1, 4]), run(network, straight, [30, 2, 1, 4])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_it_follows_buffers_that_grow(network, monkeypatch):
    reserved = run(network, KVCache(network.config.text, 300), [1] * 150)
    monkeypatch.setattr(caches, "_pages", lambda shape, dtype: None)
    assert torch.equal(run(network, KVCache(network.config.text, 300), [1] * 150), reserved)


def test_a_format_that_the_kernels_do_not_read_is_left_to_the_reference(network):
    """float16, which has three bits more than bfloat16: so its error is less."""
    whole, brain, half = (
        run(network, KVCache(network.config.text, 100, dtype), [30, 1, 4])
        for dtype in (None, torch.bfloat16, torch.float16)
    )
    assert 0 < (half - whole).square().mean() < (brain - whole).square().mean()


def test_it_goes_on_after_going_back(network):
    cache, straight = (KVCache(network.config.text, 100, torch.int8) for _ in range(2))
    run(network, cache, [40, 1, 1, 1])
    cache.rewind(40)
    run(network, straight, [40])
    assert torch.equal(run(network, cache, [3, 1]), run(network, straight, [3, 1]))


def test_a_cache_that_is_gone_is_forgotten(network):
    from iolite.kernels.cpu.stack import _caches

    held = len(_caches)
    cache = KVCache(network.config.text, 100)
    run(network, cache, [1])
    assert len(_caches) == held + 1
    del cache
    assert len(_caches) == held


def test_layers_of_another_kind_are_gone_through_one_by_one(network):
    """A layer with a hook: it is called."""
    cache, straight = KVCache(network.config.text, 100), KVCache(network.config.text, 100)
    seen: list[int] = []
    expected = run(network, straight, [2, 1])
    for module in (network.language_model.layers[3], network.language_model.layers[1].mlp):
        hook = module.register_forward_pre_hook(lambda module, x: seen.append(len(x[0])))
        cache.rewind(0)
        found = run(network, cache, [2, 1])
        hook.remove()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert seen == [2, 1, 2, 1]


def test_keys_that_somebody_else_left_in_float16(network):
    """A cache without a format of its own has that of who writes first: another device's model, say."""
    half, cache = KVCache(network.config.text, 100, torch.float16), KVCache(network.config.text, 100)
    run(network, half, [30])
    cache.load_state(half.state(), 30)
    assert torch.equal(run(network, cache, [1, 1]), run(network, half, [1, 1]))


def test_what_does_not_fit_the_model_or_the_cache_is_refused(network):
    """The library would write beyond the tokens, beyond the rows, or over the first ones."""
    config, device = network.config.text, torch.device("cpu")
    with pytest.raises(AssertionError):
        network(torch.tensor([5, 6]), RaggedBatch(config, [Segment(KVCache(config, 100), 6)], Media(), device))
    with pytest.raises(RuntimeError, match="size"):
        run(network, KVCache(replace(config, num_key_value_heads=1), 100), [2])
    cache = KVCache(config, 20)
    run(network, cache, [18])
    with pytest.raises(AssertionError):
        run(network, cache, [4])


def test_hooks_on_all_modules_are_called(network):
    seen: list[str] = []
    hook = register_module_forward_hook(lambda module, given, found: seen.append(type(module).__name__))
    run(network, KVCache(network.config.text, 100), [2])
    hook.remove()
    assert seen.count("DecoderLayer") == seen.count("MLP") == network.config.text.num_hidden_layers


def test_a_cache_that_begins_anew_takes_up_weights_that_have_changed(network):
    """In place, as training does: the parameter is the same one. A cache holds what it has made of it."""
    cache = KVCache(network.config.text, 100)
    run(network, cache, [3, 1])
    weights = [layer.self_attn.k_norm.weight for layer in network.language_model.layers]
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight[::3] *= 3
    try:
        cache.rewind(0)
        assert torch.equal(run(network, cache, [3, 1]), run(network, KVCache(network.config.text, 100), [3, 1]))
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)
