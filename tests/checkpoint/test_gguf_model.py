"""Models in GGUF files: what is written and read back is the same model, and what cannot be honoured is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from support.gguf_model import save_tiny

from iolite.checkpoint import convert, gguf_names, names, packing
from iolite.checkpoint.convert import Beside, contents_of
from iolite.checkpoint.folder import open_weights, read_config
from iolite.checkpoint.gguf import GgufFile, create_gguf
from iolite.checkpoint.gguf_blocks import dequantize
from iolite.checkpoint.gguf_blocks import encode as ggml_encode
from iolite.checkpoint.gguf_source import GgufSource, choose_file, embedders_beside
from iolite.checkpoint.hub import nano_folder, resolve
from iolite.checkpoint.source import open_source
from iolite.config import GenerationConfig, ProcessorConfig
from iolite.errors import CheckpointError, ConfigError, DownloadError, UsageError
from iolite.quant.formats import INT4, INT8, PackedMatrix, decode, encode, quantise
from iolite.text.template import ChatTemplate
from iolite.text.tokenizer import Tokenizer


def to_gguf(source: Path, path: Path, to: str | None) -> list[Path]:
    return convert.to_gguf(open_source(str(source)), path, to, Beside())


def read(path: Path, scheme: str | None = None) -> dict[str, Any]:
    return packing.read_weights(GgufSource(path), scheme)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "published")


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> Path:
    """The model as bf16, with its embedders beside it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-BF16.gguf"
    assert to_gguf(folder, path, "bf16") == [path, path.with_name("mmproj-tiny-BF16.gguf")]
    return path


def rewritten(path: Path, target: Path, keys: dict[str, Any], drop: tuple[str, ...] = ()) -> Path:
    """A copy of a GGUF file with other values of some keys (None: without it) and without some tensors."""
    file = GgufFile(path)
    metadata = {key: value for key, value in (file.metadata | keys).items() if value is not None}
    tensors = [t for t in file.tensors.values() if t.name not in drop]
    with create_gguf(target, metadata, [(t.name, t.shape, t.type) for t in tensors]) as writer:
        for tensor in tensors:
            writer.write(tensor.name, file.raw(tensor.name))
    return target


# Back and forth


