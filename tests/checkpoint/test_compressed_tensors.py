"""compressed-tensors w4a16: decoded exactly, and every other form of it refused."""

from __future__ import annotations

import copy as copies
import shutil

import pytest
import torch
from support.compressed import FORM, change_config, change_tensors, compress_folder, random_lattice, three_tensors
from support.folder import random_folder

import iolite
from iolite.checkpoint.packing import read_weights
from iolite.checkpoint.source import FolderSource, open_source
from iolite.errors import CheckpointError, UsageError
from iolite.quant.formats import PackedMatrix

LAYER = "model.language_model.layers.0.mlp.up_proj"
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """(the folder, its weights as float32 by our names)."""
    folder = random_folder(tmp_path_factory.mktemp("compressed"))
    weights = compress_folder(folder)
    return folder, {name.removeprefix("model."): weight for name, weight in weights.items()}


@pytest.fixture
def copy(compressed, tmp_path):
    return shutil.copytree(compressed[0], tmp_path / "model")


def test_every_weight_is_decoded_exactly(compressed):
    folder, weights = compressed
    source = open_source(str(folder))
    assert source.scheme == "int4"
    assert source.packed_formats().keys() == weights.keys()
    for name, weight in weights.items():
        matrix = source.weight(name)
        assert isinstance(matrix, PackedMatrix)
        # Scales of bfloat16 above 2^-14 are fp16 numbers, and a product with a whole number below 8 is exact.
        assert torch.equal(matrix.to_float(), weight)
    assert source.weight("language_model.norm.weight").dtype == torch.float32


def test_it_loads_and_answers_as_the_same_weights_in_floats(compressed, tmp_path):
    folder, weights = compressed
    model = iolite.load(folder)
    assert model.scheme == "int4"
    layer = model.network.language_model.layers[0].mlp.up_proj
    assert torch.equal(layer.matrix.to_float(), weights["language_model.layers.0.mlp.up_proj.weight"])
    # The float weights lie on int4's lattice, so quantising them finds the same codes again.
    other = shutil.copytree(folder, tmp_path / "float")
    change_config(other, lambda config: config.pop("quantization_config"))

    def decode(tensors):
        for name in [n for n in tensors if n.endswith(("weight_packed", "weight_scale", "weight_shape"))]:
            del tensors[name]
        tensors.update({f"model.{name}": weight for name, weight in weights.items()})

    change_tensors(other, decode)
    again = iolite.load(other, quantize="int4")
    # The same weights up to the order of sums; logits are of the size of 1.
    torch.testing.assert_close(again.logits("what"), model.logits("what"), atol=1e-4, rtol=1e-4)


def test_int8_of_int4_is_refused(compressed):
    with pytest.raises(UsageError, match="packed as int4 already"):
        iolite.load(compressed[0], quantize="int8")


def test_projections_that_were_left_as_floats_are_packed_too(copy, compressed):
    weights = compressed[1]
    name = "language_model.layers.0.mlp.up_proj.weight"

    def plain(tensors):
        for end in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{LAYER}.{end}"]
        tensors[f"{LAYER}.weight"] = weights[name]

    change_tensors(copy, plain)
    source = FolderSource(copy)
    assert name not in source.packed_formats()
    matrix = read_weights(source, None)[name]
    assert isinstance(matrix, PackedMatrix)
    # It is on the lattice, which is found again: what is decoded differs by the rounding of one product at most.
    torch.testing.assert_close(matrix.to_float(), weights[name], atol=0, rtol=2**-10)


def test_a_packed_matrix_of_an_embedder_becomes_floats(copy):
    name, rng = "model.embed_vision.embedding_projection.weight", torch.Generator().manual_seed(1)
    wanted = {}

    def squeeze(tensors):
        values, scales = random_lattice(*tensors.pop(name).shape, rng)
        wanted[name] = values.float() * scales.float().repeat_interleave(32, dim=1)
        tensors.update({f"{name.removesuffix('weight')}{k}": t for k, t in three_tensors(values, scales).items()})

    change_tensors(copy, squeeze)
    source = FolderSource(copy)
    assert name.removeprefix("model.") not in source.packed_formats()
    assert torch.equal(source.weight(name.removeprefix("model.")), wanted[name])
    assert iolite.load(copy).network.embed_vision.embedding_projection.weight.dtype == torch.bfloat16


def head_as_floats(tensors):
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()


def head_packed(tensors):
    for end in ("weight_packed", "weight_scale", "weight_shape"):
        tensors[f"lm_head.{end}"] = tensors[f"{LAYER}.{end}"].clone()


