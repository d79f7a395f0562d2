"""The decode step of fixed shapes against the loop's own passes, and against itself recorded and played back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from support.drafting import CHEAP
from support.tiny import FIRST_TEXT, VOCABULARY
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import iolite
from iolite import cache as caches
from iolite.cache import KVCache
from iolite.generate import graph
from iolite.generate.continuation import Continuation
from iolite.generate.graph import StaticStep
from iolite.generate.loop import Decoding, advance
from iolite.generate.sampling import SamplingParams
from iolite.generate.speculative import Proposal, Speculator
from iolite.kernels import ops, ring
from iolite.kernels.contracts import Keys
from iolite.kernels.reference import attend
from iolite.model.prefill import prefill
from iolite.model.unified import Unified
from iolite.prompt import Prompt

CPU = torch.device("cpu")


def ids_of(n: int, seed: int = 0) -> list[int]:
    return torch.randint(FIRST_TEXT, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


SLACK = 64  # few tokens wrap such rings


@pytest.fixture(autouse=True)
def buffers_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do on a GPU, and not reserved at once as on a CPU."""
    monkeypatch.setattr(caches, "_pages", lambda shape, dtype: None)


def read(network: Unified, ids: list[int], dtype: torch.dtype | None = None) -> KVCache:
    cache = KVCache(network.config.text, 4096, dtype, slack=SLACK)
    for _ in prefill(network, Prompt(ids, ""), cache):
        pass
    return cache


def loop_logits(network: Unified, prompt: list[int], ids: list[int]) -> Tensor:
    """[len(ids), V], by the loop's passes over one token each."""
    cache = read(network, prompt)
    with torch.inference_mode():
        return torch.cat([network.logits(advance(network, token, cache)) for token in ids])


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("length", [0, 3, 22, 23, 24, 30, 100])
def test_ring_attention_is_attention_over_the_keys_that_a_query_sees(window, n, length):
    """The definition on the host's numbers, for rings that are empty, filling, just full and long wrapped."""
    room = 128 if window is None else window + n + 2
    rng = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(n, heads, 8, generator=rng) for heads in (4, 2, 2))
    keys, values = (torch.randn(room, 2, 8, generator=rng) for _ in range(2))
    at = torch.tensor(length)
    ring.write(keys, k, at)
    ring.write(values, v, at)
    past = length if window is None else min(length, window - 1)
    expected = attend(q, Keys(keys, values, (length - past) % room, past + n, room), window, None)
    # The same float32 products; a sum over as many more zeros may be taken in another order.
    found = ring.attend(q, Keys(keys, values, 0, 0, room), at, window)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "n"), [("published", 1), ("own-values", 4), ("full-first", 1), ("narrow", 4)])
def test_passes_of_fixed_shape_have_the_loops_logits(load_tiny, name, n):
    """Past the sliding window, past where its ring wraps, and past the first 64 rows of a full layer's buffers."""
    network, prompt, ids = load_tiny(name), ids_of(60), ids_of(2 * SLACK, seed=1)
    cache = read(network, prompt)
    step = StaticStep(network, cache, n)
    found = [step(ids[at : at + n])[1].clone() for at in range(0, len(ids), n)]
    assert cache.length == len(prompt) + len(ids)
    # Sums of float32 in another order, as between any two passes: 1e-4 as against Transformers.
    torch.testing.assert_close(torch.cat(found), loop_logits(network, prompt, ids), rtol=0, atol=1e-4)


def test_tokens_may_be_taken_back(load_tiny):
    """What refused drafts have written is neither seen nor in the way, also in a ring that has wrapped."""
    network, prompt, ids = load_tiny("narrow"), ids_of(100), ids_of(6, seed=1)
    cache = read(network, prompt)
    step = StaticStep(network, cache, 8)
    found = []
    for token in ids:
        found.append(step([token, *ids_of(7, seed=token)])[1][:1].clone())
        cache.rewind(cache.length - 7)
    torch.testing.assert_close(torch.cat(found), loop_logits(network, prompt, ids), rtol=0, atol=1e-4)


# The numbers of the new token are rounded from float32 sums in another order: some to their other neighbour, 2^-8 of
# their size off in bfloat16, 1/127 of the largest of their vector in int8. One key in 31 moves a logit (of about 5) by
# less than a thousandth, a hundredth, of its size.
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 5e-3), (torch.int8, 5e-2)], ids=str)
def test_the_caches_own_format_is_kept(load_tiny, dtype, allowed):
    network, prompt = load_tiny("published"), ids_of(30)
    cache = read(network, prompt, dtype)
    again = read(network, prompt, dtype)
    found = StaticStep(network, cache)([40])[1]
    assert all(store.dtype is dtype for layer in cache.layers for store in layer.buffers)
    with torch.inference_mode():
        expected = network.logits(advance(network, 40, again))
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)


@pytest.fixture(scope="module")
def nano() -> iolite.Model:
    return iolite.load("nano")


def answer(model: iolite.Model) -> list[int]:
    prompt = model.prompt("How many corners has a square?")
    params = SamplingParams(temperature=0, max_tokens=50)
    return [token.id for token in Decoding(model.network, prompt, params, context=model.context)]


