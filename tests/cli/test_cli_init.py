"""`iolite init`: synthetic models are of their shape, load like real ones, and say that they are random."""

from __future__ import annotations

import json
from collections import namedtuple

import pytest
import torch

import iolite
from iolite.checkpoint import names
from iolite.checkpoint.gguf_drafter import open_drafter
from iolite.checkpoint.source import open_source
from iolite.checkpoint.synthetic import SyntheticSource, config_of, drafter_config
from iolite.cli import init as init_module
from iolite.cli import run_command


def init(*arguments):
    return run_command(["init", *map(str, arguments), "--shape", "tiny"])


@pytest.mark.parametrize("scheme", ["int4", "int8", "none"])
def test_a_folder_that_loads_and_draws(tmp_path, capsys, scheme):
    folder = tmp_path / "model"
    assert init(folder, "--quantize", scheme) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    model = iolite.load(folder)
    assert model.scheme == (None if scheme == "none" else scheme)
    logits = model.logits(model.prompt("hello"))
    assert logits.isfinite().all() and 0.1 < logits.std() < 10
    assert "random weights" in (folder / "README.md").read_text()
    source = open_source(folder)
    assert {n: source.weight(n).shape for n in source.names()} == names.expected_shapes(source.config)


def test_a_seed_gives_the_same_model_again(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert init(tmp_path / name, "--seed", seed) == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(("scheme", "kinds"), [("int4", "int4"), ("int8", "int8"), ("none", None)])
def test_a_gguf_file_with_all_that_belongs_to_it(tmp_path, capsys, scheme, kinds):
    path = tmp_path / "new" / "model.gguf"
    assert init(path, "--quantize", scheme, "--drafter") == 0
    beside = [path, path.with_name("mmproj-model.gguf"), path.with_name("mtp-model.gguf")]
    assert capsys.readouterr().out.splitlines() == [str(p) for p in beside]
    assert sorted(path.parent.iterdir()) == sorted(beside)  # nothing is left of what the drafter was made from
    assert iolite.load(path).scheme == kinds


def test_gguf_and_folder_hold_the_same_weights(tmp_path):
    assert init(tmp_path / "folder") == 0 and init(tmp_path / "model.gguf") == 0
    folder, file = iolite.load(tmp_path / "folder"), iolite.load(tmp_path / "model.gguf")
    prompt = folder.prompt("hello")
    assert torch.equal(folder.logits(prompt), file.logits(prompt))


def test_a_drafter_of_the_published_layout(tmp_path):
    folder = tmp_path / "model"
    assert init(folder, "--drafter") == 0
    config = json.loads((folder / "drafter" / "config.json").read_text())
    assert config["model_type"] == "gemma4_unified_assistant"
    source = open_source(folder)
    assert config["backbone_hidden_size"] == source.config.text.hidden_size
    drafter = open_drafter(folder / "drafter", source.tokenizer())  # checks every name and shape
    assert drafter.text == drafter_config(source.config)
    assert drafter.text.num_hidden_layers == 4 and drafter.text.layer_types[-1] == "full_attention"


def test_a_config_is_a_shape(tmp_path):
    assert init(tmp_path / "a") == 0
    assert run_command(["init", str(tmp_path / "b"), "--shape", str(tmp_path / "a" / "config.json")]) == 0
    a, b = (open_source(tmp_path / name).config for name in "ab")
    assert a.to_hf() == b.to_hf()


def test_the_size_is_known_before(tmp_path):
    assert init(tmp_path / "a") == 0
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert 0.97 * size < SyntheticSource(config_of("tiny"), "int4").num_bytes() <= size
    # The true shape: within the 16 GB of a laptop at 4 bits, its float form far beyond.
    assert 6.7e9 < SyntheticSource(config_of("12b"), "int4").num_bytes() < 6.9e9
    assert 23.9e9 < SyntheticSource(config_of("12b"), None).num_bytes() < 24e9


def test_a_full_disk_is_noticed_first(tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(init_module.shutil, "disk_usage", lambda place: usage(10, 10, 1000))
    assert init(tmp_path / "model") == 2
    assert "do not fit on the disk" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_nothing_is_written_over(tmp_path, capsys):
    assert init(tmp_path / "model") == 0
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert init(tmp_path / "model", "--seed", 3) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert init(tmp_path / "model", "--seed", 3, "--force") == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != before