@pytest.mark.parametrize("name", ["published", "own-values"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back(name, tied, tmp_path):
    folder = save_tiny(tmp_path / "tiny", name, tied=tied)
    to_gguf(folder, tmp_path / "tiny.gguf", "bf16")
    source = GgufSource(tmp_path / "tiny.gguf")
    assert source.config == read_config(folder)
    assert source.scheme is None
    stored, weights = open_weights(folder), packing.read_weights(source, None)
    assert weights.keys() == stored.keys()
    for key, weight in weights.items():
        assert torch.equal(weight.float(), stored[key].tensor().float()), key


def test_settings_come_back(folder, written):
    source, config = GgufSource(written), read_config(folder)
    assert source.generation() == GenerationConfig.from_folder(folder, config)
    assert source.processor() == ProcessorConfig.from_folder(folder, config)
    assert source.template().source == ChatTemplate.from_folder(folder).source


def test_the_tokenizer_comes_back(folder, written):
    """The very same tokenizer.json, but for the order of keys."""
    original = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(GgufSource(written).tokenizer().to_json()) == original


def test_unused_ids_stay_unused(tmp_path, folder):
    """The table may be larger than the tokenizer; llama.cpp wants a token for every row, so unused ones are written."""
    contents = contents_of(open_source(str(folder)))
    text = dataclasses.replace(contents.config.text, vocab_size=863)
    from iolite.checkpoint.gguf_metadata import read_tokenizer, tokenizer_metadata

    metadata = tokenizer_metadata(contents.tokenizer, text, (), None)
    assert metadata["tokenizer.ggml.tokens"][858:] == ["thanks", "[PAD859]", "[PAD860]", "[PAD861]", "[PAD862]"]
    assert list(metadata["tokenizer.ggml.token_type"][858:]) == [1, 5, 5, 5, 5]
    back = read_tokenizer(metadata, "x")
    assert back.vocab_size == contents.tokenizer.vocab_size
    assert back.encode("[PAD859]") == contents.tokenizer.encode("[PAD859]")


def test_greedy_decoding_is_temperature_0(folder, written):
    """The embedded model decodes greedily; llama.cpp does at temperature 0."""
    assert GgufFile(written).metadata["general.sampling.temp"] == 0
    assert not GgufSource(written).generation().do_sample


def test_patches_lie_channel_by_channel(folder, written):
    """Column c * S² + y * S + x of the file is column (y * S + x) * 3 + c of ours; positions are split by axis."""
    file = GgufFile(written.with_name("mmproj-tiny-BF16.gguf"))
    stored, side = open_weights(folder), 48
    for theirs, ours in (("v.patch_embd.weight", "patch_dense.weight"), ("v.patch_norm.1.bias", "patch_ln1.bias")):
        here = stored[f"vision_embedder.{ours}"].tensor().float()
        there = dequantize(file.raw(theirs), "F32", file.tensors[theirs].shape)
        for channel, y, x in ((0, 0, 0), (1, 0, 2), (2, 5, 47), (0, 47, 1)):
            at = channel * side * side + y * side + x
            assert torch.equal(there[..., at], here[..., (y * side + x) * 3 + channel])
    assert file.tensors["v.position_embd.weight"].shape == (2, 64, 192)


def test_without_embeddings_beside_it_reads_text_only(written, tmp_path):
    shutil.copy(written, tmp_path / "alone.gguf")
    source = GgufSource(tmp_path / "alone.gguf")
    assert source.config.modalities == ("text",)
    assert "embed_audio.embedding_projection.weight" not in packing.read_weights(source, None)


# Quantised


@pytest.mark.parametrize(("to", "kind", "table"), [("q8_0", "Q8_0", "Q8_0"), ("q4_0", "Q4_0", "Q8_0")])
def test_quantised_and_read_again(folder, tmp_path, to, kind, table):
    to_gguf(folder, tmp_path / "a.gguf", to)
    file, source, stored = GgufFile(tmp_path / "a.gguf"), GgufSource(tmp_path / "a.gguf"), open_weights(folder)
    assert source.scheme == {"q8_0": "int8", "q4_0": "int4"}[to]
    for name, weight in packing.read_weights(source, None).items():
        if not isinstance(weight, PackedMatrix):
            assert torch.equal(weight.float(), stored[name].tensor().float()), name
            continue
        tensor = file.tensors[gguf_names.to_gguf(name)]
        assert tensor.type == (table if name == names.EMBEDDING else kind)
        assert torch.equal(weight.to_float(), dequantize(file.raw(tensor.name), tensor.type, tensor.shape))
        original = stored[name].tensor().float()
        error = (weight.to_float() - original).abs()
        if tensor.type == "Q8_0":  # half a step at most, and a step is the largest of 32 over 127
            steps = original.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1) / 127
            assert (error <= (0.5 + 127 / 2048) * steps).all()  # the scale is rounded to fp16
        else:  # no worse than ggml's own rule for the scale
            theirs = dequantize(ggml_encode(original, "Q4_0"), "Q4_0", tuple(original.shape))
            assert error.square().sum() <= (theirs - original).square().sum()


def test_packed_weights_are_only_reordered(folder, tmp_path):
    """A Q4_0 file read and written again is the same file, but for its name."""
    to_gguf(folder, tmp_path / "a.gguf", "q4_0")
    to_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", None)
    first, second = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "b.gguf")
    for name, tensor in first.tensors.items():
        assert second.tensors[name].type == tensor.type
        assert torch.equal(first.raw(name), second.raw(name)), name


