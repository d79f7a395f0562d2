"""iolite's own packed checkpoints: written and read back bit for bit; whatever is not one is refused unread."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch
from support.compressed import change_config, change_tensors
from support.folder import random_folder

import iolite
from iolite.checkpoint import packed_folder
from iolite.checkpoint.folder import Stored
from iolite.checkpoint.packing import read_weights
from iolite.checkpoint.safetensors import SafetensorsFile
from iolite.checkpoint.source import FolderSource, open_source
from iolite.errors import CheckpointError, UsageError
from iolite.quant.formats import PackedMatrix

PROJECTION = "model.language_model.layers.0.mlp.up_proj.weight"
NORM = "model.language_model.norm.weight"


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module", params=["int4", "int8"])
def packed(request, float_folder, tmp_path_factory):
    """(scheme, weights in memory, the folder they were written to)."""
    folder = shutil.copytree(float_folder, tmp_path_factory.mktemp(request.param) / "model")
    weights = read_weights(FolderSource(float_folder), request.param)
    packed_folder.write(folder / "model.safetensors", request.param, weights, weights.items())
    data = {"quantization_config": packed_folder.quantization_config(request.param)}
    change_config(folder, lambda config: config.update(data))
    return request.param, weights, folder


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed[2], tmp_path / "model")


def test_what_is_written_is_read_back_bit_for_bit(packed):
    scheme, weights, folder = packed
    source = open_source(str(folder))
    assert source.scheme == scheme
    assert {n: f.name for n, f in source.packed_formats().items()} == {
        name: scheme for name, weight in weights.items() if isinstance(weight, PackedMatrix)
    }
    progress = []
    found = read_weights(source, None, lambda *step: progress.append(step))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        if isinstance(weight, PackedMatrix):
            assert found[name].shape == weight.shape
            assert torch.equal(found[name].data, weight.data)
        else:
            assert torch.equal(found[name], weight)
    assert all(what == "reading weights" for _, _, what in progress)


def test_a_packed_folder_answers_like_its_model_quantised_in_memory(packed, float_folder):
    scheme, _, folder = packed
    first, second = iolite.load(folder), iolite.load(float_folder, quantize=scheme)
    assert first.scheme == second.scheme == scheme
    assert "packed" not in first.network.state_dict()
    assert torch.equal(first.logits("what number"), second.logits("what number"))


def test_packed_matrices_begin_at_multiples_of_64_and_every_library_reads_them(packed):
    _, weights, folder = packed
    file = SafetensorsFile(folder / "model.safetensors")
    for name in weights:
        tensor = file.tensor(f"model.{name}")
        if tensor.dtype is torch.uint8:
            assert tensor.data_ptr() % 64 == 0
    theirs = safetensors.torch.load_file(folder / "model.safetensors")
    assert theirs.keys() == {f"model.{name}" for name in weights}
    matrix = weights[PROJECTION.removeprefix("model.")]
    assert torch.equal(theirs[PROJECTION], matrix.data)


def test_another_scheme_is_not_made_of_it(packed):
    scheme, _, folder = packed
    other = {"int4": "int8", "int8": "int4"}[scheme]
    with pytest.raises(UsageError, match=f"packed as {scheme} already") as caught:
        iolite.load(folder, quantize=other)
    assert caught.value.hint
    assert iolite.load(folder, quantize=scheme).scheme == scheme


def test_a_projection_may_stay_floats(copy, packed):
    weights = packed[1]
    matrix = weights[PROJECTION.removeprefix("model.")]
    change_tensors(copy, lambda tensors: tensors.update({PROJECTION: matrix.to_float().bfloat16()}))
    found = FolderSource(copy).weight(PROJECTION.removeprefix("model."))
    assert torch.equal(found, matrix.to_float().bfloat16())


# What is refused


@pytest.fixture
def unread(monkeypatch):
    """Makes reading any weight a failure of the test."""

    def tensor(self):
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr(Stored, "tensor", tensor)


def cut(tensors):
    tensors[PROJECTION] = tensors[PROJECTION][:-1].contiguous()


BAD_TENSORS = {
    "a tile of no format": (lambda t: t.update({PROJECTION: t[PROJECTION][..., :-64].contiguous()}), "tiles of"),
    "a row of tiles too few": (cut, r"is \[31, 3, .*but config.json makes it \[32, 3, "),
    "two dimensions": (lambda t: t.update({PROJECTION: t[PROJECTION].flatten(1)}), "is in U8, which is no weight"),
    "a packed norm": (lambda t: t.update({NORM: torch.zeros(12, 1, 576, dtype=torch.uint8)}), "is in U8"),
    "a norm of the wrong size": (lambda t: t.update({NORM: t[NORM][1:].clone()}), r"is \[191\], .*makes it \[192\]"),
    "floats of another kind": (lambda t: t.update({NORM: t[NORM].double()}), "is in F64, which is no weight"),
    "one missing": (lambda t: t.pop(NORM), f"tensor {NORM} is missing from the weights"),
    "one unknown": (
        lambda t: t.update({"model.more": torch.zeros(1)}),
        "model.more is not a part",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_before_a_weight_is_read(copy, unread, case):
    change, message = BAD_TENSORS[case]
    change_tensors(copy, change)
    with pytest.raises(CheckpointError, match=message):
        open_source(str(copy))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"version": 2}, "packed weights of version 2"),
        ({"version": None}, "packed weights of version None"),
        ({"scheme": "int3"}, "scheme 'int3'"),
        ({"scheme": ["int4"]}, r"scheme \['int4'\]"),
        ({"quant_method": "gptq"}, "quantised by 'gptq'"),
        ({"quant_method": 7}, "quantised by '7'"),
    ],
)
def test_bad_settings_are_refused_before_a_weight_is_read(copy, unread, quantization, message):
    change_config(copy, lambda config: config["quantization_config"].update(quantization))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(str(copy))
    assert caught.value.hint


@pytest.mark.parametrize("found", ["int4", ["int4"], 1])
def test_settings_that_are_no_object_are_refused(copy, unread, found):
    change_config(copy, lambda config: config.update(quantization_config=found))
    with pytest.raises(CheckpointError, match="quantised by"):
        open_source(str(copy))


def test_packed_bytes_without_the_setting_are_no_weights(copy, unread):
    change_config(copy, lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="weights in U8 are not supported"):
        open_source(str(copy))
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())
