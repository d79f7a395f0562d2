"""The memory plan: its bytes are those of real tensors, and what it calls fitting fits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.folder import random_folder
from support.tiny import TINY

import iolite
from iolite import cache, memory
from iolite.cache import KVCache
from iolite.checkpoint import gguf_drafter, names, packed_folder, sizes
from iolite.checkpoint import plan as plans
from iolite.checkpoint.packing import read_weights
from iolite.checkpoint.plan import CHUNKS, plan
from iolite.checkpoint.safetensors import SafetensorsFile
from iolite.checkpoint.source import FolderSource
from iolite.checkpoint.synthetic import drafter_config
from iolite.config import ModelConfig
from iolite.errors import UsageError
from iolite.generate import model as generate_model
from iolite.kernels import cpu
from iolite.model.prefill import DEFAULT_CHUNK
from iolite.quant import formats, schemes

GB = 1_000_000_000
CONFIG_12B = Path(__file__).parent.parent / "data" / "gemma-4-12B-config.json"


@pytest.fixture(scope="module")
def big():
    return ModelConfig.from_hf(json.loads(CONFIG_12B.read_text()))


@pytest.fixture(scope="module")
def small():
    """A config in which weights, cache and scratch are of one size, so that each of them decides something."""
    text = {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "global_head_dim": 128,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 512,
        "max_position_embeddings": 65_536,
    }  # fmt: skip
    return ModelConfig.from_hf({"model_type": "gemma4_unified", "text_config": text})


def config_of(tiny_folder, name):
    return ModelConfig.from_folder(tiny_folder(name))


# The 12B


def test_the_12b_with_all_its_context_fits_in_16_gb(big):
    made = plan(big, context=262_144, quantize="int4", kv="bf16", memory=16 * GB)
    assert made.fits
    assert made.max_context == 262_144
    assert (made.chunk, made.dtype, made.kv, made.advice) == (512, "float32", "bfloat16", ())
    parts = {part.name: part.bytes for part in made.parts}
    assert parts["full layers' cache"] == 262_144 * 10_240
    assert parts["sliding layers' cache"] == 2048 * 40 * 8192
    assert made.weights_bytes == pytest.approx(6.8 * GB, rel=0.01)
    assert made.total_bytes == sum(parts.values()) < 11 * GB


@pytest.mark.parametrize(("kv", "bytes_per_token"), [("bf16", 10_240), ("float32", 20_480), ("int8", 8 * (640 + 4))])
def test_what_a_token_of_the_12b_takes(big, kv, bytes_per_token):
    assert plan(big, kv=kv, context=9000).cache_bytes_per_token == bytes_per_token
    longer, shorter = (plan(big, kv=kv, context=n).cache_bytes for n in (9001, 9000))
    assert longer - shorter == bytes_per_token


def test_the_published_weights(big):
    assert sizes.weights(big, None, "bfloat16", "bfloat16") == {
        "embedding": 2 * 1_006_632_960,
        "decoder": 2 * (10_900_717_312 + 48),
        "vision": 2 * 49_922_304,
        "audio": 2 * 2_457_600,
    }


def test_the_drafter_of_the_12b(big):
    shapes = gguf_drafter.drafter_shapes(drafter_config(big), big.text.hidden_size)
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert sizes.drafter_values(big) == values == 422_856_964
    with_it, without = plan(big, drafter=plans.Part("drafter", "drafter", 2 * values)), plan(big)
    assert with_it.total_bytes - without.total_bytes == 845_713_928
    assert with_it.weights_bytes == without.weights_bytes


# Against real tensors


def test_what_other_files_say_is_repeated_rightly():
    assert {name: formats.FORMATS[name].tile_bytes for name in schemes.SCHEMES} == sizes.TILE_BYTES
    assert sizes.SLACK == cache.SLACK
    assert set(sizes.TILE_BYTES) == set(packed_folder.SCHEMES)
    assert CHUNKS[0] == DEFAULT_CHUNK


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("name", TINY)
def test_packed_bytes_are_those_of_the_formats(tiny_folder, name, scheme):
    config, expected = config_of(tiny_folder, name), {}
    for tensor, shape in names.expected_shapes(config).items():
        format = schemes.format_for(tensor, shape, scheme)
        size = formats.packed_bytes(*shape, format) if format else 2 * torch.Size(shape).numel()
        expected[names.part(tensor)] = expected.get(names.part(tensor), 0) + size
    assert sizes.weights(config, scheme, "bfloat16", "bfloat16") == expected


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("name", ["published", "narrow", "own-values", "text-only"])
def test_packed_bytes_are_those_of_the_file(tiny_folder, tmp_path, name, scheme):
    source, path = FolderSource(tiny_folder(name)), tmp_path / "model.safetensors"
    weights = read_weights(source, scheme)
    packed_folder.write(path, scheme, weights, weights.items())
    file = SafetensorsFile(path)
    written = sum(file.tensor(tensor).nbytes for tensor in file.keys())  # noqa: SIM118 (not a dict)
    assert sum(sizes.weights(source.config, scheme, "float32", "float32").values()) == written


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("settings", [{}, {"quantize": "int4"}, {"quantize": "int8"}, {"dtype": "bfloat16"}], ids=str)
def test_weights_are_those_of_the_loaded_network(folder, settings):
    network = iolite.load(folder, device="cpu", **settings).network
    held = sum({t.data_ptr(): t.nbytes for t in network.state_dict().values()}.values())
    assert plan(network.config, **settings).weights_bytes == held


@pytest.mark.parametrize("kv", ["bf16", "float32", "int8"])
@pytest.mark.parametrize("name", ["published", "narrow", "own-values", "two-global-heads", "full-first"])
@pytest.mark.parametrize("context", [5, 1000, 1200])
def test_cache_bytes_are_those_of_the_cache(tiny_folder, name, kv, context):
    text = config_of(tiny_folder, name).text
    dtype = {"bf16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}[kv]
    filled = KVCache(text, context, dtype)
    for i, layer in enumerate(filled.layers):
        shape = (context, text.layer_kv_heads(i), text.layer_head_dim(i))
        for start in range(0, context, 500):
            k = torch.ones(shape)[start : start + 500]
            layer.extend(k, k, start, torch.ones(shape[-1]))
    assert sizes.cache_bytes(text, context, sizes.kv_format(kv, "float32", False)) == filled.num_bytes
    made = plan(config_of(tiny_folder, name), context=context, kv=kv, parallel=3)
    assert made.cache_bytes == 3 * filled.num_bytes


# What follows from the settings


@pytest.mark.parametrize(
    ("settings", "computed", "stored"),
    [
        ({}, "bfloat16", "bfloat16"),
        ({"dtype": "fp32"}, "float32", "float32"),
        ({"dtype": "float16"}, "float16", "float16"),
        ({"quantize": "int8"}, "float32", "bfloat16"),
        ({"quantize": "int4", "dtype": "bf16", "kv": "float32"}, "bfloat16", "float32"),
        ({"kv": "int8"}, "bfloat16", "int8"),
    ],
)
def test_formats(big, settings, computed, stored):
    made = plan(big, **settings)
    assert (made.dtype, made.kv) == (computed, stored)


def test_small_models_and_float32_checkpoints_compute_in_float32(big, small):
    assert plan(small).dtype == "float32"
    assert plan(replace(big, dtype="float32")).dtype == "float32"


def test_a_file_of_mixed_formats(big):
    shapes = names.expected_shapes(big)
    own = {name: 640 for name in shapes if schemes.format_for(name, shapes[name], "int4") is not None}
    part = sizes.weights(big, "int4", "bfloat16", "bfloat16", own)
    plain = sizes.weights(big, "int4", "bfloat16", "bfloat16")
    assert part["embedding"] * 576 == plain["embedding"] * 640
    assert part["vision"] == plain["vision"]
    assert sizes.weights(big, "int4", "bfloat16", "bfloat16", {})["decoder"] == 2 * (10_900_717_312 + 48)


def test_without_kernels_a_matrix_is_unpacked(big):
    more = plan(big, quantize="int4", compiled=False).total_bytes - plan(big, quantize="int4").total_bytes
    assert more > 4 * 262_144 * 3840


def test_without_memory_nothing_is_said_about_what_fits(big):
    made = plan(big)
    assert made.fits is None
    assert made.max_context == made.context == 262_144
    assert made.advice == ()
    assert made.verdict.startswith("takes 28.")


def test_the_dictionary_is_json(big):
    made = plan(big, context=32_768, memory=8 * GB, parallel=2)
    found = json.loads(json.dumps(made.to_dict()))
    assert found["total_bytes"] == sum(part["bytes"] for part in found["parts"])
    assert found["fits"] is False
    assert found["memory_bytes"] == 8 * GB
    assert found["advice"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"context": 0}, "context of 0"),
        ({"context": -1}, "context of -1"),
        ({"context": 262_145}, "262145"),
        ({"parallel": 0}, "0 sequences"),
        ({"quantize": "int3"}, "int3"),
        ({"kv": "fp4"}, "fp4"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_settings_that_cannot_be_are_refused(big, settings, named):
    with pytest.raises(UsageError, match=named) as error:
        plan(big, **settings)
    assert error.value.hint


# Properties

SETTINGS = st.fixed_dictionaries(
    {
        "parallel": st.integers(1, 5),
        "quantize": st.sampled_from([None, "int4", "int8"]),
        "kv": st.sampled_from(plans.KV),
        "dtype": st.sampled_from([None, "float32", "bfloat16"]),
        "drafter": st.sampled_from([None, plans.Part("drafter", "drafter", 1_000_000)]),
        "compiled": st.booleans(),
    }
)


@given(settings=SETTINGS, context=st.integers(1, 65_535), more=st.integers(1, 5000))
def test_more_context_never_takes_fewer_bytes(small, settings, context, more):
    longer = min(65_536, context + more)
    assert plan(small, context=longer, **settings).total_bytes >= plan(small, context=context, **settings).total_bytes


@given(settings=SETTINGS, memory=st.integers(260_000_000, 600_000_000))
def test_the_largest_context_is_exact(small, settings, memory):
    longest = plan(small, memory=memory, **settings).max_context
    if longest:
        assert plan(small, context=longest, memory=memory, **settings).fits
    if longest < 65_536:
        assert not plan(small, context=longest + 1, memory=memory, **settings).fits


@given(settings=SETTINGS, context=st.integers(1, 65_536), memory=st.integers(260_000_000, 600_000_000))
def test_what_is_advised_fits(small, settings, context, memory):
    made = plan(small, context=context, memory=memory, **settings)
    assert not (made.fits and made.advice)
    for advice in made.advice:
        changed = plan(small, **{"context": context, "memory": memory, **settings, **advice.change})
        assert changed.fits
        assert changed.total_bytes == advice.total_bytes
        assert str(advice) in made.verdict
    if not made.fits and not made.advice:  # then the least that can be asked for does not fit either
        least = {"context": plans.LEAST_CONTEXT, "kv": "int8", "parallel": 1, "quantize": settings["quantize"]}
        for scheme in ["int4", "int8"] if settings["quantize"] is None else [settings["quantize"]]:
            assert not plan(small, **settings | least | {"quantize": scheme}, memory=memory).fits


def test_a_chunk_is_halved_where_memory_is_tight(small):
    whole = plan(small, context=4096).total_bytes
    chunks = [plan(small, context=4096, memory=whole - taken).chunk for taken in range(0, 20_000_000, 50_000)]
    assert set(chunks) == set(CHUNKS)
    assert chunks == sorted(chunks, reverse=True)


def test_advice_names_each_setting_that_helps(big):
    made = plan(big, context=131_072, quantize="int4", parallel=3, memory=12 * GB)
    assert [list(advice.change) for advice in made.advice] == [["context"], ["parallel"], ["kv"]]
    floats = plan(big, context=32_768, memory=16 * GB)
    assert [dict(advice.change) for advice in floats.advice] == [{"quantize": "int8"}, {"quantize": "int4"}]
    both = plan(big, context=262_144, memory=10 * GB)
    assert [dict(advice.change) for advice in both.advice] == [{"quantize": "int4", "kv": "int8"}]
    shorter = plan(big, context=262_144, memory=9 * GB)
    assert [[*advice.change] for advice in shorter.advice] == [["context", "quantize", "kv"]]
    none = plan(big, memory=GB)
    assert none.advice == ()
    assert "no context" in none.verdict


# No torch


def test_it_loads_without_torch():
    code = "import iolite.checkpoint.plan, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Loading


def least_bytes(config, **settings):
    """With the smallest chunk: what a plan takes that does not fit."""
    return plan(config, memory=1, **settings).total_bytes


def test_load_takes_as_much_context_as_fits(folder, monkeypatch):
    whole = iolite.load(folder, device="cpu")
    assert whole.context == 4096
    assert "memory" not in whole.choice.reason
    monkeypatch.setenv(memory.VARIABLE, f"{least_bytes(whole.config, context=3000)}B")
    model = iolite.load(folder, device="cpu")
    assert model.context == 3000
    assert model.choice.reason.endswith("; a context of 3,000 tokens of 4,096, which is what fits in memory")
    assert iolite.load(folder, device="cpu", context=2999).context == 2999


def test_load_refuses_what_does_not_fit_before_it_reads_weights(folder, monkeypatch):
    monkeypatch.setattr(generate_model, "read_weights", lambda *_: pytest.fail("weights were read"))
    config = ModelConfig.from_folder(folder)
    monkeypatch.setenv(memory.VARIABLE, f"{least_bytes(config, context=4096) - 1}B")
    with pytest.raises(UsageError, match=r"4,096 tokens takes .* MB, and .* MB of memory are free") as error:
        iolite.load(folder, device="cpu", context=4096)
    assert error.value.hint.startswith("what fits: ")
    monkeypatch.setenv(memory.VARIABLE, "200MB")
    with pytest.raises(UsageError, match="and 200"):
        iolite.load(folder, device="cpu")


def test_load_asks_what_is_free(folder, monkeypatch):
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    monkeypatch.setattr(iolite.device, "available_memory", lambda: 30_000_000)
    monkeypatch.setattr(iolite.device, "resident_memory", lambda: 10_000_000)
    with pytest.raises(UsageError, match=r"40.0 MB of memory are free"):
        iolite.load(folder, device="cpu")
    monkeypatch.setattr(iolite.device, "available_memory", lambda: None)
    assert iolite.load(folder, device="cpu").context == 4096


def test_load_counts_what_the_reference_takes(folder, monkeypatch):
    config, settings = ModelConfig.from_folder(folder), {"quantize": "int4", "kv": "float32", "context": 4096}
    monkeypatch.setattr(cpu, "load", lambda: None)
    monkeypatch.setenv(memory.VARIABLE, f"{least_bytes(config, **settings, compiled=False)}B")
    assert iolite.load(folder, device="cpu", **settings).context == 4096
    monkeypatch.setenv(memory.VARIABLE, f"{least_bytes(config, **settings)}B")
    with pytest.raises(UsageError, match="takes"):
        iolite.load(folder, device="cpu", **settings)