@pytest.mark.parametrize("change", [head_as_floats, head_packed])
def test_a_copy_of_a_tied_head_is_left_out(copy, change):
    change_tensors(copy, change)
    source = open_source(str(copy))
    assert [name for name in source.names() if name.startswith("lm_head")] == []
    assert iolite.load(copy).network.config.tie_word_embeddings


# Other forms


def weights_with(**values):
    def change(config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= values

    return change


def form_with(**values):
    return lambda config: config["quantization_config"].update(values)


def group_with(**values):
    return lambda config: config["quantization_config"]["config_groups"]["group_0"].update(values)


TWO = {"a": copies.deepcopy(FORM["config_groups"]["group_0"]), "b": copies.deepcopy(FORM["config_groups"]["group_0"])}
BAD_FORMS = {
    "8 bits": weights_with(num_bits=8),
    "floats of 4 bits": weights_with(type="float"),
    "groups of 128": weights_with(group_size=128),
    "a scale for a row": weights_with(strategy="channel", group_size=None),
    "asymmetric": weights_with(symmetric=False),
    "ordered by activation": weights_with(actorder="group"),
    "ordered by activation, another spelling": weights_with(actorder=True),
    "another packing": form_with(format="int-quantized"),
    "no packing": form_with(format=None),
    "quantised inputs": group_with(input_activations={"num_bits": 8}),
    "no weights": group_with(weights=None),
    "two groups": form_with(config_groups=TWO),
    "no groups": form_with(config_groups=None),
    "groups of text": form_with(config_groups={"group_0": "W4A16"}),
}


@pytest.mark.parametrize("case", BAD_FORMS)
def test_other_forms_are_refused(copy, case):
    change_config(copy, BAD_FORMS[case])
    with pytest.raises(CheckpointError, match="compressed-tensors weights"):
        open_source(str(copy))


# Tensors that are wrong


def replaced(end, change):
    return lambda tensors: tensors.update({f"{LAYER}.{end}": change(tensors[f"{LAYER}.{end}"]).contiguous()})


def without(end):
    return lambda tensors: tensors.pop(f"{LAYER}.{end}")


BAD_HEADERS = {
    "no scales": (without("weight_scale"), "up_proj.weight_scale is missing"),
    "no shape": (without("weight_shape"), "up_proj.weight_shape is missing"),
    "no values": (without("weight_packed"), "up_proj.weight is missing"),
    "zero points": (
        lambda t: t.update({f"{LAYER}.weight_zero_point": torch.zeros(1)}),
        "up_proj.weight_zero_point is not a part",
    ),
    "group indices": (lambda t: t.update({f"{LAYER}.weight_g_idx": torch.zeros(192)}), "weight_g_idx is not a part"),
    "a row too few": (replaced("weight_packed", lambda t: t[1:]), r"is \[511, 24\] I32, wanted \[512, 24\]"),
    "values in int64": (replaced("weight_packed", lambda t: t.long()), r"I64, wanted \[512, 24\]"),
    "groups too few": (replaced("weight_scale", lambda t: t[:, 1:]), r"is \[512, 5\] BF16, wanted \[512, 6\]"),
    "whole scales": (replaced("weight_scale", lambda t: t.int()), "weight_scale is .* I32"),
    "a packed norm": (
        lambda t: t.update({"model.language_model.norm.weight_packed": torch.zeros(1)}),
        "tensor model.language_model.norm.weight_packed is not a part",
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_wrong_tensors_are_refused_before_they_are_read(copy, case):
    change, message = BAD_HEADERS[case]
    change_tensors(copy, change)
    with pytest.raises(CheckpointError, match=message):
        open_source(str(copy))


BAD_VALUES = {
    "rows and columns exchanged": (replaced("weight_shape", lambda t: t.flip(0)), "does not say"),
    "tiny scales": (replaced("weight_scale", lambda t: torch.full_like(t, 3e-8)), "scales that fp16 cannot"),
    "scales under fp16's range": (replaced("weight_scale", lambda t: torch.full_like(t, 1e-12)), "fp16 cannot"),
    "scales over fp16's range": (replaced("weight_scale", lambda t: torch.full_like(t, 1e6)), "fp16 cannot"),
    "infinite scales": (replaced("weight_scale", lambda t: t / 0), "fp16 cannot"),
    "scales that are no numbers": (replaced("weight_scale", lambda t: t * float("nan")), "fp16 cannot"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_wrong_values_are_refused(copy, case):
    change, message = BAD_VALUES[case]
    change_tensors(copy, change)
    source = open_source(str(copy))
    with pytest.raises(CheckpointError, match=message):
        source.weight(f"{LAYER.removeprefix('model.')}.weight")
