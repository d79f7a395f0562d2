"""Folders: what Transformers saves loads here, what we save loads there, and every tensor is the same one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from support.tiny import TINY, reference_model
from transformers import Gemma4UnifiedForConditionalGeneration

from iolite.checkpoint.folder import INDEX, WEIGHTS, load_folder, open_weights, save_folder
from iolite.checkpoint.names import from_file
from iolite.config import GenerationConfig, ModelConfig, ProcessorConfig
from iolite.errors import CheckpointError


def reference_state(name):
    """The reference's tensors by our names; a tied head, which it lists too, left out."""
    state = {from_file(key): tensor for key, tensor in reference_model(name).state_dict().items()}
    if TINY[name].tied:
        del state["lm_head.weight"]
    return state


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("name", TINY)
def test_a_folder_of_transformers_loads(tiny_folder, name):
    config, model = load_folder(tiny_folder(name))
    assert config.tie_word_embeddings is TINY[name].tied
    assert_same(model.state_dict(), reference_state(name))


@pytest.mark.parametrize("name", TINY)
def test_our_folder_loads_in_transformers(tiny_folder, tmp_path, name):
    config, model = load_folder(tiny_folder(name))
    save_folder(tmp_path, model, config)
    theirs, info = Gemma4UnifiedForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(theirs.state_dict(), dict(reference_model(name).state_dict()))


@pytest.mark.parametrize("shard_bytes", [1, 40_000])
def test_shards_load_in_both(tiny_folder, tmp_path, shard_bytes):
    config, model = load_folder(tiny_folder("published"))
    save_folder(tmp_path, model, config, max_shard_bytes=shard_bytes)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    tensors = len(model.state_dict())
    assert len(shards) == tensors if shard_bytes == 1 else 2 < len(shards) < tensors
    again = load_folder(tmp_path)[1]
    assert_same(again.state_dict(), reference_state("published"))
    theirs = Gemma4UnifiedForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(theirs.state_dict(), dict(reference_model("published").state_dict()))


def test_shards_of_transformers_load(tmp_path):
    reference_model("published").save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / INDEX).exists()
    assert_same(load_folder(tmp_path)[1].state_dict(), reference_state("published"))


def test_the_names_transformers_uses_in_memory_load_too(tiny_folder, tmp_path):
    folder = tiny_folder("published")
    state = dict(reference_model("published").state_dict())
    del state["lm_head.weight"]
    assert "model.embed_vision.multimodal_embedder.embedding_projection.weight" in state
    safetensors.torch.save_file(state, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert_same(load_folder(tmp_path)[1].state_dict(), reference_state("published"))


def test_a_head_that_is_stored_though_tied_must_be_the_embedding(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_folder("published") / "config.json").read_bytes())
    state = {key: tensor.clone() for key, tensor in reference_model("published").state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / WEIGHTS)
    assert_same(load_folder(tmp_path)[1].state_dict(), reference_state("published"))
    state["lm_head.weight"][0, 0] += 1
    safetensors.torch.save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="differs from it"):
        load_folder(tmp_path)


def test_weights_in_the_files_format_are_views_of_the_file(tiny_folder):
    folder = tiny_folder("published")
    _, model = load_folder(folder)
    addresses = sorted(t.data_ptr() for t in model.state_dict().values())
    size = (folder / WEIGHTS).stat().st_size
    assert addresses[-1] - addresses[0] < size  # one mapping holds them all


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.float32])
def test_every_tensor_is_converted(tiny_folder, dtype):
    _, model = load_folder(tiny_folder("published"), dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    expected = {name: tensor.to(wanted) for name, tensor in reference_state("published").items()}
    assert_same(model.state_dict(), expected)


def test_formats_survive_saving(tiny_folder, tmp_path):
    config, model = load_folder(tiny_folder("published"), dtype="bfloat16")
    save_folder(tmp_path, model, config)
    again, loaded = load_folder(tmp_path)
    assert again.dtype == "bfloat16"
    assert_same(loaded.state_dict(), model.state_dict())
    assert {item.dtype for item in open_weights(tmp_path).values()} == {"BF16"}


def test_saving_where_the_weights_came_from(tiny_folder, tmp_path):
    """The model is a view of the very file that is replaced; and shards of an earlier save do not survive."""
    config, model = load_folder(tiny_folder("published"))
    save_folder(tmp_path, model, config, max_shard_bytes=40_000)
    config, model = load_folder(tmp_path)
    with torch.no_grad():
        model.language_model.norm.weight += 1
    save_folder(tmp_path, model, config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    expected = reference_state("published")
    expected["language_model.norm.weight"] = expected["language_model.norm.weight"] + 1
    config, model = load_folder(tmp_path)
    save_folder(tmp_path, model, config, max_shard_bytes=40_000)
    assert not (tmp_path / WEIGHTS).exists()
    assert_same(load_folder(tmp_path)[1].state_dict(), expected)


def test_settings_are_copied_from_the_base_and_replaced_by_ours(tiny_folder, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "unknown.py"):
        (base / name).write_text(json.dumps({"temperature": 0.25}))
    config, model = load_folder(tiny_folder("published"))
    theirs = ProcessorConfig.from_folder(tiny_folder("published"), config)
    settings = replace(theirs, image_max_soft_tokens=3, image_budgets=None)
    save_folder(out, model, config, base=base, processor=settings)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").exists()
    assert not (out / "unknown.py").exists()
    assert GenerationConfig.from_folder(out, config).temperature == 0.25
    assert ProcessorConfig.from_folder(out, config).image_max_soft_tokens == 3
    assert ModelConfig.from_folder(out) == config


def test_headers_are_read_without_torch(tiny_folder):
    code = (
        "import sys, pathlib; from iolite.checkpoint.folder import open_weights, check_weights, read_config; "
        "f = pathlib.Path(sys.argv[1]); check_weights(read_config(f), open_weights(f)); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tiny_folder("published")], check=True)


def test_unknown_dtype_is_refused(tiny_folder):
    with pytest.raises(CheckpointError, match="cannot be held in 'int8'"):
        load_folder(tiny_folder("published"), dtype="int8")