def test_float_matrices_of_a_quantised_file(folder, tmp_path):
    """Files of more quality leave some matrices in floats; beside packed ones they are packed in 8 bits."""
    to_gguf(folder, tmp_path / "a.gguf", "q4_0")
    file, floats = GgufFile(tmp_path / "a.gguf"), "blk.0.ffn_up.weight"
    original = open_weights(folder)[gguf_names.from_gguf(floats)].tensor()
    tensors = [(t.name, t.shape, "F16" if t.name == floats else t.type) for t in file.tensors.values()]
    with create_gguf(tmp_path / "b.gguf", file.metadata, tensors) as writer:
        for name, _, _ in tensors:
            writer.write(name, original.half().view(torch.uint8) if name == floats else file.raw(name))
    source = GgufSource(tmp_path / "b.gguf")
    assert source.scheme == "int4"
    weight = read(tmp_path / "b.gguf")[gguf_names.from_gguf(floats)]
    assert weight.format == INT8 == source.packed_formats()[gguf_names.from_gguf(floats)]
    assert torch.equal(weight.to_float(), quantise(original.half(), INT8).to_float())


def test_weights_of_quantisation_aware_training_keep_their_lattice(folder, tmp_path):
    contents = contents_of(open_source(str(folder)))
    name = "language_model.layers.0.mlp.up_proj.weight"
    lattice = decode(encode(contents.weight(name), INT4)).bfloat16()
    weight = contents.weight
    changed = dataclasses.replace(contents, weight=lambda n: lattice if n == name else weight(n))
    from iolite.checkpoint.gguf_export import write_model

    write_model(tmp_path / "a.gguf", changed, "q4_0")
    back = GgufSource(tmp_path / "a.gguf").weight(name)
    assert torch.equal(back.to_float().bfloat16(), lattice)


def test_a_quantised_file_is_not_quantised_again(folder, tmp_path):
    to_gguf(folder, tmp_path / "a.gguf", "q4_0")
    with pytest.raises(UsageError, match="packed as int4 already"):
        read(tmp_path / "a.gguf", "int8")


def test_float_files_are_quantised_on_request(written):
    weights = read(written, "int4")
    packed = [name for name, weight in weights.items() if isinstance(weight, PackedMatrix)]
    assert len(packed) == 1 + 6 * 7 - 1  # the table, and seven matrices in each of six layers but one: K = V


# Metadata that cannot be honoured


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"general.architecture": "llama"}, "holds the architecture 'llama'"),
        ({"general.architecture": "gemma4-assistant"}, "holds a drafter"),
        ({"gemma4.expert_count": 8}, "expert_count = 8 is not supported"),
        ({"gemma4.attention.shared_kv_layers": 2}, "shared_kv_layers = 2"),
        ({"gemma4.embedding_length_per_layer_input": 64}, "embedding_length_per_layer_input"),
        ({"gemma4.rope.scaling.factor": 4.0}, "rope.scaling.factor"),
        ({"gemma4.attention.causal": False}, "attention.causal"),
        ({"gemma4.attention.new_trick": 1}, "new_trick is not known"),
        ({"gemma4.block_count": 5}, "must say yes or no 5 times"),
        ({"gemma4.block_count": None}, "block_count is missing"),
        ({"gemma4.block_count": True}, "block_count is True"),
        ({"gemma4.attention.value_length": 32}, "value_length is not the length of a key"),
        ({"gemma4.rope.dimension_count": 32}, "rope.dimension_count is not"),
        ({"gemma4.attention.key_length": 128}, "rope_freqs.weight has 32 values"),
        ({"gemma4.attention.head_count_kv": np.asarray([2, 2, 1, 2, 2, 1], np.int32)}, "differs between layers"),
        ({"gemma4.attention.head_count": 3}, "cannot share"),
        ({"gemma4.embedding_length": 512}, "has the shape"),
        ({"gemma4.feed_forward_length": np.asarray([512] * 5 + [256], np.int32)}, "differs between layers"),
        ({"tokenizer.ggml.model": "llama"}, "of the kind 'llama'"),
        ({"tokenizer.ggml.tokens": ["<pad>"] * 859}, "two tokens have the same text"),
        ({"tokenizer.ggml.tokens": ["<pad>", "a"]}, "tokens, but a table of 859"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer"),
        ({"tokenizer.ggml.token_type": np.asarray([1], np.int32)}, "the types of 1"),
        ({"tokenizer.ggml.merges": ["a nothing-like-this"]}, "cannot be used"),
        ({"tokenizer.chat_template": 7}, "is no text"),
        ({"general.sampling.temp": "hot"}, "general.sampling.temp is 'hot'"),
    ],
)
def test_metadata_that_cannot_be_honoured(written, tmp_path, keys, fault):
    path = rewritten(written, tmp_path / "a.gguf", keys)
    with pytest.raises(CheckpointError, match=fault):
        read_settings(path)


