"""Drafters as networks: the same one out of every kind of file, and only beside a model that it fits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.gguf_model import DRAFTER, save_tiny, tiny_text
from support.tiny import randomise
from support.tiny_drafter import reading_only
from torch import Tensor
from transformers import Gemma4UnifiedAssistantForCausalLM

from iolite.cache import KVCache
from iolite.checkpoint.drafter import check_pair, find_drafter, load_drafter, write_folder
from iolite.checkpoint.folder import load_folder
from iolite.checkpoint.gguf_drafter import DrafterSource, drafter_shapes, write_drafter
from iolite.checkpoint.hub import nano_folder
from iolite.checkpoint.safetensors import SafetensorsFile, save_safetensors
from iolite.config import FULL, SLIDING, RopeConfig, TextConfig
from iolite.errors import CheckpointError, UsageError
from iolite.kernels import ops
from iolite.model.batch import Media, RaggedBatch, Segment
from iolite.model.drafter import CachedView, Drafter
from iolite.model.unified import Unified
from iolite.quant.linear import QuantLinear
from iolite.quant.schemes import SCHEMES
from iolite.text.tokenizer import Tokenizer

TEXT: TextConfig = dataclasses.replace(tiny_text("published"), **DRAFTER)  # type: ignore[arg-type]
MODEL = tiny_text("published")
MATRICES = 4 * 5 + 3


@pytest.fixture(scope="module")
def source() -> DrafterSource:
    """A random drafter in bfloat16, as training would hand it over."""
    network = Drafter(TEXT, MODEL.hidden_size)
    randomise(network, seed=7)
    weights = {name: tensor.bfloat16() for name, tensor in network.state_dict().items()}
    shapes = drafter_shapes(TEXT, MODEL.hidden_size)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    return DrafterSource(
        "tiny", TEXT, MODEL.hidden_size, lambda: Tokenizer.from_folder(nano_folder()), shapes, weights.__getitem__
    )


@pytest.fixture(scope="module")
def folder(source: DrafterSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafter")
    write_folder(path, source, tokenizer=source.tokenizer)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Unified:
    _, model = load_folder(save_tiny(tmp_path_factory.mktemp("model"), "published"), dtype=torch.float32)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def scores(model: Unified, drafter: Drafter, count: int = 3) -> Tensor:
    """[count, vocabulary] of a chain with fixed tokens, so that near ties do not part two of them."""
    cache, ids = KVCache(MODEL), torch.arange(40, 70)
    state = model(ids, RaggedBatch(MODEL, [Segment(cache, len(ids))], Media(), torch.device("cpu")))[-1:]
    view, found = CachedView(model, [cache]), []
    for token in range(count):
        step, state = drafter(model.language_model.embed(torch.tensor([50 + token])), state, view)
        found.append(step)
    return torch.cat(found)


def as_floats(path: Path) -> Drafter:
    """The drafter in a file, with the floats that its packed matrices stand for."""
    source = find_drafter(path)
    network = Drafter(source.text, source.backbone_hidden_size)
    network.load_state_dict({name: source.weight(name).float() for name in source.shapes})
    return network


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.std())


def test_a_written_folder_is_the_published_layout(folder: Path, source: DrafterSource) -> None:
    with reading_only():
        theirs = Gemma4UnifiedAssistantForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    back = find_drafter(folder)
    assert (back.text, back.backbone_hidden_size) == (TEXT, MODEL.hidden_size)
    assert back.tokenizer.to_json() == source.tokenizer.to_json()
    for name in source.shapes:
        assert torch.equal(back.weight(name), source.weight(name)), name
        assert torch.equal(theirs[name], source.weight(name)), name


def test_gguf_in_bf16_is_the_same(folder: Path, model: Unified, tmp_path: Path) -> None:
    write_drafter(tmp_path / "mtp.gguf", find_drafter(folder), "bf16")
    expected = scores(model, load_drafter(folder, dtype=torch.float32))
    assert torch.equal(scores(model, load_drafter(tmp_path / "mtp.gguf", dtype=torch.float32)), expected)
    assert 0.5 < expected.std() < 5


@pytest.mark.parametrize(
    ("kind", "most"), [("int8", 0.02), ("int4", 0.35), ("q8_0", 0.02), ("q4_0", 0.35)], ids=lambda x: str(x)
)
def test_packed_is_what_it_stands_for(kind: str, most: float, folder: Path, model: Unified, tmp_path: Path) -> None:
    """In plain torch to rounding; with the kernels, which also round activations to 8 bits, to about a hundredth; and
    it is the drafter that was packed: weights are off by up to half a step of 255, or of 16, of the largest of 32."""
    path = tmp_path / ("packed" if kind in SCHEMES else "mtp.gguf")
    if kind in SCHEMES:
        write_folder(path, find_drafter(folder), kind)
    else:
        write_drafter(path, find_drafter(folder), kind)
    packed, floats = load_drafter(path, dtype=torch.float32), as_floats(path)
    assert sum(isinstance(module, QuantLinear) for module in packed.modules()) == MATRICES
    expected = scores(model, floats)
    with ops.only_reference():
        torch.testing.assert_close(scores(model, packed), expected, rtol=1e-4, atol=1e-4)
    assert relative(scores(model, packed), expected) < 0.03
    assert 1e-4 < relative(expected, scores(model, as_floats(folder))) < most


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_while_it_is_read(scheme: str, folder: Path, model: Unified, tmp_path: Path) -> None:
    """The same as packed before; and a packed one keeps its format, whatever is asked for."""
    write_folder(tmp_path / "packed", find_drafter(folder), scheme)
    found = scores(model, load_drafter(folder, scheme, dtype=torch.float32))
    for asked in (None, *SCHEMES):
        assert torch.equal(found, scores(model, load_drafter(tmp_path / "packed", asked, dtype=torch.float32)))


def test_packed_and_back_to_floats(folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "packed", find_drafter(folder), "int4")
    packed = find_drafter(tmp_path / "packed")
    write_folder(tmp_path / "floats", packed)
    floats = find_drafter(tmp_path / "floats")
    for name in floats.shapes:
        assert floats.packed(name) is None
        assert torch.equal(floats.weight(name), packed.weight(name)), name


def test_a_pair(folder: Path) -> None:
    source = find_drafter(folder)
    check_pair(MODEL, source.text, source.backbone_hidden_size)


@pytest.mark.parametrize(
    ("own", "fault"),
    [
        ({"hidden_size": 512}, r"for hidden states of 256, but the model has 512"),
        ({"vocab_size": 2000}, r"for a vocabulary of \d+, but the model has 2000"),
        ({"head_dim": 16}, r"for sliding attention over heads of 32, but the model has 16"),
        ({"global_head_dim": 32}, r"for full attention over heads of 64, but the model has 32"),
        ({"num_key_value_heads": 8}, r"for sliding attention over \d key-value heads, but the model has 8"),
        ({"num_global_key_value_heads": 4}, r"for full attention over \d key-value heads, but the model has 4"),
        ({"sliding_window": 32}, r"in a window of 16, but the model has 32"),
        ({"rope_sliding": RopeConfig(5000.0)}, r"with the rope base 10000\.0, but the model has 5000\.0"),
        (
            {"rope_full": RopeConfig(1_000_000.0, 0.5)},
            r"for full attention with \d+ angles of rope, but the model has 16",
        ),
        (
            {"layer_types": (FULL,) * 6, "num_hidden_layers": 6},
            r"the drafter has 3 sliding and 1 full layers, but the model 0 sliding and 6 full layers",
        ),
        (
            {"layer_types": (SLIDING,) * 6, "num_hidden_layers": 6},
            r"3 sliding and 1 full layers, but the model 6 sliding and 0 full layers",
        ),
    ],
)
def test_no_pair(own: dict[str, object], fault: str) -> None:
    with pytest.raises(UsageError, match=fault) as error:
        check_pair(dataclasses.replace(MODEL, **own), TEXT, MODEL.hidden_size)  # type: ignore[arg-type]
    assert error.value.hint


def test_no_window_to_look_into() -> None:
    narrow = (dataclasses.replace(text, sliding_window=1) for text in (MODEL, TEXT))
    with pytest.raises(UsageError, match="a window of 1"):
        check_pair(*narrow, MODEL.hidden_size)


@pytest.mark.parametrize(
    ("quantization", "fault"),
    [
        ({"quant_method": "iolite", "scheme": "int4", "version": 2}, "version 2"),
        ({"quant_method": "iolite", "scheme": "int3", "version": 1}, "'int3'"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "other"}, "quantised by 'other'"),
        (None, "is in U8, which is no weight"),
    ],
)
def test_packed_otherwise(quantization: dict[str, object] | None, fault: str, folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path, find_drafter(folder), "int8")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=fault):
        find_drafter(tmp_path)


def test_packed_in_another_shape(folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "packed", find_drafter(folder), "int8")
    shutil.copytree(tmp_path / "packed", tmp_path / "other")
    file, name = SafetensorsFile(tmp_path / "packed" / "model.safetensors"), "pre_projection.weight"
    tensors = {key: file.tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    save_safetensors(tmp_path / "other" / "model.safetensors", tensors | {name: tensors[name][:-1].clone()})
    with pytest.raises(CheckpointError, match=r"pre_projection\.weight has the shape \[7, 8, 1088\]"):
        find_drafter(tmp_path / "other")


def test_weights_that_cannot_be_packed(source: DrafterSource, tmp_path: Path) -> None:
    def weight(name: str) -> Tensor:
        tensor = source.weight(name)
        return torch.full_like(tensor, float("nan")) if name == "post_projection.weight" else tensor

    with pytest.raises(CheckpointError, match=r"cannot quantise post_projection\.weight"):
        write_folder(tmp_path, dataclasses.replace(source, weight=weight), "int4")
    assert not (tmp_path / "config.json").exists()
