"""Samples, the turns they are taken in, and the bytes and multiplications that they are held against."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iolite.device import choose
from iolite.evals import speed
from iolite.evals.speed import Spread, Subject
from iolite.model.batch import PaddedBatch
from iolite.prompt import Prompt
from iolite.quant.linear import quantize_


@pytest.fixture
def tiny(load_tiny):
    """name -> a tiny checkpoint as far as a model that is timed goes."""

    def make(name: str) -> SimpleNamespace:
        network = load_tiny(name)
        config = network.config
        return SimpleNamespace(
            network=network, config=config, choice=choose("cpu", "float32"), context=4096, kv_dtype=None
        )

    return make


@dataclass
class Clockwork:
    """A subject whose passes take what is written down, and a machine whose rates go up by one each time."""

    seconds: dict[tuple[int, int], float]  # (depth, tokens) -> of one pass
    done: list[str] = field(default_factory=list)
    slower: float = 1.0  # each pass takes this many times as long as it would have before the last one
    rate: float = 9.0

    def step(self, depth: int, tokens: int = 1, times: int = 1) -> float:
        self.done.append(f"{depth}/{tokens}x{times}")
        self.seconds = {key: value * self.slower for key, value in self.seconds.items()}
        return self.seconds[depth, tokens]

    def prefill(self, length: int) -> float:
        self.done.append(f"read {length}")
        return length / 100

    def bytes_per_token(self, depth: int) -> int:
        return 10**9 + depth

    def macs(self, length: int) -> int:
        return 10**9 * length

    def bandwidth(self) -> float:
        self.done.append("probe")
        self.rate += 1
        return self.rate

    int8 = bandwidth


def test_spread():
    assert Spread.of([3, 1, 2]) == Spread(2, 1, 3, 3)
    assert Spread.of(iter([4, 1, 2, 3])) == Spread(2.5, 1, 4, 4)
    assert Spread.of([7]) == Spread(7, 7, 7, 1)


@pytest.mark.parametrize(
    ("samples", "shown"),
    [
        ([4.6125, 4.5, 4.7512], "4.61 (4.50–4.75)"),
        ([12345.6], "12,346"),
        ([46.14, 46.11], "46.1"),
        ([9.994, 101], "55.5 (9.99–101)"),
    ],
)
def test_a_spread_for_people(samples, shown):
    assert str(Spread.of(samples)) == shown


def test_a_share_in_percent():
    assert str(Spread.of([0.874, 0.8, 0.9]).times(100)) == "87.4 (80.0–90.0)"


@given(st.lists(st.floats(1e-6, 1e6), min_size=1))
def test_a_median_lies_in_its_range_with_half_of_the_samples_on_either_side(samples):
    spread = Spread.of(samples)
    assert spread.low == min(samples) <= spread.median <= max(samples) == spread.high
    assert 2 * sum(s <= spread.median for s in samples) >= spread.n == len(samples)
    assert 2 * sum(s >= spread.median for s in samples) >= spread.n


def test_a_sample_is_compared_with_the_mean_of_its_neighbours():
    assert speed.share_of(12, (10, 20)) == 0.8
    assert speed.share_of(12, iter([24])) == 0.5


def test_short_steps_are_taken_together():
    assert speed.repetitions(Clockwork({(0, 1): 0.05}), 0) == 10
    assert speed.repetitions(Clockwork({(7, 3): 30.0}), 7, 3) == 1


def test_drawing_is_held_against_the_probes_around_it():
    clock = Clockwork({(0, 1): 0.2, (5, 1): 0.4})
    lines = []
    found, rates = speed.measure_decode(clock, clock, (0, 5), 2, lines.append)
    turn = ["0/1x1", "0/1x2", "probe", "5/1x1", "5/1x1", "probe"]  # the first step after a probe is not counted
    assert clock.done[4:] == ["probe", *turn, *turn]
    assert rates == [10, 11, 12, 13, 14]
    assert found["0"]["tok_s"] == {"median": 5, "low": 5, "high": 5, "n": 2}
    assert found["0"]["gb_s"]["median"] == pytest.approx(5)
    share = found["0"]["fraction_of_bandwidth"]
    assert (share["high"], share["low"]) == pytest.approx((5 / 10.5, 5 / 12.5))
    assert found["5"]["bytes_per_token"] == 10**9 + 5
    assert found["5"]["fraction_of_bandwidth"]["high"] == pytest.approx((1 + 5e-9) / 0.4 / 11.5)
    assert len(lines) == 4


def test_a_pass_is_held_against_its_neighbours_while_the_machine_slows_down():
    """Every pass is 10 % slower than the one before: the mean of the neighbours is off by (1.1 + 1 / 1.1) / 2 = 1.0045
    only, where a comparison with the first one would be off by a factor of up to 1.1 ** 10."""
    clock = Clockwork({(3, 1): 1.0, (3, 2): 1.5, (3, 4): 2.0}, slower=1.1)
    found = speed.measure_passes(clock, (1, 2, 4), 3, 3, lambda line: None)
    assert found["1"] == Spread(1, 1, 1, 3)
    for tokens, ratio in (("2", 1.5), ("4", 2.0)):
        assert found[tokens].median == pytest.approx(ratio, rel=0.005)
        assert found[tokens].high - found[tokens].low < 1e-9
    turn = ["3/1x1", "3/2x1", "3/1x1", "3/4x1", "3/1x1"]
    assert clock.done[-15:] == 3 * turn


def test_reading_is_held_against_the_8_bit_rate():
    clock = Clockwork({})
    found, rates = speed.measure_prefill(clock, clock, (10, 40), 1, lambda line: None)
    assert rates == [10, 11, 12]
    assert found["40"]["tok_s"]["median"] == pytest.approx(100)
    assert found["40"]["fraction_of_int8"]["median"] == pytest.approx(100 / 11.5)


def test_reading_without_an_8_bit_rate():
    clock = Clockwork({})
    clock.int8 = lambda: None
    lines = []
    found, rates = speed.measure_prefill(clock, clock, (10,), 2, lines.append)
    assert rates == []
    assert found["10"]["fraction_of_int8"] is None
    assert "8-bit" not in lines[0]


def test_the_summary_has_what_was_measured():
    assert speed.summary({}) == {}
    clock = Clockwork({(0, 1): 0.2, (9, 1): 0.2, (0, 2): 0.25})
    depths, rates = speed.measure_decode(clock, clock, (0, 9), 1, lambda line: None)
    found = {
        "load": {"seconds": 2.5},
        "memory": {"peak_rss_bytes": 7},
        "decode_by_depth": depths,
        "bandwidth": Spread.of(rates).to_dict(),
        "passes": {n: s.to_dict() for n, s in speed.measure_passes(clock, (2,), 0, 1, lambda line: None).items()},
    }
    assert speed.summary(found) == {
        "load_s": 2.5,
        "peak_rss_bytes": 7,
        "bandwidth_gb_s": 11,
        "decode_tok_s": pytest.approx(5),
        "decode_fraction_of_bandwidth": pytest.approx(5 / 10.5),
        "pass_ratio": {"2": pytest.approx(1.25)},
    }


@pytest.mark.parametrize("name", ["published", "narrow"])
def test_a_step_is_the_real_one(tiny, name):
    """From an empty cache, what is chosen is what the slow obvious batch says after each token."""
    model = tiny(name)
    ids = [5, 9, 3, 17, 4]
    cache = speed.new_cache(model, 64)
    chosen = speed.likeliest(model.network, torch.tensor(ids), cache)
    batch = PaddedBatch.from_prompts(model.config.text, [Prompt(ids, "")])
    assert chosen == model.network.logits(model.network(batch.ids, batch))[0].argmax(-1).tolist()
    assert cache.length == 5


@pytest.mark.parametrize("depth", [0, 1, 7, 700])
def test_a_step_begins_in_the_same_place(tiny, depth, monkeypatch):
    subject, places = Subject(tiny("narrow"), depth), []
    real = speed.likeliest

    def noted(network, ids, cache):
        places.append((cache.length, len(ids)))
        return real(network, ids, cache)

    monkeypatch.setattr(speed, "likeliest", noted)
    assert subject.step(depth, tokens=3, times=2) > 0
    assert subject.step(depth // 2) > 0
    assert places == [(depth, 3), (depth, 3), (depth // 2, 1)]
    assert subject.prefill(40) > 0


@torch.inference_mode()
def test_a_filled_cache_has_no_row_left_empty(tiny):
    """On full layers every row before its length, on sliding ones every row of the last window."""
    model = tiny("published")
    cache = speed.filled_cache(model.network, 600, None)
    text = model.config.text
    assert cache.length == 600
    for number, layer in enumerate(cache.layers):
        shape = (1, text.layer_kv_heads(number), text.layer_head_dim(number))
        weight = torch.ones(shape[-1])
        keys = layer.extend(torch.zeros(shape), torch.zeros(shape), 600, weight)
        assert keys.count == (601 if text.is_full(number) else text.sliding_window)
        rows = (keys.first + torch.arange(keys.count - 1)) % keys.room
        assert keys.k[rows].abs().sum((1, 2)).min() > 0
        assert keys.v[rows].abs().sum((1, 2)).min() > 0


def test_bytes_of_a_cache(tiny):
    model = tiny("published")
    text, kinds = model.config.text, [layer % 6 == 5 for layer in range(12)]
    assert [text.is_full(i) for i in range(12)] == kinds
    turned = text.global_head_dim // 4  # of the key, beside the value: a quarter of its dimensions
    full = 4 * text.num_global_key_value_heads * (text.global_head_dim + turned)
    sliding = 2 * 4 * text.num_key_value_heads * text.head_dim
    for depth in (0, 10, 3000):
        seen = min(depth + 1, text.sliding_window)
        expected = 2 * (depth + 1) * full + 10 * seen * sliding
        assert speed.cache_bytes(speed.filled_cache(model.network, depth, None), text, depth) == expected


def test_bytes_are_those_of_the_stored_format(tiny):
    model = tiny("narrow")
    half, whole = (speed.filled_cache(model.network, depth, dtype) for depth, dtype in ((0, torch.bfloat16), (1, None)))
    text = model.config.text
    assert 2 * speed.cache_bytes(half, text, 0) == speed.cache_bytes(whole, text, 0) > 0


def test_bytes_of_weights_with_a_tied_head(tiny):
    """Everything of the decoder once; pictures and sounds are not read."""
    network = tiny("published").network
    stored = {name: t for name, t in network.state_dict().items() if name.startswith("language_model")}
    size = speed.decode_weight_bytes(network)
    buffers = sum(b.nbytes for b in network.language_model.buffers())
    assert sum(t.nbytes for t in stored.values()) <= size <= sum(t.nbytes for t in stored.values()) + buffers


def test_bytes_of_weights_with_a_head_of_its_own(tiny):
    """One row of the embedding instead of the whole."""
    network = tiny("narrow").network
    decoder = {
        t.data_ptr(): t.nbytes for t in (*network.language_model.parameters(), *network.language_model.buffers())
    }
    table = network.language_model.embed_tokens.weight
    rest = sum(decoder.values()) - table.nbytes
    assert speed.decode_weight_bytes(network) == rest + network.lm_head.weight.nbytes + table[0].nbytes


def test_multiplications(tiny):
    model = tiny("published")
    layers, head = speed.linear_sizes(model.network)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    matrices = [
        t for name, t in model.network.state_dict().items() if name.startswith("language_model.layers")
        and name.split(".")[-2] in names
    ]  # fmt: skip
    assert layers == sum(t.numel() for t in matrices)
    assert head == model.network.language_model.embed_tokens.weight.numel()
    assert Subject(model).macs(10) == 10 * layers + head


def test_packed_weights_count_as_they_are_stored(tiny):
    """int4 is 4.5 bits where there were 32, in tiles of 16 rows and 64 columns; the multiplications stay the same."""
    model = tiny("published")
    network = copy.deepcopy(model.network)
    before, sizes = speed.decode_weight_bytes(network), speed.linear_sizes(network)
    quantize_(network, "int4")
    packed = {n: t for n, t in network.language_model.state_dict().items() if t.dtype is torch.uint8}
    floats = sum(model.network.language_model.state_dict()[name].nbytes for name in packed)
    assert len(packed) > 50
    assert speed.decode_weight_bytes(network) == before - floats + sum(t.nbytes for t in packed.values())
    assert speed.linear_sizes(network) == sizes


def test_loading_is_timed_with_its_first_token(tiny):
    model, found = speed.measure_load(lambda: tiny("narrow"))
    assert found["seconds"] > 0
    assert found["first_token_s"] > 0
    assert found["weight_bytes"] == speed.decode_weight_bytes(model.network)
    assert found["state"] in ("cold", "warm", None)


@pytest.mark.parametrize(("name", "picture"), [("real-media", True), ("text-only", False)])
def test_memory_is_that_of_an_answered_prompt(tiny, name, picture):
    model = tiny(name)
    model.processor = SimpleNamespace(image_max_soft_tokens=280)
    found = speed.measure_memory(model, 3)
    assert found["picture"] is picture
    assert found["drawn_tokens"] == 3
    assert found["prompt_tokens"] == (283 if picture else 280)
    assert found["peak_rss_bytes"] >= found["loaded_peak_bytes"] > 10_000_000