def read_settings(path: Path) -> None:
    source = GgufSource(path)
    source.tokenizer(), source.template(), source.generation()


@pytest.mark.parametrize(
    "name", ["output_norm.weight", "blk.2.attn_v.weight", "blk.5.attn_k.weight", "token_embd.weight"]
)
def test_a_tensor_that_is_missing(written, tmp_path, name):
    with pytest.raises(CheckpointError, match="missing"):
        GgufSource(rewritten(written, tmp_path / "a.gguf", {}, drop=(name,)))


def test_frequencies_that_are_not_the_familys(written, tmp_path):
    file = GgufFile(written)
    tensors = [(t.name, t.shape, t.type) for t in file.tensors.values()]
    with create_gguf(tmp_path / "a.gguf", file.metadata, tensors) as writer:
        for name in file.tensors:
            raw = file.raw(name).clone()
            if name == gguf_names.ROPE:
                raw.view(torch.float32)[3] = 2.0
            writer.write(name, raw)
    with pytest.raises(ConfigError, match="other frequencies are not supported"):
        GgufSource(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"clip.vision.projector_type": "gemma4v"}, "kind 'gemma4v'"),
        ({"clip.audio.projector_type": "gemma4a"}, "kind 'gemma4a'"),
        ({"clip.vision.image_mean": np.asarray([0.5] * 3, np.float32)}, "image_mean"),
        ({"clip.vision.patch_size": 14}, "not made of RGB squares"),
        ({"clip.vision.patch_size": 24}, "do not make a patch"),
        ({"clip.vision.embedding_length": 100}, "has the shape"),
        ({"clip.has_audio_encoder": False}, "the metadata ask for none"),
        ({"iolite.processor_config": "["}, "is no JSON object"),
        ({"iolite.processor_config": '{"audio_seq_length": -1}'}, "audio_seq_length must be"),
    ],
)
def test_embedders_that_cannot_be_honoured(written, tmp_path, keys, fault):
    shutil.copy(written, tmp_path / "tiny.gguf")
    rewritten(written.with_name("mmproj-tiny-BF16.gguf"), tmp_path / "mmproj-tiny.gguf", keys)
    with pytest.raises(CheckpointError, match=fault):
        GgufSource(tmp_path / "tiny.gguf").processor()


def test_the_embedders_file_is_not_the_model(written):
    with pytest.raises(ConfigError, match="name the model's file"):
        GgufSource(written.with_name("mmproj-tiny-BF16.gguf"))


def test_embedders_of_another_width(written, tmp_path):
    """A mmproj file of another model lies beside: its projection does not fit."""
    shutil.copy(written, tmp_path / "tiny.gguf")
    to_gguf(nano_folder(), tmp_path / "nano.gguf", "bf16")
    (tmp_path / "mmproj-nano.gguf").rename(tmp_path / "mmproj.gguf")
    with pytest.raises(CheckpointError, match=r"mm\.input_projection\.weight has the shape \[192, 192\]"):
        GgufSource(tmp_path / "tiny.gguf")


# Names