def test_decoding_with_fixed_shapes_draws_the_same_tokens(nano, monkeypatch):
    """Over the 64 rows at which the full layers' buffers grow and the pass is recorded again."""
    calls = []
    run = StaticStep.__call__
    monkeypatch.setattr(StaticStep, "__call__", lambda self, ids: calls.append(ids) or run(self, ids))
    monkeypatch.setattr(graph, "wanted", lambda device: True)
    monkeypatch.setattr(graph, "capture", record)
    with ops.only_reference():
        found = answer(nano)
        monkeypatch.setattr(graph, "wanted", lambda device: False)
        expected = answer(nano)
    assert found == expected
    assert len(calls) == len(expected) - 1


def test_decoding_goes_on_without_a_graph_and_says_why(nano, monkeypatch):
    def refuse(work: graph.Work, device: torch.device) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    with ops.only_reference():
        expected = answer(nano)
        monkeypatch.setattr(graph, "wanted", lambda device: True)
        monkeypatch.setattr(graph, "capture", refuse)
        with pytest.warns(RuntimeWarning, match=r"CUDA graph: operation not permitted when stream is capturing; it"):
            assert answer(nano) == expected


def record(work: graph.Work, device: torch.device) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
    """What a CUDA graph does, on the CPU: the operators that work runs, on the very tensors it ran them on.

    A number that the host computed is recorded as it was, and so would be wrong when played back later.
    """
    recorded = make_fx(work)()
    out = tuple(tensor.clone() for tensor in recorded())
    return lambda: [kept.copy_(new) for kept, new in zip(out, recorded(), strict=True)], out


@torch.inference_mode()
def test_a_recorded_pass_is_right_for_every_later_length(load_tiny, monkeypatch):
    """From 60 tokens to 80: past 64, where the full layers' buffers grow, and 74, where a ring of window 10 wraps."""
    network, prompt, ids = load_tiny("full-first"), ids_of(60), ids_of(20, seed=1)
    recordings = []

    def count(work: graph.Work, device: torch.device) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
        recordings.append(work)
        return record(work, device)

    monkeypatch.setattr(graph, "wanted", lambda device: True)
    monkeypatch.setattr(graph, "capture", count)
    with ops.only_reference():
        step = StaticStep(network, read(network, prompt))
        found = torch.cat([step([token])[1].clone() for token in ids])
        expected = loop_logits(network, prompt, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    # Once at the start and once when 65 tokens have outgrown 64 rows: not once for each token.
    assert len(recordings) == 2


def test_compiled_as_one_graph(load_tiny):
    """fullgraph=True: torch.compile would raise where the pass falls apart in two."""
    network, prompt, ids = load_tiny("full-first"), ids_of(20), ids_of(5, seed=1)
    torch.compiler.reset()
    step = StaticStep(network, read(network, prompt), backend="aot_eager")
    found = torch.cat([step([token])[1].clone() for token in ids])
    torch.testing.assert_close(found, loop_logits(network, prompt, ids), rtol=0, atol=1e-4)


def test_a_graph_is_wanted_on_cuda_unless_it_is_turned_off(monkeypatch):
    assert graph.wanted(torch.device("cuda")) and not graph.wanted(CPU)
    monkeypatch.setenv("IOLITE_CUDA_GRAPH", "0")
    assert not graph.wanted(torch.device("cuda"))


def test_recorded_passes_of_several_sizes_share_a_cache(nano, monkeypatch):
    """As drafting makes them: passes of 1, 3 and 6 tokens in turns. When one makes the cache's buffers grow, the others
    are recorded again."""
    sizes = []

    def count(work: graph.Work, device: torch.device) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
        recorded = record(work, device)
        sizes.append(len(recorded[1][0]))
        return recorded

    prompt = nano.prompt("How many corners has a square, and what is your name?")
    settings = {"context": nano.context}
    params = SamplingParams(temperature=0, max_tokens=60)
    with ops.only_reference():
        expected = [token.id for token in Decoding(nano.network, prompt, params, **settings)]
        monkeypatch.setattr(graph, "wanted", lambda device: True)
        monkeypatch.setattr(graph, "capture", count)
        decoding = Decoding(nano.network, prompt, params, **settings, speculator=InTurns(nano.network, expected))
        assert [token.id for token in decoding] == expected
    assert {1, 3, 6} <= set(sizes)
    assert len(sizes) > len(set(sizes))


class InTurns(Speculator):
    """Proposes none, two or five drafts, of which the last is wrong."""

    def __init__(self, network: Unified, answer: list[int]) -> None:
        super().__init__(network, CHEAP)
        self.answer, self.drawn = answer, 1

    def propose(self, sequences: Sequence[Continuation]) -> list[Proposal]:
        (sequence,), proposal = sequences, Proposal()
        at = len(self.answer) - sequence.left
        for token in self.answer[at : at + (0, 2, 5)[self.drawn % 3]]:
            proposal.add(token, 1.0)
        if len(proposal.tokens) in (2, 5):
            proposal.tokens[-1] = (proposal.tokens[-1] + 1) % self.network.config.text.vocab_size
        self.drawn += 1
        return [proposal]