FILES = (
    "gemma-4-12b-it-Q4_0.gguf",
    "gemma-4-12b-it-Q4_K_M.gguf",
    "gemma-4-12b-it-UD-Q4_K_XL.gguf",
    "gemma-4-12b-it-UD-Q4_0.gguf",
    "BF16/gemma-4-12b-it-BF16-00001-of-00002.gguf",
    "BF16/gemma-4-12b-it-BF16-00002-of-00002.gguf",
    "mmproj-BF16.gguf",
    "mmproj-F16.gguf",
    "mtp-gemma-4-12b-it.gguf",
)


@pytest.fixture
def repository(tmp_path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("quant", "index"),
    [("Q4_0", 0), ("q4_0", 0), ("Q4_K_M", 1), ("q4_k_xl", 2), ("UD-Q4_K_XL", 2), ("ud-q4_0", 3), ("bf16", 4)],
)
def test_the_file_of_a_quantisation(repository, quant, index):
    assert choose_file(repository, quant, "repo") == repository / FILES[index]
    assert resolve(f"{repository}:{quant}") == repository / FILES[index]


@pytest.mark.parametrize("quant", ["Q4_K", "Q8_0", "0", "it"])
def test_a_quantisation_that_is_not_there(repository, quant):
    with pytest.raises(CheckpointError, match=f"has no file '{quant}'") as caught:
        choose_file(repository, quant, "repo")
    assert "gemma-4-12b-it-Q4_K_M, gemma-4-12b-it-UD-Q4_0" in caught.value.hint
    assert "mmproj" not in caught.value.hint and "mtp" not in caught.value.hint


def test_several_files_and_no_choice(repository):
    with pytest.raises(CheckpointError, match="has 5 GGUF files"):
        resolve(str(repository))


def test_a_file_of_an_id_in_the_cache(repository, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--Owner--Some-GGUF" / "snapshots" / "c0ffee"
    shutil.copytree(repository, snapshot)
    assert resolve("owner/some-gguf:q4_k_m") == snapshot / FILES[1]
    with pytest.raises(CheckpointError, match="owner/some-gguf has 5 GGUF files"):
        resolve("owner/some-gguf")
    with pytest.raises(DownloadError) as caught:
        resolve("owner/other:Q4_0")
    assert caught.value.hint == 'fetch it: hf download owner/other --include "*Q4_0*.gguf" --include "mmproj*"'


def test_the_only_file_needs_no_choice(tmp_path):
    for name in ("model.gguf", "mmproj-model.gguf", "model-mtp.gguf"):
        (tmp_path / name).touch()
    assert resolve(str(tmp_path)) == tmp_path / "model.gguf"


def test_which_embedders(repository):
    assert embedders_beside(repository / FILES[0]) == repository / "mmproj-BF16.gguf"
    assert embedders_beside(repository / FILES[4]) == repository / "mmproj-BF16.gguf"  # one folder further up
    (repository / "mmproj-gemma-4-12b-it-Q4_0.gguf").touch()
    assert embedders_beside(repository / FILES[0]) == repository / "mmproj-gemma-4-12b-it-Q4_0.gguf"


def test_embedders_that_nothing_tells_apart(tmp_path):
    for name in ("a.gguf", "mmproj-x.gguf", "mmproj-y.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"mmproj-x\.gguf, mmproj-y\.gguf"):
        embedders_beside(tmp_path / "a.gguf")


def test_names_go_both_ways():
    config = read_config(nano_folder())
    ours = list(names.expected_shapes(config))
    theirs = [gguf_names.to_gguf(name) for name in ours]
    assert len(set(theirs)) == len(ours)
    assert [gguf_names.from_gguf(name) for name in theirs] == ours
    assert gguf_names.from_gguf("blk.01.attn_q.weight") is None
    assert gguf_names.from_gguf("blk.1.attn_qkv.weight") is None


def test_a_tokenizer_is_made_of_tokens(written):
    assert isinstance(GgufSource(written).tokenizer(), Tokenizer)
